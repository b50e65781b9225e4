"""The command line: `fastgpt train | generate | translate | answer | classify | demo | check | doctor` and others.

A user's mistake is one line on stderr and exit code 2. FASTGPT_TRACEBACK=1 shows where it was raised.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from fastgpt.demos import commands as demos
from fastgpt.tasks import commands as tasks
from fastgpt.tasks import encoder_commands as encoders

if TYPE_CHECKING:
    from fastgpt.tasks.text import Timer

# What fastgpt[all] brings, by the name that is imported.
EXTRAS = (
    "babel", "matplotlib", "num2words", "numpy", "PIL", "sacrebleu", "safetensors", "scipy", "sklearn", "soundfile",
    "tokenizers", "tqdm", "tyro",
)  # fmt: skip


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
    where, backends = loop.device_named(device), _backends(backend)
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
    model: str,
    prompt: str | None = None,
    prompts: Path | None = None,
    out: Path | None = None,
    max_new_tokens: int | None = None,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    stop: tuple[str, ...] = (),
    samples: int = 1,
    weights: Literal["fp32", "bf16", "int8"] = "bf16",
    batch: int = 8,
    device: str = "auto",
    backend: str | None = None,
) -> int:
    """Continue a text with a model, printed as it is made, or a file of prompts.

    On a CPU by the decoder, which keeps keys and values. On another device, or with --backend, a prompt only, and the
    whole text goes through the model for each token.

    Args:
        model: Directory that `fastgpt train` or transformers wrote (GPT-2), or a name on the Hugging Face hub.
        prompt: The text to continue.
        prompts: A JSONL file instead: on each line an object with a "prompt". Bad lines are left out, and counted.
        out: Where its continuations go, as JSONL; a run that was cut short goes on where it ended.
        max_new_tokens: Tokens to add; without it 200, or as many as the context has room for.
        temperature: 0 takes the likeliest token each time; higher is more varied.
        top_k: Draw from the k likeliest tokens only.
        top_p: Draw from the likeliest tokens that make up this probability together.
        seed: The same seed gives the same text.
        stop: Texts that end a continuation; they are left out.
        samples: Continuations of each prompt of a file.
        weights: What the weights are kept in.
        batch: Continuations of a file that are made together.
        device: cpu, cuda, or auto.
        backend: Kernels to use instead of the decoder; several (cpu,torch) are tried in that order.
    """
    from fastgpt.generate import Engine, Sampling
    from fastgpt.tasks import text
    from fastgpt.train import checkpoint, loop

    if (prompt is None) == (prompts is None):
        raise ValueError(
            "prompt: expected either --prompt or --prompts, got " + ("both" if prompt else "none")
        )
    if (prompts is None) != (out is None):
        raise ValueError("out: expected it with --prompts, and only there")
    if prompt is not None and samples != 1:
        raise ValueError(f"samples: expected 1 with --prompt, got {samples}")
    where, backends = loop.device_named(device), _backends(backend)
    decoder = where == "cpu" and backends is None and not os.environ.get("FASTGPT_BACKEND")
    if prompts is not None and not decoder:
        raise ValueError("prompts: expected --device cpu, and no --backend or FASTGPT_BACKEND, with them")
    gpt, tokenizer = checkpoint.load(model, backend=backends)
    sampling = Sampling(max_new_tokens, temperature, top_k, top_p, seed, gpt.config.eos_idx)
    if not decoder:
        assert prompt is not None
        pieces = text.stream_uncached(gpt.to(where), tokenizer, prompt, sampling, stop)
        return _show(prompt, pieces, text.Timer(gpt))
    engine = Engine(gpt, weights=weights, batch=1 if prompts is None else batch)
    if prompts is not None and out is not None:
        written, speed, left_out = text.continue_file(
            engine, tokenizer, prompts, out, sampling, samples=samples, stop=stop
        )
        print(f"{written} texts written to {out}" + (f"; {speed}" if speed else ": all were there"))
        print(left_out, end="\n" if left_out else "", file=sys.stderr)
        return 0
    assert prompt is not None
    return _show(prompt, text.stream_text(engine, tokenizer, prompt, sampling, stop), text.Timer(engine))


def _show(prompt: str, pieces: Iterator[str], timer: Timer) -> int:
    first = next(pieces, "")  # what is wrong with the prompt is said before it is printed
    print(prompt, first, sep="", end="", flush=True)
    timer.restart()
    for piece in pieces:
        print(piece, end="", flush=True)
        timer.add()
    print()
    if timer.tokens:
        print(timer.speed(), file=sys.stderr)
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
    from fastgpt.train import loop

    return run_check(op, backend, dtype, implementation, case, loop.device_named(device))


def doctor(table: bool = False) -> int:
    """Show the machine, what is built, and which backend runs which op.

    Args:
        table: Print only the README's table of ops and backends, the same on every machine.
    """
    from fastgpt._core.doctor import report, support_table

    print(support_table() if table else report())
    return 0


COMMANDS = {
    f.__name__.replace("_", "-"): f
    for f in (
        train, encoders.train_vision, encoders.train_audio, generate, tasks.perplexity, tasks.quantize,
        tasks.translate, tasks.answer, tasks.classify, demo, demos.demo_multimodal, demos.demo_translate,
        demos.demo_answer, demos.demo_classify, check, doctor,
    )
}  # fmt: skip


def one_name(args: Sequence[str]) -> list[str]:
    """Two words that are one command's name as that: `train vision` is train-vision, `train text` train itself."""
    if args[:2] == ["train", "text"]:
        return ["train", *args[2:]]
    name = "-".join(args[:2])
    return [name, *args[2:]] if len(args) > 1 and name in COMMANDS else list(args)


def main(args: Sequence[str] | None = None) -> int:
    try:
        import tyro

        import fastgpt
        from fastgpt._core.dispatch import check_environment

        check_environment()
        fastgpt.keep_large_blocks()
        return tyro.extras.subcommand_cli_from_dict(
            COMMANDS, prog="fastgpt", description="GPT models on fused kernels.",
            args=one_name(sys.argv[1:] if args is None else list(args)), config=(tyro.conf.OmitArgPrefixes,),
        )  # fmt: skip
    except KeyboardInterrupt as stopped:
        print(f"\n{stopped}", file=sys.stderr)
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


if __name__ == "__main__":
    sys.exit(main())
