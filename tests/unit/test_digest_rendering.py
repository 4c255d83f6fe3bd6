"""From items to messages."""

import json
from dataclasses import replace
from email.message import EmailMessage
from html.parser import HTMLParser
from typing import Any

import pytest

from services.digest.rendering import one_line, render
from services.digest.rendering_jobs import ANSWER_HEAD, Answer, Job, Line, Request, Source
from services.digest.rendering_sandbox import MESSAGE_BYTES, BadTemplate, check_template


def line(number: int = 1, type: str = "flight.delayed", **payload: Any) -> Line:  # noqa: A002 - the contract's word.
    """An item at 12:15 UTC."""
    name = type.replace(".", " ").capitalize()
    return Line(f"id-{number}", type, name, f"UA{number}", "", "2026-07-09T12:15:00+00:00", json.dumps(payload))


def job(*lines: Line, **fields: Any) -> Job:
    """A daily HTML digest for New York."""
    values: dict[str, Any] = {
        "tenant": "acme",
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
    assert "Thu, Jul 9, 2026, 8:15\u00a0AM" in part.text
    assert "Thu, Jul 9, 2026, 8:15\u00a0AM" in part.html
    assert part.json == ""


def test_a_digest_of_large_items_by_the_tenants_template_is_written_by_ours() -> None:
    """Even where the layout leaves them out: all of them together are 40 MB in memory."""
    item, layout = Source("item", "", "{{ 'x' * 200000 }}"), Source("layout", "", "{{ digest.count }}")
    templates = {"item/text/flight.delayed": item, "layout/text": layout}
    large = job(*map(line, range(200)), format="text", templates=templates)
    rendered = render(large)
    assert rendered.error == "TooLarge: the digest is larger than 33,554,432 bytes"
    assert rendered.parts == render(replace(large, templates={})).parts


def test_a_digest_of_large_layouts_by_the_tenants_template_is_written_by_ours() -> None:
    """Its items are small, but there are many parts."""
    item, layout = Source("item", "", "{{ 'x' * 70000 }}"), Source("layout", "", "{{ 'x' * 230000 }}")
    templates = {"item/text/flight.delayed": item, "layout/text": layout}
    rendered = render(job(*map(line, range(200)), format="text", templates=templates))
    assert rendered.error == "TooLarge: the digest is larger than 33,554,432 bytes"
    assert len(rendered.parts) == 1


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

    def handle_startendtag(self, tag: str, attrs: object) -> None:
        assert tag == "meta"

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


def keyed(number: int, key: str) -> Line:
    """An item with a group key, a minute after the one before."""
    return line(number)._replace(group_key=key, occurred_at=f"2026-07-09T12:{number:02d}:00+00:00")


def test_a_summary_collapses_a_group_key_to_its_newest_items_and_counts_the_rest() -> None:
    """Twenty of twenty-four are shown, the heading says so; the other key and what has none are shown whole."""
    lines = [line(90), *(keyed(number, "EWR") for number in range(24)), keyed(30, "LYS"), keyed(31, "LYS")]
    (part,) = render(job(*lines, format="text")).parts
    assert "Flight delayed (27)" in part.text
    assert "* EWR (24, 4 earlier not shown)\n- UA4" in part.text
    assert "* LYS (2)\n- UA30" in part.text
    shown = [row.split()[1] for row in part.text.splitlines() if row.startswith("- ")]
    assert shown == ["UA90", *(f"UA{number}" for number in range(4, 24)), "UA30", "UA31"]


def test_the_full_style_and_json_collapse_nothing() -> None:
    """Every item of a group key is there."""
    lines = [keyed(number, "EWR") for number in range(7)]
    (full,) = render(job(*lines, format="text", style="full")).parts
    assert "* EWR (7)\n" in full.text
    assert full.text.count("Flight delayed, ") == 7
    (body,) = render(job(*lines, format="json")).parts
    assert len(json.loads(body.json)["items"]) == 7


def test_counts_of_groups_stay_those_of_the_whole_digest_in_every_part() -> None:
    """A group key that goes over several parts is counted whole in each, and says that it goes on."""
    lines = [line(number, note="n" * 900)._replace(group_key="EWR") for number in range(500)]
    parts = render(job(*lines, format="text", style="full")).parts
    assert len(parts) > 2
    assert all("Flight delayed (500)" in part.text for part in parts)
    assert "* EWR (500)\n" in parts[0].text
    assert all("* EWR (500, continued)" in part.text for part in parts[1:])
    assert sum(part.text.count("Flight delayed, ") for part in parts) == 500


def test_a_template_that_fails_in_a_later_part_takes_back_those_before() -> None:
    """All parts are the built-in template's, not some of each."""
    own = {"layout/text": Source("digest (text)", "", "{{ 1 / (2 - digest.part) }}")}
    lines = [line(number, note="n" * 900) for number in range(500)]
    rendered = render(job(*lines, format="text", style="full", templates=own))
    assert rendered.parts == render(job(*lines, format="text", style="full")).parts
    assert rendered.error == "template digest (text), line 1: ZeroDivisionError: division by zero"


@pytest.mark.parametrize(
    ("locale", "expected"),
    [
        ("en", "Thu, Jul 9, 2026, 8:15\u00a0AM"),
        ("en-GB", "Thu, 9 Jul 2026, 08:15"),
        ("de-CH-x-ours", "Do., 9. Juli 2026, 08:15"),
        ("tlh-Piqd", "Thu, Jul 9, 2026, 8:15\u00a0AM"),
        ("../../etc/passwd", "Thu, Jul 9, 2026, 8:15\u00a0AM"),
    ],
)
def test_times_are_in_the_subscribers_language_or_the_nearest_known(locale: str, expected: str) -> None:
    """A locale nobody knows falls back along its parts, in the end to English."""
    assert f"({expected})" in render(job(line(1), locale=locale)).parts[0].text


def test_dates_and_amounts_in_a_payload_are_shown_as_people_read_them() -> None:
    """ISO 8601 instants in the subscriber's zone; whole numbers stay as they are, being as often ids."""
    one = line(1, due="2026-07-10", until="2026-07-10T03:30:00Z", price=1234.5, order=20260709, code="2026-99-99")
    (part,) = render(job(one, locale="de", format="text", style="full")).parts
    assert "Due: Fr., 10. Juli 2026\n" in part.text
    assert "Until: Do., 9. Juli 2026, 23:30\n" in part.text
    assert "Price: 1.234,5\n" in part.text
    assert "Order: 20260709\n" in part.text
    assert "Code: 2026-99-99\n" in part.text


def test_templates_have_filters_for_dates_times_and_numbers() -> None:
    """In the subscriber's language and zone, whatever the template calls its variables; a gap stays a gap."""
    body = (
        "{% set speech = 1 %}{{ item.time | date('full') }}|{{ item.time | time }}|{{ item.payload.at | datetime }}|"
        "{{ item.time | relative }}|{{ 1234567.891 | number }}|{{ 3 | number(2) }}|{{ '9.5' | currency('EUR') }}|"
        "{{ 0.12 | percent }}|{{ item.payload.gone | date }}{{ 'soon' | date }}"
    )
    own = {"layout/text": Source("l", "", body)}
    rendered = render(job(line(1, at="2026-07-10T03:30:00Z"), locale="de", format="text", templates=own))
    assert rendered.error == ""
    assert rendered.parts[0].text == (
        "Donnerstag, 9. Juli 2026|08:15|Do., 9. Juli 2026, 23:30|vor 1 Tag|1.234.567,891|3,00|9,50\u00a0€|"
        "12\u00a0%|soon"
    )


def test_a_tenants_json_templates_write_items_and_body() -> None:
    """What webhooks get is the template's, and valid JSON."""
    own = {
        "item/json/flight.delayed": Source("t", "", '{"id": {{ item.entity | tojson }}}'),
        "layout/json": Source(
            "l", "Hook", '{"rows": [{% for i in items %}{{ i.body }}{{ "," if not loop.last }}{% endfor %}]}'
        ),
    }
    rendered = render(job(line(1), line(2), format="json", templates=own))
    assert rendered.error == ""
    assert json.loads(rendered.parts[0].json) == {"rows": [{"id": "UA1"}, {"id": "UA2"}]}
    assert rendered.parts[0].subject == "Hook"
    del own["layout/json"]
    body = json.loads(render(job(line(1), format="json", templates=own)).parts[0].json)
    assert (body["item_count"], body["items"]) == (1, [{"id": "UA1"}])


def test_a_webhook_gets_its_payloads_to_the_letter() -> None:
    """Numbers that no float holds, escapes that no text holds."""
    odd = '{ "n": 1e999, "id": 123456789012345678901234567890, "half": "\\ud800", "one": 1.10 }'
    rendered = render(job(line(1)._replace(payload=odd), line(2)._replace(payload=""), format="json"))
    assert rendered.error == ""
    assert f'"payload":{odd}' in rendered.parts[0].json
    assert '"payload":{}' in rendered.parts[0].json


@pytest.mark.parametrize("body", ['{"id": "{{ item.payload.note }}"}', '{"id": NaN}', "", '{"id": 1},', "[" * 3000])
def test_a_json_template_that_writes_no_json_is_replaced_by_the_built_in_one(body: str) -> None:
    """A quote in a payload, NaN, nothing at all: the built-in one writes, and the error says why."""
    own = {"item/json/flight.delayed": Source("t", "", body)}
    rendered = render(job(line(1, note='"'), format="json", templates=own))
    assert rendered.parts == render(job(line(1, note='"'), format="json")).parts
    assert rendered.error != ""


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


def test_jobs_and_answers_survive_the_way_to_the_rendering_process() -> None:
    """What comes out is what went in, in lines of a thousand items."""
    own = {"layout/html": Source("l", "s", "b")}
    one = replace(job(*(line(number, a=1) for number in range(2001))), templates=own)
    wire = iter([*one.to_wire(), b"the next request"])
    assert replace(Job.from_wire(wire), lines=tuple(one.lines)) == replace(one, lines=tuple(one.lines))
    assert next(wire) == b"the next request"
    answer = Answer(part=render(one).parts[0])
    assert Answer.from_wire(answer.to_wire()[ANSWER_HEAD:]) == answer
    checking = Request(limit_s=2, check=Source("t", "", "b"), is_html=True)
    assert [Request.from_wire(line) for line in checking.to_wire()] == [checking]
