// fastgpt_kernels._cpu: the C++ kernels, and the choice of the SIMD level. Compiled for the baseline CPU:
// nothing here may run an instruction the machine lacks.
#include <pthread.h>
#include <pybind11/stl.h>

#include <atomic>
#include <cstdlib>

#include "functions.h"
#include "guard.h"

namespace py = pybind11;

namespace fg {
bool in_forked_child = false;  // csrc/cpu/parallel.h
}

namespace {

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
  if (level == "avx512_bf16") {
    return avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
  }
#endif
  return false;
}

// AMD's cores multiply as many vectors of bf16 pairs in a cycle as of fp32; Intel's Sapphire Rapids one in
// two cycles, where it does two of fp32: half the rate instead of twice. And MKL is at its best on Intel's.
bool is_amd() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  return __builtin_cpu_is("amd");
#else
  return false;
#endif
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

fg::bind::Call call_at_level(const fg::bind::Function& function) {
  const int level = current_level.load(std::memory_order_relaxed);
  if (level >= 0) return function.calls[level];
  PyErr_SetString(PyExc_ValueError, environment_error().c_str());
  return nullptr;
}

fg::bind::Guard& guard() {
  static auto* only = new fg::bind::Guard;
  return *only;
}

PyObject* is_plain(PyObject*, PyObject* values) {
  if (!PyTuple_Check(values)) return PyErr_Format(PyExc_TypeError, "is_plain: expected a tuple");
  const int plain = guard().plain(&PyTuple_GET_ITEM(values, 0), PyTuple_GET_SIZE(values));
  return plain < 0 ? nullptr : PyBool_FromLong(plain);
}

PyObject* extremes(PyObject*, PyObject* const* args, Py_ssize_t num_args) {
  if (num_args != 2) return PyErr_Format(PyExc_TypeError, "extremes: expected an address and a count");
  const auto* values = static_cast<const int64_t*>(PyLong_AsVoidPtr(args[0]));
  const Py_ssize_t count = PyLong_AsSsize_t(args[1]);
  if (PyErr_Occurred()) return nullptr;
  if (count < 1) return PyErr_Format(PyExc_ValueError, "extremes: expected a value at least");
  int64_t low = values[0], high = values[0];
  for (Py_ssize_t i = 1; i < count; ++i) {
    low = values[i] < low ? values[i] : low;
    high = values[i] > high ? values[i] : high;
  }
  return Py_BuildValue("LL", static_cast<long long>(low), static_cast<long long>(high));
}

template <class F>
PyCFunction method(F* function) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
}

template <PyObject* (fg::bind::Guard::*ask)(PyObject*, PyObject* const*, Py_ssize_t) const>
PyObject* of_call(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 2 || !PyTuple_Check(args[1]))
    return PyErr_Format(PyExc_TypeError, "expected an op and a tuple");
  return (guard().*ask)(args[0], &PyTuple_GET_ITEM(args[1], 0), PyTuple_GET_SIZE(args[1]));
}

PyMethodDef guard_methods[] = {
    {"is_plain", is_plain, METH_O, "is_plain(values): whether nothing but a plain eager call is going on."},
    {"signature", method(of_call<&fg::bind::Guard::signature>), METH_FASTCALL,
     "signature(op, values): bytes that identify a call, or None: see guard.h."},
    {"recall", method(of_call<&fg::bind::Guard::recall>), METH_FASTCALL,
     "recall(op, values): (run, backend, arguments) of a call like one before: see guard.h."},
    {"extremes", method(extremes), METH_FASTCALL,
     "extremes(address, count): the least and the largest of so many int64, with the GIL held: for few."},
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

PYBIND11_MODULE(_cpu, module) {
  module.doc() = "The C++ kernels of fastgpt, compiled once per SIMD level.";
  choose_first_level();
  pthread_atfork(nullptr, nullptr, [] { fg::in_forked_child = true; });
  module.def("isa", [] { return std::string(fg::levels[level_in_use()]); }, "The SIMD level in use.");
  module.def("isas", &isas, "The SIMD levels this CPU can run, ascending.");
  module.def("set_isa", &set_isa, py::arg("name"), "Use this SIMD level from now on, in every thread.");
  module.def("is_amd", &is_amd, "Whether the CPU is AMD's.");
  module.def(
      "watch",
      [](py::object tensor, py::object parameter, py::object grad_enabled, py::object any_autocast,
         py::object strided, const py::tuple& modes) {
        guard().watch(tensor, parameter, grad_enabled, any_autocast, strided, modes);
      },
      "Tell is_plain, signature and recall of torch: see guard.h.");
  module.def(
      "watch_plans",
      [](const py::dict& plans, const py::dict& usable, const py::dict& direct) {
        guard().watch_plans(plans, usable, direct);
      },
      "Tell recall where to look: see guard.h.");
  if (PyModule_AddFunctions(module.ptr(), guard_methods) != 0) throw py::error_already_set();
  fg::bind::add_functions<call_at_level>(module);
}
