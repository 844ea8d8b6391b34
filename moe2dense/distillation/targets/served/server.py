"""A server that runs the teacher: which kind it is, which model it serves, and requests to it, retried and rate-limited."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from moe2dense.common.http import (
    LARGEST_ANSWER,
    RateLimit,
    RequestFailed,
    check_url,
    fetch,
    json_request,
    with_retries,
)
from moe2dense.distillation.targets.served.answers import TopK, Value
from moe2dense.distillation.targets.served.protocols import PROTOCOLS, ServerProtocol
from moe2dense.errors import UserError

KINDS = ("auto", *PROTOCOLS)
_NUMBER_BYTES = 256  # of JSON around one log-probability, at most


@dataclass(frozen=True)
class TeacherServer:
    """A server and how it is asked.

    url: its address, without /v1; model: the name it knows the teacher by; k: log-probabilities of each position; longest: tokens
    that it takes, 0 where it does not say; timeout: seconds for one answer; tries: of each request; wait: seconds before the
    second try; parallel: requests that are under way together; rate: of requests.
    """

    url: str
    model: str
    protocol: ServerProtocol
    k: int
    version: str = ""
    longest: int = 0
    timeout: float = 600.0
    tries: int = 5
    wait: float = 1.0
    parallel: int = 4
    rate: RateLimit = field(default_factory=RateLimit)

    def ask(
        self, path: str, read: Callable[[Any], Value], body: dict[str, Any] | None = None, numbers: int = 0
    ) -> Value:
        """Return what `read` makes of the answer to one request, tried several times. An `Ask`. Raises RequestFailed."""
        return with_retries(lambda: self._once(path, read, body, numbers), self.tries, self.wait)

    def likeliest(self, sequences: Sequence[list[int]]) -> list[TopK]:
        """Return the k likeliest tokens after every position of some sequences of token ids. Raises RequestFailed."""
        return self.protocol.answer(self.ask, self.model, sequences, self.k)

    def _once(self, path: str, read: Callable[[Any], Value], body: dict[str, Any] | None, numbers: int) -> Value:
        self.rate.wait()
        raw = fetch(json_request(self.url + path, body), self.timeout, max(LARGEST_ANSWER, _NUMBER_BYTES * numbers))
        try:
            answer = json.loads(raw)
        except (ValueError, RecursionError):
            raise RequestFailed(f"an answer that is no JSON: {raw[:60].decode(errors='replace')!r}") from None
        try:
            return read(answer)
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            reason = f"{type(error).__name__}: {str(error)[:80]}"
            raise RequestFailed(f"an answer to {path} in another form than {self.protocol.name}'s ({reason})") from None


def connect(
    url: str,
    k: int,
    model: str = "",
    kind: str = "auto",
    *,
    parallel: int = 4,
    per_second: float = 0.0,
    timeout: float = 600.0,
    tries: int = 5,
    wait: float = 1.0,
) -> TeacherServer:
    """Reach a server and learn what it is. model: by default the only one it serves.

    Raises UserError for a server that is not there, of no known kind, or that serves no such model.
    """
    check_url(url)
    if k < 1:
        raise UserError(f"--k must be at least 1; found {k}")
    if kind not in KINDS:
        raise UserError(f"--endpoint-kind must be one of {', '.join(KINDS)}; found {kind!r}")
    if parallel < 1 or per_second < 0:
        raise UserError(
            f"--endpoint-parallel must be at least 1 and --endpoint-rate not negative; found {parallel}, {per_second:g}"
        )
    base = url.rstrip("/").removesuffix("/completions").removesuffix("/v1").rstrip("/")
    blank = TeacherServer(
        base, model, PROTOCOLS["vllm"], k, timeout=timeout, tries=tries, wait=wait, parallel=parallel,
        rate=RateLimit(per_second),
    )  # fmt: skip
    try:
        name, longest = _served_model(blank, model)
        protocol = PROTOCOLS[kind] if kind != "auto" else _recognised(blank)
        server = replace(blank, protocol=protocol, model=name, longest=longest)
        return replace(server, version=_version(server))
    except RequestFailed as error:
        raise UserError(f"endpoint {url} failed ({error}); is the server up, and is that its address?") from None


def _recognised(server: TeacherServer) -> ServerProtocol:
    """Return the kind of a server, told by an address that only this kind answers. Raises UserError for none."""
    probe = replace(server, tries=1)
    for protocol in PROTOCOLS.values():
        path, name = protocol.sign
        try:
            if probe.ask(path, lambda answer, name=name: name in answer):
                return protocol
        except RequestFailed:
            continue  # it knows no such address
    raise UserError(
        f"endpoint {server.url} is no server that gives log-probabilities of a prompt ({', '.join(PROTOCOLS)}), as far as it says; name "
        "its kind with --endpoint-kind, or learn from its text with `moe2dense distill --endpoint` and no --endpoint-k"
    )


def _served_model(server: TeacherServer, model: str) -> tuple[str, int]:
    """Return the name and the longest sequence of the model that a server runs; 0 where it does not say."""
    served = server.ask("/v1/models", lambda answer: {str(entry["id"]): entry for entry in answer["data"]})
    if not model and len(served) == 1:
        model = next(iter(served))
    if model not in served:
        names = ", ".join(served) or "none"
        raise UserError(f"--endpoint-model {model!r} is not served at {server.url}; it serves {names}")
    entry = served[model]
    longest = entry.get("max_model_len") or (entry.get("meta") or {}).get("n_ctx") or 0
    return model, int(longest)


def _version(server: TeacherServer) -> str:
    """Return what the server says of its version; "" where it says nothing."""
    try:
        return server.protocol.version(server.ask)
    except RequestFailed as error:
        if not error.final:
            raise
        return ""


def failure(server: TeacherServer, error: RequestFailed, remains: str) -> UserError:
    """Return the one sentence for users. remains: what is kept and how to go on."""
    tries = "" if error.final else f" {server.tries} times"
    fewer = "logprobs" in str(error) or "log-probabilities" in str(error)
    remedy = f"; {server.protocol.remedy.format(k=server.k)}" if fewer and server.protocol.remedy else ""
    return UserError(f"endpoint {server.url} failed{tries} ({error}){remedy}; {remains}")
