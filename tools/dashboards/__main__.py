"""Write the Grafana dashboards into the chart: `make dashboards`. `--check` only compares."""

import sys
from pathlib import Path

from tools.dashboards import digest, dispatcher, intake, links, overview, scheduler

TARGET = Path(__file__).resolve().parents[2] / "deploy/helm/carillon/files/dashboards"
MODULES = (overview, intake, scheduler, digest, dispatcher, links)


def main() -> int:
    """Write the files, or say which are not fresh."""
    fresh = {f"{one.name}.json": one.json() for one in (module.dashboard() for module in MODULES)}
    found = {path.name: path.read_text() for path in TARGET.glob("*.json")}
    if "--check" not in sys.argv:
        TARGET.mkdir(parents=True, exist_ok=True)
        for name, text in fresh.items():
            (TARGET / name).write_text(text)
        return 0
    stale = sorted(name for name in fresh.keys() | found.keys() if fresh.get(name) != found.get(name))
    if stale:
        print(f"deploy/helm/carillon/files/dashboards: {', '.join(stale)}: run `make dashboards`.", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
