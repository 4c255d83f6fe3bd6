"""Write the golden renderings anew: `make layouts`. Look at them in a browser before you commit."""

from pathlib import Path

from services.digest.rendering import render
from tests.golden.cases import CASES

HERE = Path(__file__).parent

for name, job in CASES.items():
    (part,) = render(job).parts
    (HERE / f"{name}.html").write_text(part.html)
    (HERE / f"{name}.txt").write_text(f"Subject: {part.subject}\n\n{part.text}")
