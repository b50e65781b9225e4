// fastgpt_kernels._cuda: the CUDA kernels, and fastgpt_kernels._cuda_emulated: the same sources compiled for
// the host (csrc/cuda/emulate.h). Importing it needs neither a GPU nor a driver.
#include <utility>

#include "functions.h"

#ifndef FG_HOST_EMULATION
#include <cuda_runtime.h>
#endif

namespace py = pybind11;

namespace {

fg::bind::Call only_call(const fg::bind::Function& function) { return function.calls[0]; }

// The number of GPUs, and where there is none the reason.
std::pair<int, std::string> devices() {
#ifdef FG_HOST_EMULATION
  return {0, "compiled for the host"};
#else
  int count = 0;
  const cudaError_t code = cudaGetDeviceCount(&count);
  if (code == cudaSuccess) return {count, count > 0 ? "" : "no CUDA device"};
  cudaGetLastError();
  return {0, "CUDA error " + std::to_string(static_cast<int>(code)) + " " + cudaGetErrorString(code) +
                 " (cudaGetDeviceCount)"};
#endif
}

void fill(py::module_& module) {
  module.def(
      "device_count", [] { return devices().first; }, "The number of GPUs; 0 where there is no driver.");
  module.def("device_message", [] { return devices().second; }, "Why device_count() is 0, or ''.");
  fg::bind::add_functions<only_call>(module);
}

}  // namespace

#ifdef FG_HOST_EMULATION
PYBIND11_MODULE(_cuda_emulated, module) {
  module.doc() = "The CUDA kernels of fastgpt, compiled for the host: slow, for tests.";
#else
PYBIND11_MODULE(_cuda, module) {
  module.doc() = "The CUDA kernels of fastgpt.";
#endif
  fill(module);
}
