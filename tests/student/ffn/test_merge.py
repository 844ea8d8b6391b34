"""Averages, alignment, SVD, concatenation and clustering against brute force in float64."""

import itertools
import zlib

import pytest
import torch
from torch import Tensor

from moe2dense.errors import UserError
from moe2dense.student.ffn.align import aligned_average, neuron_match
from moe2dense.student.ffn.average import average
from moe2dense.student.ffn.cluster import cluster, groups
from moe2dense.student.ffn.concat import concat, scales
from moe2dense.student.ffn.dense import DenseFFN, dense
from moe2dense.student.ffn.randomized import pad, random_ffn
from moe2dense.student.ffn.scores import best_experts, diverse
from moe2dense.student.ffn.svd import svd_gather, truncate
from moe2dense.teacher.routing import LayerStats

H, F, E, T = 7, 5, 4, 33


def expert(generator: torch.Generator, bias: bool = False) -> DenseFFN:
    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    biases = (draw(F), draw(F), draw(H)) if bias else ()
    return DenseFFN(draw(F, H), draw(F, H), draw(H, F), *biases)


def clamped(gate: Tensor, up: Tensor) -> Tensor:
    return gate.clamp(max=1.0) * torch.sigmoid(gate) * (up + 1)


@pytest.fixture
def draws(request) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(request.node.name.encode()))


@pytest.mark.parametrize("bias", [False, True])
def test_concat_of_all_experts_with_alpha_is_the_mean_routed_block(draws, bias):
    experts = [expert(draws, bias) for _ in range(E)]
    alpha = torch.rand(E, generator=draws, dtype=torch.float64)
    x = torch.randn(T, H, generator=draws, dtype=torch.float64)
    want = sum(a * f(x) for a, f in zip(alpha, experts, strict=True))
    got = concat(experts, alpha, torch.arange(E), "alpha")(x)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_concat_one_over_k_is_the_mean_of_the_kept_experts(draws):
    experts = [expert(draws) for _ in range(E)]
    alpha = torch.full((E,), 1 / E, dtype=torch.float64)
    x = torch.randn(T, H, generator=draws, dtype=torch.float64)
    got = concat(experts, alpha, torch.tensor([0, 2]), "1/K")(x)
    torch.testing.assert_close(got, (experts[0](x) + experts[2](x)) / 2)


def test_both_scales_keep_the_total_weight():
    alpha = torch.tensor([0.5, 0.25, 0.1, 0.4])
    for scale in ("1/K", "alpha"):
        torch.testing.assert_close(scales(alpha, torch.tensor([1, 3]), scale).sum(), alpha.sum())
    with pytest.raises(UserError, match="scale"):
        scales(alpha, torch.tensor([1, 3]), "K")


def test_identical_experts_average_to_themselves_at_their_total_weight(draws):
    one = expert(draws, bias=True)
    alpha = torch.tensor([0.7, 0.2, 0.6, 1.0], dtype=torch.float64)
    x = torch.randn(T, H, generator=draws, dtype=torch.float64)
    for weighted in (False, True):
        torch.testing.assert_close(average([one] * E, alpha, weighted)(x), 2.5 * one(x))


def test_weighted_average_uses_the_shares(draws):
    experts = [expert(draws) for _ in range(E)]
    alpha = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    merged = average(experts, alpha, weighted=True)
    torch.testing.assert_close(merged.gate, sum(a * f.gate for a, f in zip(alpha, experts, strict=True)))
    torch.testing.assert_close(average(experts, alpha).up, sum(f.up for f in experts) / E)


def test_alignment_undoes_a_permutation(draws):
    one = expert(draws, bias=True)
    orders = [torch.randperm(F, generator=draws) for _ in range(E)]
    shuffled = [dense(one, rows=order) for order in orders]
    alpha = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    x = torch.randn(T, H, generator=draws, dtype=torch.float64)
    torch.testing.assert_close(aligned_average(shuffled, alpha)(x), one(x))
    assert (average(shuffled, alpha)(x) - one(x)).abs().max() > 1e-3


def test_neuron_match_is_the_best_of_all_permutations(draws):
    a, b = expert(draws), expert(draws)

    def unit(w: Tensor) -> Tensor:
        return w / w.pow(2).mean().sqrt()

    def likeness(order: Tensor) -> float:
        pairs = ((a.gate, b.gate), (a.up, b.up), (a.down.T, b.down.T))
        return float(sum((unit(p)[order] * unit(q)).sum() for p, q in pairs))

    best = max(likeness(torch.tensor(p)) for p in itertools.permutations(range(F)))
    assert likeness(neuron_match(a, b)) == pytest.approx(best)


def test_svd_truncation_and_gathering(draws):
    experts = [expert(draws) for _ in range(E)]
    matrix = experts[0].gate
    values = torch.linalg.svdvals(matrix)
    assert float((matrix - truncate(matrix, 2)).norm()) == pytest.approx(float(values[2:].norm()))
    alpha = torch.full((E,), 0.25, dtype=torch.float64)
    full = svd_gather(experts, alpha, rank=min(H, F))
    torch.testing.assert_close(full.gate, sum(f.gate for f in experts))
    torch.testing.assert_close(full.down, sum(f.down for f in experts) / E)
    assert torch.linalg.matrix_rank(svd_gather(experts[:2], alpha[:2], rank=2).up) == 4


def test_clusters_find_the_groups_and_merge_them_exactly(draws):
    a, b = expert(draws), expert(draws)
    experts = [a, dense(b, rows=torch.randperm(F, generator=draws)), a, b]
    x = torch.randn(T, H, generator=draws, dtype=torch.float64)
    means = torch.stack([f(x).mean(0) for f in experts])
    assert sorted(sorted(g.tolist()) for g in groups(means, 2)) == [[0, 2], [1, 3]]
    alpha = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    merged, members = cluster(experts, alpha, means, 2)
    assert merged.width == 2 * F and len(members) == 2
    torch.testing.assert_close(merged(x), 0.4 * a(x) + 0.6 * b(x))


def test_scores_pick_what_they_say():
    stats = LayerStats.zeros(4, 4)
    stats.tokens += 10
    stats.count += torch.tensor([4, 3, 2, 1])
    stats.weight += torch.tensor([1.0, 2, 4, 3])
    stats.weighted_norm += torch.tensor([12.0, 3, 4, 4])  # over count: 3, 1, 2, 4
    stats.output += torch.eye(4) * stats.count
    probability = torch.tensor([1.0, 4, 3, 2])
    picks = {s: best_experts(stats, 2, s, probability).tolist() for s in ("frequency", "cp", "acp", "reap", "do-acp")}
    want = {"frequency": [0, 1], "cp": [1, 2], "acp": [2, 3], "reap": [0, 3], "do-acp": [2, 3]}
    assert picks == want
    with pytest.raises(UserError, match="score"):
        best_experts(stats, 2, "best")


def test_diverse_choice_is_the_greedy_log_determinant(draws):
    quality, features = torch.rand(6, generator=draws), torch.randn(6, 3, generator=draws)
    features[1] = features[0]  # a copy of the best is worth little
    quality[0], quality[1] = 3.0, 2.9
    unit = torch.nn.functional.normalize(features.double(), dim=1)
    scaled = unit * (quality.double() / quality.double().mean()).sqrt()[:, None]
    chosen: list[int] = []
    for _ in range(4):
        gains = {
            e: float(torch.logdet(torch.eye(3, dtype=torch.float64) + scaled[[*chosen, e]].T @ scaled[[*chosen, e]]))
            for e in range(6)
            if e not in chosen
        }
        chosen.append(max(gains, key=gains.__getitem__))
    assert diverse(quality, features, 4).tolist() == chosen


@pytest.mark.parametrize("bias", [False, True])
def test_padding_changes_nothing_but_can_learn(draws, bias):
    ffn = expert(draws, bias)
    ffn.gating = clamped
    x = torch.randn(T, H, generator=draws, dtype=torch.float64)
    wide = pad(ffn, 11)
    torch.testing.assert_close(wide(x), ffn(x))
    assert wide.width == 11 and wide.gate[F:].abs().min() > 0 and pad(ffn, F) is ffn


def test_random_is_seeded_and_scaled():
    one, same, other = random_ffn(64, 32, seed=1), random_ffn(64, 32, seed=1), random_ffn(64, 32, seed=2)
    assert torch.equal(one.gate, same.gate) and not torch.equal(one.gate, other.gate)
    assert float(one.down.std()) == pytest.approx(0.02, rel=0.1)
    assert random_ffn(3, 2, bias=True).down_bias is not None
