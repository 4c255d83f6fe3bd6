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
    "ITEM_HTML",
    "ITEM_TEXT",
]

ALONE_SUBJECT = "{{ item.title }}"

DIGEST_SUBJECT = (
    "{{ digest.name }}: {{ digest.kinds[0].count | number }} × {{ digest.kinds[0].name }}"
    "{% if digest.kinds | length > 1 %} and {{ (digest.count - digest.kinds[0].count) | number }} more{% endif %}"
)

ITEM_HTML = {
    "summary": """\
<tr><td class="pad line" style="padding:10px 32px;border-top:1px solid #eaecf0">
<table role="presentation" width="100%" cellpadding="0" cellspacing="0"><tr>
<td class="ink what" style="font-size:15px;line-height:21px;color:#101828;font-weight:600;word-break:break-word">
{{- item.title }}</td>
<td class="dim at" align="right" valign="top"
 style="font-size:12px;line-height:21px;color:#667085;white-space:nowrap;padding-left:12px">
{{- item.time | datetime }}</td></tr>
{% if item.fields %}<tr><td class="dim" colspan="2"
 style="font-size:13px;line-height:19px;color:#475467;word-break:break-word">
{{- item.fields | listed }}</td></tr>
{% endif %}</table></td></tr>
""",
    "full": """\
<tr><td class="pad line" style="padding:16px 32px;border-top:1px solid #eaecf0">
<p class="ink" style="margin:0;font-size:16px;line-height:24px;color:#101828;font-weight:600;word-break:break-word">
{{- item.title }}</p>
<p class="dim" style="margin:0 0 8px;font-size:12px;line-height:18px;color:#667085">
{{- item.name }} &nbsp;·&nbsp; {{ item.time | datetime }}</p>
{% if item.fields %}<table role="presentation" width="100%" cellpadding="0" cellspacing="0">
{% for field in item.fields[:30] %}<tr>
<td class="dim" valign="top" width="34%"
 style="padding:4px 12px 4px 0;font-size:13px;line-height:19px;color:#667085">{{ field.label }}</td>
<td class="ink" valign="top" style="padding:4px 0;font-size:14px;line-height:19px;color:#101828;word-break:break-word">
{{- field.value | brief(1000) }}</td></tr>
{% endfor %}</table>{% endif %}</td></tr>
""",
}

ITEM_TEXT = {
    "summary": """\
- {{ item.title }} ({{ item.time | datetime }})
{% if item.fields %}  {{ item.fields | listed }}
{% endif %}""",
    "full": """\
{{ item.title }}
{{ item.name }}, {{ item.time | datetime }}
{% for field in item.fields[:30] %}  {{ field.label }}: {{ field.value | brief(1000) }}
{% endfor %}
""",
}

_TEXT_FOOT = """
--\x20
For {{ subscriber.id }}, {{ digest.closed | datetime }} ({{ subscriber.zone }})
{% if digest.parts > 1 %}Part {{ digest.part }} of {{ digest.parts }}
{% endif %}"""

ALONE_TEXT = "{% for item in items %}{{ item.body }}{% endfor %}" + _TEXT_FOOT

DIGEST_TEXT = (
    """\
{{ digest.name }}: {{ digest.count | number }} {{ "notification" if digest.count == 1 else "notifications" }}
{% for group in groups %}
{{ group.name }} ({{ group.count | number }})
{% for cluster in group.clusters %}{% if cluster.key and cluster.count > 1 %}* {{ cluster.key }} (
{{- cluster.count | number }}
{%- if cluster.more %}, {{ cluster.more | number }} earlier not shown{% endif %}
{%- if cluster.is_continued %}, continued{% endif %})
{% endif %}{% for item in cluster["items"] %}{{ item.body }}{% endfor %}{% endfor %}{% endfor %}"""
    + _TEXT_FOOT
)
