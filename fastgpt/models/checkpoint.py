"""Files of a saved model: each written whole or not at all, and read with errors that name the tensor."""

from __future__ import annotations

import errno
import json
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor

CONFIG, WEIGHTS, SHARDS = "config.json", "model.safetensors", "model.safetensors.index.json"
WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

Write = Callable[[str, bytes], None]


@contextmanager
def atomic_files(directory: str | os.PathLike[str]) -> Iterator[Write]:
    """`with atomic_files(dir) as write: write(name, data)`: no file is ever seen half written.

    All are complete on disk before the first takes its place, so that whatever fails until then leaves what was
    there before. Then they are renamed one by one in the order written; a kill between two renames leaves new
    files beside old ones.
    """
    os.makedirs(directory, exist_ok=True)
    staged: list[tuple[str, str]] = []

    def write(name: str, data: bytes) -> None:
        path = os.path.join(directory, name)
        refuse_non_file(path)
        temporary = os.path.join(directory, f".{name}.{secrets.token_hex(8)}")
        staged.append((temporary, path))
        try:
            handle = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)  # less the umask
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise _restated(error, path) from error

    try:
        yield write
        while staged:
            temporary, path = staged[0]
            try:
                os.replace(temporary, path)
            except OSError as error:
                raise _restated(error, path) from error
            del staged[0]
    finally:
        for temporary, _ in staged:
            with suppress(OSError):  # it may never have been made
                os.unlink(temporary)


def refuse_non_file(path: str) -> None:
    """OSError if there is something at `path` that a file cannot replace."""
    if os.path.isdir(path):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
    if os.path.exists(path) and not os.path.isfile(path):
        raise FileExistsError(errno.EEXIST, "expected a file or nothing, got something else", path)


def _restated(error: OSError, path: str) -> OSError:
    """The failure told of the file that is meant, not of the temporary one."""
    return OSError(error.errno, error.strerror, path) if error.errno else OSError(f"{path}: {error}")


def json_bytes(value: Any) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def read_json(path: str) -> dict[str, Any]:
    with open(path, "rb") as file:
        return parse_object(file.read(), path)


def parse_object(data: bytes, where: str) -> dict[str, Any]:
    """ValueError, by the name of the place, unless it is a JSON object."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:  # JSONDecodeError, UnicodeDecodeError; nested without end
        raise ValueError(f"{where}: expected JSON, got {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{where}: expected a JSON object, got {type(value).__name__}")
    return value


def tensor_bytes(tensors: dict[str, Tensor]) -> bytes:
    from safetensors.torch import save

    # The format is what transformers asks for.
    return save({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, {"format": "pt"})


def load_tensors(directory: str) -> tuple[str, dict[str, Tensor]]:
    """The file of weights in a directory, one or the index of several, and all its tensors."""
    index = os.path.join(directory, SHARDS)
    if os.path.exists(os.path.join(directory, WEIGHTS)) or not os.path.exists(index):
        path = os.path.join(directory, WEIGHTS)
        return path, _load(path)
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
        raise ValueError(f"{index}: expected a weight_map from tensors to files, got {type(places).__name__}")
    found: dict[str, Tensor] = {}
    for file in sorted(set(places.values())):
        if os.path.basename(file) != file:
            raise ValueError(f"{index}: expected files beside it, got {file!r}")
        found |= _load(os.path.join(directory, file))
    for name, file in places.items():
        if name not in found:
            raise ValueError(f"{os.path.join(directory, file)}: {name}: expected as the index says, got none")
    return index, found


def _load(path: str) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    with open(path, "rb"):  # the system's own error, if it cannot be read
        pass
    try:
        return load_file(path)  # mapped, not read: what is left out costs nothing
    except SafetensorError as error:
        raise ValueError(f"{path}: expected a safetensors file, got {error}") from None


def check_tensors(path: str, found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """ValueError unless `found` has the names and shapes of `expected`, and one dtype."""
    first = next(iter(expected), "")  # a model may have no tensors of its own
    for name, tensor in expected.items():
        if name not in found:
            raise ValueError(f"{path}: {name}: expected a tensor of shape {tuple(tensor.shape)}, got none")
        got = found[name]
        if got.shape != tensor.shape:
            raise ValueError(f"{path}: {name}: expected shape {tuple(tensor.shape)}, got {tuple(got.shape)}")
        if name == first and got.dtype not in WEIGHT_DTYPES:
            names = ", ".join(map(_short, WEIGHT_DTYPES))
            raise ValueError(f"{path}: {name}: expected one of {names}, got {_short(got.dtype)}")
        if got.dtype != found[first].dtype:
            raise ValueError(
                f"{path}: {name}: expected {_short(found[first].dtype)} as {first}, got {_short(got.dtype)}"
            )
    for name in found:
        if name not in expected:
            raise ValueError(f"{path}: {name}: expected no such tensor, got shape {tuple(found[name].shape)}")


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
