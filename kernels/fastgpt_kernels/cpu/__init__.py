"""CPU backend: launchers of the C++ SIMD kernels in `fastgpt_kernels._cpu` (sources: csrc/cpu).

Importing an op's module raises ImportError, with the reason, where `_cpu` is not built or is stale.
"""
