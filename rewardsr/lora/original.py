"""Names that the modules of a Stable Diffusion UNet have in its original code, which ComfyUI's LoRAs go by."""

import re
from collections.abc import Callable
from typing import Any

_WITHIN_RESNET = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_ALONE = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
}
_PLACE = re.compile(
    r"(down_blocks|mid_block|up_blocks)\.(?:(\d+)\.)?(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)"
)


def original_names(unet: Any) -> Callable[[str], str | None]:
    """A function that gives the original name of a module of this UNet by that in diffusers; None where it has none.

    Original blocks are numbered through all levels; each has a residual block, then an attention, then what changes
    the size.
    """
    sides = {}
    for side, first in (("down_blocks", 1), ("up_blocks", 0)):  # the first of all is conv_in
        levels, start = [], first
        for block in getattr(unet, side, ()):
            levels.append(start)
            start += len(block.resnets) + (side == "down_blocks")
        sides[side] = levels

    def name(module: str) -> str | None:
        if module in _ALONE:
            return _ALONE[module]
        found = _PLACE.fullmatch(module)
        if found is None:
            return None
        side, level, kind, index, rest = found.groups()
        if kind == "resnets":
            if rest not in _WITHIN_RESNET:
                return None
            rest = _WITHIN_RESNET[rest]
        if side == "mid_block":
            return f"middle_block.{2 * int(index) if kind == 'resnets' else 1 + 2 * int(index)}.{rest}"
        block = getattr(unet, side)[int(level)]
        start, within = sides[side][int(level)], len(block.resnets)
        if kind == "downsamplers":
            return f"input_blocks.{start + within}.0.op"
        where = "input_blocks" if side == "down_blocks" else "output_blocks"
        if kind == "upsamplers":
            return f"{where}.{start + within - 1}.{2 if hasattr(block, 'attentions') else 1}.{rest}"
        return f"{where}.{start + int(index)}.{0 if kind == 'resnets' else 1}.{rest}"

    return name
