"""A conversation with a model at a terminal: what was said becomes a prompt, and the answer comes token by token."""

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from moe2dense.common.seeds import uniforms
from moe2dense.data.chat.conversation import Conversation
from moe2dense.data.chat.template import ChatTemplate
from moe2dense.errors import UserError
from moe2dense.generation.decoders import TextDecoder, decoder_for
from moe2dense.generation.sampling import Sampling, choose
from moe2dense.teacher.kinds import AnyTeacher

_HALF = "\ufffd"  # what a tokenizer writes for bytes that are no whole character yet


@dataclass
class Dialogue:
    """What was said so far, as a tokenizer reads it: by its chat template, or as one running text where it has none."""

    tokenizer: PreTrainedTokenizerBase
    messages: list[dict[str, str]] = field(default_factory=list)

    @property
    def chats(self) -> bool:
        """Whether the tokenizer has a chat template."""
        return bool(self.tokenizer.chat_template)

    def say(self, text: str) -> None:
        """Add what the user says."""
        self.messages.append({"role": "user", "content": text})

    def answered(self, text: str) -> None:
        """Add what the model answered."""
        self.messages.append({"role": "assistant", "content": text})

    def prompt(self) -> list[int]:
        """Return the token ids up to where the next answer begins."""
        if self.chats:
            template = ChatTemplate(self.tokenizer)
            chat = template.adapted(Conversation([dict(m) for m in self.messages]))
            return template.tokens(template.render(chat, answer=True))[0]
        return list(self.tokenizer("".join(m["content"] for m in self.messages))["input_ids"])


def spoken(
    model: AnyTeacher,
    tokenizer: PreTrainedTokenizerBase,
    prompt: list[int],
    sampling: Sampling,
    longest: int,
    stop: Collection[int],
    number: int = 0,
) -> Iterator[str]:
    """Yield a model's answer to a prompt piece by piece, in whole characters, of at most `longest` tokens.

    number: of the answer in its dialogue; what is drawn depends on it and on the seed. Raises UserError for an empty prompt.
    """
    if not prompt:
        raise UserError("there is nothing to answer: the prompt has no tokens")
    with torch.no_grad():
        ids = _ids(decoder_for(model, torch.tensor([prompt])), sampling, longest, stop, number)
        yield from _pieces(tokenizer, ids)


def _ids(decoder: TextDecoder, sampling: Sampling, longest: int, stop: Collection[int], number: int) -> Iterator[int]:
    drawn = torch.from_numpy(uniforms(sampling.seed, number, longest))
    logits: Tensor = decoder.prefill()
    for at in range(longest):
        token = choose(logits.cpu(), sampling, drawn[at : at + 1])
        if int(token) in stop:
            return
        yield int(token)
        if at + 1 < longest:
            logits = decoder.step(token.to(logits.device))


def _pieces(tokenizer: PreTrainedTokenizerBase, ids: Iterator[int]) -> Iterator[str]:
    """Yield the text of ids as they come; the bytes of an unfinished character wait for the rest of it."""
    written: list[int] = []
    shown = ""
    for token in ids:
        written.append(token)
        text = str(tokenizer.decode(written, skip_special_tokens=True))
        if not text.endswith(_HALF):
            yield text[len(shown) :]
            shown = text
    rest = str(tokenizer.decode(written, skip_special_tokens=True))[len(shown) :]
    if rest:
        yield rest


def talk(
    models: dict[str, AnyTeacher],
    tokenizer: PreTrainedTokenizerBase,
    read: Callable[[], str | None],
    show: Callable[[dict[str, str]], None],
    sampling: Sampling,
    longest: int,
    stop: Collection[int],
    window: int,
) -> None:
    """Let several models answer the same words, each in its own dialogue, until `read` returns None.

    read: the user's next words; show: is given the answers so far by model, anew for each piece, and once more when all are whole.
    window: positions that the models have; older turns are forgotten, and said so by a model that no longer knows them.
    """
    dialogues = {name: Dialogue(tokenizer) for name in models}
    turn = 0
    while (said := read()) is not None:
        answers: dict[str, str] = {}
        for name, model in models.items():
            dialogue = dialogues[name]
            dialogue.say(said)
            prompt = _recent(dialogue, window - longest)
            answers[name] = ""
            for piece in spoken(model, tokenizer, prompt, sampling, longest, stop, turn):
                answers[name] += piece
                show(answers)
            dialogue.answered(answers[name])
        show(answers)
        turn += 1


def _recent(dialogue: Dialogue, room: int) -> list[int]:
    """Return the prompt of a dialogue, whose oldest turns are dropped until it has at most `room` tokens. Raises UserError where even
    the last turn is too long."""
    prompt = dialogue.prompt()
    while len(prompt) > room and len(dialogue.messages) > 1:
        del dialogue.messages[: 2 if len(dialogue.messages) > 2 else 1]
        prompt = dialogue.prompt()
    if len(prompt) > room:
        raise UserError(
            f"what was said has {len(prompt)} tokens, and the model has room for {max(0, room)} before its answer; say less"
        )
    return prompt
