"""What StableSR adds to a Stable Diffusion UNet: features of the LQ latents that modulate every residual block.

Source: StableSR (arXiv 2305.07015), section 3.1: a time-aware encoder of the LQ latents, and spatial feature
transformation (SFT) of the residuals by its features, in the form of SPADE (arXiv 1903.07291). Importing this module
imports diffusers, which takes seconds: adapters do so when they load.
"""

from collections.abc import Sequence
from typing import Any

from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.unets.unet_2d_blocks import AttnDownBlock2D, DownBlock2D, UNetMidBlock2D
from torch import Tensor, nn

EPS = 1e-5  # of all group norms
TIME_WIDTH = 4  # of the time embedding, in widths of the first level


class Modulation(nn.Module):
    """Scale and shift of a normalised residual, place by place (SPADE, eq. 1). Submodules have their released names."""

    def __init__(self, channels: int, features: int, hidden: int, groups: int) -> None:
        super().__init__()
        self.param_free_norm = nn.GroupNorm(groups, channels, eps=EPS)  # which has parameters nevertheless
        self.mlp_shared = nn.Sequential(nn.Conv2d(features, hidden, 3, padding=1), nn.ReLU())
        self.mlp_gamma = nn.Conv2d(hidden, channels, 3, padding=1)
        self.mlp_beta = nn.Conv2d(hidden, channels, 3, padding=1)

    def forward(self, residual: Tensor, features: Tensor) -> Tensor:
        """(B, C, h, w) from a residual (B, C, h, w) and features (B, F, h, w)."""
        shared = self.mlp_shared(features)
        return self.param_free_norm(residual) * (1 + self.mlp_gamma(shared)) + self.mlp_beta(shared)


class ModulatedBlock(ResnetBlock2D):
    """diffusers' residual block, its residual modulated after `conv2`: after whatever LoRA sits on it.

    A forward hook on `conv2` would stay with the wrapped convolution, and the LoRA would be added after it.
    """

    def forward(self, input_tensor: Tensor, temb: Tensor, *_: Any, **__: Any) -> Tensor:
        """(B, C', h, w) from (B, C, h, w) and the time embedding (B, T), which brings the features along."""
        features = getattr(temb, "features", None)
        if features is None:
            raise ValueError("this UNet needs the features of StableSR's encoder: call it through `modulated`")
        residual = self.conv1(self.nonlinearity(self.norm1(input_tensor)))
        residual = residual + self.time_emb_proj(self.nonlinearity(temb))[:, :, None, None]
        residual = self.conv2(self.dropout(self.nonlinearity(self.norm2(residual))))
        residual = self.spade(residual, features[residual.shape[-1]])
        kept = input_tensor if self.conv_shortcut is None else self.conv_shortcut(input_tensor)
        return kept + residual


def add_modulation(unet: Any, features: int, hidden: int) -> None:
    """Let features of `features` channels modulate every residual block of a diffusers UNet.

    The new modules (`spade` in each block, `hidden` channels inside) are randomly initialised.
    """
    for block in [module for module in unet.modules() if isinstance(module, ResnetBlock2D)]:
        block.spade = Modulation(block.out_channels, features, hidden, unet.config.norm_num_groups)
        block.__class__ = ModulatedBlock
    unet.time_embedding.features = None
    unet.time_embedding.register_forward_hook(_hand_over)


def _hand_over(module: Any, _: Any, embedding: Tensor) -> None:
    # The one object that reaches every block. Gradient checkpointing keeps it too, so that a block that is computed
    # again sees its own features, whatever the UNet has been called with in between.
    embedding.features = module.features  # type: ignore[attr-defined]


def modulated(unet: Any, features: dict[int, Tensor], *arguments: Any, **options: Any) -> Any:
    """Call a UNet with features (B, F, h, w) by their width w; the other arguments are the UNet's own."""
    unet.time_embedding.features = features
    try:
        return unet(*arguments, **options)
    finally:
        unet.time_embedding.features = None


class StructEncoder(ModelMixin, ConfigMixin):
    """StableSR's time-aware encoder: the downward half of a UNet on LQ latents, read at every level.

    Args:
        in_channels: of the latents.
        out_channels: of the features.
        block_out_channels: of the levels, largest first.
        layers_per_block: residual blocks a level.
        attention: whether a level attends to itself; the middle always does.
        heads: of the attentions.
        norm_num_groups: of the group norms.
    """

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        in_channels: int = 4,
        out_channels: int = 256,
        block_out_channels: Sequence[int] = (256, 256, 512, 512),
        layers_per_block: int = 2,
        attention: Sequence[bool] = (True, True, True, False),
        heads: int = 4,
        norm_num_groups: int = 32,
    ) -> None:
        super().__init__()
        first, last = block_out_channels[0], block_out_channels[-1]
        time = TIME_WIDTH * first
        self.conv_in = nn.Conv2d(in_channels, first, 3, padding=1)
        self.time_proj = Timesteps(first, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(first, time)
        common: dict[str, Any] = {"temb_channels": time, "resnet_eps": EPS, "resnet_groups": norm_num_groups}
        self.down_blocks = nn.ModuleList()
        for level, (before, after) in enumerate(
            zip((first, *block_out_channels[:-1]), block_out_channels, strict=True)
        ):
            sizes = {"in_channels": before, "out_channels": after, "num_layers": layers_per_block} | common
            smaller = level < len(block_out_channels) - 1
            self.down_blocks.append(
                AttnDownBlock2D(**sizes, attention_head_dim=after // heads, downsample_type="conv" if smaller else None)
                if attention[level]
                else DownBlock2D(**sizes, add_downsample=smaller)
            )
        self.mid_block = UNetMidBlock2D(in_channels=last, attention_head_dim=last // heads, **common)
        self.taps = nn.ModuleList(
            ResnetBlock2D(
                in_channels=width, out_channels=out_channels, temb_channels=time, groups=norm_num_groups, eps=EPS
            )
            for width in block_out_channels
        )

    def forward(self, latents: Tensor, t: Tensor) -> dict[int, Tensor]:
        """Features (B, out_channels, h / 2^level, w / 2^level) by their width.

        Args:
            latents: (B, C, h, w) LQ latents, times the scaling factor; h and w multiples of 2^(levels - 1).
            t: (B,) times that the UNet is told.
        """
        temb = self.time_embedding(self.time_proj(t).to(latents.dtype))
        hidden = self.conv_in(latents)
        levels = []
        for block in self.down_blocks:
            hidden, outputs = block(hidden, temb)
            levels.append(outputs[self.config.layers_per_block - 1])  # what its downsampling is given
        levels[-1] = self.mid_block(hidden, temb)
        features = [tap(level, temb) for tap, level in zip(self.taps, levels, strict=True)]
        return {feature.shape[-1]: feature for feature in features}
