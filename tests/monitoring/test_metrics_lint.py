"""What promtool says of our metrics; tests/unit/test_metrics_names.py checks the same without it."""

import subprocess
import sys
from pathlib import Path

from tools.prometheus import program

ROOT = Path(__file__).resolve().parents[2]

_SHOW = """
import sys
from prometheus_client import CollectorRegistry, REGISTRY, disable_created_metrics, generate_latest
from libs.rpc_metrics import RpcMetrics
from libs.telemetry.http import add_build_info
from tools.metrics_doc import contracts, start_everything
disable_created_metrics()
start_everything()
calls = RpcMetrics(REGISTRY)
for service, methods in contracts().items():
    calls.know(service, methods)
add_build_info(REGISTRY, service="intake", version="1")
sys.stdout.buffer.write(generate_latest(REGISTRY))
"""


def test_promtool_has_nothing_to_say() -> None:
    """Of all services' metrics at once, as they are shown."""
    shown = subprocess.run([sys.executable, "-c", _SHOW], cwd=ROOT, capture_output=True, check=True, timeout=60).stdout
    assert b"carillon_digest_items_total{" in shown
    ours = b"".join(line for line in shown.splitlines(keepends=True) if b"carillon_" in line)
    command = [str(program("promtool")), "check", "metrics"]
    said = subprocess.run(command, input=ours, capture_output=True, check=False, timeout=60)
    assert (said.returncode, (said.stdout + said.stderr).decode()) == (0, "")
