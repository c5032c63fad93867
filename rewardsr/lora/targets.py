"""Which modules of a network a LoRA sits on, and what shapes its tensors have there."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from rewardsr.adapter import ISRAdapter
from rewardsr.errors import UserError, nearest


def target_shapes(
    adapter: ISRAdapter, component: str, targets: Sequence[str] | None = None
) -> dict[str, tuple[int, tuple[int, ...]]]:
    """What `attach` would put a LoRA on: by module, its output channels and the shape of one output's weights.

    Raises:
        UserError: there is no such network, or targets (by default the adapter's) fit none of its modules, or one that
            is neither a linear layer nor a convolution.
    """
    if component not in adapter.networks:
        raise UserError(f"LoRA targets of '{component}', no network here: {nearest(component, adapter.networks)}")
    wanted = adapter.lora_targets[component] if targets is None else targets
    found = _targeted(adapter.networks[component], wanted)
    if not found:
        raise UserError(f"LoRA targets of '{component}' fit no module: {', '.join(wanted)}")
    return {name: (int(module.weight.shape[0]), tuple(module.weight.shape[1:])) for name, module in found.items()}


def tensor_shapes(network: nn.Module, rank: int, targets: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors that a LoRA on targets of a network has, by module and peft's key.

    Raises:
        UserError: a target fits a module of another kind.
    """
    made: dict[str, tuple[int, ...]] = {}
    for name, module in _targeted(network, targets).items():
        out, *kernel = module.weight.shape
        made[f"{name}.lora_A.weight"], made[f"{name}.lora_B.weight"] = (
            (rank, *kernel),
            (out, rank, *[1] * len(kernel[1:])),
        )
    return made


def _targeted(network: nn.Module, targets: Sequence[str]) -> dict[str, Any]:
    """The linear layers and convolutions that targets fit, by module name.

    Raises:
        UserError: a target fits a module of another kind, or one that is quantised or no longer asked.
    """
    if any(getattr(module, "fused_projections", False) for module in network.modules()):
        raise UserError(f"{type(network).__name__} has fused projections, which no LoRA reaches: unfuse them first")
    fitting: dict[str, Any] = {
        name: getattr(module, "base_layer", module)
        for name, module in network.named_modules()
        if name in targets or name.endswith(tuple(f".{target}" for target in targets))
    }
    for name, module in fitting.items():
        if not isinstance(module, nn.Linear | nn.Conv2d):
            raise UserError(f"LoRA target '{name}' is {type(module).__name__}, expected a Linear or a Conv2d")
        weight = module.weight
        if (
            type(weight) not in (nn.Parameter, Tensor)
            or type(weight.data) is not Tensor
            or not weight.is_floating_point()
        ):
            raise UserError(f"LoRA target '{name}' is quantised ({type(module).__name__}): load it in floating point")
    return fitting
