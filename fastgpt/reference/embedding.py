"""Token and position embeddings, by definition.

out[..., t] = token_weight[tokens[..., t]] + position_weight[positions[..., t]]
dtoken_weight[v] = sum of dout over the places whose token is v; none into row padding_idx
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt.reference.common import Condition, upcast


def embedding(
    tokens: Tensor,
    token_weight: Tensor,
    position_weight: Tensor | None = None,
    *,
    positions: Tensor | None = None,
    padding_idx: int | None = None,
) -> Tensor:
    """[*tokens.shape, C] in token_weight's dtype."""
    out = F.embedding(tokens, upcast(token_weight), padding_idx)
    if position_weight is not None:
        out = out + F.embedding(_positions(tokens, positions), upcast(position_weight))
    return out.to(token_weight.dtype)


def condition(inputs: Mapping[str, Any], grads: Mapping[str, Tensor]) -> dict[str, Condition]:
    """Amplitudes of out, dtoken_weight and dposition_weight: the same sums over absolute values."""
    tokens, token_weight = inputs["tokens"], inputs["token_weight"]
    position_weight, positions = inputs.get("position_weight"), inputs.get("positions")
    padding_idx = inputs.get("padding_idx")
    out = embedding(
        tokens, token_weight.abs(), None if position_weight is None else position_weight.abs(), positions=positions
    )  # fmt: skip
    found = {"out": Condition(out)}
    dout = grads.get("out")
    if dout is None:
        return found
    padding = -1 if padding_idx is None else padding_idx % max(token_weight.shape[0], 1)
    found["dtoken_weight"] = Condition(_scattered(dout.abs(), tokens, token_weight.shape[0], padding))
    if position_weight is not None:
        places = _positions(tokens, positions)
        found["dposition_weight"] = Condition(_scattered(dout.abs(), places, position_weight.shape[0], -1))
    return found


def supports(
    token_weight: Tensor, tokens: Tensor, position_weight: Tensor | None, positions: Tensor | None
) -> None:
    """The definition takes everything."""
    return


def embedding_fwd(
    token_weight: Tensor, tokens: Tensor, position_weight: Tensor | None, positions: Tensor | None
) -> Tensor:
    """out."""
    return embedding(tokens, token_weight, position_weight, positions=positions)


def embedding_bwd(
    dout: Tensor,
    tokens: Tensor,
    positions: Tensor | None,
    vocab_size: int,
    num_positions: int,
    padding_idx: int,
    need_dtoken: bool,
    need_dposition: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """(dtoken_weight [vocab_size, C], dposition_weight [num_positions, C])."""
    g = dout.double()  # index_add adds one after another: in fp32 a frequent token's sum would lose digits
    dtoken = dposition = None
    if need_dtoken:
        dtoken = _scattered(g, tokens, vocab_size, padding_idx).to(dout.dtype)
    if need_dposition:
        dposition = _scattered(g, _positions(tokens, positions), num_positions, -1).to(dout.dtype)
    return dtoken, dposition


def _positions(tokens: Tensor, positions: Tensor | None) -> Tensor:
    """int64 in the shape of tokens; by default 0 to T - 1 along the last dimension."""
    if positions is None:
        positions = torch.arange(tokens.shape[-1], device=tokens.device)
    return positions.expand(tokens.shape)


def _scattered(values: Tensor, index: Tensor, rows: int, left_out: int) -> Tensor:
    """[rows, C]: the sum of the values of each index, but for one."""
    kept = values.masked_fill((index == left_out)[..., None], 0.0)
    total = values.new_zeros(rows, values.shape[-1])
    return total.index_add(0, index.flatten(), kept.flatten(0, -2))
