"""From a prompt and what was written after it to the record that `--data` reads."""

from typing import Any

from transformers import PreTrainedTokenizerBase

from moe2dense.generation.filters import Sieve
from moe2dense.generation.prompts import Prompt
from moe2dense.generation.streamed import Completion


def filtered_records(
    prompts: list[Prompt],
    answers: list[Completion],
    first: int,
    learn_prompt: bool,
    tokenizer: PreTrainedTokenizerBase,
    sieve: Sieve,
) -> list[tuple[dict[str, Any], int]]:
    """Return (record, tokens) of every text that passes the filters; first: number of the first prompt."""
    records = []
    for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        text = written_text(prompt, answer.ids, tokenizer)
        if not sieve.keeps(prompt.text, text, len(answer.ids), answer.nll):
            continue
        record = as_record(prompt, text, learn_prompt)
        record |= {"nll": round(answer.nll, 4), "stopped": answer.stopped, "number": first + i}
        records.append((record, len(prompt.ids) + len(answer.ids) + 1))
    return records


def written_text(prompt: Prompt, ids: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the text that `ids` add to a prompt's; decoded together, since a tokenizer may drop a leading space."""
    together = str(tokenizer.decode([*prompt.ids, *ids], skip_special_tokens=True))
    before = str(tokenizer.decode(prompt.ids, skip_special_tokens=True))
    if together.startswith(before):
        return together[len(before) :]
    return str(tokenizer.decode(ids, skip_special_tokens=True))


def as_record(prompt: Prompt, text: str, learn_prompt: bool) -> dict[str, Any]:
    """Return a conversation with its answer, or prompt and completion, or one text where both are learnt."""
    domain = {"domain": prompt.domain} if prompt.domain else {}
    if prompt.messages:
        return {"messages": [*prompt.messages, {"role": "assistant", "content": text.strip()}]} | prompt.beside | domain
    if learn_prompt:
        return {"text": prompt.text + text, "prompt_characters": len(prompt.text)} | domain
    return {"prompt": prompt.text, "completion": text} | domain


def completion_of(record: dict[str, Any]) -> str:
    """Return the part of a record that was written after the prompt."""
    if "messages" in record:
        return record["messages"][-1]["content"]
    return record.get("completion") or record["text"][record["prompt_characters"] :]
