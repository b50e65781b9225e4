"""MLP blocks, found by what they are made of and proven by what they do.

A block is a module whose only children are two layers with an activation (GELU) between them, or three with a gated
one (GELU or SiLU), or one layer and its GELU, with dropouts anywhere. What its `forward` makes of them is not guessed
from names: a copy of the block with tiny layers and telling dropouts is run beside the formula in fp64, and must give
the same, gradients too, and keep nothing. So a block of an unknown model is taken as well as a known one, and one
that does something else between (a clip, a sum, another order) is left; and so is one whose code looks at what
trying out cannot show: sizes, and what may change outside of it.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from itertools import permutations
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from fastgpt import ops
from fastgpt.interop.layers import approximate_of, is_layer, is_ours, is_plain, one_dtype, weight_and_bias
from fastgpt.interop.swap import ROLES, original
from fastgpt.ops.linear import APPROXIMATE

_NAMES = {approximate: name for name, approximate in APPROXIMATE.items()}  # of activations
WIDTH, HIDDEN = 5, 7  # of the tiny block


class Roles(NamedTuple):
    """Names of children: layers in the order in which x meets them; dropouts after the activation and at the end."""

    layers: tuple[str, ...]  # (one,), (first, second) or (gate, up, down)
    activation: str
    inner: tuple[str, ...]
    outer: tuple[str, ...]
    attributes: dict[str, Any]  # what else it had when it was tried out: with others it may do otherwise


class FusedBlock:
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        module: Any = self
        roles: Roles = module.__dict__[ROLES]
        children = module._modules
        layers = [children.get(name) for name in roles.layers]
        activation = children.get(roles.activation)
        if len(args) != 1 or kwargs or not _is_as_it_was(module, roles, layers, activation, args[0]):
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        x, dropouts = args[0], [children[name] for name in roles.inner]
        approximate = approximate_of(activation)
        if len(layers) == 3:
            y = layers[2](_through(dropouts, _gated(activation, layers[0](x), layers[1](x))))
        else:
            (w1, b1), name = weight_and_bias(layers[0]), _NAMES[approximate or "none"]
            if len(layers) == 1:
                y = _through(dropouts, ops.linear(x, w1, b1, activation=name))
            elif does_nothing(dropouts):
                y = ops.mlp(x, w1, b1, *weight_and_bias(layers[1]), activation=name)
            else:
                y = _through(dropouts, ops.linear(x, w1, b1, activation=name))
                y = ops.linear(y, *weight_and_bias(layers[1]))
        return _through([children[name] for name in roles.outer], y)


def _gated(activation: Any, gate: Any, up: Any) -> Any:
    """Of what two layers gave: adapters may have made it of two dtypes, or of another shape."""
    if not is_ours(gate, up) or gate.dtype != up.dtype or gate.shape != up.shape:
        return activation(gate) * up
    approximate = approximate_of(activation)
    return ops.swiglu(gate, up) if approximate is None else ops.geglu(gate, up, approximate=approximate)


def find_roles(module: nn.Module) -> Roles | str | None:
    """The roles of a block's children; None if it does not look like one, or why it is none though it does."""
    children = {name: child for name, child in module._modules.items() if child is not None}
    layers = [name for name, child in children.items() if is_layer(child)]
    activations = [n for n, child in children.items() if approximate_of(child) is not None or is_silu(child)]
    dropouts = [name for name, child in children.items() if type(child) is nn.Dropout]
    found = len(layers) + len(activations) + len(dropouts)
    if (
        len(activations) != 1
        or not 1 <= len(layers) <= 3
        or found != len(children)
        or module._parameters
        or module._buffers
    ):
        return None
    activation = activations[0]
    if len(layers) < 3 and is_silu(children[activation]):
        return None
    attributes = _attributes(module)
    if any(isinstance(value, Tensor) for value in attributes.values()):
        return "keeps a tensor that is neither parameter nor buffer"  # it may change in place
    if any(_changing(module, attributes)):
        return "looks at sizes, or at what may change outside of it"
    own_dtype = weight_and_bias(children[layers[0]])[0].dtype
    shapes = {name: weight_and_bias(children[name])[0].shape for name in layers}
    for order in permutations(layers):
        if len(order) == 3 and shapes[order[0]] != shapes[order[1]]:
            continue
        # Rows of two kinds, in evaluation and in training, where also a dropout shows that is no module; and in its
        # own dtype, of which it may make another.
        tried = {
            _try_out(module, order, activation, dropouts, shape, training, dtype)
            for shape in ((6,), (3, 2))
            for training in (False, True)
            for dtype in {torch.float64, own_dtype}
        }
        if len(tried) == 1 and (places := tried.pop()) is not None:
            return Roles(order, activation, *places, attributes)
    return "does something else with its layers than an MLP"


_OF_EVERY_MODULE = {*nn.Module().__dict__, ROLES}


def _attributes(module: nn.Module) -> dict[str, Any]:
    """What it has of its own; of private names only those that it has now are told from what others hang on it."""
    return {n: value for n, value in module.__dict__.items() if n not in _OF_EVERY_MODULE}


_SIZES = {"shape", "size", "numel", "len", "in_features", "out_features", "nf"}


def _changing(module: nn.Module, attributes: dict[str, Any]) -> Iterator[bool]:
    """Of what the code of its forward reads: whether it may be other than it was in trying out, unseen by `_same`."""
    forward: Any = inspect.unwrap(original(type(module)).forward)
    names = set(forward.__code__.co_names)
    yield bool(names & _SIZES)
    around = inspect.getclosurevars(forward)
    for value in (*around.globals.values(), *around.nonlocals.values()):
        yield not (callable(value) or isinstance(value, ModuleType))
    for name in names & attributes.keys():
        value = attributes[name]
        yield not callable(value) and (hasattr(value, "__dict__") or isinstance(value, _CONTAINERS))


_CONTAINERS = (list, dict, set)


def _kept(module: nn.Module, before: dict[str, Any]) -> bool:
    """Whether running it has left something: in what it has, or in a container of it."""
    now = _attributes(module)
    return now.keys() != before.keys() or any(
        type(value) is not type(before[name])
        or (len(value) != len(before[name]) if isinstance(value, _CONTAINERS) else value is not before[name])
        for name, value in now.items()
    )


def _try_out(
    module: nn.Module,
    layers: tuple[str, ...],
    activation: str,
    dropouts: list[str],
    shape: tuple[int, ...],
    training: bool,
    dtype: torch.dtype,
) -> tuple[tuple[str, ...], tuple[str, ...]] | None:
    """(dropouts after the activation, dropouts at the end) if the block computes the formula, else None."""
    tiny = copy.copy(module)
    tiny.__class__ = original(type(module))
    tiny.__dict__ = {**module.__dict__, "_modules": dict(module._modules), "training": training}
    generator = torch.Generator().manual_seed(0)

    def layer(n: int, k: int, bias: bool) -> nn.Linear:
        made = nn.Linear(k, n, bias, dtype=dtype)
        for p in made.parameters():
            p.data = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(dtype)
        return made

    mine = _attributes(module)
    tiny.__dict__ |= {
        name: copy.copy(value) for name, value in mine.items() if isinstance(value, _CONTAINERS)
    }
    grad = torch.inference_mode(False), torch.enable_grad()
    with torch.device("cpu"), grad[0], grad[1], torch.random.fork_rng(devices=[]):
        biased = [weight_and_bias(module._modules[name])[1] is not None for name in layers]  # type: ignore[arg-type]
        widths = (
            [(HIDDEN, WIDTH)]
            if len(layers) == 1
            else [(HIDDEN, WIDTH)] * (len(layers) - 1) + [(WIDTH, HIDDEN)]
        )
        made = [layer(n, k, bias) for (n, k), bias in zip(widths, biased, strict=True)]
        tiny._modules |= dict(zip(layers, made, strict=True))
        factors = {name: 2.0 + i for i, name in enumerate(dropouts)}
        tiny._modules |= {name: _Times(factor) for name, factor in factors.items()}
        largest = 2 if dtype == torch.float64 else 0.5  # fp16 ends at 65504
        # Large and small, so that a clip or another activation shows.
        x = (
            torch.randn(6, WIDTH, generator=generator, dtype=torch.float64)
            * torch.logspace(-2, largest, 6)[:, None]
        )
        x = x.view(*shape, WIDTH).to(dtype).requires_grad_()
        try:
            got = tiny(x)
        except Exception:  # whatever it needs beside x: it is no MLP of x
            return None
        if _kept(tiny, mine):
            return None
        leaves = [x, *(p for one in made for p in one.parameters())]
        act = _formula(module._modules[activation])
        for chosen in range(2 ** len(dropouts)):
            inner = tuple(name for i, name in enumerate(dropouts) if chosen >> i & 1)
            outer = tuple(name for name in dropouts if name not in inner)
            hidden = act(made[0](x)) * (made[1](x) if len(layers) == 3 else 1.0)
            for name in inner:
                hidden = hidden * factors[name]
            if len(layers) == 1 and outer:  # there, the end is after the activation
                continue
            y = hidden if len(layers) == 1 else made[-1](hidden)
            for name in outer:
                y = y * factors[name]
            same = isinstance(got, Tensor) and got.dtype == dtype and got.shape == y.shape and _close(got, y)
            if same and (dtype != torch.float64 or _same_gradients(got, y, leaves)):
                return inner, outer
    return None


def _close(got: Tensor, y: Tensor) -> bool:
    if y.dtype == torch.float64:
        return bool(torch.isclose(got, y, rtol=1e-6).all())
    off, norm = ((t.double()).norm(dim=-1) for t in (got - y, y))  # of rows: in small ones the biases show
    return bool((off <= 16 * torch.finfo(y.dtype).eps * norm).all())


def _same_gradients(got: Tensor, y: Tensor, leaves: list[Tensor]) -> bool:
    if not got.requires_grad:
        return False
    dy = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y)
    pairs = [torch.autograd.grad(out, leaves, dy, retain_graph=True, allow_unused=True) for out in (got, y)]
    return all(a is not None and _close(a, b) for a, b in zip(*pairs, strict=True))


class _Times(nn.Module):
    """Stands for a dropout, to show where it acts."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


def _formula(activation: nn.Module | None) -> Any:
    approximate = None if activation is None else approximate_of(activation)
    return F.silu if approximate is None else lambda x: F.gelu(x, approximate=approximate)


def is_silu(module: nn.Module) -> bool:
    kind = type(module)
    return kind is nn.SiLU or (
        kind.__name__ == "SiLUActivation" and kind.__module__ == "transformers.activations"
    )


def _is_as_it_was(module: nn.Module, roles: Roles, layers: list[Any], activation: Any, x: Any) -> bool:
    """No layer has been added, exchanged, hooked or brought to another dtype since (adapters, quantisation)."""
    names = {*roles.layers, roles.activation, *roles.inner, *roles.outer}
    if {name for name, child in module._modules.items() if child is not None} != names:
        return False
    if module._parameters or module._buffers or _has_any_global_hook():
        return False
    parameters = [p for layer in layers for p in layer._parameters.values() if p is not None]
    if not is_ours(x, *parameters) or not is_plain(activation, original(type(activation))):
        return False
    if not _same(_attributes(module), roles.attributes):
        return False
    if len(layers) == 3:  # they are called as they are
        return approximate_of(activation) is not None or is_silu(activation)
    return (
        all(is_layer(layer) and is_plain(layer, original(type(layer))) for layer in layers)
        and approximate_of(activation) is not None
        and (one_dtype(x, *parameters) or torch.is_autocast_enabled(x.device.type))
    )


def _same(now: dict[str, Any], then: dict[str, Any]) -> bool:
    return all(n in then or n.startswith("_") for n in now) and all(
        n in now and (now[n] is value or (type(value) in _COMPARED and now[n] == value))
        for n, value in then.items()
    )


_COMPARED = (bool, int, float, str, tuple)  # of others that are not the same object `==` may say anything


def does_nothing(dropouts: list[Any]) -> bool:
    return all(is_plain(d, nn.Dropout) and not (d.p and d.training) for d in dropouts)


def _through(dropouts: list[Any], x: Tensor) -> Tensor:
    for dropout in dropouts:
        x = dropout(x)
    return x
