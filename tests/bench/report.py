"""What a benchmark found: a table for people, ratios first, and JSON for programs.

`var/bench/<name>.json` is a list of rows {figure, value, unit, target, met, peers, how}, in the order of measuring.
`value` is null where the figure could not be measured and `how` then says why. `target` and `met` are null for figures
that nothing is asked of. `<name>.about.json` beside it says when, on what machine and with which versions.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

DIRECTORY = Path("var/bench")
RATIO = "×"


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What must be reached."""

    limit: float
    is_minimum: bool

    def is_met_by(self, value: float) -> bool:
        """Whether a measured value is good enough."""
        return value >= self.limit if self.is_minimum else value <= self.limit

    def __str__(self) -> str:
        return f"{'≥' if self.is_minimum else '≤'} {formatted(self.limit)}"


def at_least(limit: float) -> Target:
    """The more the better."""
    return Target(limit=limit, is_minimum=True)


def at_most(limit: float) -> Target:
    """The less the better."""
    return Target(limit=limit, is_minimum=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One row. `value` None: could not be measured, `how` says why. `peers`: what others reach, in the same unit."""

    figure: str
    value: float | None
    unit: str
    how: str
    target: Target | None = None
    peers: Mapping[str, float] = field(default_factory=dict)

    @property
    def met(self) -> bool | None:
        """Whether the target was reached; None without one."""
        if self.target is None:
            return None
        return self.value is not None and self.target.is_met_by(self.value)

    def to_json(self) -> dict[str, object]:
        """As in the file."""
        return {
            "figure": self.figure,
            "value": self.value,
            "unit": self.unit,
            "target": None if self.target is None else str(self.target),
            "met": self.met,
            "peers": dict(self.peers),
            "how": self.how,
        }


def write(name: str, figures: Sequence[Figure], about: Mapping[str, object]) -> Path:
    """Write both files; returns the path of the figures."""
    DIRECTORY.mkdir(parents=True, exist_ok=True)
    path = DIRECTORY / f"{name}.json"
    for file, content in ((path, [one.to_json() for one in figures]), (path.with_suffix(".about.json"), dict(about))):
        file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    return path


def show(figures: Sequence[Figure], about: Mapping[str, object], console: Console) -> None:
    """The table, how each figure was measured, and on what."""
    table = Table(title=str(about.get("title", "")), title_justify="left", pad_edge=False)
    table.add_column("figure")
    table.add_column("measured", justify="right")
    table.add_column("asked for", justify="right")
    table.add_column("unit")
    table.add_column("")
    table.add_column("peers, the same way")
    ordered = sorted(figures, key=lambda one: one.unit != RATIO)
    for one in ordered:
        table.add_row(
            escape(one.figure),
            "[red]none[/red]" if one.value is None else formatted(one.value),
            "" if one.target is None else str(one.target),
            one.unit,
            {None: "", True: "[green]met[/green]", False: "[red]missed[/red]"}[one.met],
            escape("\n".join(f"{name}: {formatted(value)}" for name, value in one.peers.items())),
        )
    console.print(table)
    console.print("\n[bold]How it was measured[/bold]")
    for how in dict.fromkeys(one.how for one in ordered):
        names = "; ".join(one.figure for one in ordered if one.how == how)
        console.print(f"[bold]{escape(names)}[/bold]: {escape(how)}", highlight=False)
    console.print("\n[bold]On what[/bold]")
    for key, value in about.items():
        if key != "title":
            console.print(f"{escape(key)}: {escape(_flat(value))}", highlight=False)


def with_unit(value: float, unit: str) -> str:
    """A value as people read it."""
    return f"{formatted(value)} {unit}".strip()


def formatted(value: float) -> str:
    """Three significant digits and more for what is large."""
    magnitude = abs(value)
    return f"{value:,.{0 if magnitude >= 100 else 1 if magnitude >= 10 else 2}f}"


def _flat(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {one}" for key, one in value.items())
    return str(value)
