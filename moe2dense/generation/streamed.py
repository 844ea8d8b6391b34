"""Let a streamed teacher continue thousands of prompts at once, in few passes over its weights."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from moe2dense.common.seeds import uniforms
from moe2dense.errors import UserError
from moe2dense.generation.sampling import Sampling, choose
from moe2dense.teacher.decode import Decoder, sequences_that_fit
from moe2dense.teacher.model import Teacher

# B sequences, V vocabulary, W beams


@dataclass
class Completion:
    """The token ids that follow a prompt, without the token that ends the text.

    nll: the teacher's mean nats per written token, the last one included; stopped: the teacher ended the text itself.
    """

    ids: list[int] = field(default_factory=list)
    nll: float = 0.0
    stopped: bool = False


def check_lengths(teacher: Teacher, prompts: Sequence[Sequence[int]], new_tokens: int) -> None:
    """Raise UserError when a prompt is empty or a text could outgrow the teacher's positions."""
    if new_tokens < 1:
        raise UserError(f"new_tokens must be at least 1; found {new_tokens}")
    if any(len(p) == 0 for p in prompts):
        raise UserError("a prompt has no tokens; every text needs something to continue")
    positions = getattr(teacher.config.get_text_config(), "max_position_embeddings", None)
    longest = max(map(len, prompts), default=0)
    if positions and longest + new_tokens > positions:
        raise UserError(
            f"a prompt of {longest} tokens and {new_tokens} new ones exceed the teacher's {positions} positions; lower one of them"
        )


@torch.no_grad()
def generate(
    teacher: Teacher,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    stop: Collection[int],
    sampling: Sampling | None = None,
    *,
    first: int = 0,
    progress: Callable[..., None] | None = None,
) -> list[Completion]:
    """Write at most `new_tokens` tokens after each prompt; any id of `stop` ends a text.

    Each token costs one pass over the teacher's weights for as many sequences as its memory budget has room for keys and
    values. `first`: number of the first prompt: what is drawn depends on the seed and a prompt's number, not on the other
    prompts. Raises UserError for prompts that are empty or too long, and when memory has no room for one sequence.
    """
    sampling = sampling or Sampling()
    check_lengths(teacher, prompts, new_tokens)
    completions = [Completion() for _ in prompts]
    # prompts of about one length need little padding
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    done = 0
    while done < len(order):
        # the longest of a wave is its last, and a shorter wave only needs less
        each = (len(prompts[order[-1]]) + new_tokens) * sampling.beams
        wave = order[done : done + sequences_that_fit(teacher, each)]
        texts = [prompts[i] for i in wave]
        if sampling.beams > 1:
            answers = _beam_wave(teacher, texts, new_tokens, set(stop), sampling.beams, progress)
        else:
            drawn = np.stack([uniforms(sampling.seed, first + i, new_tokens) for i in wave])
            answers = _wave(teacher, texts, new_tokens, set(stop), sampling, torch.from_numpy(drawn), progress)
        for i, answer in zip(wave, answers, strict=True):
            completions[i] = answer
        done += len(wave)
    return completions


def _wave(
    teacher: Teacher,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    stop: set[int],
    sampling: Sampling,
    drawn: Tensor,
    progress: Callable[..., None] | None,
) -> list[Completion]:
    """Write after prompts whose keys and values fit in memory together; drawn [B, new tokens]: uniform numbers."""
    answers = [Completion() for _ in prompts]
    decoder = Decoder(teacher, prompts)
    logits, alive = decoder.prefill(), torch.arange(len(prompts))
    for step in range(new_tokens):
        tokens = choose(logits, sampling, drawn[alive, step])
        nll = -logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]
        going = torch.ones(len(alive), dtype=torch.bool)
        for at, (row, token, cost) in enumerate(zip(alive.tolist(), tokens.tolist(), nll.tolist(), strict=True)):
            answer = answers[row]
            answer.nll += cost
            if token in stop:
                answer.stopped, going[at] = True, False
            else:
                answer.ids.append(token)
        if progress:
            progress("write", step + 1, new_tokens, texts=int(going.sum()))
        if step + 1 == new_tokens or not bool(going.any()):
            break
        if not bool(going.all()):
            going_on = going.nonzero()[:, 0]
            decoder.select(going_on)
            alive, tokens = alive[going_on], tokens[going_on]
        logits = decoder.step(tokens)
    for answer in answers:
        answer.nll /= max(1, len(answer.ids) + answer.stopped)
    return answers


def _beam_wave(
    teacher: Teacher,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    stop: set[int],
    beams: int,
    progress: Callable[..., None] | None,
) -> list[Completion]:
    """Search with beams; return the best text by mean log-probability among those that ended or reached new_tokens."""
    decoder = Decoder(teacher, prompts)
    logits = decoder.prefill()
    scores = torch.zeros(len(prompts), 1)  # [B, beams so far]
    texts: list[list[list[int]]] = [[[]] for _ in prompts]
    best: list[Completion | None] = [None] * len(prompts)
    for step in range(new_tokens):
        width, vocabulary = scores.shape[1], logits.shape[1]
        total = scores[:, :, None] + logits.log_softmax(-1).view(len(prompts), width, vocabulary)
        count = min(beams + len(stop) * width, width * vocabulary)  # enough that `beams` of them go on
        values, places = total.flatten(1).topk(count)
        index, tokens, next_scores = [], [], []
        for i in range(len(prompts)):
            rows = _advance(values[i].tolist(), places[i].tolist(), vocabulary, texts[i], stop, beams, best, i)
            texts[i] = [texts[i][parent] + [token] for _, parent, token in rows]
            next_scores.append([score for score, _, _ in rows])
            index += [i * width + parent for _, parent, _ in rows]
            tokens += [token for _, _, token in rows]
        scores = torch.tensor(next_scores)
        if progress:
            progress("write", step + 1, new_tokens, texts=len(prompts))
        if step + 1 == new_tokens:
            break
        decoder.select(torch.tensor(index))
        logits = decoder.step(torch.tensor(tokens))
    return [_best(best[i], texts[i], scores[i].tolist()) for i in range(len(prompts))]


def _advance(
    values: list[float],
    places: list[int],
    vocabulary: int,
    texts: list[list[int]],
    stop: set[int],
    beams: int,
    best: list[Completion | None],
    number: int,
) -> list[tuple[float, int, int]]:
    """Return the `beams` best continuations (score, parent, token), sorted by parent.

    Texts that end compete for `best[number]`.
    """
    going: list[tuple[float, int, int]] = []
    for rank, (score, place) in enumerate(zip(values, places, strict=True)):
        parent, token = divmod(place, vocabulary)
        if token not in stop:
            going.append((score, parent, token))
            if len(going) == beams:
                break
        elif rank < beams:  # an ending counts when it is among the best itself
            mean = -score / (len(texts[parent]) + 1)
            so_far = best[number]
            if so_far is None or mean < so_far.nll:
                best[number] = Completion(list(texts[parent]), mean, True)
    return sorted(going, key=lambda row: row[1])


def _best(ended: Completion | None, texts: list[list[int]], scores: list[float]) -> Completion:
    """Return the best of the ended text and those that still go on, by mean log-probability."""
    at = max(range(len(texts)), key=lambda k: scores[k])
    open_text = Completion(texts[at], -scores[at] / max(1, len(texts[at])), False)
    return open_text if ended is None or open_text.nll < ended.nll else ended
