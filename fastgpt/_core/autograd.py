"""What the custom autograd Functions share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


def needs_graph(args: tuple[Any, ...]) -> bool:
    """Whether autograd has to know of a call with these arguments.

    Inside a dual level it always has: a Function says that it knows no forward mode, a kernel would drop the tangent.
    """
    if forward_ad._current_level >= 0 and not torch.compiler.is_compiling():
        return True
    if torch.is_grad_enabled():
        for arg in args:
            if isinstance(arg, Tensor) and arg.requires_grad:
                return True
    return False


def apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    """`function.apply(*args)` in two thirds of the time: outside of functorch its Python half has nothing to do."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return function.apply(*args)
    return super(torch.autograd.Function, function).apply(*args)  # type: ignore[misc]


def double_backward_wanted() -> bool:
    """True inside a backward that must itself be differentiable (`create_graph=True`)."""
    return not torch.compiler.is_compiling() and torch.is_grad_enabled()


def backward_through(
    function: Callable[..., Any], inputs: Sequence[Tensor | None], grad_outputs: Tensor | Sequence[Tensor]
) -> tuple[Tensor | None, ...]:
    """Gradients of `function(*inputs)` that can be differentiated again: the reference, by autograd.

    None for an input that is None or needs no gradient. Of inputs that were made of one another (tied weights), or
    are the same tensor, autograd would add up all the ways there are to each: it gets views, which know of none.
    """
    views = [t.view_as(t) if t is not None and t.requires_grad else t for t in inputs]
    wanted = [view for view in views if view is not None and view.requires_grad]
    outputs = function(*views)
    grads = iter(torch.autograd.grad(outputs, wanted, grad_outputs, create_graph=True, allow_unused=True))
    return tuple(next(grads) if view is not None and view.requires_grad else None for view in views)
