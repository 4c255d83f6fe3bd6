"""Structured logs: a sentence plus fields, one line each, to stderr.

    log = get_logger(__name__)
    log.info("Took over a shard.", shard=7, epoch=12)

JSON lines hold `time` (UTC), `level`, `message`, `service`, `logger`, the trace and span where there are any, and the
fields. Lines of libraries that use the standard `logging` come out the same way. Time here is the machine's own clock:
log lines are compared with those of other software, not with business time.
"""

import logging
import sys
from collections.abc import Mapping, MutableMapping
from typing import Any, TextIO

import structlog
from opentelemetry import trace
from structlog.typing import Processor

from libs.settings import LogFormat, TelemetrySettings

# Loud on levels where we say the same better ourselves.
# The pool logs under the name of our class: two lines per transaction.
_QUIET = ("aiohttp.access", "alembic.runtime.plugins", "hpack", "libs.postgres_pool", "mail.log")


def configure_logs(settings: TelemetrySettings, *, service: str, stream: TextIO | None = None) -> None:
    """Set up logging for the whole process; call it once, first thing. Without a stream it is stderr."""
    stream = stream or sys.stderr
    renderer = _renderer(settings.log_format, stream)
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True, key="time"),
        _AddService(service),
        _add_trace,
    ]
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        wrapper_class=structlog.stdlib.BoundLogger,
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(stream)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*shared, structlog.stdlib.ExtraAdder()],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *renderer],
        )
    )
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(settings.log_level.value.upper())
    for name in _QUIET:
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.captureWarnings(True)


def get_logger(name: str) -> structlog.stdlib.BoundLogger:
    """A logger; `name` is the module's `__name__`. Safe at import: it is configured when first used."""
    logger: structlog.stdlib.BoundLogger = structlog.stdlib.get_logger(name)
    return logger


def _renderer(log_format: LogFormat, stream: TextIO) -> list[Processor]:
    if log_format is LogFormat.CONSOLE or (log_format is LogFormat.AUTO and stream.isatty()):
        # Plain tracebacks: the default shows local variables, and with them callers' payloads.
        plain = structlog.dev.plain_traceback
        return [structlog.dev.ConsoleRenderer(colors=stream.isatty(), timestamp_key="time", exception_formatter=plain)]
    return [
        structlog.processors.format_exc_info,
        structlog.processors.EventRenamer("message"),
        structlog.processors.JSONRenderer(default=str, ensure_ascii=False),
    ]


class _AddService:
    def __init__(self, service: str) -> None:
        self._service = service

    def __call__(self, _logger: Any, _method: str, event: MutableMapping[str, Any]) -> Mapping[str, Any]:
        event.setdefault("service", self._service)
        return event


def _add_trace(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> Mapping[str, Any]:
    """The current trace, so that a log line leads to its trace and back."""
    span = trace.get_current_span().get_span_context()
    if span.is_valid:
        event["trace_id"] = trace.format_trace_id(span.trace_id)
        event["span_id"] = trace.format_span_id(span.span_id)
    return event
