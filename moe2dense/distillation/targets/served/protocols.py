"""The servers that give log-probabilities of every position of a prompt: what is asked of each kind, and what it answers.

vLLM: /v1/completions with prompt_logprobs. SGLang: /generate with return_logprob. llama.cpp's server gives log-probabilities
of what it writes only, so it is asked once a position, and its cache of the prompt makes each request cost one token.
All are asked at temperature 1 with every filter off, since a server may have other defaults.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

from moe2dense.common.http import RequestFailed
from moe2dense.distillation.targets.served.answers import Ask, TopK, likeliest, rows, stacked

_PLAIN: dict[str, Any] = {"temperature": 1.0, "top_p": 1.0, "min_p": 0.0}


class ServerProtocol(ABC):
    """One kind of server."""

    name: ClassVar[str]
    # a GET that this kind of server alone answers with a JSON object that has the field
    sign: ClassVar[tuple[str, str]]
    # what to type where the server gives fewer log-probabilities than asked for
    remedy: ClassVar[str] = ""
    # whether several sequences go into one request
    batches: ClassVar[bool] = True

    @abstractmethod
    def version(self, ask: Ask) -> str:
        """Return the version that the server says it is; "" where it says none."""

    @abstractmethod
    def answer(self, ask: Ask, model: str, sequences: Sequence[list[int]], k: int) -> list[TopK]:
        """Return the k likeliest tokens after every position of some sequences of token ids. Raises RequestFailed."""

    @abstractmethod
    def tokenize(self, ask: Ask, model: str, text: str) -> list[int]:
        """Return the ids of a text without special tokens, as the server's tokenizer has it. Raises RequestFailed."""

    @abstractmethod
    def detokenize(self, ask: Ask, model: str, ids: list[int]) -> str:
        """Return the text of some ids, as the server's tokenizer has it. Raises RequestFailed."""


class Vllm(ServerProtocol):
    """vLLM, and what speaks its dialect of the OpenAI protocol."""

    name = "vllm"
    sign = ("/version", "version")
    remedy = "start vLLM with --max-logprobs {k}"

    def version(self, ask: Ask) -> str:
        return ask("/version", lambda answer: str(answer.get("version", "")))

    def answer(self, ask: Ask, model: str, sequences: Sequence[list[int]], k: int) -> list[TopK]:
        body = {
            "model": model, "prompt": list(sequences), "max_tokens": 1, "prompt_logprobs": k, "logprobs": k,
            "return_tokens_as_token_ids": True, "add_special_tokens": False, "stream": False, "top_k": -1,
            "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0, **_PLAIN,
        }  # fmt: skip

        def read(answer: Any) -> list[TopK]:
            choices = sorted(rows(answer["choices"], "choices", len(sequences)), key=lambda choice: choice["index"])
            return [stacked(_vllm_positions(choice, ids, k)) for choice, ids in zip(choices, sequences, strict=True)]

        return ask("/v1/completions", read, body, (k + 1) * sum(map(len, sequences)))

    def tokenize(self, ask: Ask, model: str, text: str) -> list[int]:
        body = {"model": model, "prompt": text, "add_special_tokens": False}
        return ask("/tokenize", lambda answer: answer["tokens"], body)

    def detokenize(self, ask: Ask, model: str, ids: list[int]) -> str:
        return ask("/detokenize", lambda answer: answer["prompt"], {"model": model, "tokens": ids})


def _vllm_positions(choice: dict, ids: list[int], k: int) -> list[list[tuple[int, float]]]:
    """Return the likeliest tokens after each of `ids`: those of the prompt less its first, and those of the one new token."""
    if choice.get("prompt_logprobs") is None:
        raise RequestFailed("it gives no prompt_logprobs; --endpoint-kind says which server it is", final=True)
    positions = []
    for token, entries in zip(ids[1:], rows(choice["prompt_logprobs"], "prompt_logprobs", len(ids))[1:], strict=True):
        if str(token) not in entries:
            raise RequestFailed(f"it read other tokens than were sent (no {token} where it stands)", final=True)
        positions.append(likeliest(((int(i), entry["logprob"]) for i, entry in entries.items()), k))
    last = rows(choice["logprobs"]["top_logprobs"], "top_logprobs", 1)[0]
    positions.append(likeliest(((int(name.removeprefix("token_id:")), p) for name, p in last.items()), k))
    return positions


class Sglang(ServerProtocol):
    """SGLang's own /generate."""

    name = "sglang"
    sign = ("/get_model_info", "model_path")

    def version(self, ask: Ask) -> str:
        return ask("/get_server_info", lambda answer: str(answer.get("version", "")))

    def answer(self, ask: Ask, model: str, sequences: Sequence[list[int]], k: int) -> list[TopK]:
        sampling = {"max_new_tokens": 1, "top_k": -1, "repetition_penalty": 1.0, **_PLAIN}
        body = {
            "input_ids": list(sequences), "sampling_params": sampling, "return_logprob": True, "logprob_start_len": 0,
            "top_logprobs_num": k, "return_text_in_logprobs": False, "stream": False,
        }  # fmt: skip

        def read(answer: Any) -> list[TopK]:
            answers = rows(answer, "the answer", len(sequences))
            return [stacked(_sglang_positions(one, ids, k)) for one, ids in zip(answers, sequences, strict=True)]

        return ask("/generate", read, body, (k + 1) * sum(map(len, sequences)))

    def tokenize(self, ask: Ask, model: str, text: str) -> list[int]:
        body = {"model": model, "prompt": text, "add_special_tokens": False}
        return ask("/v1/tokenize", lambda answer: answer["tokens"], body)

    def detokenize(self, ask: Ask, model: str, ids: list[int]) -> str:
        body = {"model": model, "tokens": ids, "skip_special_tokens": False}
        return ask("/v1/detokenize", lambda answer: answer["text"], body)


def _sglang_positions(answer: dict, ids: list[int], k: int) -> list[list[tuple[int, float]]]:
    """Return the likeliest tokens after each of `ids`, of entries [log-probability, id, text]."""
    meta = answer["meta_info"]
    read = [entry[1] for entry in rows(meta["input_token_logprobs"], "input_token_logprobs", len(ids))]
    if read != ids:
        raise RequestFailed("it read other tokens than were sent", final=True)
    prompt = rows(meta["input_top_logprobs"], "input_top_logprobs", len(ids))[1:]
    written = rows(meta["output_top_logprobs"], "output_top_logprobs", 1)
    return [likeliest(((entry[1], entry[0]) for entry in entries), k) for entries in (*prompt, *written)]


class LlamaCpp(ServerProtocol):
    """llama.cpp's server."""

    name = "llama.cpp"
    sign = ("/props", "default_generation_settings")
    batches = False

    def version(self, ask: Ask) -> str:
        return ask("/props", lambda answer: str(answer.get("build_info", "")))

    def answer(self, ask: Ask, model: str, sequences: Sequence[list[int]], k: int) -> list[TopK]:
        # A token that ends inside a character hides its own log-probabilities, so a plain letter is what gets written:
        # the bias acts on the drawing alone, the log-probabilities are the model's.
        letter = self.tokenize(ask, model, "a")[-1]
        return [stacked([self._next(ask, ids[: end + 1], letter, k) for end in range(len(ids))]) for ids in sequences]

    def _next(self, ask: Ask, ids: list[int], letter: int, k: int) -> list[tuple[int, float]]:
        body = {
            "prompt": ids, "n_predict": 1, "n_probs": k, "cache_prompt": True, "post_sampling_probs": False,
            "logit_bias": [[letter, 1000.0]], "temperature": 0.0, "samplers": ["top_k"], "top_k": 1, "stream": False,
        }  # fmt: skip

        def read(answer: Any) -> list[tuple[int, float]]:
            first = rows(answer["completion_probabilities"], "completion_probabilities", 1)[0]
            return likeliest(((entry["id"], entry["logprob"]) for entry in first["top_logprobs"]), k)

        return ask("/completion", read, body, k)

    def tokenize(self, ask: Ask, model: str, text: str) -> list[int]:
        return ask("/tokenize", lambda answer: answer["tokens"], {"content": text, "add_special": False})

    def detokenize(self, ask: Ask, model: str, ids: list[int]) -> str:
        return ask("/detokenize", lambda answer: answer["content"], {"tokens": ids})


PROTOCOLS: dict[str, ServerProtocol] = {protocol.name: protocol for protocol in (Vllm(), Sglang(), LlamaCpp())}
