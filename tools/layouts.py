"""Compile the built-in layouts from MJML: `make layouts`. `--check` only compares.

MJML is compiled here and not for each message: what comes of it is a Jinja template like any other, so that a message
costs no more than before, and the renderer needs no compiler.
"""

import sys
from pathlib import Path

import mrml

HERE = Path(__file__).resolve().parent.parent
SOURCES = HERE / "services/digest/layouts"
TARGET = HERE / "services/digest/builtin_layouts.py"
# Behind the preview text, so that mail programs do not go on with what the message begins with.
FILL = "&#847;&#8199;&#65279; " * 20
OPENING = '''"""The built-in layouts in HTML, compiled from layouts/*.mjml; edit those, then run `make layouts`."""

# ruff: noqa: E501
# fmt: off
'''


def compiled(name: str) -> str:
    """One layout as an HTML document that is a Jinja template."""
    source = (SOURCES / f"{name}.mjml").read_text()
    for part in ("head", "foot"):
        source = source.replace(f"[[{part}]]", (SOURCES / f"{part}.mjml").read_text().strip())
    lines = [line.strip() for line in mrml.to_html(source).content.splitlines()]
    return "\n".join(line for line in lines if line).replace("[[fill]]", FILL.strip())


def module() -> str:
    """The generated module."""
    constants = [f'\n{name.upper()} = r"""{compiled(name)}\n"""\n' for name in ("alone", "digest")]
    return OPENING + "".join(constants)


def main() -> int:
    """Write the module, or say whether it is fresh."""
    fresh = module()
    if "--check" not in sys.argv:
        TARGET.write_text(fresh)
        return 0
    if TARGET.read_text() == fresh:
        return 0
    print("services/digest/builtin_layouts.py is not what layouts/*.mjml says: run `make layouts`.", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
