"""What every request must pass before any page sees it, and every answer carries."""

import ipaddress
from collections.abc import Iterable
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from config.settings import DashboardSettings

MAX_FORM_BYTES = 64 * 1024
#: Balancers ask these by address, and there is nothing in them to protect.
_ANY_HOST = frozenset({"/healthz", "/readyz"})
_SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})

# No inline script or style anywhere, nothing from elsewhere, no frame.
CONTENT_SECURITY_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' blob:",
        "connect-src 'self'",
        "form-action 'self'",
        "base-uri 'none'",
        "frame-ancestors 'none'",
    )
)
_HEADERS = {
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    # Not no-referrer: browsers then send `Origin: null` with our own forms.
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=(), payment=(), usb=()",
}


class Guard:
    """Host allow-list, same-origin check, body limit and security headers, as pure ASGI."""

    def __init__(self, app: ASGIApp, hosts: frozenset[str], *, is_secure: bool) -> None:
        self._app, self._hosts, self._is_secure = app, hosts, is_secure

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        answer = self._answering(scope, send)
        if refusal := self._refusal(scope, headers):
            await refusal(scope, receive, answer)
            return
        await self._app(scope, _limited(receive, headers), answer)

    def _refusal(self, scope: Scope, headers: Headers) -> PlainTextResponse | None:
        if scope["path"] not in _ANY_HOST and host_of(headers.get("host", "")) not in self._hosts:
            return PlainTextResponse("This host name is not served here.\n", 400)
        if scope["method"] not in _SAFE_METHODS and not _is_same_origin(headers):
            return PlainTextResponse("This request comes from another site.\n", 403)
        length = headers.get("content-length", "0")
        if not length.isdigit() or int(length) > MAX_FORM_BYTES:
            return PlainTextResponse("This request is too large.\n", 413)
        return None

    def _answering(self, scope: Scope, send: Send) -> Send:
        is_static = scope["path"].startswith("/static/")

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers[name] = value
                if self._is_secure:
                    headers["Strict-Transport-Security"] = "max-age=31536000"
                # A reading room's browsers are shared: nothing of a patient stays on their disks.
                headers["Cache-Control"] = "no-cache" if is_static else "no-store"
            await send(message)

        return answer


def _limited(receive: Receive, headers: Headers) -> Receive:
    left = MAX_FORM_BYTES

    async def limited() -> Message:
        nonlocal left
        message = await receive()
        left -= len(message.get("body", b""))
        if left < 0:
            # Chunked bodies announce no length; the client is told that nobody listens any more.
            return {"type": "http.disconnect"}
        return message

    return limited


def _is_same_origin(headers: Headers) -> bool:
    """Whether a browser sent this from one of our own pages; other clients send neither header."""
    if headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
        return False
    origin = headers.get("origin")
    return origin is None or urlsplit(origin).netloc.lower() == headers.get("host", "").lower()


def allowed_hosts(settings: DashboardSettings) -> frozenset[str]:
    return frozenset(
        host_of(name)
        for name in ("localhost", "127.0.0.1", "[::1]", settings.host, *settings.allowed_hosts)
    )


def host_of(header: str) -> str:
    """The host of a Host header, lower case and without port; empty when it is none."""
    header = header.strip().lower()
    if header.startswith("["):
        return header.partition("]")[0].removeprefix("[")
    if header.count(":") > 1:  # a bare IPv6 address, as the settings may have it
        return header
    return header.partition(":")[0].rstrip(".")


def is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False


def is_proxied(names: Iterable[str]) -> bool:
    """Whether a request came through a proxy, so that its peer's address proves nothing."""
    return not {"forwarded", "x-forwarded-for", "x-real-ip", "via"}.isdisjoint(names)
