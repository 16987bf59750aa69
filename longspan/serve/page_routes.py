"""The page at `/` and the files that it loads."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

from fastapi import APIRouter
from fastapi.responses import HTMLResponse, Response
from starlette.exceptions import HTTPException

PAGE_HEADERS = {
    "Content-Security-Policy":
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache"}
MEDIA_TYPES = {".js": "text/javascript", ".css": "text/css"}


def page_routes(refusals: dict[int | str, dict[str, Any]]) -> APIRouter:
    """Return the routes of the page, which is read once.

    Args:
        refusals: replies that every route may give, as the schema has them.
    """
    router = APIRouter(tags=["operations"])
    folder = files("longspan.serve").joinpath("page")
    texts = {file.name: file.read_text(encoding="utf-8") for file in folder.iterdir()}

    @router.get("/", response_class=HTMLResponse, responses=refusals)
    async def playground() -> Response:
        """Serve a page to try the model with documents."""
        return HTMLResponse(texts["index.html"], headers=PAGE_HEADERS)

    @router.get("/page/{name}", include_in_schema=False)
    async def part(name: str) -> Response:
        """Serve a file of the page."""
        media_type = MEDIA_TYPES.get(name[name.rfind("."):])
        if media_type is None or name not in texts:
            raise HTTPException(404)
        return Response(texts[name], media_type=media_type, headers=PAGE_HEADERS)

    return router
