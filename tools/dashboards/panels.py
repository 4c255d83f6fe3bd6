"""What all dashboards are made of: panels of a few kinds, rows, variables, links, and what each colour means.

Expressions are PromQL with two abbreviations: braces are completed by what the variables select, and `[]` is the range
that Grafana computes for rates. A metric whose labels do not say which service it is of is joined with `COMPONENT`: it
works with any scrape configuration, whatever its jobs are called.
"""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from string import ascii_uppercase

from grafana_foundation_sdk.builders import common, heatmap, prometheus, stat, table, timeseries
from grafana_foundation_sdk.builders import dashboard as dashboards
from grafana_foundation_sdk.cog.builder import Builder
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common as choices
from grafana_foundation_sdk.models.dashboard import (
    DashboardCursorSync,
    DashboardLinkType,
    DataSourceRef,
    DataTransformerConfig,
    DynamicConfigValue,
    FieldColorModeId,
    Threshold,
    ThresholdsMode,
    VariableModel,
    VariableOption,
    VariableRefresh,
    VariableSort,
)
from grafana_foundation_sdk.models.heatmap import HeatmapColorMode, HeatmapColorScale
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

SELECTION = 'namespace=~"$namespace", job=~"$job", instance=~"$instance"'
COMPONENT = "* on (namespace, job, instance) group_left (component) carillon_build_info"
SOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")
NAMES = ("overview", "intake", "scheduler", "digest", "dispatcher", "links")

GREEN, BLUE, ORANGE, RED, PURPLE, GREY = "green", "blue", "orange", "red", "purple", "text"
MEANINGS = {
    # A hue means the same on every panel, because the name of a series decides it; what may stand together on one
    # panel gets shades of it, in this order.
    GREEN: (  # Done.
        "sent|fired|notification|done|OK|committed|accepted|confirmed|answered|new|digested|applied|trigger",
        "sent_alone|event|true|asked|in_use",
        "close_window",
        "request_due",
    ),
    BLUE: (  # Going on.
        "published|pending|due|opened|waiting|taken over|p99|over 1h|aligned",
        "p50|over 5m|external|idle|closing",
        "p99.9|over 6h|rolling",
        "cached",
    ),
    ORANGE: (  # Once more, or not yet.
        "retries|retry_delivery|republished|not_asked|rate|limited|repeated|RESOURCE_EXHAUSTED|overlap|held",
        "deferred|fallback|breaker_open|backlog|dropped|missed",
        "duplicates|late|not yet applied",
    ),
    RED: (  # Wrong.
        "dead|failed|failures|refused|crash|fenced|lost|jams|bounces|limit|free|INTERNAL|rejected|bad_answer",
        "UNAVAILABLE|not held|timeout|reply|template failures|bad_token|no_answer",
        "DEADLINE_EXCEEDED|unreachable|filter errors|bad_request",
        "UNIMPLEMENTED|timeouts",
    ),
    PURPLE: (  # Left out on purpose.
        "cancelled|withdrawn|condition",
        "suppressed|skipped|no_address|answer",
        "expired|empty|false",
        "subscriber_deleted",
    ),
    GREY: (  # The caller's mistakes.
        "INVALID_ARGUMENT|NOT_FOUND|FAILED_PRECONDITION|ALREADY_EXISTS|CANCELLED|ABORTED|UNAUTHENTICATED|PERMISSION_DENIED",
    ),
}
SPEAKING = {"cause", "code", "kind", "limit", "outcome", "reason", "result", "state", "target"}
"""Labels whose values have a meaning."""
SHADES = ("", "light-", "dark-", "super-light-")
OWN = {
    # Services and channels have a colour of their own; of whatever else there are many, and Grafana's palette serves.
    "component": {"intake": "#73BFF9", "scheduler": "#3D71D9", "digest": "#2CC8B8", "dispatcher": "#E0B400"},
    "channel": {"email": "#2CC8B8", "webhook": "#E0B400", "apprise": "#B877D9", "log": "#9A9AAA", "other": "#6E7080"},
}
ALIASES = {"receiver": "component", "sender": "component", "lane": "channel"}

Panel = timeseries.Panel | stat.Panel | heatmap.Panel | table.Panel
Series = tuple[str, str]
"""An expression, and how its series are named: `{{label}}` or words."""
Row = tuple[str, Sequence[Panel]]
"""A title, and panels: numbers six to a line, others four."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Dashboard:
    """One dashboard. With a `service` its variables offer that service's jobs and instances only."""

    name: str
    title: str
    description: str
    rows: Sequence[Row]
    service: str = ""

    def json(self) -> str:
        """As Grafana imports it, and its sidecar finds it."""
        builder = (
            dashboards.Dashboard(f"Carillon / {self.title}")
            .uid(f"carillon-{self.name}")
            .description(self.description)
            .tags(["carillon"])
            .readonly()
            .timezone("browser")
            .time("now-1h", "now")
            .refresh("30s")
            .tooltip(DashboardCursorSync.CROSSHAIR)
            .variables(_variables(self.service))
        )
        for name in NAMES:
            if name != self.name:
                builder.link(_link(name.title(), name))
        for title, panels in self.rows:
            builder.with_row(dashboards.Row(title))
            for panel in panels:
                builder.with_panel(panel.span(4 if isinstance(panel, stat.Panel) else 6))
        built = builder.build()
        for number, one in enumerate(built.panels or (), start=1):
            one.id_val = number
        return json.dumps(built, cls=JSONEncoder, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def row(title: str, *panels: Panel) -> Row:
    """What belongs together, under a title."""
    return title, panels


def graph(
    title: str,
    description: str,
    *series: Series,
    unit: str = "short",
    stack: bool = False,
    log: bool = False,
    limit: float | None = None,
) -> timeseries.Panel:
    """Lines over time; above `limit` the background is red. A logarithmic axis is for ages and durations."""
    panel = timeseries.Panel().title(title).description(description).datasource(SOURCE).height(8).unit(unit).min(0)
    panel.line_width(1).fill_opacity(40 if stack else 0 if log else 8).show_points(
        choices.VisibilityMode.NEVER
    ).span_nulls(False)
    panel.color_scheme(dashboards.FieldColor().mode(FieldColorModeId.PALETTE_CLASSIC_BY_NAME))
    panel.tooltip(common.VizTooltipOptions().mode(choices.TooltipDisplayMode.MULTI).sort(choices.SortOrder.DESCENDING))
    panel.legend(
        common.VizLegendOptions()
        .display_mode(choices.LegendDisplayMode.LIST)
        .placement(choices.LegendPlacement.BOTTOM)
        .show_legend(True)
        .calcs(["lastNotNull"])
    )
    if stack:
        panel.stacking(common.StackingConfig().mode(choices.StackingMode.NORMAL).group("A"))
    if log:
        symlog = common.ScaleDistributionConfig().type(choices.ScaleDistribution.SYMLOG)
        panel.scale_distribution(symlog.log(10).linear_threshold(0.01)).axis_soft_max(limit or 1)
    if limit is not None:
        panel.thresholds(_thresholds((limit, RED), base="transparent"))
        dashed = choices.GraphTresholdsStyleMode.DASHED_AND_AREA
        panel.thresholds_style(common.GraphThresholdsStyleConfig().mode(dashed))
    for names, colour in _colours(legend for _, legend in series):
        fixed = {"mode": "fixed", "fixedColor": colour}
        panel.override_by_regexp(f"/^({names})$/", [DynamicConfigValue(id_val="color", value=fixed)])
    for ref, (expr, legend) in zip(ascii_uppercase, series, strict=False):
        panel.with_target(_query(expr, legend).ref_id(ref).range().exemplar("_bucket" in expr))
    return panel


def rates(title: str, description: str, counter: str, *, by: str) -> timeseries.Panel:
    """How often a counter goes up each second, a line for each value of a label."""
    return graph(title, description, (f"sum by ({by}) (rate({counter}{{}}[]))", f"{{{{{by}}}}}"), unit="si:/s")


def number(
    title: str,
    description: str,
    expr: str,
    *,
    unit: str = "short",
    warn: float | None = None,
    bad: float | None = None,
    below: bool = False,
    to: str = "",
) -> stat.Panel:
    """One number as it is now: orange from `warn`, red from `bad` on (with `below`: green from `bad`), else green.

    It is asked for now only, and not over time: of a service that is gone, the last number would look alive.
    """
    steps = [(at, colour) for at, colour in ((warn, ORANGE), (bad, GREEN if below else RED)) if at is not None]
    panel = stat.Panel().title(title).description(description).datasource(SOURCE).height(3).unit(unit)
    panel.thresholds(_thresholds(*steps, base=RED if below else GREEN)).no_value("no data")
    panel.color_mode(choices.BigValueColorMode.BACKGROUND_SOLID).graph_mode(choices.BigValueGraphMode.NONE)
    panel.reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]).values(False))
    if unit == "short":
        panel.decimals(0)
    if to:
        panel.links([_link(f"Open {to}", to)])
    return panel.with_target(_query(expr, "").instant())


def heat(title: str, description: str, histogram: str, *, unit: str = "s") -> heatmap.Panel:
    """How a histogram's observations, `name{…}`, are spread over time."""
    panel = heatmap.Panel().title(title).description(description).datasource(SOURCE).height(8)
    panel.calculate(False).cell_gap(1).show_tooltip().show_legend().hide_y_histogram()
    panel.y_axis(heatmap.YAxisConfig().unit(unit).axis_placement(choices.AxisPlacement.LEFT))
    colours = heatmap.HeatmapColorOptions().mode(HeatmapColorMode.SCHEME).scheme("Oranges").steps(32)
    panel.color(colours.scale(HeatmapColorScale.EXPONENTIAL).exponent(0.5).reverse(False))
    query = _query(f"sum by (le) (increase({buckets(histogram)}))", "{{le}}").range()
    return panel.with_target(query.format(PromQueryFormat.HEATMAP))


def listing(title: str, description: str, expr: str, columns: Sequence[str], *, value: str, unit: str) -> table.Panel:
    """A table of what an expression gives now: these labels, and the value under its name."""
    panel = table.Panel().title(title).description(description).datasource(SOURCE).height(8).unit(unit)
    arranged: dict[str, object] = {
        "includeByName": dict.fromkeys((*columns, "Value"), True),
        "indexByName": {name: place for place, name in enumerate((*columns, "Value"))},
        "renameByName": {"Value": value},
    }
    panel.with_transformation(DataTransformerConfig(id_val="organize", options=arranged))
    return panel.with_target(_query(expr, "").instant().format(PromQueryFormat.TABLE))


def buckets(histogram: str) -> str:
    """The buckets of `name{…}`, over the range for rates."""
    name, brace, matchers = histogram.partition("{")
    return f"{name}_bucket{brace}{matchers}[]"


def full(expr: str) -> str:
    """PromQL without our abbreviations."""
    inside = re.sub(r"\{([^{}]*)\}", lambda found: "{" + ", ".join(filter(None, (found[1], SELECTION))) + "}", expr)
    return inside.replace("[]", "[$__rate_interval]")


def _colours(legends: Iterable[str]) -> Iterator[tuple[str, str]]:
    """The names and colours that series with such legends can have: few, because a ConfigMap's size is bounded."""
    labels, words = set[str](), set[str]()
    for legend in legends:
        labels.update(re.findall(r"\{\{(\w+)\}\}", legend))
        words.add(legend)
    for hue, shades in MEANINGS.items():
        for names, shade in zip(shades, SHADES, strict=False):
            if labels & SPEAKING or any(re.fullmatch(names, word) for word in words):
                yield names, f"{shade}{hue}"
    for label, coloured in OWN.items():
        for name, colour in coloured.items():
            if label in {ALIASES.get(one, one) for one in labels} or any(word.startswith(name) for word in words):
                yield f"{name}\\b.*", colour


def _query(expr: str, legend: str) -> prometheus.Dataquery:
    return prometheus.Dataquery().expr(full(expr)).legend_format(legend).ref_id("A").datasource(SOURCE)


def _thresholds(*steps: tuple[float, str], base: str) -> dashboards.ThresholdsConfig:
    first = Threshold(value=None, color=base)
    rest = [Threshold(value=at, color=colour) for at, colour in steps]
    return dashboards.ThresholdsConfig().mode(ThresholdsMode.ABSOLUTE).steps([first, *rest])


def _link(title: str, name: str) -> dashboards.DashboardLink:
    # Not all variables: one service's instances would select nothing of another's.
    url = f"/d/carillon-{name}?${{datasource:queryparam}}&${{namespace:queryparam}}"
    return dashboards.DashboardLink(title).type(DashboardLinkType.LINK).url(url).keep_time(True).icon("dashboard")


def _variables(service: str) -> list[Builder[VariableModel]]:
    """All of them by default: `.*` also fits series that have no such label, outside Kubernetes."""
    narrowed = f'component="{service}"' if service else ""
    source = dashboards.DatasourceVariable("datasource").label("Data source").type("prometheus")
    chosen: list[Builder[VariableModel]] = [source]
    for name in ("namespace", "job", "instance"):
        query = f"label_values(carillon_build_info{{{narrowed}}}, {name})"
        narrowed = ", ".join(filter(None, (narrowed, f'{name}=~"${name}"')))
        variable = dashboards.QueryVariable(name).label(name.title()).datasource(SOURCE).query(query)
        variable.multi(True).include_all(True).all_value(".*").current(VariableOption(text=["All"], value=["$__all"]))
        chosen.append(variable.refresh(VariableRefresh.ON_TIME_RANGE_CHANGED).sort(VariableSort.ALPHABETICAL_ASC))
    return chosen
