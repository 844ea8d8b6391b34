"""Several processes build the student of one: each streams its blocks, sums and gradients are those of all."""

import multiprocessing
import shutil
from dataclasses import replace

import pytest
import torch

from moe2dense.common.counters import metered, resident_memory
from moe2dense.common.processes import join_processes, world
from moe2dense.common.shared_rows import Share, any_row, mean_of_rows, share_of_rows
from moe2dense.config.schema import BuildConfig
from moe2dense.data.blocks import Blocks
from moe2dense.student.build import layer
from moe2dense.student.build.api import build_student, build_to_folder
from moe2dense.student.ffn import obs, refit, ridge
from moe2dense.student.store import load_student
from moe2dense.teacher.load import load_teacher
from tests.distillation.test_processes import as_rank, free_port
from tests.student.prune.test_cut import target_for
from tests.teacher.families import make

SHORT = BuildConfig(
    local_steps=12, local_batch=64, local_lr=1e-3, layer_steps=6, layer_batch=48, layer_lr=1e-4, heal_epochs=1, heal_batch=64,
    heal_lr=1e-4, hold_out=0.25,
)  # fmt: skip


def text(count: int = 11, padded: bool = False) -> Blocks:
    """Return blocks of 16 tokens, of unequal length where padded."""
    torch.manual_seed(3)
    ids = torch.randint(0, 96, (count, 16))
    mask = torch.ones_like(ids, dtype=torch.bool)
    if padded:
        for row in range(count):
            mask[row, 16 - row % 7 :] = row % 7 == 0
    return Blocks(ids, attention_mask=mask if padded else None)


def work(rank, processes, port, teacher, folder, to, data, init, config):
    """Build as one of several processes."""
    as_rank(rank, processes, port)
    if (
        "wide" in folder.name
    ):  # matrices as large ones are: of tokens, in float32 with corrections, a ridge chosen on a sketch
        obs.EXACT_WIDTH = refit.EXACT_WIDTH = ridge.EXACT_WIDTH = refit.SKETCH = 8
    if "few" in folder.name:  # fewer tokens than neurons
        refit.EXACT_WIDTH, refit.FEW_TOKENS = 8, 100
    if "limited" in folder.name:  # little memory: a pool of some neurons, refitted in groups
        layer.pool_limit, layer.refit_limit = lambda *_: 50, lambda *_: 20
    if (
        "gate" in folder.name
    ):  # in float32 one weight, whose gradient is a rounding error, is moved by Adam's whole steps
        torch.set_default_dtype(torch.float64)
    with join_processes():
        source = load_teacher(teacher, experts="streamed")
        to = target_for(source, 40, **to) if isinstance(to, dict) else to
        build_to_folder(source, to, data, folder / "student", folder, init=init, config=config, seed=5)
        whole = build_student(source, to, data, init=init, config=config, seed=5)
        for name, value in load_student(folder / "student").model.state_dict().items():
            torch.testing.assert_close(whole.model.state_dict()[name], value, msg=name)  # every process has all of it


def run_together(processes, target, *arguments):
    """Run `target(rank, processes, port, *arguments)` in so many processes."""
    context, port = multiprocessing.get_context("forkserver"), free_port()
    context.set_forkserver_preload(["transformers.models.mixtral.modeling_mixtral", "moe2dense.student.build.api"])
    started = [context.Process(target=target, args=(r, processes, port, *arguments)) for r in range(processes)]
    for process in started:
        process.start()
    for process in started:
        process.join(300)
    assert [p.exitcode for p in started] == [0] * processes


def build_together(processes, teacher, folder, to, data, init="layerwise", config=SHORT):
    """Return the student that so many processes build."""
    run_together(processes, work, teacher, folder, to, data, init, config)
    return load_student(folder / "student")


def same_student(ours, other):
    """Compare weights, provenance and records: sums over processes are rounded in another order."""
    ours_by_name, others = ours.model.state_dict(), other.model.state_dict()
    for name, value in others.items():
        assert (ours_by_name[name] - value).norm() <= 1e-5 * value.norm().clamp_min(1e-3), name
    for mine, its in zip(ours.provenance, other.provenance, strict=True):
        assert (mine is None) == (its is None)
        if mine is None:
            continue
        assert torch.equal(mine.source_expert, its.source_expert) and torch.equal(mine.source_neuron, its.source_neuron)
        torch.testing.assert_close(mine.energy_kept, its.energy_kept, rtol=1e-5, atol=1e-7)
    assert ours.build_tokens == other.build_tokens
    for record, row in zip(ours.history, other.history, strict=True):
        assert record.keys() == row.keys()
        for key in record.keys() - {"seconds"}:
            assert record[key] is None is row[key] or record[key] == pytest.approx(row[key], rel=1e-4, abs=1e-6), key


def test_two_processes_build_the_student_of_one(tmp_path):
    make("mixtral", tmp_path / "t")
    one = build_together(1, tmp_path / "t", tmp_path / "one", "80%", text())
    two = build_together(2, tmp_path / "t", tmp_path / "two", "80%", text())
    same_student(two, one)
    assert any(record.get("local_best_step") for record in one.history), "the fits changed something"
    assert one.history[-1]["heal_best_step"] > 0


CASES = {
    "three processes, padded, two sweeps": (3, "mixtral", "80%", "layerwise", replace(SHORT, sweeps=2), True),
    "shared experts behind a gate": (2, "qwen2_moe", "70%", "layerwise", SHORT, False),
    "input-scaled experts": (2, "llama4_text", "70%", "layerwise", SHORT, False),
    "merged experts": (2, "mixtral", "80%", "cluster+refit", SHORT, False),
    "mean of aligned experts": (3, "mixtral", "80%", "aligned-average+refit+local", SHORT, True),
    "few tokens for elimination": (2, "mixtral", "80%", "obs+refit", replace(SHORT, gram_tokens=50), False),
    "fewer channels and layers": (2, "mixtral", {"hidden_size": 16, "num_hidden_layers": 2}, "layerwise", SHORT, True),
    "fewer heads": (2, "mixtral", "60%", "layerwise", SHORT, True),
    "wide": (3, "mixtral", "80%", "obs+refit", SHORT, True),
    "few": (2, "mixtral", "80%", "obs+refit", SHORT, True),
    "limited": (2, "mixtral", "80%", "obs+refit", SHORT, False),
    "random": (2, "mixtral", "80%", "random+heal", SHORT, False),
    "more processes than blocks": (4, "mixtral", "80%", "layerwise", SHORT, False),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_every_way_of_building_is_shared(case, tmp_path):
    processes, family, to, init, config, padded = CASES[case]
    make(family, tmp_path / "t")
    data = text(3 if processes == 4 else 11, padded)
    one = build_together(1, tmp_path / "t", tmp_path / f"{case} one", to, data, init, config)
    same_student(build_together(processes, tmp_path / "t", tmp_path / f"{case} many", to, data, init, config), one)


@pytest.mark.slow
def test_a_build_goes_on_with_another_number_of_processes(tmp_path):
    make("mixtral", tmp_path / "t")
    one = build_together(1, tmp_path / "t", tmp_path / "one", "80%", text())
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    shutil.rmtree(tmp_path / "two/student")
    last = sorted((tmp_path / "two").glob("layer-*.safetensors"))[-1]
    last.unlink()
    same_student(build_together(2, tmp_path / "t", tmp_path / "two", "80%", text()), one)


def note_peak(rank, processes, port, teacher, out):
    """Build on many tokens, and write by how much memory grew at most."""
    as_rank(rank, processes, port)
    torch.manual_seed(0)
    data = Blocks(torch.randint(0, 96, (4096, 32)))
    with join_processes():
        source = load_teacher(teacher, experts="streamed")
        build_student(source, "80%", data[:64], init="select")  # what is loaded once
        before = resident_memory()
        with metered() as cost:
            build_student(source, "80%", data, init="select")
    (out / f"{processes}-{rank}").write_text(str(cost.memory - before))


@pytest.mark.slow
def test_memory_falls_with_the_number_of_processes(tmp_path):
    """Hidden states, targets and inputs are most of it here; weights are not divided."""
    make("mixtral", tmp_path / "t", hidden_size=96)
    for processes in (1, 2, 4):
        run_together(processes, note_peak, tmp_path / "t", tmp_path)
    grown = {n: max(int((tmp_path / f"{n}-{rank}").read_text()) for rank in range(n)) for n in (1, 2, 4)}
    assert grown[1] > 200e6, grown
    assert grown[2] < 0.65 * grown[1] and grown[4] < 0.4 * grown[1], grown


def rows(rank, processes, port):
    """Check sums over unequal shares."""
    as_rank(rank, processes, port)
    values = torch.arange(7.0) ** 2
    with join_processes():
        assert world() == (rank, processes)
        own = values[[slice(0, 4), slice(4, 4), slice(4, 7)][rank]]
        share = share_of_rows(len(own))
        assert share == [Share(0, 4, 7), Share(4, 0, 7), Share(4, 3, 7)][rank]
        assert float(mean_of_rows(own)) == pytest.approx(float(values.mean()))
        assert any_row(own == 25.0) and not any_row(own == 26.0)
        assert share.pick(torch.tensor([6, 0, 3, 4])).tolist() == [[0, 3], [], [2, 0]][rank]


def test_rows_of_processes_that_have_unequal_shares():
    run_together(3, rows)
    share = Share(4, 3, 7)
    assert [share.of_first(n) for n in (2, 4, 5, 7, 100)] == [0, 0, 1, 3, 3]
