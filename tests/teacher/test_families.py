"""Every shipped card: streamed == transformers' own forward on a tiny random model of the family, however the tokens are laid out."""

import itertools
import json
import struct

import pytest
import torch

from moe2dense.errors import UserError
from moe2dense.families.cards import teacher_cards
from moe2dense.teacher.load import load_teacher
from moe2dense.teacher.observer import Observer
from tests.teacher.families import FAMILIES, blocks, make

TOLERANCE = 1e-4
MODELS: dict = {}


@pytest.fixture(params=sorted(teacher_cards()))
def family(request, tmp_path_factory):
    """(model_type, reference model, folder), made once per family."""
    name = request.param
    if name not in MODELS:
        folder = tmp_path_factory.mktemp(name)
        MODELS[name] = (make(name, folder), folder)
    return (name, *MODELS[name])


def close(a, b):
    assert a.shape == b.shape
    worst = (a - b).abs().max().item()
    assert worst <= TOLERANCE * max(1.0, b.abs().max().item()), worst


def test_every_card_has_a_tiny_model():
    assert sorted(FAMILIES) == sorted(teacher_cards())


def test_saved_as_the_hub_has_it(family):
    name, _, folder = family
    with (folder / "model.safetensors").open("rb") as file:
        keys = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    stacked = name.startswith(("granitemoe", "gpt_oss", "llama4", "minimax_m3", "gemma4"))
    assert any(".experts.0." in k for k in keys) != stacked


@pytest.mark.parametrize("memory", ["auto", "17MB"])
def test_logits(family, memory):
    _, reference, folder = family
    ids = blocks(reference, seed=1)
    teacher = load_teacher(folder, memory=memory)
    teacher.resident, teacher._layers = memory == "auto", {}
    assert teacher.ignored == []
    out = teacher.run(ids)
    close(out.logits, reference(ids).logits)
    close(teacher.head.logits(out.hidden_states), reference(ids).logits)


def test_small_chunks_give_the_same(family):
    _, reference, folder = family
    ids = blocks(reference, n=5, seed=2)
    teacher = load_teacher(folder)
    teacher.chunk_tokens = 2 * ids.shape[1]
    close(teacher.run(ids).logits, reference(ids).logits)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(family, side):
    _, reference, folder = family
    ids, mask = blocks(reference, seed=3), torch.ones(4, 23, dtype=torch.long)
    for row, count in enumerate((0, 1, 9, 22)):
        mask[row, slice(0, count) if side == "left" else slice(23 - count, 23)] = 0
    out = load_teacher(folder).run(ids, attention_mask=mask)
    want = reference(ids, attention_mask=mask).logits
    close(out.logits[mask.bool()], want[mask.bool()])


def test_packed_documents(family):
    name, reference, folder = family
    ids = blocks(reference, seed=4)
    lengths = ((23,), (1, 21, 1), (5, 9, 9), (12, 11))
    documents = torch.stack([torch.arange(len(n)).repeat_interleave(torch.tensor(n)) for n in lengths])
    teacher = load_teacher(folder)
    if not teacher_cards()[name].packing:
        with pytest.raises(UserError, match="document"):
            teacher.run(ids, document_ids=documents)
        close(teacher.run(ids[:1], document_ids=documents[:1]).logits, reference(ids[:1]).logits)
        return
    out = teacher.run(ids, document_ids=documents).logits
    for row, pieces in enumerate(lengths):
        at = 0
        for n in pieces:
            close(out[row, at : at + n], reference(ids[row : row + 1, at : at + n]).logits[0])
            at += n


def test_packed_and_padded(family):
    name, reference, folder = family
    if not teacher_cards()[name].packing:
        pytest.skip("cannot pack")
    ids = blocks(reference, n=1, seed=5)
    documents = torch.tensor([[0] * 8 + [1] * 10 + [2] * 5])
    mask = torch.tensor([[1] * 18 + [0] * 5])
    out = load_teacher(folder).run(ids, attention_mask=mask, document_ids=documents).logits
    close(out[0, :8], reference(ids[:, :8]).logits[0])
    close(out[0, 8:18], reference(ids[:, 8:18]).logits[0])


class Contributions(Observer):
    """The block's output put together again from single experts."""

    def begin(self, teacher, tokens):
        self.y, self.calls = {}, 0

    def expert(self, layer, e, rows, weights, hidden, output):
        y = self.y.setdefault(layer.index, torch.zeros_like(layer.y))
        y.index_add_(0, rows, output * weights[:, None])
        self.calls += 1
        x = layer.x[rows]
        if layer.ffns.card.input_scaled:
            slots = (layer.top_k_index[rows] == e).float()
            x = x * (layer.top_k_weights[rows] * slots).sum(1, keepdim=True)
        close(layer.experts[e].hidden(x), hidden)

    def layer(self, layer):
        if layer.sparse:
            y = self.y.get(layer.index, torch.zeros_like(layer.y)) + sum(s(layer.x) for s in layer.shared)
            close(y[layer.token_mask], layer.y[layer.token_mask])
        else:
            close(layer.dense(layer.x), layer.y)


def captured(reference, card, calls):
    """({layer: (x, y)}, {layer: router outputs}, hidden states before each layer) over several forwards, their tokens one after another."""
    x: dict = {}
    y: dict = {}
    routers: dict = {}
    handles = []
    for i, layer in enumerate(reference.model.layers):
        block = layer.get_submodule(card.moe_block)

        def block_hook(_m, args, out, i=i):
            out = out[0] if isinstance(out, tuple) else out
            x.setdefault(i, []).append(args[0].reshape(-1, args[0].shape[-1]))
            y.setdefault(i, []).append(out.reshape(-1, out.shape[-1]).clone())

        def router_hook(_m, _a, out, i=i):
            routers.setdefault(i, []).append(out)

        def shared_hook(_m, _a, out, i=i):
            y[i][-1] += out.reshape(y[i][-1].shape)

        handles.append(block.register_forward_hook(block_hook))
        owner = block if hasattr(block, card.router) else layer
        if hasattr(owner, card.router):
            handles.append(owner.get_submodule(card.router).register_forward_hook(router_hook))
        if card.shared and hasattr(layer, card.shared):
            handles.append(layer.get_submodule(card.shared).register_forward_hook(shared_hook))
    states = [reference(**arguments, output_hidden_states=True).hidden_states for arguments in calls]
    for handle in handles:
        handle.remove()
    flat = [torch.cat([s.flatten(0, 1) for s in at]) for at in zip(*states, strict=True)]
    outputs = {i: [torch.cat(parts) for parts in zip(*found, strict=True)] for i, found in routers.items()}
    return {i: (torch.cat(x[i]), torch.cat(y[i])) for i in x}, outputs, flat


def test_capture(family):
    """Router choices, x and y equal the reference's, and experts rebuilt from the checkpoint add up to y."""
    name, reference, folder = family
    ids, watcher = blocks(reference, seed=6), Contributions()
    watcher.begin(None, 0)
    stream = load_teacher(folder).stream(ids, observers=[watcher])
    sparse = compare(stream, *captured(reference, teacher_cards()[name], [{"input_ids": ids}]), teacher_cards()[name])
    assert sparse >= 2 and watcher.calls >= sparse


@pytest.mark.parametrize("layout", ["left", "right", "packed"])
def test_capture_of_padding_and_documents(family, layout):
    """As above on the real tokens of padded blocks, and with documents packed against one forward for each."""
    name, reference, folder = family
    card, ids, mask = teacher_cards()[name], blocks(reference, seed=7), torch.ones(4, 23, dtype=torch.long)
    if layout == "packed":
        if not card.packing:
            pytest.skip("cannot pack")
        borders = ((0, 23), (0, 1, 23), (0, 7, 16, 23), (0, 22, 23))
        calls = [
            {"input_ids": ids[row : row + 1, a:b]}
            for row, cuts in enumerate(borders)
            for a, b in itertools.pairwise(cuts)
        ]
        documents = torch.stack([torch.bucketize(torch.arange(23), torch.tensor(cuts), right=True) for cuts in borders])
        stream = load_teacher(folder).stream(ids, document_ids=documents)
    else:
        for row, count in enumerate((0, 1, 9, 22)):
            mask[row, slice(0, count) if layout == "left" else slice(23 - count, 23)] = 0
        calls = [{"input_ids": ids, "attention_mask": mask}]
        stream = load_teacher(folder).stream(ids, attention_mask=mask)
    assert compare(stream, *captured(reference, card, calls), card, mask.flatten().bool()) >= 2


def compare(stream, blocks_, routers, states, card, real=slice(None)):
    """Every layer of a stream against what the reference did, on the `real` tokens; returns how many were sparse."""
    sparse = 0
    for layer in stream:
        x, y = blocks_[layer.index]
        close(layer.hidden_in.flatten(0, 1)[real], states[layer.index][real])
        close(layer.x[real], x[real])
        close(layer.y[real], y[real])
        if not layer.sparse:
            continue
        sparse += 1
        weights = torch.zeros(len(layer.x), len(layer.experts)).scatter(1, layer.top_k_index, layer.top_k_weights)
        out = routers[layer.index]
        if card.dispatch == "stacked":
            close(weights[real], out[0][real])
            close(layer.router_logits[real], out[1][real])
        else:
            close(layer.router_logits[real], out[0][real])
            chosen = out[1] * layer.ffns.scale.routed  # a factor that the block puts on the sum of its experts
            close(weights[real], torch.zeros_like(weights).scatter(1, out[2], chosen)[real])
            assert torch.equal(layer.top_k_index.sort(1).values[real], out[2].sort(1).values[real])
    return sparse
