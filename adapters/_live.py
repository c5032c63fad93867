"""Networks of a pipeline that is in memory, and has perhaps been changed to run faster or smaller."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from rewardsr.errors import UserError

PRECISIONS = (torch.float32, torch.bfloat16, torch.float16)


def live_network(pipe: Any, part: str, mixed: bool = False) -> Any:
    """A network of a live pipeline, on which a LoRA can sit; from behind `torch.compile`, which compiles anew then.

    Args:
        pipe: the pipeline.
        part: name of the network there.
        mixed: whether its weights may be of several precisions.

    Raises:
        UserError: it carries a LoRA, or is fused, quantised, offloaded, spread over devices or compiled in pieces.
    """
    network = getattr(pipe, part)
    network = getattr(network, "_orig_mod", network)
    said = f"the {part} of {type(pipe).__name__}"
    if getattr(network, "peft_config", None):
        raise UserError(f"{said} carries a LoRA already: fuse and unload it first")
    for module in network.modules():
        if hasattr(module, "_orig_mod"):
            raise UserError(f"{said} is compiled in pieces: wrap it first, and compile it afterwards")
        if getattr(module, "fused_projections", False):
            raise UserError(f"{said} has fused projections: call its unfuse_qkv_projections() first")
        hooks = getattr(getattr(module, "_diffusers_hook", None), "hooks", ())
        if hasattr(module, "_hf_hook") or any("offload" in name or "casting" in name for name in hooks):
            raise UserError(
                f"{said} is offloaded or cast layer by layer: call the pipeline's remove_all_hooks() and move it to "
                "one device, or load it without"
            )
    weights = list(network.parameters())
    if any(weight.is_meta for weight in weights):
        raise UserError(f"{said} has no weights in memory (meta device): load it without offloading")
    plain = "quantised or sharded: load it in float32, bfloat16 or float16"
    for weight in weights:
        if type(weight) is not nn.Parameter or type(weight.data) is not Tensor or weight.dtype not in PRECISIONS:
            kind = type(weight.data if type(weight) is nn.Parameter else weight).__name__
            raise UserError(f"{said} holds weights of {_name(weight.dtype)} ({kind}), {plain}")
    for name, value in network.state_dict().items():
        if not isinstance(value, Tensor):
            raise UserError(f"{said} holds {name}, which is no tensor: {plain}")
    if len({weight.dtype for weight in weights}) > 1 and not mixed:
        raise UserError(f"{said} mixes {' and '.join(sorted({_name(w.dtype) for w in weights}))}: cast it to one")
    if len({weight.device for weight in weights}) > 1:
        raise UserError(
            f"{said} is spread over {' and '.join(sorted({str(w.device) for w in weights}))}: move it to one"
        )
    return network


def check_together(pipe: Any, parts: Iterable[str]) -> None:
    """Refuse networks that cannot compute together.

    Raises:
        UserError: they are on several devices, or the first is in float32 and another is not (the other way round is
            common, and works).
    """
    kind = type(pipe).__name__
    first, *others = ((part, next(getattr(pipe, part).parameters())) for part in parts)
    for part, weight in others:
        if weight.device != first[1].device:
            raise UserError(
                f"the {first[0]} of {kind} is on {first[1].device} and its {part} on {weight.device}: move one"
            )
        if first[1].dtype == torch.float32 != weight.dtype:
            raise UserError(f"the {first[0]} of {kind} is in float32 and its {part} in {_name(weight.dtype)}: cast one")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
