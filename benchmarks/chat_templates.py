"""Chat templates written after the published behaviour of twelve families, each with the same rendering in plain Python.

A rendering is a list of (text, whether the assistant writes it); the conversation's last turn is the last that is rendered.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from typing import Any

Turns = list[dict[str, Any]]
Segments = list[tuple[str, bool]]
THINK, UNTHINK = "<think>", "</think>"


@dataclass(frozen=True)
class Family:
    """A template, its reference in Python, the tokens of its own, and what its conversations may hold."""

    template: str
    reference: Callable[[Turns, list | None, date], Segments]
    tokens: tuple[str, ...]
    features: frozenset[str]


def text_of(turn: dict[str, Any]) -> str:
    """Return a turn's text, parts joined."""
    content = turn.get("content") or ""
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def last_user(turns: Turns) -> int:
    """Return the number of the last user's turn, -1 without one."""
    return max((i for i, t in enumerate(turns) if t["role"] == "user"), default=-1)


def calls_of(turn: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a turn's calls, name and arguments."""
    return [call["function"] for call in turn.get("tool_calls", [])]


def as_json(value: Any) -> str:
    """Return JSON as transformers' `tojson` writes it."""
    return json.dumps(value, ensure_ascii=False)


# mistral: system prompt and tools stand before the last user's turn, wherever that is
MISTRAL = """{{ bos_token }}{%- if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set turns = messages[1:] %}{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}
{%- set ns = namespace(last=-1) %}{%- for m in turns %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for m in turns %}
{%- if m.role == 'user' %}{% if tools and loop.index0 == ns.last %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}[INST]{% if system and loop.index0 == ns.last %}{{ ' ' + system + '\n\n' + m.content }}{% else %}{{ ' ' + m.content }}{% endif %}[/INST]
{%- elif m.role == 'assistant' and m.tool_calls %}[TOOL_CALLS]{% for c in m.tool_calls %}{{ {'name': c.function.name, 'arguments': c.function.arguments} | tojson }}{% endfor %}{{ eos_token }}
{%- elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}
{%- elif m.role == 'tool' %}[TOOL_RESULTS]{{ m.content }}[/TOOL_RESULTS]
{%- else %}{{ raise_exception('unknown role ' + m.role) }}{% endif %}{% endfor %}"""


def mistral(turns: Turns, tools: list | None, day: date) -> Segments:
    """Render as MISTRAL does."""
    system = text_of(turns[0]) if turns[0]["role"] == "system" else ""
    turns = turns[1:] if turns[0]["role"] == "system" else turns
    out: Segments = [("<s>", False)]
    for i, turn in enumerate(turns):
        if turn["role"] == "user":
            last = i == last_user(turns)
            shown = f"[AVAILABLE_TOOLS]{as_json(tools)}[/AVAILABLE_TOOLS]" if tools and last else ""
            begin = f" {system}\n\n" if system and last else " "
            out.append((f"{shown}[INST]{begin}{text_of(turn)}[/INST]", False))
        elif turn["role"] == "tool":
            out.append((f"[TOOL_RESULTS]{text_of(turn)}[/TOOL_RESULTS]", False))
        elif calls_of(turn):
            calls = "".join(as_json({"name": c["name"], "arguments": c["arguments"]}) for c in calls_of(turn))
            out.append((f"[TOOL_CALLS]{calls}</s>", True))
        else:
            out.append((f" {text_of(turn)}</s>", True))
    return out


# qwen2: ChatML; calls and results in tags, a default system prompt
QWEN2 = """{%- if messages[0].role == 'system' %}{{ '<|im_start|>system\n' + messages[0].content }}{% else %}{{ '<|im_start|>system\nYou are a helpful assistant.' }}{% endif %}{% if tools %}{{ '\n\n# Tools\n' }}{% for t in tools %}{{ (t | tojson) + '\n' }}{% endfor %}{% endif %}{{ '<|im_end|>\n' }}
{%- for m in messages %}
{%- if m.role == 'user' %}{{ '<|im_start|>user\n' + m.content + '<|im_end|>\n' }}
{%- elif m.role == 'assistant' %}{{ '<|im_start|>assistant\n' }}{% if m.content %}{{ m.content }}{% endif %}{% for c in m.tool_calls or [] %}{{ '\n<tool_call>\n{"name": "' + c.function.name + '", "arguments": ' + (c.function.arguments | tojson) + '}\n</tool_call>' }}{% endfor %}{{ '<|im_end|>\n' }}
{%- elif m.role == 'tool' %}{{ '<|im_start|>user\n<tool_response>\n' + m.content + '\n</tool_response><|im_end|>\n' }}
{%- endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""


def _chatml_calls(turn: dict[str, Any]) -> str:
    return "".join(
        f'\n<tool_call>\n{{"name": "{c["name"]}", "arguments": {as_json(c["arguments"])}}}\n</tool_call>'
        for c in calls_of(turn)
    )


def _chatml(turns: Turns, tools: list | None, default: str, answer: Callable[[int], str]) -> Segments:
    """Render ChatML; answer: what the assistant writes in a turn, up to the end mark."""
    system = text_of(turns[0]) if turns[0]["role"] == "system" else default
    shown = "\n\n# Tools\n" + "".join(as_json(t) + "\n" for t in tools) if tools else ""
    out: Segments = [(f"<|im_start|>system\n{system}{shown}<|im_end|>\n", False)] if system or shown else []
    for i, turn in enumerate(turns):
        if turn["role"] == "user":
            out.append((f"<|im_start|>user\n{text_of(turn)}<|im_end|>\n", False))
        elif turn["role"] == "tool":
            out.append((f"<|im_start|>user\n<tool_response>\n{text_of(turn)}\n</tool_response><|im_end|>\n", False))
        elif turn["role"] == "assistant":
            out += [("<|im_start|>assistant\n", False), (answer(i) + "<|im_end|>\n", True)]
    return out


def qwen2(turns: Turns, tools: list | None, day: date) -> Segments:
    """Render as QWEN2 does."""
    return _chatml(turns, tools, "You are a helpful assistant.", lambda i: text_of(turns[i]) + _chatml_calls(turns[i]))


# qwen3: thinking is kept after the last user's turn alone, where an answer without any gets an empty block
QWEN3 = """{%- if messages[0].role == 'system' or tools %}{{ '<|im_start|>system\n' }}{% if messages[0].role == 'system' %}{{ messages[0].content }}{% endif %}{% if tools %}{{ '\n\n# Tools\n' }}{% for t in tools %}{{ (t | tojson) + '\n' }}{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endif %}
{%- set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
{%- if m.role == 'user' %}{{ '<|im_start|>user\n' + m.content + '<|im_end|>\n' }}
{%- elif m.role == 'assistant' %}{% set content = m.content if m.content is string else '' %}{% set thinking = m.reasoning_content if m.reasoning_content is string else '' %}
{%- if not thinking and '</think>' in content %}{% set thinking = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}
{{- '<|im_start|>assistant\n' }}{% if loop.index0 > ns.last and (loop.last or thinking) %}{{ '<think>\n' + thinking.strip('\n') + '\n</think>\n\n' }}{% endif %}{{ content }}{% for c in m.tool_calls or [] %}{{ '\n<tool_call>\n{"name": "' + c.function.name + '", "arguments": ' + (c.function.arguments | tojson) + '}\n</tool_call>' }}{% endfor %}{{ '<|im_end|>\n' }}
{%- elif m.role == 'tool' %}{{ '<|im_start|>user\n<tool_response>\n' + m.content + '\n</tool_response><|im_end|>\n' }}
{%- endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""


def _split_thinking(turn: dict[str, Any]) -> tuple[str, str]:
    """Return (thinking, answer) of a turn that has them apart or in tags."""
    thinking, content = turn.get("reasoning_content") or "", text_of(turn)
    if not thinking and UNTHINK in content:
        before, _, content = content.rpartition(UNTHINK)
        thinking, content = before.split(THINK)[-1], content.lstrip("\n")
    return thinking.strip("\n"), content


def qwen3(turns: Turns, tools: list | None, day: date) -> Segments:
    """Render as QWEN3 does."""

    def answer(i: int) -> str:
        thinking, content = _split_thinking(turns[i])
        shown = i > last_user(turns) and (i == len(turns) - 1 or thinking)
        return (f"<think>\n{thinking}\n</think>\n\n" if shown else "") + content + _chatml_calls(turns[i])

    return _chatml(turns, tools, "", answer)


# gpt-oss: channels; the thinking of earlier answers goes, the last answer ends with another mark; today's date
GPT_OSS = """{{ '<|start|>system<|message|>Current date: ' + strftime_now('%Y-%m-%d') + '<|end|>' }}{% set turns = messages %}{% if messages[0].role == 'system' or messages[0].role == 'developer' %}{{ '<|start|>developer<|message|># Instructions\n\n' + messages[0].content + '<|end|>' }}{% set turns = messages[1:] %}{% endif %}{% if tools %}{{ '<|start|>developer<|message|># Tools\n' + (tools | tojson) + '<|end|>' }}{% endif %}
{%- set ns = namespace(final=-1, called='') %}{% for m in turns %}{% if m.role == 'assistant' and not m.tool_calls %}{% set ns.final = loop.index0 %}{% endif %}{% endfor %}
{%- for m in turns %}
{%- if m.role == 'user' %}{{ '<|start|>user<|message|>' + m.content + '<|end|>' }}
{%- elif m.role == 'assistant' and m.tool_calls %}{% set c = m.tool_calls[0].function %}{% set ns.called = c.name %}{{ '<|start|>assistant' }}{% if m.thinking and loop.index0 > ns.final %}{{ '<|channel|>analysis<|message|>' + m.thinking + '<|end|><|start|>assistant' }}{% endif %}{{ ' to=functions.' + c.name + '<|channel|>commentary<|message|>' + (c.arguments | tojson) + '<|call|>' }}
{%- elif m.role == 'assistant' and loop.last and not add_generation_prompt %}{{ '<|start|>assistant' }}{% if m.thinking %}{{ '<|channel|>analysis<|message|>' + m.thinking + '<|end|><|start|>assistant' }}{% endif %}{{ '<|channel|>final<|message|>' + m.content + '<|return|>' }}
{%- elif m.role == 'assistant' %}{{ '<|start|>assistant<|channel|>final<|message|>' + m.content + '<|end|>' }}
{%- elif m.role == 'tool' %}{{ '<|start|>functions.' + ns.called + ' to=assistant<|channel|>commentary<|message|>' + (m.content | tojson) + '<|end|>' }}
{%- endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"""


def gpt_oss(turns: Turns, tools: list | None, day: date) -> Segments:
    """Render as GPT_OSS does."""
    out: Segments = [(f"<|start|>system<|message|>Current date: {day.isoformat()}<|end|>", False)]
    if turns[0]["role"] == "system":
        out.append((f"<|start|>developer<|message|># Instructions\n\n{text_of(turns[0])}<|end|>", False))
        turns = turns[1:]
    if tools:
        out.append((f"<|start|>developer<|message|># Tools\n{as_json(tools)}<|end|>", False))
    final = max((i for i, t in enumerate(turns) if t["role"] == "assistant" and not calls_of(t)), default=-1)
    called = ""
    for i, turn in enumerate(turns):
        thinking = turn.get("reasoning_content") or ""
        analysis = f"<|channel|>analysis<|message|>{thinking}<|end|><|start|>assistant" if thinking else ""
        if turn["role"] == "user":
            out.append((f"<|start|>user<|message|>{text_of(turn)}<|end|>", False))
        elif turn["role"] == "tool":
            result = f"<|channel|>commentary<|message|>{as_json(text_of(turn))}<|end|>"
            out.append((f"<|start|>functions.{called} to=assistant{result}", False))
        elif calls_of(turn):
            called = calls_of(turn)[0]["name"]
            call = f" to=functions.{called}<|channel|>commentary<|message|>{as_json(calls_of(turn)[0]['arguments'])}<|call|>"
            out += [("<|start|>assistant", False), ((analysis if i > final else "") + call, True)]
        elif i == len(turns) - 1:
            said = f"{analysis}<|channel|>final<|message|>{text_of(turn)}<|return|>"
            out += [("<|start|>assistant", False), (said, True)]
        else:
            said = f"<|channel|>final<|message|>{text_of(turn)}<|end|>"
            out += [("<|start|>assistant", False), (said, True)]
    return out


# glm4: an empty block stands for thinking that is gone
GLM4 = """[gMASK]<sop>{% if tools %}{{ '<|system|>\n# Tools\n' }}{% for t in tools %}{{ (t | tojson) + '\n' }}{% endfor %}{% endif %}
{%- set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
{%- if m.role == 'user' %}{{ '<|user|>\n' }}{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endif %}
{%- elif m.role == 'system' %}{{ '<|system|>\n' }}{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endif %}
{%- elif m.role == 'assistant' %}{{ '<|assistant|>\n' }}{% if loop.index0 > ns.last and m.reasoning_content %}{{ '<think>' + m.reasoning_content.strip() + '</think>' }}{% else %}{{ '<think></think>' }}{% endif %}{% if m.content is string %}{% if m.content %}{{ '\n' + m.content }}{% endif %}{% else %}{{ '\n' }}{% for p in m.content or [] %}{{ p.text }}{% endfor %}{% endif %}{% for c in m.tool_calls or [] %}{{ '\n<tool_call>' + c.function.name }}{% for k, v in c.function.arguments.items() %}{{ '\n<arg_key>' + k + '</arg_key>\n<arg_value>' }}{{ v if v is string else v | tojson }}{{ '</arg_value>' }}{% endfor %}{{ '\n</tool_call>' }}{% endfor %}
{%- elif m.role == 'tool' %}{{ '<|observation|>\n<tool_response>\n' + m.content + '\n</tool_response>' }}
{%- endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"""


def glm4(turns: Turns, tools: list | None, day: date) -> Segments:
    """Render as GLM4 does."""
    shown = "<|system|>\n# Tools\n" + "".join(as_json(t) + "\n" for t in tools) if tools else ""
    out: Segments = [(f"[gMASK]<sop>{shown}", False)]
    for i, turn in enumerate(turns):
        if turn["role"] in ("user", "system"):
            out.append((f"<|{turn['role']}|>\n{text_of(turn)}", False))
        elif turn["role"] == "tool":
            out.append((f"<|observation|>\n<tool_response>\n{text_of(turn)}\n</tool_response>", False))
        else:
            thinking = (turn.get("reasoning_content") or "").strip() if i > last_user(turns) else ""
            said = f"<think>{thinking}</think>" + ("\n" + text_of(turn) if text_of(turn) else "")
            if isinstance(turn.get("content"), type(None)):
                said = f"<think>{thinking}</think>\n"
            for call in calls_of(turn):
                pairs = "".join(
                    f"\n<arg_key>{k}</arg_key>\n<arg_value>{v if isinstance(v, str) else as_json(v)}</arg_value>"
                    for k, v in call["arguments"].items()
                )
                said += f"\n<tool_call>{call['name']}{pairs}\n</tool_call>"
            out += [("<|assistant|>\n", False), (said, True)]
    return out


# deepseek (v3.1): thinking of earlier answers goes; every answer rendered begins after </think>, the next one after <think>
DEEPSEEK = """{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% endif %}{% endfor %}{% if tools %}{{ '\n\n## Tools\n' + (tools | tojson) }}{% endif %}
{%- for m in messages %}
{%- if m.role == 'user' %}{{ '<｜User｜>' + m.content }}
{%- elif m.role == 'assistant' %}{% set content = m.content or '' %}{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}{{ '<｜Assistant｜></think>' + content }}{% for c in m.tool_calls or [] %}{{ '<｜tool▁call▁begin｜>' + c.function.name + '<｜tool▁sep｜>' + c.function.arguments + '<｜tool▁call▁end｜>' }}{% endfor %}{{ eos_token }}
{%- elif m.role == 'tool' %}{{ '<｜tool▁output▁begin｜>' + m.content + '<｜tool▁output▁end｜>' }}
{%- endif %}{% endfor %}{% if add_generation_prompt %}{{ '<｜Assistant｜><think>' }}{% endif %}"""


def deepseek(turns: Turns, tools: list | None, day: date) -> Segments:
    """Render as DEEPSEEK does: `</think>` is the first token that differs from the prompt, so that the answer begins with it."""
    system = "".join(text_of(t) for t in turns if t["role"] == "system")
    out: Segments = [(f"<s>{system}" + (f"\n\n## Tools\n{as_json(tools)}" if tools else ""), False)]
    for turn in turns:
        if turn["role"] == "user":
            out.append((f"<｜User｜>{text_of(turn)}", False))
        elif turn["role"] == "tool":
            out.append((f"<｜tool▁output▁begin｜>{text_of(turn)}<｜tool▁output▁end｜>", False))
        elif turn["role"] == "assistant":
            said = text_of(turn).split(UNTHINK)[-1]
            for call in calls_of(turn):
                arguments = as_json(call["arguments"])
                said += f"<｜tool▁call▁begin｜>{call['name']}<｜tool▁sep｜>{arguments}<｜tool▁call▁end｜>"
            out += [("<｜Assistant｜>", False), (f"</think>{said}</s>", True)]
    return out


# granite: a date and documents before the turns
GRANITE = """{{ '<|start_of_role|>system<|end_of_role|>Today\\'s Date: ' + strftime_now('%B %d, %Y') + '.' }}{% if messages[0].role == 'system' %}{{ '\n' + messages[0].content }}{% endif %}{{ '<|end_of_text|>\n' }}{% if tools %}{{ '<|start_of_role|>available_tools<|end_of_role|>' + (tools | tojson(indent=4)) + '<|end_of_text|>\n' }}{% endif %}{% for d in documents or [] %}{{ '<|start_of_role|>document<|end_of_role|>' + d.text + '<|end_of_text|>\n' }}{% endfor %}
{%- for m in messages %}{% if m.role != 'system' %}{{ '<|start_of_role|>' + m.role + '<|end_of_role|>' }}{% if m.tool_calls %}{{ '<|tool_call|>' }}{% for c in m.tool_calls %}{{ c.function | tojson }}{% endfor %}{% else %}{{ m.content }}{% endif %}{{ '<|end_of_text|>\n' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|start_of_role|>assistant<|end_of_role|>' }}{% endif %}"""


def granite(turns: Turns, tools: list | None, day: date) -> Segments:
    """Render as GRANITE does."""
    system = f"\n{text_of(turns[0])}" if turns[0]["role"] == "system" else ""
    begin = f"<|start_of_role|>system<|end_of_role|>Today's Date: {day.strftime('%B %d, %Y')}.{system}<|end_of_text|>\n"
    if tools:
        listed = json.dumps(tools, ensure_ascii=False, indent=4)
        begin += f"<|start_of_role|>available_tools<|end_of_role|>{listed}<|end_of_text|>\n"
    out: Segments = [(begin, False)]
    for turn in turns:
        if turn["role"] == "system":
            continue
        said = "<|tool_call|>" + "".join(as_json(c) for c in calls_of(turn)) if calls_of(turn) else text_of(turn)
        header = f"<|start_of_role|>{turn['role']}<|end_of_role|>"
        if turn["role"] == "assistant":
            out += [(header, False), (f"{said}<|end_of_text|>\n", True)]
        else:
            out.append((f"{header}{said}<|end_of_text|>\n", False))
    return out


# llama (3.1): a date that templates may be told, one call a turn
LLAMA = """{{ bos_token }}{% set day = strftime_now('%d %b %Y') if strftime_now is defined else '26 Jul 2024' %}{{ '<|start_header_id|>system<|end_header_id|>\n\nToday Date: ' + day + '\n\n' }}{% if messages[0].role == 'system' %}{{ messages[0].content | trim }}{% endif %}{{ '<|eot_id|>' }}
{%- for m in messages %}
{%- if m.role == 'assistant' and m.tool_calls %}{% if m.tool_calls | length != 1 %}{{ raise_exception('one call at a time') }}{% endif %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n{"name": "' + m.tool_calls[0].function.name + '", "parameters": ' + (m.tool_calls[0].function.arguments | tojson) + '}<|eot_id|>' }}
{%- elif m.role == 'tool' %}{{ '<|start_header_id|>ipython<|end_header_id|>\n\n' }}{% if m.content is mapping %}{{ m.content | tojson }}{% else %}{{ m.content }}{% endif %}{{ '<|eot_id|>' }}
{%- elif m.role != 'system' %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}
{%- endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"""


def llama(turns: Turns, tools: list | None, day: date) -> Segments:
    """Render as LLAMA does."""
    system = text_of(turns[0]).strip() if turns[0]["role"] == "system" else ""
    begin = "<s><|start_header_id|>system<|end_header_id|>\n\n"
    out: Segments = [(f"{begin}Today Date: {day.strftime('%d %b %Y')}\n\n{system}<|eot_id|>", False)]
    for turn in turns:
        if turn["role"] == "system":
            continue
        name = "ipython" if turn["role"] == "tool" else turn["role"]
        header, said = f"<|start_header_id|>{name}<|end_header_id|>\n\n", text_of(turn).strip()
        if calls_of(turn):
            call = calls_of(turn)[0]
            said = f'{{"name": "{call["name"]}", "parameters": {as_json(call["arguments"])}}}'
        if turn["role"] == "assistant":
            out += [(header, False), (f"{said}<|eot_id|>", True)]
        else:
            out.append((f"{header}{said}<|eot_id|>", False))
    return out


# hunyuan: thinking and answer in tags of their own, earlier thinking dropped, the system prompt without a role
HUNYUAN = """{{ '<｜hy_begin｜>' }}{% if messages[0].role == 'system' %}{{ messages[0].content + '<｜hy_place｜>' }}{% endif %}
{%- set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
{%- if m.role == 'user' %}{{ '<｜hy_User｜>' + m.content }}
{%- elif m.role == 'assistant' %}{{ '<｜hy_Assistant｜>' }}{% if loop.index0 > ns.last and m.reasoning_content %}{{ '<think>\n' + m.reasoning_content + '\n</think>\n' }}{% endif %}{{ '<answer>\n' + m.content + '\n</answer>' + '<｜hy_eos｜>' }}
{%- endif %}{% endfor %}{% if add_generation_prompt %}{{ '<｜hy_Assistant｜>' }}{% endif %}"""


def hunyuan(turns: Turns, tools: list | None, day: date) -> Segments:
    """Render as HUNYUAN does."""
    system = f"{text_of(turns[0])}<｜hy_place｜>" if turns[0]["role"] == "system" else ""
    out: Segments = [(f"<｜hy_begin｜>{system}", False)]
    for i, turn in enumerate(turns):
        if turn["role"] == "user":
            out.append((f"<｜hy_User｜>{text_of(turn)}", False))
        elif turn["role"] == "assistant":
            thinking = turn.get("reasoning_content") if i > last_user(turns) else None
            said = (f"<think>\n{thinking}\n</think>\n" if thinking else "") + f"<answer>\n{text_of(turn)}\n</answer>"
            out += [("<｜hy_Assistant｜>", False), (f"{said}<｜hy_eos｜>", True)]
    return out


# ernie: roles as plain words, no marks around turns
ERNIE = """{{ '<|begin_of_sentence|>' }}{% for m in messages %}
{%- if m.role == 'system' %}{{ m.content + '\n' }}
{%- elif m.role == 'user' %}{{ 'User: ' + m.content + '\n' }}
{%- elif m.role == 'assistant' %}{{ 'Assistant: ' + m.content + '<|end_of_sentence|>' }}
{%- endif %}{% endfor %}{% if add_generation_prompt %}{{ 'Assistant: ' }}{% endif %}"""


def ernie(turns: Turns, tools: list | None, day: date) -> Segments:
    """Render as ERNIE does."""
    out: Segments = [("<|begin_of_sentence|>", False)]
    for turn in turns:
        if turn["role"] == "assistant":
            out += [("Assistant: ", False), (f"{text_of(turn)}<|end_of_sentence|>", True)]
        else:
            out.append((f"User: {text_of(turn)}\n" if turn["role"] == "user" else f"{text_of(turn)}\n", False))
    return out


_ALL = frozenset({"system", "tools", "thinking", "parts"})
_CHATML = ("<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>", THINK, UNTHINK)
# qwen3.5: the prompt opens the thinking, which answers after the last user's turn always have; calls are written parameter by parameter
QWEN3_5 = """{%- if messages[0].role == 'system' or tools %}{{ '<|im_start|>system\n' }}{% if tools %}{{ '# Tools\n\n<tools>' }}{% for t in tools %}{{ '\n' + (t | tojson) }}{% endfor %}{{ '\n</tools>' }}{% endif %}{% if messages[0].role == 'system' %}{% if tools %}{{ '\n\n' }}{% endif %}{{ messages[0].content }}{% endif %}{{ '<|im_end|>\n' }}{% endif %}
{%- set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
{%- if m.role == 'user' %}{{ '<|im_start|>user\n' + m.content + '<|im_end|>\n' }}
{%- elif m.role == 'assistant' %}{% set thinking = m.reasoning_content if m.reasoning_content is string else '' %}{% set content = m.content or '' %}
{{- '<|im_start|>assistant\n' }}{% if loop.index0 > ns.last %}{{ '<think>\n' + thinking.strip('\n') + '\n</think>\n\n' }}{% endif %}{{ content }}{% for c in m.tool_calls or [] %}{% if content or not loop.first %}{{ '\n' }}{% endif %}{{ '<tool_call>\n<function=' + c.function.name + '>\n' }}{% for k, v in c.function.arguments.items() %}{{ '<parameter=' + k + '>\n' }}{{ v if v is string else v | tojson }}{{ '\n</parameter>\n' }}{% endfor %}{{ '</function>\n</tool_call>' }}{% endfor %}{{ '<|im_end|>\n' }}
{%- elif m.role == 'tool' %}{{ '<|im_start|>user\n<tool_response>\n' + m.content + '\n</tool_response><|im_end|>\n' }}
{%- endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"""


def qwen3_5(turns: Turns, tools: list | None, day: date) -> Segments:
    """Render as QWEN3_5 does."""
    system = text_of(turns[0]) if turns[0]["role"] == "system" else ""
    shown = "# Tools\n\n<tools>" + "".join("\n" + as_json(t) for t in tools) + "\n</tools>" if tools else ""
    between = "\n\n" if shown and turns[0]["role"] == "system" else ""
    opening = shown or turns[0]["role"] == "system"
    out: Segments = [(f"<|im_start|>system\n{shown}{between}{system}<|im_end|>\n", False)] if opening else []
    for i, turn in enumerate(turns):
        if turn["role"] == "user":
            out.append((f"<|im_start|>user\n{text_of(turn)}<|im_end|>\n", False))
        elif turn["role"] == "tool":
            out.append((f"<|im_start|>user\n<tool_response>\n{text_of(turn)}\n</tool_response><|im_end|>\n", False))
        elif turn["role"] == "assistant":
            said = text_of(turn)
            for call in calls_of(turn):
                pairs = "".join(
                    f"<parameter={k}>\n{v if isinstance(v, str) else as_json(v)}\n</parameter>\n"
                    for k, v in call["arguments"].items()
                )
                said += (
                    "\n" if said else ""
                ) + f"<tool_call>\n<function={call['name']}>\n{pairs}</function>\n</tool_call>"
            header, thinking = "<|im_start|>assistant\n", (turn.get("reasoning_content") or "").strip("\n")
            if i > last_user(turns):
                header, said = header + "<think>\n", f"{thinking}\n</think>\n\n{said}"
            out += [(header, False), (said + "<|im_end|>\n", True)]
    return out


# minimax-m2: the prompt opens the thinking, and an answer without any is rendered without it
MINIMAX_M2 = """{{ ']~!b[]~b]system\n' }}{% if messages[0].role == 'system' %}{{ messages[0].content }}{% else %}{{ 'You are a helpful assistant.' }}{% endif %}{% if tools %}{{ '\n\n# Tools\n<tools>\n' }}{% for t in tools %}{{ '<tool>' + (t.function | tojson) + '</tool>\n' }}{% endfor %}{{ '</tools>' }}{% endif %}{{ '[e~[\n' }}
{%- set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
{%- if m.role == 'user' %}{{ ']~b]user\n' + m.content + '[e~[\n' }}
{%- elif m.role == 'assistant' %}{{ ']~b]ai\n' }}{% if m.reasoning_content and loop.index0 > ns.last %}{{ '<think>\n' + m.reasoning_content + '\n</think>\n\n' }}{% endif %}{{ m.content or '' }}{% if m.tool_calls %}{{ '\n<minimax:tool_call>\n' }}{% for c in m.tool_calls %}{{ '<invoke name="' + c.function.name + '">\n' }}{% for k, v in c.function.arguments.items() %}{{ '<parameter name="' + k + '">' }}{{ v if v is string else v | tojson }}{{ '</parameter>\n' }}{% endfor %}{{ '</invoke>\n' }}{% endfor %}{{ '</minimax:tool_call>' }}{% endif %}{{ '[e~[\n' }}
{%- elif m.role == 'tool' %}{{ ']~b]tool\n<response>' + m.content + '</response>[e~[\n' }}
{%- endif %}{% endfor %}{% if add_generation_prompt %}{{ ']~b]ai\n<think>\n' }}{% endif %}"""


def minimax_m2(turns: Turns, tools: list | None, day: date) -> Segments:
    """Render as MINIMAX_M2 does."""
    system = text_of(turns[0]) if turns[0]["role"] == "system" else "You are a helpful assistant."
    listed = "".join(f"<tool>{as_json(t['function'])}</tool>\n" for t in tools or [])
    shown = f"\n\n# Tools\n<tools>\n{listed}</tools>" if tools else ""
    out: Segments = [(f"]~!b[]~b]system\n{system}{shown}[e~[\n", False)]
    for i, turn in enumerate(turns):
        if turn["role"] == "user":
            out.append((f"]~b]user\n{text_of(turn)}[e~[\n", False))
        elif turn["role"] == "tool":
            out.append((f"]~b]tool\n<response>{text_of(turn)}</response>[e~[\n", False))
        elif turn["role"] == "assistant":
            said, header = text_of(turn), "]~b]ai\n"
            if calls_of(turn):
                said += "\n<minimax:tool_call>\n"
                for call in calls_of(turn):
                    pairs = "".join(
                        f'<parameter name="{k}">{v if isinstance(v, str) else as_json(v)}</parameter>\n'
                        for k, v in call["arguments"].items()
                    )
                    said += f'<invoke name="{call["name"]}">\n{pairs}</invoke>\n'
                said += "</minimax:tool_call>"
            if turn.get("reasoning_content") and i > last_user(turns):
                header, said = header + "<think>\n", f"{turn['reasoning_content']}\n</think>\n\n{said}"
            out += [(header, False), (said + "[e~[\n", True)]
    return out


FAMILIES = {
    "mistral": Family(
        MISTRAL, mistral,
        ("[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
        _ALL - {"thinking"},
    ),
    "qwen2": Family(QWEN2, qwen2, _CHATML, _ALL - {"thinking"}),
    "qwen3": Family(QWEN3, qwen3, _CHATML, _ALL | {"tags"}),
    "qwen3_5": Family(QWEN3_5, qwen3_5, _CHATML, _ALL),
    "minimax_m2": Family(MINIMAX_M2, minimax_m2, ("]~!b[", "]~b]", "[e~[", THINK, UNTHINK), _ALL),
    "gpt_oss": Family(
        GPT_OSS, gpt_oss, ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>", "<|call|>"), _ALL,
    ),
    "glm4": Family(
        GLM4, glm4, ("[gMASK]", "<sop>", "<|user|>", "<|system|>", "<|assistant|>", "<|observation|>", THINK, UNTHINK), _ALL,
    ),
    "deepseek": Family(
        DEEPSEEK, deepseek,
        ("<｜User｜>", "<｜Assistant｜>", "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>", THINK, UNTHINK),
        _ALL - {"thinking"} | {"tags"},
    ),
    "granite": Family(GRANITE, granite, ("<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>"), _ALL - {"thinking"}),
    "llama": Family(LLAMA, llama, ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), _ALL - {"thinking"}),
    "hunyuan": Family(
        HUNYUAN, hunyuan, ("<｜hy_begin｜>", "<｜hy_User｜>", "<｜hy_Assistant｜>", "<｜hy_eos｜>", "<｜hy_place｜>", THINK, UNTHINK),
        frozenset({"system", "thinking", "parts"}),
    ),
    "ernie": Family(ERNIE, ernie, ("<|begin_of_sentence|>", "<|end_of_sentence|>"), frozenset({"system", "parts"})),
}  # fmt: skip
