// fastgpt_kernels._cpu: every exported kernel as a Python function of plain ints and floats, and the choice
// of the SIMD level. Compiled for the baseline CPU: nothing here may run an instruction the machine lacks.
//
// Kernels are PyCFunctions rather than pybind11 functions: a kernel has about twenty arguments, and unpacking
// them by signature costs a tenth of what pybind11's generic casters do.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <stdexcept>
#include <string>
#include <vector>

#include "tables.h"

namespace py = pybind11;

namespace {

struct Kernel {
  std::string name;
  std::string doc;
  const char* signature;
  int num_args;
  std::vector<void (*)(const fg::Arg*)> calls;  // by level
  PyMethodDef method;
};

std::atomic<int> current_level{-1};  // index into fg::levels; -1: FASTGPT_CPU_ISA asked for what is not there

// The module's state is never destroyed: Python functions point into it until the process ends.
std::string& environment_error() {
  static auto* text = new std::string;
  return *text;
}

bool cpu_has(const std::string& level) {
  if (level == "generic") return true;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  if (level == "avx2") return avx2;
  if (level == "avx512") return avx512;
  if (level == "avx512_bf16") return avx512 && __builtin_cpu_supports("avx512bf16");
#endif
  return false;
}

// The levels this CPU can run, ascending: always a prefix of fg::levels.
std::vector<std::string> isas() {
  std::vector<std::string> names;
  for (int i = 0; fg::levels[i] && cpu_has(fg::levels[i]); ++i) names.emplace_back(fg::levels[i]);
  return names;
}

std::string joined(const std::vector<std::string>& names) {
  std::string text;
  for (const auto& name : names) text += (text.empty() ? "" : ", ") + name;
  return text;
}

int index_of(const std::string& name, const char* what) {
  const auto names = isas();
  for (size_t i = 0; i < names.size(); ++i)
    if (names[i] == name) return static_cast<int>(i);
  throw py::value_error(std::string(what) + ": expected one of the levels of this CPU (" + joined(names) +
                        "), got '" + name + "'");
}

void set_isa(const std::string& name) { current_level = index_of(name, "set_isa"); }

int level_in_use() {
  const int level = current_level.load(std::memory_order_relaxed);
  if (level < 0) throw py::value_error(environment_error());
  return level;
}

void choose_first_level() {
  const char* wanted = std::getenv("FASTGPT_CPU_ISA");
  if (!wanted || !*wanted) {
    current_level = static_cast<int>(isas().size()) - 1;
    return;
  }
  try {
    current_level = index_of(wanted, "FASTGPT_CPU_ISA");
  } catch (const py::value_error& error) {  // raised when first used, so that the import itself never fails
    environment_error() = error.what();
  }
}

const char* kind_name(char kind) { return kind == 'p' ? "pointer" : kind == 'i' ? "int" : "float"; }

PyObject* bad_argument(const Kernel& kernel, Py_ssize_t position, PyObject* value) {
  const char kind = kernel.signature[position];
  if (PyErr_Occurred()) {  // an int that does not fit in 64 bits
    PyErr_Clear();
    return PyErr_Format(PyExc_OverflowError, "%s: argument %zd: %R does not fit in a 64-bit %s",
                        kernel.name.c_str(), position + 1, value, kind_name(kind));
  }
  return PyErr_Format(PyExc_TypeError, "%s: argument %zd: expected %s, got %s", kernel.name.c_str(),
                      position + 1, kind == 'p' ? "int (an address)" : kind_name(kind),
                      Py_TYPE(value)->tp_name);
}

PyObject* call_kernel(PyObject* self, PyObject* const* values, Py_ssize_t count) {
  const auto& kernel = *static_cast<const Kernel*>(PyCapsule_GetPointer(self, nullptr));
  if (count != kernel.num_args)
    return PyErr_Format(PyExc_TypeError, "%s: expected %d arguments, got %zd: %s", kernel.name.c_str(),
                        kernel.num_args, count, kernel.doc.c_str());
  fg::Arg args[fg::kMaxArgs];
  for (Py_ssize_t i = 0; i < count; ++i) {
    PyObject* value = values[i];
    if (kernel.signature[i] == 'f') {
      if (!PyFloat_Check(value) && !PyLong_Check(value)) return bad_argument(kernel, i, value);
      args[i].f = PyFloat_AsDouble(value);
      if (args[i].f == -1.0 && PyErr_Occurred()) return bad_argument(kernel, i, value);
    } else {
      if (!PyLong_Check(value)) return bad_argument(kernel, i, value);
      if (kernel.signature[i] == 'p') {
        args[i].p = PyLong_AsVoidPtr(value);
        if (!args[i].p && PyErr_Occurred()) return bad_argument(kernel, i, value);
      } else {
        args[i].i = PyLong_AsLongLong(value);
        if (args[i].i == -1 && PyErr_Occurred()) return bad_argument(kernel, i, value);
      }
    }
  }
  const int level = current_level.load(std::memory_order_relaxed);
  if (level < 0) {
    PyErr_SetString(PyExc_ValueError, environment_error().c_str());
    return nullptr;
  }
  PyThreadState* thread = PyEval_SaveThread();
  kernel.calls[level](args);
  PyEval_RestoreThread(thread);
  Py_RETURN_NONE;
}

// Gathers the tables of all levels; they come from the same sources, so that they must agree.
std::deque<Kernel>& collect() {
  auto& kernels = *new std::deque<Kernel>;
  for (int level = 0; fg::levels[level]; ++level) {
    size_t position = 0;
    for (const fg::LevelTable* t = fg::tables; t->level; ++t) {
      if (std::strcmp(t->level, fg::levels[level]) != 0) continue;
      for (int i = 0; i < t->table->count; ++i, ++position) {
        const fg::Export& entry = t->table->entries[i];
        if (level == 0) {
          kernels.push_back(
              {entry.name, "", entry.signature, static_cast<int>(std::strlen(entry.signature)), {}, {}});
        } else if (position >= kernels.size() || kernels[position].name != entry.name ||
                   std::strcmp(kernels[position].signature, entry.signature) != 0) {
          throw std::runtime_error(std::string(entry.name) + ": exported differently at level " + t->level);
        }
        kernels[position].calls.push_back(entry.call);
      }
    }
    if (position != kernels.size())
      throw std::runtime_error(std::string("kernels missing at level ") + fg::levels[level]);
  }
  return kernels;
}

void add_kernels(py::module_& module) {
  for (Kernel& kernel : collect()) {
    for (int i = 0; i < kernel.num_args; ++i)
      kernel.doc += std::string(i ? ", " : "") + kind_name(kernel.signature[i]);
    kernel.doc = kernel.name + "(" + kernel.doc + ")";
    kernel.method = {kernel.name.c_str(),
                     reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(call_kernel)), METH_FASTCALL,
                     kernel.doc.c_str()};
    if (py::hasattr(module, kernel.name.c_str())) throw std::runtime_error(kernel.name + ": exported twice");
    const auto self = py::reinterpret_steal<py::object>(PyCapsule_New(&kernel, nullptr, nullptr));
    const py::object name = module.attr("__name__");
    module.attr(kernel.name.c_str()) =
        py::reinterpret_steal<py::object>(PyCFunction_NewEx(&kernel.method, self.ptr(), name.ptr()));
  }
}

}  // namespace

PYBIND11_MODULE(_cpu, module) {
  module.doc() = "The C++ kernels of fastgpt, compiled once per SIMD level.";
  choose_first_level();
  module.def("isa", [] { return std::string(fg::levels[level_in_use()]); }, "The SIMD level in use.");
  module.def("isas", &isas, "The SIMD levels this CPU can run, ascending.");
  module.def("set_isa", &set_isa, py::arg("name"), "Use this SIMD level from now on, in every thread.");
  module.attr("SOURCE_HASH") = py::str(fg::source_hash);
  add_kernels(module);
}
