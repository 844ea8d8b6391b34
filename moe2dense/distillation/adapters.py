"""Put low-rank adapters on a student's weight matrices, whatever shape its architecture keeps them in, and merge them again."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import ParamWrapper
from torch import nn
from transformers import PreTrainedModel

from moe2dense.config.training import TrainConfig
from moe2dense.errors import UserError
from moe2dense.modeling.decoder import decoder_layers
from moe2dense.modeling.gated_ffn import gated_linears

# 3-D parameters in which transformers keeps the matrices of experts side by side
_EXPERT_PARAMETERS = ("gate_up_proj", "down_proj")


@dataclass(frozen=True)
class AdapterTargets:
    """Full names of what adapters are put on: linear layers, and parameters that hold the matrices of experts."""

    linears: tuple[str, ...]
    parameters: tuple[str, ...]
    # those of them that belong to an FFN, for each decoder layer
    ffns: tuple[tuple[str, ...], ...]


def adapter_targets(model: PreTrainedModel) -> AdapterTargets:
    """Return every weight matrix of the decoder layers.

    The output head, routers and convolutions are left as they are.
    """
    names = {module: name for name, module in model.named_modules()}
    linears: list[str] = []
    parameters: list[str] = []
    ffns: list[tuple[str, ...]] = []
    for layer in decoder_layers(model):
        ffn: list[str] = []
        for module in layer.modules():
            if type(module) is nn.Linear:  # a subclass, such as a router, may return something else
                linears.append(names[module])
            pieces = gated_linears(module)
            if pieces:
                ffn += [f"{names[module]}.{piece}" for piece in (pieces.gate, pieces.up, pieces.down) if piece]
            for name in _EXPERT_PARAMETERS:
                parameter = module._parameters.get(name)
                if parameter is not None and parameter.dim() == 3:
                    parameters.append(f"{names[module]}.{name}")
                    ffn.append(parameters[-1])
        ffns.append(tuple(ffn))
    return AdapterTargets(tuple(linears), tuple(parameters), tuple(ffns))


def check_adapters(model: PreTrainedModel, config: TrainConfig) -> None:
    """Raise UserError where adapters cannot be trained on all of a model's FFNs."""
    if not config.lora:
        return
    targets = adapter_targets(model)
    without = [i for i, names in enumerate(targets.ffns) if not set(names) & {*targets.linears, *targets.parameters}]
    if without:
        raise UserError(
            f"train.lora: {type(model).__name__} has no FFN in layer {without[0]} that adapters can be put on; train without --lora"
        )
    if config.dora and targets.parameters:
        raise UserError(
            f"train.dora: {type(model).__name__} keeps its FFN as parameters of experts, for which peft has no DoRA; use --lora alone"
        )


def add_adapters(model: PreTrainedModel, config: TrainConfig) -> PreTrainedModel:
    """Return the model, frozen, with low-rank adapters on its weight matrices (LoRA, 2106.09685; DoRA, 2402.09353).

    Raises UserError where one of the FFNs' matrices did not get an adapter.
    """
    check_adapters(model, config)
    targets = adapter_targets(model)
    adapters = LoraConfig(
        r=config.lora, lora_alpha=2 * config.lora, use_dora=config.dora,
        target_modules=list(targets.linears), target_parameters=list(targets.parameters) or None,
    )  # fmt: skip
    with _targets_as_given(model):
        # a wrapper that passes everything else on to the model, with the model's attributes and methods
        adapted: PreTrainedModel = get_peft_model(model, adapters)  # type: ignore[assignment]
    _mend_single_experts(adapted)
    if missing := _without_adapter(adapted, targets):
        raise UserError(
            f"train.lora: peft put no adapter on {missing[0]} ({len(missing)} of the FFNs' {sum(map(len, targets.ffns))} matrices); "
            "train without --lora, or install another version of peft"
        )
    return adapted


@contextlib.contextmanager
def _targets_as_given(model: PreTrainedModel) -> Iterator[None]:
    """Keep peft from rewriting targets within the context.

    It takes a model whose `model_type` is known for experts to have their fused parameters, which a student with dense
    layers has not.
    """
    fields = vars(model.config)
    own = fields.get("model_type")  # a field of the class, unless somebody set it
    fields["model_type"] = "dense"
    try:
        yield
    finally:
        fields.pop("model_type")
        fields.update({} if own is None else {"model_type": own})


def _mend_single_experts(adapted: PreTrainedModel) -> None:
    """Turn the product of an adapter's factors for a single expert kept as [1, inputs, outputs] (gpt-oss).

    peft computes it as [outputs, inputs] where there is one expert, whatever the layout.
    """
    for module in adapted.modules():
        if isinstance(module, ParamWrapper) and module.num_experts == 1:
            module.fan_in_fan_out = not module._did_swap_in_out_features


def _without_adapter(adapted: PreTrainedModel, targets: AdapterTargets) -> list[str]:
    """Return the FFN matrices of a model without a trainable adapter."""
    trained = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad and ".lora_" in name}
    linears = {name.split(".lora_")[0].removeprefix("base_model.model.") for name in trained}
    wrapped = {
        f"{name.removeprefix('base_model.model.').replace('.base_layer', '')}.{module.parameter_name}"
        for name, module in adapted.named_modules()
        if isinstance(module, ParamWrapper)
    }
    return [name for names in targets.ffns for name in names if name not in linears | wrapped]


def merge_adapters(adapted: PreTrainedModel) -> PreTrainedModel:
    """Merge adapters into the weights; return the object that `add_adapters` was given."""
    assert isinstance(adapted, PeftModel)
    model = adapted.merge_and_unload()
    return model.requires_grad_(True)
