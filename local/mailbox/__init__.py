"""A mailbox for everybody: takes all mail by SMTP and webhooks by HTTP, keeps them, and shows them on a page.

Every mail is an .eml file of its own, every webhook a row; an SQLite index beside them makes them searchable. To try
what happens when a receiver does not want a message: mail to `refuse.550.anything@…` is refused with that SMTP code,
a webhook to `/hooks/<name>?answer=503` with that HTTP status.

| address                       | answer                                                                        |
|-------------------------------|-------------------------------------------------------------------------------|
| `GET /`                       | the mails, newest first; `?to=` searches recipients, `?before=` pages           |
| `GET /mails/<id>`             | one mail: text, HTML (sandboxed), headers; `.eml` appended: the file itself     |
| `GET /hooks`, `/hooks/<name>` | the webhooks                                                                  |
| `POST /hooks/<name>`          | takes a webhook                                                               |
| `GET /api/mails`              | `?to=`, `?after=` (id), `?limit=` ≤ 1000; oldest first                          |
| `GET /api/mails/<id>`         | headers, text and HTML                                                        |
| `GET /api/hooks/<name>`       | `?after=`, `?limit=`; oldest first                                            |
| `GET /api/counts`             | `{"mails": 3, "mails_by_recipient": {…}, "hooks": {…}}`                         |
"""
