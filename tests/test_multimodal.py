"""Images and sounds among the tokens of a GPT: in order, whatever the batch; learned in parts; kept; generated."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from fastgpt.decoding import Decoder, Features
from fastgpt.models.audio import AudioConfig, AudioEncoder
from fastgpt.models.gpt import GPT, GPTConfig
from fastgpt.models.multimodal import MultimodalGPT
from fastgpt.models.vision import VisionConfig, VisionEncoder
from fastgpt.tasks.multimodal import IMAGE, SOUND, Sample, answers, batch_of, prompt_ids
from fastgpt.train.loop import TrainConfig, fit
from fastgpt.train.tokenizer import BPETokenizer

TOKENIZER = BPETokenizer.train("is it so? yes no\n" * 3, 260, (IMAGE, SOUND))
IMAGE_ID, SOUND_ID = (TOKENIZER.special_id(word) for word in (IMAGE, SOUND))
VISION = VisionConfig(image_size=6, patch_size=3, channels=1, embedding_dim=12, num_heads=2, num_layers=1)
AUDIO = AudioConfig(mels=12, pool=5, max_seconds=1.0, embedding_dim=8, num_heads=2, num_layers=1)


def make(positions: str = "learned", **options: object) -> MultimodalGPT:
    torch.manual_seed(0)
    text = GPT(GPTConfig(TOKENIZER.vocab_size, 16, 2, 2, 48, positions=positions, **options))  # type: ignore[arg-type]
    with torch.no_grad():
        for p in text.parameters():  # so that what differs shows
            p.add_(torch.randn(p.shape) * 0.1)
    parts = {"vision": VisionEncoder(VISION), "audio": AudioEncoder(AUDIO)}
    return MultimodalGPT(text, **parts, image_token=IMAGE_ID, sound_token=SOUND_ID).eval()


def image() -> torch.Tensor:
    return torch.randn(1, 6, 6)


def sample(*inputs: torch.Tensor, answer: str = " yes\n") -> Sample:
    """A prompt in which the inputs come in the order given."""
    words = "".join(f"{IMAGE if x.dim() == 3 else SOUND} so " for x in inputs)
    return Sample(
        f"is it {words}?", answer, [x for x in inputs if x.dim() == 3], [x for x in inputs if x.dim() == 1]
    )


def mixed() -> list[Sample]:
    torch.manual_seed(1)
    return [
        sample(image(), torch.randn(2000)), sample(), sample(torch.randn(900), image(), image(), torch.randn(4000)),
        sample(image()), sample(torch.randn(5000), answer=" no\n"),
    ]  # fmt: skip


@pytest.mark.parametrize("positions", ["learned", "sinusoidal"])
def test_features_take_the_places_of_their_tokens_in_order(positions: str) -> None:
    model = make(positions)
    samples = mixed()
    tokens, _, images, sounds, lengths = batch_of(model, TOKENIZER, samples)
    logits = model(tokens, None, images, sounds, lengths)
    for row, one in enumerate(samples):
        ids = torch.tensor(prompt_ids(model, TOKENIZER, one))
        seen = iter([model.image_projector(model.vision(x[None]))[0] for x in one.images])
        heard = iter([model.sound_projector(model.audio(x[None]))[0] for x in one.sounds])
        x, at = model.text.wte.weight[ids].clone(), 0
        x = x * 4 if positions == "sinusoidal" else x
        while at < len(ids):
            if int(ids[at]) in (IMAGE_ID, SOUND_ID):
                features = next(seen if int(ids[at]) == IMAGE_ID else heard)
                x[at : at + len(features)] = features
                at += len(features)
            else:
                at += 1
        assert next(seen, None) is None
        assert next(heard, None) is None
        table = model.text.wpe.weight if positions == "learned" else model.text.positions.encoding
        alone = model.text.head(model.text.hidden((x + table[: len(ids)])[None], ids[None]), None)[0]
        torch.testing.assert_close(logits[row, : len(ids)], alone, atol=2e-4, rtol=2e-4)


def test_another_image_changes_what_follows_it_and_nothing_before() -> None:
    model, one = make(), sample(torch.randn(900), image())
    tokens, _, images, sounds, lengths = batch_of(model, TOKENIZER, [one])
    first = model(tokens, None, images, sounds, lengths)[0]
    second = model(tokens, None, images + 1, sounds, lengths)[0]
    at = int((tokens[0] == IMAGE_ID).nonzero()[0])
    assert torch.equal(first[:at], second[:at])
    assert bool((first[at:] != second[at:]).any(-1).all())


def test_only_the_answer_is_learned() -> None:
    model = make()
    tokens, targets, *inputs = batch_of(model, TOKENIZER, mixed())
    logits = model(tokens, None, *inputs)
    counted = targets != -100
    assert counted.sum(1).tolist() == [len(TOKENIZER.encode(s.answer)) for s in mixed()]
    expected = F.cross_entropy(logits[counted], targets[counted])
    torch.testing.assert_close(model(tokens, targets, *inputs), expected)


def test_gradients_reach_every_part_of_what_is_there() -> None:
    model = make()
    tokens, targets, *inputs = batch_of(model, TOKENIZER, mixed())
    model(tokens, targets, *inputs).backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None or not bool(p.grad.any())]
    assert not missing, missing


def test_parts_learn_at_rates_of_their_own_and_0_freezes() -> None:
    model = make()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    batch = batch_of(model, TOKENIZER, mixed())
    rates = {"vision": 0.0, "text": 0.0, "audio": 1e-4}
    modes = list[tuple[bool, bool]]()
    model.vision.register_forward_hook(lambda *_: modes.append((model.vision.training, model.audio.training)))
    fit(
        model,
        iter([batch] * 3),
        TrainConfig(steps=3, warmup=0, weight_decay=0),
        dict,
        rates=rates,
        progress=False,
    )
    assert modes == [(False, True)] * 3
    moved: dict[str, float] = {}
    for name, p in model.named_parameters():
        part = name.partition(".")[0]
        moved[part] = max(moved.get(part, 0), float((p.detach() - before[name]).abs().max()))
        assert p.requires_grad
    assert moved["vision"] == moved["text"] == 0
    assert 0 < moved["audio"] <= 3.1e-4 < moved["image_projector"]  # Adam's steps are about the rate
    with pytest.raises(
        ValueError, match="rates: expected rates >= 0 for text, vision, audio, image_projector"
    ):
        fit(model, iter([batch]), TrainConfig(steps=1), dict, rates={"eyes": 0.0}, progress=False)


def test_files_bring_the_whole_and_each_part_back(tmp_path: Path) -> None:
    model = make()
    model.save_pretrained(tmp_path)
    back = MultimodalGPT.from_pretrained(tmp_path)
    tokens, targets, *inputs = batch_of(model, TOKENIZER, mixed())
    assert torch.equal(model(tokens, targets, *inputs), back(tokens, targets, *inputs))
    x = torch.randn(1, 1, 6, 6)
    assert torch.equal(VisionEncoder.from_pretrained(tmp_path / "vision")(x), model.vision(x))
    assert torch.equal(GPT.from_pretrained(tmp_path / "text")(tokens), model.text(tokens))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"config.json: expected the configuration of a fastgpt-multimodal"):
        MultimodalGPT.from_pretrained(tmp_path)


def test_a_model_of_text_alone_comes_back(tmp_path: Path) -> None:
    text = make().text
    MultimodalGPT(text).save_pretrained(tmp_path)
    tokens = torch.arange(8)[None]
    assert torch.equal(MultimodalGPT.from_pretrained(tmp_path)(tokens), text(tokens))


@pytest.mark.parametrize("positions", ["learned", "sinusoidal"])
def test_features_are_about_as_large_as_embeddings(positions: str) -> None:
    text = GPT(GPTConfig(300, 64, 2, 1, 48, positions=positions))
    model = MultimodalGPT(text, vision=VisionEncoder(VISION), image_token=1)
    features, _ = model.features(torch.ones(1, 4, dtype=torch.int64), image()[None], None, None)
    assert features is not None
    scale = 8.0 if positions == "sinusoidal" else 1.0
    assert 0.3 < float(features.detach().std() / (text.wte.weight.detach().std() * scale)) < 2


def test_a_model_of_one_modality_has_no_part_for_the_other(tmp_path: Path) -> None:
    whole = make()
    model = MultimodalGPT(whole.text, audio=whole.audio, sound_token=SOUND_ID).eval()
    model.save_pretrained(tmp_path)
    back = MultimodalGPT.from_pretrained(tmp_path)
    assert back.vision is None
    assert back.image_projector is None
    tokens, targets, *inputs = batch_of(model, TOKENIZER, [sample(torch.randn(900))])
    assert torch.equal(model(tokens, targets, *inputs), back(tokens, targets, *inputs))
    with pytest.raises(ValueError, match="images: expected none, the model has no encoder"):
        model(tokens, None, torch.zeros(1, 1, 6, 6), *inputs[1:])


def test_kept_keys_and_values_give_what_the_whole_gives() -> None:
    model, samples = make(), mixed()
    expected = []
    for one in samples:
        ids = prompt_ids(model, TOKENIZER, one)
        _, _, *inputs = batch_of(model, TOKENIZER, [one])
        made = list[int]()
        with torch.no_grad():
            for _ in range(6):
                made.append(int(model(torch.tensor([ids + made]), None, *inputs)[0, -1].argmax()))
        expected.append(TOKENIZER.decode(made).partition("\n")[0].strip())
    assert answers(model, TOKENIZER, samples, batch=2, max_new_tokens=6) == expected
    assert len(set(expected)) > 1


def test_the_decoder_takes_features_only_where_they_fit() -> None:
    decoder, tokens = Decoder(make().text, weights="fp32"), torch.tensor([1, 2, 3])
    for places, values, message in (
        ([0, 3], torch.zeros(2, 16), r"features: expected places of 0 to 2, got \[0, 3\]"),
        ([0], torch.zeros(1, 15), r"features: expected shape \(1, 16\), got \(1, 15\)"),
    ):
        with pytest.raises(ValueError, match=message):
            decoder.append(0, tokens, Features(torch.tensor(places), values))
    decoder.append(0, tokens)
    with pytest.raises(ValueError, match="features: expected them in an empty sequence, got 3 tokens"):
        decoder.append(0, tokens, Features(torch.tensor([0]), torch.zeros(1, 16)))


def test_padding_tokens_stay_hidden() -> None:
    model, one = make(pad_idx=0), sample(image())
    tokens, _, images, _, _ = batch_of(model, TOKENIZER, [one])
    longer = F.pad(tokens, (0, 3))
    torch.testing.assert_close(model(longer, None, images)[:, : tokens.shape[1]], model(tokens, None, images))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: (b[0], None, b[2][:1], b[3], b[4]), r"images: expected 16 features, as many as tokens \d+, got 4"),
        (lambda b: (b[0], None, None, b[3], b[4]), r"images: expected 16 features, as many as tokens \d+, got 0"),
        (lambda b: (b[0], None, b[2], b[3], b[4] // 4), r"sounds: expected \d+ features, as many as tokens \d+, got"),
        (lambda b: (torch.ones_like(b[0]), None, *b[2:]), r"images: expected 0 features, as many as tokens"),
    ],
)  # fmt: skip
def test_a_mismatch_of_tokens_and_features_is_told(change, message: str) -> None:
    model = make()
    with pytest.raises(ValueError, match=message):
        model(*change(batch_of(model, TOKENIZER, mixed())))


def test_a_prompt_that_says_other_inputs_is_told() -> None:
    model = make()
    with pytest.raises(
        ValueError, match=r"sample 0: expected as many inputs as <\|image\|> in the text, 1, got 2"
    ):
        answers(model, TOKENIZER, [Sample(IMAGE, images=[image(), image()])])
    with pytest.raises(ValueError, match="sample 1: expected some text, got an empty prompt"):
        answers(model, TOKENIZER, [Sample("so"), Sample("")])
    with pytest.raises(ValueError, match="sample 0: expected text after the last image or sound, got none"):
        answers(model, TOKENIZER, [Sample(f"so {IMAGE}", images=[image()])])
    with pytest.raises(ValueError, match="sample 1: answer: expected some text"):
        batch_of(model, TOKENIZER, [Sample("so", "yes"), Sample("so")])
    with pytest.raises(ValueError, match="samples: expected at least one, got none"):
        batch_of(model, TOKENIZER, [])
    first = MultimodalGPT(model.text, vision=model.vision, image_token=0)
    with pytest.raises(ValueError, match="expected a model of which no image_token or sound_token is 0"):
        prompt_ids(first, TOKENIZER, Sample("so"))


def test_parts_and_tokens_belong_together() -> None:
    model = make()
    with pytest.raises(
        ValueError, match="image_token: expected one exactly where there is an encoder, got None"
    ):
        MultimodalGPT(model.text, vision=model.vision)
    with pytest.raises(ValueError, match="sound_token: expected another than the image_token"):
        MultimodalGPT(model.text, vision=model.vision, audio=model.audio, image_token=1, sound_token=1)
    padded = GPT(GPTConfig(TOKENIZER.vocab_size, 16, 2, 2, 48, pad_idx=IMAGE_ID))
    with pytest.raises(ValueError, match="image_token: expected another than pad_idx"):
        MultimodalGPT(padded, vision=model.vision, image_token=IMAGE_ID)
    with pytest.raises(ValueError, match="image_token: expected an id in"):
        MultimodalGPT(model.text, vision=model.vision, image_token=10**6)
