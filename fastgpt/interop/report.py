"""What `patch` did: a line for each module of a kind that it knows, replaced or left, with the reason."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Entry:
    """One module.

    name: where it is in the model; with "=" between them, where it is shared.
    kind: one of `KINDS`.
    module: its own class.
    by: what runs instead; None where it was left.
    why: the reason why it was left.
    """

    name: str
    kind: str
    module: str
    by: str | None = None
    why: str | None = None


@dataclass
class PatchReport:
    entries: list[Entry] = field(default_factory=list)

    @property
    def replaced(self) -> list[Entry]:
        return [entry for entry in self.entries if entry.by is not None]

    @property
    def left(self) -> list[Entry]:
        return [entry for entry in self.entries if entry.by is None]

    def to_dict(self) -> dict[str, Any]:
        return {"replaced": [asdict(e) for e in self.replaced], "left": [asdict(e) for e in self.left]}

    def __str__(self) -> str:
        """Modules of one kind, class and fate on one line."""
        groups = Counter((e.kind, e.module, e.by, e.why) for e in self.entries)
        first = {(e.kind, e.module, e.by, e.why): e.name for e in reversed(self.entries)}
        lines = [("kind", "module", "number", "first", "now", "why")]
        for key, number in groups.items():
            kind, module, by, why = key
            lines.append(
                (kind, module, str(number), first[key] or "(the model)", by or "as it was", why or "")
            )
        widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
        table = ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines]
        return "\n".join([f"{len(self.replaced)} modules replaced, {len(self.left)} left", *table])
