"""The templates everybody has who has put none: an email that reads well on a phone and on a desk, and its text twin.

Email clients are no browsers: tables for layout, all styles inline, media queries for the phone and for dark mode only
(the classes: pad, what, at; line, band, ink, dim, chip), no images, no fonts to load. The HTML layouts are written in
MJML and compiled ahead (layouts/, builtin_layouts.py), the items are rows in them. Nothing here trusts a payload:
HTML is rendered with autoescape.
"""

from services.digest.builtin_layouts import ALONE as ALONE_HTML
from services.digest.builtin_layouts import DIGEST as DIGEST_HTML

__all__ = [
    "ALONE_HTML",
    "ALONE_SUBJECT",
    "ALONE_TEXT",
    "DIGEST_HTML",
    "DIGEST_SUBJECT",
    "DIGEST_TEXT",
]

ALONE_SUBJECT = "{{ item.title }}"

DIGEST_SUBJECT = (
    "{{ digest.name }}: {{ digest.kinds[0].count | number }} × {{ digest.kinds[0].name }}"
    "{% if digest.kinds | length > 1 %} and {{ (digest.count - digest.kinds[0].count) | number }} more{% endif %}"
)

_TEXT_FOOT = """
--\x20
For {{ subscriber.id }}, {{ digest.closed | datetime }} ({{ subscriber.zone }})
{% if digest.parts > 1 %}Part {{ digest.part }} of {{ digest.parts }}
{% endif %}"""

ALONE_TEXT = "{{ items | bodies }}" + _TEXT_FOOT

DIGEST_TEXT = (
    """\
{{ digest.name }}: {{ digest.count | number }} {{ "notification" if digest.count == 1 else "notifications" }}
{% for group in groups %}
{{ group.name }} ({{ group.count | number }})
{% for cluster in group.clusters %}{% if cluster.key and cluster.count > 1 %}* {{ cluster.key }} (
{{- cluster.count | number }}
{%- if cluster.more %}, {{ cluster.more | number }} earlier not shown{% endif %}
{%- if cluster.is_continued %}, continued{% endif %})
{% endif %}{{ cluster["items"] | bodies }}{% endfor %}{% endfor %}"""
    + _TEXT_FOOT
)
