"""README says what the cards say."""

import pytest

from moe2dense.families.cards import student_host, teacher_cards


@pytest.mark.parametrize("family", sorted(teacher_cards()))
def test_the_family_table(family, root):
    card = teacher_cards()[family]
    host = student_host(card.host)
    names = ", ".join(f"`{a}`" for row in card.checkpoints for a in row.aliases[:1]) or "(pass a folder)"
    shown = host.model_type + (" (one expert)" if host.moe_shaped else "")
    loads = [host.loads[k].split(":")[0] for k in ("transformers", "vllm", "llama_cpp")]
    assert f"| {' | '.join([family, names, shown, *loads])} |" in (root / "README.md").read_text()
