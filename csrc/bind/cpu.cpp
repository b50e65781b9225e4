// fastgpt_kernels._cpu: the C++ kernels, and the choice of the SIMD level. Compiled for the baseline CPU:
// nothing here may run an instruction the machine lacks.
#include <pybind11/stl.h>

#include <atomic>
#include <cstdlib>

#include "functions.h"

namespace py = pybind11;

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
  if (level == "avx512_bf16") return avx512 && __builtin_cpu_supports("avx512bf16");
#endif
  return false;
}

// Whether multiplying bf16 in pairs is faster than widening it to fp32. AMD's cores do two vectors of pairs a
// cycle, like fp32's; Intel's Sapphire Rapids does one in two cycles, where it has two of fp32: half the rate
// instead of twice.
bool prefers_bf16_pairs() {
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

}  // namespace

PYBIND11_MODULE(_cpu, module) {
  module.doc() = "The C++ kernels of fastgpt, compiled once per SIMD level.";
  choose_first_level();
  module.def("isa", [] { return std::string(fg::levels[level_in_use()]); }, "The SIMD level in use.");
  module.def("isas", &isas, "The SIMD levels this CPU can run, ascending.");
  module.def("set_isa", &set_isa, py::arg("name"), "Use this SIMD level from now on, in every thread.");
  module.def("prefers_bf16_pairs", &prefers_bf16_pairs,
             "Whether pairs of bf16 are multiplied faster than fp32 here.");
  fg::bind::add_functions<call_at_level>(module);
}
