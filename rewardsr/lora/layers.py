"""Our LoRA: attach, switch off, save, load, merge.

One peft adapter named `rewardsr` sits on the modules in `ISRAdapter.lora_targets`; its tensors are float32 even on a
bf16 base. Files are `pytorch_lora_weights.safetensors` with peft's own key names under the component's name
(`unet.<module>.lora_A.weight`) and the LoRA's configuration in the header, which plain diffusers reads.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rewardsr.adapter import ISRAdapter
from rewardsr.errors import UserError

NAME = "rewardsr"


def attach(adapter: ISRAdapter, rank: int = 4, alpha: float = 8, seed: int = 0) -> None:
    """Put a fresh LoRA on every target module; outputs stay bit-equal until it is trained (B is zero).

    Args:
        adapter: the pipeline; its base weights are frozen.
        rank: r of the LoRA.
        alpha: the LoRA is scaled by alpha / rank; 8 at rank 4 is what OSEDiff and GDPO-SR release.
        seed: of the initial A matrices.

    Raises:
        UserError: a LoRA is there already, or a target module does not exist.
    """
    from peft import LoraConfig, inject_adapter_in_model

    if attached(adapter):
        raise UserError("this pipeline carries a rewardsr LoRA already")
    for component, network in adapter.trainable.items():
        targets = list(adapter.lora_targets[component])
        config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, init_lora_weights="gaussian")
        # A is drawn by peft from torch's global generator: seed it here and give it back as it was.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            try:
                inject_adapter_in_model(config, network, adapter_name=NAME)
            except ValueError as error:
                raise UserError(f"LoRA targets of '{component}' fit no module: {error}") from error
    for layer in _layers(adapter):
        # Under autocast the LoRA computes in the base's precision; peft's own cast to float32 would only cost memory.
        layer.cast_input_dtype_enabled = False
    for parameter in parameters(adapter).values():  # peft gives them the base's precision
        parameter.data = parameter.data.float()


def attached(adapter: ISRAdapter) -> bool:
    """Whether the pipeline carries our LoRA."""
    return next(iter(_layers(adapter)), None) is not None


def parameters(adapter: ISRAdapter) -> dict[str, nn.Parameter]:
    """The trainable tensors, by their names in the file, in a fixed order."""
    found: dict[str, nn.Parameter] = {}
    for component, network in adapter.trainable.items():
        for name, parameter in network.named_parameters():
            if f".{NAME}." in name:
                found[f"{component}.{name.replace(f'.{NAME}.', '.')}"] = parameter
    return dict(sorted(found.items()))


@contextmanager
def keep_float32(adapter: ISRAdapter) -> Iterator[None]:
    """Inside, the networks may be moved to another device and precision: the LoRA goes along unrounded, in float32."""
    exact = {name: parameter.detach().clone() for name, parameter in parameters(adapter).items()}
    yield
    for name, parameter in parameters(adapter).items():
        parameter.data = torch.empty_like(parameter, dtype=torch.float32).copy_(exact[name])


@contextmanager
def reference(adapter: ISRAdapter, *names: str) -> Iterator[None]:
    """Inside, the pipeline is what it was before fine-tuning: our LoRA is off, and no second network is needed.

    Never back-propagate inside: the LoRA's gradients would be zero, silently.
    """
    switched = [layer for layer in _layers(adapter) if not layer.disable_adapters]  # none inside another `reference`
    for layer in switched:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in switched:
            layer.enable_adapters(True)


def set_scale(adapter: ISRAdapter, scale: float) -> None:
    """Strength of the LoRA: 0 is the base bit for bit, 1 as trained."""
    for layer in _layers(adapter):
        layer.set_scale(NAME, scale)


def state_dict(adapter: ISRAdapter) -> dict[str, Tensor]:
    """The LoRA's tensors on the CPU, float32, by their names in the file.

    Raises:
        UserError: there is no LoRA.
    """
    tensors = {name: value.detach().float().cpu().contiguous() for name, value in parameters(adapter).items()}
    if not tensors:
        raise UserError("this pipeline carries no rewardsr LoRA: attach or load one first")
    return tensors


def load_state_dict(adapter: ISRAdapter, tensors: dict[str, Tensor], source: str = "LoRA") -> None:
    """Put tensors into the attached LoRA.

    Raises:
        UserError: missing, unexpected or misshapen tensors, or values that are not finite.
    """
    own = parameters(adapter)
    missing, extra = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    if missing or extra:
        parts = [
            f"{len(keys)} {kind} (first: {keys[0]})"
            for kind, keys in (("missing", missing), ("unexpected", extra))
            if keys
        ]
        raise UserError(f"{source} does not fit this pipeline: {', '.join(parts)}")
    for name, parameter in own.items():
        if tensors[name].shape != parameter.shape:
            raise UserError(f"{source}: {name} is {tuple(tensors[name].shape)}, expected {tuple(parameter.shape)}")
        if not tensors[name].isfinite().all():
            raise UserError(f"{source}: {name} holds values that are not finite")
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(tensors[name])


def merge(adapter: ISRAdapter) -> None:
    """Add the LoRA into the base weights and drop it.

    Raises:
        UserError: there is no LoRA, or the base is not in float32 (merging in bf16 loses about a tenth of a LoRA).
    """
    if not attached(adapter):
        raise UserError("nothing to merge: this pipeline carries no rewardsr LoRA")
    if adapter.dtype != torch.float32:
        raise UserError("merge in float32: load the adapter with dtype=torch.float32, and cast afterwards")
    for layer in _layers(adapter):
        layer.merge(adapter_names=[NAME])
    _detach(adapter)


def _detach(adapter: ISRAdapter) -> None:
    """Give the networks their plain modules back."""
    for network in adapter.trainable.values():
        for name, layer in [(name, layer) for name, layer in network.named_modules() if _is_lora(layer)]:
            parent, _, child = name.rpartition(".")
            setattr(network.get_submodule(parent), child, layer.get_base_layer())
        network.requires_grad_(False)
        if hasattr(network, "peft_config"):
            del network.peft_config


def delta(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """scale * B A in full: (out, in) of (r, in) and (out, r), or a kernel of (r, in, kh, kw) and (out, r, 1, 1)."""
    return scale * torch.einsum("or,r...->o...", b.flatten(1), a)


def rank_and_alpha(adapter: ISRAdapter) -> tuple[int, float]:
    """Rank of the attached LoRA, and the alpha by which it acts: its strength is taken in.

    Raises:
        UserError: there is no LoRA.
    """
    layer = next(iter(_layers(adapter)), None)
    if layer is None:
        raise UserError("this pipeline carries no rewardsr LoRA: attach or load one first")
    return layer.r[NAME], layer.scaling[NAME] * layer.r[NAME]


def target_shapes(adapter: ISRAdapter, component: str) -> dict[str, tuple[int, tuple[int, ...]]]:
    """What `attach` would put a LoRA on: by module, its output channels and the shape of one output's weights."""
    targets = tuple(adapter.lora_targets[component])
    suffixes = tuple(f".{target}" for target in targets)
    return {
        name: (int(module.weight.shape[0]), tuple(module.weight.shape[1:]))
        for name, module in adapter.trainable[component].named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and (name in targets or name.endswith(suffixes))
    }


def _layers(adapter: ISRAdapter) -> Iterator[Any]:
    """The peft layers that carry our LoRA."""
    for network in adapter.trainable.values():
        yield from (module for module in network.modules() if _is_lora(module))


def _is_lora(module: nn.Module) -> bool:
    return NAME in getattr(module, "lora_A", {})
