"""Everything there is to learn from a GPU, in one command: `make gpu`, or `python3 -m benchmarks.gpu`.

Check, benchmarks, tuning and races, the most valuable first, each in a process of its own with a time limit: a hang
or a crash loses that part alone. Needs torch and Triton as they are, numpy, pytest, hypothesis, matplotlib,
setuptools and ninja (pybind11's headers are also in torch), and downloads nothing. `--dry` rehearses it on the CPU.
"""
