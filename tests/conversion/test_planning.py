import dataclasses
import json

import pytest

from moe2dense.common.units import parse_count
from moe2dense.config.schema import RunConfig
from moe2dense.config.toml import merge_flags
from moe2dense.conversion.configure import default_out
from moe2dense.conversion.machine import calibrate
from moe2dense.conversion.planning import block_length, held_out_blocks, make_plan
from moe2dense.conversion.show_plan import print_plan
from moe2dense.errors import UserError
from moe2dense.families.machines import CPU, Machine, described_machine
from moe2dense.student.build.cost import build_tokens

MACHINE = Machine("a machine", single=1e11, disk=1e9, memory=400e9, host_memory=400e9, share=0.6)


def planned(model="mixtral", to="7b", **flags):
    flags = {name.replace("__", "."): value for name, value in flags.items()}
    return make_plan(merge_flags(RunConfig(model=model, to=to), {"teacher.memory": "12GB"} | flags), MACHINE)


@pytest.fixture(scope="module")
def mixtral():
    return planned(train__tokens=1_000_000)


def test_mixtral_costs(mixtral):
    plan = mixtral
    assert plan.checkpoint_bytes == 2 * 46_702_792_704
    tables, tokens = 2 * 32000 * 4096, 488 * 2048
    attention = 32 * 4 * 4096 * 2048  # FLOPs of a token's attention to a block
    assert plan.stages["targets"].all_flops == pytest.approx(
        tokens * (2 * (12_879_925_248 - tables) + attention), rel=1e-3
    )
    trained = 488 * 2048 * (6 * (7_241_732_096 - tables) + 3.5 * attention + 4 * tables)
    checks = 11 * 96 * 2048 * (2 * (7_241_732_096 - tables) + attention + 2 * tables)
    assert plan.stages["train-student"].all_flops == pytest.approx(trained + checks, rel=1e-3)
    assert plan.from_scratch == 6 * 20 * 7_241_732_096**2
    assert plan.stages["train-student"].memory > 16 * 7_241_732_096
    assert plan.disk["model"] == 2 * 7_241_732_096
    assert plan.bytes_per_token == pytest.approx(plan.checkpoint_bytes / plan.macro_batch)
    # where reading the checkpoint once takes as long as computing the macro-batch
    seconds_read = plan.checkpoint_bytes / MACHINE.disk
    seconds_compute = plan.break_even_batch * 2 * plan.shape.active_parameters / (0.6 * MACHINE.single)
    assert seconds_read == pytest.approx(seconds_compute, rel=1e-2)
    assert plan.seconds == pytest.approx(sum(stage.seconds for stage in plan.stages.values()))
    targets = plan.stages["targets"]
    assert targets.seconds == pytest.approx(
        targets.all_flops / (0.6 * 1e11) + (targets.read + targets.written) / 1e9, rel=1e-6
    )


def test_more_memory_means_fewer_bytes_per_token():
    small, large = planned(teacher__memory="6GB"), planned(teacher__memory="40GB")
    assert small.bytes_per_token > large.bytes_per_token
    assert small.reads >= large.reads


def test_lora_and_build_only_save_memory_and_disk(mixtral):
    lora, build = planned(train__lora=64), planned(train__tokens=0)
    assert lora.stages["train-student"].memory < mixtral.stages["train-student"].memory / 2
    assert build.disk["checkpoints"] == 0
    assert not {"targets", "train-student"} & set(build.stages)
    assert build.build_tokens > 0


def test_masks_of_packed_documents_are_counted():
    """Dense ones grow with the square of a block, tiles do not; plain text needs none."""
    memory = {}
    for masks in ("off", "on"):
        for attention in ("sdpa", "flex"):
            plan = planned(
                train__tokens=400_000, train__fit_memory=False, data__block=8192, data__document_masks=masks,
                attention=attention,
            )  # fmt: skip
            memory[masks, attention] = plan.stages["train-student"].memory
    assert memory["off", "sdpa"] == memory["off", "flex"]
    layers, blocks = 32, 1  # a batch of 2048 tokens is one block
    assert memory["on", "sdpa"] - memory["off", "sdpa"] == blocks * 8192**2 * (1 + 4 * layers)
    assert 0 < memory["on", "flex"] - memory["off", "flex"] < 1e6


def test_a_plan_warns_of_masks_that_only_the_text_can_tell():
    def warned(**flags):
        plan = planned("mixtral", "7b", data__block=32768, train__batch=32768, train__fit_memory=False, **flags)
        return [w for w in plan.warnings if "where the text is chats" in w]

    assert len(warned()) == 1 and "--attention flex" in warned()[0]
    assert not warned(attention="flex") and not warned(data__document_masks="off")


def test_warnings():
    assert any("capacity gap" in w for w in planned("qwen3-30b-a3b", "1.5b").warnings)
    assert not any("capacity gap" in w for w in planned().warnings)
    assert any("few calibration tokens" in w for w in planned(train__tokens=1000).warnings)
    assert any("distillation budget" in w for w in planned().warnings)
    assert any("--lora" in w for w in planned("mixtral-8x22b", "40b", train__fit_memory=False).warnings)


def test_targets_need_memory_for_the_states_that_they_hold():
    """3.76 GB were measured of a teacher that answers 490k tokens with the states of four layers, 192 wide."""
    flags = {"train.tokens": 490_000, "write.extra": 0.0}
    plan = make_plan(merge_flags(RunConfig(model="examples/tiny-mixtral", to="3.2m"), flags), MACHINE)
    assert plan.stages["targets"].memory == pytest.approx(3.76e9, rel=0.05)


def test_weights_in_bfloat16_on_a_cpu_are_said():
    def said(machine, **flags):
        config = merge_flags(
            RunConfig(model="examples/tiny-mixtral", to="3.2m"), {k.replace("__", "."): v for k, v in flags.items()}
        )
        return [w for w in make_plan(config, machine).warnings if "multiply in bfloat16" in w]

    assert not said(MACHINE)
    assert said(MACHINE, train__weights="bfloat16")[0].startswith("training will")
    assert not said(dataclasses.replace(MACHINE, device="cuda"), train__weights="bfloat16")


def test_the_build_takes_a_fixed_share():
    config = merge_flags(RunConfig(), {"train.tokens": 1_000_000, "build.fraction": 0.1})
    assert build_tokens(config, 256, 512) == 1_000_000 // 10 // 256 * 256
    assert build_tokens(merge_flags(config, {"train.tokens": 5000}), 256, 512) == 4864  # never more than there is
    assert build_tokens(merge_flags(config, {"train.tokens": 10}), 256, 512) == 256
    # 20 for each neuron of a wide student, up to twice build.min_tokens
    small = merge_flags(config, {"train.tokens": 300_000})
    assert build_tokens(small, 256, 512) == 49_152
    assert build_tokens(small, 256, 3500) == 20 * 3500 // 256 * 256
    assert build_tokens(small, 256, 14336) == 2 * 49_152
    assert build_tokens(merge_flags(config, {"train.tokens": 100_000_000}), 256, 512) == 200_000 // 256 * 256


def test_the_remedy_for_few_calibration_tokens_works():
    """What the warning asks for makes it go away, also for a student whose neurons need more than build.max_tokens."""
    few = planned(train__tokens=100_000)
    (warning,) = [w for w in few.warnings if "few calibration tokens" in w]
    tokens = parse_count(warning.split("--tokens ")[1].split()[0])
    settings = dict(part.split(" = ") for part in warning.split("build.")[1:] if " = " in part)
    changed = {f"build__{name}": parse_count(value.split()[0].strip(",")) for name, value in settings.items()}
    done = planned(train__tokens=tokens, **changed)
    assert not any("few calibration" in w for w in done.warnings)


def test_a_build_that_does_not_fit_is_said():
    large = planned(build__max_tokens=10**9, build__min_tokens=10**8, train__tokens=10**9)
    assert any("memory: the build takes" in w and "build.max_tokens" in w for w in large.warnings)


def test_scoring_takes_no_more_text_than_a_quarter_of_the_training():
    assert held_out_blocks(0, 256, 200_000) == 96
    assert held_out_blocks(0, 2048, 100_000) == 24
    assert held_out_blocks(0, 2048, 400_000) == 48
    assert held_out_blocks(0, 2048, 50_000_000) == 96
    assert held_out_blocks(0, 64, 2_000) == 96
    assert held_out_blocks(7, 2048, 100_000) == 7


def test_block_length():
    assert block_length(RunConfig(), 256) == 256
    assert block_length(RunConfig(), 32768) == 2048
    with pytest.raises(UserError, match="--block 512 is more than the teacher's 256"):
        block_length(merge_flags(RunConfig(), {"data.block": 512}), 256)


def test_plain_values():
    plan = planned()
    table = json.loads(json.dumps(plan.to_dict()))
    assert table["student"]["width"] == 14336
    assert table["shape"]["num_experts"] == 8
    assert {f.name for f in dataclasses.fields(plan)} - {"target"} <= set(table) - {"student"}
    assert table["stages"]["build"]["flops"] and table["machine"]["single"] == 1e11


def test_a_further_sweep_costs_a_reading_and_its_fits():
    options = dict(build__heal_epochs=0.0, train__tokens=0)
    one, two, three = (planned(**options, build__sweeps=n) for n in (1, 2, 3))
    of_one, of_two, of_three = (plan.stages["build"] for plan in (one, two, three))
    assert of_three.all_flops - of_two.all_flops == pytest.approx(of_two.all_flops - of_one.all_flops)
    extra = of_two.read - of_one.read
    head = one.shape.vocab_size * one.shape.hidden_size / one.shape.parameters  # is no part of a pass
    assert extra == pytest.approx(-(-one.build_tokens // one.macro_batch) * (1 - head) * one.checkpoint_bytes)
    assert three.disk["build"] == 2 * one.disk["build"] and of_three.memory == of_one.memory


def test_the_build_costs_its_fits():
    build, plain = planned(train__tokens=0), planned(build__init="concat", train__tokens=0)
    assert build.stages["build"].all_flops > 2 * plain.stages["build"].all_flops
    healed = planned(teacher__memory="200GB", train__tokens=0)  # five copies of 7.24B fp32 weights
    shorter = planned(teacher__memory="200GB", train__tokens=0, build__heal_epochs=4.0)
    unhealed = planned(build__heal_epochs=0.0, train__tokens=0)
    assert healed.flops > shorter.flops > build.flops == unhealed.flops
    assert healed.stages["build"].memory > 20 * 7_241_732_096 > 3 * build.stages["build"].memory
    assert any("without its end-to-end fit, which takes at least 3" in w for w in build.warnings)
    assert not any("end-to-end fit" in w for w in (*healed.warnings, *plain.warnings))


def on(machine, **flags):
    flags = {name.replace("__", "."): value for name, value in flags.items()}
    settings = merge_flags(RunConfig(model="mixtral", to="7b"), flags)
    return make_plan(settings, described_machine(machine))


def test_full_training_of_a_7b_student_fits_one_80_gb_gpu_and_one_of_24_gb():
    large, small = on("1xh100"), on("1x4090")
    assert not any("memory: training" in w for w in (*large.warnings, *small.warnings))
    assert large.stages["train-student"].memory < 80e9 and small.stages["train-student"].memory < 24e9
    assert "train.weights = bfloat16" in large.training and "fit 24 GB" in small.training
    assert large.memory_settings["gradient_checkpointing"] and small.memory_settings["step_in_backward"]
    assert large.seconds < 1800
    assert "to fit 72 GB" in large.healing and "moments rest in eight bits" in large.healing
    assert (
        large.placement.precisions["training"]
        == large.placement.precisions["the heal"]
        == "bfloat16, steps rounded at random"
    )
    assert large.stages["build"].memory < 80e9 and "Adafactor takes the steps" in small.healing
    assert not any("end-to-end fit" in w for w in (*large.warnings, *small.warnings))
    kept = on("1xh100", train__fit_memory=False)
    assert kept.memory_settings == {} and any("memory: training all weights takes" in w for w in kept.warnings)


def test_eight_gpus_share_what_processes_share():
    one, eight = (on(machine, train__batch=32768) for machine in ("1xh100", "8xh100"))
    for name in ("targets", "train-student", "evaluate"):
        before, after = one.stages[name], eight.stages[name]
        assert after.all_flops == pytest.approx(before.all_flops)
        assert 0.1 * sum(before.busiest.values()) < sum(after.busiest.values()) < 0.2 * sum(before.busiest.values())
    build = [sum(plan.stages["build"].busiest.values()) for plan in (one, eight)]
    assert build[0] / 8 < build[1] < build[0], "neurons are chosen and matrices solved on one device"
    assert eight.stages["transfer"].busiest == one.stages["transfer"].busiest
    assert not any("nothing to train" in w for w in eight.warnings)
    short = on("8xh100", train__batch=4096)
    assert any("6 of 8 devices have nothing to train" in w and "16384 gives each one" in w for w in short.warnings)
    train = short.stages["train-student"]
    assert sum(train.busiest.values()) == pytest.approx(train.all_flops / 2)


def test_windows_of_targets_are_planned_as_they_roll():
    options = {"train__tokens": 2_000_000, "train__batch": 32768, "train__epochs": 2.0}
    stored, rolling, online = (on("1xh100", **options, train__targets_disk=d) for d in ("", "4GB", "0"))
    head = 2 * 32000 * 4096  # is stored beside every window
    assert stored.disk["targets"] > 8e9 > 4e9 > rolling.disk["targets"] > 3e9 and online.disk["targets"] == 0
    assert "targets" in stored.stages and "targets" not in rolling.stages and "targets" not in online.stages
    answers = stored.stages["targets"].all_flops
    for plan in (rolling, online):  # each pass of the text is answered again
        extra = plan.stages["train-student"].all_flops - stored.stages["train-student"].all_flops
        assert extra == pytest.approx(2 * answers, rel=0.03)
    windows = -(-2 * (stored.disk["targets"] - head) // (rolling.disk["targets"] - head))
    read = stored.stages["targets"].read / stored.checkpoint_bytes
    again = (rolling.stages["train-student"].read - stored.stages["train-student"].read) / stored.checkpoint_bytes
    assert read == pytest.approx(1, abs=0.01) and windows <= round(again) <= windows + 1


def test_machines_by_name_and_by_file(tmp_path):
    eight = described_machine("8xH100")
    assert (eight.count, eight.memory, eight.device) == (8, 80e9, "cuda") and eight.half > 10 * eight.single
    file = tmp_path / "mine.toml"
    file.write_text('title = "mine"\nsingle = 1e12\nmemory = "12GB"\ndisk = "500MB"\ndevice = "cpu"\n')
    mine = described_machine(str(file))
    assert mine.device == CPU and mine.disk == 5e8 and mine.rate("half") == mine.rate("single") == 0.4e12


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("1xh101", "is no machine such as 1xh100.*did you mean 'h100'"),
        ("0xh100", "is no machine"),
        ("nowhere.toml", "cannot be read"),
    ],
)
def test_unknown_machines_are_refused(text, match):
    with pytest.raises(UserError, match=match):
        described_machine(text)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("title = 3 =", "not valid TOML"),
        ('title = "x"\nsingle = 1e12\ndisk = 1e9', "missing key 'memory'"),
        ('title = "x"\nsingle = -1\ndisk = 1e9\nmemory = 1e9', "single must be above 0"),
        ('title = "x"\nsinggle = 1', "unknown key 'singgle'.*did you mean 'single'"),
    ],
)
def test_files_that_describe_no_machine_are_refused(content, match, tmp_path):
    (tmp_path / "m.toml").write_text(content)
    with pytest.raises(UserError, match=match):
        described_machine(str(tmp_path / "m.toml"))


def test_pruning_is_told_and_its_scores_cost_a_read():
    import io

    from rich.console import Console

    def text(plan):
        out = io.StringIO()
        print_plan(plan, RunConfig(), Console(file=out, width=200))
        return out.getvalue()

    small = planned("qwen3-30b-a3b", "1b", teacher__memory="60GB")
    even = planned("qwen3-30b-a3b", "3b", teacher__memory="60GB", build__prune="depth", build__depth="alternate")
    assert small.reads == even.reads + 1 and "of 2048 channels (by mean activation)" in text(small)
    assert "41 of 48 layers (evenly spaced)" in text(even)
    assert "attention, norms, embeddings whole" in text(planned())


def test_data_that_is_too_short_is_said():
    import torch

    from moe2dense.conversion.job import Text, shortfall
    from moe2dense.data.blocks import Blocks

    plan = planned(train__tokens=100_000)
    few, enough = (Blocks(torch.zeros(n, 100, dtype=torch.int64)) for n in (500, 1000))
    assert "50k tokens for training, 100k were asked for" in shortfall(Text(few, few, None, few), plan)
    assert shortfall(Text(enough, few, None, few), plan) == ""


def test_default_out():
    assert default_out("mixtral", "7b") == "./mixtral-7b"
    assert default_out("tiny", "25%") == "./tiny-25pct"
    assert default_out("tiny", "owner/Dense-Model") == "./tiny-dense-model"


def test_calibration_measures_something(tiny):
    machine = calibrate(tiny, seconds=0.2)
    assert machine.single > 1e8
    assert machine.disk > 1e6


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        ({"export__quantize": "int4"}, "are no linear layers"),
        ({"train__lora": 8, "train__dora": True}, "for which peft has no DoRA"),
    ],
)
def test_what_the_host_has_no_place_for_is_refused_by_the_plan(flags, match):
    with pytest.raises(UserError, match=match):
        planned("gpt-oss-20b", "7b", **flags)
    planned("mixtral", "7b", **flags)
