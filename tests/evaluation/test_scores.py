"""Evaluation against an independent float64 computation, interval coverage in a simulation, masks and documents."""

import numpy as np
import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from moe2dense.data.blocks import Blocks
from moe2dense.data.frequency import count_tokens, frequency_deciles, rare_labels
from moe2dense.errors import UserError
from moe2dense.evaluation import token_metrics as metrics
from moe2dense.evaluation.api import evaluate
from moe2dense.evaluation.bootstrap import Bootstrap, Estimate
from moe2dense.evaluation.clusters import clusters_of
from moe2dense.evaluation.reference import reference
from moe2dense.evaluation.retention import gap_closed, split_domains
from moe2dense.evaluation.token_table import TokenTable
from moe2dense.modeling.head import Head, output_head

V = 61
SHAPE = dict(vocab_size=V, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)


def llama(seed, std=0.4, **extra):
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**{**SHAPE, "intermediate_size": 40, "initializer_range": std, **extra})).eval()


def mixtral(seed):
    torch.manual_seed(seed)
    config = MixtralConfig(**SHAPE, intermediate_size=28, num_local_experts=4, initializer_range=0.4)
    model = MixtralForCausalLM(config).eval()
    model.set_experts_implementation("eager")  # the only one that runs in float64
    return model


def blocks(n=7, s=19, seed=3, domains=("law", "code")):
    ids = torch.randint(0, V, (n, s), generator=torch.Generator().manual_seed(seed))
    return Blocks(ids, [domains[i % len(domains)] for i in range(n)])


def reference_numbers(teacher, student, data):
    """Everything again in float64, with whole logits and plain loops."""
    t64, s64 = teacher.double(), student.double()
    kl, nll, t_nll, agree, five, shared, p_t, p_s, gap, conf, right = ([] for _ in range(11))
    with torch.no_grad():
        for row in data.input_ids:
            lt = torch.log_softmax(t64(row[None]).logits[0].double(), -1)
            ls = torch.log_softmax(s64(row[None]).logits[0].double(), -1)
            for i in range(len(row) - 1):
                y = int(row[i + 1])
                kl.append(float(sum(lt[i, v].exp() * (lt[i, v] - ls[i, v]) for v in range(lt.shape[1]))))
                nll.append(-float(ls[i, y]))
                t_nll.append(-float(lt[i, y]))
                agree.append(int(lt[i].argmax()) == int(ls[i].argmax()))
                five.append(int(lt[i].argmax()) in ls[i].argsort(descending=True)[:5].tolist())
                shared.append(sum(min(float(lt[i, v].exp()), float(ls[i, v].exp())) for v in range(lt.shape[1])))
                p_t.append(float(lt[i, y].exp()))
                p_s.append(float(ls[i, y].exp()))
                gap.append(float(-(ls[i].exp() * ls[i]).sum() + (lt[i].exp() * lt[i]).sum()))
                conf.append(float(ls[i].exp().max()))
                right.append(int(ls[i].argmax()) == y)
    teacher.float(), student.float()
    conf, right = np.array(conf), np.array(right, float)
    ece = 0.0
    for b in range(15):
        inside = (conf >= b / 15) & (conf < (b + 1) / 15)
        if inside.any():
            ece += inside.mean() * abs(right[inside].mean() - conf[inside].mean())
    columns = dict(kl=kl, nll=nll, teacher_nll=t_nll, agreement=agree, top5=five, acceptance=shared, entropy_gap=gap)
    out = {k: float(np.mean(v)) for k, v in columns.items()}
    return {**out, "correlation": float(np.corrcoef(p_t, p_s)[0, 1]), "ece": ece, "kl_tokens": np.array(kl)}


@pytest.mark.parametrize("chunk", [V * 5, metrics.CHUNK])
def test_numbers_equal_an_independent_float64_computation(chunk, monkeypatch):
    monkeypatch.setattr(metrics.score_tokens, "__defaults__", (chunk,))
    teacher, student, data = mixtral(0), llama(1), blocks()
    scores = evaluate(student, teacher, data, batch=3, bootstrap=50)
    wanted = reference_numbers(teacher, student, data)
    for name in ("kl", "nll", "teacher_nll", "agreement", "top5", "acceptance", "entropy_gap", "correlation", "ece"):
        assert getattr(scores, name) == pytest.approx(wanted[name], rel=1e-4, abs=1e-6), name
    np.testing.assert_allclose(scores.kl_NS[:, :-1].flatten(), wanted["kl_tokens"], rtol=1e-3, atol=1e-5)
    assert scores.kl_NS[:, -1].isnan().all() and scores.tokens == 7 * 18
    assert scores.perplexity == pytest.approx(np.exp(wanted["nll"]), rel=1e-4)
    # the groups partition the same tokens
    for rows in (scores.by_domain.values(), scores.by_decile, scores.by_position):
        total = sum(r["kl"] * r["tokens"] for r in rows if r["tokens"])
        assert total / scores.tokens == pytest.approx(wanted["kl"], rel=1e-4)
    law = wanted["kl_tokens"].reshape(7, 18)[::2].mean()
    assert scores.by_domain["law"]["kl"] == pytest.approx(law, rel=1e-4)
    assert [r["start"] for r in scores.by_position] == [0, 1, 2, 4, 8, 16]


def test_a_teacher_judged_against_itself_is_perfect():
    teacher, data = mixtral(2), blocks()
    ref = reference(teacher, data)
    for student in (teacher, ref):
        scores = evaluate(student, ref, bootstrap=20)
        assert scores.kl < 1e-6 and scores.agreement == 1 and abs(scores.entropy_gap) < 1e-5
        assert scores.correlation == pytest.approx(1, abs=1e-5)


def test_padding_does_not_count_and_does_not_leak():
    teacher, student, data = llama(0), llama(1), blocks(4, 12)
    mask = torch.ones(4, 12, dtype=torch.bool)
    mask[1, 7:] = False
    mask[3, 2:] = False
    padded = Blocks(data.input_ids.clone(), data.domains, attention_mask=mask)
    a = evaluate(student, teacher, padded, bootstrap=20)
    padded.input_ids[~mask] = 5
    b = evaluate(student, teacher, padded, bootstrap=20)
    assert a.kl == pytest.approx(float(b.kl), rel=1e-5) and a.tokens == 11 + 6 + 11 + 1
    rows = [
        evaluate(student, teacher, Blocks(data.input_ids[i : i + 1, : mask[i].sum()]), bootstrap=0) for i in range(4)
    ]
    assert a.kl == pytest.approx(sum(r.kl * r.tokens for r in rows) / a.tokens, rel=1e-4)


def test_packed_documents_equal_one_forward_per_document():
    teacher, student, data = llama(0), llama(1), blocks(3, 16)
    documents = torch.tensor([[0] * 6 + [1] * 10, [0] * 16, [0] * 1 + [1] * 8 + [2] * 7])
    packed = evaluate(student, teacher, Blocks(data.input_ids, data.domains, document_ids=documents), bootstrap=20)
    total = tokens = 0
    for row, ids in zip(data.input_ids, documents, strict=True):
        for d in ids.unique():
            piece = row[ids == d][None]
            if piece.shape[1] > 1:
                one = evaluate(student, teacher, Blocks(piece), bootstrap=0)
                total, tokens = total + one.kl * one.tokens, tokens + one.tokens
    assert packed.tokens == tokens == 5 + 9 + 15 + 0 + 7 + 6
    assert packed.kl == pytest.approx(total / tokens, rel=1e-4)


def test_labels_mask_selects_the_judged_tokens():
    teacher, student, data = llama(0), llama(1), blocks(3, 9)
    labels = torch.zeros(3, 9, dtype=torch.bool)
    labels[:, 4:6] = True
    scores = evaluate(student, teacher, Blocks(data.input_ids, data.domains, labels_mask=labels), bootstrap=0)
    whole = evaluate(student, teacher, data, bootstrap=0)
    assert scores.tokens == 6 and scores.kl == pytest.approx(float(whole.kl_NS[:, 3:5].mean()), rel=1e-5)


def test_scaled_and_capped_heads_are_read_from_the_model():
    torch.manual_seed(0)
    granite = GraniteForCausalLM(
        GraniteConfig(**SHAPE, intermediate_size=30, logits_scaling=7.0, initializer_range=0.3)
    )
    gemma = Gemma2ForCausalLM(
        Gemma2Config(**SHAPE, intermediate_size=30, head_dim=6, final_logit_softcapping=3.0, initializer_range=0.3)
    )
    assert output_head(granite).scale == pytest.approx(1 / 7) and output_head(gemma).softcap == 3.0
    data = blocks(2, 8)
    scores, wanted = evaluate(gemma, granite, data, bootstrap=0), reference_numbers(granite, gemma, data)
    assert scores.kl == pytest.approx(wanted["kl"], rel=1e-4)


def test_logits_are_compared_in_float32_whatever_the_models_compute_in():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(V, 24, generator=generator).bfloat16()
    hidden = (12 * torch.randn(4000, 24, generator=generator)).bfloat16()
    labels = torch.zeros(4000, dtype=torch.int64)
    numbers = metrics.score_tokens(hidden, Head(weight), hidden.float(), Head(weight.float()), labels)
    exact = (hidden.double() @ weight.double().T).log_softmax(-1)
    assert numbers["kl"].max() < 1e-5 and bool(numbers["agreement"].all())
    torch.testing.assert_close(numbers["teacher_nll"].double(), -exact[:, 0], rtol=1e-4, atol=1e-4)


def test_a_head_that_is_not_linear_is_refused():
    model = llama(0)
    model.lm_head.forward = lambda h: torch.nn.functional.linear(h, model.lm_head.weight) ** 2
    with pytest.raises(UserError, match="output embedding"):
        evaluate(llama(1), model, blocks(2, 5))


def test_padded_vocabularies_are_compared_on_the_shared_ids():
    teacher, student, data = llama(0), llama(1, vocab_size=V + 3), blocks(2, 8)
    scores = evaluate(student, teacher, data, bootstrap=0)
    with torch.no_grad():
        lt = teacher(data.input_ids).logits[:, :-1].log_softmax(-1)
        ls = student(data.input_ids).logits[:, :-1, :V].log_softmax(-1)
    assert scores.kl == pytest.approx(float((lt.exp() * (lt - ls)).sum(-1).mean()), rel=1e-4)
    heads = output_head(teacher), output_head(student)
    with pytest.raises(UserError, match="outside"):
        metrics.score_tokens(torch.zeros(1, 24), heads[0], torch.zeros(1, 24), heads[1], torch.tensor([V + 1]))


def test_frequency_groups_follow_the_training_counts():
    label = torch.tensor([3, 1, 2, 0]).repeat_interleave(torch.tensor([10, 10, 40, 40]))
    counts = torch.tensor([1000, 5, 200, 0])
    group = frequency_deciles(label, counts)
    assert group[label == 3][0] == 0 and group[label == 1][0] == 1
    assert set(group[label == 2].tolist()) == {4} and set(group[label == 0].tolist()) == {8}
    assert frequency_deciles(label)[label == 0].min() > frequency_deciles(label)[label == 1].max()
    assert frequency_deciles(label, counts[:3]).tolist() == group.tolist()  # an id beyond the counts was never seen


def test_rare_tokens_are_the_same_in_training_and_in_the_report():
    rng = np.random.default_rng(5)
    training = Blocks(torch.from_numpy(rng.zipf(1.3, (40, 19)) % V))
    data = Blocks(torch.from_numpy(rng.zipf(1.2, (30, 17)) % V), document_ids=torch.arange(17).repeat(30, 1) // 6)
    counts = count_tokens(training)
    scores = evaluate(llama(0), llama(1), data, bootstrap=0, token_counts=counts)
    rare = rare_labels(data, counts)
    assert scores.rare_kl == pytest.approx(float(scores.kl_NS[rare].mean()), rel=1e-6)
    assert scores.rare_by == "the training text" and scores.by_decile[0]["tokens"] == int(rare.sum())
    # a tenth of the judged tokens, as near as whole ids allow, and none is commoner in training than any other token
    labels = data.labels()
    judged = labels[labels >= 0]
    often = torch.bincount(judged).max() / len(judged)
    assert abs(float(rare.sum()) / len(judged) - 0.1) <= often
    assert counts[labels[rare]].max() <= counts[labels[(labels >= 0) & ~rare]].min()
    assert evaluate(llama(0), llama(1), data, bootstrap=0).rare_by == "the scored text"


def test_retention_is_the_share_of_the_gap_closed_and_paired():
    teacher, student, control, data = mixtral(0), llama(1), llama(2), blocks(12, 15)
    ref = reference(teacher, data)
    a, b = evaluate(student, ref, bootstrap=300), evaluate(control, ref, bootstrap=300)
    share = gap_closed(a, b)
    assert share["overall"] == pytest.approx(1 - a.kl / b.kl)
    assert share["by_domain"]["code"] == pytest.approx(1 - a.by_domain["code"]["kl"] / b.by_domain["code"]["kl"])
    assert share["overall"].low < share["overall"] < share["overall"].high
    same = gap_closed(b, b)["overall"]
    assert same == same.low == same.high == 0  # paired: no noise of its own
    assert gap_closed(evaluate(teacher, ref), b)["overall"] == pytest.approx(1, abs=1e-4)
    with pytest.raises(UserError, match="other text"):
        gap_closed(a, evaluate(control, teacher, blocks(12, 15, seed=9), bootstrap=10))


def coverage_of_intervals(works, blocks_of, labelled, trials=400):
    """The share of intervals that hold the true mean, of texts whose works differ in level and in length."""
    rng, hits = np.random.default_rng(0), 0
    for trial in range(trials):
        sizes = rng.integers(1, 2 * blocks_of, works)
        owner = np.repeat(np.arange(works), sizes)
        passages = torch.from_numpy(owner)[:, None].expand(-1, 9) if labelled else None
        clusters = clusters_of(Blocks(torch.zeros(len(owner), 9, dtype=torch.int64), passages=passages))
        assert clusters.unit == ("passages" if labelled else "blocks")
        kl = (rng.gamma(8.0, 0.025, works)[owner][:, None] * rng.exponential(1.0, (len(owner), 9))).flatten()
        nothing = np.zeros(0)
        bootstrap = Bootstrap(clusters.count, 300, seed=trial)
        cluster = clusters.index.flatten().numpy()
        table = TokenTable({"kl": kl}, cluster, cluster, nothing, nothing, nothing, [], bootstrap, clusters.unit, "")
        estimate = table.mean("kl")
        hits += estimate.low <= 0.2 <= estimate.high
    return hits / trials


@pytest.mark.parametrize("works", [4, 16, 31])
def test_intervals_cover_at_their_nominal_rate_where_blocks_of_one_passage_are_alike(works):
    assert 0.90 <= coverage_of_intervals(works, 6, labelled=True) <= 0.98


def test_blocks_taken_for_independent_would_not_cover():
    assert coverage_of_intervals(16, 6, labelled=False) < 0.75


def test_works_are_resampled_where_records_name_them():
    ids = torch.zeros(4, 3, dtype=torch.int64)
    passages = torch.arange(4)[:, None].expand(4, 3)
    two, one = torch.tensor([0, 0, 7, 7]), torch.zeros(4, dtype=torch.int64)
    for works, unit, count in ((two, "works", 2), (one, "passages", 4), (torch.arange(4), "passages", 4)):
        clusters = clusters_of(Blocks(ids, passages=passages, works=works[:, None].expand(4, 3)))
        assert (clusters.unit, clusters.count) == (unit, count)
    assert clusters_of(Blocks(ids)).unit == "blocks"


def test_one_block_gives_no_interval_and_json_has_no_nan():
    scores = evaluate(llama(0), llama(1), blocks(1, 6), bootstrap=50)
    assert np.isnan(scores.kl.low) and scores.to_dict()["kl"]["low"] is None
    assert isinstance(scores.kl, Estimate) and "kl_NS" not in scores.to_dict()


def test_an_estimate_says_what_its_interval_is():
    assert repr(Estimate(0.7102, 0.5876, 0.8239)) == "0.710 (95% interval 0.588 to 0.824)"
    assert f"{Estimate(0.7102)}" == "0.710 (no interval)" and f"{Estimate(0.7102, 0.6, 0.8):.4f}" == "0.7102"


def test_bad_input_is_one_sentence():
    with pytest.raises(UserError, match="data:"):
        evaluate(llama(0), llama(1))
    with pytest.raises(UserError, match="teacher:"):
        evaluate(llama(0), data=blocks())
    with pytest.raises(UserError, match="no position"):
        evaluate(llama(0), llama(1), Blocks(torch.zeros(2, 1, dtype=torch.long)))


@pytest.mark.parametrize("stored", [False, True])
def test_stored_hidden_targets_stand_for_the_teacher(stored, tmp_path):
    from moe2dense.distillation.targets.memory import hidden_targets
    from moe2dense.distillation.targets.store import open_targets
    from moe2dense.distillation.targets.write import write_targets

    teacher, student, data = llama(0), llama(1), blocks(5, 9)
    if stored:
        write_targets(teacher, data, tmp_path / "t", format="hidden")
        targets = open_targets(tmp_path / "t", data)
    else:
        targets = hidden_targets(teacher, data)
    a, b = evaluate(student, data=data, targets=targets, bootstrap=0), evaluate(student, teacher, data, bootstrap=0)
    assert a.kl == pytest.approx(float(b.kl), rel=2e-2) and a.tokens == b.tokens  # stored in bfloat16
    if stored:
        write_targets(teacher, data, tmp_path / "u", format="topk")
        with pytest.raises(UserError, match="hidden"):
            evaluate(student, data=data, targets=open_targets(tmp_path / "u", data))


def test_scores_without_some_domains_and_on_them_alone():
    teacher, student = mixtral(0), llama(1)
    data = blocks(9, 15, domains=("law", "code", "play"))
    scores = evaluate(student, teacher, data, bootstrap=200)
    kept, lost = split_domains(scores, ["code"])
    for part, names in ((kept, ("law", "play")), (lost, ("code",))):
        alone = evaluate(student, teacher, data[[i for i, d in enumerate(data.domains) if d in names]], bootstrap=0)
        for name in ("kl", "nll", "agreement", "correlation", "ece", "entropy_gap"):
            assert getattr(part, name) == pytest.approx(float(getattr(alone, name)), rel=1e-5), name
        assert (part.tokens, part.blocks) == (alone.tokens, alone.blocks) and set(part.by_domain) == set(names)
        assert part.kl.low < part.kl < part.kl.high
        assert part.kl_NS.isnan().logical_not().sum() == part.tokens
    assert kept.kl * kept.tokens + lost.kl * lost.tokens == pytest.approx(scores.kl * scores.tokens)
    rare = scores.by_decile[0]
    together = sum(p.by_decile[0]["kl"] * p.by_decile[0]["tokens"] for p in (kept, lost) if p.by_decile[0]["tokens"])
    assert together == pytest.approx(rare["kl"] * rare["tokens"])
    assert split_domains(scores, ["music"]) is None and split_domains(scores, ["law", "code", "play"]) is None
