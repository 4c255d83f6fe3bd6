"""Draw the dashboards as pictures, from the JSON that Grafana gets and what a Prometheus answers to it.

    python -m tools.dashboards.draw http://127.0.0.1:9090 --minutes 10 --to docs/dashboards

A stand-in for Grafana where there is none: same grid, queries, names, units, colours and thresholds; the charts are
Plotly's, the page is HTML, the picture is taken by Chromium, which must be installed (`chromium` on PATH).
"""

import argparse
import html
import json
import math
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
import zlib
from collections import defaultdict
from collections.abc import Iterator, Mapping
from functools import partial
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

from plotly.offline import get_plotlyjs

from tools.dashboards.__main__ import TARGET

WIDTH, ROW = 1600, 38
_POINTS = 240
_NAMED = {
    "green": ("#73BF69", "#96D98D", "#37872D", "#C8F2C2"),
    "blue": ("#5794F2", "#8AB8FF", "#1F60C4", "#C0D8FF"),
    "orange": ("#FF9830", "#FFB357", "#FA6400", "#FFCB7D"),
    "red": ("#F2495C", "#FF7383", "#C4162A", "#FFA6B0"),
    "purple": ("#B877D9", "#CA95E5", "#8F3BB8", "#DEB6F2"),
    "text": ("#9A9AAA", "#9A9AAA", "#9A9AAA", "#9A9AAA"),
}
_SHADES = ("", "light-", "dark-", "super-light-")
COLOURS = {f"{shade}{hue}": one for hue, all_of in _NAMED.items() for shade, one in zip(_SHADES, all_of, strict=True)}
_OTHERS = ("#6ED0E0", "#EAB839", "#7B93DB", "#C9A3E0", "#4FA8A0", "#D6B98C", "#5195CE", "#DA8CB4", "#8AB8A0", "#A0A8C8")
_DURATIONS = ((86_400, "d"), (3_600, "h"), (60, "min"), (1, "s"), (1e-3, "ms"), (1e-6, "µs"))
_PREFIXES = ((1e9, "G"), (1e6, "M"), (1e3, "k"), (1, ""), (1e-3, "m"))
_CSS = """
body { margin: 0; background: #111217; color: #CCCCDC; font: 12px Inter, "DejaVu Sans", sans-serif; }
h1 { font-size: 18px; font-weight: 500; margin: 14px 16px 2px; } p { margin: 0 16px 10px; color: #9A9AAA; }
main { display: grid; grid-template-columns: repeat(24, 1fr); grid-auto-rows: 30px; gap: 8px; padding: 0 16px 16px; }
section { background: #181B1F; border: 1px solid #24272E; border-radius: 3px; overflow: hidden; display: flex;
  flex-direction: column; } section > h3 { font-size: 12px; font-weight: 500; margin: 6px 8px 2px; flex: none; }
h2 { font-size: 14px; font-weight: 500; margin: 0; align-self: center; } h2::before { content: "▾ "; color: #6E7080; }
.stat { flex: 1; display: flex; align-items: center; justify-content: center; font-size: 34px; font-weight: 500;
  color: #fff; } .plot { flex: 1; min-height: 0; }
.legend { flex: none; padding: 0 8px 6px; max-height: 34px; overflow: hidden; font-size: 11px; line-height: 16px; }
.legend span { margin-right: 10px; white-space: nowrap; } .legend i { display: inline-block; width: 12px; height: 3px;
  margin: 0 4px 3px 0; border-radius: 2px; } .legend b { font-weight: 400; color: #8E8E9E; }
table { width: 100%; border-collapse: collapse; } td, th { text-align: left; padding: 5px 8px; font-weight: 400;
  border-bottom: 1px solid #24272E; } th { color: #6E9FFF; }
"""
_AXIS = {"gridcolor": "#24272E", "zerolinecolor": "#24272E", "linecolor": "#24272E", "fixedrange": True}
_LAYOUT: dict[str, Any] = {
    "paper_bgcolor": "rgba(0,0,0,0)",
    "plot_bgcolor": "rgba(0,0,0,0)",
    "font": {"color": "#9A9AAA", "size": 10, "family": "DejaVu Sans, sans-serif"},
    "margin": {"l": 52, "r": 10, "t": 4, "b": 22},
    "showlegend": False,
    "xaxis": {**_AXIS, "type": "date", "tickformat": "%H:%M:%S", "nticks": 5},
}
_POWERS = [10.0**power for power in range(-2, 8)]
_SECONDS = (2, 5, 10, 20, 30, 60, 120, 300, 600, 1_200, 1_800, 3_600, 7_200, 18_000, 36_000, 86_400)


class Prometheus:
    """Asks for a span of time."""

    def __init__(self, url: str, start: float, end: float) -> None:
        self._url, self._start, self._end = url, start, end
        self.step = max(1.0, math.ceil((end - start) / _POINTS))
        self._rate = f"{max(4, int(self.step) * 4):d}s"

    def series(self, target: Mapping[str, Any]) -> list[dict[str, Any]]:
        """What a panel's query gives: `values` over the span, or `value` at its end."""
        expr = target["expr"].replace("$__rate_interval", self._rate)
        for name in ("namespace", "job", "instance"):
            expr = expr.replace(f"${name}", ".*")
        asked = {"query": expr, "time": self._end}
        if not target["instant"]:
            asked = {"query": expr, "start": self._start, "end": self._end, "step": self.step}
        way = "query" if target["instant"] else "query_range"
        with urllib.request.urlopen(f"{self._url}/api/v1/{way}?{urllib.parse.urlencode(asked)}", timeout=60) as answer:
            return list(json.load(answer)["data"]["result"])


def page(dashboard: Mapping[str, Any], prometheus: Prometheus) -> str:
    """A dashboard as one HTML page."""
    parts, plots = [], []
    for panel in dashboard["panels"]:
        at = panel["gridPos"]
        place = f"grid-area:{at['y'] + 1}/{at['x'] + 1}/span {at['h']}/span {at['w']}"
        title = html.escape(panel["title"])
        if panel["type"] == "row":
            parts.append(f'<h2 style="{place}">{title}</h2>')
            continue
        found = [(target, prometheus.series(target)) for target in panel["targets"]]
        body, plot = {"stat": _stat, "table": _table, "timeseries": _graph, "heatmap": _heatmap}[panel["type"]](
            panel, found
        )
        parts.append(f'<section style="{place}"><h3>{title}</h3>{body}</section>')
        if plot:
            plots.append([f"p{panel['id']}", *plot])
    drawing = (
        "for (const [id, data, layout] of PLOTS) Plotly.newPlot(id, data, layout, {staticPlot: true, responsive: true})"
    )
    return (
        f"<!doctype html><meta charset=utf-8><style>{_CSS}</style><h1>{html.escape(dashboard['title'])}</h1>"
        f"<p>{html.escape(dashboard['description'])}</p><main>{''.join(parts)}</main>"
        f"<script>{get_plotlyjs()}</script><script>const PLOTS = {json.dumps(plots)}; {drawing}</script>"
    )


Found = list[tuple[Mapping[str, Any], list[dict[str, Any]]]]
Drawn = tuple[str, tuple[list[Any], dict[str, Any]] | None]


def _stat(panel: Mapping[str, Any], found: Found) -> Drawn:
    defaults = panel["fieldConfig"]["defaults"]
    values = [float(one["value"][1]) for _, series in found for one in series]
    if not values:
        return '<div class="stat" style="font-size:20px">no data</div>', None
    steps = [step for step in defaults["thresholds"]["steps"] if step["value"] is None or step["value"] <= values[0]]
    shown = _said(round(values[0], defaults["decimals"]) if "decimals" in defaults else values[0], defaults["unit"])
    return f'<div class="stat" style="background:{COLOURS[steps[-1]["color"]]}">{shown}</div>', None


def _table(panel: Mapping[str, Any], found: Found) -> Drawn:
    arranged = panel["transformations"][0]["options"]
    columns = sorted(arranged["indexByName"], key=arranged["indexByName"].get)
    unit = panel["fieldConfig"]["defaults"]["unit"]
    rows = [
        [_said(float(one["value"][1]), unit) if name == "Value" else one["metric"].get(name, "") for name in columns]
        for _, series in found
        for one in series
    ]
    heads = "".join(f"<th>{arranged['renameByName'].get(name, name)}</th>" for name in columns)
    lines = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in sorted(rows))
    return f"<table><tr>{heads}</tr>{lines}</table>", None


def _graph(panel: Mapping[str, Any], found: Found) -> Drawn:
    defaults = panel["fieldConfig"]["defaults"]
    unit, custom = defaults["unit"], defaults["custom"]
    threshold = custom.get("scaleDistribution", {}).get("linearThreshold")
    place = partial(_symlog, threshold=threshold) if threshold else float
    stack = custom.get("stacking", {}).get("mode") == "normal"
    named = list(_named(found))
    traces, legend = [], []
    for name, values in named:
        colour = _colour(name, panel["fieldConfig"]["overrides"])
        known = [(at, value) for at, value in values if math.isfinite(value)]
        style = {
            "mode": "lines",
            "line": {"color": colour, "width": 1.2},
            "fill": "tonexty" if stack else "tozeroy" if custom["fillOpacity"] else "none",
            "fillcolor": _faint(colour, custom["fillOpacity"] / 100),
            **({"stackgroup": "one"} if stack else {}),
        }
        filled = [[(at, value if math.isfinite(value) else 0.0) for at, value in values]]
        for piece in filled if stack else _pieces(values):
            points = {"x": [at * 1000 for at, _ in piece], "y": [place(value) for _, value in piece]}
            traces.append(style | points)
        last = _said(known[-1][1], unit) if known else "–"
        legend.append(f'<span><i style="background:{colour}"></i>{html.escape(name)} <b>{last}</b></span>')
    top = max(_highest([values for _, values in named], stack), custom.get("axisSoftMax", 0))
    layout = {**_LAYOUT, "yaxis": {**_AXIS, **_ticks(unit, top, threshold)}}
    limit = (defaults.get("thresholds") or {"steps": []})["steps"][1:]
    if limit and top >= limit[0]["value"]:
        level = place(limit[0]["value"])
        dashed = {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": level, "y1": level}
        layout["shapes"] = [{**dashed, "line": {"color": COLOURS["red"], "width": 1, "dash": "dash"}}]
    return f'<div class="plot" id="p{panel["id"]}"></div><div class="legend">{"".join(legend)}</div>', (traces, layout)


def _heatmap(panel: Mapping[str, Any], found: Found) -> Drawn:
    unit = panel["options"]["yAxis"]["unit"]
    series = sorted(((float(one["metric"]["le"]), dict(one["values"])) for _, all_of in found for one in all_of))
    times = sorted({at for _, values in series for at in values})
    below = dict.fromkeys(times, 0.0)
    rows, names = [], []
    for bound, values in series:
        here = {at: float(values.get(at, below[at])) for at in times}
        rows.append([max(0.0, here[at] - below[at]) or None for at in times])
        names.append("more" if math.isinf(bound) else f"≤ {_said(bound, unit)}")
        below = here
    used = [number for number, row in enumerate(rows) if any(row)] or [0]
    shown = slice(max(0, used[0] - 1), used[-1] + 2)
    scale = [[0, "#3b2a1a"], [0.3, "#8f4a12"], [0.6, "#e8782a"], [1, "#ffe0b5"]]
    cells = [[value and math.sqrt(value) for value in row] for row in rows[shown]]
    trace = {"type": "heatmap", "x": [at * 1000 for at in times], "y": names[shown], "z": cells, "colorscale": scale}
    layout = {
        **_LAYOUT,
        "margin": {**_LAYOUT["margin"], "l": 62},
        "yaxis": {**_AXIS, "type": "category"},
    }
    return f'<div class="plot" id="p{panel["id"]}"></div>', (
        [{**trace, "showscale": False, "xgap": 0.5, "ygap": 1}],
        layout,
    )


def _named(found: Found) -> Iterator[tuple[str, list[tuple[float, float]]]]:
    """Names and values of series; a missing value is NaN, so that a line ends where its samples do."""
    for target, series in found:
        times = sorted({at for one in series for at, _ in one["values"]})
        step = min((later - at for at, later in pairwise(times)), default=1.0)
        for one in series:
            name = str(target["legendFormat"])
            for label, value in one["metric"].items():
                name = name.replace(f"{{{{{label}}}}}", value)
            values = {at: float(value) for at, value in one["values"]}
            gaps = {at + side: math.nan for at in values for side in (-step, step) if at + side not in values}
            yield name, sorted((values | gaps).items())


def _pieces(values: list[tuple[float, float]]) -> Iterator[list[tuple[float, float]]]:
    """A line where it is there: filled areas must not bridge gaps."""
    for is_there, piece in groupby(values, key=lambda sample: math.isfinite(sample[1])):
        if is_there:
            yield list(piece)


def _colour(name: str, overrides: list[Any]) -> str:
    for override in overrides:
        if re.match(override["matcher"]["options"].strip("/"), name):
            fixed = str(override["properties"][0]["value"]["fixedColor"])
            return COLOURS.get(fixed, fixed)
    return _OTHERS[zlib.crc32(name.encode()) % len(_OTHERS)]


def _faint(colour: str, opacity: float) -> str:
    red, green, blue = (int(colour[at : at + 2], 16) for at in (1, 3, 5))
    return f"rgba({red},{green},{blue},{opacity})"


def _symlog(value: float, threshold: float) -> float:
    return value / threshold if value < threshold else 1 + math.log10(value / threshold)


def _ticks(unit: str, top: float, threshold: float | None) -> dict[str, Any]:
    """Where the axis is labelled, as Grafana would."""
    if threshold:
        marks = [0.0, *((0.01, 0.1, 1, 10, 60, 600, 3_600, 36_000) if unit == "s" else _POWERS)]
        shown = [mark for mark in marks if mark <= top * 1.05]
        end = _symlog(top * 1.2, threshold)
        places = [_symlog(mark, threshold) for mark in shown]
        return {"tickvals": places, "ticktext": [_said(mark, unit) for mark in shown], "range": [0, end]}
    top = top or 1.0
    base = 10 ** math.floor(math.log10(top))
    steps = _SECONDS if unit == "s" and top > 10 else [base * part for part in (0.2, 0.5, 1, 2)]
    step = next((step for step in steps if top / step <= 5), top)
    marks = [step * number for number in range(math.ceil(top / step) + 1)]
    return {"tickvals": marks, "ticktext": [_said(mark, unit) for mark in marks], "range": [0, top * 1.08]}


def _highest(lines: list[list[tuple[float, float]]], is_stacked: bool) -> float:
    """The highest value, of the sums where lines stand on each other."""
    sums: defaultdict[float, float] = defaultdict(float)
    for values in lines:
        for at, value in values:
            if math.isfinite(value):
                sums[at] = sums[at] + value if is_stacked else max(sums[at], value)
    return max(sums.values(), default=0.0)


def _said(value: float, unit: str) -> str:
    """A number in its unit."""
    if not math.isfinite(value):
        return "–"
    if unit == "percentunit":
        return f"{value * 100:.3g} %"
    if unit.startswith("suffix:"):
        return f"{value:.3g}{unit.removeprefix('suffix:')}"
    scale = _DURATIONS if unit == "s" else _PREFIXES
    end = {"bytes": "B"}.get(unit, unit.removeprefix("si:") if unit.startswith("si:") else "")
    size, prefix = next(
        ((size, prefix) for size, prefix in scale if abs(value) >= size), (1, "s" if unit == "s" else "")
    )
    if value == 0 or (unit != "s" and abs(value) < 1):
        size, prefix = 1, "s" if unit == "s" else ""
    return f"{value / size:.3g}{' ' if prefix + end else ''}{prefix}{end}"


def picture(text: str, height: int, target: Path) -> None:
    """Take a picture of a page; raises FileNotFoundError without Chromium."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        raise FileNotFoundError("There is no chromium on PATH; install it to draw dashboards.")
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / "page.html"
        source.write_text(text)
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--virtual-time-budget=20000"]
        size = f"--window-size={WIDTH},{height}"
        command = [browser, *options, f"--user-data-dir={scratch}/profile", size, f"--screenshot={target}", str(source)]
        subprocess.run(command, check=True, capture_output=True, timeout=120)


def draw(url: str, start: float, end: float, to: Path) -> None:
    """All dashboards, for a span of time (Unix times), as `to`/<name>.png."""
    to.mkdir(parents=True, exist_ok=True)
    prometheus = Prometheus(url, start, end)
    for source in sorted(TARGET.glob("*.json")):
        dashboard = json.loads(source.read_text())
        rows = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in dashboard["panels"])
        picture(page(dashboard, prometheus), rows * ROW + 90, (to / f"{source.stem}.png").absolute())


def main() -> int:
    """Draw what happened in the last minutes."""
    parser = argparse.ArgumentParser(prog="python -m tools.dashboards.draw")
    parser.add_argument("prometheus", help="its URL")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--to", type=Path, default=Path("docs/dashboards"))
    typed = parser.parse_args()
    draw(typed.prometheus, time.time() - typed.minutes * 60, time.time(), typed.to)
    return 0


if __name__ == "__main__":
    sys.exit(main())
