"""What messages look like: the built-in templates' renderings, kept under tests/golden."""

import subprocess
import sys
from email.message import EmailMessage
from pathlib import Path

import pytest

from services.digest.rendering import render
from tests.golden.cases import CASES

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests/golden"


@pytest.mark.parametrize("name", CASES)
def test_a_message_looks_as_it_was_reviewed(name: str) -> None:
    """HTML, text and subject, to the letter; `make layouts` writes them anew."""
    (part,) = render(CASES[name]).parts
    assert part.html == (GOLDEN / f"{name}.html").read_text()
    assert f"Subject: {part.subject}\n\n{part.text}" == (GOLDEN / f"{name}.txt").read_text()


def test_a_hostile_payload_is_shown_and_does_nothing() -> None:
    """No tag of its own in the HTML, no second header by the subject."""
    (part,) = render(CASES["hostile"]).parts
    assert "<script" not in part.html
    assert "<img" not in part.html
    assert "<i>" not in part.html
    assert "<b>" not in part.html
    assert part.html.count("</html>") == 1
    mail = EmailMessage()
    mail["Subject"] = part.subject
    assert mail["Bcc"] is None
    assert "\nBcc:" not in mail.as_string()


def test_a_message_loads_nothing() -> None:
    """No fonts, pictures or styles from elsewhere: opening it tells nobody, and it looks the same offline."""
    (part,) = render(CASES["digest"]).parts
    assert "<link" not in part.html
    assert "@import" not in part.html
    assert "url(" not in part.html
    assert " src=" not in part.html


def test_the_layouts_are_what_their_mjml_says() -> None:
    """builtin_layouts.py is compiled from layouts/*.mjml; `make layouts` does it."""
    checked = subprocess.run([sys.executable, "tools/layouts.py", "--check"], cwd=ROOT, check=False)
    assert checked.returncode == 0
