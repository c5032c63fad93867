"""SeeSR: multi-step super-resolution with a ControlNet on the LQ image and a second attention on image embeddings.

Source: SeeSR (arXiv 2311.16518). In every block that attends to text, UNet and ControlNet attend once more, to the
embeddings of a tagger (RAM, or SeeSR's DAPE): tokens of 512 numbers, which come with the image or from a plug-in.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Self

import torch
from pydantic import Field
from torch import Tensor, nn

from rewardsr.adapters._live import live_network
from rewardsr.adapters._networks import load_changed
from rewardsr.adapters.stable_diffusion import Ancestral, Guidance, Parts, Steps, load_parts, parts_of, times
from rewardsr.batch import Batch, Condition
from rewardsr.checks import check
from rewardsr.draws import Source
from rewardsr.errors import UserError
from rewardsr.hub.fetch import fetch
from rewardsr.options import FOR_LORA
from rewardsr.plugins import named, resolve
from rewardsr.transfer import to_device

EMBEDDING = "ram"  # its name in Batch.extras, and in the files beside the images
ALIKE = ("in_channels", "block_out_channels", "layers_per_block", "down_block_types", "attention_head_dim")

Tagger = Callable[[Tensor], tuple[Tensor, Sequence[str]]]


class SeeSR(Ancestral):
    """SeeSR: ControlNet and tag embeddings on Stable Diffusion parts, many steps."""

    name = "seesr"
    extras = (EMBEDDING,)

    class Options(Ancestral.Options):
        """Options of SeeSR; its `prompt` are the tags of images that bring none, where there is no tagger."""

        weights: str | None = Field(
            None, description="folder or Hub id with SeeSR's `unet/` and `controlnet/`; null: those of the base"
        )
        tagger: Annotated[str, named("taggers")] | None = Field(
            None,
            description="looks at images that bring no embeddings: `module:Name`, or a name of the entry-point group "
            "`rewardsr.taggers`",
        )
        steps: Steps = 50
        guidance: Guidance = 5.5
        conditioning_scale: float = Field(
            1.0,
            ge=-1000,
            le=1000,
            description="of what the ControlNet adds to the UNet",
            json_schema_extra=FOR_LORA,
        )
        template: str = Field(
            "{tags}, ,clean, high-resolution, 8k",
            description="text around the tags; `{tags}`: the tags alone, as in RFSR's training. An empty prompt that "
            "comes with an image stays empty",
        )
        negative_prompt: str = Field("dotted, noise, blur, lowres, smooth", description="of the guidance")

    options: Options

    @classmethod
    def load(cls, base: str, options: Options) -> Self:
        """Load the pipeline, in float32 on the CPU."""
        source = base if options.weights is None else options.weights
        revision = options.revision if options.weights is None else None
        folder, _ = fetch(source, "weights", tuple(_KINDS), revision, outlines=True)
        for part in _KINDS:
            if not (folder / part).is_dir():
                raise UserError(f"'{source}' has no folder '{part}/': expected SeeSR's unet/ and controlnet/")
        unet, controlnet = (_load(folder / part, kind) for part, kind in _KINDS.items())
        identity = base if options.weights is None else f"{base} + {source}"
        return cls(load_parts(base, options.revision, unet), identity, options, controlnet)

    @classmethod
    def fits(cls, pipe: Any) -> bool:
        """Whether the pipeline has a ControlNet, and a UNet with SeeSR's second attention."""
        middle = getattr(getattr(pipe, "unet", None), "mid_block", None)
        return getattr(pipe, "controlnet", None) is not None and hasattr(middle, "image_attentions")

    @classmethod
    def from_pipeline(cls, pipe: Any, options: Options) -> Self:
        """An adapter on a live pipeline: SeeSR's own object, or a diffusers ControlNet pipeline with its networks."""
        if not cls.fits(pipe):
            raise UserError(
                f"{type(pipe).__name__} is no SeeSR: it needs a controlnet, and a UNet with image_attentions"
            )
        parts, identity = parts_of(pipe)
        return cls(parts, identity, options, live_network(pipe, "controlnet"))

    def __init__(self, parts: Parts, base: str, options: Options, controlnet: Any) -> None:
        _check_alike(base, parts.unet, controlnet)
        super().__init__(parts, base, options, options.scale, {"controlnet": controlnet})
        self.controlnet = controlnet
        self.trainable = {"unet": self.unet, "controlnet": controlnet}
        # What RFSR trains in full: the UNet's image attentions, and all of the ControlNet (but its time embeddings).
        self.lora_targets = {
            "unet": _layers(self.unet, lambda name: ".image_attentions." in name),
            "controlnet": _layers(self.controlnet, lambda name: "time_emb" not in name),
        }
        self.steps = times(parts.scheduler, options.steps)
        self.guidance = options.guidance
        self._width = _width(self.unet.state_dict())
        self._tagger = None if options.tagger is None else _make_tagger(options.tagger)

    def _encode(self, batch: Batch, generator: Source | None) -> Condition:
        image = self.upsample(batch.lq)
        height, width = image.shape[-2:]
        tokens, tags = self._embeddings_and_tags(batch, image)
        padded = self.pad(image)
        if self.options.start_point == "lq":
            latents = self.to_latents(image, generator)
        else:  # then only their shape matters, and encoding would be for nothing
            shape = (len(batch), self.vae.config.latent_channels, *(s // self.compression for s in padded.shape[-2:]))
            latents = torch.zeros(shape, device=self.device)
        negative = self._text((self.options.negative_prompt,) * len(batch), len(batch)) if self.guidance != 1 else None
        return Condition(
            text=self._text([self._prompt(tag) for tag in tags], len(batch)),
            latents=latents,
            size=(height, width),
            negative=negative,
            control=padded,
            extras={EMBEDDING: tokens},
        )

    def _predict(self, z_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        assert condition.control is not None
        z_t, text, control = (value.to(self.dtype) for value in (z_t, condition.text, condition.control))
        tokens = condition.extras[EMBEDDING].to(self.dtype)
        seen = {"encoder_hidden_states": text, "return_dict": False}
        strength = self.options.conditioning_scale
        down, middle = _attend(
            self.controlnet, tokens, z_t, t, controlnet_cond=control, conditioning_scale=strength, **seen
        )
        residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
        return _attend(self.unet, tokens, z_t, t, **residuals, **seen)[0]

    def _embeddings_and_tags(self, batch: Batch, image: Tensor) -> tuple[Tensor, list[str | None]]:
        """Embeddings (B, tokens, width) and tags: what came with the images, and from the tagger what did not."""
        tokens = batch.extras.get(EMBEDDING)
        tags: list[str | None] = [None] * len(batch) if batch.prompts is None else list(batch.prompts)
        if tokens is None and self._tagger is None:
            raise UserError(
                f"adapter '{self.name}' needs the tagger's image embeddings: put <name>.safetensors with a tensor "
                f"'{EMBEDDING}' (tokens, {self._width}) beside each image or into extras/, or set its option tagger"
            )
        if self._tagger is not None and (tokens is None or None in tags):
            seen, said = _tagged(self._tagger, image)
            tokens = seen if tokens is None else tokens
            tags = [mine if mine is not None else other for mine, other in zip(tags, said, strict=True)]
        assert tokens is not None
        if tokens.ndim != 3 or len(tokens) != len(batch) or tokens.shape[-1] != self._width:
            raise UserError(
                f"image embeddings '{EMBEDDING}' are {tuple(tokens.shape)}, but the networks attend to "
                f"({len(batch)}, tokens, {self._width})"
            )
        check(
            tokens.isfinite().all(),
            lambda: UserError(f"image embeddings '{EMBEDDING}' hold values that are not finite"),
        )
        return to_device(tokens.float(), self.device), tags

    def _prompt(self, tags: str | None) -> str:
        if tags == "":
            return ""
        return self.options.template.replace("{tags}", self.options.prompt if tags is None else tags)


def _tagged(tagger: Tagger, image: Tensor) -> tuple[Tensor, Sequence[str]]:
    try:
        with torch.no_grad():
            tokens, tags = tagger(image)
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a tagger may be a stranger's
        raise UserError(f"the tagger fails: {type(error).__name__}: {' '.join(str(error).split())}") from error
    if not isinstance(tokens, Tensor) or isinstance(tags, str) or len(tags) != len(image):
        raise UserError("the tagger gave something else than embeddings (B, tokens, width) and one string an image")
    return tokens, tags


def _make_tagger(name: str) -> Tagger:
    made: Any = resolve("taggers", name)
    try:
        tagger: Tagger = made() if isinstance(made, type) else made
    except Exception as error:  # a tagger may be a stranger's
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"tagger '{name}' cannot be made without arguments: {reason}") from error
    if not callable(tagger):
        raise UserError(f"tagger '{name}': expected a function, or a class whose instances can be called")
    return tagger


# ---- the second attention ----


def add_image_attentions(network: Any, width: int) -> None:
    """Give a diffusers UNet or ControlNet the attention to image embeddings that follows every attention to text.

    The new modules are siblings of the old (`image_attentions` beside `attentions`), of the same configuration but for
    the width of what they attend to, and randomly initialised. What they see is set by the adapter for each call.
    """
    for block in (*network.down_blocks, network.mid_block, *getattr(network, "up_blocks", ())):
        if not hasattr(block, "attentions"):
            continue
        twins = [_as_wide(text, width) for text in block.attentions]
        block.image_attentions = nn.ModuleList(twins)
        for text, image in zip(block.attentions, twins, strict=True):

            def attend_to_image(module: nn.Module, given: Any, result: Any, image: nn.Module = image) -> Any:
                return image(result[0], encoder_hidden_states=network.image_tokens, return_dict=False)

            text.register_forward_hook(attend_to_image)
    network.image_tokens = None
    network.register_to_config(use_image_cross_attention=True)


def _as_wide(text: Any, width: int) -> Any:
    """A new attention of the same configuration that attends to tokens of this width."""
    # Past `from_config`, which takes arguments that were given by position for defaults, and leaves them out.
    own = {name: value for name, value in text.config.items() if not name.startswith("_")}
    return type(text)(**{**own, "cross_attention_dim": width})


def _attend(network: Any, tokens: Tensor, *arguments: Any, **options: Any) -> Any:
    """Call a network, ours or SeeSR's own class, with image embeddings (B, tokens, width)."""
    if not hasattr(network, "image_tokens"):
        return network(*arguments, image_encoder_hidden_states=tokens, **options)
    network.image_tokens = tokens
    try:
        return network(*arguments, **options)
    finally:
        network.image_tokens = None


_KINDS = {"unet": "UNet2DConditionModel", "controlnet": "ControlNetModel"}


def _load(folder: Path, kind: str) -> Any:
    """A network from SeeSR's released files: diffusers' configuration and names, and the second attention's."""
    return load_changed(folder, kind, "SeeSR's unet/ and controlnet/", _add_as_wide)


def _add_as_wide(network: Any, state: dict[str, Tensor]) -> None:
    add_image_attentions(network, _width(state))


def _width(state: dict[str, Tensor]) -> int:
    """How many numbers an image token has: the width that the second attentions take."""
    widths = {
        value.shape[1]
        for name, value in state.items()
        if "image_attentions" in name and ".attn2.to_k." in name and "lora_" not in name and value.ndim == 2
    }
    if len(widths) != 1:
        raise UserError("no attention to image embeddings (image_attentions): not a network of SeeSR")
    return int(widths.pop())


def _layers(network: nn.Module, wanted: Callable[[str], bool]) -> tuple[str, ...]:
    return tuple(
        name
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and wanted(f".{name}")
    )


def _check_alike(base: str, unet: Any, controlnet: Any) -> None:
    for key in ALIKE:
        values = (getattr(network.config, key, None) for network in (unet, controlnet))
        one, other = (tuple(value) if isinstance(value, list) else value for value in values)
        if one != other:
            raise UserError(f"'{base}': UNet and ControlNet do not fit each other: {key} is {one} and {other}")
    widths = [_width(network.state_dict()) for network in (unet, controlnet)]
    if widths[0] != widths[1]:
        raise UserError(
            f"'{base}': UNet and ControlNet attend to image embeddings of widths {widths[0]} and {widths[1]}"
        )
