"""What stands around an item that its business service formatted: a row of the layout, as every item is. Pure.

The fragment is cleaned already (formatting_answers.py). It is clipped here too: no margin may lead it over its
neighbours.
"""

from typing import Final

_BEFORE: Final = (
    '<tr><td class="pad line ink" style="padding:16px 32px;border-top:1px solid #eaecf0;font-size:15px;'
    'line-height:21px;color:#101828;word-break:break-word"><div style="overflow:hidden">'
)
_AFTER: Final = "</div></td></tr>\n"


def framed(fragment: str, text_format: str) -> str:
    """The item as layouts take it."""
    return f"{_BEFORE}{fragment}{_AFTER}" if text_format == "html" else fragment
