"""Who answers tasks: a model in this process, or a server that runs it (OpenAI's /v1/completions)."""

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

from transformers import PreTrainedTokenizerBase

from moe2dense.common.http import RequestFailed, check_url, fetch, json_request, with_retries
from moe2dense.errors import UserError
from moe2dense.evaluation.lm_eval_model import PrefillScorer, before_stop
from moe2dense.evaluation.reference import AnyModel
from moe2dense.generation.sampling import Sampling

_TIMEOUT, _TRIES, _WAIT = 600.0, 5, 1.0  # seconds for an answer, tries, seconds before the second


class Writer(Protocol):
    """Something that continues prompts greedily."""

    def write(self, prompts: Sequence[str], new: int, stops: Sequence[str]) -> list[str]:
        """Return at most `new` tokens after each prompt, up to the first of the stop strings."""
        ...


@dataclass(frozen=True)
class ModelWriter:
    """A Teacher, streamed or in memory, or a transformers model."""

    model: AnyModel
    tokenizer: PreTrainedTokenizerBase

    def write(self, prompts: Sequence[str], new: int, stops: Sequence[str]) -> list[str]:
        """See Writer. A prompt that leaves no room for `new` tokens loses its beginning."""
        scorer = PrefillScorer(self.model, self.tokenizer)
        new = min(new, scorer.max_length // 2)
        ids = [scorer.tok_encode(prompt)[-(scorer.max_length - new) :] for prompt in prompts]
        texts = [
            str(self.tokenizer.decode(row, skip_special_tokens=True))
            for row in scorer.write_tokens(ids, new, Sampling(temperature=0.0))
        ]
        return [before_stop(text, stops) for text in texts]


@dataclass(frozen=True)
class ServedModel:
    """A model that a server runs. url: without /v1; name: what the server calls it; longest: tokens that it takes."""

    url: str
    name: str
    tokenizer: PreTrainedTokenizerBase
    longest: int
    parallel: int = 4

    def write(self, prompts: Sequence[str], new: int, stops: Sequence[str]) -> list[str]:
        """See Writer. Token ids are sent, so that both models read the same. Raises UserError for a server that fails for good."""
        new = min(new, self.longest // 2)

        def ask(prompt: str) -> str:
            ids = self.tokenizer.encode(prompt)[-(self.longest - new) :]
            body = {"model": self.name, "prompt": ids, "max_tokens": new, "temperature": 0.0, "stop": list(stops)[:4]}
            return before_stop(str(_asked(self.url + "/v1/completions", body)["choices"][0]["text"]), stops)

        with ThreadPoolExecutor(self.parallel) as pool:
            try:
                return list(pool.map(ask, prompts))
            except (RequestFailed, LookupError, TypeError) as error:
                raise UserError(f"endpoint {self.url} failed ({error}) while it answered a task") from error


def reach_model(url: str, tokenizer: PreTrainedTokenizerBase, name: str = "", tries: int = _TRIES) -> ServedModel:
    """Ask a server what it serves. Raises UserError for one that is not there, or serves no such model."""
    check_url(url)
    base = url.rstrip("/").removesuffix("/completions").removesuffix("/v1").rstrip("/")
    try:
        served = {str(entry["id"]): entry for entry in _asked(base + "/v1/models", tries=tries)["data"]}
    except (RequestFailed, LookupError, TypeError) as error:
        raise UserError(f"endpoint {url} failed ({error}); is the server up, and is that its address?") from None
    if not name and len(served) == 1:
        name = next(iter(served))
    if name not in served:
        raise UserError(f"--endpoint-model {name!r} is not served at {base}; it serves {', '.join(served) or 'none'}")
    return ServedModel(base, name, tokenizer, int(served[name].get("max_model_len") or 2048))


def _asked(url: str, body: dict[str, Any] | None = None, tries: int = _TRIES) -> Any:
    """Return the JSON of one answer, tried several times. Raises RequestFailed."""

    def once() -> Any:
        raw = fetch(json_request(url, body), _TIMEOUT)
        try:
            return json.loads(raw)
        except ValueError:
            raise RequestFailed(f"an answer that is no JSON: {raw[:60].decode(errors='replace')!r}") from None

    return with_retries(once, tries, _WAIT)
