"""From a job to messages: Jinja templates in a sandbox, HTML with a plain-text twin, JSON, and parts. Pure.

Every item is rendered for itself; the pieces are packed into parts by their size; each part gets the layout around
it. So the split depends on the content alone, and the same job always gives the same parts.

What a tenant's template may do is bounded three times: Jinja's immutable sandbox (no attributes of Python's own,
nothing changed), a limit on output here, and a process of its own with limits on time and memory around it
(loops_press.py). When it fails, the built-in template writes the message, and the error is kept beside the digest:
nobody waits for a template.

A payload's missing field is empty text, not an error: payloads vary, and a message with a gap beats none.
"""

import json
import traceback
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import Any, Final
from zoneinfo import ZoneInfo

from jinja2 import ChainableUndefined, Environment, TemplateSyntaxError, nodes
from jinja2.environment import Template as JinjaTemplate
from jinja2.sandbox import ImmutableSandboxedEnvironment
from markupsafe import Markup

from services.digest import builtin_templates as builtin
from services.digest.rendering_jobs import Job, Line, Part, Rendered, Source

PART_BYTES: Final = 120 * 1024
"""Items of one part, all formats together; the layout comes on top."""
MESSAGE_BYTES: Final = 240 * 1024
"""Largest message, all formats together: a link frame is 512 KiB."""
MAX_SUBJECT: Final = 240
_SPLITS: Final = 6
_TITLES = ("title", "subject", "headline", "summary")


class BadTemplate(Exception):
    """The template's `part` (subject or body) does not compile; `line` is counted from 1."""

    def __init__(self, message: str, line: int, part: str = "body") -> None:
        super().__init__(message)
        self.line = line
        self.part = part


class TooLarge(Exception):
    """A message is larger than MESSAGE_BYTES and cannot be split further."""


@dataclass(frozen=True, slots=True)
class Labelled:
    """A payload's field as people read it."""

    label: str
    value: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ItemView:
    """What templates see as `item`; `body` is the item's own rendering and there in layouts only."""

    id: str
    type: str
    name: str
    entity: str
    group_key: str
    time: datetime
    payload: Mapping[str, Any]
    title: str
    fields: Sequence[Labelled]
    body: str = ""


def render(job: Job) -> Rendered:
    """Render a job with the tenant's templates, else with the built-in ones, else not at all; never raises."""
    error = ""
    if job.templates:
        try:
            return Rendered(id=job.id, parts=_parts(job, job.templates))
        except Exception as err:  # noqa: BLE001 - a template is a program, and may fail in any way.
            error = explained(err)
    try:
        return Rendered(id=job.id, parts=_parts(job, {}), error=error)
    except Exception as err:  # noqa: BLE001 - the outermost frame of rendering: the error is the answer.
        return Rendered(id=job.id, parts=[], error=f"{error}; then the built-in template: {explained(err)}".strip("; "))


def check_template(source: Source, *, is_html: bool) -> None:
    """Raise BadTemplate unless subject and body compile and need nothing that is not there."""
    _check_text(source.subject, "subject", is_html=False)
    _check_text(source.body, "body", is_html=is_html)


def _check_text(text: str, part: str, *, is_html: bool) -> None:
    environment = _ENVIRONMENTS[is_html]
    try:
        tree = environment.parse(text)
        environment.compile(text)
    except TemplateSyntaxError as err:
        raise BadTemplate(err.message or "is not a Jinja template", err.lineno, part) from err
    except RecursionError as err:
        raise BadTemplate("is nested too deeply", 1, part) from err
    for node in tree.find_all((nodes.Include, nodes.Extends, nodes.Import, nodes.FromImport)):
        raise BadTemplate("include, extends and import are not there: a template stands alone", node.lineno, part)


def explained(error: Exception) -> str:
    """What went wrong and in which line of which template, at most 500 characters."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename.startswith("template ")]
    place = f"{frames[-1].filename}, line {frames[-1].lineno}: " if frames else ""
    return f"{place}{type(error).__name__}: {error}"[:500]


# Environments


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox, in which a payload's own field comes before a method of Python's dict: payload.items is a field."""

    def getattr(self, obj: Any, attribute: str) -> Any:
        """See Environment."""
        if isinstance(obj, dict):
            return obj[attribute] if attribute in obj else self.undefined(obj=obj, name=attribute)
        return super().getattr(obj, attribute)


def _environment(kind: type[Environment], *, is_html: bool) -> Environment:
    # optimized=False: constants are folded while compiling, where no limit on output holds.
    environment = kind(
        autoescape=is_html, undefined=ChainableUndefined, optimized=False, keep_trailing_newline=True, cache_size=0
    )
    environment.filters["when"] = when
    environment.filters["brief"] = brief
    return environment


def when(instant: datetime) -> str:
    """`Tue 9 Jul 2013, 08:15`, in the subscriber's zone."""
    return f"{instant:%a} {instant.day} {instant:%b %Y, %H:%M}"


def brief(text: str, longest: int) -> str:
    """The text, cut to `longest` characters."""
    return text if len(text) <= longest else text[: longest - 1] + "…"


_ENVIRONMENTS = {is_html: _environment(_Environment, is_html=is_html) for is_html in (False, True)}
# Ours need no sandbox, which costs three quarters of the time.
_BUILTIN = {is_html: _environment(Environment, is_html=is_html) for is_html in (False, True)}


@lru_cache(maxsize=512)
def _compiled(name: str, text: str, is_html: bool, is_builtin: bool) -> JinjaTemplate:
    environment = (_BUILTIN if is_builtin else _ENVIRONMENTS)[is_html]
    code = environment.compile(text, filename=f"template {name}")
    return JinjaTemplate.from_code(environment, code, environment.globals)


def _run(name: str, text: str, context: Mapping[str, Any], *, is_html: bool = False, is_builtin: bool = False) -> str:
    """Render with a limit on output; stops at the first piece beyond it."""
    pieces: list[str] = []
    room = MESSAGE_BYTES
    for piece in _compiled(name, text, is_html, is_builtin).generate(context):
        room -= len(piece)
        if room < 0:
            raise TooLarge(f"the output is larger than {MESSAGE_BYTES:,} bytes")
        pieces.append(piece)
    return "".join(pieces)


# Items


def _views(job: Job) -> list[ItemView]:
    zone = ZoneInfo(job.zone)
    return [_view(line, zone) for line in job.lines]


def _view(line: Line, zone: ZoneInfo) -> ItemView:
    payload = _object(line.payload)
    title_field = next((name for name in _TITLES if isinstance(payload.get(name), str) and payload[name]), "")
    shown = {name: value for name, value in payload.items() if name != title_field and value is not None}
    return ItemView(
        id=line.notification_id,
        type=line.type,
        name=line.type_name,
        entity=line.entity,
        group_key=line.group_key,
        time=datetime.fromisoformat(line.occurred_at).astimezone(zone),
        payload=payload,
        title=str(payload[title_field]) if title_field else line.entity or line.type_name,
        fields=[Labelled(_label(name), _shown(value)) for name, value in shown.items()],
    )


def _object(payload: str) -> dict[str, Any]:
    parsed = json.loads(payload) if payload else {}
    return parsed if isinstance(parsed, dict) else {"value": parsed}


def _label(name: str) -> str:
    words = name.replace("_", " ").replace("-", " ").strip()
    return words[:1].upper() + words[1:64]


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _with_body(view: ItemView, body: str) -> ItemView:
    names = (name for name in ItemView.__slots__ if name != "body")
    return ItemView(body=body, **{name: getattr(view, name) for name in names})


# Parts


def _parts(job: Job, templates: Mapping[str, Source]) -> list[Part]:
    if job.format == "json":
        return _json_parts(job)
    writer = _Writer(job, templates)
    room = PART_BYTES
    for _ in range(_SPLITS):
        parts = writer.parts(room)
        if all(_size(part) <= MESSAGE_BYTES for part in parts):
            return parts
        room //= 2
    raise TooLarge(f"a message is larger than {MESSAGE_BYTES:,} bytes and cannot be split further")


def _size(part: Part) -> int:
    return sum(len(text.encode()) for text in part)


def _packed(sizes: Sequence[int], room: int) -> list[range]:
    """Runs of consecutive items that fit into `room` together; an item larger than that has a run of its own."""
    runs: list[range] = []
    start = used = 0
    for number, size in enumerate(sizes):
        if number > start and used + size > room:
            runs.append(range(start, number))
            start, used = number, 0
        used += size
    return [*runs, range(start, len(sizes))]


class _Writer:
    """Renders one job's items once, and then layouts around runs of them."""

    def __init__(self, job: Job, templates: Mapping[str, Source]) -> None:
        self._job, self._templates = job, templates
        self._views = _views(job)
        zone = ZoneInfo(job.zone)
        self._subscriber = {"id": job.subscriber, "zone": job.zone, "locale": job.locale}
        self._digest: dict[str, Any] = {
            "id": job.id,
            "cadence": job.cadence,
            "name": job.cadence_name or job.cadence,
            "locale": job.locale,
            "closed": datetime.fromisoformat(job.closed_at).astimezone(zone),
            "count": len(self._views),
            "kinds": _kinds(self._views),
            "part": 1,
            "parts": 1,
        }
        self._texts = [_with_body(view, self._item(view, is_html=False)) for view in self._views]
        self._htmls: list[ItemView] = []
        if job.format == "html":
            self._htmls = [_with_body(view, Markup(self._item(view, is_html=True))) for view in self._views]  # noqa: S704

    def parts(self, room: int) -> list[Part]:
        """The messages, their items packed into `room` bytes each."""
        sizes = [len(view.body.encode()) for view in self._texts]
        for number, view in enumerate(self._htmls):
            sizes[number] += len(view.body.encode())
        runs = _packed(sizes, room)
        return [self._part(run, number, len(runs)) for number, run in enumerate(runs, start=1)]

    def _part(self, run: range, number: int, of: int) -> Part:
        context = {"digest": self._digest | {"part": number, "parts": of}, "subscriber": self._subscriber}
        texts = self._texts[run.start : run.stop]
        htmls = self._htmls[run.start : run.stop]
        subject = one_line(self._subject(context, texts))
        return Part(
            subject=f"{subject[: MAX_SUBJECT - 20]} ({number} of {of})" if of > 1 else subject,
            html=self._layout(context, htmls, is_html=True) if htmls else "",
            text=self._layout(context, texts, is_html=False),
            json="",
        )

    def _item(self, view: ItemView, *, is_html: bool) -> str:
        text_format, default = ("html", builtin.ITEM_HTML) if is_html else ("text", builtin.ITEM_TEXT)
        source = self._templates.get(f"item/{text_format}/{view.type}")
        context = {"item": view, "digest": self._digest, "subscriber": self._subscriber}
        if source is None:
            name = f"built-in item {text_format}"
            return _run(name, default[self._job.style], context, is_html=is_html, is_builtin=True)
        return _run(source.name, source.body, context, is_html=is_html)

    def _layout(self, context: Mapping[str, Any], views: Sequence[ItemView], *, is_html: bool) -> str:
        text_format = "html" if is_html else "text"
        source = self._templates.get(f"layout/{text_format}")
        context = {**context, "items": views, "groups": _groups(views, self._digest["kinds"])}
        if source is not None:
            return _run(source.name, source.body, context, is_html=is_html)
        alone, many = (
            (builtin.ALONE_HTML, builtin.DIGEST_HTML) if is_html else (builtin.ALONE_TEXT, builtin.DIGEST_TEXT)
        )
        default = alone if self._job.is_alone else many
        return _run(f"built-in layout {text_format}", default, context, is_html=is_html, is_builtin=True)

    def _subject(self, context: Mapping[str, Any], views: Sequence[ItemView]) -> str:
        """The layout's, else for one sent alone the item's, else the built-in one. HTML's own before its twin's."""
        own = [f"layout/{self._job.format}", "layout/text"]
        if self._job.is_alone:
            own += [f"item/{self._job.format}/{views[0].type}", f"item/text/{views[0].type}"]
        context = {**context, "items": views, "item": views[0], "groups": _groups(views, self._digest["kinds"])}
        for source in (self._templates.get(place) for place in own):
            if source is not None and source.subject:
                return _run(source.name, source.subject, context)
        default = builtin.ALONE_SUBJECT if self._job.is_alone else builtin.DIGEST_SUBJECT
        return _run("built-in subject", default, context, is_builtin=True)


def one_line(text: str) -> str:
    """A header's value: no line ends or other control characters (header injection), at most MAX_SUBJECT characters."""
    visible = "".join(" " if unicodedata.category(char) in ("Cc", "Zl", "Zp") else char for char in text)
    return brief(" ".join(visible.split()), MAX_SUBJECT) or "Notification"


def _kinds(views: Sequence[ItemView]) -> list[dict[str, Any]]:
    """Types with their number of items, most frequent first."""
    counts: dict[tuple[str, str], int] = {}
    for view in views:
        counts[view.type, view.name] = counts.get((view.type, view.name), 0) + 1
    ordered = sorted(counts.items(), key=lambda one: (-one[1], one[0]))
    return [{"type": key[0], "name": key[1], "count": count} for key, count in ordered]


def _groups(views: Sequence[ItemView], kinds: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A part's items by type, in their order; `count` is that of the whole digest."""
    counts = {kind["type"]: kind["count"] for kind in kinds}
    groups: dict[str, dict[str, Any]] = {}
    for view in views:
        group = groups.setdefault(
            view.type, {"type": view.type, "name": view.name, "count": counts[view.type], "items": []}
        )
        group["items"].append(view)
    return list(groups.values())


# JSON


def _json_parts(job: Job) -> list[Part]:
    items = [_json_item(line) for line in job.lines]
    runs = _packed([len(json.dumps(one)) for one in items], PART_BYTES)
    kinds = _kinds(_views(job))
    subject = one_line(f"{job.cadence_name or job.cadence}: {kinds[0]['count']} × {kinds[0]['name']}")
    return [
        Part(subject, "", "", _dumped(job, items[run.start : run.stop], number, len(runs)))
        for number, run in enumerate(runs, start=1)
    ]


def _json_item(line: Line) -> dict[str, Any]:
    return {
        "notification_id": line.notification_id,
        "type": line.type,
        "entity": line.entity,
        "group_key": line.group_key,
        "occur_time": line.occurred_at,
        "payload": _object(line.payload),
    }


def _dumped(job: Job, items: Sequence[Mapping[str, Any]], part: int, parts: int) -> str:
    body = {
        "digest_id": job.id,
        "subscriber": job.subscriber,
        "cadence": job.cadence,
        "close_time": job.closed_at,
        "item_count": len(job.lines),
        "part": part,
        "parts": parts,
        "items": items,
    }
    return json.dumps(body, ensure_ascii=False, separators=(",", ":"))
