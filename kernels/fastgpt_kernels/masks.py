"""How the launchers of every backend describe a mask, and dropout, to a kernel: plain numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

MAX_DIMS = 4  # leading dimensions of a mask, after merging, that the kernels step through


def unsupported_mask(x: Tensor, mask: Tensor) -> str | None:
    """The reason why no kernel of softmax reads this mask of x, or None."""
    if mask.dtype not in (torch.bool, torch.float32, x.dtype):
        return f"needs a mask of bool, float32 or {x.dtype}, got {mask.dtype}"
    dims = max(len(_mask_dims(x.shape, mask)[0]), len(_shared_dims(x.shape, mask.shape)[0]))
    if dims > MAX_DIMS:
        return f"needs a mask whose leading dimensions merge into {MAX_DIMS} or fewer, got {dims}"
    return None


def mask_dims(shape: Sequence[int], mask: Tensor) -> tuple[list[int], list[int], int]:
    """MAX_DIMS sizes and strides of the mask over the rows of [*shape], and its column stride; 0 where broadcast."""
    sizes, strides, column_stride = _mask_dims(shape, mask)
    return _pad(sizes, 1), _pad(strides, 0), column_stride


def shared_dims(shape: Sequence[int], mask_shape: Sequence[int]) -> tuple[list[int], int]:
    """MAX_DIMS sizes of the rows of [*shape], and in bit d whether they share the mask's rows along dimension d."""
    sizes, shared = _shared_dims(shape, mask_shape)
    return _pad(sizes, 1), sum(bit << d for d, bit in enumerate(_pad(shared, 0)))


def dropout_args(dropout_p: float, rng: Tensor | None) -> tuple[Tensor | None, tuple[int, int, float]]:
    """rng (kept alive by the caller) and (its address or 0, threshold, scale of what is kept).

    An element is kept where its random word is at least the threshold.
    """
    if dropout_p <= 0.0:
        return None, (0, 0, 1.0)
    assert rng is not None
    rng = rng.contiguous()
    threshold = min(round(dropout_p * 2**32), 2**32 - 1)
    return rng, (rng.data_ptr(), threshold, 1.0 / (1.0 - dropout_p) if dropout_p < 1.0 else 0.0)


def _mask_dims(shape: Sequence[int], mask: Tensor) -> tuple[list[int], list[int], int]:
    """Sizes and strides of the mask over x's leading dimensions, neighbours merged, and its column stride."""
    *strides, column_stride = mask.expand(shape).stride()
    sizes, strides = _merge(shape[:-1], strides, lambda outer, inner, size: outer == inner * size)
    return sizes, strides, column_stride


def _shared_dims(shape: Sequence[int], mask_shape: Sequence[int]) -> tuple[list[int], list[int]]:
    """x's leading dimensions, neighbours merged, and for each 1 if the mask is broadcast over it, else 0."""
    padded = (1,) * (len(shape) - len(mask_shape)) + tuple(mask_shape)
    shared = [int(m != s) for s, m in zip(shape[:-1], padded[:-1], strict=True)]
    return _merge(shape[:-1], shared, lambda outer, inner, size: outer == inner)


def _merge(
    sizes: Sequence[int], keys: Sequence[int], same: Callable[[int, int, int], bool]
) -> tuple[list[int], list[int]]:
    """Merges neighbours where same(outer key, inner key, inner size); drops dimensions of size one."""
    merged_sizes: list[int] = []
    merged_keys: list[int] = []
    for size, key in zip(reversed(sizes), reversed(keys), strict=True):
        if size == 1:
            continue
        if merged_sizes and same(key, merged_keys[0], merged_sizes[0]):
            merged_sizes[0] *= size
        else:
            merged_sizes.insert(0, size)
            merged_keys.insert(0, key)
    return merged_sizes, merged_keys


def _pad(values: list[int], fill: int) -> list[int]:
    return [fill] * (MAX_DIMS - len(values)) + values
