"""What a template is tried with when nobody gives anything: an order, or three. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final

from libs.ids import derived_id
from services.digest.catalog import IMMEDIATE, Style, Template
from services.digest.rendering_jobs import Job, Line, Source
from services.digest.templates import LAYOUT

SAMPLE_TYPE: Final = "example/order-placed"

_PAYLOADS: Final = (
    '{"title":"Order 1007 was placed","customer":"Ada & Sons","total":1234.5,"due":"2026-03-01"}',
    '{"title":"Order 1008 was placed","customer":"Søren <Ltd>","total":99.9,"note":"Leave it at the door, please."}',
    '{"title":"Order 1009 was placed","customer":"三木","total":7}',
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """An item to try a template with; `type` is empty where the template says it."""

    type: str = ""
    entity: str = ""
    group_key: str = ""
    payload: str = "{}"
    occurred_at: datetime | None = None


def sample_job(
    tenant: str, template: Template, samples: Sequence[Sample], *, zone: str, locale: str, now: datetime
) -> Job:
    """The message that the template would write: of a type in full style, and of digest/immediate, one sent alone."""
    is_layout = template.id == LAYOUT or template.id.startswith(f"{LAYOUT}/")
    cadence = template.id.removeprefix(LAYOUT).strip("/") if is_layout else ""
    is_alone = cadence == IMMEDIATE if is_layout else template.style is Style.FULL
    own_type = SAMPLE_TYPE if is_layout else template.id
    given = samples or _built_in(now)
    lines = [
        Line(
            str(derived_id("sample", str(number))),
            sample.type or own_type,
            _name(sample.type or own_type),
            sample.entity,
            sample.group_key,
            (sample.occurred_at or now).isoformat(),
            sample.payload,
        )
        for number, sample in enumerate(given[:1] if is_alone else given)
    ]
    spoken = f", {template.locale}" if template.locale else ""
    source = Source(f"{template.id} ({template.format}, {template.style}{spoken})", template.subject, template.body)
    place = f"layout/{template.format}" if is_layout else f"item/{template.format}/{template.id}"
    return Job(
        tenant=tenant,
        id=str(derived_id("sample", template.id)),
        is_alone=is_alone,
        format=template.format.value,
        style=template.style.value,
        subscriber="sample",
        zone=zone or "UTC",
        locale=locale or template.locale or "en",
        cadence=IMMEDIATE if is_alone else cadence or "daily",
        cadence_name="",
        closed_at=now.isoformat(),
        lines=lines,
        templates={place: source},
    )


def _built_in(now: datetime) -> Sequence[Sample]:
    return [
        Sample(entity=f"order:{1007 + number}", payload=payload, occurred_at=now - timedelta(hours=3 - number))
        for number, payload in enumerate(_PAYLOADS)
    ]


def _name(type_id: str) -> str:
    words = type_id.rpartition("/")[2].replace("-", " ").replace(".", " ").replace("_", " ").strip()
    return words[:1].upper() + words[1:] or type_id
