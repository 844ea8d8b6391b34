"""Train a small Mixture-of-Experts model of any family of the cards, on this machine, as a teacher to experiment with.

    python examples/train_tiny_moe.py out/tiny-qwen3 --family qwen3_moe --experts 32 --top-k 4 --expert-width 64

examples/tiny-mixtral was made this way (its defaults below), from scratch at blocks of 256 tokens. The load-balancing
loss is the Switch Transformer's (2101.03961, eq. 4) summed over layers: a loss on the mean over layers, as transformers
computes it, lets single layers collapse onto a few experts while the mean stays balanced.
"""

import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
from cyclopts import App
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from moe2dense.common.units import parse_count
from moe2dense.data.blocks import Blocks
from moe2dense.data.load import load_blocks
from moe2dense.data.options import TextOptions
from moe2dense.errors import UserError
from moe2dense.families.cards import TeacherCard, teacher_cards

HERE = Path(__file__).parent

# T tokens, E experts, K top_k


def balance_loss(logits_TE: Tensor, index_TK: Tensor) -> Tensor:
    """E * sum_e (share of the choices that fall on e) * (mean router probability of e): 1 when even, up to E when collapsed."""
    experts = logits_TE.shape[-1]
    share_E = torch.bincount(index_TK.flatten(), minlength=experts).to(logits_TE.dtype) / index_TK.numel()
    return experts * (share_E * logits_TE.float().softmax(-1).mean(0)).sum()


def effective_experts(index_TK: Tensor, experts: int) -> float:
    """exp(entropy) of the load: `experts` when even, 1 when one expert takes all."""
    share = torch.bincount(index_TK.flatten(), minlength=experts).double() / index_TK.numel()
    return float(torch.special.entr(share).sum().exp())


class RouterWatch:
    """Collects each layer's router logits [T, E] and choices [T, K] during a forward pass."""

    def __init__(self, model: nn.Module, card: TeacherCard, top_k: int, experts: int):
        self.seen: list[tuple[Tensor, Tensor]] = []
        self.top_k, self.experts = top_k, experts
        for layer in model.get_decoder().layers:
            try:
                router = layer.get_submodule(f"{card.moe_block}.{card.router}")
            except AttributeError:
                continue  # a dense layer
            router.register_forward_hook(self._keep)

    def _keep(self, _module: nn.Module, _inputs: Any, output: Any) -> None:
        parts = output if isinstance(output, tuple) else (output,)
        logits = next(p for p in parts if p.is_floating_point() and p.shape[-1] == self.experts)
        logits = logits.reshape(-1, self.experts)
        chosen = [p for p in parts if not p.is_floating_point() and p.shape[-1] == self.top_k]
        self.seen.append((logits, chosen[0].reshape(-1, self.top_k) if chosen else logits.topk(self.top_k).indices))

    def take(self) -> list[tuple[Tensor, Tensor]]:
        seen, self.seen = self.seen, []
        return seen


def small_config(card: TeacherCard, tokenizer: Any, sizes: dict[str, Any], block: int) -> Any:
    """A config of this family with the given sizes; fields that the family does not have are left out."""
    tokens = {k: getattr(tokenizer, k) for k in ("bos_token_id", "eos_token_id", "pad_token_id")}
    wanted = sizes | tokens | {"vocab_size": len(tokenizer), "max_position_embeddings": block, "dtype": "bfloat16"}
    known = AutoConfig.for_model(card.model_type)
    extra = {
        "norm_topk_prob": True,
        "moe_layer_freq": 1,
        "decoder_sparse_step": 1,
        "first_k_dense_replace": 0,
        "n_group": 1,
        "topk_group": 1,
    }
    return AutoConfig.for_model(card.model_type, **{k: v for k, v in (wanted | extra).items() if hasattr(known, k)})


def validation_loss(model: nn.Module, blocks: Blocks) -> float:
    """Mean next-token loss in nats."""
    model.eval()
    with torch.no_grad():
        losses = [
            model(input_ids=b.input_ids, labels=b.input_ids).loss.item()
            for b in (blocks[i : i + 8] for i in range(0, len(blocks), 8))
        ]
    model.train()
    return sum(losses) / len(losses)


def train(
    model: nn.Module,
    watch: RouterWatch,
    data: Blocks,
    valid: Blocks,
    *,
    steps: int,
    batch: int,
    lr: float,
    balance: float,
) -> None:
    """AdamW with warmup and cosine; prints loss, balance and effective experts as it goes."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.1)
    warmup = max(1, steps // 50)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min((s + 1) / warmup, 0.5 * (1 + math.cos(math.pi * min(1.0, s / steps)))) + 0.02
    )
    order = torch.cat([torch.randperm(len(data)) for _ in range(-(-steps * batch // len(data)))])
    start = time.perf_counter()
    for step in range(steps):
        ids = data[order[step * batch : (step + 1) * batch]].input_ids
        loss = model(input_ids=ids, labels=ids).loss
        seen = watch.take()
        uneven = torch.stack([balance_loss(*layer) for layer in seen]).sum()
        (loss + balance * uneven).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 50 == 0 or step == steps - 1:
            spread = " ".join(f"{effective_experts(index, watch.experts):.1f}" for _, index in seen)
            rate = (step + 1) * ids.numel() / (time.perf_counter() - start)
            held = f" valid {validation_loss(model, valid):.3f}" if step % 500 == 0 or step == steps - 1 else ""
            watch.take()
            print(
                f"step {step}/{steps} loss {loss.item():.3f}{held} effective experts {spread} {rate:.0f} tokens/s",
                flush=True,
            )


app = App(help="Train a small MoE teacher.")


@app.default
def main(
    out: Path,
    *,
    family: str = "mixtral",
    data: str = str(HERE / "text"),
    tokenizer: str = str(HERE / "tiny-mixtral"),
    layers: int = 4,
    hidden: int = 192,
    heads: int = 6,
    kv_heads: int = 3,
    experts: int = 8,
    top_k: int = 2,
    expert_width: int = 256,
    tokens: str = "16m",
    block: int = 256,
    batch: int = 16,
    lr: float = 2e-3,
    balance: float = 0.1,
    seed: int = 0,
) -> None:
    """Train a small MoE and save it in its hub layout, bf16.

    Parameters
    ----------
    out: folder of the new checkpoint
    family: model_type of a teacher card
    data: folder with train and valid files
    tokenizer: folder of the tokenizer to use
    tokens: training tokens; epochs are repeated as needed
    batch: blocks per step
    balance: weight of the load-balancing loss of each layer
    """
    if family not in teacher_cards():
        raise UserError(f"--family {family!r} has no teacher card; known: {', '.join(teacher_cards())}")
    if out.exists():
        raise UserError(f"{out} exists; choose another folder")
    torch.manual_seed(seed)
    card, tok = teacher_cards()[family], AutoTokenizer.from_pretrained(tokenizer)
    sizes = {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
    }
    sizes |= {"head_dim": hidden // heads, "intermediate_size": expert_width, "tie_word_embeddings": False}
    sizes |= {card.num_experts: experts, card.top_k: top_k, card.expert_width: expert_width}
    model = AutoModelForCausalLM.from_config(small_config(card, tok, sizes, block), dtype=torch.float32)
    model.set_experts_implementation("eager")
    watch = RouterWatch(model, card, top_k, experts)
    plain = TextOptions(bos="off")  # as the checkpoint in examples/ was trained
    blocks = load_blocks(data, tok, block, "train", seed=seed, options=plain)
    valid = load_blocks(data, tok, block, "valid", tokens=64 * block, seed=seed, options=plain)
    steps = max(1, parse_count(tokens, "--tokens") // (batch * block))
    print(
        f"{family}: {sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters, {blocks.tokens} tokens of text, {steps} steps"
    )
    train(model, watch, blocks, valid, steps=steps, batch=batch, lr=lr, balance=balance)
    nll = validation_loss(model, valid)
    model.to(torch.bfloat16).save_pretrained(out)
    tok.save_pretrained(out)
    record = {"tokens": steps * batch * block, "balance": balance, "seed": seed, "valid_nll": round(nll, 4)}
    (out / "training.json").write_text(json.dumps(record) + "\n")
    print(f"saved {out}: validation NLL {nll:.3f}")


if __name__ == "__main__":
    try:
        app()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
