"""What may come in: no URL is fetched on a visitor's behalf, and no request is larger than its kind needs.

Gradio takes a URL where a file is meant, in `/gradio_api/file=URL` and in the payload of an event; it refuses private
addresses, but fetches all others. Of uploads it limits each file but not their sum, and of other requests nothing.
"""

import json
import re
from typing import Any

from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

MAX_UPLOAD, MAX_BODY = 64 * 2**20, 2**20  # bytes of a request with files, and of any other
URL = re.compile(r"\s*[a-z][a-z0-9+.-]+:", re.IGNORECASE)


class Gate:
    """ASGI middleware: refuses with 403 what would fetch a URL, with 413 what is too large."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a request, or passes it on."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        path, headers = scope["path"], Headers(scope=scope)
        upload = path.rstrip("/").endswith("/upload")
        asked = re.search(r"/file[=/](.*)", path, re.DOTALL)
        if asked and URL.match(asked[1]):
            return await PlainTextResponse("This demo fetches no URL.", 403)(scope, receive, send)
        if "transfer-encoding" in headers:
            return await PlainTextResponse("Say how long the request is.", 411)(scope, receive, send)
        if int(headers.get("content-length", 0)) > (MAX_UPLOAD if upload else MAX_BODY):
            return await PlainTextResponse("This is larger than the demo takes.", 413)(scope, receive, send)
        if upload or scope["method"] != "POST":
            return await self.app(scope, receive, send)
        body = b""
        while (message := await receive())["type"] == "http.request":
            body += message["body"]
            if not message.get("more_body"):
                break
        if names_url(body):
            return await PlainTextResponse("This demo fetches no URL; upload the file.", 403)(scope, receive, send)
        whole = iter([{"type": "http.request", "body": body}])

        async def replay() -> Any:
            return next(whole, None) or await receive()

        await self.app(scope, replay, send)


def names_url(body: bytes) -> bool:
    """Whether a JSON body has a file whose path is a URL."""
    try:
        waiting = [json.loads(body)]
    except (ValueError, RecursionError):  # no JSON: no event reads it
        return False
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            if isinstance(value.get("path"), str) and URL.match(value["path"]):
                return True
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value
    return False
