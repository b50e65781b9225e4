"""Files of a saved model: written whole or not at all, and read with errors that name the tensor."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

CONFIG, WEIGHTS = "config.json", "model.safetensors"

Write = Callable[[str, bytes], None]


@contextmanager
def atomic_files(directory: str | os.PathLike[str]) -> Iterator[Write]:
    """`with atomic_files(dir) as write: write(name, data)`: all files are complete on disk before the first
    takes its place, so that a failure or a kill leaves what was there before."""
    os.makedirs(directory, exist_ok=True)
    staged: list[tuple[str, str]] = []

    def write(name: str, data: bytes) -> None:
        handle, temporary = tempfile.mkstemp(dir=directory, prefix=f".{name}.")
        staged.append((temporary, os.path.join(directory, name)))
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp makes files that only their owner can read

    try:
        yield write
        while staged:
            os.replace(*staged[0])
            del staged[0]
    finally:
        for temporary, _ in staged:
            os.unlink(temporary)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def json_bytes(value: Any) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def read_json(path: str) -> dict[str, Any]:
    with open(path, "rb") as file:
        data = file.read()
    try:
        value = json.loads(data)
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
        raise ValueError(f"{path}: expected JSON, got {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def tensor_bytes(tensors: dict[str, Tensor]) -> bytes:
    from safetensors.torch import save

    return save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})


def read_tensors(path: str, expected: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a safetensors file, which must have the names and shapes of `expected`."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    with open(path, "rb") as file:
        data = file.read()
    try:
        found = load(data)
    except SafetensorError as error:
        raise ValueError(f"{path}: expected a safetensors file, got {error}") from None
    for name, tensor in expected.items():
        if name not in found:
            raise ValueError(f"{path}: {name}: expected a tensor of shape {tuple(tensor.shape)}, got none")
        got = found[name]
        if got.shape != tensor.shape:
            raise ValueError(f"{path}: {name}: expected shape {tuple(tensor.shape)}, got {tuple(got.shape)}")
        if not got.is_floating_point():
            raise ValueError(f"{path}: {name}: expected a floating dtype, got {got.dtype}")
    for name in found:
        if name not in expected:
            raise ValueError(f"{path}: {name}: expected no such tensor, got shape {tuple(found[name].shape)}")
    return found
