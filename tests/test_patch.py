"""`fastgpt.patch` on PyTorch's own modules: the same results, the same objects, nothing that is not understood."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastgpt
from fastgpt.interop import KINDS, PatchReport, layers
from fastgpt.interop.swap import original

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Of a dtype's rounding, for layers on each other; PyTorch's own results are up to 27 and 19 from fp64 here. fp32
# tells right from wrong: tanh for erf is 4,000 units of it, a token too many in sight a million.
UNITS = {torch.float32: 100.0, torch.bfloat16: 25.0}


class Model(nn.Module):
    """Something of every kind, and what must be left."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.rms = nn.LayerNorm(16), nn.RMSNorm(16)
        self.mlp = nn.Sequential(
            nn.Linear(16, 40), nn.GELU(approximate="tanh"), nn.Dropout(0.1), nn.Linear(40, 16)
        )
        self.softmax = nn.Softmax(dim=-1)
        self.act = nn.GELU()
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mlp(self.norm(x))
        return self.softmax(self.head(self.act(self.rms(x))))


class Doubled(nn.LayerNorm):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class Named(nn.LayerNorm):
    """A subclass that changes nothing."""


def shaken(module: nn.Module, seed: int = 0) -> nn.Module:
    """Parameters that are neither ones nor zeros."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn_like(p) * (0.4 if p.dim() > 1 else 0.5) + (p.dim() == 1))
    return module


def results(module: nn.Module, call: Any, inputs: list[Tensor]) -> dict[str, Tensor]:
    """The output, and the gradients of inputs and parameters under a fixed random one."""
    leaves = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in inputs]
    out = call(module, *leaves)
    generator = torch.Generator().manual_seed(1)
    out.backward(torch.randn(out.shape, generator=generator, dtype=torch.float32).to(out.dtype))
    found = {"out": out.detach()}
    found |= {f"d{i}": x.grad for i, x in enumerate(leaves) if x.grad is not None}
    found |= {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    module.zero_grad(set_to_none=True)
    return found


def check_same(module: nn.Module, call: Any, inputs: list[Tensor]) -> PatchReport:
    """The patched copy beside the module itself in fp64, each result within UNITS."""
    patched = copy.deepcopy(module)
    report = fastgpt.patch(patched)
    exact_module = copy.deepcopy(module).double()
    exact = results(exact_module, call, [x.double() if x.is_floating_point() else x for x in inputs])
    got = results(patched, call, inputs)
    assert got.keys() == exact.keys()
    dtype = next(module.parameters()).dtype
    unit = torch.finfo(dtype).eps
    largest = max(float(value.norm()) for name, value in exact.items() if name != "out")
    for name, value in exact.items():
        floor = 1e-3 * largest if name != "out" else 0.0  # of gradients that are zero but for rounding
        off = float((got[name].double() - value).norm()) / (float(value.norm()) + floor)
        assert off <= UNITS[dtype] * unit, f"{name}: {off / unit:.1f} units"
        assert got[name].dtype == dtype
    return report


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_results_are_the_same(dtype: str, training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "MUCH", 0)  # so that the small ones take the way of the large
    model = shaken(Model()).to(DTYPES[dtype]).train(training)
    model.mlp[2].p = 0.0  # type: ignore[union-attr, assignment]
    report = check_same(model, lambda m, x: m(x), [torch.randn(3, 7, 16).to(DTYPES[dtype])])
    assert {e.kind: e.by for e in report.replaced} == {
        "layer_norm": "ops.layer_norm",
        "rms_norm": "ops.rms_norm",
        "mlp": "ops.mlp",
        "gelu": "ops.gelu",
        "softmax": "ops.softmax",
        "linear": "ops.linear",
    }
    assert not report.left


def test_the_module_stays_the_object_that_it_is() -> None:
    model = shaken(Model())
    before = dict(model.named_parameters()), list(model.state_dict()), dict(model.named_modules())
    report = fastgpt.patch(model)
    assert dict(model.named_parameters()).keys() == before[0].keys()
    assert all(p is before[0][name] for name, p in model.named_parameters())
    assert list(model.state_dict()) == before[1]
    assert all(module is before[2][name] for name, module in model.named_modules())
    assert isinstance(model.norm, nn.LayerNorm)
    assert type(model.norm) is not nn.LayerNorm
    assert nn.LayerNorm(4).forward.__func__ is nn.LayerNorm.forward  # no class is touched
    again = fastgpt.patch(model)
    assert again.to_dict() == report.to_dict()
    assert fastgpt.unpatch(model) == len(report.replaced)
    assert type(model.norm) is nn.LayerNorm
    assert fastgpt.unpatch(model) == 0
    assert all(module is before[2][name] for name, module in model.named_modules())
    assert "_fastgpt_roles" not in model.mlp.__dict__


def test_copies_pickles_and_saved_models_are_patched_too() -> None:
    model, x = shaken(Model()).eval(), torch.randn(4, 16)
    report = fastgpt.patch(model)
    expected, file = model(x), io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(file, weights_only=False),
    ):
        assert torch.equal(other(x), expected)
        assert original(type(other.norm)) is nn.LayerNorm
        assert type(other.norm) is type(model.norm)
        assert other.norm.weight is not model.norm.weight
        assert fastgpt.unpatch(other) == len(report.replaced)
    assert type(model.norm) is not nn.LayerNorm


def test_an_optimizer_made_before_trains_on() -> None:
    model, x = shaken(Model()), torch.randn(8, 16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    fastgpt.patch(model)
    before = model.norm.weight.detach().clone()
    model(x)[:, 0].sum().backward()
    optimizer.step()
    assert not torch.equal(model.norm.weight, before)


def test_hooks_run_also_within_a_block_that_is_replaced() -> None:
    model, x, seen = shaken(Model()).eval(), torch.randn(4, 16), list[str]()
    expected = model(x)
    fastgpt.patch(model)
    for name in ("norm", "mlp", "mlp.0", "mlp.1", "mlp.3"):
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: seen.append(name))
    torch.testing.assert_close(model(x), expected)
    assert sorted(seen) == ["mlp", "mlp.0", "mlp.1", "mlp.3", "norm"]


def test_a_layer_exchanged_afterwards_is_called() -> None:
    """As adapters do it."""

    class Adapted(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.layer, self.scale = layer, nn.Parameter(torch.tensor(3.0))

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) * self.scale

    model, x = shaken(Model()).eval(), torch.randn(4, 16)
    fastgpt.patch(model)
    model.mlp[3] = Adapted(model.mlp[3])  # type: ignore[index]
    expected = model(x)
    fastgpt.unpatch(model)
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize(
    ("module", "why"),
    [
        (Doubled(16), "a subclass with a forward of its own"),
        (nn.LayerNorm((3, 16)), "over 2 dimensions"),
        (nn.RMSNorm((3, 16)), "over 2 dimensions"),
        (nn.Softmax(dim=0), "dim=0, not the last"),
        (nn.MultiheadAttention(16, 2, add_bias_kv=True), "appends a key of its own"),
        (nn.MultiheadAttention(16, 2, add_zero_attn=True), "appends a key of zeros"),
        (nn.MultiheadAttention(16, 2, kdim=8), "keys or values of another width"),
    ],
)
def test_what_is_not_understood_is_left_and_listed(module: nn.Module, why: str) -> None:
    model = nn.ModuleDict({"it": module, "norm": nn.LayerNorm(8)})
    before = type(module)
    with pytest.raises(
        ValueError, match=rf"strict: expected every module .* 1 are not, the first it .*{why}"
    ):
        fastgpt.patch(model, strict=True)
    assert type(model["norm"]) is nn.LayerNorm  # nothing was changed
    report = fastgpt.patch(model)
    (left,) = report.left
    assert (left.name, left.module) == ("it", before.__name__)
    assert why in (left.why or "")
    assert type(module) is before
    assert [e.name for e in report.replaced] == ["norm"]
    assert why in str(report)


def test_a_subclass_that_changes_nothing_is_replaced() -> None:
    model = nn.Sequential(Named(16))
    fastgpt.patch(model, strict=True)
    assert isinstance(model[0], Named)
    torch.testing.assert_close(model(torch.ones(2, 16)), torch.zeros(2, 16))


def test_a_module_in_two_places_is_replaced_once_and_named_by_both() -> None:
    norm = nn.LayerNorm(16)
    model = nn.ModuleDict({"a": norm, "b": nn.Sequential(norm)})
    (entry,) = fastgpt.patch(model).entries
    assert entry.name == "a = b.0"
    assert model["a"] is norm
    assert fastgpt.unpatch(model) == 1


def test_only_and_exclude_take_kinds_and_names() -> None:
    def replaced(**options: Any) -> set[str]:
        return {e.name for e in fastgpt.patch(Model(), **options).replaced}

    assert replaced(only="layer_norm") == {"norm"}
    assert replaced(only=["mlp", "act"]) == {"mlp", "act"}
    assert replaced(exclude="*norm") == {"rms", "mlp", "mlp.1", "act", "softmax", "head"}
    assert replaced(only="linear") == {"mlp.0", "mlp.3", "head"}
    assert replaced(only=["gelu"], exclude=["mlp.*"]) == {"act"}
    report = fastgpt.patch(Model(), strict=True, only="rms_norm")  # what nobody asked for is no fault
    assert {e.why for e in report.left} == {"not asked for"}
    with pytest.raises(ValueError, match=r"only: expected a kind \(layer_norm, .*got 'nrom'"):
        fastgpt.patch(Model(), only="nrom")
    assert set(KINDS) >= {e.kind for e in report.entries}


def test_models_that_cannot_be_patched() -> None:
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got Tensor"):
        fastgpt.patch(torch.ones(1))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="not compiled yet"):
        fastgpt.patch(torch.compile(Model(), backend="eager"))  # type: ignore[arg-type]
    compiled = Model()
    compiled.compile(backend="eager")
    with pytest.raises(ValueError, match="not compiled yet"):
        fastgpt.patch(compiled)
    with torch.device("meta"), pytest.raises(ValueError, match="got them on meta"):
        fastgpt.patch(Model())
    with pytest.raises(ValueError, match="TorchScript"):
        fastgpt.patch(torch.jit.script(nn.LayerNorm(4)))


def test_softmax_over_another_dimension_at_the_call_is_pytorch_s() -> None:
    module = nn.Softmax(dim=1)
    fastgpt.patch(module, strict=True)
    for x in (torch.randn(3, 4), torch.randn(3, 4, 5)):
        torch.testing.assert_close(module(x), x.softmax(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_rms_norm_s_own_eps(dtype: torch.dtype) -> None:
    module = nn.RMSNorm(8, dtype=dtype)
    x = torch.randn(3, 8, dtype=dtype) * 1e-3
    expected = module(x)
    fastgpt.patch(module, strict=True)
    torch.testing.assert_close(module(x), expected, rtol=2e-2 if dtype.itemsize == 2 else 1e-5, atol=1e-6)


# --- blocks ---


class Named2(nn.Module):
    """Layers by other names, and registered in another order than that of their use."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(24, 16, bias), nn.Linear(16, 24, bias)
        self.drop, self.act, self.drop2 = nn.Dropout(0.2), nn.GELU(), nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop2(self.down(self.drop(self.act(self.up(x)))))


class Gated(nn.Module):
    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(16, 24), nn.Linear(16, 24), nn.Linear(24, 16)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.a(x) * self.act(self.b(x)))  # the second is the gate


class Clipped(Named2):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).clamp(-60, 60)


class Hidden(Named2):
    """With a dropout that is no module."""

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(super().forward(x), 0.1, self.training)


class Residual(Named2):
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("block", "by"),
    [
        (Named2(), "ops.mlp"),
        (Named2(bias=False), "ops.mlp"),
        (Gated(nn.SiLU()), "ops.swiglu"),
        (Gated(nn.GELU()), "ops.geglu"),
        (Gated(nn.GELU(approximate="tanh")), "ops.geglu"),
        (nn.Sequential(nn.Linear(16, 24), nn.GELU()), "ops.linear with its GELU"),
        (nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 8)), "ops.mlp"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_blocks_are_found_by_what_they_do(block: nn.Module, by: str, dtype: str) -> None:
    module = shaken(copy.deepcopy(block)).to(DTYPES[dtype]).eval()
    report = check_same(module, lambda m, x: m(x), [torch.randn(5, 16).to(DTYPES[dtype])])
    assert [e.by for e in report.entries if e.kind == "mlp"] == [by]


@pytest.mark.parametrize("block", [Clipped(), Hidden(), Residual()], ids=lambda b: type(b).__name__)
def test_a_block_that_does_something_else_is_left(block: nn.Module) -> None:
    report = fastgpt.patch(block)
    assert [e.why for e in report.left] == ["does something else with its layers than an MLP"]
    assert original(type(block)) is type(block)
    assert "mlp" not in {e.kind for e in report.replaced}


def test_a_block_s_dropouts_act_where_they_did() -> None:
    """In training, by the same draws: a dropout is called as the module that it is."""
    module = shaken(Named2())
    patched, x = copy.deepcopy(module), torch.randn(64, 16)
    fastgpt.patch(patched, strict=True)
    torch.manual_seed(3)
    expected = module(x)
    torch.manual_seed(3)
    torch.testing.assert_close(patched(x), expected, rtol=1e-4, atol=1e-4)
    assert 0.2 < float((patched(x) == 0).float().mean()) < 0.4


# --- attention and the Transformer ---


def masks(kind: str, queries: int, keys: int, batch: int = 3) -> dict[str, Any]:
    causal = torch.ones(queries, keys, dtype=torch.bool).triu(1)
    padding = torch.zeros(batch, keys, dtype=torch.bool)
    padding[0, keys // 2 :] = True
    added = torch.zeros(queries, keys).masked_fill(causal, -torch.inf)
    return {
        "none": {},
        "bool": {"attn_mask": causal},
        "added": {"attn_mask": added},
        "causal": {"attn_mask": causal, "is_causal": True},
        "padding": {"key_padding_mask": padding},
        "both": {"attn_mask": causal, "key_padding_mask": padding},
        "heads": {"attn_mask": causal.expand(batch * 4, queries, keys)},
    }[kind]


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("kind", ["none", "bool", "added", "causal", "padding", "both", "heads"])
@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_multihead_attention(dtype: str, cross: bool, kind: str, batch_first: bool) -> None:
    if cross and kind == "causal":
        pytest.skip("a causal mask of queries and other keys is not said to be causal")
    module = shaken(nn.MultiheadAttention(32, 4, batch_first=batch_first)).to(DTYPES[dtype])
    keys = 9 if cross else 6
    options = masks(kind, 6, keys)
    options = {n: m.to(DTYPES[dtype]) if isinstance(m, Tensor) and m.dtype == torch.float32 else m
               for n, m in options.items()}  # fmt: skip

    def call(m: nn.Module, x: Tensor, memory: Tensor) -> Tensor:
        other = memory if cross else x
        said = {n: v.double() if isinstance(v, Tensor) and v.is_floating_point() and x.dtype == torch.float64 else v
                for n, v in options.items()}  # fmt: skip
        out, weights = m(x, other, other, need_weights=False, **said)
        assert weights is None
        return out + 0 * memory.sum()

    inputs = [torch.randn(3, 6, 32), torch.randn(3, keys, 32)]
    inputs = [(x if batch_first else x.transpose(0, 1).contiguous()).to(DTYPES[dtype]) for x in inputs]
    report = check_same(module, call, inputs)
    assert [e.by for e in report.replaced] == ["ops.attention"]


def test_attention_weights_are_still_given() -> None:
    module = shaken(nn.MultiheadAttention(32, 4, batch_first=True))
    x = torch.randn(2, 5, 32)
    expected, weights = module(x, x, x)
    fastgpt.patch(module, strict=True)
    got = module(x, x, x)
    torch.testing.assert_close(got[0], expected)
    torch.testing.assert_close(got[1], weights)
    alone, _ = module(x[0], x[0], x[0], need_weights=False)  # without a batch
    torch.testing.assert_close(alone, expected[0], rtol=1e-4, atol=1e-5)
    with pytest.raises(RuntimeError, match="attn_mask"):
        module(x, x, x, need_weights=False, is_causal=True)


LAYERS = {"post": {}, "pre": {"norm_first": True}, "gelu": {"activation": "gelu"}, "no_bias": {"bias": False}}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("options", LAYERS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_transformer_layers(dtype: str, options: str, training: bool) -> None:
    made = dict(d_model=32, nhead=4, dim_feedforward=48, dropout=0.0, batch_first=True, **LAYERS[options])
    encoder = shaken(nn.TransformerEncoderLayer(**made)).to(DTYPES[dtype]).train(training)  # type: ignore[arg-type]
    decoder = shaken(nn.TransformerDecoderLayer(**made), 1).to(DTYPES[dtype]).train(training)  # type: ignore[arg-type]
    x, memory = (torch.randn(3, n, 32).to(DTYPES[dtype]) for n in (6, 9))
    causal, padding = torch.ones(6, 6, dtype=torch.bool).triu(1), masks("padding", 6, 6)["key_padding_mask"]
    report = check_same(encoder, lambda m, x: m(x, src_mask=causal, src_key_padding_mask=padding), [x])
    assert [e.kind for e in report.replaced].count("transformer") == 2
    check_same(
        decoder,
        lambda m, x, memory: m(x, memory, tgt_mask=causal, tgt_is_causal=True, tgt_key_padding_mask=padding),
        [x, memory],
    )


def test_the_article_s_transformer() -> None:
    """nn.Transformer as a whole, in evaluation with its fast path and nested tensors, and in training."""
    torch.manual_seed(0)
    model = nn.Transformer(32, 4, 2, 2, 48, dropout=0.0, batch_first=True)
    shaken(model)
    patched = copy.deepcopy(model)
    report = fastgpt.patch(patched, strict=True)
    assert {e.module for e in report.replaced} == {
        "TransformerEncoderLayer", "TransformerDecoderLayer", "MultiheadAttention", "LayerNorm",
    }  # fmt: skip
    src, tgt = torch.randn(3, 7, 32), torch.randn(3, 5, 32)
    padding = torch.zeros(3, 7, dtype=torch.bool)
    padding[0, 4:] = True
    causal = nn.Transformer.generate_square_subsequent_mask(5)
    for training in (True, False):
        for m in (model, patched):
            m.train(training)
        with torch.set_grad_enabled(training):
            for options in ({}, {"src_key_padding_mask": padding, "memory_key_padding_mask": padding}):
                expected = model(src, tgt, tgt_mask=causal, **options)
                got = patched(src, tgt, tgt_mask=causal, **options)
                torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_dropout_of_a_transformer_layer_is_there() -> None:
    layer = shaken(nn.TransformerEncoderLayer(32, 4, 48, dropout=0.5, activation="gelu", batch_first=True))
    fastgpt.patch(layer, strict=True)
    x = torch.randn(2, 6, 32)
    assert not torch.equal(layer(x), layer(x))
    assert torch.equal(layer.eval()(x), layer(x))


# --- compile, autocast, checkpointing, modes ---


def test_compiles_whole_and_exports() -> None:
    model, x = shaken(Model()).eval(), torch.randn(4, 16)
    expected = model(x)
    fastgpt.patch(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected)
    compiled(x).sum().backward()
    exported = torch.export.export(model, (x,))
    torch.testing.assert_close(exported.module()(x), expected)


def test_autocast_checkpointing_and_inference_mode() -> None:
    model, x = shaken(Model()).eval(), torch.randn(4, 16)
    patched = copy.deepcopy(model)
    fastgpt.patch(patched)
    with torch.autocast("cpu", torch.bfloat16):
        expected, got = model(x), patched(x)
    assert got.dtype == expected.dtype
    torch.testing.assert_close(got, expected, rtol=2e-2, atol=2e-2)
    with torch.inference_mode():
        torch.testing.assert_close(patched(x), model(x))
    leaf = x.clone().requires_grad_()
    torch.utils.checkpoint.checkpoint(patched, leaf, use_reentrant=False).sum().backward()
    again = x.clone().requires_grad_()
    patched(again).sum().backward()
    torch.testing.assert_close(leaf.grad, again.grad)


def test_a_forward_of_an_instance_is_left_and_called() -> None:
    """As accelerate's hooks put it there."""
    model, x = shaken(Model()).eval(), torch.randn(4, 16)
    norm, first = model.norm, model.mlp[0]  # type: ignore[index]
    norm.forward = lambda x: 3 * F.layer_norm(x, (16,))  # type: ignore[method-assign, assignment]
    expected = model(x)
    report = fastgpt.patch(model)
    assert {e.name: e.why for e in report.left} == {"norm": "its forward was exchanged for another"}
    torch.testing.assert_close(model(x), expected)
    first.forward = lambda x: x @ torch.ones(16, 40)  # after patching, within a block
    got = model(x)
    fastgpt.unpatch(model)
    torch.testing.assert_close(got, model(x))


def test_hooks_on_all_modules_see_the_layers_of_a_block() -> None:
    model, x, seen = shaken(Model()).eval(), torch.randn(4, 16), list[nn.Module]()
    fastgpt.patch(model)
    handle = nn.modules.module.register_module_forward_hook(lambda m, i, o: seen.append(m))
    try:
        model(x)
    finally:
        handle.remove()
    assert set(seen) == set(model.modules())


def test_torch_func_and_forward_mode_go_to_pytorch() -> None:
    model, x = shaken(Model()).eval(), torch.randn(4, 16)
    parameters = dict(model.named_parameters())

    def loss(p: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, p, (x,))[:, 0].sum()

    expected = torch.func.grad(loss)(parameters)
    derivative = torch.func.jvp(model, (x,), (torch.ones_like(x),))[1]
    fastgpt.patch(model)
    got = torch.func.grad(loss)(parameters)
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(torch.func.jvp(model, (x,), (torch.ones_like(x),))[1], derivative)
    torch.testing.assert_close(torch.func.vmap(model)(x), model(x), rtol=1e-4, atol=1e-6)


def test_parametrized_layers() -> None:
    model, x = shaken(Model()).eval(), torch.randn(4, 16)
    nn.utils.parametrizations.weight_norm(model.mlp[0])  # type: ignore[index]
    nn.utils.parametrizations.spectral_norm(model.head)
    expected = model(x)
    fastgpt.patch(model)
    torch.testing.assert_close(model(x), expected)
    nn.utils.parametrizations.weight_norm(model.mlp[3])  # type: ignore[index]
    with torch.no_grad():
        model.mlp[3].parametrizations.weight.original0.mul_(2)  # type: ignore[index, union-attr]
    got = model(x)
    assert not torch.allclose(got, expected)
    fastgpt.unpatch(model)
    torch.testing.assert_close(got, model(x))


@pytest.mark.parametrize("kind", ["bool", "added"])
def test_a_query_that_sees_nothing(kind: str) -> None:
    module = shaken(nn.MultiheadAttention(32, 4, batch_first=True))
    patched, x = copy.deepcopy(module), torch.randn(2, 5, 32)
    fastgpt.patch(patched, strict=True)
    mask = torch.zeros(5, 5, dtype=torch.bool)
    mask[2] = True
    given = mask if kind == "bool" else torch.zeros(5, 5).masked_fill(mask, -torch.inf)
    expected, got = (m(x, x, x, need_weights=False, attn_mask=given)[0] for m in (module, patched))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5, equal_nan=True)


class Scaled(nn.GELU):
    def forward(self, input: Tensor) -> Tensor:
        return 3 * super().forward(input)


class Louder(nn.TransformerEncoderLayer):
    def _ff_block(self, x: Tensor) -> Tensor:
        return 3 * super()._ff_block(x)


class OnlyInEvaluation(Named2):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y if self.training else y.clamp(-0.1, 0.1)


class ByRank(Named2):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y if x.dim() == 2 else y + y.mean(1, keepdim=True)


class WithAttribute(Named2):
    scale = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.scale = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale


@pytest.mark.parametrize("block", [OnlyInEvaluation(), ByRank()], ids=lambda b: type(b).__name__)
def test_a_block_is_tried_out_in_both_modes_and_ranks(block: nn.Module) -> None:
    assert "mlp" not in {e.kind for e in fastgpt.patch(block).replaced}


def test_a_block_whose_attributes_change_runs_its_own_forward() -> None:
    block, x = shaken(WithAttribute()).eval(), torch.randn(4, 16)
    report = fastgpt.patch(block)
    assert "mlp" in {e.kind for e in report.replaced}
    expected = 2 * block(x)
    block.scale = 2.0  # type: ignore[assignment]
    torch.testing.assert_close(block(x), expected)


def test_a_gelu_that_overrides_is_none() -> None:
    layer = shaken(nn.TransformerEncoderLayer(32, 4, 48, 0.0, Scaled(), batch_first=True)).eval()
    block = shaken(nn.Sequential(nn.Linear(16, 40), Scaled(), nn.Linear(40, 16)))
    later = shaken(nn.Sequential(nn.Linear(16, 40), nn.GELU(), nn.Linear(40, 16)))
    for model, x in ((layer, torch.randn(2, 5, 32)), (block, torch.randn(3, 16))):
        expected = model(x)
        fastgpt.patch(model)
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    fastgpt.patch(later)
    later[1] = Scaled()  # type: ignore[operator]
    x = torch.randn(3, 16)
    got = later(x)
    fastgpt.unpatch(later)
    torch.testing.assert_close(got, later(x))


def test_a_layer_that_overrides_a_part_is_left() -> None:
    layer, x = shaken(Louder(32, 4, 48, 0.0, batch_first=True)), torch.randn(2, 5, 32)
    expected = layer(x)
    report = fastgpt.patch(layer)
    assert "a subclass with a forward of its own" in {e.why for e in report.left}
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)


def test_dropout_is_where_its_own_mode_says() -> None:
    """As in drawing several results from a model in evaluation, its dropouts in training."""
    layer = shaken(nn.TransformerEncoderLayer(32, 4, 48, 0.5, "gelu", batch_first=True))
    fastgpt.patch(layer, strict=True)
    layer.eval()
    layer.dropout.train()
    x = torch.randn(2, 5, 32).requires_grad_()
    assert not torch.equal(layer(x), layer(x))
    layer.dropout = nn.Identity()  # type: ignore[assignment]
    assert torch.equal(layer(x), layer(x))


def test_weights_of_other_classes_go_to_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    class Twice(Tensor):
        """Stands for a weight that keeps something else behind its memory."""

        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is F.linear:
                with torch._C.DisableTorchFunctionSubclass():
                    return 2 * func(*args, **(kwargs or {}))
            return super().__torch_function__(func, types, args, kwargs or {})

    monkeypatch.setattr(layers, "MUCH", 0)
    model, x = shaken(Model()).eval(), torch.randn(4, 16)
    for layer in (model.head, model.mlp[0]):  # type: ignore[index]
        layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Twice), requires_grad=False)
    expected = model(x)
    fastgpt.patch(model)
    torch.testing.assert_close(model(x), expected)


def test_a_number_has_a_gelu_too() -> None:
    module = nn.GELU()
    fastgpt.patch(module, strict=True)
    torch.testing.assert_close(module(torch.tensor(1.0)), F.gelu(torch.tensor(1.0)))
