"""Ask an HTTP server, safely: one deadline for a whole answer, a limit on its size, no redirects, few requests a second, retries.

The key in OPENAI_API_KEY is sent to the server that was named and to no other.
"""

import http.client
import json
import os
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar
from urllib.parse import urlsplit, urlunsplit

from moe2dense.errors import UserError

LARGEST_ANSWER = 2**26  # bytes; a server that sends more is not waited for
_FINAL_CODES = (300, 301, 302, 303, 307, 308, 400, 401, 403, 404, 405, 413, 422)  # another try changes nothing
_LONGEST_WAIT = 300.0  # seconds that a server's Retry-After is obeyed for
Answer = TypeVar("Answer")


class RequestFailed(Exception):
    """One try failed; `final` when another would too. wait: seconds that the server asks to be left alone, 0 where it asks nothing."""

    def __init__(self, why: str, final: bool = False, wait: float = 0.0):
        super().__init__(why)
        self.final, self.wait = final, wait


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Follows no redirect: the request carries the user's key, which is for the server that was named and no other."""

    def redirect_request(
        self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> None:
        """Refuse, so that the redirect is raised as an HTTPError."""


_OPENER = urllib.request.build_opener(_NoRedirects)


def check_url(url: str) -> None:
    """Raise UserError for what is no http(s) URL, or one with a password, which would end up in files."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(f"--endpoint must be an http(s) URL such as http://localhost:8000/v1; found {url!r}")
    if parts.password is not None:
        shown = urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
        raise UserError(f"--endpoint {shown} has a password in it; set OPENAI_API_KEY instead")


def json_request(url: str, body: dict[str, Any] | None = None) -> urllib.request.Request:
    """Return a request that posts `body` as JSON, or gets where there is none, with the user's key."""
    headers = {"Content-Type": "application/json"} if body is not None else {}
    if key := os.environ.get("OPENAI_API_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    data = None if body is None else json.dumps(body).encode()
    return urllib.request.Request(url, data, headers, method="GET" if body is None else "POST")


def fetch(request: urllib.request.Request, timeout: float, largest: int = LARGEST_ANSWER) -> bytes:
    """Return the complete body of one response of at most `largest` bytes.

    The timeout, in seconds, is for all of it, however slowly it arrives. Raises RequestFailed.
    """
    deadline = time.monotonic() + timeout
    parts: list[bytes] = []
    try:
        with _OPENER.open(request, timeout=timeout) as response:
            size = 0
            while part := response.read1(65536):
                parts.append(part)
                size += len(part)
                if size > largest:
                    raise RequestFailed(f"an answer of more than {largest >> 20} MB", final=True)
                if time.monotonic() > deadline:
                    raise TimeoutError
            if response.length:  # bytes that were promised and never came
                raise http.client.IncompleteRead(b"".join(parts), response.length)
    except urllib.error.HTTPError as error:
        raise _refusal(error) from None
    except TimeoutError:
        raise RequestFailed(f"no whole answer within {timeout:g} s") from None
    except http.client.IncompleteRead as error:
        raise RequestFailed(f"half an answer ({len(error.partial)} bytes)") from None
    except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        if isinstance(reason, TimeoutError):
            raise RequestFailed(f"no whole answer within {timeout:g} s") from None
        raise RequestFailed(f"the connection failed: {reason}") from None
    return b"".join(parts)


def _refusal(error: urllib.error.HTTPError) -> RequestFailed:
    """Return what a status other than 200 means."""
    if 300 <= error.code < 400:
        place = str(error.headers.get("Location"))[:200]
        return RequestFailed(f"it redirects to {place!r}; if that is right, give it as the endpoint", final=True)
    try:
        lines = error.read(400).decode(errors="replace").strip().splitlines()
    except (OSError, http.client.HTTPException):
        lines = []
    asked = str(error.headers.get("Retry-After") or "")
    wait = min(_LONGEST_WAIT, float(asked)) if asked.isdecimal() else 0.0
    return RequestFailed(f"HTTP {error.code}: {lines[0] if lines else error.reason}", error.code in _FINAL_CODES, wait)


def with_retries(ask: Callable[[], Answer], tries: int, wait: float) -> Answer:
    """Return ask(), tried up to `tries` times, `wait` seconds before the second try and twice as long before each further one.

    A server that says when to come again is obeyed. Raises RequestFailed after the last try, and at once for a final failure.
    """
    for attempt in range(1, tries + 1):
        try:
            return ask()
        except RequestFailed as error:
            if error.final or attempt == tries:
                raise
            time.sleep(max(wait * 2 ** (attempt - 1), error.wait))
    raise AssertionError("unreachable: tries is at least 1")


@dataclass
class RateLimit:
    """Let requests through at most `per_second` times a second, from any thread; 0 lets all through at once."""

    per_second: float = 0.0
    _next: float = 0.0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def wait(self) -> None:
        """Sleep until the next request may go."""
        if not self.per_second:
            return
        with self._lock:
            now = time.monotonic()
            turn = max(now, self._next)
            self._next = turn + 1 / self.per_second
        time.sleep(turn - now)
