"""What the connection to NATS tells Prometheus. Labels: streams that this process declares, by name."""

from prometheus_client import Counter, Gauge

CONNECTED = Gauge("carillon_nats_connected", "1 while this process is connected to NATS, otherwise 0.")
RECONNECTS = Counter("carillon_nats_reconnects_total", "Connections to NATS made after the first.")
STREAM_PRESENT = Gauge(
    "carillon_jetstream_stream_present",
    "1 when JetStream had the stream as declared, the last time this process looked; 0 when it could not make sure.",
    ["stream"],
)
