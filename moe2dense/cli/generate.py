"""`moe2dense generate`: text written by a teacher, as a dataset that every --data reads."""

from pathlib import Path


def generate_text(
    teacher: str,
    /,
    *,
    data: str,
    out: Path,
    tokens: str = "500k",
    prompt_tokens: int | None = None,
    new_tokens: int | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
    beams: int | None = None,
    learn_prompt: bool | None = None,
    min_tokens: int | None = None,
    nll: str | None = None,
    duplicates: float | None = None,
    same_script: bool | None = None,
    config: Path | None = None,
    block: int = 0,
    seed: int = 0,
    memory: str = "auto",
    experts: str = "auto",
    device: str = "auto",
    teacher_card: str = "",
) -> None:
    """Let the teacher continue passages, prompts or conversations; leaves shards and where they came from in OUT.

    Under torchrun every process writes its share of the texts.

    Parameters
    ----------
    teacher: folder of a checkpoint, hub id, or known name
    data: what is continued: records with text, prompt or messages; folder with train/valid/test files, one file, or a hub id
    out: folder of the text; an unfinished one is continued
    tokens: how many tokens to keep, prompts included
    prompt_tokens: of each passage that are given
    new_tokens: written after a prompt, at most; default what is left of a block
    temperature: of the draws; 0 = the likeliest token each time
    top_p: draw among the likeliest tokens that hold this much probability
    beams: above 1, beam search (with --temperature 0)
    learn_prompt: the student learns the given beginning too, not only what the teacher wrote
    min_tokens: drop texts of fewer written tokens
    nll: keep texts whose mean teacher nats per token lie in this band, such as 2.5:4
    duplicates: drop texts at least this similar to one kept before (Jaccard of five-word sequences); 0 = none
    same_script: drop texts in another script (alphabet) than their prompt's
    config: TOML file whose [write] table sets the same
    block: longest text in tokens; default min(2048, the teacher's max positions)
    seed: of the draws and the order of the prompts
    memory: budget for teacher weights, hidden states, and keys and values
    experts: how experts are computed: auto, streamed, grouped_mm, megablocks
    device: auto, cpu or cuda
    teacher_card: TOML card of a family that is not shipped
    """
    from rich.console import Console

    from moe2dense.cli.common import open_teacher
    from moe2dense.common.processes import join_processes
    from moe2dense.common.progress import progress_for
    from moe2dense.common.units import parse_count
    from moe2dense.config.schema import RunConfig
    from moe2dense.config.toml import merge, merge_flags, read_toml
    from moe2dense.generation.dataset import summary, write_text

    base = merge(RunConfig(), read_toml(config), f"--config {config}") if config else RunConfig()
    flags = {
        "prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "temperature": temperature, "top_p": top_p, "beams": beams,
        "learn_prompt": learn_prompt, "min_tokens": min_tokens, "nll": nll, "duplicates": duplicates, "same_script": same_script,
    }  # fmt: skip
    settings = merge_flags(base, {f"write.{k}": v for k, v in flags.items()}).write
    count = parse_count(tokens, "--tokens")
    with join_processes() as rank:
        console = Console(quiet=rank > 0)
        model = open_teacher(teacher, memory=memory, experts=experts, device=device, card=teacher_card)
        longest = min(2048, getattr(model.config.get_text_config(), "max_position_embeddings", 2048))
        with progress_for(console) as progress:
            write_text(model, out, data, settings, count, block=block or longest, seed=seed, progress=progress)
    found = summary(out)
    dropped = ", ".join(f"{n} {reason}" for reason, n in found["dropped"].items()) or "none"
    console.print(
        f"{out}: {found['texts']} texts of {found['tokens']} tokens from {found['prompts']} prompts (dropped: {dropped}); "
        f"train on them with --data {out} --valid TEXT",
        highlight=False,
    )
