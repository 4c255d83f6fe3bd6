"""The page, the JSON interface and the webhook sink. Nothing a mail contains runs: strict CSP, sandboxed frame."""

import dataclasses
import json
import re
from collections.abc import Awaitable, Callable
from pathlib import Path

import jinja2
from aiohttp import web

from local.mailbox.store import Store

PAGE_SIZE = 50
_MAX_LIMIT = 1000
_MAX_HOOK_BYTES = 8 << 20
_NAME = re.compile(r"[\w.-]{1,100}")

_PAGE_POLICY = "default-src 'none'; style-src 'self'; frame-src 'self'; form-action 'self'; frame-ancestors 'none'"
_MAIL_POLICY = "sandbox; default-src 'none'; style-src 'unsafe-inline'; img-src data:"

_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Pages:
    """Answers requests from a store."""

    def __init__(self, store: Store) -> None:
        self._store = store
        folder = Path(__file__).parent / "pages"
        self._style = (folder / "style.css").read_text()
        self._templates = jinja2.Environment(
            loader=jinja2.FileSystemLoader(folder), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
        )
        self._templates.filters["pretty"] = lambda body: json.dumps(body, indent=2, ensure_ascii=False)

    def application(self) -> web.Application:
        """All routes."""
        application = web.Application(client_max_size=_MAX_HOOK_BYTES, middlewares=[_safe_headers])
        application.add_routes(
            [
                web.get("/", self.mails),
                web.get("/style.css", self.style),
                web.get(r"/mails/{id:\d+}.eml", self.mail_file),
                web.get(r"/mails/{id:\d+}/html", self.mail_html),
                web.get(r"/mails/{id:\d+}", self.mail),
                web.get("/hooks", self.hooks),
                web.get("/hooks/{name}", self.hooks),
                web.post("/hooks/{name}", self.take_hook),
                web.get("/api/counts", self.api_counts),
                web.get("/api/mails", self.api_mails),
                web.get(r"/api/mails/{id:\d+}", self.api_mail),
                web.get("/api/hooks/{name}", self.api_hooks),
            ]
        )
        return application

    async def mails(self, request: web.Request) -> web.Response:
        """The list, newest first."""
        to, before = request.query.get("to", "").strip(), _number(request, "before", 0)
        found = self._store.newest_mails(to=to, before=before or None, limit=PAGE_SIZE + 1)
        return self._page(
            "mails.html", mails=found[:PAGE_SIZE], to=to, before=before, total=self._store.count_mails(to),
            older=found[PAGE_SIZE - 1].id if len(found) > PAGE_SIZE else None,
        )  # fmt: skip

    async def mail(self, request: web.Request) -> web.Response:
        """One mail."""
        mail = self._store.mail(_id(request))
        if mail is None:
            raise web.HTTPNotFound(text="There is no such mail.")
        return self._page("mail.html", mail=mail, opened=self._store.open_mail(mail.id))

    async def mail_html(self, request: web.Request) -> web.Response:
        """The HTML part alone, for the frame."""
        html = self._store.open_mail(self._existing(request)).html
        return web.Response(text=html, content_type="text/html", headers={"Content-Security-Policy": _MAIL_POLICY})

    async def mail_file(self, request: web.Request) -> web.Response:
        """The mail as a file."""
        content = self._store.path_of(self._existing(request)).read_bytes()
        return web.Response(body=content, content_type="message/rfc822", headers={"Content-Disposition": "attachment"})

    async def hooks(self, request: web.Request) -> web.Response:
        """Webhooks, newest first, of one name or all."""
        name, before = request.match_info.get("name"), _number(request, "before", 0)
        found = self._store.newest_hooks(name=name, before=before or None, limit=PAGE_SIZE + 1)
        return self._page(
            "hooks.html", hooks=found[:PAGE_SIZE], name=name, before=before, names=self._store.hooks_by_name(),
            older=found[PAGE_SIZE - 1].id if len(found) > PAGE_SIZE else None,
        )  # fmt: skip

    async def take_hook(self, request: web.Request) -> web.Response:
        """Keep a webhook; answer 200, or what the query `answer` asks for."""
        name, status = request.match_info["name"], _number(request, "answer", 200)
        if not _NAME.fullmatch(name) or not 200 <= status <= 599:
            raise web.HTTPBadRequest(text="A name has up to 100 letters, digits, . _ -; an answer is 200 to 599.")
        body = (await request.read()).decode(errors="replace")
        hook_id = self._store.add_hook(name, status=status, headers=dict(request.headers), body=body)
        return web.json_response({"id": hook_id}, status=status)

    async def api_counts(self, _request: web.Request) -> web.Response:
        """How much of everything there is."""
        mails, hooks = self._store.mails_by_recipient(), self._store.hooks_by_name()
        return web.json_response({"mails": self._store.count_mails(), "mails_by_recipient": mails, "hooks": hooks})

    async def api_mails(self, request: web.Request) -> web.Response:
        """Mails, oldest first."""
        to, limit = request.query.get("to", ""), min(_number(request, "limit", 100), _MAX_LIMIT)
        found = self._store.mails_after(to=to, after=_number(request, "after", 0), limit=limit)
        return web.json_response({"mails": [dataclasses.asdict(mail) for mail in found]})

    async def api_mail(self, request: web.Request) -> web.Response:
        """One mail with its content."""
        mail = self._store.mail(_id(request))
        if mail is None:
            raise web.HTTPNotFound(text="There is no such mail.")
        return web.json_response(dataclasses.asdict(mail) | dataclasses.asdict(self._store.open_mail(mail.id)))

    async def api_hooks(self, request: web.Request) -> web.Response:
        """Webhooks of one name, oldest first."""
        limit = min(_number(request, "limit", 100), _MAX_LIMIT)
        found = self._store.hooks_after(request.match_info["name"], after=_number(request, "after", 0), limit=limit)
        return web.json_response({"hooks": [dataclasses.asdict(hook) for hook in found]})

    async def style(self, _request: web.Request) -> web.Response:
        """The style sheet."""
        return web.Response(text=self._style, content_type="text/css")

    def _page(self, template: str, **values: object) -> web.Response:
        html = self._templates.get_template(template).render(values)
        return web.Response(text=html, content_type="text/html", headers={"Content-Security-Policy": _PAGE_POLICY})

    def _existing(self, request: web.Request) -> int:
        mail_id = _id(request)
        if not self._store.path_of(mail_id).exists():
            raise web.HTTPNotFound(text="There is no such mail.")
        return mail_id


@web.middleware
async def _safe_headers(request: web.Request, handler: _Handler) -> web.StreamResponse:
    response = await handler(request)
    response.headers["X-Content-Type-Options"] = "nosniff"
    response.headers["Referrer-Policy"] = "no-referrer"
    return response


def _id(request: web.Request) -> int:
    return min(int(request.match_info["id"]), 1 << 62)


def _number(request: web.Request, name: str, default: int) -> int:
    value = request.query.get(name, "")
    if not value:
        return default
    if not value.isascii() or not value.isdigit() or len(value) > 18:
        raise web.HTTPBadRequest(text=f"{name} must be a number.")
    return int(value)
