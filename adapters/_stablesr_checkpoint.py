"""StableSR's networks: from a released checkpoint, or from the folder that one was imported into.

A checkpoint is one file for everything that was trained or kept: `model.diffusion_model.*` (UNet, with the modulation
as `.spade.`) and `structcond_stage_model.*` (encoder), beside copies of autoencoder and text encoder, which come from
the base here. A folder has `unet/` and `struct_encoder/`, as diffusers writes networks.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rewardsr.adapters._networks import assemble, load_changed
from rewardsr.errors import UserError
from rewardsr.progress import waiting
from rewardsr.schedule import PREDICTIONS
from rewardsr.storage import expand, write_folder
from rewardsr.weights import read_pickle, read_safetensors, write_networks

UNET, ENCODER = "model.diffusion_model.", "structcond_stage_model."
# What the sizes of tensors do not tell, as all released networks have it: channels of an attention head of the UNet,
# groups of the group norms, heads of the encoder.
HEAD_WIDTH, GROUPS, ENCODER_HEADS = 64, 32, 4
LAST_T = 999
PREDICTION = "prediction_type"  # in the UNet's configuration, as in that of a scheduler
EXPECTED = "a folder that `rewardsr import stablesr` has written"

State = dict[str, Tensor]


def read_checkpoint(path: Path) -> tuple[Any, Any]:
    """UNet and encoder of a released checkpoint, in float32 on the CPU.

    Args:
        path: a `.ckpt` (read without running code) or a `.safetensors`.

    Raises:
        UserError: it cannot be read, it is no StableSR checkpoint, or a part of it is missing.
    """
    if path.suffix == ".safetensors":
        content: Any = read_safetensors(path)[0]
    else:
        content = read_pickle(path)
        content = content.get("state_dict", content) if isinstance(content, Mapping) else content
    if not isinstance(content, Mapping):
        raise UserError(f"'{path}' is no checkpoint: expected tensors by name")
    unet, encoder = (
        {key.removeprefix(prefix): value for key, value in content.items() if str(key).startswith(prefix)}
        for prefix in (UNET, ENCODER)
    )
    _check_kind(path, unet, encoder)
    unet, encoder = ({key: value.float() for key, value in part.items()} for part in (unet, encoder))
    try:
        unet_config, encoder_config = _unet_config(unet), _encoder_config(encoder)
        unet, encoder = unet_names(unet, unet_config), encoder_names(encoder, encoder_config)
    except KeyError as error:
        raise UserError(f"'{path}' is damaged or incomplete: it has no {error.args[0]}") from error
    except (IndexError, RuntimeError) as error:
        raise UserError(f"'{path}' is damaged: a tensor has another shape than StableSR's ({error})") from error
    from rewardsr.adapters._sft import StructEncoder

    return (
        assemble("UNet2DConditionModel", unet_config, unet, str(path), _modulate),
        assemble(StructEncoder, encoder_config, encoder, str(path)),
    )


def _check_kind(path: Path, unet: State, encoder: State) -> None:
    """Say what a checkpoint lacks to be StableSR's."""
    spade = any(".spade." in key for key in unet)
    if not unet:
        raise UserError(f"'{path}' is no StableSR checkpoint: it has no tensors '{UNET}*'")
    if not spade:
        raise UserError(f"'{path}' is a plain Stable Diffusion checkpoint: its UNet has no spade blocks")
    if not encoder:
        raise UserError(f"'{path}' is incomplete: it has spade blocks, but no encoder ('{ENCODER}*')")
    if all(".spade." in key for key in unet):
        raise UserError(f"'{path}' holds only what StableSR adds to a UNet, as for the web UI: give the whole")
    for prefix, part in ((UNET, unet), (ENCODER, encoder)):
        for key, value in part.items():
            if not isinstance(value, Tensor):
                raise UserError(f"'{path}' is damaged: {prefix}{key} is no tensor")
            if not value.isfinite().all():
                raise UserError(f"'{path}': {prefix}{key} holds values that are not finite")


# ---- the networks ----


def read_folder(folder: Path) -> tuple[Any, Any]:
    """UNet and encoder of an imported folder, in float32 on the CPU.

    Raises:
        UserError: a part is missing or damaged, or has no modulation.
    """
    for part in ("unet", "struct_encoder"):
        if not (folder / part).is_dir():
            raise UserError(f"'{folder}' has no folder '{part}/': expected {EXPECTED}")
    from rewardsr.adapters._sft import StructEncoder

    unet = load_changed(folder / "unet", "UNet2DConditionModel", EXPECTED, _modulate)
    return unet, load_changed(folder / "struct_encoder", StructEncoder, EXPECTED)


def import_checkpoint(source: Path, output: Path, prediction: str = "auto", check: bool = True) -> str:
    """Write a released checkpoint as a folder of safetensors; whole, or nothing.

    Args:
        source: the checkpoint.
        output: new folder.
        prediction, check: as in `note_prediction`.

    Returns:
        What it predicts, "epsilon" or "v_prediction".

    Raises:
        UserError: as `read_checkpoint` and `note_prediction`, or the folder exists or cannot be written.
    """
    output = expand(output)
    if output.exists():
        raise UserError(f"'{output}' exists already: choose a new folder")
    with waiting(f"importing '{source}'"):  # reading and writing, which can be counted, have bars of their own
        unet, encoder = read_checkpoint(source)
        found = note_prediction(source, unet, encoder, prediction, check)
        networks = {"unet": unet, "struct_encoder": encoder}
        write_folder(output, lambda folder: write_networks(networks, folder))
    return found


def _modulate(unet: Any, state: State) -> None:
    """Add the modulation as large as the tensors have it."""
    from rewardsr.adapters._sft import add_modulation

    shared = [value for key, value in state.items() if key.endswith(".spade.mlp_shared.0.weight")]
    if not shared:
        raise UserError("no modulation (spade): a plain UNet of Stable Diffusion, not StableSR's")
    add_modulation(unet, features=shared[0].shape[1], hidden=shared[0].shape[0])


# ---- sizes and names ----


def _downward_half(state: State) -> tuple[dict[str, Any], list[bool]]:
    """The configuration that UNet and encoder have in common, and which levels have attentions."""
    places = [int(match[1]) for key in state if (match := re.fullmatch(r"input_blocks\.(\d+)\.0\.op\.weight", key))]
    if not places:
        raise KeyError("input_blocks.*.0.op.weight")
    layers = min(places) - 1  # the first downsampling follows a level's residual blocks and the first convolution
    firsts = range(1, len({key.split(".")[1] for key in state if key.startswith("input_blocks.")}), layers + 1)
    config = {
        "in_channels": state["input_blocks.0.0.weight"].shape[1],
        "block_out_channels": [state[f"input_blocks.{first}.0.out_layers.3.weight"].shape[0] for first in firsts],
        "layers_per_block": layers,
        "norm_num_groups": GROUPS,
    }
    return config, [any(key.startswith(f"input_blocks.{first}.1.") for key in state) for first in firsts]


def _unet_config(state: State) -> dict[str, Any]:
    config, attentions = _downward_half(state)
    return config | {
        "out_channels": state["out.2.weight"].shape[0],
        "down_block_types": ["CrossAttnDownBlock2D" if attends else "DownBlock2D" for attends in attentions],
        "up_block_types": ["CrossAttnUpBlock2D" if attends else "UpBlock2D" for attends in reversed(attentions)],
        # Heads, in spite of the name.
        "attention_head_dim": [max(1, width // HEAD_WIDTH) for width in config["block_out_channels"]],
        "cross_attention_dim": state["middle_block.1.transformer_blocks.0.attn2.to_k.weight"].shape[1],
        "use_linear_projection": state["middle_block.1.proj_in.weight"].ndim == 2,
        "sample_size": 64,
    }


def _encoder_config(state: State) -> dict[str, Any]:
    config, attentions = _downward_half(state)
    features = state["fea_tran.0.out_layers.3.weight"].shape[0]
    return config | {"out_channels": features, "attention": attentions, "heads": ENCODER_HEADS}


def unet_names(state: State, config: Mapping[str, Any]) -> State:
    """The tensors of a released UNet by diffusers' names; `.spade.` keys keep their place in each block."""
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    return convert_ldm_unet_checkpoint({f"{UNET}{key}": value for key, value in state.items()}, dict(config))


def encoder_names(state: State, config: Mapping[str, Any]) -> State:
    """The tensors of a released encoder by the names of `_sft.StructEncoder`."""
    from diffusers.loaders.single_file_utils import update_unet_resnet_ldm_to_diffusers

    named = unet_names(state, config)  # it is the downward half of a UNet
    for index in range(len(config["block_out_channels"])):
        old = f"fea_tran.{index}"
        keys = [key for key in state if key.startswith(f"{old}.")]
        update_unet_resnet_ldm_to_diffusers(keys, named, state, {"old": old, "new": f"taps.{index}"})
    result: State = {}
    for key, value in named.items():
        module, _, kind = key.rpartition(".")
        if module.endswith(".qkv"):
            # Each head has its queries, keys and values together: (heads, 3, width of a head).
            parts = value.reshape(config["heads"], 3, -1, *value.shape[1:2]).unbind(1)
            for name, part in zip(("to_q", "to_k", "to_v"), parts, strict=True):
                result[f"{module.removesuffix('qkv')}{name}.{kind}"] = part.flatten(0, 1).contiguous()
        elif ".attentions." in key and module.endswith(".proj_out"):
            result[f"{module.removesuffix('proj_out')}to_out.0.{kind}"] = value.flatten(1) if value.ndim > 1 else value
        elif ".attentions." in key:
            result[key.replace(".norm.", ".group_norm.")] = value
        else:
            result[key] = value
    return result


# ---- what a network predicts ----


@torch.no_grad()
def noise_share(unet: Any, encoder: Any) -> float:
    """How strongly the prediction at the last time follows pure noise, as a slope.

    The best guess of the noise is then the noise itself: 1 for a trained network that predicts it. The velocity
    sqrt(a) e - sqrt(1 - a) z0 (progressive distillation, appendix D) holds sqrt(a) = 0.07 of it.
    """
    from rewardsr.adapters._sft import modulated

    side = 4 * 2 ** (len(unet.config.block_out_channels) - 1)
    noise = torch.randn(1, unet.config.in_channels, side, side, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([LAST_T])
    text = torch.zeros(1, 77, unet.config.cross_attention_dim)
    prediction = modulated(unet, encoder(torch.zeros_like(noise), t), noise, t, text).sample
    return float((prediction * noise).sum() / noise.square().sum())


def note_prediction(path: Path, unet: Any, encoder: Any, wanted: str = "auto", check: bool = True) -> str:
    """Put into the UNet's configuration what it predicts, which a checkpoint does not say: that is tried out.

    Args:
        path: of the checkpoint, for messages.
        unet, encoder: of it.
        wanted: "epsilon", "v_prediction", or "auto" for what the trial says.
        check: False takes `wanted` on trust.

    Raises:
        UserError: the trial contradicts or is undecided, or there is none and `wanted` is "auto".
    """
    if wanted not in ("auto", *PREDICTIONS):
        raise UserError(f"prediction is '{wanted}', expected auto, {' or '.join(PREDICTIONS)}")
    if check:
        wanted = _tried(path, unet, encoder, wanted)
    elif wanted == "auto":
        raise UserError(f"prediction is 'auto', which needs the trial: name {' or '.join(PREDICTIONS)}")
    unet.register_to_config(**{PREDICTION: wanted})
    return wanted


def _tried(path: Path, unet: Any, encoder: Any, wanted: str) -> str:
    share = noise_share(unet, encoder)
    found = PREDICTIONS[0] if 0.75 < share < 1.25 else PREDICTIONS[1] if 0 < share < 0.25 else None
    if found is None:
        raise UserError(
            f"'{path}': its answer to pure noise is {share:.2f} times the noise, expected 1 (epsilon) or 0.07 "
            "(v_prediction): it is damaged or not trained (import it with --no-check to use it nevertheless)"
        )
    if wanted not in ("auto", found):
        raise UserError(
            f"'{path}' does not predict {wanted}: its answer to pure noise is {share:.2f} times the noise, "
            f"as of {found}"
        )
    return found
