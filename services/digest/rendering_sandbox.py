"""Where templates run: Jinja's immutable sandbox, its filters, and a limit on output. Pure.

No attributes of Python's own, nothing changed, nothing included. Time and memory are limited around the process
(loops_press.py). A missing field is empty text, not an error: payloads vary, and a message with a gap beats none.
"""

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any, Final

from jinja2 import ChainableUndefined, Environment, TemplateSyntaxError, nodes, pass_context, pass_eval_context
from jinja2.environment import Template as JinjaTemplate
from jinja2.nodes import EvalContext
from jinja2.runtime import Context, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from markupsafe import Markup, escape

from services.digest.rendering_jobs import Source
from services.digest.speech import Speech

MESSAGE_BYTES: Final = 240 * 1024
"""Largest message, all formats together: a link frame is 512 KiB."""


HTML_GLUE: Final = " \u00a0·\u00a0 "
TEXT_GLUE: Final = "; "
"""Between fields in one line."""


class BadTemplate(Exception):
    """The template's `part` (subject or body) does not compile; `line` is counted from 1."""

    def __init__(self, message: str, line: int, part: str = "body") -> None:
        super().__init__(message)
        self.line = line
        self.part = part


class TooLarge(Exception):
    """A message is larger than MESSAGE_BYTES and cannot be split further, or a digest too large as a whole."""


def check_template(source: Source, *, is_html: bool) -> None:
    """Raise BadTemplate unless subject and body compile and need nothing that is not there."""
    _check_text(source.subject, "subject", is_html=False)
    _check_text(source.body, "body", is_html=is_html)


def _check_text(text: str, part: str, *, is_html: bool) -> None:
    environment = _SANDBOXES[is_html]
    try:
        tree = environment.parse(text)
        environment.compile(text)
    except TemplateSyntaxError as err:
        raise BadTemplate(err.message or "is not a Jinja template", err.lineno, part) from err
    except RecursionError as err:
        raise BadTemplate("is nested too deeply", 1, part) from err
    for node in tree.find_all((nodes.Include, nodes.Extends, nodes.Import, nodes.FromImport)):
        raise BadTemplate("include, extends and import are not there: a template stands alone", node.lineno, part)


def run(source: Source, text: str, context: Mapping[str, Any], *, is_html: bool = False) -> str:
    """A tenant's text, rendered; raises TooLarge at the first piece beyond MESSAGE_BYTES, and whatever it raises."""
    pieces: list[str] = []
    room = MESSAGE_BYTES
    for piece in _compiled(source.name, text, is_html).generate(context):
        room -= len(piece)
        if room < 0:
            raise TooLarge(f"the output is larger than {MESSAGE_BYTES:,} bytes")
        pieces.append(piece)
    return "".join(pieces)


def run_ours(text: str, context: dict[str, Any], *, is_html: bool = False) -> str:
    """A built-in text, rendered. It needs no sandbox, which costs three quarters of the time."""
    template = _compiled_ours(text, is_html)
    return "".join(template.root_render_func(template.new_context(context)))


@lru_cache(maxsize=512)
def _compiled(name: str, text: str, is_html: bool) -> JinjaTemplate:
    environment = _SANDBOXES[is_html]
    code = environment.compile(text, filename=f"template {name}")
    return JinjaTemplate.from_code(environment, code, environment.globals)


@lru_cache(maxsize=64)
def _compiled_ours(text: str, is_html: bool) -> JinjaTemplate:
    # No globals: they would be copied for every item.
    return JinjaTemplate.from_code(_OURS[is_html], _OURS[is_html].compile(text), {})


# Filters


def brief(text: str, longest: int) -> str:
    """The text, cut to `longest` characters."""
    return text if len(text) <= longest else text[: longest - 1] + "…"


@pass_eval_context
def listed(setting: EvalContext, fields: Sequence[Any], most: int = 6, longest: int = 80) -> str:
    """The first `most` of an item's fields in one line; written here because a loop in a template costs ten times."""
    texts = [f"{field.label}: {brief(field.value, longest)}" for field in fields[:most]]
    return escape(HTML_GLUE.join(texts)) if setting.autoescape else TEXT_GLUE.join(texts)


@pass_eval_context
def bodies(setting: EvalContext, items: Sequence[Any]) -> str:
    """What was written of the items, one after the other."""
    written = "".join([item.body for item in items])
    return Markup(written) if setting.autoescape else written  # noqa: S704 - each of them is Markup.


def _spoken(write: Callable[..., str]) -> Callable[..., str]:
    """A method of Speech as a filter, in the language and zone of the one who is told."""

    @pass_context
    def spoken(context: Context, value: Any, *args: Any, **options: Any) -> str:
        # Of the parent: what a template sets is not what we gave it.
        return "" if isinstance(value, Undefined) else write(context.parent["speech"], value, *args, **options)

    return spoken


@pass_context
def _relative(context: Context, value: Any, now: datetime | None = None) -> str:
    speech: Speech = context.parent["speech"]
    return "" if isinstance(value, Undefined) else speech.relative(value, now or context.parent["digest"]["closed"])


_FILTERS: Final[Mapping[str, Callable[..., str]]] = {
    "brief": brief,
    "listed": listed,
    "bodies": bodies,
    "date": _spoken(Speech.day),
    "time": _spoken(Speech.clock),
    "datetime": _spoken(Speech.moment),
    "when": _spoken(Speech.moment),
    "number": _spoken(Speech.number),
    "currency": _spoken(Speech.currency),
    "percent": _spoken(Speech.percent),
    "relative": _relative,
}


# Environments


class _Sandbox(ImmutableSandboxedEnvironment):
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
    environment.filters.update(_FILTERS)
    return environment


_SANDBOXES = {is_html: _environment(_Sandbox, is_html=is_html) for is_html in (False, True)}
_OURS = {is_html: _environment(Environment, is_html=is_html) for is_html in (False, True)}
