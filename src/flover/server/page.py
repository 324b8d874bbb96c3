"""The page at `/`: a playground and the live batch. Files of this package; they hold no data and need no key.

No build step and nothing from elsewhere: the policy that goes with them allows the server itself and no inline code.
"""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable
from importlib.resources import files

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

FOLDER = files("flover.server") / "page"
TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript"}
NAMES = [file.name for file in FOLDER.iterdir() if file.name.rpartition(".")[2] in TYPES]
PAGE = {"/" if name == "index.html" else f"/page/{name}": name for name in NAMES}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # asked for again, and mostly answered with a 304
}


def page_routes() -> list[Route]:
    """One for each file, read once."""
    return [Route(path, _file(name)) for path, name in PAGE.items()]


def _file(name: str) -> Callable[[Request], Awaitable[Response]]:
    content = (FOLDER / name).read_bytes()
    headers = {**HEADERS, "ETag": f'"{hashlib.sha256(content).hexdigest()[:20]}"'}
    kind = TYPES[name.rpartition(".")[2]]

    async def file(request: Request) -> Response:
        if request.headers.get("if-none-match") == headers["ETag"]:
            return Response(status_code=304, headers=headers)
        return Response(content, headers=headers, media_type=kind)

    return file
