"""What student and teacher write after the same held-out prompts, and what others think of it.

The honest number is the teacher's NLL of the student's text. Text that repeats itself is easy to predict, so the share of
distinct bigrams (Li et al., 1510.03055) stands beside it.
"""

import itertools
import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moe2dense.common.units import parse_bytes, show_bytes
from moe2dense.config.schema import EvaluateConfig
from moe2dense.data.blocks import Blocks, right_padded
from moe2dense.evaluation.reference import Reference, label_scores, reference
from moe2dense.generation.in_memory import continued
from moe2dense.generation.sampling import Sampling
from moe2dense.generation.streamed import generate

# n prompts, P prompt tokens, C tokens of a continuation, V vocabulary

LEAST_TOKENS = 8  # a teacher that may write fewer writes none


def choose_prompts(blocks: Blocks, count: int, prompt: int, new: int, seed: int = 0) -> tuple[list[int], int, int]:
    """(rows of blocks, P, C): up to `count` blocks that begin with P + C real tokens of one document, spread over the domains.

    Blocks that are shorter than asked for give half their length to the prompt.
    """
    length = blocks.input_ids.shape[1]
    if prompt + new > length:
        prompt = length // 2
        new = length - prompt
    whole = torch.ones(len(blocks), dtype=torch.bool)
    if blocks.attention_mask is not None:
        whole &= blocks.attention_mask[:, : prompt + new].bool().all(1)
    if blocks.document_ids is not None:
        whole &= (blocks.document_ids[:, : prompt + new] == blocks.document_ids[:, :1]).all(1)
    rows = whole.nonzero()[:, 0].tolist()
    random.Random(seed).shuffle(rows)
    seen: dict[str, int] = {}
    turn = {}
    for row in rows:  # the first block of every domain, then the second of each
        turn[row] = seen[blocks.domains[row]] = seen.get(blocks.domains[row], -1) + 1
    return sorted(rows, key=lambda r: turn[r])[:count], prompt, new


def student_texts(model: Any, prompts: Tensor, new: int, stop: set[int], sampling: Sampling) -> list[list[int]]:
    """Token ids a transformers model writes after prompts [n, P], without the closing token; drawn as `generate` draws."""
    room = torch.zeros(len(prompts), new, dtype=prompts.dtype)
    written = continued(
        model, torch.cat([prompts, room], 1), prompts.shape[1], sampling, list(range(len(prompts))), stop
    )
    return [
        list(itertools.takewhile(lambda token: token not in stop, row))
        for row in written[:, prompts.shape[1] :].tolist()
    ]


def teacher_tokens(teacher: Any, new: int, limit: str) -> tuple[int, str]:
    """(how many tokens the teacher writes, 0 = none; how, in words) within `limit` bytes read from disk."""
    if teacher.resident:
        return new, "The teacher wrote from memory."
    size = teacher.checkpoint.nbytes
    most = min(new, parse_bytes(limit, "evaluate.teacher_read") // size)
    if most < LEAST_TOKENS:
        return 0, (
            f"The teacher wrote nothing: it does not fit in memory, every token would read its {show_bytes(size)} from disk, and "
            f"the limit is {limit} (evaluate.teacher_read)."
        )
    cut = f", so both texts stop after {most} tokens (evaluate.teacher_read {limit})" if most < new else ""
    return most, f"The teacher wrote streamed from disk, {show_bytes(size)} a token{cut}."


def side_by_side(
    student: Any,
    teacher: Any,
    blocks: Blocks,
    options: EvaluateConfig,
    *,
    tokenizer: Any,
    seed: int = 0,
    judge: Any = None,
) -> dict[str, Any] | None:
    """Student and teacher continue the same held-out prompts; every text is scored by both, and by `judge` (see judge.py).

    student: a transformers model. Returns the report's section "samples": {"rows": [{"domain", "prompt", "student", "teacher"
    (None where it wrote nothing), "text" (how the held-out text goes on)}], "scores": {writer: {"teacher", "student" (NLL in
    nats per token), "judge" (nats per byte), "distinct" (share of distinct bigrams)}}, "how", "prompt_tokens", "tokens",
    "temperature", "judge"}; None where no block is long enough or no sample is asked for.
    """
    rows, prompt, new = choose_prompts(blocks, options.samples, options.prompt_tokens, options.sample_tokens, seed)
    if not rows or prompt < 1 or new < 1:
        return None
    most, how = teacher_tokens(teacher, new, options.teacher_read)
    new = most or new
    prompts = blocks.input_ids[rows, :prompt]
    sampling = Sampling(temperature=options.sample_temperature, seed=seed)
    stop = {tokenizer.eos_token_id} - {None}
    written = {"student": student_texts(student, prompts, new, stop, sampling)}
    if most:
        written["teacher"] = [c.ids for c in generate(teacher, prompts.tolist(), new, stop, sampling)]
    written["text"] = blocks.input_ids[rows, prompt : prompt + new].tolist()
    texts = {who: [_text(tokenizer, p, ids) for p, ids in zip(prompts.tolist(), found, strict=True)]
             for who, found in written.items()}  # fmt: skip
    shown = [tokenizer.decode(p) for p in prompts.tolist()]
    scores = _scores(written, prompts, {"teacher": teacher, "student": student})
    for who, found in texts.items():
        scores[who]["distinct"] = distinct_bigrams(written[who])
        scores[who]["judge"] = judge.nats_per_byte(shown, found) if judge else None
    return {
        "rows": [
            {"domain": blocks.domains[row], "prompt": shown[i], "teacher": None}
            | {who: found[i] for who, found in texts.items()}
            for i, row in enumerate(rows)
        ],
        "scores": scores, "how": how, "prompt_tokens": prompt, "tokens": new,
        "temperature": options.sample_temperature, "judge": judge.name if judge else "",
    }  # fmt: skip


def _text(tokenizer: Any, prompt: list[int], ids: list[int]) -> str:
    """What `ids` add to the prompt's text: decoding them alone could lose a leading space or half a character."""
    before, whole = tokenizer.decode(prompt), tokenizer.decode([*prompt, *ids])
    return whole[len(before) :] if whole.startswith(before) else tokenizer.decode(ids)


def _scores(written: dict[str, list[list[int]]], prompts: Tensor, readers: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """{writer: {reader: mean NLL in nats per written token}}, from one forward of each reader over every text."""
    places = [(who, i) for who, found in written.items() for i in range(len(found))]
    ids, mask = right_padded([[*prompts[i].tolist(), *written[who][i]] for who, i in places])
    judged = mask.clone()
    judged[:, : prompts.shape[1]] = False
    scores: dict[str, dict[str, Any]] = {who: {} for who in written}
    for reader, model in readers.items():
        nll = text_nll(reference(model, Blocks(ids, attention_mask=mask)), judged)
        for who in written:
            own = [row for row, (name, _) in enumerate(places) if name == who]
            total, count = sum(float(nll[r].sum()) for r in own), int(judged[own].sum())
            scores[who][reader] = total / count if count else None
    return scores


def text_nll(ref: Reference, judged: Tensor) -> Tensor:
    """[N, S] nats of every token where `judged` is true, given those before it; 0 elsewhere. The first token is never judged."""
    keep = judged[:, 1:]
    found, _ = label_scores(ref.hidden[:, :-1][keep], ref.head, ref.blocks.input_ids[:, 1:][keep])
    nll = torch.zeros(judged.shape)
    nll[:, 1:][keep] = -found
    return nll


def distinct_bigrams(texts: Sequence[Sequence[int]]) -> float | None:
    """Share of the texts' bigrams that are distinct within their own text; None where there are none."""
    pairs = [list(itertools.pairwise(t)) for t in texts]
    total = sum(map(len, pairs))
    return sum(len(set(p)) for p in pairs) / total if total else None
