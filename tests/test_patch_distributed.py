"""Patched models under DistributedDataParallel and fully_shard: losses and gradients of the unpatched ones.

All of two processes is run once, by a fixture; the tests look at what it brought.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import fastgpt

pytest.importorskip("transformers")

LAYERS = {"gpt2": "h", "llama": "layers"}  # with its head tied to the embedding, and not
Result = dict[str, Tensor]


def built(family: str) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    if family == "gpt2":
        sizes = {"vocab_size": 61, "n_positions": 16, "n_embd": 32, "n_layer": 2, "n_head": 2}
        return GPT2LMHeadModel(GPT2Config(**sizes, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0))
    sizes = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 16}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, tie_word_embeddings=False))


def sharded(model: Any, head: bool = False, reshard: bool | None = None) -> nn.Module:
    for block in getattr(model.base_model, LAYERS[model.config.model_type]):
        fully_shard(block)
    if head:
        fully_shard(model.lm_head)
    return fully_shard(model, reshard_after_forward=reshard)


def trained(model: Any, loss_of: Callable[[Any, Tensor], tuple[Tensor, Tensor]]) -> Result:
    """Losses and logits of two steps of this process's data, and the gradients of the second."""
    tokens = torch.randint(61, (2, 3, 16), generator=torch.Generator().manual_seed(1 + dist.get_rank()))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    found: Result = {}
    for step, batch in enumerate(tokens):
        optimizer.zero_grad()
        loss, logits = loss_of(model, batch)
        loss.backward()
        found |= {f"loss{step}": loss.detach(), f"logits{step}": logits.detach().clone()}
        if step == 0:
            optimizer.step()
    for name, p in model.named_parameters():
        grad = p.grad
        found[name.removeprefix("module.")] = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
    return found


def inside(model: Any, batch: Tensor) -> tuple[Tensor, Tensor]:
    """The loss that the model computes."""
    out = model(batch, labels=batch)
    return out.loss, out.logits


def outside(model: Any, batch: Tensor) -> tuple[Tensor, Tensor]:
    """One of the caller's own, of the model's logits."""
    logits = model(batch).logits
    return F.cross_entropy(logits.view(-1, 61), batch.roll(-1, -1).view(-1)), logits


LOSSES = {"inside": inside, "outside": outside}
DATA_PARALLEL = [(f, loss, unused) for f in LAYERS for loss in LOSSES for unused in (False, True)]
SHARDED = [
    *((f, loss, when, {}) for f in LAYERS for loss in LOSSES for when in ("before", "after")),
    ("llama", "inside", "before", {"head": True}),
    ("llama", "outside", "after", {"head": True}),
    ("gpt2", "outside", "before", {"reshard": True}),
]


def data_parallel(patched: bool, family: str, loss: str, unused: bool) -> Result:
    model = built(family)
    if patched:
        report = fastgpt.patch(model)
        assert "cross_entropy" in [entry.kind for entry in report.replaced]
    return trained(DistributedDataParallel(model, find_unused_parameters=unused), LOSSES[loss])


def fully_sharded(patched: bool, family: str, loss: str, when: str, how: dict[str, Any]) -> Result:
    model = built(family)
    if patched and when == "before":
        fastgpt.patch(model)
    model = sharded(model, **how)
    if patched and when == "after":
        fastgpt.patch(model)
    return trained(model, LOSSES[loss])


def difference(run: Callable[..., Result], case: tuple[Any, ...]) -> str:
    """Empty, or what the patched model gives that the other does not."""
    try:
        expected, got = run(False, *case), run(True, *case)
        for name in expected:
            torch.testing.assert_close(
                got[name], expected[name], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
            )
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "" if expected.keys() == got.keys() else f"{got.keys()} for {expected.keys()}"


def everything() -> dict[str, str]:
    found = {name(case): difference(data_parallel, case) for case in DATA_PARALLEL}
    return found | {name(case): difference(fully_sharded, case) for case in SHARDED}


def name(case: tuple[Any, ...]) -> str:
    return "-".join(map(str, case))


def _process(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    where = f"file://{folder}/group"
    dist.init_process_group("gloo", where, timedelta(seconds=60), rank=rank, world_size=world)
    torch.save(everything(), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=[1, 2], ids=["one", "two"])
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """Of each process what every case came to; this one is the first."""
    folder, world = str(tmp_path_factory.mktemp("group")), request.param
    other = mp.spawn(_second, (world, folder), world - 1, join=False) if world > 1 else None
    _process(0, world, folder)
    if other is not None:
        other.join()
    return [torch.load(Path(folder) / f"{rank}.pt") for rank in range(world)]


def _second(index: int, world: int, folder: str) -> None:
    _process(1 + index, world, folder)


@pytest.mark.parametrize("case", DATA_PARALLEL, ids=name)
def test_data_parallel(found: list[dict[str, str]], case: tuple[Any, ...]) -> None:
    assert [of[name(case)] for of in found] == [""] * len(found)


@pytest.mark.parametrize("case", SHARDED, ids=name)
def test_fully_sharded(found: list[dict[str, str]], case: tuple[Any, ...]) -> None:
    assert [of[name(case)] for of in found] == [""] * len(found)
