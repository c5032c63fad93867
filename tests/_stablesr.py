"""A StableSR checkpoint with every key of a released one, its layers narrow; what it predicts can be chosen."""

import json

import torch
from _data import DATA
from torch import Tensor

# Channels of the encoder as released, and here; queries, keys and values are three times a level's.
NARROW = {256: 32, 512: 64, 1024: 128, 768: 96, 1536: 192}
FEATURES, HIDDEN = 32, 8
TEXT = 32  # as wide as the text of the tiny Stable Diffusion
UNET, ENCODER = "model.diffusion_model.", "structcond_stage_model."


def released(share: float) -> dict[str, Tensor]:
    """Tensors of a checkpoint by their released names, beside others that a released one has too.

    Args:
        share: the answer to noise is this many times the noise, whatever else the network is given.
    """
    import diffusers

    from rewardsr.adapters._sft import add_modulation

    keymap = json.loads((DATA / "stablesr_keymap.json").read_text())
    random = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = diffusers.UNet2DConditionModel.from_config(
            keymap["unet_config_diffusers"],
            block_out_channels=(32, 64, 96, 96),
            attention_head_dim=(1, 1, 1, 1),
            cross_attention_dim=TEXT,
        )
        add_modulation(unet, FEATURES, HIDDEN)
    state = unet.state_dict()
    found = {key: state[ours].clone() for key, ours in keymap["ldm_to_diffusers"].items()}
    _answer_with_noise(found, share)
    for key, shape in keymap["structcond_stage_model"].items():
        narrow = [NARROW.get(size, size) for size in shape]
        found[ENCODER + key] = 0.1 * torch.randn(narrow, generator=random) + (len(shape) == 1)
    others = {"betas": (1000,), "first_stage_model.quant_conv.bias": (8,), "cond_stage_model.model.logit_scale": ()}
    return found | {key: torch.zeros(shape) for key, shape in others.items()}


def _answer_with_noise(state: dict[str, Tensor], share: float) -> None:
    """Lead the latents from the first convolution past all blocks to the last: silu(x) - silu(-x) is x."""

    def put(key: str, value: Tensor | float) -> None:
        tensor = state[UNET + key]
        tensor.copy_(torch.as_tensor(value, dtype=tensor.dtype).expand_as(tensor))

    channels = state[UNET + "out.2.weight"].shape[1]
    first, last = torch.zeros(channels, 4, 3, 3), torch.zeros(4, channels, 3, 3)
    for place in range(4):
        for index, sign in ((place, 1.0), (4 + place, -1.0)):
            first[index, place, 1, 1] = sign
            last[place, index, 1, 1] = sign * share
    skip = torch.cat([torch.zeros(channels, channels), torch.eye(channels)], 1)[:, :, None, None]
    for key, value in (("input_blocks.0.0", first), ("output_blocks.11.0.skip_connection", skip), ("out.2", last)):
        put(f"{key}.weight", value)
        put(f"{key}.bias", 0.0)
    put("out.0.weight", 1.0)
    put("out.0.bias", 0.0)
    for key in ("0.out_layers.3", "0.spade.mlp_beta", "1.proj_out"):
        put(f"output_blocks.11.{key}.weight", 0.0)
        put(f"output_blocks.11.{key}.bias", 0.0)
    put("output_blocks.11.0.spade.param_free_norm.bias", 0.0)
