"""The model that lm-evaluation-harness talks to: it only prefills, for a streamed teacher and a transformers model alike."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from moe2dense.data.blocks import Blocks, right_padded
from moe2dense.evaluation.likelihood import label_scores
from moe2dense.evaluation.reference import AnyModel, reference
from moe2dense.evaluation.sample_texts import student_texts
from moe2dense.generation.sampling import Sampling
from moe2dense.generation.streamed import generate
from moe2dense.modeling.kinds import language_model
from moe2dense.teacher.model import Teacher

# n requests, S longest request, H hidden

RESIDENT_TOKENS = 16_384  # in one macro-batch of a model that is in memory
LEAST_TOKENS = 4096  # a macro-batch is not cut below this for the sake of less padding
MOST_NEW_TOKENS = 256


def prefill_lm(model: AnyModel, tokenizer: PreTrainedTokenizerBase, seed: int = 0) -> "PrefillScorer":
    """Return a model that lm-evaluation-harness can use: a PrefillScorer that is also the harness's TemplateLM."""
    from lm_eval.api.model import TemplateLM  # pyright: ignore[reportMissingImports]

    class PrefillLM(PrefillScorer, TemplateLM):
        pass

    return PrefillLM(model, tokenizer, seed)


class PrefillScorer:
    """Score requests from final hidden states, many at once, padded on the right; write text greedily or by temperature.

    model: a Teacher (streamed or resident) or a transformers causal LM. Tokens are encoded as the harness's own HFLM does.
    """

    cache_hook: Any  # the harness's own, which stores what has been answered

    def __init__(self, model: AnyModel, tokenizer: PreTrainedTokenizerBase, seed: int = 0):
        super().__init__()
        self.model = model if isinstance(model, Teacher) else language_model(model)
        self.tokenizer: Any = tokenizer  # transformers annotates what any call of a tokenizer could return
        self.seed = seed
        config = self.model.config.get_text_config()
        self.max_length = int(getattr(config, "max_position_embeddings", None) or 2048)
        self.most_tokens = self.model.plan.macro_batch if isinstance(self.model, Teacher) else RESIDENT_TOKENS

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return self.tokenizer.apply_chat_template(
            chat_history, tokenize=False, add_generation_prompt=add_generation_prompt, continue_final_message=not add_generation_prompt
        )  # fmt: skip

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Return token ids; special tokens are added as the tokenizer does, unless the text has its own or the caller says."""
        if add_special_tokens is None:
            prefix = self.tokenizer.decode([self.prefix_token_id])
            options = {"add_special_tokens": False} if prefix and string.startswith(prefix) else {}
        else:
            options = {"add_special_tokens": add_special_tokens}
        return self.tokenizer.encode(string, **options)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """Return (log-likelihood of the continuation, whether greedy decoding gives it) per (text, context, continuation)."""
        # the last token is only predicted; a context that is too long loses its beginning
        pairs = [((c + t)[-self.max_length - 1 :], len(t)) for _, c, t in requests]
        scores: list[tuple[float, bool]] = [(0.0, True)] * len(pairs)
        for rows in self._batches([len(ids) - 1 for ids, _ in pairs]):
            for i, score in zip(rows, self._score([pairs[i] for i in rows]), strict=True):
                scores[i] = score
                self.cache_hook.add_partial("loglikelihood", requests[i][0], score)
        return scores

    def _batches(self, lengths: list[int]) -> Iterator[list[int]]:
        """Yield requests in macro-batches, longest first: within the token budget, cut where padding would double the work."""
        rows: list[int] = []
        for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
            longest = lengths[rows[0]] if rows else 0
            padded = len(rows) * longest
            if rows and (padded + longest > self.most_tokens or (2 * lengths[i] < longest and padded >= LEAST_TOKENS)):
                yield rows
                rows = []
            rows.append(i)
        if rows:
            yield rows

    @torch.no_grad()
    def _score(self, pairs: Sequence[tuple[list[int], int]]) -> list[tuple[float, bool]]:
        """Score (context and continuation, tokens of the continuation) pairs in one forward."""
        inputs, mask = right_padded([ids[:-1] for ids, _ in pairs])
        labels, _ = right_padded([ids[1:] for ids, _ in pairs])
        judged = mask.clone()
        for row, (ids, count) in enumerate(pairs):
            judged[row, : max(0, len(ids) - 1 - count)] = False
        answers = reference(self.model, Blocks(inputs, attention_mask=mask))
        logp, first = label_scores(answers.hidden[judged], answers.head, labels[judged])
        counts = judged.sum(1).tolist()
        return [(float(p.sum()), bool(f.all())) for p, f in zip(logp.split(counts), first.split(counts), strict=True)]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of whole texts, in windows of the model's length that do not overlap."""
        from lm_eval.utils import (  # pyright: ignore[reportMissingImports]
            get_rolling_token_windows,
            make_disjoint_window,
        )

        windows, owner = [], []
        for i, request in enumerate(requests):
            (text,) = request.args
            text_windows = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for context, tokens in map(make_disjoint_window, text_windows):
                windows.append((("", text), context, tokens))
                owner.append(i)
        totals = [0.0] * len(requests)
        for i, (logp, _) in zip(owner, self._loglikelihood_tokens(windows), strict=True):
            totals[i] += logp
        return totals

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Return what the model writes after each context, up to the first of the task's stop strings."""
        answers = []
        groups: dict[tuple[int, float], list[int]] = {}
        for i, request in enumerate(requests):
            options = request.args[1]
            new = min(int(options.get("max_gen_toks", MOST_NEW_TOKENS)), self.max_length // 2)
            temperature = float(options.get("temperature", 0.0)) if options.get("do_sample") else 0.0
            groups.setdefault((new, temperature), []).append(i)
        texts: dict[int, str] = {}
        for (new, temperature), rows in groups.items():
            prompts = [self.tok_encode(requests[i].args[0])[-(self.max_length - new) :] for i in rows]
            written = self.write_tokens(prompts, new, Sampling(temperature=temperature, seed=self.seed))
            for i, ids in zip(rows, written, strict=True):
                stops = requests[i].args[1].get("until") or []
                text = self.tokenizer.decode(ids, skip_special_tokens=True)
                texts[i] = before_stop(text, [stops] if isinstance(stops, str) else stops)
        for i, request in enumerate(requests):
            answers.append(texts[i])
            self.cache_hook.add_partial("generate_until", request.args, texts[i])
        return answers

    def write_tokens(self, prompts: list[list[int]], new: int, sampling: Sampling) -> list[list[int]]:
        """Return at most `new` token ids after each prompt, without the closing one."""
        stop = {self.eot_token_id}
        if isinstance(self.model, Teacher):
            return [c.ids for c in generate(self.model, prompts, new, stop, sampling)]
        return [student_texts(self.model, torch.tensor([p]), new, stop, sampling)[0] for p in prompts]


def before_stop(text: str, stops: Sequence[str]) -> str:
    """Return the text before the first stop string."""
    for stop in stops:
        if stop:
            text = text.split(stop)[0]
    return text
