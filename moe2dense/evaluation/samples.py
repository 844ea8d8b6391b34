"""What student and teacher write after the same held-out prompts, and how likely others find it.

The honest number is the teacher's NLL of the student's text. Text that repeats itself is easy to predict, so the share of
distinct bigrams (Li et al., 1510.03055) is given with it.
"""

import itertools
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moe2dense.common.devices import moved_to
from moe2dense.common.processes import from_first
from moe2dense.config.schema import EvaluateConfig
from moe2dense.data.blocks import Blocks, right_padded
from moe2dense.evaluation.judge import Judge
from moe2dense.evaluation.likelihood import text_nll
from moe2dense.evaluation.reference import AnyModel, reference
from moe2dense.evaluation.sample_texts import choose_prompts, student_texts, teacher_tokens
from moe2dense.generation.sampling import Sampling
from moe2dense.generation.streamed import generate
from moe2dense.teacher.model import Teacher

# n prompts, P prompt tokens


def side_by_side(
    student: PreTrainedModel,
    teacher: Teacher,
    blocks: Blocks,
    options: EvaluateConfig,
    *,
    tokenizer: PreTrainedTokenizerBase,
    seed: int = 0,
    judge: Judge | None = None,
) -> dict[str, Any] | None:
    """Let student and teacher continue the same held-out prompts; both score every text, and so does `judge`.

    Processes that have joined must all call it: the first one lets the models write, all score.
    Returns the report's section "samples": {"rows": [{"domain", "prompt", "student", "teacher" (None where it wrote
    nothing), "text" (how the held-out text goes on)}], "scores": {writer: {"teacher", "student" (NLL in nats per token),
    "judge" (nats per byte), "distinct" (share of distinct bigrams)}}, "how", "prompt_tokens", "tokens", "temperature",
    "judge"}; None where no block is long enough or no sample is asked for.
    """
    rows, prompt, new = choose_prompts(blocks, options.samples, options.prompt_tokens, options.sample_tokens, seed)
    if not rows or prompt < 1 or new < 1:
        return None
    prompts = blocks.input_ids[rows, :prompt]
    sampling = Sampling(temperature=options.sample_temperature, seed=seed)
    end: Any = tokenizer.eos_token_id  # an id, for a tokenizer of one text
    stop = set() if end is None else {end}

    def write() -> tuple[int, str, dict[str, list[list[int]]]]:
        most, how = teacher_tokens(teacher, new, options.teacher_read)
        with moved_to(student, teacher.device):
            ids = {"student": student_texts(student, prompts, most or new, stop, sampling)}
        if most:
            ids["teacher"] = [answer.ids for answer in generate(teacher, prompts.tolist(), most, stop, sampling)]
        return most or new, how, ids

    new, how, ids = from_first(write)
    ids["text"] = blocks.input_ids[rows, prompt : prompt + new].tolist()
    texts = {writer: _texts(tokenizer, prompts, written) for writer, written in ids.items()}
    shown_prompts = [str(tokenizer.decode(p)) for p in prompts.tolist()]
    scores = _scores(ids, prompts, {"teacher": teacher, "student": student}, teacher.device)
    for writer, written in texts.items():
        scores[writer]["distinct"] = distinct_bigrams(ids[writer])
        scores[writer]["judge"] = judge.nats_per_byte(shown_prompts, written) if judge else None
    return {
        "rows": [
            {"domain": blocks.domains[row], "prompt": shown_prompts[i], "teacher": None}
            | {writer: written[i] for writer, written in texts.items()}
            for i, row in enumerate(rows)
        ],
        "scores": scores,
        "how": how,
        "prompt_tokens": prompt,
        "tokens": new,
        "temperature": options.sample_temperature,
        "judge": judge.name if judge else "",
    }


def _texts(tokenizer: PreTrainedTokenizerBase, prompts: Tensor, written: list[list[int]]) -> list[str]:
    return [_text(tokenizer, prompt, ids) for prompt, ids in zip(prompts.tolist(), written, strict=True)]


def _text(tokenizer: PreTrainedTokenizerBase, prompt: list[int], ids: list[int]) -> str:
    """Return what `ids` add to the prompt's text: decoding them alone could lose a leading space or half a character."""
    prompt_text, full_text = str(tokenizer.decode(prompt)), str(tokenizer.decode([*prompt, *ids]))
    return full_text[len(prompt_text) :] if full_text.startswith(prompt_text) else str(tokenizer.decode(ids))


def _scores(
    written: Mapping[str, list[list[int]]], prompts: Tensor, readers: Mapping[str, AnyModel], device: torch.device
) -> dict[str, dict[str, Any]]:
    """Return {writer: {reader: mean NLL in nats per written token}}, from one forward of each reader over every text on `device`."""
    writer_of = [(writer, i) for writer, texts in written.items() for i in range(len(texts))]
    ids, mask = right_padded([[*prompts[i].tolist(), *written[writer][i]] for writer, i in writer_of])
    judged = mask.clone()
    judged[:, : prompts.shape[1]] = False
    scores: dict[str, dict[str, Any]] = {writer: {} for writer in written}
    for reader, model in readers.items():
        with moved_to(model, device) if isinstance(model, PreTrainedModel) else nullcontext():
            nll = text_nll(reference(model, Blocks(ids, attention_mask=mask)), judged)
        for writer in written:
            rows = [row for row, (name, _) in enumerate(writer_of) if name == writer]
            total, count = sum(float(nll[r].sum()) for r in rows), int(judged[rows].sum())
            scores[writer][reader] = total / count if count else None
    return scores


def distinct_bigrams(texts: Sequence[Sequence[int]]) -> float | None:
    """Return the share of the texts' bigrams that are distinct within their own text; None where there are none."""
    pairs = [list(itertools.pairwise(t)) for t in texts]
    total = sum(map(len, pairs))
    return sum(len(set(p)) for p in pairs) / total if total else None
