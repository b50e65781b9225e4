"""CUDA backend: launchers of the kernels in `fastgpt_kernels._cuda` (sources: csrc/cuda).

Importing an op's module raises ImportError, with the reason, where `_cuda` is not built or is stale. With
FASTGPT_CUDA_EMULATION=1 the same kernels, compiled for the host, run on CPU tensors.
"""
