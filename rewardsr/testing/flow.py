"""A flow-matching pipeline on Stable Diffusion 3's transformer, tiny: an adapter written from the contract alone.

The transformer takes the LQ latents beside the noisy ones; `tiny_pipeline(folder, family="flow")` writes its weights.
In recipes it is named `rewardsr.testing.flow:TinyFlow`.
"""

from dataclasses import replace
from pathlib import Path
from typing import Self

import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from rewardsr.adapter import BaseModel, ISRAdapter
from rewardsr.batch import Batch, Condition
from rewardsr.draws import Source, draw
from rewardsr.errors import UserError
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

    @classmethod
    def load(
        cls,
        base: str,
        *,
        steps: int = 4,
        shift: float = 3.0,
        scale: int = 4,
        guidance: float = 1.0,
        prompt: str = "",
        negative_prompt: str = "",
    ) -> Self:
        """Load a folder that `tiny_pipeline` wrote.

        Args:
            base: the folder.
            steps: of Euler's method, from t = 1 on.
            shift: of the times towards noise; 1 spaces them evenly.
            scale: `sr` is this many times `lq`.
            guidance: classifier-free guidance scale; 1 means none.
            prompt: text for images that bring none.
            negative_prompt: of classifier-free guidance.

        Raises:
            UserError: a part is missing.
        """
        folder = Path(base).expanduser()
        for part in PARTS:
            if not (folder / part).is_dir():
                raise UserError(f"base '{base}' has no folder '{part}/': write it with rewardsr.testing.tiny_pipeline")
        adapter = cls()
        adapter.transformer = SD3Transformer2DModel.from_pretrained(folder / "transformer")
        adapter.vae = AutoencoderKL.from_pretrained(folder / "vae")
        adapter.text_encoder = CLIPTextModel.from_pretrained(folder / "text_encoder")
        adapter.tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
        adapter.networks = {"transformer": adapter.transformer, "vae": adapter.vae}
        for network in (*adapter.networks.values(), adapter.text_encoder):
            network.requires_grad_(False).eval()
        adapter.trainable = {"transformer": adapter.transformer}
        adapter.lora_targets = {"transformer": TARGETS}
        adapter.steps = tuple(float(shifted(step / steps, shift)) for step in range(steps, 0, -1))
        adapter.scale, adapter.guidance = scale, guidance
        adapter.prompt, adapter.negative_prompt = prompt, negative_prompt
        adapter.size_multiple = adapter.compression * adapter.transformer.config.patch_size
        adapter.device, adapter.dtype = torch.device("cpu"), torch.float32
        adapter.base_model = BaseModel(base, "local", fingerprint(adapter.networks))
        return adapter

    prompt: str
    negative_prompt: str
    transformer: SD3Transformer2DModel
    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer

    @property
    def compression(self) -> int:
        """How many pixels a latent is wide; patches of latents are padded to as well."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    def _encode(self, batch: Batch, generator: Source | None) -> Condition:
        image = self.upsample(batch.lq)
        prompts = batch.prompts if batch.prompts is not None else (None,) * len(batch)
        text, pooled = self._text([self.prompt if prompt is None else prompt for prompt in prompts])
        condition = Condition(
            text, self.to_latents(image, generator), (image.shape[-2], image.shape[-1]), pooled=pooled
        )
        if self.guidance != 1:
            negative, negative_pooled = self._text([self.negative_prompt] * len(batch))
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
