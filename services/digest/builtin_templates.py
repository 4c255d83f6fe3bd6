"""The templates everybody has who has put none: an email that reads well on a phone and on a desk, and its text twin.

Email clients are no browsers: tables for layout, all styles inline, one media query for the phone, no images, no
fonts to load. Nothing here trusts a payload: the HTML ones are rendered with autoescape.
"""

ALONE_SUBJECT = "{{ item.title }}"

DIGEST_SUBJECT = (
    "{{ digest.name }}: {{ digest.kinds[0].count }} × {{ digest.kinds[0].name }}"
    "{% if digest.kinds | length > 1 %} and {{ digest.count - digest.kinds[0].count }} more{% endif %}"
)

ITEM_HTML = {
    "summary": """\
<tr><td class="pad" style="padding:10px 32px;border-top:1px solid #eaecf0">
<table role="presentation" width="100%" cellpadding="0" cellspacing="0"><tr>
<td style="font-size:15px;line-height:21px;color:#101828;font-weight:600">{{ item.title }}</td>
<td align="right" valign="top"
 style="font-size:12px;line-height:21px;color:#667085;white-space:nowrap;padding-left:12px">
{{- item.time | when }}</td></tr>
{% if item.fields %}<tr><td colspan="2" style="font-size:13px;line-height:19px;color:#475467;word-break:break-word">
{%- for field in item.fields[:6] %}{{ field.label }}: {{ field.value | brief(80) }}
{%- if not loop.last %} &nbsp;·&nbsp; {% endif %}{% endfor %}</td></tr>
{% endif %}</table></td></tr>
""",
    "full": """\
<tr><td class="pad" style="padding:16px 32px;border-top:1px solid #eaecf0">
<p style="margin:0;font-size:16px;line-height:24px;color:#101828;font-weight:600">{{ item.title }}</p>
<p style="margin:0 0 8px;font-size:12px;line-height:18px;color:#667085">
{{- item.name }} &nbsp;·&nbsp; {{ item.time | when }}</p>
{% if item.fields %}<table role="presentation" width="100%" cellpadding="0" cellspacing="0">
{% for field in item.fields[:30] %}<tr>
<td valign="top" width="34%" style="padding:4px 12px 4px 0;font-size:13px;line-height:19px;color:#667085">
{{- field.label }}</td>
<td valign="top" style="padding:4px 0;font-size:14px;line-height:19px;color:#101828;word-break:break-word">
{{- field.value | brief(1000) }}</td></tr>
{% endfor %}</table>{% endif %}</td></tr>
""",
}

ITEM_TEXT = {
    "summary": """\
- {{ item.title }} ({{ item.time | when }})
{% if item.fields %}  {% for field in item.fields[:6] %}{{ field.label }}: {{ field.value | brief(80) }}
{%- if not loop.last %}; {% endif %}{% endfor %}
{% endif %}""",
    "full": """\
{{ item.title }}
{{ item.name }}, {{ item.time | when }}
{% for field in item.fields[:30] %}  {{ field.label }}: {{ field.value | brief(1000) }}
{% endfor %}""",
}

_FONT = "font-family:-apple-system,BlinkMacSystemFont,'Segoe UI',Roboto,Helvetica,Arial,sans-serif"

_SHELL = """\
<!DOCTYPE html>
<html lang="{{ digest.locale }}">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light">
<title>%(title)s</title>
<style>
@media (max-width: 600px) {
  .outer { padding: 0 !important }
  .card { border-radius: 0 !important; border-left: 0 !important; border-right: 0 !important }
  .pad { padding-left: 16px !important; padding-right: 16px !important }
}
</style>
</head>
<body style="margin:0;padding:0;background:#f2f4f7;%(font)s">
<div style="display:none;max-height:0;overflow:hidden">%(preview)s</div>
<table role="presentation" width="100%%" cellpadding="0" cellspacing="0" style="background:#f2f4f7"><tr>
<td class="outer" align="center" style="padding:24px 12px;%(font)s">
<table role="presentation" class="card" width="100%%" cellpadding="0" cellspacing="0"
 style="max-width:600px;background:#ffffff;border:1px solid #eaecf0;border-radius:10px;text-align:left">
%(content)s
<tr><td class="pad"
 style="padding:16px 32px 20px;border-top:1px solid #eaecf0;font-size:12px;line-height:18px;color:#667085">
For {{ subscriber.id }}, {{ digest.closed | when }} ({{ subscriber.zone }})
{%% if digest.parts > 1 %%} &nbsp;·&nbsp; part {{ digest.part }} of {{ digest.parts }}{%% endif %%}</td></tr>
</table></td></tr></table>
</body>
</html>
"""

ALONE_HTML = _SHELL % {
    "font": _FONT,
    "title": "{{ items[0].title }}",
    "preview": "{{ items[0].name }}",
    "content": """\
<tr><td class="pad" style="padding:18px 32px 14px;font-size:12px;line-height:18px;color:#667085;
text-transform:uppercase;letter-spacing:0.06em">{{ items[0].name }}</td></tr>
{% for item in items %}{{ item.body }}{% endfor %}""",
}

DIGEST_HTML = _SHELL % {
    "font": _FONT,
    "title": "{{ digest.name }}",
    "preview": "{% for kind in digest.kinds[:5] %}{{ kind.count }} × {{ kind.name }}"
    "{% if not loop.last %}, {% endif %}{% endfor %}",
    "content": """\
<tr><td class="pad" style="padding:28px 32px 20px">
<p style="margin:0;font-size:22px;line-height:30px;color:#101828;font-weight:700">{{ digest.name }}</p>
<p style="margin:4px 0 0;font-size:14px;line-height:20px;color:#667085">
{{- digest.count }} {{ "notification" if digest.count == 1 else "notifications" }}
{%- if digest.parts > 1 %}, part {{ digest.part }} of {{ digest.parts }}{% endif %}</p>
</td></tr>
{% for group in groups %}<tr>
<td class="pad" style="padding:12px 32px 8px;background:#f9fafb;border-top:1px solid #eaecf0;
font-size:13px;line-height:18px;color:#344054;font-weight:600">{{ group.name }}
<span style="display:inline-block;margin-left:6px;padding:0 8px;border-radius:9px;
background:#e0e7ff;color:#3538cd;font-size:12px">
{{- group.count }}</span></td></tr>
{% for item in group["items"] %}{{ item.body }}{% endfor %}{% endfor %}""",
}

_TEXT_FOOT = """
--\x20
For {{ subscriber.id }}, {{ digest.closed | when }} ({{ subscriber.zone }})
{% if digest.parts > 1 %}Part {{ digest.part }} of {{ digest.parts }}
{% endif %}"""

ALONE_TEXT = "{% for item in items %}{{ item.body }}{% endfor %}" + _TEXT_FOOT

DIGEST_TEXT = (
    """\
{{ digest.name }}: {{ digest.count }} {{ "notification" if digest.count == 1 else "notifications" }}
{% for group in groups %}
{{ group.name }} ({{ group.count }})
{% for item in group["items"] %}{{ item.body }}{% endfor %}{% endfor %}"""
    + _TEXT_FOOT
)
