"""The web page at ``/``: a few static files, served from memory under a policy that lets nothing else run."""

from __future__ import annotations

import hashlib
from pathlib import Path

from fastapi import FastAPI, Request, Response

_FOLDER = Path(__file__).with_name("page")
_INDEX = "index.html"
_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
# What a model or a document says is shown by this page, so the browser enforces what the scripts promise: code, styles and connections come from
# this server alone, and no string ever becomes markup (trusted types).
_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
# no-cache: kept by the browser, but asked for with the ETag each time, so that a page never talks to a newer server.
_HEADERS = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": _POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def _files() -> dict[str, Path]:
    """Path of the URL -> file."""
    files = sorted(file for file in _FOLDER.iterdir() if file.suffix in _TYPES)
    return {"/" if file.name == _INDEX else f"/page/{file.name}": file for file in files}


def paths() -> frozenset[str]:
    """Every path of the page. They hold nothing secret, and the page is where a person types the key: no key may guard them."""
    return frozenset(_files())


def install(app: FastAPI) -> None:
    """One route per file, so that nothing of a request reaches the file system."""
    for path, file in _files().items():
        _serve(app, path, file.read_bytes(), _TYPES[file.suffix])


def _serve(app: FastAPI, path: str, content: bytes, media_type: str) -> None:
    tag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
    headers = {**_HEADERS, "ETag": tag}

    async def file(request: Request) -> Response:
        known = {each.strip().removeprefix("W/") for each in request.headers.get("If-None-Match", "").split(",")}
        if tag in known or "*" in known:
            return Response(status_code=304, headers=headers)
        return Response(content, media_type=media_type, headers=headers)

    app.add_api_route(path, file, methods=["GET", "HEAD"], include_in_schema=False)
