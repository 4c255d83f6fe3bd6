"""From items to messages."""

import json
from dataclasses import replace
from email.message import EmailMessage
from html.parser import HTMLParser
from typing import Any

import pytest

from services.digest.rendering import MESSAGE_BYTES, BadTemplate, check_template, one_line, render
from services.digest.rendering_jobs import Job, Line, Rendered, Source


def line(number: int = 1, type: str = "flight.delayed", **payload: Any) -> Line:  # noqa: A002 - the contract's word.
    """An item at 12:15 UTC."""
    name = type.replace(".", " ").capitalize()
    return Line(f"id-{number}", type, name, f"UA{number}", "", "2026-07-09T12:15:00+00:00", json.dumps(payload))


def job(*lines: Line, **fields: Any) -> Job:
    """A daily HTML digest for New York."""
    values: dict[str, Any] = {
        "id": "digest-1",
        "is_alone": False,
        "format": "html",
        "style": "summary",
        "subscriber": "ann",
        "zone": "America/New_York",
        "locale": "en",
        "cadence": "daily",
        "cadence_name": "Daily at 08:00",
        "closed_at": "2026-07-10T12:00:00+00:00",
        "lines": lines,
    }
    return Job(**(values | fields))


def test_a_digest_has_html_with_a_text_twin_and_groups_by_type() -> None:
    """Each type is headed by its name and number; times are in the subscriber's zone."""
    (part,) = render(job(line(1, "airport.closed"), line(2, delay_minutes=40), line(3))).parts
    assert part.subject == "Daily at 08:00: 2 × Flight delayed and 1 more"
    assert "Flight delayed (2)" in part.text
    assert "Airport closed (1)" in part.text
    assert "Delay minutes: 40" in part.text
    assert "Thu 9 Jul 2026, 08:15" in part.text
    assert "Thu 9 Jul 2026, 08:15" in part.html
    assert part.json == ""


def test_the_html_is_well_formed() -> None:
    """Every tag that opens closes, in both layouts and styles."""
    for one in (job(line(1, a=1), line(2)), job(line(1, a=1), is_alone=True, style="full", cadence="immediate")):
        (part,) = render(one).parts
        assert _unclosed(part.html) == []


class _Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def _unclosed(html: str) -> list[str]:
    tags = _Tags()
    tags.feed(html)
    return tags.open


def test_a_payload_is_escaped_in_html_and_plain_in_text() -> None:
    """Script in a payload is shown, not run; so is markup in ids."""
    nasty = "<script>alert(1)</script>"
    one = line(1, note=nasty)._replace(entity="<b>UA1</b>")
    (part,) = render(job(one)).parts
    assert "<script>" not in part.html
    assert "&lt;script&gt;" in part.html
    assert "<b>UA1" not in part.html
    assert nasty in part.text


def test_a_subject_is_one_line_whatever_the_payload_says() -> None:
    """Header injection through a title: line ends become spaces, and email's own check agrees."""
    one = line(1, title="Hello\r\nBcc: everybody@example.com\u2028x")
    (part,) = render(job(one, is_alone=True, style="full")).parts
    assert part.subject == "Hello Bcc: everybody@example.com x"
    EmailMessage()["Subject"] = part.subject


def test_a_long_or_empty_subject_is_cut_or_filled() -> None:
    """At most 240 characters, never empty."""
    assert len(one_line("x" * 1000)) == 240
    assert one_line("\r\n") == "Notification"


def test_a_digest_too_large_for_one_message_is_split_the_same_way_each_time() -> None:
    """Every item is in exactly one part, in order; parts are numbered and below the limit."""
    lines = [line(number, note="n" * 500) for number in range(2000)]
    first, second = render(job(*lines)), render(job(*lines))
    assert first == second
    count = len(first.parts)
    assert count > 1
    assert first.parts[1].subject.endswith(f"(2 of {count})")
    assert all(sum(len(text.encode()) for text in part) <= MESSAGE_BYTES for part in first.parts)
    shown = [row.split()[1] for part in first.parts for row in part.text.splitlines() if row.startswith("- ")]
    assert shown == [f"UA{number}" for number in range(2000)]


def test_an_item_with_the_largest_payload_still_fits() -> None:
    """64 KiB of characters that all need escaping."""
    rendered = render(job(line(1, **{f"field_{n}": "<" * 1500 for n in range(40)}), is_alone=True, style="full"))
    assert rendered.error == ""
    assert len(rendered.parts) == 1


def test_a_webhook_gets_its_items_as_json() -> None:
    """The body says what it is; payloads are objects, in parts when they are many."""
    rendered = render(job(line(1, delay=5), line(2), format="json", cadence="hourly"))
    body = json.loads(rendered.parts[0].json)
    assert (body["digest_id"], body["subscriber"], body["cadence"], body["part"], body["parts"]) == (
        *("digest-1", "ann", "hourly"),
        *(1, 1),
    )
    assert body["items"][0] == {
        "notification_id": "id-1",
        "type": "flight.delayed",
        "entity": "UA1",
        "group_key": "",
        "occur_time": "2026-07-09T12:15:00+00:00",
        "payload": {"delay": 5},
    }


def test_a_tenants_templates_write_items_layout_and_subject() -> None:
    """Each place that has a template of its own uses it; a payload's field named like a dict's method is a field."""
    own = {
        "item/html/flight.delayed": Source("t", "", "<li>{{ item.payload.items }} {{ item.payload.gone.deeper }}</li>"),
        "layout/html": Source("l", "Hi {{ subscriber.id }}", "<ul>{% for i in items %}{{ i.body }}{% endfor %}</ul>"),
    }
    rendered = render(job(line(1, items="A & B"), templates=own))
    assert rendered.error == ""
    assert rendered.parts[0].html == "<ul><li>A &amp; B </li></ul>"
    assert rendered.parts[0].subject == "Hi ann"
    assert "Daily at 08:00: 1 notification" in rendered.parts[0].text


@pytest.mark.parametrize(
    "body",
    [
        "\n{{ 1 / 0 }}",
        "\n{{ item.payload.__class__.__mro__ }}{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "\n{% for a in range(100000) %}xxxxxxxxxxxxxxxxxxxx{% endfor %}",
        "\n{% do x %}",
        "\n{{ item.payload.update({}) }}{{ nothing() }}",
    ],
)
def test_a_template_that_fails_is_replaced_by_the_built_in_one(body: str) -> None:
    """Errors, forbidden attributes and too much output: the message goes out, the error says which template."""
    own = {"item/html/flight.delayed": Source("flight.delayed (html)", "", body)}
    rendered = render(job(line(1), templates=own))
    plain = render(job(line(1)))
    assert rendered.parts == plain.parts
    assert rendered.error != ""


def test_an_error_names_template_and_line() -> None:
    """As people need it to mend the template."""
    own = {"layout/html": Source("digest (html)", "", "one\ntwo\n{{ 1 / 0 }}")}
    error = render(job(line(1), templates=own)).error
    assert error == "template digest (html), line 3: ZeroDivisionError: division by zero"


def test_what_not_even_the_built_in_template_can_render_has_no_parts() -> None:
    """A payload that is no JSON: dead, with the reason."""
    rendered = render(job(line(1)._replace(payload="{")))
    assert rendered.parts == []
    assert "JSONDecodeError" in rendered.error


@pytest.mark.parametrize(
    ("subject", "body", "part", "bad_line"),
    [
        ("", "a\n{% for %}", "body", 2),
        ("{{", "fine", "subject", 1),
        ("", "\n\n{% include 'x' %}", "body", 3),
        ("", "{{ x | nofilter }}", "body", 1),
    ],
)
def test_a_template_that_does_not_compile_is_refused_with_its_line(
    subject: str, body: str, part: str, bad_line: int
) -> None:
    """Syntax, unknown filters and what needs other templates."""
    with pytest.raises(BadTemplate) as caught:
        check_template(Source("t", subject, body), is_html=True)
    assert (caught.value.part, caught.value.line) == (part, bad_line)


def test_jobs_and_results_survive_the_way_to_the_rendering_process() -> None:
    """What comes out of JSON is what went in."""
    own = {"layout/html": Source("l", "s", "b")}
    one = replace(job(line(1, a=1), line(2)), templates=own)
    assert Job.from_wire(json.loads(json.dumps(one.to_wire()))).to_wire() == {**one.to_wire(), "lines": list(one.lines)}
    rendered = render(one)
    assert Rendered.from_wire(json.loads(json.dumps(rendered.to_wire()))) == rendered
