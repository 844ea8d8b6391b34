"""The student as draft of its teacher in speculative decoding: tokens a pass of the teacher, beside what `eval` calls acceptance.

    python benchmarks/speculative.py STUDENT [--drafts 4] [--prompts 16] [--new 64] [--temperature 1]

STUDENT is the folder of a run or of a dense checkpoint; the teacher is examples/tiny-mixtral. Drafts are drawn from the student and
accepted or replaced as in Leviathan et al. (2211.17192), so that what is written follows the teacher's distribution. Prompts are
beginnings of held-out passages. Printed: the share of drafts that is accepted one by one, what both distributions share on the same
positions (the expectation), tokens a teacher's pass and its expectation, and the same text written by the teacher alone, for the
seconds. Both models run without a cache, so seconds only show the ratio of passes at equal lengths.
"""

import argparse
import time
from pathlib import Path

import torch

from moe2dense.data.load import load_blocks
from moe2dense.exporting.tokenizer import load_tokenizer
from moe2dense.modeling.load import load_model
from moe2dense.student.open import open_student

TEACHER = Path(__file__).parent.parent / "examples" / "tiny-mixtral"


def distribution(model, ids, last: int, temperature: float):
    """The distributions [last, V] after the last positions of ids."""
    logits = model(torch.tensor([ids]), use_cache=False).logits[0, -last:].double()
    return (
        (logits / temperature).softmax(-1)
        if temperature
        else torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[1]).double()
    )


def draw(p, generator) -> int:
    return int(torch.multinomial(p, 1, generator=generator))


def speculate(teacher, student, prompt, new: int, drafts: int, temperature: float, generator) -> dict[str, float]:
    """Write `new` tokens; return counts of passes, drafts that were tried and accepted, and the sum of what is shared there."""
    ids, passes, tried, accepted, shared = list(prompt), 0, 0, 0, 0.0
    while len(ids) < len(prompt) + new:
        drafted, q = list(ids), []
        for _ in range(drafts):
            q.append(distribution(student, drafted, 1, temperature)[0])
            drafted.append(draw(q[-1], generator))
        p = distribution(teacher, drafted, drafts + 1, temperature)
        passes += 1
        for i, token in enumerate(drafted[len(ids) :]):
            tried += 1
            shared += float(torch.minimum(p[i], q[i]).sum())
            if float(torch.rand((), generator=generator)) * q[i][token] < p[i][token]:
                accepted += 1
                ids.append(token)
                continue
            ids.append(draw((p[i] - q[i]).clamp(min=0), generator))
            break
        else:
            ids.append(draw(p[drafts], generator))
    return {"tokens": len(ids) - len(prompt), "passes": passes, "tried": tried, "accepted": accepted, "shared": shared}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("student")
    parser.add_argument("--drafts", type=int, default=4)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=1.0)
    args = parser.parse_args()
    teacher, student = load_model(TEACHER).eval(), open_student(args.student).model.eval()
    blocks = load_blocks(
        TEACHER.parent / "text", load_tokenizer(TEACHER), 64, "valid", tokens=args.prompts * 64, spread=True
    )
    generator, total = torch.Generator().manual_seed(0), {}
    start = time.perf_counter()
    for prompt in blocks.input_ids[: args.prompts, :32].tolist():
        counts = speculate(teacher, student, prompt, args.new, args.drafts, args.temperature, generator)
        total = {name: total.get(name, 0) + value for name, value in counts.items()}
    seconds = time.perf_counter() - start
    alpha = total["shared"] / total["tried"]
    expected = (1 - alpha ** (args.drafts + 1)) / (1 - alpha) if alpha < 1 else args.drafts + 1
    print(
        f"accepted {total['accepted'] / total['tried']:.4f} of {total['tried']} drafts; shared by both distributions there {alpha:.4f}"
    )
    print(
        f"tokens a pass of the teacher {total['tokens'] / total['passes']:.3f}; expected for equal acceptance everywhere {expected:.3f}"
    )
    start = time.perf_counter()
    for prompt in blocks.input_ids[: args.prompts, :32].tolist():
        ids = list(prompt)
        while len(ids) < len(prompt) + args.new:
            ids.append(draw(distribution(teacher, ids, 1, args.temperature)[0], generator))
    print(
        f"seconds {seconds:.1f}, teacher alone {time.perf_counter() - start:.1f} ({args.prompts} x {args.new} tokens)"
    )


if __name__ == "__main__":
    main()
