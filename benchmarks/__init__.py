"""Benchmarks: `python -m benchmarks --suite quick`.

Every op of the registry and the GPT training step, against eager and compiled PyTorch. An implementation is
checked on the very case before it is timed; all contenders of a case are timed in one process, round by round;
every figure stands beside the machine's limits, measured in the same run.
"""
