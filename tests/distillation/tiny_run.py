"""A tiny teacher, student and text, and the settings that the tests of training share."""

import torch
from transformers import MistralConfig, MistralForCausalLM, MixtralConfig, MixtralForCausalLM

from moe2dense.config.training import TrainConfig
from moe2dense.data.blocks import Blocks

SIZES = dict(
    vocab_size=61, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=32, tie_word_embeddings=False,
)  # fmt: skip


def make_teacher(dtype=torch.float32):
    torch.manual_seed(1)
    config = MixtralConfig(**SIZES, intermediate_size=16, num_local_experts=4, num_experts_per_tok=2)
    teacher = MixtralForCausalLM._from_config(config, experts_implementation="eager").to(dtype).eval()
    with torch.no_grad():
        teacher.lm_head.weight.mul_(20)
    return teacher


def make_student(dtype=torch.float32, **options):
    torch.manual_seed(2)
    return MistralForCausalLM(MistralConfig(**(SIZES | options), intermediate_size=32)).to(dtype)


def make_blocks(n=24, s=12, seed=0, **masks):
    ids = torch.randint(0, 61, (n, s), generator=torch.Generator().manual_seed(seed))
    return Blocks(ids, [f"domain {i % 3}" for i in range(n)], **masks)


def settings(**options):
    return TrainConfig(**({"batch": 48, "micro_batch": 4, "lr": 3e-3, "save_every": 3, "eval_every": 4} | options))


def weights(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


class Stop(Exception):
    """What a test raises to stop a run."""
