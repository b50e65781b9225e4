// What Python asks about the values of a call before it takes raw pointers, in one step each: whether they
// are plain, and whether such a call was seen before. Attribute by attribute from Python this costs twice as
// much.
//
// Knows no torch: fastgpt/_core/guard.py hands over its types and functions, once, in `watch`. A tensor is
// asked through the descriptors of its class.
#pragma once

#include <pybind11/pybind11.h>

#include <cstring>
#include <vector>

namespace fg::bind {

namespace py = pybind11;

class Guard {
 public:
  // tensor, parameter: the exact types that are plain. grad_enabled, any_autocast: functions. modes:
  // (function, the singleton it returns while nothing but an ordinary eager call is going on). Never
  // released: it lasts as long as the module.
  void watch(py::handle tensor, py::handle parameter, py::handle grad_enabled, py::handle any_autocast,
             py::handle strided, const py::tuple& modes) {
    tensor_ = reinterpret_cast<PyTypeObject*>(kept(tensor));
    parameter_ = reinterpret_cast<PyTypeObject*>(kept(parameter));
    grad_enabled_ = kept(grad_enabled), any_autocast_ = kept(any_autocast), strided_ = kept(strided);
    const auto of = [&](const char* name) { return kept(py::object(tensor.attr(name))); };
    is_neg_ = of("is_neg"), is_zero_ = of("_is_zerotensor"), is_cpu_ = of("is_cpu"), is_cuda_ = of("is_cuda");
    get_device_ = of("get_device"), layout_ = of("layout");
    dtype_ = of("dtype"), shape_ = of("shape"), stride_ = of("stride"), requires_grad_ = of("requires_grad");
    modes_.clear();
    for (const auto mode : modes) modes_.push_back({kept(mode[py::int_(0)]), kept(mode[py::int_(1)])});
  }

  // Whether there is no mode and every value is None, a bool, int, float, str or a tensor that holds what it
  // says. -1 with a Python error set.
  int plain(PyObject* const* values, Py_ssize_t count) const {
    const int quiet = is_quiet();
    if (quiet != 1) return quiet;
    for (Py_ssize_t i = 0; i < count; ++i) {
      const int plain = is_tensor(values[i]) ? is_plain(values[i]) : is_constant(values[i]);
      if (plain != 1) return plain;
    }
    return 1;
  }

  // The signature of a call: bytes that are equal exactly for calls of one op with tensors of the same dtype,
  // shape, strides, device and need of a gradient, one tensor at the same places, and the same other values.
  // None where the call is not plain, or under autocast, which may change its tensors.
  PyObject* signature(PyObject* op, PyObject* const* values, Py_ssize_t count) const {
    const int found = plain(values, count);
    if (found < 0) return nullptr;
    if (found == 0) Py_RETURN_NONE;
    const int autocast = truth(PyObject_CallNoArgs(any_autocast_));
    if (autocast < 0) return nullptr;
    if (autocast) Py_RETURN_NONE;
    const int grad = truth(PyObject_CallNoArgs(grad_enabled_));
    if (grad < 0) return nullptr;
    Key key;
    if (!add_constant(key, op)) return unidentified();
    for (Py_ssize_t i = 0; i < count; ++i) {
      const bool added =
          is_tensor(values[i]) ? add_tensor(key, values, i, grad) : add_constant(key, values[i]);
      if (!added) return unidentified();
    }
    if (key.full) Py_RETURN_NONE;
    return PyBytes_FromStringAndSize(key.data, static_cast<Py_ssize_t>(key.size));
  }

  // (run, backend, arguments) of a call that looks like one before, by what `watch_plans` was given. None:
  // there was none, or what it was chosen from has changed; False: it was one that cannot be remembered.
  PyObject* recall(PyObject* op, PyObject* const* values, Py_ssize_t count) const {
    PyObject* key = signature(op, values, count);
    if (key == nullptr || key == Py_None) return key;
    const auto plan = py::reinterpret_borrow<py::object>(PyDict_GetItemWithError(plans_, key));
    Py_DECREF(key);
    if (!plan) return PyErr_Occurred() ? nullptr : Py_NewRef(Py_None);
    if (!PyTuple_Check(plan.ptr())) return Py_NewRef(plan.ptr());
    // (op and device, the backends usable for them, the entry or None, the backend, places): a place is the
    // position of a value of the call, or in a tuple of one the argument itself. The plan is held: a
    // collection of garbage may run Python, which may forget it.
    const auto part = [&](Py_ssize_t i) { return PyTuple_GET_ITEM(plan.ptr(), i); };
    if (PyDict_GetItem(usable_, part(0)) != part(1)) Py_RETURN_NONE;
    const auto run =
        py::reinterpret_borrow<py::object>(part(2) == Py_None ? Py_None : PyDict_GetItem(direct_, part(2)));
    if (!run) Py_RETURN_NONE;
    const auto arguments = py::reinterpret_steal<py::object>(picked(part(4), values));
    return arguments ? PyTuple_Pack(3, run.ptr(), part(3), arguments.ptr()) : nullptr;
  }

  // plans: by signature; usable: by op and device; direct: what runs, by entry.
  void watch_plans(py::handle plans, py::handle usable, py::handle direct) {
    plans_ = kept(plans), usable_ = kept(usable), direct_ = kept(direct);
  }

 private:
  struct Mode {
    PyObject *function, *quiet;
  };

  struct Key {
    char data[1024];
    size_t size = 0;
    bool full = false;

    void add(const void* bytes, size_t count) {
      full |= size + count > sizeof data;
      if (full) return;
      std::memcpy(data + size, bytes, count);
      size += count;
    }
    template <class T>
    void add(T value) {
      add(&value, sizeof value);
    }
  };

  static PyObject* kept(py::handle object) { return object.inc_ref().ptr(); }

  static PyObject* get(PyObject* descriptor, PyObject* tensor) {
    return Py_TYPE(descriptor)
        ->tp_descr_get(descriptor, tensor, reinterpret_cast<PyObject*>(Py_TYPE(tensor)));
  }

  static PyObject* ask(PyObject* method, PyObject* tensor) {
    return PyObject_Vectorcall(method, &tensor, 1, nullptr);
  }

  // 1 for True, 0 for anything else, -1 for an error; takes the reference.
  static int truth(PyObject* value) {
    if (value == nullptr) return -1;
    Py_DECREF(value);
    return value == Py_True;
  }

  static PyObject* picked(PyObject* places, PyObject* const* values) {
    const Py_ssize_t size = PyTuple_GET_SIZE(places);
    PyObject* arguments = PyTuple_New(size);
    for (Py_ssize_t i = 0; arguments != nullptr && i < size; ++i) {
      PyObject* place = PyTuple_GET_ITEM(places, i);
      PyObject* argument =
          PyTuple_CheckExact(place) ? PyTuple_GET_ITEM(place, 0) : values[PyLong_AsSsize_t(place)];
      PyTuple_SET_ITEM(arguments, i, Py_NewRef(argument));
    }
    return arguments;
  }

  // A tensor without a shape or strides (sparse, nested) or of another device, and a number beyond 64 bits,
  // have no signature.
  static PyObject* unidentified() {
    for (PyObject* expected : {PyExc_RuntimeError, PyExc_OverflowError, PyExc_ValueError, PyExc_TypeError})
      if (PyErr_Occurred() && PyErr_ExceptionMatches(expected)) PyErr_Clear();
    if (PyErr_Occurred()) return nullptr;
    Py_RETURN_NONE;
  }

  bool is_tensor(PyObject* value) const { return Py_TYPE(value) == tensor_ || Py_TYPE(value) == parameter_; }

  static bool is_constant(PyObject* value) {
    return value == Py_None || PyBool_Check(value) || PyFloat_CheckExact(value) || PyLong_CheckExact(value) ||
           PyUnicode_CheckExact(value);
  }

  int is_quiet() const {
    for (const Mode& mode : modes_) {
      PyObject* found = PyObject_CallNoArgs(mode.function);
      if (found == nullptr) return -1;
      Py_DECREF(found);
      if (found != mode.quiet) return 0;
    }
    return 1;
  }

  // Whether its memory holds what it says.
  int is_plain(PyObject* tensor) const {
    const int negative = truth(ask(is_neg_, tensor));
    if (negative != 0) return negative < 0 ? -1 : 0;
    const int zero = truth(ask(is_zero_, tensor));
    return zero < 0 ? -1 : 1 - zero;
  }

  bool add_tensor(Key& key, PyObject* const* values, Py_ssize_t place, int grad) const {
    PyObject* tensor = values[place];
    for (Py_ssize_t i = 0; i < place; ++i) {
      if (values[i] != tensor) continue;
      key.add('=');
      key.add(static_cast<char>(i));
      return true;
    }
    const int needs_grad = grad ? truth(get(requires_grad_, tensor)) : 0;
    const int cpu = truth(get(is_cpu_, tensor));
    if (cpu < 0 || needs_grad < 0) return false;
    key.add(static_cast<char>((cpu ? 'C' : 'G') + 32 * needs_grad));
    if (cpu == 0 && (truth(get(is_cuda_, tensor)) != 1 || !add_integer(key, ask(get_device_, tensor))))
      return false;
    PyObject* dtype = get(dtype_, tensor);
    if (dtype == nullptr) return false;
    key.add(dtype);  // there is one object for each
    Py_DECREF(dtype);
    PyObject* layout = get(layout_, tensor);
    Py_XDECREF(layout);
    return layout == strided_ && add_tuple(key, get(shape_, tensor)) && add_tuple(key, ask(stride_, tensor));
  }

  static bool add_integer(Key& key, PyObject* value) {
    if (value == nullptr) return false;
    const long long number = PyLong_AsLongLong(value);
    Py_DECREF(value);
    key.add(number);
    return number != -1 || !PyErr_Occurred();
  }

  static bool add_tuple(Key& key, PyObject* sizes) {
    if (sizes == nullptr) return false;
    bool good = PyTuple_Check(sizes);
    const Py_ssize_t count = good ? PyTuple_GET_SIZE(sizes) : 0;
    key.add(static_cast<char>(count));
    for (Py_ssize_t i = 0; good && i < count; ++i) {
      const long long size = PyLong_AsLongLong(PyTuple_GET_ITEM(sizes, i));
      key.add(size);
      good = size != -1 || !PyErr_Occurred();
    }
    Py_DECREF(sizes);
    return good;
  }

  // One letter for the type, so that 1, 1.0 and True differ, and the value's bits.
  static bool add_constant(Key& key, PyObject* value) {
    if (value == Py_None) {
      key.add('N');
    } else if (PyBool_Check(value)) {
      key.add(value == Py_True ? 'Y' : 'n');
    } else if (PyFloat_CheckExact(value)) {
      key.add('F');
      key.add(PyFloat_AS_DOUBLE(value));
    } else if (PyLong_CheckExact(value)) {
      key.add('I');
      return add_integer(key, Py_NewRef(value));
    } else {
      Py_ssize_t length = 0;
      const char* text = PyUnicode_AsUTF8AndSize(value, &length);
      if (text == nullptr) return false;
      key.add('S');
      key.add(length);
      key.add(text, static_cast<size_t>(length));
    }
    return true;
  }

  PyTypeObject *tensor_ = nullptr, *parameter_ = nullptr;
  PyObject *grad_enabled_ = nullptr, *any_autocast_ = nullptr, *strided_ = nullptr;
  PyObject *is_neg_ = nullptr, *is_zero_ = nullptr, *is_cpu_ = nullptr;
  PyObject *is_cuda_ = nullptr, *get_device_ = nullptr, *layout_ = nullptr, *dtype_ = nullptr,
           *shape_ = nullptr, *stride_ = nullptr;
  PyObject *requires_grad_ = nullptr, *plans_ = nullptr, *usable_ = nullptr, *direct_ = nullptr;
  std::vector<Mode> modes_;
};

}  // namespace fg::bind
