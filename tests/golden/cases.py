"""The messages whose renderings are kept beside this file; what they look like is under docs/renderings/."""

import json
from typing import Any, Final

from services.digest.formatting_answers import fragment_of
from services.digest.rendering_jobs import Job, Line


def _line(number: int, type_id: str, name: str, at: str, *, key: str = "", **payload: Any) -> Line:
    one_id = f"00000000-0000-7000-8000-{number:012d}"
    return Line(one_id, type_id, name, f"flight:UA{number}", key, at, json.dumps(payload))


def _job(*lines: Line, **fields: Any) -> Job:
    values: dict[str, Any] = {
        "tenant": "acme",
        "id": "00000000-0000-7000-8000-0000000000aa",
        "is_alone": False,
        "format": "html",
        "style": "summary",
        "subscriber": "ann@example.com",
        "zone": "America/New_York",
        "locale": "en",
        "cadence": "daily",
        "cadence_name": "Flights, daily at 08:00",
        "closed_at": "2026-07-10T12:00:00+00:00",
        "lines": lines,
    }
    return Job(**(values | fields))


_CHANGES: Final = [
    _line(
        number,
        "gate.changed",
        "Gate changed",
        f"2026-07-09T{12 + number}:05:00+00:00",
        key="Newark (EWR)",
        title=f"UA{number} leaves from gate C{number}",
        gate=f"C{number}",
    )
    for number in range(1, 8)
]
_DELAYS: Final = [
    _line(
        20,
        "flight.delayed",
        "Flight delayed",
        "2026-07-09T12:15:00+00:00",
        title="UA1714 to Houston is 40 minutes late",
        delay_minutes=40,
        new_departure="2026-07-09T13:45:00Z",
        reason="Late incoming aircraft",
    ),
    _line(
        21,
        "flight.delayed",
        "Flight delayed",
        "2026-07-09T18:00:00+00:00",
        title="B6 725 to San Juan is 95 minutes late",
        delay_minutes=95,
        new_departure="2026-07-09T20:10:00Z",
        compensation=1234.5,
    ),
]
_HOSTILE: Final = _line(
    30,
    "note.added",
    "Note <b>added</b>",
    "2026-07-09T23:30:00+00:00",
    title='<script>alert("title")</script>\r\nBcc: everybody@example.com',
    note='<img src=x onerror=alert(1)> "quotes" & </td></table>',
    link="https://example.com/" + "averylongpathwithoutanybreak" * 6,
    nested={"a": [1, 2, "<i>"]},
)

# What a business service wrote, some of which is not shown.
_WRITTEN: Final = """\
<h3 style="margin:0 0 4px;font-size:16px" class="foot">Boarding moves to 14:20</h3>
<script>alert(1)</script><table style="position:fixed;border-collapse:collapse" onmouseover="alert(1)">
<tr><td style="padding:2px 12px 2px 0;color:#667085">Gate</td><td><b>C4</b> &rarr; C17</td></tr>
<tr><td style="padding:2px 12px 2px 0;color:#667085">Seat</td><td>12A</table>
<p style="margin:8px 0 0"><a href="https://flights.example/ua1714" style="color:#175cd3">See your trip</a>
<a href="javascript:alert(1)">or not</a></div></td></tr></table><!-- and everything after it"""
_FORMATTED: Final = _DELAYS[0]._replace(
    formatted={
        "html": fragment_of("html", json.dumps(_WRITTEN).encode()) or "",
        "text": fragment_of("text", json.dumps("Boarding moves to 14:20\n  Gate C4 -> C17").encode()) or "",
    }
)

CASES: Final = {
    "digest": _job(*_DELAYS, *_CHANGES),
    "digest-full-german": _job(
        *_DELAYS, *_CHANGES[:2], style="full", locale="de-DE", zone="Europe/Berlin", cadence_name="Flüge, täglich"
    ),
    "alone": _job(
        _DELAYS[0],
        is_alone=True,
        style="full",
        locale="en-GB",
        zone="Europe/London",
        cadence="immediate",
        cadence_name="",
    ),
    "formatted": _job(_FORMATTED, _DELAYS[1]),
    "hostile": _job(_HOSTILE, is_alone=True, style="full", cadence="immediate", cadence_name=""),
}
