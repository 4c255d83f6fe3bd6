"""What business services are asked to format, and what of their answers gets into a message."""

import json
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import pytest

from libs.errors import SettingsError
from libs.settings import load
from services.digest.formatting import (
    MOST_BYTES,
    MOST_ITEMS,
    Ask,
    Manner,
    Order,
    answered,
    asks_for,
    put_together,
    services_in,
    wanted_by,
)
from services.digest.formatting_answers import MOST_BYTES as MOST_FRAGMENT_BYTES
from services.digest.formatting_answers import BadFragment, fragment_of
from services.digest.rendering import render
from services.digest.rendering_jobs import Job, Line, Request, Source
from services.digest.settings import DigestSettings

ORDER = Order(
    tenant="acme",
    format="html",
    style="summary",
    is_alone=False,
    zone="Europe/Berlin",
    locale="de",
    lines=(),
    services={"order.placed": "crm"},
)
JOB = Job(
    tenant="acme",
    id="digest-1",
    is_alone=False,
    format="html",
    style="summary",
    subscriber="ann",
    zone="UTC",
    locale="en",
    cadence="daily",
    cadence_name="Daily",
    closed_at="2026-07-10T12:00:00+00:00",
    lines=(),
)


def line(number: int = 1, kind: str = "order.placed", group_key: str = "", payload: str = '{"total": 1.10}') -> Line:
    """An item."""
    name = kind.capitalize()
    return Line(f"id-{number}", kind, name, f"order:{number}", group_key, "2026-07-09T12:15:00+00:00", payload)


def ask(text_format: str = "html", *lines: Line) -> Ask:
    """A request."""
    order = ORDER._replace(format=text_format, lines=lines or (line(),))
    return next(one for one in asks_for(_wanted(order)) if one.manner.format == text_format)


def _wanted(*orders: Order) -> dict[Manner, dict[bytes, Line]]:
    found: dict[Manner, dict[bytes, Line]] = {}
    for order in orders:
        for manner, one, key in wanted_by(order):
            found.setdefault(manner, {})[key] = one
    return found


def html(written: str) -> str:
    """What becomes of a service's HTML."""
    fragment = fragment_of("html", json.dumps(written).encode())
    assert fragment is not None
    return fragment


# What is asked


def test_html_is_asked_for_with_its_text_twin_and_others_types_are_not() -> None:
    """One request per format; the Accept header names format and style."""
    wanted = _wanted(ORDER._replace(lines=[line(1), line(2, "flight.delayed")]))
    assert [one.accept for one in wanted] == [
        "NotificationFormat/html; style=summary",
        "NotificationFormat/text; style=summary",
    ]
    assert [[one.notification_id for one in lines.values()] for lines in wanted.values()] == [["id-1"], ["id-1"]]
    assert [one.accept for one in _wanted(ORDER._replace(format="json", style="full", lines=[line()]))] == [
        "NotificationFormat/json; style=full"
    ]


def test_a_service_is_told_the_item_and_the_language_but_not_who_reads_it() -> None:
    """The payload to the letter, so that no number loses a digit; an empty one is an empty object."""
    one = ask("text", line(1, payload='{"total": 1.10}'), line(2, payload=""))
    assert b'"payload":{"total": 1.10}' in one.body()
    assert json.loads(one.body()) == {
        "tenant": "acme",
        "locale": "de",
        "zone": "Europe/Berlin",
        "items": [
            {
                "notification_id": f"id-{number}",
                "type": "order.placed",
                "entity": f"order:{number}",
                "group_key": "",
                "occur_time": "2026-07-09T12:15:00+00:00",
                "payload": payload,
            }
            for number, payload in ((1, {"total": 1.1}), (2, {}))
        ],
    }


def test_what_a_summary_only_counts_is_not_asked_for() -> None:
    """Of thirty items with one group key a summary shows twenty; JSON shows them all."""
    order = ORDER._replace(lines=[line(number, group_key="one") for number in range(30)])
    assert {len(lines) for lines in _wanted(order).values()} == {20}
    assert {len(lines) for lines in _wanted(order._replace(format="json")).values()} == {30}


def test_an_item_is_asked_about_once_for_all_who_read_it_alike() -> None:
    """Another zone, language, style or tenant is another question."""
    order = ORDER._replace(format="text", lines=[line()])
    others = [
        order._replace(zone="UTC"),
        order._replace(locale="en"),
        order._replace(style="full"),
        order._replace(tenant="globex"),
    ]
    wanted = _wanted(order, order, *others)
    assert [len(lines) for lines in wanted.values()] == [1] * 5
    assert len({key for lines in wanted.values() for key in lines}) == 5


def test_requests_are_few_and_bounded() -> None:
    """By items and by bytes; an item larger than a request goes alone."""
    many = ORDER._replace(format="text", lines=[line(number) for number in range(MOST_ITEMS * 2 + 1)])
    assert [len(one.lines) for one in asks_for(_wanted(many))] == [MOST_ITEMS, MOST_ITEMS, 1]
    large = json.dumps({"text": "x" * (MOST_BYTES // 2)})
    huge = json.dumps({"text": "x" * (MOST_BYTES * 2)})
    payloads = [large, large, huge, "{}"]
    fat = ORDER._replace(format="text", lines=[line(number, payload=one) for number, one in enumerate(payloads)])
    assert [len(one.lines) for one in asks_for(_wanted(fat))] == [1, 1, 1, 1]


def test_the_services_of_a_message_are_those_of_its_items() -> None:
    """Types that it does not hold do not count."""
    order = ORDER._replace(lines=[line()], services={"order.placed": "crm", "flight.delayed": "ops"})
    assert services_in(order) == {"crm"}


# What comes back


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"<html>", "something else than items"),
        (b"[]", "something else than items"),
        (b'{"items": {}}', "something else than items"),
        (b'{"items": []}', "it answered 0 items to 1"),
        (b'{"items": ["a", "b"]}', "it answered 2 items to 1"),
        (b"[" * 100_000, "something else than items"),
    ],
)
def test_an_answer_that_is_none_is_refused_whole(body: bytes, words: str) -> None:
    """With what was wrong; nothing of it is used."""
    with pytest.raises(BadFragment, match=words):
        answered(ask("text"), body)


def test_one_bad_item_does_not_spoil_the_others() -> None:
    """Null leaves an item to the template; so does what is no text, or too long."""
    one = ask("text", line(1), line(2), line(3), line(4))
    came = answered(one, json.dumps({"items": ["good", None, 7, "x" * (MOST_FRAGMENT_BYTES + 1)]}).encode())
    assert not answered(ask("text"), b'{"items": ["\xff"]}').fragments
    assert list(came.fragments.values()) == ["good\n"]
    reasons = list(came.failures.values())
    assert reasons[0] == "it left that to the template"
    assert "something else than text" in reasons[1]
    assert reasons[2] == "it wrote more than 64 KiB for an item"


def test_json_stays_to_the_letter() -> None:
    """Whatever it is, as long as it is JSON."""
    came = answered(ask("json"), b'{"items": [{"total": 1.10, "n": 12345678901234567890}]}')
    assert list(came.fragments.values()) == ['{"total": 1.10, "n": 12345678901234567890}']


def test_text_keeps_its_lines_and_loses_control_characters() -> None:
    """No escape sequences for terminals; it ends with one line end."""
    assert (
        fragment_of("text", json.dumps("a\r\n\tb \x1b[31mc\x00 d\u00a0é 👩‍👩‍👧\n\n").encode())
        == "a\n\tb [31mc d\u00a0é 👩‍👩‍👧\n"
    )


@pytest.mark.parametrize(
    ("written", "kept"),
    [
        ("<b>Order</b> 1007 &amp; more", "<b>Order</b> 1007 &amp; more"),
        ("<script>alert(1)</script>x", "x"),
        ("<p onclick=alert(1)>x</p>", "<p>x</p>"),
        ('<a href="javascript:alert(1)">x</a>', '<a rel="noopener noreferrer">x</a>'),
        ('<a href="https://a.io/?a&amp;b">', '<a href="https://a.io/?a&amp;b" rel="noopener noreferrer"></a>'),
        ('<a href="/relative">x</a>', '<a rel="noopener noreferrer">x</a>'),
        ('<img src="data:image/png;base64,xx">', "<img>"),
        ('<img src="https://crm.example/a.png" alt="a">', '<img src="https://crm.example/a.png" alt="a">'),
        ("<style>*{display:none}</style>x", "x"),
        ('<p style="color:red;position:fixed;background:url(https://t.example)">x</p>', '<p style="color:red">x</p>'),
        ('<p class="line" id="foot">x</p>', "<p>x</p>"),
        ("<form action=https://t.example><input name=password>x</form>", "x"),
        ("<iframe src=https://t.example></iframe>x", "x"),
        ("<meta http-equiv=refresh content=0><link rel=stylesheet href=https://t.example><base href=x>x", "x"),
        ("<svg><script>alert(1)</script></svg>x", "x"),
        ("x<!-- the rest is hidden", "x"),
        ("</div></td></tr></table><h1>x</h1>", "<h1>x</h1>"),
        ("<table><tr><td>x", "<table><tbody><tr><td>x</td></tr></tbody></table>"),
        ("<b><i>x", "<b><i>x</i></b>"),
        ("{{ 7 * 7 }}{% raw %}", "{{ 7 * 7 }}{% raw %}"),
    ],
)  # fmt: skip
def test_of_html_only_what_a_mail_shows_is_left(written: str, kept: str) -> None:
    """Nothing runs, nothing is fetched but pictures, nothing leaves its place, everything is closed."""
    assert html(written) == kept


def test_html_that_would_take_long_to_clean_is_refused() -> None:
    """By the number of its tags, before it is parsed."""
    with pytest.raises(BadFragment, match="more than 2,000 tags"):
        html("<div>" * 2_001)


def test_the_reasons_name_the_service_and_how_much_it_missed() -> None:
    """Of each service the first reason; nothing to say when all came."""
    order = ORDER._replace(
        format="text", lines=[line(1), line(2), line(3, "x")], services={"order.placed": "crm", "x": "ops"}
    )
    keys = [key for _, _, key in wanted_by(order)]
    found = put_together(order, {keys[0]: "one\n"}, {keys[1]: "no answer within 3 s"})
    assert found.error == (
        "crm formatted 1 of 2, templates the rest: no answer within 3 s; "
        "ops formatted 0 of 1, templates the rest: there was no answer in time"
    )
    assert [one.formatted for one in found.lines] == [{"text": "one\n"}, None, None]
    assert put_together(order, dict.fromkeys(keys, "x"), {}).error == ""


# In a message


def formatted(job: Job, *fragments: dict[str, str] | None) -> Job:
    """The job with an item for each."""
    return replace(job, lines=[line(number)._replace(formatted=one) for number, one in enumerate(fragments)])


def test_fragments_stand_where_templates_would_have_written() -> None:
    """In a row of the layout, beside items that have none; with their text twin."""
    job = formatted(JOB, {"html": "<b>by crm</b>", "text": "by crm\n"}, None)
    (part,) = render(job).parts
    assert "<b>by crm</b></div></td></tr>" in part.html
    assert "order:1" in part.html
    assert "by crm\n- order:1" in part.text
    assert part.subject == "Daily: 2 × Order.placed"
    assert _unclosed(part.html) == []


def test_a_fragment_is_data_not_a_template() -> None:
    """What looks like Jinja in it is shown as it is, in tenants' layouts too."""
    job = replace(
        formatted(JOB, {"html": "{{ 7 * 7 }}", "text": "{{ 7 * 7 }}\n"}),
        templates={
            "layout/html": Source("digest", "", "<table>{% for item in items %}{{ item.body }}{% endfor %}</table>")
        },
    )
    (part,) = render(job).parts
    assert "{{ 7 * 7 }}" in part.html
    assert "{{ 7 * 7 }}" in part.text


def test_where_only_one_format_came_templates_write_the_other() -> None:
    """The tenant's own before the built-in one."""
    job = replace(
        formatted(JOB, {"html": "by crm"}), templates={"item/text/order.placed": Source("t", "", "by template\n")}
    )
    (part,) = render(job).parts
    assert "by crm" in part.html
    assert "by template" in part.text


def test_a_service_writes_no_subject() -> None:
    """Of a message sent alone it is the template's, or the built-in one."""
    job = replace(formatted(JOB, {"html": "x\r\nBcc: eve@example.com", "text": "x\n"}), is_alone=True, style="full")
    assert render(job).parts[0].subject == "order:0"


def test_json_of_a_service_takes_the_place_of_the_item() -> None:
    """Among the others."""
    job = replace(formatted(JOB, {"json": '{"total": 1.10}'}, None), format="json")
    (part,) = render(job).parts
    assert '"items":[{"total": 1.10},{"notification_id":"id-1"' in part.json


def test_fragments_give_way_when_the_message_cannot_be_written() -> None:
    """A layout that fails leaves everything to the built-in templates, as it always does."""
    job = replace(
        formatted(JOB, {"html": "by crm", "text": "by crm\n"}),
        templates={"layout/html": Source("digest", "", "{{ 1 // 0 }}")},
    )
    rendered = render(job)
    assert "ZeroDivisionError" in rendered.error
    assert "by crm" not in rendered.parts[0].html
    assert "order:0" in rendered.parts[0].html


def test_fragments_travel_to_the_process_that_renders() -> None:
    """With their lines."""
    job = formatted(JOB, {"html": "x"}, None)
    wire = Request(limit_s=1.0, job=job).to_wire()
    next(iter(wire))
    assert [one.formatted for one in Job.from_wire(iter(wire)).lines] == [{"html": "x"}, None]


# Settings


def test_services_are_registered_by_the_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    """A JSON object in the environment; a wrong one is refused at the start, and names the setting."""
    monkeypatch.setenv("CARILLON_DIGEST_FORMATTING_SERVICES", '{"crm": "https://crm.example/n"}')
    assert load(DigestSettings).formatting_services == {"crm": "https://crm.example/n"}
    monkeypatch.setenv("CARILLON_DIGEST_FORMATTING_SERVICES", '{"crm": "https://ann:hunter2@crm.example"}')
    with pytest.raises(SettingsError, match="crm: must not hold credentials") as caught:
        load(DigestSettings)
    assert "hunter2" not in caught.value.message


class _Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None: ...

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def _unclosed(text: str) -> list[str]:
    tags = _Tags()
    tags.feed(text)
    return tags.open
