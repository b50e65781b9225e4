"""JSONL: what is wrong with a line is told by file:line; a job leaves it out and goes on where it ended."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fastgpt.tasks.jsonl import BadLine, Fields, Job, read, scan, text_field

GOOD = '{"a": "x", "n": NaN}'


def parse(fields: Fields, where: str) -> str:
    return text_field(fields, "a", where).upper()


def write(path: Path, *lines: str) -> Path:
    path.write_bytes("".join(f"{line}\n" for line in lines).encode(errors="surrogateescape"))
    return path


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "expected JSON, got "),
        ("[" * 100_000, "expected JSON, got "),
        ("\udcff", "expected JSON, got "),
        ('"a"', "expected a JSON object, got str"),
        ("{}", 'expected an object with a "a" of text, got the fields none'),
        ('{"b": 1}', 'expected an object with a "a" of text, got the fields b'),
        ('{"a": ["x"]}', 'expected an object with a "a" of text, got list'),
        ('{"a": ""}', 'expected some text, got an empty "a"'),
        ('{"a": " \\n"}', 'expected some text, got an empty "a"'),
        ('{"a": "\\ud800"}', 'expected text in "a", got '),
    ],
)
def test_a_bad_line_is_told_by_its_number(tmp_path: Path, line: str, message: str) -> None:
    path = write(tmp_path / "in.jsonl", GOOD, "", line, GOOD, "[")
    with pytest.raises(ValueError, match=r"in\.jsonl") as raised:
        read(path, parse)
    assert str(raised.value).startswith(f"{path}:3: {message}")
    lines, bad = scan(path, parse)
    assert [(found.number, found.value) for found in lines] == [(1, "X"), (4, "X")]
    assert bad[0] == BadLine(3, str(raised.value))
    assert bad[1].number == 5


def test_a_file_without_lines_is_an_error(tmp_path: Path) -> None:
    for content in ([], ["", " "]):
        with pytest.raises(ValueError, match=r"in\.jsonl: expected a JSON object on each line, got none"):
            scan(write(tmp_path / "in.jsonl", *content), parse)
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "none.jsonl", parse)


def work(source: Path, target: Path, stop: int | None = None) -> Job:
    """A job whose result is the field "a" in capitals; after `stop` results somebody ends it."""
    job = Job(source, target, parse, ("made",))
    with job.writing(progress=False) as result:
        for count, (i, sample) in enumerate(job.wanted):
            if count == stop:
                raise KeyboardInterrupt
            result((i, sample), {"made": job.lines[i].value})
    return job


def results(path: Path) -> dict[int, Any]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({line["line"] for line in lines}) == len(lines)
    return {line["line"]: line.get("made", line.get("error")) for line in lines}


def test_a_job_goes_past_bad_lines_and_on_where_it_ended(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", '{"a": "x"}', "oops", GOOD, '{"a": "z"}')
    target = tmp_path / "out.jsonl"
    with pytest.raises(KeyboardInterrupt, match=r"1 of 3 results written to .*out\.jsonl; the same command"):
        work(source, target, stop=1)
    assert results(target).keys() == {1, 2}
    with open(target, "a") as file:
        file.write('{"line": 3, "ma')  # a write that a kill cut short
    job = work(source, target)
    assert [job.lines[i].number for i, _ in job.wanted] == [3, 4]
    assert {number: text[:1] for number, text in results(target).items()} == {
        1: "X",
        2: str(tmp_path)[0],
        3: "X",
        4: "Z",
    }
    assert job.report() == f"bad lines, left out: 1; the first: {results(target)[2]}"
    assert results(target)[2].startswith(f"{source}:2: expected JSON")
    assert {key[0] for key in job.made} == {1, 3, 4}  # those of the first run, too

    write(source, '{"a": "x"}', '{"a": "better"}', GOOD, '{"a": "z"}')
    job = work(source, target)
    assert job.report() == ""
    assert results(target) == {1: "X", 2: "BETTER", 3: "X", 4: "Z"}
    assert work(source, target).wanted == []

    write(source, '{"a": "other"}')
    before = target.read_bytes()
    with pytest.raises(ValueError, match=r"out\.jsonl:1: expected a result of .*in\.jsonl, or no such file"):
        work(source, target)
    assert target.read_bytes() == before


def test_a_job_takes_no_field_that_its_results_have_and_never_writes_over_its_lines(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", '{"a": "x", "made": "by hand"}', '{"a": "x", "line": 7}', GOOD)
    job = work(source, tmp_path / "out.jsonl")
    assert [bad.error.partition("in.jsonl")[2] for bad in job.bad] == [
        ":1: expected no field called made, which the result has",
        ":2: expected no field called line, which the result has",
    ]
    with pytest.raises(ValueError, match="expected another file than that of the lines"):
        Job(source, source, parse, ("made",))
