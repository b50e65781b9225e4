"""What a miss likely means: what the wrong elements of a result have in common, and the cases that go wrong.

Only what the numbers show is said. What they cannot show (which line of a kernel is wrong) is left to the reader.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial

import torch
from torch import Tensor

from fastgpt._core.spec import Case
from fastgpt.testing.bounds import UNIT, half_ulp, ratios

Call = tuple[Case, str]  # a case and the name of a dtype
Feature = tuple[str, Callable[[Call], bool]]

# What an op is known for that goes wrong with one of its cases' options alone.
_MAXIMUM = "the maximum is not subtracted"
KNOWN = {
    ("layer_norm", "mean"): "a variance as E[x²] − mean², or statistics in too few bits",
    ("softmax", "mean"): _MAXIMUM,
    ("cross_entropy", "mean"): _MAXIMUM,
    ("cross_entropy", "ignored"): "ignored targets are counted, or still have a gradient",
    ("cross_entropy", "masked"): "a class of -inf is not left out",
}


def explain(got: Tensor, exact: Tensor, error: Tensor, others: Mapping[str, Tensor] | None = None) -> str:
    """How many elements of a result miss, where, and how they are related to the exact ones; "" if none does.

    Args:
        got: what an implementation returned.
        exact, error: fp64, as in `Problem`: the exact result and the E of its bound.
        others: tensors by name that it may have been confused with; those of its shape are looked at.
    """
    ratio, bound = ratios(got, exact, error)
    missed = ratio > 1.0
    count = int(missed.sum())
    if count == 0 or exact.numel() < 2:
        return ""
    every = count == exact.numel()
    said = [f"all {count} elements miss" if every else f"{count} of {exact.numel()} elements miss"]
    if not every and count > 1:
        said += _confined(missed)
    related = list(_relation(got, exact, bound, missed))
    return "; ".join(said + (related or list(_confused(got, others or {}, missed))))


def _confined(missed: Tensor) -> Iterator[str]:
    """The columns (last dimension) and rows (all others) that hold all misses, where that is less than half."""
    columns = missed.reshape(-1, missed.shape[-1])
    for name, hit in (("column", columns.any(0)), ("row", columns.any(1))):
        places = hit.nonzero().flatten()
        first, last, size = int(places[0]), int(places[-1]), hit.numel()
        span = last - first + 1
        if size < 2 or 2 * span > size or 2 * places.numel() < span:
            continue
        if span == 1:
            yield f"only in {name} {first} of {size}"
        elif last == size - 1:
            yield f"only in the last {span} of {size} {name}s: a tail"
        else:
            yield f"only in {name}s {first} to {last} of {size}"


def _relation(got: Tensor, exact: Tensor, bound: Tensor, missed: Tensor) -> Iterator[str]:
    wide = got.detach().double()
    if not bool(wide.isfinite().all() & exact.isfinite().all()):
        if bool((missed & wide.isnan()).sum() == missed.sum()):
            yield "each is NaN"
        return
    if bool((wide[missed] == 0.0).all()):
        yield "each is 0 there"
        return
    # Of what was returned too: a factor carries numbers to where those of their dtype lie further apart.
    factor = _factor(wide, exact, bound.maximum(half_ulp(wide, got.dtype)), missed)
    if factor:
        yield factor
        return
    ulp = 2 * half_ulp(exact, got.dtype)
    worst = float(((wide - exact).abs() / ulp)[missed].max())
    if got.dtype != torch.float32 and worst <= 2.0:
        yield f"none is off by more than {worst:.2f} units in the last place: rounded more than once on the way"
    for narrow in (torch.bfloat16, torch.float16):
        if UNIT[narrow] > UNIT[got.dtype] and torch.equal(got, got.to(narrow).to(got.dtype)):
            yield f"every element is a {narrow} number: rounded to it on the way"
            return


def _factor(wide: Tensor, exact: Tensor, bound: Tensor, missed: Tensor) -> str:
    """ "all of it is 1.02 times the exact result", where everything, or every miss, is in one proportion."""
    for name, where in (("all of it is", torch.ones_like(missed)), ("each of them is", missed)):
        weights = 1.0 / bound[where]
        theirs, ours = exact[where] * weights, wide[where] * weights
        told = int((theirs.abs() > 100.0).sum())  # elements that a proportion can be read off
        if told < 4 or 2 * told < theirs.numel():
            continue
        factor = float((theirs @ ours) / (theirs @ theirs))
        before, after = (float((ours - f * theirs).abs().max()) for f in (1.0, factor))
        if after <= 1.2 * max(1.0, abs(factor)) and before >= 2.0 * after:
            return f"{name} {_digits(factor)} times the exact result"
    return ""


def _confused(got: Tensor, others: Mapping[str, Tensor], missed: Tensor) -> Iterator[str]:
    """Whether the misses are those of another tensor, or in one proportion to them."""
    ours = got.detach()[missed].double()
    for name, other in others.items():
        if other.shape != got.shape or ours.numel() < 4 or not other.is_floating_point():
            continue
        theirs = other.detach()[missed].double()
        factor = float((theirs @ ours) / (theirs @ theirs))
        if float((ours - factor * theirs).abs().max()) <= 2 * UNIT[got.dtype] * float(ours.abs().max()):
            times = "" if abs(factor - 1.0) < 1e-6 else f"{factor:.4g} times "
            yield f"each of them is {times}the element of {name}"
            return


def _digits(factor: float) -> str:
    """As many digits as show that it is not 1."""
    return next(text for n in range(3, 18) if (text := f"{factor:.{n}g}") != "1" or n == 17)


def pattern(op: str, failed: Iterable[Call], passed: Iterable[Call]) -> str:
    """What all failed calls of an op have and no passed one has, in a few words; "" if nothing is found."""
    bad, good = list(failed), list(passed)
    if not bad or not good:
        return ""
    for said, holds in _features(op, bad):
        if all(map(holds, bad)) and not any(map(holds, good)):
            return f"exactly the cases {said}"
    return ""


def _features(op: str, bad: list[Call]) -> Iterator[Feature]:
    """From the plain to the particular."""
    dtypes = {dtype for _, dtype in bad}
    in_them = f"in {' and '.join(sorted(dtypes))}"
    yield in_them, lambda call: call[1] in dtypes
    plain = [*_option_features(op, bad[0][0]), *_shape_features([case.shape for case, _ in bad])]
    yield from plain
    for said, holds in plain:
        yield f"{said}, {in_them}", partial(_both, holds, dtypes)


def _both(holds: Callable[[Call], bool], dtypes: set[str], call: Call) -> bool:
    return call[1] in dtypes and holds(call)


def _option_features(op: str, first: Case) -> Iterator[Feature]:
    for key, value in first.options.items():
        known = f" ({KNOWN[op, key]})" if (op, key) in KNOWN else ""
        yield f"with {key}{known}", partial(lambda key, call: key in call[0].options, key)
        yield (
            f"with {key}={value}{known}",
            partial(lambda key, value, call: call[0].options.get(key) == value, key, value),
        )


def _shape_features(bad: list[tuple[int, ...]]) -> Iterator[Feature]:
    yield "with no elements", lambda call: 0 in call[0].shape
    yield "that are not empty", lambda call: 0 not in call[0].shape
    if len(set(bad)) < 2:  # of a single shape too much is true by chance
        return
    for step in (2, 4, 8, 16, 32, 64, 128):
        yield (
            f"whose last dimension is no multiple of {step}",
            partial(lambda step, call: call[0].shape[-1] % step != 0, step),
        )
    least, fewest = min(shape[-1] for shape in bad), min(map(_rows, bad))
    yield f"whose last dimension is {least} or more", lambda call: call[0].shape[-1] >= least
    yield f"of {fewest} or more rows", lambda call: _rows(call[0].shape) >= fewest


def _rows(shape: tuple[int, ...]) -> int:
    return math.prod(shape[:-1])
