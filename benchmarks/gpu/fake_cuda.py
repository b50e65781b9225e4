"""The few things of torch.cuda that the suites use, for the rehearsal on a machine without a GPU.

Events read the host's clock, streams and graphs do nothing. What is rehearsed is the code around them.
"""

from __future__ import annotations

import time
from contextlib import contextmanager, nullcontext
from typing import Any

import torch


class Event:
    def __init__(self, enable_timing: bool = False) -> None:
        self.seconds: float | None = None

    def record(self, stream: Any = None) -> None:
        self.seconds = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: Event) -> float:
        """Milliseconds, as torch's."""
        assert self.seconds is not None
        assert end.seconds is not None
        return (end.seconds - self.seconds) * 1e3


class Stream:
    def wait_stream(self, other: Stream) -> None:
        assert isinstance(other, Stream)

    def synchronize(self) -> None:
        pass


class CUDAGraph:
    def replay(self) -> None:
        raise RuntimeError("a faked graph recorded nothing")


@contextmanager
def _graph(graph: CUDAGraph) -> Any:
    assert isinstance(graph, CUDAGraph)
    yield


FAKES: dict[str, Any] = {
    "Event": Event,
    "Stream": Stream,
    "CUDAGraph": CUDAGraph,
    "_sleep": lambda cycles: None,
    "synchronize": lambda device=None: None,
    "current_stream": lambda device=None: Stream(),
    "stream": lambda stream: nullcontext(),
    "graph": _graph,
    "empty_cache": lambda: None,
}


def install() -> None:
    """Put the fakes in torch.cuda's place, for the rest of this process."""
    for name, fake in FAKES.items():
        getattr(torch.cuda, name)  # AttributeError: a name that torch does not have
        setattr(torch.cuda, name, fake)
