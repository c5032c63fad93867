"""A flow-matching pipeline on Stable Diffusion 3's transformer, tiny: an adapter written from the contract alone.

The transformer takes the LQ latents beside the noisy ones; `tiny_pipeline(folder, family="flow")` writes its weights.
In recipes it is named `rewardsr.testing.flow:TinyFlow`.
"""

from dataclasses import replace
from pathlib import Path
from typing import Self

import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from pydantic import Field
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from rewardsr import options
from rewardsr.adapter import BaseModel, ISRAdapter
from rewardsr.batch import Batch, Condition
from rewardsr.draws import Source, draw
from rewardsr.errors import UserError
from rewardsr.hub.fetch import fetch
from rewardsr.lora.fingerprint import fingerprint
from rewardsr.schedule import Flow, shifted

PARTS = ("transformer", "vae", "text_encoder", "tokenizer")
# The stream of the text ends before the last block's feed-forward and queries: a LoRA there would train nothing.
TARGETS = (
    "pos_embed.proj",
    "to_q",
    "to_k",
    "to_v",
    "to_out.0",
    "add_k_proj",
    "add_v_proj",
    "ff.net.0.proj",
    "ff.net.2",
)


class TinyFlow(ISRAdapter):
    """Flow matching from noise in a few Euler steps, guided by text."""

    name = "tiny_flow"
    schedule = Flow()
    deterministic = False  # even a single step starts from noise

    class Options(options.Options):
        """Options of the flow pipeline."""

        steps: int = Field(4, ge=1, description="of Euler's method, from t = 1 on")
        shift: float = Field(
            3.0,
            gt=0,
            description="of the times towards noise; 1 spaces them evenly",
            json_schema_extra=options.FOR_LORA,
        )
        scale: int = Field(4, ge=1, description="`sr` is this many times `lq`")
        guidance: float = Field(1.0, ge=1, description="classifier-free guidance scale; 1 means none")
        prompt: str = Field("", description="text for images that bring none")
        negative_prompt: str = Field("", description="of classifier-free guidance")

    @classmethod
    def load(cls, base: str, options: Options) -> Self:
        """Load a folder that `tiny_pipeline` wrote."""
        return cls(fetch(base, "base", PARTS)[0], base, options)

    def __init__(self, folder: Path, base: str, options: Options) -> None:
        lacking = [part for part in PARTS if not (folder / part).is_dir()]
        if lacking:
            raise UserError(
                f"base '{base}' has no folder '{lacking[0]}/': write it with rewardsr.testing.tiny_pipeline"
            )
        self.options = options
        self.transformer = SD3Transformer2DModel.from_pretrained(folder / "transformer")
        self.vae = AutoencoderKL.from_pretrained(folder / "vae")
        self.text_encoder = CLIPTextModel.from_pretrained(folder / "text_encoder")
        self.tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
        for network in (self.transformer, self.vae, self.text_encoder):
            network.requires_grad_(False).eval()
        self.networks = {"transformer": self.transformer, "vae": self.vae}
        self.trainable = {"transformer": self.transformer}
        self.lora_targets = {"transformer": TARGETS}
        self.steps = tuple(float(shifted(k / options.steps, options.shift)) for k in range(options.steps, 0, -1))
        self.scale, self.guidance = options.scale, options.guidance
        self.size_multiple = self.compression * self.transformer.config.patch_size
        self.device, self.dtype = torch.device("cpu"), torch.float32
        weights = {**self.networks, "text_encoder": self.text_encoder, "tokenizer": self.tokenizer}
        self.base_model = BaseModel(base, "local", fingerprint(weights))

    @property
    def compression(self) -> int:
        """How many pixels a latent is wide; patches of latents are padded to as well."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    def _encode(self, batch: Batch, generator: Source | None) -> Condition:
        height, width = (side * self.scale for side in batch.lq.shape[-2:])
        prompts = batch.prompts if batch.prompts is not None else (None,) * len(batch)
        text, pooled = self._text([self.options.prompt if prompt is None else prompt for prompt in prompts])
        condition = Condition(text, self.lq_latents(batch.lq, generator), (height, width), pooled=pooled)
        if self.guidance != 1:
            negative, negative_pooled = self._text([self.options.negative_prompt] * len(batch))
            condition = replace(condition, negative=negative, negative_pooled=negative_pooled)
        return condition

    def _start(self, condition: Condition, generator: Source | None) -> Tensor:
        assert generator is not None  # `start` has seen to it
        return draw(condition.latents.shape, generator, device=condition.latents.device)

    def _predict(self, z_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        assert condition.pooled is not None
        seen = torch.cat([z_t, condition.latents], 1).to(self.dtype)
        text, pooled = condition.text.to(self.dtype), condition.pooled.to(self.dtype)
        # The network is told thousandths of t, not rounded.
        return self.transformer(seen, text, pooled, 1000 * t).sample

    def _to_latents(self, image: Tensor, generator: Source | None) -> Tensor:
        posterior = self.vae.encode((image * 2 - 1).to(self.dtype)).latent_dist
        latents = posterior.mean.float()
        if generator is not None:
            latents = latents + posterior.std.float() * draw(latents.shape, generator, device=latents.device)
        return (latents - self.vae.config.shift_factor) * self.vae.config.scaling_factor

    def _to_image(self, z0: Tensor) -> Tensor:
        latents = z0 / self.vae.config.scaling_factor + self.vae.config.shift_factor
        return self.vae.decode(latents.to(self.dtype)).sample.float() / 2 + 0.5

    @torch.no_grad()
    def _text(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Embeddings (B, L, D) of the prompts, and one vector (B, D) for each."""
        length = self.text_encoder.config.max_position_embeddings
        ids = self.tokenizer(prompts, max_length=length, padding="max_length", truncation=True, return_tensors="pt")
        states = self.text_encoder(ids.input_ids)
        return states.last_hidden_state.to(self.device), states.pooler_output.to(self.device)
