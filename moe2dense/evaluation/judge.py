"""A third model that scores what student and teacher wrote. It must not be the teacher, which would grade its own pupil."""

from collections.abc import Sequence
from pathlib import Path

from moe2dense.data.blocks import Blocks, right_padded
from moe2dense.errors import UserError
from moe2dense.evaluation.likelihood import text_nll
from moe2dense.evaluation.reference import reference
from moe2dense.teacher.load import load_teacher
from moe2dense.weights.fingerprint import checkpoint_fingerprint


def check_judge(judge: str, teacher: str | Path, student: str | Path | None = None) -> None:
    """Refuse a judge that is no checkpoint, or whose weights are the teacher's or the student's, wherever they lie.

    Raises UserError naming --judge.
    """
    if not (Path(judge) / "config.json").is_file():
        raise UserError(f"--judge {judge} is no checkpoint (no config.json); give the folder of a third language model")
    fingerprint = checkpoint_fingerprint(judge)
    if fingerprint == checkpoint_fingerprint(teacher):
        raise UserError(
            f"--judge {judge} holds the teacher's own weights: a teacher cannot judge the student that was trained on it; "
            f"give another model"
        )
    if student is not None and fingerprint == checkpoint_fingerprint(student):
        raise UserError(f"--judge {judge} holds the student's own weights; give a model that has no part in this")


class Judge:
    """A causal language model with its own tokenizer, run layer by layer as a teacher is, so it may be large too."""

    def __init__(
        self, folder: str | Path, memory: str | int = "auto", device: str = "auto", gpu_memory: str | int = "auto"
    ):
        self.name = Path(folder).resolve().name
        self.model = load_teacher(folder, memory=memory, device=device, gpu_memory=gpu_memory)
        self.tokenizer = self.model.tokenizer()

    def nats_per_byte(self, prompts: Sequence[str], texts: Sequence[str]) -> float | None:
        """Return the negative log-likelihood of the texts, each after its prompt, in nats per UTF-8 byte over all of them.

        Per byte, because the judge's tokens are its own. None where the texts are empty.
        """
        pairs = [self._encode(p, t) for p, t in zip(prompts, texts, strict=True) if t]
        if not pairs:
            return None
        ids, mask = right_padded([text_ids for text_ids, _ in pairs])
        judged = mask.clone()
        for row, (_, first) in enumerate(pairs):
            judged[row, :first] = False
        nll = text_nll(reference(self.model, Blocks(ids, attention_mask=mask)), judged)
        return float(nll.sum()) / sum(len(t.encode()) for t in texts)

    def _encode(self, prompt: str, text: str) -> tuple[list[int], int]:
        """Return (ids of prompt and text together, where the text's own begin)."""
        ids = self.tokenizer(prompt + text)["input_ids"]
        prompt_ids = self.tokenizer(prompt)["input_ids"]
        differ = (i for i, (a, b) in enumerate(zip(ids, prompt_ids, strict=False)) if a != b)
        first = next(differ, min(len(ids), len(prompt_ids)))
        return ids, max(1, min(first, len(ids) - 1))
