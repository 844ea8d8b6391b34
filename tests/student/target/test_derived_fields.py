"""What a host derives from its config is what the teacher derives from its own: windows, layer types, rotary tables, widths of heads.

Each teacher has equal experts and odd values in these fields, so its student must give the same logits.
"""

import pytest

from moe2dense.errors import UserError
from moe2dense.evaluation.api import evaluate
from moe2dense.student.build.api import build_student
from moe2dense.student.target.dense_config import head_dim
from moe2dense.teacher.load import load_teacher
from tests.families.test_oracle import BOUND, exact_target, random_blocks
from tests.teacher.families import EPS, FAMILIES, ROPE, THETA, YARN, make

SLIDING = {"use_sliding_window": True, "sliding_window": 5}
VARIANTS: list[tuple[str, dict]] = [
    ("mixtral", {"sliding_window": None, "head_dim": 10}),
    ("mixtral", {"sliding_window": 5, "head_dim": 10}),
    ("qwen2_moe", {**SLIDING, "max_window_layers": 1}),
    ("qwen2_moe", {**SLIDING, "max_window_layers": 2, "rope_parameters": YARN}),
    ("qwen3_moe", {**SLIDING, "max_window_layers": 1, "head_dim": 10, "rope_parameters": ROPE}),
    ("qwen3_moe", {"attention_bias": True, "head_dim": 14}),
    ("olmoe", {"clip_qkv": None, "norm_topk_prob": True}),
    ("flex_olmo", {"attention_bias": True, "rope_parameters": YARN}),
    ("deepseek_v2", {"q_lora_rank": None, "rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.7}}),
    ("deepseek_v3", {"rope_interleave": False, "attention_bias": True}),
    ("deepseek_v3", {"q_lora_rank": 10, "rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.7}}),
    ("gpt_oss", {"layer_types": ["full_attention", "sliding_attention", "sliding_attention"], "sliding_window": 5}),
    ("gpt_oss", {"head_dim": 10, "rope_parameters": ROPE}),
    ("phimoe", {"sliding_window": 5}),
    ("phimoe", {"attention_bias": False, "lm_head_bias": False}),
    ("granitemoe", {"attention_bias": True}),
    ("granitemoeshared", {"tie_word_embeddings": True, "rope_parameters": YARN}),
    ("glm4_moe", {"head_dim": 12, "rope_parameters": {**ROPE, "partial_rotary_factor": 0.34}, "use_qk_norm": False}),
    ("llama4_text", {"no_rope_layers": [0, 1, 1, 0], "floor_scale": 4, "attn_scale": 0.3}),
    ("llama4_text", {"use_qk_norm": False, "attention_chunk_size": 5, "head_dim": 10, "attn_temperature_tuning": False}),
    ("llama4_text", {"rope_parameters": {**ROPE, "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                                         "high_freq_factor": 4.0, "original_max_position_embeddings": 32}}),
    ("ernie4_5_moe", {"head_dim": 10}),
    ("hunyuan_v1_moe", {"head_dim": 10, "attention_bias": True}),
    ("hunyuan_v1_moe", {"rope_parameters": {**ROPE, "rope_type": "dynamic", "factor": 2.0, "alpha": 50.0}}),
    ("dots1", {"head_dim": 10, "attention_bias": True}),
    ("dots1", {**SLIDING, "max_window_layers": 1, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}),
    ("lfm2_moe", {"layer_types": ["full_attention", "conv", "full_attention"], "conv_L_cache": 5}),
    ("minimax_m2", {"head_dim": 10, "rotary_dim": 6}),
    ("qwen3_next", {"head_dim": 12, "rope_parameters": {**ROPE, "partial_rotary_factor": 0.5}}),
    ("qwen3_next", {"layer_types": ["full_attention", "linear_attention", "full_attention", "linear_attention"]}),
]  # fmt: skip


@pytest.mark.parametrize(("family", "changes"), VARIANTS, ids=[f"{f}-{'-'.join(c)}" for f, c in VARIANTS])
def test_odd_values_reach_the_host(family, changes, tmp_path):
    make(family, tmp_path, alike=True, **changes)
    teacher = load_teacher(tmp_path)
    student = build_student(teacher, exact_target(teacher), random_blocks(0), init="average")
    assert float(evaluate(student, teacher, random_blocks(1), bootstrap=0).kl) <= BOUND


@pytest.mark.parametrize(
    ("family", "changes", "match"),
    [
        ("qwen2_moe", {"qkv_bias": False}, r"'model\.layers\.0\.self_attn\.q_proj\.bias' has no source in the teacher"),
        ("ernie4_5_moe", {"use_bias": True}, r"'lm_head\.bias' has no place in the host 'ernie4_5'"),
    ],
)
def test_a_host_without_the_teachers_tensors_is_refused_by_name(family, changes, match, tmp_path):
    make(family, tmp_path, **changes)
    teacher = load_teacher(tmp_path)
    with pytest.raises(UserError, match=match):
        build_student(teacher, exact_target(teacher), random_blocks(0), init="average")


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_fields_of_the_student_are_the_teachers(family, tmp_path):
    config = make(family, tmp_path, alike=True).config
    got = exact_target(load_teacher(tmp_path)).config
    assert got.rope_parameters == config.rope_parameters
    rope = config.rope_parameters or {"rope_theta": THETA}  # jamba has none; others have some for each kind of layer
    assert rope.get("full_attention", rope)["rope_theta"] == THETA
    name = {"lfm2_moe": "norm_eps", "cohere2_moe": "layer_norm_eps"}.get(family, "rms_norm_eps")
    assert getattr(got, name) == getattr(config, name) == FAMILIES[family].get(name, EPS)
    assert head_dim(got) == head_dim(config)
    for field in ("num_hidden_layers", "hidden_size", "vocab_size", "tie_word_embeddings", "max_position_embeddings"):
        assert getattr(got, field) == getattr(config, field), field
