"""Deliberately wrong attention: dense, over a packed qkv, and over packed documents."""

from __future__ import annotations

from typing import Any

import torch
from honest_attention import Attention, AttentionQKV, AttentionVarlen, Rules, State
from torch import Tensor

# --- which keys a query sees


class AttentionTopLeft(Attention):
    cases = ("2x2x5x33x20-causal", "1x1x33x5x8-causal")

    def offset(self, rules: Rules, queries: int, keys: int) -> Tensor:
        return torch.zeros_like(rules.lk)


class AttentionSeesOneAhead(Attention):
    cases = ("2x2x5x33x20-causal", "2x4x9x12x16-kv_heads_2-causal")

    def inside(self, distance: Tensor, left: int | None, right: int | None) -> Tensor:
        return super().inside(distance, left, None if right is None else right + 1)


class WindowOneShort(Attention):
    cases = ("1x2x50x50x16-window_7-causal",)

    def inside(self, distance: Tensor, left: int | None, right: int | None) -> Tensor:
        return super().inside(distance, None if left is None else left - 1, right)


class WindowOneTooWide(Attention):
    """A window of w taken for w keys before the position."""

    cases = ("1x2x50x50x16-window_7-causal",)

    def inside(self, distance: Tensor, left: int | None, right: int | None) -> Tensor:
        return super().inside(distance, None if left is None else left + 1, right)


class WindowLeftOfTheFirstKey(Attention):
    """Its left edge counted from the top left."""

    cases = ("1x2x30x70x16-window_3_5",)

    def inside(self, distance: Tensor, left: int | None, right: int | None) -> Tensor:
        keys, queries = distance.shape[-1], distance.shape[-2]
        return super().inside(distance, None, right) & super().inside(distance + keys - queries, left, None)


class WindowOneShortOnTheRight(Attention):
    cases = ("1x2x30x70x16-window_3_5",)

    def inside(self, distance: Tensor, left: int | None, right: int | None) -> Tensor:
        return super().inside(distance, left, None if right is None else right - 1)


class WindowSidesSwapped(Attention):
    cases = ("1x2x30x70x16-window_3_5",)

    def sides(self, window: Any, causal: bool) -> tuple[int | None, int | None]:
        left, right = super().sides(window, causal)
        return right, left


class LengthsIgnored(Attention):
    cases = ("3x2x9x40x16-lengths",)

    def lengths(self, kv_lengths: Tensor) -> Tensor:
        return torch.full_like(kv_lengths, 40)


class LengthsOneShort(Attention):
    cases = ("3x2x9x40x16-lengths",)

    def lengths(self, kv_lengths: Tensor) -> Tensor:
        return (kv_lengths - 1).clamp(min=0)


class LengthOfTheFirstSample(Attention):
    cases = ("3x2x9x40x16-lengths",)

    def lengths(self, kv_lengths: Tensor) -> Tensor:
        return kv_lengths[:1].expand(kv_lengths.shape)


class LengthsDoNotMoveThePositions(Attention):
    cases = ("3x4x9x40x16-lengths-kv_heads_2-causal-window_6-alibi_h",)

    def offset(self, rules: Rules, queries: int, keys: int) -> Tensor:
        return torch.full_like(rules.lk, keys - queries)


class WhatLiesBeyondTheLengthIsMultiplied(Attention):
    """A probability of 0 times NaN."""

    cases = ("3x2x9x40x16-lengths",)

    def erase(self, kv: Tensor, lk: Tensor) -> Tensor:
        return kv


# --- scores


class HeadsInterleaved(Attention):
    """Query head h served by key head h % Hkv."""

    cases = ("2x4x9x12x16-kv_heads_2-causal",)

    def per_query_head(self, kv: Tensor, heads: int) -> Tensor:
        return kv.repeat(1, heads // kv.shape[1], 1, 1)

    def sum_over_groups(self, grad: Tensor, kv_heads: int) -> Tensor:
        return grad.unflatten(1, (-1, kv_heads)).sum(1)


class ValuesAsWideAsKeys(Attention):
    cases = ("1x2x19x23x7-v_width_13",)

    def values(self, v: Tensor, width: int) -> Tensor:
        return torch.cat([v[..., :width], torch.zeros_like(v[..., width:])], -1)


class SoftcapAfterTheMask(Attention):
    cases = ("1x2x12x30x16-softcap_2.0-mask_fp32-over_11qk-scale_1.5",)

    def scores(self, r: Tensor, mask: Tensor | None, rules: Rules) -> tuple[Tensor, Tensor]:
        capped = self.cap(r + self.added(mask, rules, r), rules.softcap)
        return capped, capped


class SoftcapNotMultipliedBack(Attention):
    cases = ("1x2x33x33x16-softcap_5.0-causal",)

    def cap(self, r: Tensor, softcap: float) -> Tensor:
        return torch.tanh(r / softcap)


class SoftcapCuts(Attention):
    cases = ("1x2x33x33x16-softcap_5.0-causal",)

    def cap(self, r: Tensor, softcap: float) -> Tensor:
        return r.clamp(-softcap, softcap)


class SoftcapWithoutItsDerivative(Attention):
    cases = ("1x2x33x33x16-softcap_5.0-causal",)

    def uncap(self, ds: Tensor, capped: Tensor, softcap: float) -> Tensor:
        return ds


class SoftcapDerivativeOfTheWrongSide(Attention):
    """1 - r^2 for 1 - tanh(r)^2."""

    cases = ("1x2x33x33x16-softcap_5.0-causal",)

    def uncap(self, ds: Tensor, capped: Tensor, softcap: float) -> Tensor:
        return super().uncap(ds, softcap * torch.atanh(capped / softcap), softcap)


class AlibiFromTheTopLeft(Attention):
    """slope * |key - t|: it differs by more than a number for each row where keys lie on both sides."""

    cases = ("2x4x21x40x16-alibi_h-causal",)

    def bias(self, slopes: Tensor, rules: Rules, queries: int, keys: int) -> Tensor:
        return -slopes[..., None, None] * (torch.arange(keys) - torch.arange(queries)[:, None]).abs()


class AlibiWithoutItsAbsoluteValue(Attention):
    cases = ("2x2x21x21x16-alibi_bh",)

    def bias(self, slopes: Tensor, rules: Rules, queries: int, keys: int) -> Tensor:
        return slopes[..., None, None] * self.distance(rules, queries, keys)


class AlibiOfTheFirstSample(Attention):
    cases = ("2x2x21x21x16-alibi_bh",)

    def bias(self, slopes: Tensor, rules: Rules, queries: int, keys: int) -> Tensor:
        return super().bias(slopes[:1].expand(slopes.shape), rules, queries, keys)


# --- probabilities


class MaximumNotCarriedBack(Attention):
    """An online softmax that does not rescale what it had before a larger score came."""

    def normalise(self, s: Tensor) -> Tensor:
        e = (s - s.cummax(-1).values).exp().nan_to_num(nan=0.0)
        return e / e.sum(-1, keepdim=True)


class ProbabilitiesAPercentTooLarge(Attention):
    def normalise(self, s: Tensor) -> Tensor:
        return super().normalise(s) * 1.01


class DropoutCountsRowsOfWholeTiles(Attention):
    cases = ("2x2x20x33x16-dropout_0.3",)

    def row_length(self, rules: Rules, keys: int) -> Any:
        return -(-keys // 16) * 16


class OtherDropoutInAttentionBackward(Attention):
    cases = ("2x2x20x33x16-dropout_0.3",)

    def keep_in_backward(self, shape: torch.Size, rules: Rules) -> Tensor | None:
        assert rules.rng is not None
        return self.keep(shape, rules._replace(rng=rules.rng + 1))


class LseToBaseTwo(Attention):
    cases = ("2x3x20x20x16-return_lse",)

    def lse(self, s: Tensor, p: Tensor) -> Tensor:
        return torch.logsumexp(s, -1) / torch.log(torch.tensor(2.0))


class LseWithoutTheMaximum(Attention):
    cases = ("2x3x20x20x16-return_lse",)

    def lse(self, s: Tensor, p: Tensor) -> Tensor:
        return torch.logsumexp(s - s.amax(-1, keepdim=True), -1)


class LseAfterDropout(Attention):
    cases = ("2x2x33x9x16-return_lse-causal-dropout_0.2-lengths",)

    def lse(self, s: Tensor, p: Tensor) -> Tensor:
        return torch.logsumexp(s, -1) + p.sum(-1).log()


class LseOfAnEmptyRowIsZero(Attention):
    cases = ("2x2x33x9x16-return_lse-causal-dropout_0.2-lengths",)

    def lse(self, s: Tensor, p: Tensor) -> Tensor:
        return super().lse(s, p).nan_to_num(neginf=0.0)


# --- backward


class GradientOfOneHeadOfTheGroup(Attention):
    cases = ("2x4x9x12x16-kv_heads_2-causal",)

    def sum_over_groups(self, grad: Tensor, kv_heads: int) -> Tensor:
        return grad.unflatten(1, (kv_heads, -1))[:, :, 0]


class DkOfTheLastHeadOfTheGroup(Attention):
    """Stored for every query head, not added up."""

    cases = ("2x4x9x12x16-kv_heads_2-causal",)

    def dk_of_groups(self, grad: Tensor, kv_heads: int) -> Tensor:
        return grad.unflatten(1, (kv_heads, -1))[:, :, -1]


class ScaleForgottenInDq(Attention):
    def dq(self, dr: Tensor, k: Tensor, scale: float) -> Tensor:
        return dr @ k


class ScaleTwiceInDk(Attention):
    def dk(self, dr: Tensor, q: Tensor, scale: float) -> Tensor:
        return super().dk(dr, q, scale) * scale


class DvOfUnmaskedProbabilities(Attention):
    cases = ("1x2x40x40x64-causal",)

    def p_of_dv(self, state: State) -> Tensor:
        return self.normalise(state.capped)


class MaskIgnoredInBackward(Attention):
    cases = ("2x3x20x20x16-mask_fp32-causal",)

    def mask_in_backward(self, mask: Tensor | None) -> Tensor | None:
        return None


class DsWithoutItsSum(Attention):
    def ds(self, p: Tensor, dp: Tensor, dlse: Tensor | None) -> Tensor:
        return p * dp


class GradientOfLseIgnored(Attention):
    cases = ("2x3x20x20x16-return_lse",)

    def ds(self, p: Tensor, dp: Tensor, dlse: Tensor | None) -> Tensor:
        return super().ds(p, dp, None)


class GradientOfLseSubtracted(Attention):
    cases = ("2x3x20x20x16-return_lse",)

    def ds(self, p: Tensor, dp: Tensor, dlse: Tensor | None) -> Tensor:
        return super().ds(p, dp, None if dlse is None else -dlse)


class MaskGradientOfTheFirstBatch(Attention):
    cases = ("2x3x20x20x16-mask_fp32-causal",)

    def dmask(self, ds: Tensor, shape: torch.Size) -> Tensor:
        return ds[:1].sum_to_size(shape)


# --- packed


class HeadByHead(AttentionQKV):
    """q, k and v of one head beside each other."""

    cases = ("2x17x3x16",)

    def three(self, qkv: Tensor, num_heads: int) -> list[Tensor]:
        return list(qkv.unflatten(-1, (num_heads, 3, -1)).permute(3, 0, 2, 1, 4))


class SeesThePreviousDocument(AttentionVarlen):
    """One key of it."""

    cases = ("2x16x5x17x1",)

    def key_bounds(self, ends: Tensor) -> tuple[Tensor, Tensor]:
        starts, lengths = self.bounds(ends)
        before = (starts > 0).long()
        return starts - before, lengths + before


class QueriesAlignedToTheLongest(AttentionVarlen):
    cases = ("4x16x5x2x20-keys_9_0_25-kv_heads_2-causal-return_lse",)

    def offset(self, rules: Rules, queries: int, keys: int) -> Tensor:
        return torch.full_like(rules.lk, keys - queries)


class PaddedQueriesLookAtKeys(AttentionVarlen):
    """Of zeros, which is nothing in dq, dk and dv, but NaN times zero reaches the gradient of the mask."""

    cases = ("2x16x8x21-mask_fp32-over_bhqk-causal",)

    def present(self, rules: Rules, queries: int, keys: int) -> Tensor:
        return torch.arange(keys) < rules.lk[:, None, None, None]


class DropoutCountsTheDocumentsOwnLength(AttentionVarlen):
    cases = ("2x16x20x33-dropout_0.3-window_5_2-slack_4",)

    def row_length(self, rules: Rules, keys: int) -> Any:
        return rules.lk[:, None, None, None]


ATTENTION_FAULTS = {
    AttentionTopLeft: "bound", AttentionSeesOneAhead: "leak", WindowOneShort: "bound", WindowOneTooWide: "leak",
    WindowLeftOfTheFirstKey: "bound", WindowOneShortOnTheRight: "bound", WindowSidesSwapped: "bound",
    LengthsIgnored: "leak", LengthsOneShort: "bound", LengthOfTheFirstSample: "bound",
    LengthsDoNotMoveThePositions: "bound", WhatLiesBeyondTheLengthIsMultiplied: "leak",
    HeadsInterleaved: "bound", ValuesAsWideAsKeys: "bound", SoftcapAfterTheMask: "bound",
    SoftcapNotMultipliedBack: "bound", SoftcapCuts: "bound", SoftcapWithoutItsDerivative: "bound",
    SoftcapDerivativeOfTheWrongSide: "bound", AlibiFromTheTopLeft: "bound", AlibiWithoutItsAbsoluteValue: "bound",
    AlibiOfTheFirstSample: "bound", MaximumNotCarriedBack: "bound", ProbabilitiesAPercentTooLarge: "bound",
    DropoutCountsRowsOfWholeTiles: "bound", OtherDropoutInAttentionBackward: "bound", LseToBaseTwo: "bound",
    LseWithoutTheMaximum: "bound", LseAfterDropout: "bound", LseOfAnEmptyRowIsZero: "bound",
    GradientOfOneHeadOfTheGroup: "bound", DkOfTheLastHeadOfTheGroup: "bound", ScaleForgottenInDq: "bound",
    ScaleTwiceInDk: "bound", DvOfUnmaskedProbabilities: "bound", MaskIgnoredInBackward: "bound",
    DsWithoutItsSum: "bound", GradientOfLseIgnored: "bound", GradientOfLseSubtracted: "bound",
    MaskGradientOfTheFirstBatch: "bound", HeadByHead: "bound", SeesThePreviousDocument: "bound",
    QueriesAlignedToTheLongest: "bound", PaddedQueriesLookAtKeys: "leak",
    DropoutCountsTheDocumentsOwnLength: "bound",
}  # fmt: skip
