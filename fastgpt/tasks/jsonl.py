"""JSONL files, one JSON object a line: read, and worked through from one file into another.

What is wrong with a line is told by `file:line`. Training data must be right (`read`); a job leaves a bad line out,
and says so in its results (`Job`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastgpt.models.checkpoint import atomic_files, parse_object

Fields = dict[str, Any]
Parse = Callable[
    [Fields, str], Any
]  # of a line's object and its file:line; ValueError, naming that, for a bad one


@dataclass(frozen=True)
class Line:
    """A line: its number from 1, its object, and what a task has made of that."""

    number: int
    fields: Fields
    value: Any


@dataclass(frozen=True)
class BadLine:
    number: int
    error: str  # with file:line


def read(path: Path, parse: Parse) -> list[Line]:
    """Every line that is not empty; ValueError by the first that is bad."""
    lines, bad = scan(path, parse)
    if bad:
        raise ValueError(bad[0].error)
    return lines


def scan(path: Path, parse: Parse) -> tuple[list[Line], list[BadLine]]:
    """The lines that can be used, and those that cannot; ValueError if there is none at all."""
    lines, bad = list[Line](), list[BadLine]()
    with open(path, "rb") as file:
        for number, where, data in _numbered(path, file):
            try:
                fields = parse_object(data, where)
                lines.append(Line(number, fields, parse(fields, where)))
            except ValueError as error:
                bad.append(BadLine(number, str(error)))
    if not lines and not bad:
        raise ValueError(f"{path}: expected a JSON object on each line, got none")
    return lines, bad


def text_field(fields: Fields, name: str, where: str, *, blank: bool = False) -> str:
    """The text in a field; ValueError by the place unless there is some (but white space, with `blank`)."""
    value = fields.get(name)
    if not isinstance(value, str):
        got = type(value).__name__ if name in fields else f"the fields {', '.join(fields) or 'none'}"
        raise ValueError(f'{where}: expected an object with a "{name}" of text, got {got}')
    if not (value if blank else value.strip()):
        raise ValueError(f'{where}: expected some text, got an empty "{name}"')
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can hold half a surrogate pair
        raise ValueError(f'{where}: expected text in "{name}", got {error}') from None
    return value


class Job:
    """What is to be made of the lines of `source`, and goes into `target`, line by line, as it is done.

    A result is the object of its line with "line" (its number) and `results` added. A bad line has
    `{"line": n, "error": "..."}`. A job that was cut short goes on where it ended: what `target` has already stays.

    Raises:
        OSError, ValueError: naming the file and the line, before anything is written.
    """

    def __init__(
        self, source: Path, target: Path, parse: Parse, results: Sequence[str], samples: int = 1
    ) -> None:
        if target.exists() and os.path.samefile(source, target):
            raise ValueError(f"{target}: expected another file than that of the lines")
        taken = ("line", "error", *results)

        def checked(fields: Fields, where: str) -> Any:
            value = parse(fields, where)
            for name in taken:
                if name in fields:
                    raise ValueError(f"{where}: expected no field called {name}, which the result has")
            return value

        self.source, self.target = source, target
        self.lines, self.bad = scan(source, checked)
        self.made = self._made()  # results by line number and sample
        self.wanted = [
            (i, j)
            for i, line in enumerate(self.lines)
            for j in range(samples)
            if (line.number, j) not in self.made
        ]

    def _made(self) -> dict[tuple[int, int], Fields]:
        """The results that `target` has already."""
        data = self.target.read_bytes() if self.target.exists() else b""
        whole = data[: data.rfind(b"\n") + 1]  # without a line that was cut short
        if data and not (whole or data).lstrip().startswith(b"{"):
            raise ValueError(
                f"{self.target}: expected results of {self.source}, or no such file, got another"
            )
        lines = {line.number: line.fields for line in self.lines}
        made = dict[tuple[int, int], Fields]()
        for _, where, text in _numbered(self.target, whole.splitlines(keepends=True)):
            result = parse_object(text, where)
            if set(result) == {"line", "error"}:  # told anew: the line may have been put right
                continue
            number: Any = result.get("line")
            sample: Any = result.get("sample", 0)
            asked = lines.get(number) if isinstance(number, int) and isinstance(sample, int) else None
            if asked is None or any(_key(result.get(name)) != _key(value) for name, value in asked.items()):
                raise ValueError(
                    f"{where}: expected a result of {self.source}, or no such file, got one of line {number}"
                )
            made[number, sample] = result
        return made

    @contextmanager
    def writing(self, progress: bool = True) -> Iterator[Callable[[tuple[int, int], Fields], None]]:
        """`write((index of the line, sample), result)` for each of `wanted`, which shows how far the job is."""
        from tqdm import tqdm

        begun = [*self.made.values(), *({"line": bad.number, "error": bad.error} for bad in self.bad)]
        with atomic_files(self.target.parent) as whole:
            whole(self.target.name, b"".join(map(_data, begun)))
        count = 0
        with open(self.target, "ab") as file, tqdm(total=len(self.wanted), disable=not progress) as bar:

            def write(key: tuple[int, int], result: Fields) -> None:
                nonlocal count
                line = self.lines[key[0]]
                made = self.made[line.number, key[1]] = {**line.fields, "line": line.number, **result}
                file.write(_data(made))
                file.flush()
                count += 1
                bar.update()

            try:
                yield write
            except KeyboardInterrupt:
                raise KeyboardInterrupt(
                    f"{count} of {len(self.wanted)} results written to {self.target}; the same command makes the rest"
                ) from None

    def report(self) -> str:
        """What was left out; empty when nothing was."""
        if not self.bad:
            return ""
        return f"bad lines, left out: {len(self.bad)}; the first: {self.bad[0].error}"


def _numbered(path: Path, lines: Iterable[bytes]) -> Iterator[tuple[int, str, bytes]]:
    return ((n, f"{path}:{n}", line) for n, line in enumerate(lines, 1) if line.strip())


def _key(value: Any) -> str:
    return json.dumps(value)  # equal also where NaN stands


def _data(fields: Fields) -> bytes:
    # What UTF-8 has no bytes for becomes JSON's own escape.
    return (json.dumps(fields, ensure_ascii=False) + "\n").encode(errors="backslashreplace")
