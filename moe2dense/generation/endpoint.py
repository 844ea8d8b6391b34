"""Collect answers of an OpenAI-compatible server, one HTTP request each, and store each as it comes in.

answers.jsonl in the folder has a line for every answer. When a collection goes on, a half-written last line is dropped, and
the answer of a damaged line is asked for again.
"""

import contextlib
import json
import os
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from moe2dense.common.files import atomic_write
from moe2dense.common.http import LARGEST_ANSWER, RequestFailed, check_url, fetch, json_request, with_retries
from moe2dense.errors import UserError
from moe2dense.generation.prompts import Prompt

ANSWERS = "answers.jsonl"
_LARGEST_ANSWER = LARGEST_ANSWER  # bytes


@dataclass(frozen=True)
class Endpoint:
    """A server and how it is asked.

    url: .../v1, or the full path of its completions or chat/completions; model: the name the server knows it by; timeout:
    seconds for one answer; tries: of each request; wait: seconds before the second try, doubled after that.
    """

    url: str
    model: str
    max_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    timeout: float = 120.0
    tries: int = 4
    wait: float = 1.0
    parallel: int = 8

    def __post_init__(self) -> None:
        check_url(self.url)
        if not self.model:
            raise UserError("--endpoint needs --endpoint-model, the name the server knows the model by")

    def answer(self, prompt: Prompt) -> str:
        """Return the text that follows a prompt, or the reply to a conversation. Raises RequestFailed after the last try."""
        return with_retries(lambda: self._ask(prompt), self.tries, self.wait)

    def _request(self, prompt: Prompt) -> tuple[urllib.request.Request, bool]:
        """Return (request, whether it is one to chat/completions)."""
        url = self.url.rstrip("/")
        chat = url.endswith("/chat/completions") or (bool(prompt.messages) and not url.endswith("/completions"))
        if not url.endswith("/completions"):
            url += "/chat/completions" if chat else "/completions"
        body: dict[str, Any] = {"model": self.model, "max_tokens": self.max_tokens, "stream": False}
        body |= {"temperature": self.temperature, "top_p": self.top_p}
        if chat:
            body["messages"] = prompt.messages or [{"role": "user", "content": prompt.text}]
        else:
            body["prompt"] = prompt.text
        return json_request(url, body), chat

    def _ask(self, prompt: Prompt) -> str:
        """Make one request; return the text of its answer."""
        request, chat = self._request(prompt)
        raw = fetch(request, self.timeout, _LARGEST_ANSWER)
        try:
            choice = json.loads(raw)["choices"][0]
            text = choice["message"]["content"] if chat else choice["text"]
        except (ValueError, LookupError, TypeError):
            raise RequestFailed(f"an answer that is no completion: {raw[:60].decode(errors='replace')!r}") from None
        if not isinstance(text, str):
            raise RequestFailed(f"an answer without text: {raw[:60].decode(errors='replace')!r}")
        # a server may cut its text inside a character
        return text.encode(errors="replace").decode()


def collect(
    endpoint: Endpoint,
    prompts: Iterable[Prompt],
    folder: str | Path,
    source: str,
    enough: Callable[[list[dict[str, Any]]], bool] = lambda _: False,
    progress: Callable[..., None] | None = None,
) -> list[dict[str, Any]]:
    """Return records {"prompt", "completion"} or {"messages"} of the server's answers, in the order of the prompts.

    It asks until `enough`(records so far) is true. Answers are stored in the folder one by one and asked for only once. Raises
    UserError when a request fails for good, naming what is stored, when the folder holds answers of another model, or when
    every answer is empty.
    """
    folder = Path(folder)
    answers = _begin(folder, {"endpoint": endpoint.url, "model": endpoint.model, "prompts": source})
    numbered, records = enumerate(prompts), []
    with open(folder / ANSWERS, "ab") as file:
        while batch := list(islice(numbered, 4 * endpoint.parallel)):
            missing = [(i, p) for i, p in batch if i not in answers]
            for number, text in _ask_all(endpoint, missing, len(answers), folder):
                answers[number] = text
                file.write(json.dumps({"number": number, "answer": text}, ensure_ascii=False).encode() + b"\n")
                file.flush()
            os.fsync(file.fileno())
            records += [_record(p, answers[i]) for i, p in batch if answers[i].strip()]
            if progress:
                progress("ask", batch[-1][0] + 1, batch[-1][0] + 1, answers=len(records))
            if enough(records):
                break
    if not records:
        raise UserError(
            f"endpoint {endpoint.url}: all {len(answers)} answers of {endpoint.model!r} are empty; look at the prompts"
        )
    return records


def _begin(folder: Path, identity: dict[str, str]) -> dict[int, str]:
    """Return the answers that are stored already, by number, and remove a line that was cut short."""
    folder.mkdir(parents=True, exist_ok=True)
    identity_file = folder / "endpoint.json"
    if identity_file.exists() and _read(identity_file) != identity:
        raise UserError(f"{folder} holds answers of another model or to other prompts; choose another --out")
    atomic_write(identity_file, json.dumps(identity, indent=1))
    file = folder / ANSWERS
    if not file.exists():
        return {}
    data = file.read_bytes()
    end = data.rfind(b"\n") + 1
    if end < len(data):
        atomic_write(file, data[:end])
    answers = {}
    for line in data[:end].splitlines():
        with contextlib.suppress(ValueError, LookupError, TypeError):  # a damaged line is asked for again
            row = json.loads(line)
            answers[int(row["number"])] = str(row["answer"])
    return answers


def _read(file: Path) -> Any:
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read: {error}; choose another --out") from error


def _ask_all(
    endpoint: Endpoint, prompts: list[tuple[int, Prompt]], before: int, folder: Path
) -> Iterator[tuple[int, str]]:
    """Yield (number, answer) as they arrive; after a failure also those that are under way."""
    failed: RequestFailed | None = None
    count = before
    with ThreadPoolExecutor(endpoint.parallel) as pool:
        running = {pool.submit(endpoint.answer, prompt): number for number, prompt in prompts}
        for future in as_completed(running):
            if future.cancelled():
                continue
            error = future.exception()
            if isinstance(error, RequestFailed):
                failed = failed or error
                for other in running:
                    other.cancel()
            elif error is not None:
                raise error
            else:
                count += 1
                yield running[future], future.result()
    if failed is not None:
        tries = "" if failed.final else f" {endpoint.tries} times"
        raise UserError(
            f"endpoint {endpoint.url} failed{tries} ({failed}); {count} answers are kept in {folder}, "
            "and the same command with --resume asks for the others"
        )


def _record(prompt: Prompt, text: str) -> dict[str, Any]:
    domain = {"domain": prompt.domain} if prompt.domain else {}
    if prompt.messages:
        return {"messages": [*prompt.messages, {"role": "assistant", "content": text}]} | domain
    return {"prompt": prompt.text, "completion": text} | domain
