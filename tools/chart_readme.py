"""Writes deploy/helm/carillon/README.md from README.in.md and the comments in values.yaml.

    python tools/chart_readme.py            # write it
    python tools/chart_readme.py --check    # exit 1 when it is not up to date

A comment that begins with `# --` and stands right above a key describes it; `# == Title` begins a section. A key
becomes a row where it has a description, or holds something that is not divided further.
"""

import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

CHART = Path(__file__).resolve().parent.parent / "deploy" / "helm" / "carillon"
TARGET = CHART / "README.md"
PLACE = "<!-- values -->\n"

_KEY = re.compile(r"^( *)([A-Za-z][A-Za-z0-9_]*):(?: |$)")
_COMMENT = re.compile(r"^ *# ?(.*)$")
_LONGEST_DEFAULT = 100


@dataclass(frozen=True)
class Row:
    """A value: where it is, what it is by default, what it is for."""

    path: str
    default: str
    text: str


@dataclass(frozen=True)
class Section:
    """What follows has this title."""

    title: str


def readme() -> str:
    """The whole page."""
    head, _, tail = (CHART / "README.in.md").read_text().partition(PLACE)
    source = (CHART / "values.yaml").read_text()
    return head + "".join(_lines(source)) + tail


def rows(source: str, values: Any) -> Iterator[Row | Section]:
    """The rows and sections of a values.yaml, in its order."""
    parents: list[tuple[int, str]] = []
    comment: list[str] = []
    for line in source.splitlines():
        if title := re.match(r"^# == (.+)$", line):
            yield Section(title[1])
        elif found := _COMMENT.match(line):
            comment = [found[1]] if found[1].startswith("-- ") else [*comment, found[1]] if comment else []
            continue
        elif key := _KEY.match(line):
            indent = len(key[1])
            parents = [one for one in parents if one[0] < indent]
            names = [*(name for _, name in parents), key[2]]
            parents.append((indent, key[2]))
            value = _at(values, names)
            text = " ".join(comment).removeprefix("-- ")
            if text or not (isinstance(value, dict) and value and line.rstrip().endswith(":")):
                yield Row(".".join(names), _default(value, is_block=line.rstrip().endswith(":")), text)
        comment = []


def main(arguments: list[str]) -> int:
    """Write or check; the exit status."""
    page = readme()
    if "--check" not in arguments:
        TARGET.write_text(page)
        return 0
    if TARGET.exists() and TARGET.read_text() == page:
        return 0
    print("deploy/helm/carillon/README.md is not up to date; run: python tools/chart_readme.py", file=sys.stderr)
    return 1


def _lines(source: str) -> Iterator[str]:
    header = "| value | default | meaning |\n|---|---|---|\n"
    yield header
    for one in rows(source, yaml.safe_load(source)):
        if isinstance(one, Section):
            yield f"\n### {one.title}\n\n{header}"
        else:
            yield f"| `{one.path}` | {one.default} | {_cell(one.text)} |\n"


def _at(values: Any, names: list[str]) -> Any:
    for name in names:
        values = values[name]
    return values


def _default(value: Any, *, is_block: bool) -> str:
    if isinstance(value, dict) and value and is_block:
        return ""  # Its parts have rows of their own.
    text = json.dumps(value, ensure_ascii=False)
    return f"`{_cell(text)}`" if len(text) <= _LONGEST_DEFAULT else "see values.yaml"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
