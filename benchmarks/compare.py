"""Two runs side by side: which differences are outside the noise."""

from __future__ import annotations

from benchmarks.report import duration
from benchmarks.results import Row, Run, beyond_noise

STAMPS = ("device", "cpu", "threads", "simd", "torch", "triton", "allocator", "commit", "dirty")


def compare(before: Run, after: Run) -> str:
    """A line per row that both runs have, the largest differences first; "noise" where p20 to p80 overlap."""
    lines = [
        f"{name}: {before.environment.get(name)} -> {after.environment.get(name)}"
        for name in STAMPS
        if before.environment.get(name) != after.environment.get(name)
    ]
    pairs = matching(before, after)
    real = [(a, b) for a, b in pairs if a.seconds and b.seconds and beyond_noise(a.seconds, b.seconds)]
    real.sort(key=lambda pair: abs(_change(*pair) - 1.0), reverse=True)
    lines.append(
        f"{len(pairs)} rows in both; {len(real)} differ beyond the noise (ranges p20 to p80 are apart)"
    )
    for a, b in real:
        assert a.seconds is not None
        assert b.seconds is not None
        change = _change(a, b)
        times = f"{duration(a.seconds.median)} -> {duration(b.seconds.median)}"
        backends = f" [{a.backend} -> {b.backend}]" if a.backend != b.backend else ""
        word = f"{1 / change:.2f} times as fast" if change < 1 else f"{change:.2f} times as slow"
        lines.append(f"  {' '.join(b.key)}: {times}, {word}{backends}")
    for name, ours, theirs in (("first", before, after), ("second", after, before)):
        other = {row.key for row in theirs.rows if row.seconds}
        alone = {row.key for row in ours.rows if row.seconds} - other
        if alone:
            lines.append(f"timed only in the {name}: {len(alone)} rows, such as {' '.join(sorted(alone)[0])}")
    return "\n".join(lines)


def matching(before: Run, after: Run) -> list[tuple[Row, Row]]:
    """The rows that were timed in both runs."""
    later = {row.key: row for row in after.rows if row.seconds}
    return [(row, later[row.key]) for row in before.rows if row.seconds and row.key in later]


def _change(before: Row, after: Row) -> float:
    assert before.seconds is not None
    assert after.seconds is not None
    return after.seconds.median / before.seconds.median
