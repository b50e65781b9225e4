"""Memory: the heap that a process owns before anything is timed, and the peak that a call allocates."""

from __future__ import annotations

from collections.abc import Callable

import torch

HEAP = 6 * 2**30  # bytes: more than the tensors of any case


def grow_heap(count: int = HEAP) -> None:
    """Have the process own so much memory already, as one that has run for a while does, where freed blocks are kept.

    Else the first rounds of every case of a new size pay for page faults that the later ones do not have.
    """
    torch.empty(count, dtype=torch.uint8).fill_(1)


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """The most that PyTorch's allocator held at once during a call, above what it held before."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        call()
    # The public event list folds allocations into ops; the order of single allocations is only here.
    events = profile.profiler.kineto_results.events()
    held = peak = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
