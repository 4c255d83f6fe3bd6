"""The built-in items, in HTML and in text. Pure.

Written as Python, not as templates: a digest has many items and most have no template of their own, and in Jinja
they cost three times as much. What comes from outside is escaped here, piece by piece.
"""

import re
from collections.abc import Callable, Mapping
from typing import Final, NamedTuple

from markupsafe import escape

from services.digest.rendering_sandbox import HTML_GLUE, TEXT_GLUE, brief
from services.digest.rendering_views import ItemView

_MOST_FIELDS: Final = 6
_MOST_FULL_FIELDS: Final = 30
_LONGEST: Final = 80
_LONGEST_FULL: Final = 1_000
_SPECIAL: Final = re.compile("[&<>'\"]")


class Written(NamedTuple):
    """One item; the HTML is safe."""

    html: str
    text: str


def _safe(text: str) -> str:
    """Escaped. Most texts have nothing to escape, and looking costs a third of escaping."""
    return text if _SPECIAL.search(text) is None else str(escape(text))


def _summary(item: ItemView) -> Written:
    title, pairs, moment = item.title, item.pairs, item.moment
    html_fields = text_fields = ""
    if pairs:
        listed = [
            f"{label}: {value if len(value) <= _LONGEST else brief(value, _LONGEST)}"
            for label, value in pairs[:_MOST_FIELDS]
        ]
        html_fields = f"""\
<tr><td class="dim" colspan="2"
 style="font-size:13px;line-height:19px;color:#475467;word-break:break-word">{_safe(HTML_GLUE.join(listed))}</td></tr>
"""
        text_fields = f"  {TEXT_GLUE.join(listed)}\n"
    html = f"""\
<tr><td class="pad line" style="padding:10px 32px;border-top:1px solid #eaecf0">
<table role="presentation" width="100%" cellpadding="0" cellspacing="0"><tr>
<td class="ink what" style="font-size:15px;line-height:21px;color:#101828;font-weight:600;word-break:break-word">\
{_safe(title)}</td>
<td class="dim at" align="right" valign="top"
 style="font-size:12px;line-height:21px;color:#667085;white-space:nowrap;padding-left:12px">\
{_safe(moment)}</td></tr>
{html_fields}</table></td></tr>
"""
    return Written(html, f"- {title} ({moment})\n{text_fields}")


def _full(item: ItemView) -> Written:
    title, moment = item.title, item.moment
    pairs = [(label, brief(value, _LONGEST_FULL)) for label, value in item.pairs[:_MOST_FULL_FIELDS]]
    table = ""
    if pairs:
        rows = "".join([_full_row(_safe(label), _safe(value)) for label, value in pairs])
        table = f'<table role="presentation" width="100%" cellpadding="0" cellspacing="0">\n{rows}</table>'
    html = f"""\
<tr><td class="pad line" style="padding:16px 32px;border-top:1px solid #eaecf0">
<p class="ink" style="margin:0;font-size:16px;line-height:24px;color:#101828;font-weight:600;word-break:break-word">\
{_safe(title)}</p>
<p class="dim" style="margin:0 0 8px;font-size:12px;line-height:18px;color:#667085">\
{_safe(item.name)} &nbsp;·&nbsp; {_safe(moment)}</p>
{table}</td></tr>
"""
    fields = "".join([f"  {label}: {value}\n" for label, value in pairs])
    return Written(html, f"{title}\n{item.name}, {moment}\n{fields}\n")


def _full_row(label: str, value: str) -> str:
    return f"""\
<tr>
<td class="dim" valign="top" width="34%"
 style="padding:4px 12px 4px 0;font-size:13px;line-height:19px;color:#667085">{label}</td>
<td class="ink" valign="top" style="padding:4px 0;font-size:14px;line-height:19px;color:#101828;word-break:break-word">\
{value}</td></tr>
"""


ITEMS: Final[Mapping[str, Callable[[ItemView], Written]]] = {"summary": _summary, "full": _full}
"""By style."""
