"""Images and sounds from files: brought to what the models take, with a note; what is no image or sound is told."""

import warnings
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
import soundfile
import torch
from PIL import Image

from fastgpt.models.audio import RATE, AudioConfig
from fastgpt.models.vision import VisionConfig
from fastgpt.tasks import media

VISION = VisionConfig(image_size=8, patch_size=2, channels=3, embedding_dim=8, num_heads=1, num_layers=1)
GRAY = replace(VISION, channels=1)
AUDIO = AudioConfig(embedding_dim=8, num_heads=1, num_layers=1, max_seconds=2.0)


def saved(path: Path, pixels: numpy.ndarray, mode: str | None = None) -> Path:
    Image.fromarray(pixels.astype("uint8"), mode).save(path)
    return path


def test_pixels_come_in_place_from_minus_one_to_one(tmp_path: Path) -> None:
    pixels = numpy.arange(8 * 8 * 3).reshape(8, 8, 3) % 256
    got = media.image(saved(tmp_path / "a.png", pixels), VISION)
    assert got.shape == (3, 8, 8)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, torch.tensor(pixels).permute(2, 0, 1).float() / 127.5 - 1)


def test_other_sizes_are_resampled_with_a_note(tmp_path: Path) -> None:
    path = saved(tmp_path / "one.png", numpy.full((1, 1), 255))
    with pytest.warns(media.MediaNote, match=r"one.png: 1x1 resampled to 8x8"):
        assert torch.equal(media.image(path, GRAY), torch.ones(1, 8, 8))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        media.image(saved(tmp_path / "fits.png", numpy.zeros((8, 8))), GRAY)


def test_transparent_pixels_are_black_and_colours_are_converted(tmp_path: Path) -> None:
    pixels = numpy.zeros((8, 8, 4))
    pixels[..., :3], pixels[:4, :, 3] = 255, 255
    got = media.image(saved(tmp_path / "t.png", pixels), GRAY)
    assert torch.equal(got[0, :4], torch.ones(4, 8))
    assert torch.equal(got[0, 4:], -torch.ones(4, 8))
    assert media.image(saved(tmp_path / "g.png", numpy.zeros((8, 8))), VISION).shape == (3, 8, 8)


def test_sixteen_bits_are_scaled_and_wider_ones_refused(tmp_path: Path) -> None:
    ramp = numpy.arange(0, 65536, 1024).reshape(8, 8)
    Image.fromarray(ramp.astype("uint16")).save(tmp_path / "ramp.tiff")
    with pytest.warns(media.MediaNote, match=r"ramp.tiff: 16 bits a pixel brought to 8"):
        got = media.image(tmp_path / "ramp.tiff", GRAY)
    torch.testing.assert_close(got[0], torch.from_numpy(ramp // 256).float() / 127.5 - 1)
    for dtype in ("float32", "int32"):
        Image.fromarray(ramp.astype(dtype)).save(tmp_path / "wide.tiff")
        with pytest.raises(ValueError, match=r"wide.tiff: expected a whole image file, got 32 bits a pixel"):
            media.image(tmp_path / "wide.tiff", GRAY)


def test_a_picture_is_upright_and_a_caller_s_own_stays_open(tmp_path: Path) -> None:
    picture = Image.fromarray(numpy.repeat([[255], [0]], 4, axis=0).repeat(8, axis=1).astype("uint8"))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    picture.save(tmp_path / "turned.png", exif=exif)
    got = media.image(tmp_path / "turned.png", GRAY)[0]
    assert torch.equal(got, torch.tensor([-1.0, 1.0]).repeat_interleave(4).expand(8, 8))
    with Image.open(tmp_path / "turned.png") as opened:
        assert torch.equal(media.image(opened, GRAY)[0], got)
        opened.seek(0)


def test_vast_and_damaged_images_are_told_by_their_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved(tmp_path / "vast.png", numpy.zeros((100, 100)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ValueError, match=r"vast.png: expected a whole image file, got Image size"):
        media.image(path, GRAY)
    (tmp_path / "bad.ppm").write_bytes(b"P6 x")
    with pytest.raises(ValueError, match=r"bad.ppm: expected"):
        media.image(tmp_path / "bad.ppm", GRAY)


@pytest.mark.parametrize(("rate", "message"), [(10, "10"), (100_000_007, "100000007")])
def test_no_memory_is_taken_for_a_rate_that_cannot_be(rate: int, message: str, tmp_path: Path) -> None:
    soundfile.write(tmp_path / "s.wav", numpy.zeros(20), rate)
    with pytest.raises(ValueError, match=rf"s.wav: expected 1000 to 768000 samples a second, got {message}$"):
        media.sound(tmp_path / "s.wav", AUDIO)


def test_a_sound_that_is_cut_short_is_none(tmp_path: Path) -> None:
    path = tmp_path / "cut.wav"
    soundfile.write(path, numpy.zeros(RATE), RATE)
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(ValueError, match=r"cut.wav: expected a whole sound file, got one that is cut short"):
        media.sound(path, AUDIO)


def test_the_longest_sound_fits_at_another_rate(tmp_path: Path) -> None:
    config = replace(AUDIO, max_seconds=0.99999)
    soundfile.write(tmp_path / "s.wav", numpy.zeros(22049), 22050)
    with pytest.warns(media.MediaNote):
        assert len(media.sound(tmp_path / "s.wav", config)) == config.max_samples


def test_notes_of_a_job_are_counted_by_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    soundfile.write(tmp_path / "s.wav", numpy.zeros((500, 2)), 44100)
    with media.notes_in_one():
        media.sound(tmp_path / "s.wav", AUDIO)
    assert "note: 1 files were brought" in capsys.readouterr().err


def test_stereo_at_another_rate_becomes_the_same_tone(tmp_path: Path) -> None:
    t = numpy.arange(44100) / 44100
    tone = numpy.sin(2 * numpy.pi * 440 * t)
    soundfile.write(tmp_path / "s.wav", numpy.stack([tone, tone * 0.5], 1), 44100, subtype="FLOAT")
    with pytest.warns(media.MediaNote) as notes:
        got = media.sound(tmp_path / "s.wav", AUDIO)
    said = [str(note.message).partition(": ")[2] for note in notes]
    assert said == ["2 channels averaged", "44100 Hz resampled to 16000 Hz"]
    expected = 0.75 * torch.sin(torch.arange(RATE) * (2 * torch.pi * 440 / RATE))
    assert got.shape == (RATE,)
    torch.testing.assert_close(got[200:-200], expected[200:-200], atol=2e-3, rtol=0)


def test_silence_is_a_sound(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "s.wav", numpy.zeros(1000), RATE)
    assert torch.equal(media.sound(tmp_path / "s.wav", AUDIO), torch.zeros(1000))


def test_padded_says_how_long_each_is() -> None:
    waves, lengths = media.padded([torch.ones(3), torch.ones(5)])
    assert waves.tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert lengths.tolist() == [3, 5]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("x.png", b"no image", "x.png: expected an image file, got something else"),
        ("cut.png", None, "cut.png: expected a whole image file, got"),
        ("x.wav", b"no sound", "x.wav: expected a sound file, got"),
        ("none.wav", 0, "none.wav: expected a sound, got no samples"),
        ("long.wav", 2 * RATE + 1, "long.wav: expected a sound of up to 2.0 seconds, got 2.00006"),
        ("nan.wav", numpy.nan, "nan.wav: expected finite samples, got NaN or infinity"),
    ],
)
def test_what_is_none_is_told_by_its_name(name: str, data: object, message: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if isinstance(data, bytes):
        path.write_bytes(data)
    elif name == "cut.png":
        saved(path, numpy.random.default_rng(0).integers(0, 256, (8, 8, 3)))
        path.write_bytes(path.read_bytes()[:120])
    elif isinstance(data, int):
        soundfile.write(path, numpy.zeros(data), RATE)
    else:
        soundfile.write(path, numpy.full(100, data), RATE, subtype="FLOAT")
    with pytest.raises(ValueError) as told:
        media.image(path, VISION) if path.suffix == ".png" else media.sound(path, AUDIO)
    assert message in str(told.value)


def test_what_is_not_there_is_the_system_s_error(tmp_path: Path) -> None:
    for read, config in ((media.image, VISION), (media.sound, AUDIO)):
        with pytest.raises(FileNotFoundError):
            read(tmp_path / "none", config)
