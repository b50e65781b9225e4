"""Attention over documents of different lengths packed end to end: no padding, nothing seen across a border."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from fastgpt._core import validate
from fastgpt._core.dispatch import Backend
from fastgpt._core.plan import planned
from fastgpt._core.registry import register
from fastgpt._core.spec import Case, Cost, Draw, OpSpec
from fastgpt.ops import attention_cases
from fastgpt.ops.attention import SPEC as ATTENTION
from fastgpt.ops.attention import attend, prepare_options
from fastgpt.reference import attention_varlen as reference
from fastgpt.reference.attention import Window


def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    causal: bool = False,
    scale: float | None = None,
    mask: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    window: Window = None,
    softcap: float = 0.0,
    kv_lengths: Tensor | None = None,
    dropout_p: float = 0.0,
    rng: Tensor | None = None,
    return_lse: bool = False,
    backend: Backend = None,
) -> Any:
    """`attention` of each of N documents by itself.

    Args:
        q: [total_q, H, D], k: [total_k, Hkv, D], v: [total_k, Hkv, Dv]: the documents one after the other.
        cu_seqlens_q, cu_seqlens_k: int32 [N + 1]: where each document begins, and at the end the total.
        max_seqlen_q, max_seqlen_k: at least the length of the longest document.
        causal, scale, window, softcap, return_lse, backend: as in `attention`, within each document.
        mask: broadcastable to [N, H, max_seqlen_q, max_seqlen_k].
        alibi_slopes: [H] or [N, H]. kv_lengths: [N], how many keys of each document are there.
        dropout_p, rng: as in `attention`, the index of an element that in [N, H, max_seqlen_q, max_seqlen_k].

    Returns:
        out [total_q, H, Dv], contiguous; with return_lse (out, lse): lse fp32 [H, total_q].

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came. The values in cu_seqlens are
            looked at on a CPU only (elsewhere that would wait for the device); what they hold must be true.
    """
    rng = validate.drawn_rng(q, dropout_p, rng)
    tensors = q, k, v, cu_seqlens_q, cu_seqlens_k
    options = causal, scale, mask, alibi_slopes, window, softcap, kv_lengths, dropout_p, rng, return_lse
    out, lse = attend(planned(SPEC, backend, (*tensors, max_seqlen_q, max_seqlen_k, *options)))
    out = out[0].transpose(0, 1)
    return (out, lse[0]) if return_lse else out


def _prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    causal: bool = False,
    scale: float | None = None,
    mask: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    window: Window = None,
    softcap: float = 0.0,
    kv_lengths: Tensor | None = None,
    dropout_p: float = 0.0,
    rng: Tensor | None = None,
    return_lse: bool = False,
) -> tuple[Any, ...]:
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        validate.floating(name, tensor)
        if tensor.dim() != 3:
            raise ValueError(f"{name}: expected [total, H, D], got shape {tuple(tensor.shape)}")
    q, k, v = validate.autocast(q, k, v)
    (total_q, heads, width), (total_k, kv_heads, _) = q.shape, k.shape
    validate.grouped_heads(heads, kv_heads)
    validate.shape("k", k, (total_k, kv_heads, width))
    validate.shape("v", v, (total_k, kv_heads, v.shape[-1]))
    for name, tensor in (("k", k), ("v", v)):
        validate.dtype(name, tensor, (q.dtype,), f"q is {q.dtype}")
        validate.same_device(name, tensor, "q", q)
    documents = cu_seqlens_q.numel() - 1 if isinstance(cu_seqlens_q, Tensor) else 0
    for name, ends, total, longest in (
        ("cu_seqlens_q", cu_seqlens_q, total_q, max_seqlen_q),
        ("cu_seqlens_k", cu_seqlens_k, total_k, max_seqlen_k),
    ):
        most = name.replace("cu_", "max_").replace("seqlens", "seqlen")
        if isinstance(longest, bool) or not isinstance(longest, (int, torch.SymInt)) or longest < 0:
            raise ValueError(f"{most}: expected an integer >= 0, got {longest!r}")
        validate.integers(name, ends, (max(documents, 0) + 1,), (torch.int32,), "q", q, 0, total)
        if validate.readable(ends):
            _check_ends(name, ends.tolist(), total, most, longest)
    options = prepare_options(
        q, (documents, heads, max_seqlen_q, max_seqlen_k), causal=causal, scale=scale, mask=mask,
        alibi_slopes=alibi_slopes, window=window, softcap=softcap, kv_lengths=kv_lengths, dropout_p=dropout_p,
        rng=rng, cu_seqlens=(cu_seqlens_q, cu_seqlens_k),
    )  # fmt: skip
    if kv_lengths is not None and validate.readable(kv_lengths) and validate.readable(cu_seqlens_k):
        present = cu_seqlens_k.diff()
        if bool((kv_lengths > present).any()):
            raise ValueError(
                f"kv_lengths: expected at most the keys of each document, {present.tolist()},"
                f" got {kv_lengths.tolist()}"
            )
    # New tensors, so that `plan.py` remembers no call, and the values above are looked at every time.
    q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
    return q, k, v, *options, max_seqlen_q, max_seqlen_k, return_lse


def _check_ends(name: str, ends: list[int], total: int, most: str, longest: int) -> None:
    lengths = [end - start for start, end in pairwise(ends)]
    if ends[0] != 0 or ends[-1] != total or min(lengths, default=0) < 0:
        raise ValueError(f"{name}: expected non-decreasing values from 0 to {total}, got {ends}")
    if max(lengths, default=0) > longest:
        raise ValueError(f"{most}: expected at least the longest document, {max(lengths)}, got {longest}")


def _make_inputs(case: Case, dtype: torch.dtype, draw: Draw) -> dict[str, Any]:
    """Of a case whose shape is (H, D, the length of each document ...); those of the keys in an option."""
    heads, width, *lengths = case.shape
    kv_heads = case.options.get("kv_heads", heads)
    key_lengths = (
        [int(n) for n in str(case.options["keys"]).split("_")] if "keys" in case.options else lengths
    )
    longest = max(lengths) + case.options.get("slack", 0), max(key_lengths) + case.options.get("slack", 0)
    options = attention_cases.make_options(case, (len(lengths), heads, *longest), dtype, draw)
    if "kv_lengths" in options:
        options["kv_lengths"] = options["kv_lengths"].minimum(torch.tensor(key_lengths, device=draw.device))
    return {
        "q": draw.normal((sum(lengths), heads, width), dtype),
        "k": draw.normal((sum(key_lengths), kv_heads, width), dtype),
        "v": draw.normal((sum(key_lengths), kv_heads, width), dtype, mean=0.2),
        "cu_seqlens_q": _ends(lengths).to(draw.device),
        "cu_seqlens_k": _ends(key_lengths).to(draw.device),
        "max_seqlen_q": longest[0],
        "max_seqlen_k": longest[1],
        **options,
    }


def _ends(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def _cost(case: Case, dtype: torch.dtype) -> Cost:
    heads, width, *lengths = case.shape
    of_each = [attention_cases.cost(Case((1, heads, n, n, width), case.options), dtype) for n in lengths]
    return Cost(*(sum(part) for part in zip(*of_each, strict=True)))


def _baseline(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    return_lse: bool = False,
    **options: Any,
) -> Any:
    """Document by document; options that differ by document have no short form in PyTorch."""
    if any(isinstance(value, Tensor) for value in options.values()):
        raise NotImplementedError("masks, slopes and lengths by document")
    parts = []
    for own, keys in zip(pairwise(cu_seqlens_q.tolist()), pairwise(cu_seqlens_k.tolist()), strict=True):
        one = (_document(q, own), _document(k, keys), _document(v, keys))
        parts.append(attention_cases.baseline(*one, **options, return_lse=return_lse))
    if return_lse:
        return torch.cat([o for o, _ in parts], 2)[0].transpose(0, 1), torch.cat([e for _, e in parts], 2)[0]
    return torch.cat(parts, 2)[0].transpose(0, 1)


def _document(t: Tensor, bounds: tuple[int, int]) -> Tensor:
    """[total, H, D] -> [1, H, T, D] of one document."""
    return t[slice(*bounds)].transpose(0, 1)[None]


_CASES: tuple[Case, ...] = (
    Case((2, 16, 5, 17, 1)),
    Case((2, 16, 40, 3, 70), {"causal": True}),
    Case((2, 20, 9, 0, 33), {"causal": True, "slack": 3}),
    Case((4, 16, 5, 2, 20), {"keys": "9_0_25", "kv_heads": 2, "causal": True, "return_lse": True}),
    Case((2, 16, 8, 21), {"mask": "bool", "slack": 2}),
    Case((2, 16, 8, 21), {"mask": "fp32", "over": "bhqk", "causal": True}),
    Case((2, 16, 8, 21), {"mask": "same", "over": "1hqk", "softcap": 4.0, "slack": 1}),
    Case((2, 16, 20, 33), {"dropout": 0.3, "window": "5_2", "slack": 4}),
    Case((2, 16, 20, 33, 4), {"lengths": True, "alibi": "bh", "causal": True}),
    Case((2, 16, 1, 1, 1), {"keys": "30_7_150", "causal": True, "return_lse": True}),
)

SPEC = register(
    OpSpec(
        name="attention_varlen",
        kernels="attention",
        entries=ATTENTION.entries,
        function=attention_varlen,
        prepare=_prepare,
        reference=reference.attention_varlen,
        condition=reference.condition,
        outputs=("out", "lse"),
        gradients=("q", "k", "v", "mask"),
        make_inputs=_make_inputs,
        cases=_CASES,
        bench_cases=(),
        cost=_cost,
        baseline=_baseline,
        c=ATTENTION.c,
    )
)
