// Every exported kernel (common/export.h) as a Python function of plain ints and floats.
//
// They are PyCFunctions rather than pybind11 functions: a kernel has about twenty arguments, and unpacking
// them by signature costs a tenth of what pybind11's generic casters do. The GIL is released around a kernel,
// and an exception becomes a RuntimeError with the kernel's name before the text.
#pragma once

#include <pybind11/pybind11.h>

#include <cstring>
#include <deque>
#include <stdexcept>
#include <string>
#include <vector>

#include "tables.h"

namespace fg::bind {

namespace py = pybind11;

using Call = void (*)(const Arg*);

struct Function {
  std::string name;
  std::string doc;
  const char* signature;
  int num_args;
  std::vector<Call> calls;  // by level
  PyMethodDef method;
};

inline const char* kind_name(char kind) { return kind == 'p' ? "pointer" : kind == 'i' ? "int" : "float"; }

inline PyObject* bad_argument(const Function& function, Py_ssize_t position, PyObject* value) {
  const char kind = function.signature[position];
  if (PyErr_Occurred()) {  // an int that does not fit in 64 bits
    PyErr_Clear();
    return PyErr_Format(PyExc_OverflowError, "%s: argument %zd: %R does not fit in a 64-bit %s",
                        function.name.c_str(), position + 1, value, kind_name(kind));
  }
  return PyErr_Format(PyExc_TypeError, "%s: argument %zd: expected %s, got %s", function.name.c_str(),
                      position + 1, kind == 'p' ? "int (an address)" : kind_name(kind),
                      Py_TYPE(value)->tp_name);
}

inline bool convert(PyObject* value, char kind, Arg& arg) {
  if (kind == 'f') {
    if (!PyFloat_Check(value) && !PyLong_Check(value)) return false;
    arg.f = PyFloat_AsDouble(value);
    return arg.f != -1.0 || !PyErr_Occurred();
  }
  if (!PyLong_Check(value)) return false;
  if (kind == 'p') {
    arg.p = PyLong_AsVoidPtr(value);
    return arg.p != nullptr || !PyErr_Occurred();
  }
  arg.i = PyLong_AsLongLong(value);
  return arg.i != -1 || !PyErr_Occurred();
}

// choose: which of a function's calls to make, or null with a Python error set.
template <Call (*choose)(const Function&)>
PyObject* call_function(PyObject* self, PyObject* const* values, Py_ssize_t count) {
  const auto& function = *static_cast<const Function*>(PyCapsule_GetPointer(self, nullptr));
  if (count != function.num_args)
    return PyErr_Format(PyExc_TypeError, "%s: expected %d arguments, got %zd: %s", function.name.c_str(),
                        function.num_args, count, function.doc.c_str());
  Arg args[kMaxArgs];
  for (Py_ssize_t i = 0; i < count; ++i)
    if (!convert(values[i], function.signature[i], args[i])) return bad_argument(function, i, values[i]);
  const Call call = choose(function);
  if (call == nullptr) return nullptr;
  std::string error;
  PyThreadState* thread = PyEval_SaveThread();
  try {
    call(args);
  } catch (const std::exception& e) {
    error = e.what();
  }
  PyEval_RestoreThread(thread);
  if (!error.empty()) return PyErr_Format(PyExc_RuntimeError, "%s: %s", function.name.c_str(), error.c_str());
  Py_RETURN_NONE;
}

// Gathers the tables of all levels; they come from the same sources, so that they must agree. Never
// destroyed: Python functions point into it until the process ends.
inline std::deque<Function>& collect() {
  auto& functions = *new std::deque<Function>;
  for (int level = 0; levels[level]; ++level) {
    size_t position = 0;
    for (const LevelTable* t = tables; t->level; ++t) {
      if (std::strcmp(t->level, levels[level]) != 0) continue;
      for (int i = 0; i < t->table->count; ++i, ++position) {
        const Export& entry = t->table->entries[i];
        if (level == 0) {
          functions.push_back(
              {entry.name, "", entry.signature, static_cast<int>(std::strlen(entry.signature)), {}, {}});
        } else if (position >= functions.size() || functions[position].name != entry.name ||
                   std::strcmp(functions[position].signature, entry.signature) != 0) {
          throw std::runtime_error(std::string(entry.name) + ": exported differently at level " + t->level);
        }
        functions[position].calls.push_back(entry.call);
      }
    }
    if (position != functions.size())
      throw std::runtime_error(std::string("kernels missing at level ") + levels[level]);
  }
  return functions;
}

template <Call (*choose)(const Function&)>
void add_functions(py::module_& module) {
  for (Function& function : collect()) {
    for (int i = 0; i < function.num_args; ++i)
      function.doc += std::string(i ? ", " : "") + kind_name(function.signature[i]);
    function.doc = function.name + "(" + function.doc + ")";
    function.method = {function.name.c_str(),
                       reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(call_function<choose>)),
                       METH_FASTCALL, function.doc.c_str()};
    if (py::hasattr(module, function.name.c_str()))
      throw std::runtime_error(function.name + ": exported twice");
    const auto self = py::reinterpret_steal<py::object>(PyCapsule_New(&function, nullptr, nullptr));
    const py::object name = module.attr("__name__");
    module.attr(function.name.c_str()) =
        py::reinterpret_steal<py::object>(PyCFunction_NewEx(&function.method, self.ptr(), name.ptr()));
  }
  module.attr("SOURCE_HASH") = py::str(source_hash);
}

}  // namespace fg::bind
