"""Trying a template: what it would write, with nothing stored."""

from collections.abc import Sequence
from dataclasses import replace

import msgspec
from carillon.digest.v1 import digest_pb2 as pb

from libs.clock import Clock
from libs.errors import FailedPrecondition, FieldViolation, InvalidArgument, Violations
from libs.postgres import Database
from libs.rpc_context import Context, tenant_of
from libs.wire import check_count, check_instant, check_text, check_zone
from services.digest import rpc_messages as messages
from services.digest.catalog import Format, Template
from services.digest.formatting import Order
from services.digest.rendering_jobs import Job, Source
from services.digest.rendering_sandbox import BadTemplate
from services.digest.rpc_stores import CatalogStore, Formatter, FormattingStore, Press
from services.digest.rpc_words import check_locale
from services.digest.samples import Sample, sample_job

_MOST_ITEMS = 100
_MOST_PAYLOAD_BYTES = 64 << 10


class PreviewsRpc:
    """A part of DigestService; see rpc.py."""

    def __init__(
        self,
        *,
        db: Database,
        catalog: CatalogStore,
        formatting: FormattingStore,
        formatter: Formatter,
        press: Press,
        clock: Clock,
    ) -> None:
        self._sample_db, self._sample_catalog = db, catalog
        self._sample_press, self._sample_clock = press, clock
        self._sample_formatting, self._sample_formatter = formatting, formatter

    async def PreviewTemplate(self, request: pb.PreviewTemplateRequest, context: Context) -> pb.PreviewTemplateResponse:
        """See the contract."""
        violations = Violations()
        if request.zone:
            check_zone(violations, "zone", request.zone)
        locale = check_locale(violations, "locale", request.locale) if request.locale else ""
        samples = _samples(violations, request.items)
        given: Template | None = None
        if request.template.body:
            given = messages.template(violations, "template", request.template)
        else:
            messages.template_key(violations, "template.", request.template)
        violations.raise_if_any()
        tenant = tenant_of(context)
        template = given or await self._stored(request.template, tenant)
        await check_compiles(self._sample_press, template)
        now = self._sample_clock.now()
        job = sample_job(tenant, template, samples, zone=request.zone, locale=locale, now=now)
        job, formatting_error = await self._formatted(tenant, template, job)
        (rendered,) = await self._sample_press.render([job])
        if not rendered.parts:
            raise FailedPrecondition(f"It cannot be rendered: {rendered.error}", reason="CANNOT_RENDER")
        part = rendered.parts[0]
        return pb.PreviewTemplateResponse(
            subject=part.subject,
            html=part.html,
            text=part.text or part.json,
            parts=len(rendered.parts),
            template_error="; ".join(filter(None, (formatting_error, rendered.error))),
        )

    async def _formatted(self, tenant: str, template: Template, job: Job) -> tuple[Job, str]:
        """The job with the items that services format; not the template's own, which is what is tried."""
        types = {line.type for line in job.lines} - {template.id}
        async with self._sample_db.read() as tx:
            services = await self._sample_formatting.services_of(tx, {(tenant, one) for one in types})
        order = Order(
            tenant=tenant,
            format=job.format,
            style=job.style,
            is_alone=job.is_alone,
            zone=job.zone,
            locale=job.locale,
            lines=job.lines,
            services=services.get(tenant, {}),
        )
        (formatted,) = await self._sample_formatter.format([order])
        return replace(job, lines=formatted.lines), formatted.error

    async def _stored(self, one: pb.Template, tenant: str) -> Template:
        one_id, text_format, style, locale = messages.template_key(Violations(), "template.", one)
        async with self._sample_db.read() as tx:
            return await self._sample_catalog.get_template(tx, tenant, (one_id, text_format, style, locale))


async def check_compiles(press: Press, one: Template) -> None:
    """Raise InvalidArgument with line and reason unless it compiles."""
    try:
        await press.check(Source(one.id, one.subject, one.body), is_html=one.format is Format.HTML)
    except BadTemplate as err:
        raise InvalidArgument(
            [FieldViolation(f"template.{err.part}", f"does not compile: line {err.line}: {err}")],
            reason="BAD_TEMPLATE",
        ) from err


def _samples(v: Violations, items: Sequence[pb.SampleItem]) -> list[Sample]:
    check_count(v, "items", items, least=0, most=_MOST_ITEMS)
    return [_sample(v, f"items[{number}]", item) for number, item in enumerate(items[:_MOST_ITEMS])]


def _sample(v: Violations, field: str, item: pb.SampleItem) -> Sample:
    payload = item.payload or "{}"
    if len(payload.encode()) > _MOST_PAYLOAD_BYTES:
        v.add(f"{field}.payload", f"must be at most {_MOST_PAYLOAD_BYTES:,} bytes")
    else:
        try:
            msgspec.json.decode(payload, type=dict[str, object])
        except (msgspec.DecodeError, RecursionError):
            v.add(f"{field}.payload", "must be a JSON object")
    occurred_at = check_instant(v, f"{field}.occur_time", item.occur_time) if item.HasField("occur_time") else None
    return Sample(
        type=check_text(v, f"{field}.type", item.type, shortest=0, longest=256),
        entity=check_text(v, f"{field}.entity", item.entity, shortest=0, longest=256),
        group_key=check_text(v, f"{field}.group_key", item.group_key, shortest=0, longest=256),
        payload=payload,
        occurred_at=occurred_at,
    )
