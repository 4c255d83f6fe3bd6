"""Which of a tenant's templates a message is written with. Pure.

For each place the first that exists counts: the subscriber's locale, its language, no locale; for layouts the cadence's
own, then the one of all digests. A message sent alone has only its cadence's layout (digest/immediate): what suits a
list seldom suits a single item. Where there is none, the built-in template is used.
"""

from collections.abc import Collection, Iterator, Mapping

from services.digest.catalog import IMMEDIATE, Format, Template
from services.digest.rendering_jobs import Source

LAYOUT = "digest"
TemplateKey = tuple[str, str, str, str]
"""Template id, format, style, locale."""


def key_of(template: Template) -> TemplateKey:
    """What a template is stored and found by."""
    return (template.id, template.format.value, template.style.value, template.locale)


def wanted_ids(types: Collection[str], cadence: str) -> set[str]:
    """Ids of all templates that may be used for a message with items of `types`."""
    return {*types, *_layout_ids(cadence)}


def chosen(
    templates: Mapping[TemplateKey, Source],
    *,
    types: Collection[str],
    cadence: str,
    text_format: str,
    style: str,
    locale: str,
) -> dict[str, Source]:
    """The templates for each place of a message (see Job.templates)."""
    if not templates:
        return {}
    places: dict[str, Source] = {}
    # HTML always has a plain-text twin.
    formats = (text_format, Format.TEXT.value) if text_format == Format.HTML else (text_format,)
    for one_format in formats:
        wanted = {f"item/{one_format}/{one}": [one] for one in types} | {f"layout/{one_format}": _layout_ids(cadence)}
        for place, ids in wanted.items():
            keys = ((one, one_format, style, spoken) for one in ids for spoken in _locales(locale))
            found = next((templates[key] for key in keys if key in templates), None)
            if found is not None:
                places[place] = found
    return places


def _layout_ids(cadence: str) -> list[str]:
    return [f"{LAYOUT}/{cadence}"] if cadence == IMMEDIATE else [f"{LAYOUT}/{cadence}", LAYOUT]


def _locales(locale: str) -> Iterator[str]:
    while locale:
        yield locale
        locale = locale.rpartition("-")[0]
    yield ""
