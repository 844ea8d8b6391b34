"""Split dense feed-forward networks (FFNs) into MoE blocks and fit each block to its FFN; used by carve_moe.py."""

import argparse
import copy
import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

# N blocks of text, S tokens a block, T tokens, H hidden size, I dense FFN width, E experts, K experts chosen, W expert width

# fields of the dense config that the MoE's config takes over
ATTENTION_FIELDS = ["num_attention_heads", "num_key_value_heads", "head_dim", "rope_parameters"]
COMMON_FIELDS = ["hidden_size", "num_hidden_layers", "hidden_act", "rms_norm_eps", "max_position_embeddings"]
TOKEN_FIELDS = ["vocab_size", "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id"]
COPIED_FIELDS = COMMON_FIELDS + ATTENTION_FIELDS + TOKEN_FIELDS


def moe_blocks(model: PreTrainedModel) -> list[nn.Module]:
    """Return the MoE blocks of the layers; none of a dense model."""
    return [layer.mlp for layer in model.model.layers if "experts" in dict(layer.mlp.named_children())]


class RouterWatch:
    """Collect each router's logits [T, E] and choices [T, K] in the order of the layers during a forward pass."""

    def __init__(self, blocks: list[nn.Module]):
        self.seen: list[tuple[Tensor, Tensor]] = []
        self.hooks = [block.gate.register_forward_hook(self.collect) for block in blocks]

    def collect(self, _router: nn.Module, _inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
        """Keep the logits and the choices out of a router's (logits, weights, choices)."""
        self.seen.append((output[0], output[2]))

    def take(self) -> list[tuple[Tensor, Tensor]]:
        """Return what was collected since the last call."""
        seen, self.seen = self.seen, []
        return seen

    def close(self) -> None:
        """Stop collecting."""
        for hook in self.hooks:
            hook.remove()


def balance_loss(logits: Tensor, index: Tensor) -> Tensor:
    """Return the load-balancing loss of one layer (Switch Transformer, 2101.03961, eq. 4): 1 when even, up to E / K."""
    experts = logits.shape[-1]
    share = torch.bincount(index.flatten(), minlength=experts) / index.numel()
    return experts * (share * logits.float().softmax(-1).mean(0)).sum()


def empty_moe(dense: PreTrainedModel, args: argparse.Namespace) -> PreTrainedModel:
    """Return an MoE of args.family with the dense model's attention, norms and embeddings; its FFNs are not yet written."""
    fields = {name: getattr(dense.config, name) for name in COPIED_FIELDS if hasattr(dense.config, name)}
    fields |= {"num_experts_per_tok": args.top_k, "router_aux_loss_coef": args.balance, "dtype": "bfloat16"}
    if args.family == "mixtral":
        fields |= {"num_local_experts": args.experts, "intermediate_size": args.width, "sliding_window": None}
    else:
        bias = any(name.endswith("q_proj.bias") for name in dense.state_dict())
        fields |= {"num_experts": args.experts, "moe_intermediate_size": args.width, "norm_topk_prob": True}
        fields |= {"shared_expert_intermediate_size": args.shared, "qkv_bias": bias}
    moe = AutoModelForCausalLM.from_config(AutoConfig.for_model(args.family, **fields), dtype=torch.float32)
    if args.width % 8:  # transformers' default for experts multiplies only rows of whole 16 bytes
        moe.set_experts_implementation("eager")
    weights = {name: w for name, w in dense.state_dict().items() if ".mlp." not in name}
    missing, unexpected = moe.load_state_dict(weights, strict=False)
    if odd := [name for name in missing + unexpected if ".mlp." not in name]:
        raise SystemExit(f"{dense.config.model_type} does not fit {args.family}: {odd[0]} is in one of the two only")
    return moe


def balanced_clusters(patterns: Tensor, clusters: int, rounds: int = 6) -> list[Tensor]:
    """Split rows [I, d] into clusters of equal size by spherical k-means, each round an exact linear assignment."""
    z = F.normalize(patterns - patterns.mean(0), dim=-1)
    size = len(z) // clusters
    centres = z[torch.randperm(len(z), generator=torch.Generator().manual_seed(0))[:clusters]]
    for _ in range(rounds):
        rows, seats = linear_sum_assignment((z @ centres.T).repeat_interleave(size, 1).double().numpy(), maximize=True)
        label = torch.from_numpy(seats // size)[torch.from_numpy(rows).argsort()]
        centres = F.normalize(torch.stack([z[label == c].mean(0) for c in range(clusters)]), dim=-1)
    return [torch.nonzero(label == c).flatten() for c in range(clusters)]


def ridge(x: Tensor, target: Tensor, weight: Tensor, strengths: tuple[float, ...]) -> list[Tensor]:
    """Solve min_B sum_t weight_t |x_t B - target_t|^2 + strength * mean eigenvalue * |B|^2 for B, once for each strength."""
    gram = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64)
    moment = torch.zeros(x.shape[1], target.shape[1], dtype=torch.float64)
    for xs, ts, ws in zip(x.split(4096), target.split(4096), weight.split(4096), strict=True):
        gram += xs.T @ (xs * ws[:, None])
        moment += xs.T @ (ts * ws[:, None])
    eye = gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    return [torch.linalg.solve(gram + strength * eye, moment).to(x.dtype) for strength in strengths]


def domain_affinity(domain: Tensor, experts: int) -> Tensor:
    """Return 1 where an expert is to serve a token's domain, else 0 [T, E]; domains are dealt out to experts in turn."""
    present, domain = domain.unique(return_inverse=True)
    d, e = torch.arange(len(present))[:, None], torch.arange(experts)
    return ((e % len(present) == d) | (d % experts == e)).float()[domain]


def redraw_neurons(experts: nn.Module, ffn: nn.Module, part: float, generator: torch.Generator) -> None:
    """Draw a part of each expert's neurons anew, from a normal distribution with the dense weights' standard deviation."""
    count, hidden, width = experts.down_proj.shape
    for e in range(count):
        anew = torch.randperm(width, generator=generator)[: round(part * width)]
        gate, up, down = torch.randn(3, len(anew), hidden, generator=generator)
        experts.gate_up_proj[e, anew] = gate * ffn.gate_proj.weight.std()
        experts.gate_up_proj[e, width + anew] = up * ffn.up_proj.weight.std()
        experts.down_proj[e, :, anew] = down.T * ffn.down_proj.weight.std()


@torch.no_grad()
def carve_block(
    block: nn.Module, ffn: nn.Module, x: Tensor, weight: Tensor, domain: Tensor, args: argparse.Namespace, layer: int
) -> None:
    """Write the dense FFN's neurons into the MoE block's experts and fit its router.

    x: inputs of the FFN [T, H]; weight: how much each token's squared error counts [T]; domain: each token's domain [T].
    """
    gate, up, down = ffn.gate_proj.weight, ffn.up_proj.weight, ffn.down_proj.weight
    hidden = ffn.act_fn(x @ gate.T) * (x @ up.T)
    # how much each neuron turns each token's residual stream [T, I]
    activity = hidden.abs() * down.norm(dim=0) * weight[:, None].sqrt()
    order = activity.mean(0).argsort(descending=True)
    shared, rest = order[: args.shared], order[args.shared :].sort().values
    if args.kind == "carved":
        patterns = (activity[:: max(1, len(x) // 2048), rest] / activity[:, rest].mean(0)).sqrt().T
        experts = [rest[members] for members in balanced_clusters(patterns, args.experts)]
        mass = torch.stack([(hidden[:, e] @ down[:, e].T).norm(dim=-1) for e in experts], 1)
        # ranks, not norms: one expert's hundredfold output would otherwise take the whole weight of the token
        affinity = mass.argsort(1).argsort(1).float()
    else:
        affinity = domain_affinity(domain, args.experts)
        active = [activity[affinity[:, e] > 0][:, rest].mean(0) for e in range(args.experts)]
        experts = [rest[expert.topk(args.width).indices] for expert in active]
    index = torch.stack(experts)
    block.experts.gate_up_proj.copy_(torch.cat([gate[index], up[index]], 1))
    # the router's weights add up to one: K experts that add up each need K times their output, K copies do not
    block.experts.down_proj.copy_(down.T[index].mT * (args.top_k if args.kind == "carved" else 1))
    if args.kind == "upcycled":
        redraw_neurons(block.experts, ffn, args.redraw, torch.Generator().manual_seed(args.seed * 1000 + layer))
    if args.shared:
        block.shared_expert.gate_proj.weight.copy_(gate[shared])
        block.shared_expert.up_proj.weight.copy_(up[shared])
        block.shared_expert.down_proj.weight.copy_(down[:, shared] * 2)  # its gate of zeros lets one half pass
        block.shared_expert_gate.weight.zero_()
    target = affinity - affinity.mean(1, keepdim=True)
    target = target / target.std().clamp_min(1e-9) * args.router_spread
    block.gate.weight.copy_(ridge(x, target, torch.ones(len(x)), (1e-3,))[0].T)


def refit_down(block: nn.Module, x: Tensor, y: Tensor, weight: Tensor) -> list[Tensor]:
    """Return weighted least squares changes of all output projections [E, H, W], for four strengths of the ridge."""
    experts = block.experts
    _, scores, index = block.gate(x)
    share = torch.zeros(len(x), experts.num_experts).scatter_(1, index, scores.to(x.dtype))
    parts = []
    for e, projection in enumerate(experts.gate_up_proj):
        gate, up = (x @ projection.T).chunk(2, -1)
        parts.append(experts.act_fn(gate) * up * share[:, e, None])
    changes = ridge(torch.cat(parts, 1), y - block(x[None])[0], weight, (0.01, 0.1, 0.3, 1.0))
    return [change.T.unflatten(1, (experts.num_experts, -1)).transpose(0, 1) for change in changes]


def schedule(step: int, steps: int) -> float:
    """Return the factor of the learning rate: a short warmup, then a cosine down to a twentieth."""
    return min(1.0, (step + 1) / (0.05 * steps + 1)) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / steps)))


@torch.no_grad()
def walk(
    dense: PreTrainedModel, ids: Tensor, args: argparse.Namespace
) -> Iterator[tuple[nn.Module, Tensor, Tensor, Tensor]]:
    """Yield for each dense layer its FFN and, over all tokens of ids [N, S], the FFN's inputs, outputs and error weights.

    Only one layer's hidden states are in memory. A token's weight is 1 / (|stream that leaves the layer|^2 + |FFN output|^2):
    an error counts by how far it turns what the next norm sees, and where the output cancels the stream, at most as the
    whole output. So a massive activation counts like any other token: as one token, where it is written.
    """
    stream = dense.get_input_embeddings()(ids)
    position = torch.arange(ids.shape[1])[None]
    rotary = dense.model.rotary_emb(stream, position_ids=position)
    for layer in dense.model.layers:
        inputs: list[Tensor] = []
        outputs: list[Tensor] = []
        hooks = [
            layer.mlp.register_forward_pre_hook(lambda _module, args, kept=inputs: kept.append(args[0].flatten(0, 1))),
            layer.mlp.register_forward_hook(lambda _module, _args, out, kept=outputs: kept.append(out.flatten(0, 1))),
        ]
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
            stream = torch.cat(
                [layer(part, position_ids=position, position_embeddings=rotary) for part in stream.split(8)]
            )
        for hook in hooks:
            hook.remove()
        x, y = torch.cat(inputs).float(), torch.cat(outputs).float()
        yield layer.mlp, x, y, 1 / (stream.flatten(0, 1).square().sum(-1) + y.square().sum(-1))


@torch.no_grad()
def block_error(block: nn.Module, x: Tensor, y: Tensor, weight: Tensor) -> float:
    """Return the root of the weighted squared error over the weighted square of the output: 1 when nothing is learnt."""
    error = torch.cat([block(xs[None])[0] for xs in x.split(4096)]) - y
    return math.sqrt(float((error.square().sum(-1) * weight).sum() / (y.square().sum(-1) * weight).sum()))


@torch.no_grad()
def refit_block(block: nn.Module, x: Tensor, y: Tensor, weight: Tensor, held_out: tuple[Tensor, ...]) -> float:
    """Give the block the refitted output projections that are best on held-out tokens, or leave it; return that error."""
    down = block.experts.down_proj.clone()
    errors = {block_error(block, *held_out): down}
    for change in refit_down(block, x, y, weight):
        block.experts.down_proj.copy_(down + change)
        errors[block_error(block, *held_out)] = down + change
    block.experts.down_proj.copy_(errors[min(errors)])
    return min(errors)


def fit_block(
    block: nn.Module, x: Tensor, y: Tensor, weight: Tensor, args: argparse.Namespace, layer: int
) -> tuple[float, float, float]:
    """Fit one block to the dense FFN, the output projections in closed form and then all weights by gradient.

    Returns the error on held-out tokens (the last sixteenth) at the start, after the first step and after the second; the
    second is undone where it did not help.
    """
    cut = len(x) - len(x) // 16
    held_out = x[cut:], y[cut:], weight[cut:]
    x, y, weight = x[:cut], y[:cut], weight[:cut] / (y[:cut].square().sum(-1) * weight[:cut]).mean()
    start = block_error(block, *held_out)
    refitted = refit_block(block, x, y, weight, held_out)
    before, watch = copy.deepcopy(block.state_dict()), RouterWatch([block])
    optimizer = torch.optim.Adam(block.parameters(), lr=args.fit_rate, betas=(0.9, 0.95))
    generator = torch.Generator().manual_seed(args.seed * 1000 + layer)
    batches = [b for _ in range(args.fit_passes) for b in torch.randperm(cut, generator=generator).split(512)]
    for step, rows in enumerate(batches):
        optimizer.param_groups[0]["lr"] = args.fit_rate * schedule(step, len(batches))
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
            error = block(x[rows][None])[0].float() - y[rows]
        loss = (error.square().sum(-1) * weight[rows]).mean() + args.balance * balance_loss(*watch.take()[0])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    optimizer.zero_grad()
    watch.close()
    fitted = block_error(block, *held_out)
    if fitted > refitted:
        block.load_state_dict(before)
    return start, refitted, fitted
