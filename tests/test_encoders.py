"""The encoders of images and sounds: what they compute, what has no influence, training alone, files, bad input."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import soundfile
import torch
import torch.nn.functional as F
from PIL import Image

from fastgpt import cli
from fastgpt.models.audio import HOP, RATE, WINDOW, AudioConfig, AudioEncoder, mel_filters
from fastgpt.models.vision import VisionConfig, VisionEncoder
from fastgpt.tasks import encoders
from fastgpt.tasks.encoders import Labelled
from fastgpt.train.loop import TrainConfig, make_optimizer, train_step

LABELS = ("low", "high")
VISION = VisionConfig(
    image_size=12, patch_size=3, channels=3, embedding_dim=16, num_heads=2, num_layers=2, labels=LABELS
)
AUDIO = AudioConfig(
    mels=20, pool=4, max_seconds=1.0, embedding_dim=16, num_heads=2, num_layers=2, labels=LABELS
)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def tone(pitch: float, samples: int = 4000) -> torch.Tensor:
    return torch.sin(torch.arange(samples) * (2 * math.pi * pitch / RATE))


# --- images ---


def test_patch_embedding_is_a_strided_convolution() -> None:
    encoder, images = VisionEncoder(VISION), torch.randn(2, 3, 12, 12)
    kernel = encoder.patches.weight.view(16, 3, 3, 3)
    expected = F.conv2d(images, kernel, encoder.patches.bias, stride=3).flatten(2).transpose(1, 2)
    seen = []
    encoder.blocks = lambda x, mask=None: seen.append(x) or x
    encoder(images)
    torch.testing.assert_close(seen[0], expected + encoder.positions)


def test_features_are_those_of_plain_bidirectional_blocks() -> None:
    encoder, images = VisionEncoder(VISION).double(), torch.randn(2, 3, 12, 12, dtype=torch.float64)
    cut = images.unfold(2, 3, 3).unfold(3, 3, 3).permute(0, 2, 3, 1, 4, 5).reshape(2, 16, 27)
    x = F.linear(cut, encoder.patches.weight, encoder.patches.bias) + encoder.positions
    for block in encoder.h:
        q, k, v = (
            part.unflatten(-1, (2, 8)).transpose(1, 2)
            for part in block.attn.c_attn(F.layer_norm(x, (16,), block.ln_1.weight, block.ln_1.bias)).chunk(
                3, -1
            )
        )
        p = torch.softmax(q @ k.mT / math.sqrt(8), dim=-1)
        x = x + block.attn.c_proj((p @ v).transpose(1, 2).flatten(2))
        y = F.layer_norm(x, (16,), block.ln_2.weight, block.ln_2.bias)
        x = x + block.mlp.c_proj(F.gelu(block.mlp.c_fc(y), approximate="tanh"))
    expected = F.layer_norm(x, (16,), encoder.ln_f.weight, encoder.ln_f.bias)
    torch.testing.assert_close(encoder(images), expected)
    logits = F.linear(expected.mean(1), encoder.head.weight, encoder.head.bias)
    torch.testing.assert_close(encoder.classify(images), logits)
    labels = torch.tensor([1, 0])
    torch.testing.assert_close(encoder(images, labels), F.cross_entropy(logits, labels), check_dtype=False)


def test_no_images_have_no_features() -> None:
    assert VisionEncoder(VISION)(torch.zeros(0, 3, 12, 12)).shape == (0, VISION.positions, 16)


def test_every_patch_sees_every_other() -> None:
    encoder, images = VisionEncoder(VISION), torch.randn(1, 3, 12, 12)
    changed = images.clone()
    changed[..., -1, -1] += 1
    difference = (encoder(images) - encoder(changed)).abs().amax(-1)
    assert bool((difference > 0).all())


def test_class_token_stands_for_the_whole() -> None:
    config = replace(VISION, pool="class")
    encoder, images = VisionEncoder(config), torch.randn(2, 3, 12, 12)
    whole, features, _ = encoder.encode(images)
    assert features.shape == (2, config.positions, 16)
    assert whole.shape == (2, 16)
    encoder(images, torch.tensor([0, 1])).backward()
    assert encoder.class_token.grad is not None
    assert bool(encoder.class_token.grad.abs().sum() > 0)


# --- sounds ---


def test_mel_filters_are_triangles_over_all_frequencies() -> None:
    filters = mel_filters(20)
    assert filters.shape == (WINDOW // 2 + 1, 20)
    assert bool((filters >= 0).all())
    assert bool((filters.amax(0) > 0.5).all())
    peaks = filters.argmax(0)
    assert bool((peaks.diff() > 0).all())
    # Between the first and the last peak two neighbours share each frequency.
    torch.testing.assert_close(
        filters[peaks[0] : peaks[-1]].sum(1).max(), torch.tensor(1.0), atol=1e-5, rtol=0
    )


def test_a_tone_is_loud_in_its_band_alone() -> None:
    encoder = AudioEncoder(AUDIO)
    frames, there = encoder.log_mel(tone(1000.0)[None], None)
    band = mel_filters(20)[round(1000 / RATE * WINDOW)].argmax()
    middle = frames[0, 5:-5]
    assert bool((middle.argmax(-1) == band).all())
    assert float(middle.amax()) > 0.95
    assert bool(there.all())
    assert frames.shape == (1, math.ceil(4000 / HOP), 20)


def test_loudness_does_not_count() -> None:
    encoder, wave = AudioEncoder(AUDIO), tone(440.0)[None] + 0.1 * torch.randn(1, 4000)
    torch.testing.assert_close(encoder(wave), encoder(wave * 0.05), atol=1e-4, rtol=1e-4)


def test_huge_samples_and_nan_behind_a_sound_leave_no_trace() -> None:
    encoder, wave = AudioEncoder(AUDIO).eval(), tone(440.0)[None] + 0.1 * torch.randn(1, 4000)
    torch.testing.assert_close(encoder(wave * 1e30), encoder(wave), atol=1e-4, rtol=1e-4)
    behind = torch.nn.functional.pad(wave, (0, 100), value=torch.nan)
    assert torch.equal(encoder(behind, torch.tensor([4000]))[:, : AUDIO.positions(4000)], encoder(wave))


def test_the_spectrum_is_fp32_under_autocast() -> None:
    encoder, wave, seen = AudioEncoder(AUDIO), torch.randn(1, 4000), []
    encoder.log_mel = lambda *args: seen.append(AudioEncoder.log_mel(encoder, *args)) or seen[-1]  # type: ignore[method-assign, func-returns-value]
    encoder(wave)
    with torch.autocast("cpu", torch.bfloat16):
        encoder(wave)
    assert torch.equal(seen[0][0], seen[1][0])


def test_convolutions_are_torch_s() -> None:
    encoder, x = AudioEncoder(AUDIO), torch.randn(2, 9, 20)
    for stride, layer, inputs in ((1, encoder.conv_1, x), (2, encoder.conv_2, torch.randn(2, 9, 16))):
        kernel = layer.weight.unflatten(1, (3, -1)).transpose(1, 2)
        expected = F.gelu(F.conv1d(inputs.mT, kernel, layer.bias, stride, padding=1)).mT
        torch.testing.assert_close(encoder._convolve(layer, inputs, stride), expected)


@pytest.mark.parametrize("samples", [1, 159, 160, 161, 1279, 1280, 3999, 16000])
def test_as_many_positions_as_said_and_alone_as_beside_longer_ones(samples: int) -> None:
    encoder = AudioEncoder(AUDIO).eval()
    wave, other = torch.randn(samples), torch.randn(16000)
    alone = encoder(wave[None])[0]
    assert alone.shape == (AUDIO.positions(samples), 16)
    both, lengths = torch.full((2, 16000), 7.0), torch.tensor([samples, 16000])  # what is behind is no zero
    both[0, :samples], both[1] = wave, other
    _, features, there = encoder.encode(both, lengths)
    assert there.sum(1).tolist() == [AUDIO.positions(samples), AUDIO.positions(16000)]
    torch.testing.assert_close(features[0, : len(alone)], alone, atol=2e-5, rtol=1e-4)
    assert not bool(features[0, len(alone) :].any())
    whole = encoder.classify(both, lengths)[0]
    torch.testing.assert_close(whole, encoder.classify(wave[None])[0], atol=2e-5, rtol=1e-4)


def test_silence_is_finite() -> None:
    encoder = AudioEncoder(AUDIO)
    loss = encoder(torch.zeros(1, 4000), None, torch.tensor([1]))
    loss.backward()
    assert math.isfinite(loss.item())
    assert all(bool(p.grad.isfinite().all()) for p in encoder.parameters() if p.grad is not None)


# --- both ---


@pytest.mark.parametrize(
    "config", [VISION, replace(VISION, pool="class"), AUDIO], ids=["mean", "class", "audio"]
)
def test_files_bring_the_same_encoder_back(config: VisionConfig | AudioConfig, tmp_path: Path) -> None:
    encoder = encoders.make(config, 1).eval()
    encoder.save_pretrained(tmp_path)
    back = type(encoder).from_pretrained(tmp_path)
    assert back.config == config
    assert not back.training
    x = torch.randn(1, 3, 12, 12) if isinstance(config, VisionConfig) else torch.randn(1, 5000)
    assert torch.equal(encoder(x), back(x))
    other = AudioEncoder if isinstance(config, VisionConfig) else VisionEncoder
    with pytest.raises(ValueError, match=r"config.json: expected the model_type fastgpt-(audio|vision), got"):
        other.from_pretrained(tmp_path)


@pytest.mark.parametrize("config", [VISION, AUDIO], ids=["vision", "audio"])
def test_every_backend_learns_the_same(config: VisionConfig | AudioConfig) -> None:
    """As stock PyTorch: the `torch` backend runs its own ops."""
    if isinstance(config, VisionConfig):
        work = [(torch.randn(4, 3, 12, 12), torch.tensor([0, 1, 1, 0]))]
    else:
        work = [(torch.randn(4, 3000), torch.tensor([3000, 2000, 900, 1]), torch.tensor([0, 1, 1, 0]))]
    losses = {}
    for backend in (None, "torch"):
        encoder = encoders.make(replace(config, backend=backend), 0)
        training = TrainConfig(steps=5, warmup=0, lr=3e-3)
        optimizer = make_optimizer(encoder, training)
        losses[backend] = [train_step(encoder, optimizer, work, n, training)[0] for n in range(5)]
    assert losses[None] == pytest.approx(losses["torch"], abs=1e-4)
    assert losses[None][-1] < losses[None][0]


def test_tones_are_learned_and_a_split_leaves_none_out() -> None:
    pitches = torch.rand(60) * 300
    waves = [tone(300 + p + 900 * (i % 2), 2000 + 50 * (i % 7)) for i, p in enumerate(pitches.tolist())]
    data, held_out = Labelled(waves, torch.arange(60) % 2).split(0.3, seed=0)
    assert len(data.labels) == 42
    assert len(held_out.labels) == 18
    records = encoders.train(
        encoders.make(AUDIO, 0),
        data,
        held_out,
        TrainConfig(steps=30, batch_size=14, warmup=3),
        progress=False,
    )
    assert records[-1]["accuracy"] == 1.0
    assert "sounds_per_s" in records[-1]


def see(images: object, labels: tuple[str, ...] = LABELS) -> torch.Tensor:
    return VisionEncoder(replace(VISION, labels=labels)).classify(images)


def hear(sounds: torch.Tensor, lengths: list[int] | None = None) -> torch.Tensor:
    return AudioEncoder(AUDIO)(sounds, None if lengths is None else torch.tensor(lengths))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: see(torch.zeros(1, 3, 12, 9)), "images: expected shape [any, 3, 12, 12], got (1, 3, 12, 9)"),
        (lambda: see(torch.zeros(1, 3, 12, 12).byte()), "images: expected a floating dtype, got torch.uint8"),
        (lambda: see([1]), "images: expected a tensor, got list"),
        (lambda: AudioEncoder(AUDIO)([1]), "sounds: expected a tensor, got list"),
        (lambda: hear(torch.zeros(0, 9)), "sounds: expected at least one, got none"),
        (lambda: hear(torch.zeros(1, 0)), "sounds: expected 1 to 16000 samples, got 0"),
        (lambda: hear(torch.zeros(1, 16001)), "sounds: expected 1 to 16000 samples, got 16001"),
        (lambda: hear(torch.zeros(2, 9), [9, 10]), "lengths: expected 1 to 9 samples, got [9, 10]"),
        (lambda: hear(torch.zeros(2, 9), [9]), "lengths: expected int64 of shape (2,), got torch.int64 (1,)"),
        (lambda: see(torch.zeros(1, 3, 12, 12), labels=()), "labels: expected an encoder that has some"),
        (lambda: replace(VISION, patch_size=5), "patch_size: expected a divisor of image_size=12, got 5"),
        (lambda: replace(VISION, pool="max"), "pool: expected one of mean, class, got 'max'"),
        (lambda: replace(VISION, num_heads=3), "num_heads: expected a divisor of embedding_dim=16, got 3"),
        (lambda: replace(VISION, labels=("a", "a")), "labels: expected different names"),
        (lambda: replace(AUDIO, pool=0), "pool: expected an integer >= 1, got 0"),
        (lambda: replace(AUDIO, max_seconds=0), "max_seconds: expected a number in (0, 3600], got 0"),
    ],
)  # fmt: skip
def test_bad_input_is_told(call, message: str) -> None:
    with pytest.raises((ValueError, TypeError)) as told:
        call()
    assert message in str(told.value)


# --- by the command line, on a user's own files ---


def files_of(directory: Path, kind: str) -> list[dict[str, str]]:
    """Dark and bright images, or low and high tones, with the lines that name them."""
    lines = []
    for i in range(24):
        label, name = LABELS[i % 2], f"{i}.{'png' if kind == 'image' else 'wav'}"
        if kind == "image":
            pixels = torch.randint(0, 100, (12, 12, 3)) + 150 * (i % 2)
            Image.fromarray(pixels.numpy().astype("uint8")).save(directory / name)
        else:
            soundfile.write(directory / name, tone(300 + 20 * i + 2000 * (i % 2)).numpy(), RATE)
        lines.append({kind: name, "label": label})
    return lines


@pytest.mark.parametrize("kind", ["image", "sound"])
def test_commands_learn_a_users_own_and_go_on_past_bad_lines(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = files_of(tmp_path, kind)
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    sizes = [
        "--embedding-dim=16",
        "--num-heads=2",
        "--num-layers=1",
        "--steps=30",
        "--batch-size=12",
        "--lr=1e-2",
    ]
    own = ["--image-size", "16"] if kind == "image" else ["--max-seconds", "1"]
    command = ["train", "vision" if kind == "image" else "audio", "--data", str(tmp_path / "train.jsonl")]
    assert cli.main([*command, "--out", str(tmp_path / "m"), *sizes, *own]) == 0
    told = capsys.readouterr()
    assert "held-out accuracy 1.0000" in told.out
    if kind == "image":
        assert "note: 24 files were brought to what the model takes; the first: " in told.err
        assert "0.png: 12x12 resampled to 16x16" in told.err
    (tmp_path / "broken").write_bytes(b"no file of any kind")
    asked = [
        lines[0],
        {kind: "none"},
        {kind: "broken"},
        {"text": "?"},
        {**lines[1], "label": "odd"},
        lines[3],
    ]
    data = "".join(json.dumps(line) + "\n" for line in asked) + "no JSON\n"
    (tmp_path / "data.jsonl").write_text(data)
    where = [
        "--model",
        str(tmp_path / "m"),
        "--data",
        str(tmp_path / "data.jsonl"),
        "--out",
        str(tmp_path / "out"),
    ]
    assert cli.main(["classify", *where, "--batch", "0"]) == 2
    assert "batch: expected an integer >= 1, got 0" in capsys.readouterr().err
    assert cli.main(["classify", *where]) == 0
    told = capsys.readouterr()
    assert "of 2 lines: accuracy 1, macro F1 1" in told.out
    assert "bad lines, left out: 4" in told.err
    assert "labels that the model does not know, not scored: 1 (odd)" in told.err
    found = {line["line"]: line for line in map(json.loads, (tmp_path / "out").read_text().splitlines())}
    assert [found[n].get("prediction") for n in range(1, 8)] == [
        "low",
        None,
        None,
        None,
        "high",
        "high",
        None,
    ]
    assert "data.jsonl:2: " in found[2]["error"]
    assert "none: No such file or directory" in found[2]["error"]
    assert "broken: expected an" in found[3]["error"].replace("a sound", "an")
    assert f'data.jsonl:4: expected an object with a "{kind}" of text' in found[4]["error"]


def test_one_label_is_nothing_to_learn(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('{"image": "a.png", "label": "x"}\n' * 2)
    with pytest.raises(ValueError, match=r"t.jsonl: expected at least two labels, got x$"):
        encoders.labels_of(tmp_path / "t.jsonl")


def test_training_names_a_bad_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "t.jsonl").write_text('{"image": "a.png", "label": "x"}\n{"image": "a.png"}\n')
    assert (
        cli.main(["train", "vision", "--data", str(tmp_path / "t.jsonl"), "--out", str(tmp_path / "m")]) == 2
    )
    assert 't.jsonl:2: expected an object with a "label" of text' in capsys.readouterr().err


def test_without_espeak_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert cli.main(["train", "audio", "--out", str(tmp_path / "m")]) == 2
    assert "espeak-ng is not installed: apt install espeak-ng" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["vision", "--device", "tpu"], "device: expected cpu, cuda or auto, got 'tpu'"),
        (["vision", "--image-size", "16"], "data: expected it with sizes of images, got none"),
        (
            ["audio", "--held-out", "0.1"],
            "held_out: expected it with data, got none: whole voices are held out",
        ),
    ],
    ids=["device", "image-size", "held-out"],
)
def test_an_option_that_can_not_be_followed_is_an_error(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["train", *options, "--out", str(tmp_path / "m")]) == 2
    assert message in capsys.readouterr().err


def test_two_words_are_one_command() -> None:
    assert cli.one_name(["train", "vision", "--steps", "3"]) == ["train-vision", "--steps", "3"]
    assert cli.one_name(["train", "text", "--steps", "3"]) == ["train", "--steps", "3"]
    assert cli.one_name(["train", "--steps", "3"]) == ["train", "--steps", "3"]
    assert cli.one_name(["demo", "multimodal"]) == ["demo-multimodal"]
    assert cli.one_name(["doctor"]) == ["doctor"]
