"""The command line: `fastgpt train | generate | demo | check | doctor`.

A user's mistake is one line on stderr and exit code 2. FASTGPT_TRACEBACK=1 shows where it was raised.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

EXTRAS = ("matplotlib", "safetensors", "tokenizers", "tqdm", "tyro")  # what fastgpt[all] brings for this file


def train(
    text: tuple[Path, ...] = (),
    out: Path = Path("fastgpt-model"),
    tokenizer: Literal["bpe", "bytes"] = "bpe",
    vocab_size: int = 1024,
    seq_length: int = 128,
    embedding_dim: int = 256,
    num_heads: int = 4,
    num_layers: int = 4,
    positions: Literal["learned", "sinusoidal"] = "learned",
    dropout: float = 0.0,
    steps: int = 500,
    batch_size: int = 16,
    accumulate: int = 1,
    lr: float = 1e-3,
    warmup: int = 50,
    weight_decay: float = 0.1,
    clip: float = 1.0,
    bf16: bool = False,
    held_out: float = 0.1,
    log_every: int = 10,
    eval_every: int = 100,
    seed: int = 0,
    device: str = "auto",
    backend: str | None = None,
) -> int:
    """Train a GPT on text files.

    Args:
        text: UTF-8 text files; without any, Python's language reference (pydoc_data.topics).
        out: Directory for the model, its tokenizer, the loss log and the loss plot.
        tokenizer: Byte-level BPE trained on the text, or plain bytes.
        vocab_size: Tokens of the BPE.
        seq_length: Tokens a sequence.
        embedding_dim: Width of the model.
        num_heads: Attention heads a layer.
        num_layers: Transformer blocks.
        positions: Learned positions, or the sinusoidal encoding.
        dropout: Probability, on the embeddings and on every branch.
        steps: Updates of the weights.
        batch_size: Sequences a batch.
        accumulate: Batches a step.
        lr: Peak learning rate (AdamW); a tenth of it at the end.
        warmup: Steps of linear warm-up.
        weight_decay: On matrices only.
        clip: Largest gradient norm.
        bf16: Compute in bfloat16 by autocast.
        held_out: Fraction of the text, its tail, that is not trained on.
        log_every: Steps between records of the loss.
        eval_every: Steps between measurements of the held-out loss; a checkpoint is saved at each.
        seed: Of the initial weights and of the order of the text.
        device: cpu, cuda, or auto.
        backend: Kernels to use instead of the automatic choice; several (cpu,torch) are tried in that order.
    """
    import torch

    from fastgpt.models.gpt import GPT, GPTConfig
    from fastgpt.train import checkpoint, data, loop, plot

    config = loop.TrainConfig(
        steps=steps, batch_size=batch_size, accumulate=accumulate, lr=lr, min_lr=lr / 10, warmup=warmup,
        weight_decay=weight_decay, clip=clip, bf16=bf16, seed=seed, log_every=log_every, eval_every=eval_every,
    )  # fmt: skip
    where, backends = _device(device), _backends(backend)
    checkpoint.check_can_save(out)
    corpus = data.make_corpus(
        data.read_text(text),
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        seq_length=seq_length,
        held_out=held_out,
    )
    torch.manual_seed(seed)
    model = GPT(
        GPTConfig(
            corpus.tokenizer.vocab_size, embedding_dim, num_heads, num_layers, seq_length,
            positions=positions, dropout=dropout, backend=backends,
        )
    )  # fmt: skip
    parameters = sum(p.numel() for p in model.parameters())
    print(
        f"{parameters:,} parameters, {corpus.tokenizer.vocab_size} tokens in the vocabulary; text:"
        f" {len(corpus.train):,} tokens to learn, {len(corpus.held_out):,} held out"
        f" (unigram entropy {corpus.unigram_entropy:.3f} nats/token); on {where}"
    )
    files = [str(path) for path in text] or ["pydoc_data.topics"]
    records: list[loop.Record] = []

    def on_record(record: loop.Record) -> None:
        records.append(record)
        if "held_out" not in record:
            return
        evaluated = [r for r in records if "held_out" in r]
        curves: list[plot.Curve] = [
            ("training", [r["step"] for r in records], [r["loss"] for r in records], "-"),
            ("held out", [r["step"] for r in evaluated], [r["held_out"] for r in evaluated], "o-"),
        ]
        image = plot.loss_plot(curves, "training loss", ("unigram entropy", corpus.unigram_entropy))
        training = {
            "text": files,
            "seq_length": seq_length,
            "unigram_entropy": corpus.unigram_entropy,
            **vars(config),
        }
        checkpoint.save(str(out), model, corpus.tokenizer, training, records, image)

    loop.train(model, corpus, seq_length, config, device=where, on_record=on_record)
    last = records[-1]
    print(f"loss {last['loss']:.4f}, held out {last['held_out']:.4f} nats/token; saved in {out}")
    print(f'next: fastgpt generate --model {out} --prompt "The "')
    return 0


def generate(
    model: Path,
    prompt: str,
    max_new_tokens: int = 200,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    device: str = "auto",
    backend: str | None = None,
) -> int:
    """Continue a text with a trained model, printed as it is made.

    Args:
        model: Directory that `fastgpt train` wrote.
        prompt: The text to continue.
        max_new_tokens: Tokens to add.
        temperature: 0 takes the likeliest token each time; higher is more varied.
        top_k: Draw from the k likeliest tokens only.
        top_p: Draw from the likeliest tokens that make up this probability together.
        seed: The same seed gives the same text.
        device: cpu, cuda, or auto.
        backend: Kernels to use instead of the automatic choice; several (cpu,torch) are tried in that order.
    """
    import torch

    from fastgpt.generate import stream
    from fastgpt.train import checkpoint

    where = _device(device)
    gpt, tokenizer = checkpoint.load(str(model), backend=_backends(backend))
    gpt.to(where)
    ids = tokenizer.encode(prompt)
    if not ids:
        raise ValueError("prompt: expected some text, got an empty prompt")
    steps = stream(
        gpt, torch.tensor([ids], device=where), max_new_tokens=max_new_tokens, temperature=temperature,
        top_k=top_k, top_p=top_p, seed=seed,
    )  # fmt: skip
    shown = 0
    for token in steps:
        if shown == 0:
            print(prompt, end="", flush=True)
            shown = len(tokenizer.decode(ids))
        ids.append(int(token))
        text = tokenizer.decode(ids)
        if not text.endswith("\ufffd"):  # a character of several bytes is still under way
            print(text[shown:], end="", flush=True)
            shown = len(text)
    print("" if shown else prompt)
    return 0


def demo(out: Path = Path("demo-out"), steps: int = 300, minutes: float = 5.0, seed: int = 0) -> int:
    """Train one small GPT three ways (reference, stock PyTorch, fused) and compare losses and speed.

    Args:
        out: Directory for the plot, the results and the trained model.
        steps: Training steps of each of the three.
        minutes: Time for the whole; on a slow machine training stops early.
        seed: Of the initial weights and of the order of the text.
    """
    from fastgpt.demo import run_demo

    return run_demo(out, steps, minutes, seed)


def check(
    op: str | None = None,
    backend: str | None = None,
    dtype: str | None = None,
    implementation: str | None = None,
    case: str | None = None,
    device: str = "cpu",
) -> int:
    """Prove the kernels against the exact reference; exit code 1 if one misses its error bound.

    Args:
        op: Only this op.
        backend: Only this backend.
        dtype: Only this dtype: fp32, bf16 or fp16.
        implementation: Check your own function instead, as module:function (needs --op).
        case: Only this case, as the lines that repeat a failure name it.
        device: cpu, cuda or auto.
    """
    from fastgpt.testing.cli import run_check

    return run_check(op, backend, dtype, implementation, case, _device(device))


def doctor(table: bool = False) -> int:
    """Show the machine, what is built, and which backend runs which op.

    Args:
        table: Print only the README's table of ops and backends, the same on every machine.
    """
    from fastgpt._core.doctor import report, support_table

    print(support_table() if table else report())
    return 0


COMMANDS = {f.__name__: f for f in (train, generate, demo, check, doctor)}


def main(args: Sequence[str] | None = None) -> int:
    try:
        import tyro

        import fastgpt
        from fastgpt._core.dispatch import check_environment

        check_environment()
        fastgpt.keep_large_blocks()
        return tyro.extras.subcommand_cli_from_dict(
            COMMANDS, prog="fastgpt", description="GPT models on fused kernels.", args=args
        )
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except (
        BrokenPipeError
    ):  # the reader of our output has gone (`| head`): nothing to say, and nobody to say it to
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        message = user_error(error)
        if message is None or os.environ.get("FASTGPT_TRACEBACK") == "1":
            raise
        print(f"fastgpt: error: {message}", file=sys.stderr)
        return 2


def user_error(error: Exception) -> str | None:
    """The line to show when the error is about what the user gave; None when it is a defect of ours."""
    if isinstance(error, ImportError):
        name = (error.name or "").partition(".")[0]
        return f"{name} is not installed; it comes with: pip install fastgpt[all]" if name in EXTRAS else None
    if isinstance(error, OSError):
        return (
            f"{error.filename}: {error.strerror}" if error.filename and error.strerror else _one_line(error)
        )
    import torch

    from fastgpt._core.dispatch import BackendError

    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error):
        return (
            f"not enough memory: {_one_line(error).partition('DefaultCPUAllocator: ')[2] or _one_line(error)}"
        )
    if isinstance(error, (BackendError, ValueError, TypeError, NotImplementedError, FloatingPointError)):
        return _one_line(error)
    return None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _backends(names: str | None) -> list[str] | None:
    """The names in --backend; ValueError unless each is a backend."""
    from fastgpt._core.dispatch import check_backend

    return None if names is None else list(check_backend([name.strip() for name in names.split(",")]))


def _device(name: str) -> str:
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.partition(":")[0] not in ("cpu", "cuda"):
        raise ValueError(f"device: expected cpu, cuda or auto, got {name!r}")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device: expected a GPU for {name!r}, but PyTorch finds none here")
    return name


if __name__ == "__main__":
    sys.exit(main())
