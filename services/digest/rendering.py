"""From a job to messages: Jinja templates in a sandbox, HTML with a plain-text twin, JSON, and parts. Pure.

Every item is rendered for itself; the pieces are packed into parts by their size; each part gets the layout around
it, and is handed out before the next one is written. So the split depends on the content alone, the same job always
gives the same parts, and a digest of any size needs the memory of its items and of one part.

What a tenant's template may do is bounded three times: Jinja's immutable sandbox, a limit on output (both in
rendering_sandbox.py; on a whole digest here), and a process of its own with limits on time and memory around it
(loops_press.py). When it fails, the built-in template writes the message, and the error is kept beside the digest:
nobody waits for a template.
"""

import traceback
import unicodedata
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any, Final
from zoneinfo import ZoneInfo

import msgspec
from markupsafe import Markup

from services.digest import builtin_templates as builtin
from services.digest.builtin_formatted import framed
from services.digest.builtin_items import ITEMS
from services.digest.rendering_jobs import Job, Part, Rendered, Source
from services.digest.rendering_sandbox import MESSAGE_BYTES, TooLarge, brief, run, run_ours
from services.digest.rendering_views import Groups, ItemView, is_collapsed, kinds_of
from services.digest.speech import Speech

PART_BYTES: Final = 120 * 1024
"""Items of one part, all formats together; the layout comes on top."""
MAX_SUBJECT: Final = 240
DIGEST_BYTES: Final = 32 << 20
"""All messages of a digest that is not written by our templates alone; ours write no more than the items hold."""
_SPLITS: Final = 6

Pieces = Generator[Part | None, None, str]
"""Parts in order; None takes back all that came before. Returns why the tenant's templates were not used, or ""."""


def render(job: Job) -> Rendered:
    """Render a job with the tenant's templates, else with the built-in ones, else not at all; never raises."""
    return Rendered.collected(job.id, pieces(job))


def pieces(job: Job) -> Pieces:
    """What `render` gives, as it is written."""
    error = ""
    if job.has_own:
        try:
            yield from _parts(job, job.templates)
        except Exception as err:  # noqa: BLE001 - a template is a program, and may fail in any way.
            error = explained(err)
            yield None
        else:
            return ""
    try:
        yield from _parts(job.with_ours_only() if error else job, {})
    except Exception as err:  # noqa: BLE001 - the outermost frame of rendering: the error is the answer.
        yield None
        return f"{error}; then the built-in template: {explained(err)}".strip("; ")
    return error


def explained(error: Exception) -> str:
    """What went wrong and in which line of which template, at most 500 characters."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename.startswith("template ")]
    place = f"{frames[-1].filename}, line {frames[-1].lineno}: " if frames else ""
    return f"{place}{type(error).__name__}: {error}"[:500]


def _parts(job: Job, templates: Mapping[str, Source]) -> Iterator[Part | None]:
    writer = _Writer(job, templates)
    room = PART_BYTES
    for _ in range(_SPLITS):
        left = DIGEST_BYTES
        for part in writer.parts(room):
            if _is_too_large(part):
                yield None
                break
            if writer.has_own:
                left = _less(left, _bytes_of(part))
            yield part
        else:
            return
        room //= 2
    raise TooLarge(f"a message is larger than {MESSAGE_BYTES:,} bytes and cannot be split further")


def _is_too_large(part: Part) -> bool:
    # No character has more than four bytes; most parts are so small that this says enough.
    is_long = sum(map(len, part)) * 4 > MESSAGE_BYTES
    return is_long and _bytes_of(part) > MESSAGE_BYTES


def _bytes_of(texts: Iterable[str]) -> int:
    return sum(len(text.encode()) for text in texts)


def _less(room: int, used: int) -> int:
    """What is left of a digest's bytes; raises TooLarge when that is nothing."""
    if used > room:
        raise TooLarge(f"the digest is larger than {DIGEST_BYTES:,} bytes")
    return room - used


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
        self._is_json = job.format == "json"
        # Of all items, so that nothing has to be looked up for each.
        self.has_own = job.has_own
        self._is_ours = not (self._is_json or self.has_own)
        collapses = is_collapsed(style=job.style, text_format=job.format, is_alone=job.is_alone)
        self._groups = Groups(job.lines, is_collapsed=collapses)
        speech = Speech(job.locale, job.zone)
        self._views = [ItemView(line, speech) for line in self._groups.shown(job.lines)]
        self._digest: dict[str, Any] = {
            "id": job.id,
            "cadence": job.cadence,
            "name": job.cadence_name or job.cadence,
            "locale": job.locale,
            "closed": datetime.fromisoformat(job.closed_at).astimezone(ZoneInfo(job.zone)),
            "count": len(job.lines),
            "kinds": kinds_of(job.lines),
            "part": 1,
            "parts": 1,
        }
        subscriber = {"id": job.subscriber, "zone": job.zone, "locale": job.locale}
        self._context = {"speech": speech, "subscriber": subscriber, "digest": self._digest}
        self._bodies = [*(self._bounded() if self.has_own else map(self._written, self._views))]
        self._sizes = [len("".join(bodies).encode()) for bodies in self._bodies]

    def _bounded(self) -> Iterator[Sequence[str]]:
        """All items; raises TooLarge when they are larger than a digest may be."""
        left = DIGEST_BYTES
        for view in self._views:
            bodies = self._written(view)
            left = _less(left, _bytes_of(bodies))
            yield bodies

    def _written(self, view: ItemView) -> Sequence[str]:
        """The item in each of the job's formats, its own first."""
        if self._is_ours:
            written = ITEMS[self._job.style](view)
            bodies: Sequence[str] = written if self._job.format == "html" else (written.text,)
        else:
            bodies = [self._item(view, text_format) for text_format in self._formats()]
        view._forget()
        return bodies

    def _formats(self) -> Sequence[str]:
        return ("html", "text") if self._job.format == "html" else (self._job.format,)

    def parts(self, room: int) -> Iterator[Part]:
        """The messages, their items packed into `room` bytes each."""
        runs = _packed(self._sizes, room)
        before: Counter[tuple[str, str]] = Counter()
        for number, one in enumerate(runs, start=1):
            yield self._part(one, number, len(runs), before)
            before.update((view.type, view.group_key) for view in self._views[one.start : one.stop])

    def _part(self, one: range, number: int, of: int, before: Mapping[tuple[str, str], int]) -> Part:
        views = self._views[one.start : one.stop]
        context = self._context | {
            "digest": self._digest | {"part": number, "parts": of},
            "items": views,
            "item": views[0],
            "groups": self._groups.of(views, before),
        }
        texts = dict.fromkeys(("html", "text", "json"), "")
        for place, text_format in enumerate(self._formats()):
            is_safe = text_format == "html" and f"layout/{text_format}" in self._templates
            for view, bodies in zip(views, self._bodies[one.start : one.stop], strict=True):
                # Our own layout needs no Markup, since its filter makes it of all bodies at once.
                view.body = Markup(bodies[place]) if is_safe else bodies[place]  # noqa: S704 - it comes of autoescape.
            texts[text_format] = self._layout(context, text_format)
        subject = one_line(self._subject(context, views[0]))
        for view in views:
            view.body = ""
            view._forget()
        return Part(subject=f"{subject[: MAX_SUBJECT - 20]} ({number} of {of})" if of > 1 else subject, **texts)

    def _item(self, view: ItemView, text_format: str) -> str:
        if (fragment := view.fragment(text_format)) is not None:
            return framed(fragment, text_format)
        source = self._templates.get(f"item/{text_format}/{view.type}")
        if source is not None:
            written = run(source, source.body, self._context | {"item": view}, is_html=text_format == "html")
            return _checked(text_format, written)
        if text_format == "json":
            return _dumped(_json_item(view))
        ours = ITEMS[self._job.style](view)
        return ours.html if text_format == "html" else ours.text

    def _layout(self, context: dict[str, Any], text_format: str) -> str:
        source = self._templates.get(f"layout/{text_format}")
        if source is not None:
            return _checked(text_format, run(source, source.body, context, is_html=text_format == "html"))
        if text_format == "json":
            return self._json_layout(context)
        alone, many = (
            (builtin.ALONE_HTML, builtin.DIGEST_HTML)
            if text_format == "html"
            else (builtin.ALONE_TEXT, builtin.DIGEST_TEXT)
        )
        return run_ours(alone if self._job.is_alone else many, context, is_html=text_format == "html")

    def _json_layout(self, context: dict[str, Any]) -> str:
        job = self._job
        head = {
            "digest_id": job.id,
            "subscriber": job.subscriber,
            "cadence": job.cadence,
            "close_time": job.closed_at,
            "item_count": len(job.lines),
            "part": context["digest"]["part"],
            "parts": context["digest"]["parts"],
        }
        items = ",".join(view.body for view in context["items"])
        return f'{_dumped(head)[:-1]},"items":[{items}]}}'

    def _subject(self, context: dict[str, Any], first: ItemView) -> str:
        """The layout's, else for one sent alone the item's, else the built-in one. HTML's own before its twin's."""
        own = [f"layout/{self._job.format}", "layout/text"]
        if self._job.is_alone:
            own += [f"item/{self._job.format}/{first.type}", f"item/text/{first.type}"]
        for source in (self._templates.get(place) for place in own):
            if source is not None and source.subject:
                return run(source, source.subject, context)
        is_titled = self._job.is_alone and not self._is_json
        return run_ours(builtin.ALONE_SUBJECT if is_titled else builtin.DIGEST_SUBJECT, context)


def one_line(text: str) -> str:
    """A header's value: no line ends or other control characters (header injection), at most MAX_SUBJECT characters."""
    if text.isprintable():
        return brief(" ".join(text.split()), MAX_SUBJECT) or "Notification"
    visible = "".join(" " if unicodedata.category(char) in ("Cc", "Zl", "Zp") else char for char in text)
    return brief(" ".join(visible.split()), MAX_SUBJECT) or "Notification"


# JSON


def _json_item(view: ItemView) -> dict[str, Any]:
    return {
        "notification_id": view.id,
        "type": view.type,
        "entity": view.entity,
        "group_key": view.group_key,
        "occur_time": view.occurred_at,
        "payload": msgspec.Raw(view.payload_text.encode()),
    }


def _dumped(value: Any) -> str:
    return msgspec.json.encode(value).decode()


def _checked(text_format: str, text: str) -> str:
    """The same text; raises DecodeError when it should be JSON and is not, NaN and Infinity included."""
    if text_format == "json":
        msgspec.json.decode(text)
    return text
