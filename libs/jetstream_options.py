"""How a NATS client connects: addresses, credentials, TLS, and when it tries again."""

import random
import ssl
from collections.abc import Mapping
from typing import Any

from libs.jetstream_creds import Credentials
from libs.settings import NatsSettings

RECONNECT_MAX_S = 1.0
"""The longest wait between two tries. Short: once the broker is back, frames should flow, and a try costs one SYN."""

_PING_INTERVAL_S = 10  # Twice unanswered, the connection is dead.


def connection_options(settings: NatsSettings) -> dict[str, Any]:
    """Arguments of nats-py's `connect`, except for name and the callbacks of the connection."""
    credentials = Credentials(settings.creds_file) if settings.creds_file else None
    return {
        "servers": list(settings.url),
        "user": settings.user,
        "password": settings.password.get_secret_value() if settings.password else None,
        "token": settings.token.get_secret_value() if settings.token else None,
        "user_jwt_cb": credentials.jwt if credentials else None,
        "signature_cb": credentials.signature if credentials else None,
        "tls": _tls(settings),
        "connect_timeout": max(1, round(settings.connect_timeout.total_seconds())),
        "max_reconnect_attempts": -1,
        "reconnect_time_wait": random.uniform(0.2, 0.6),  # Between tries before the first connection only.
        "reconnect_to_server_handler": _choose_server,
        "ping_interval": _PING_INTERVAL_S,
    }


def _choose_server(servers: list[Any], _info: Mapping[str, Any]) -> tuple[Any, float]:
    """A random server after a random delay that grows with the tries, so that clients do not come back in step."""
    server = random.choice(servers)
    return server, random.uniform(0, min(RECONNECT_MAX_S, 0.05 * 2 ** min(server.reconnects, 10)))


def _tls(settings: NatsSettings) -> ssl.SSLContext | None:
    if not (settings.tls_ca_file or settings.tls_cert_file or any(url.startswith("tls") for url in settings.url)):
        return None
    context = ssl.create_default_context(cafile=settings.tls_ca_file)
    if settings.tls_cert_file:
        context.load_cert_chain(settings.tls_cert_file, settings.tls_key_file)
    return context
