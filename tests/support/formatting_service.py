"""A business service that formats items; tests/support/condition_service.py has what else it may do."""

from aiohttp import web


async def writes(request: web.Request) -> web.StreamResponse:
    """It formats each item, saying how it was asked."""
    asked = await request.json()
    how = request.headers["Accept"].removeprefix("NotificationFormat/").replace("; style=", " ")
    items = [f"<b>crm</b> {how} {asked['locale']} {one['entity']}" for one in asked["items"]]
    return web.json_response({"items": items})
