"""Our LoRA: on the networks (`layers`), in files (`file`), and in the forms of other programs (`exchange`)."""

from rewardsr.lora.file import DIFFUSERS_HEADER, OUR_HEADER, header, load, locate, read, save
from rewardsr.lora.layers import (
    NAME,
    attach,
    attached,
    delta,
    keep_float32,
    load_state_dict,
    merge,
    parameters,
    rank_and_alpha,
    reference,
    set_scale,
    state_dict,
    target_shapes,
)

__all__ = [
    "DIFFUSERS_HEADER",
    "NAME",
    "OUR_HEADER",
    "attach",
    "attached",
    "delta",
    "header",
    "keep_float32",
    "load",
    "load_state_dict",
    "locate",
    "merge",
    "parameters",
    "rank_and_alpha",
    "read",
    "reference",
    "save",
    "set_scale",
    "state_dict",
    "target_shapes",
]
