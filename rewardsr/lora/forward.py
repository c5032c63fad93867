"""What a module with LoRAs computes: in the precision of what it is given, while its LoRAs stay in float32.

peft's own layers would compute in the LoRA's precision, or need autocast, which turns every norm of a bf16 network into
float32 and back. Importing this module imports peft, which takes a second.
"""

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import Conv2d, Linear
from torch import Tensor, nn


class _Forward:
    """peft's layer, but for how it computes: base(x) + scale * B(A(x)), A and B rounded to the precision of x.

    In a network that a run has compiled every LoRA of the layer takes part, times its gate, a scalar on the device that
    is 0 while the LoRA is off: policy and reference are then one graph, and equal weights give equal bits.

    Attributes:
        gates: by name of the LoRA; None where nobody has added any.
    """

    gates: dict[str, Tensor] | None = None

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """What the base layer gives, and the changes of the LoRAs, in the order of their names."""
        result = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:  # by peft's own calls, from outside
            return result
        gates = self.gates if torch.compiler.is_compiling() else None
        for name in self.active_adapters if gates is None else gates:
            if name not in self.lora_A:
                continue
            down, up, scale = self.lora_A[name], self.lora_B[name], self.scaling[name]
            a, b = down.weight.to(x.dtype), up.weight.to(x.dtype)
            if isinstance(down, nn.Conv2d):
                change = F.conv2d(down._conv_forward(x, a, None), b)
            else:
                change = F.linear(F.linear(x, a), b)
            if gates is None:
                result = torch.add(result, change, alpha=scale)
            else:
                result = result + change * (gates[name] * scale)
        return result


@cache
def _kinds() -> dict[type, type]:
    return {kind: type(kind.__name__, (_Forward, kind), {}) for kind in (Linear, Conv2d)}


def compute_in_precision(layer: Any) -> None:
    """Let a layer of peft's compute so."""
    layer.__class__ = _kinds().get(type(layer), type(layer))
