"""The GPT trains through the GPU kernels without a GPU: Triton interpreted, the CUDA sources compiled for the CPU."""

from __future__ import annotations

import pytest
import torch
from op_cases import recorded

from fastgpt import GPT, GPTConfig
from fastgpt.train import loop

pytestmark = pytest.mark.interpreter

STEPS = 4
CONFIG = {"vocab_size": 31, "embedding_dim": 32, "num_heads": 2, "num_layers": 1, "max_seq_length": 12}
# A backend may have no kernel for an op: then the next one runs it, and the test says which ran.
PATHS = {"triton": ("triton",), "cuda": ("cuda", "torch")}


def losses(backend: str | tuple[str, ...], bf16: bool = False) -> list[float]:
    """Of a few training steps on one batch, the same for every backend."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**CONFIG, pad_idx=0, backend=backend))  # type: ignore[arg-type]
    config = loop.TrainConfig(steps=STEPS, batch_size=2, lr=1e-2, warmup=1, bf16=bf16)
    optimizer = loop.make_optimizer(model, config)
    tokens = torch.randint(1, 31, (2, 13), generator=torch.Generator().manual_seed(1))
    tokens[0, :4] = 0  # padding
    batch = [(tokens[:, :-1], tokens[:, 1:])]
    return [loop.train_step(model, optimizer, batch, n, config)[0] for n in range(STEPS)]


@pytest.mark.parametrize("path", PATHS)
def test_trains_to_the_references_losses(path: str) -> None:
    expected = losses("reference")
    with recorded() as calls:
        got = losses(PATHS[path])
    ran = {name for name, _ in calls}
    ops = ("layer_norm",) if path == "cuda" else ("layer_norm", "linear", "mlp", "attention")
    assert {f"{op}_{entry}_{path}" for op in ops for entry in ("fwd", "bwd")} <= ran
    assert expected[0] - expected[-1] > 0.5  # it learns
    assert got == pytest.approx(expected, abs=2e-5)


def test_trains_in_bf16_through_triton() -> None:
    """Under autocast; two honest bf16 runs differ by bf16's rounding, which grows from step to step."""
    assert losses("triton", bf16=True) == pytest.approx(losses("torch", bf16=True), abs=0.02)
