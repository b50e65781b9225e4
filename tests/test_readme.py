"""What the README shows is true: its Python runs, its support table is the current one, its paths exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from fastgpt._core.doctor import support_table

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_python_blocks_run(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In order, in one namespace, as someone would paste them."""
    monkeypatch.chdir(tmp_path)  # what they write
    assert len(BLOCKS) >= 3
    names: dict[str, object] = {
        "vocab_size": 100, "embedding_dim": 32, "num_heads": 2, "num_layers": 1, "max_seq_length": 16, "pad_idx": 0
    }  # fmt: skip
    for block in BLOCKS[:-1]:
        exec(compile(block, "README.md", "exec"), names)
    names["tokens"] = torch.randint(1, 100, (2, 16))
    exec(compile(BLOCKS[-1], "README.md", "exec"), names)
    assert "chosen" in capsys.readouterr().out


def test_support_table_is_current() -> None:
    assert support_table() in README, f"put this into the README:\n{support_table()}"


def test_articles_model_raises_as_said() -> None:
    model = torch.nn.Transformer(8, 2, 1, 1, 16)
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'tgt'"):
        model(torch.zeros(3, 1, 8))


@pytest.mark.parametrize(
    "path", sorted(set(re.findall(r"`((?:fastgpt|csrc|tests|benchmarks)/[\w/.]+)`", README)))
)
def test_named_files_exist(path: str) -> None:
    assert (ROOT / path).exists()
