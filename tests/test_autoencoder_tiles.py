"""Images in tiles for the autoencoder: no seam, the noise of the whole image, and norms and attention that hold."""

import pytest
import torch
from diffusers.models.attention_processor import Attention, SanaMultiscaleLinearAttention
from torch import nn

import rewardsr
from rewardsr.data.images import list_images, read_image
from rewardsr.demo.photos import HELD_OUT
from rewardsr.draws import Draws
from rewardsr.evaluation.upscale import upscale_tensor
from rewardsr.pooling import Pooled
from rewardsr.tiling import counted


@pytest.fixture(scope="module")
def embedded():
    return rewardsr.load_adapter("osediff", "embedded")


def pictures() -> dict[str, torch.Tensor]:
    photo = read_image(list_images(HELD_OUT)[0])[None, :, :44, :60]
    ramp = torch.linspace(0, 1, 60).expand(1, 3, 44, 60).contiguous()
    return {"constant": torch.full((1, 3, 44, 60), 0.4), "gradient": ramp, "photograph": photo.contiguous()}


@pytest.mark.parametrize(("kind", "bound"), [("constant", 0.02), ("gradient", 0.05), ("photograph", 1.0)])
@torch.no_grad()
def test_tiles_join_without_a_seam(embedded, kind, bound, record_property) -> None:
    """Bounds are in levels of 8 bits, at a fifth of the default tile: the overlap shrinks along with it."""
    lq, ticks = pictures()[kind], []
    embedded.vae_tile = None
    latents = embedded.lq_latents(lq)
    whole = embedded.to_image(latents)
    embedded.vae_tile = 192
    with counted(ticks.append):
        cut = embedded.lq_latents(lq)
        image = embedded.to_image(cut)
    assert sum(ticks) == embedded.calls(44, 60) - 1 == 6, "patches and two tiles, twice; the UNet is another call"
    assert torch.equal(embedded.to_latents(embedded.upsample(lq)), cut)
    error = 255 * float((image - whole).abs().max())
    record_property(f"{kind} ({bound:g}/255)", f"{error:.3f}")
    assert error < bound
    embedded.vae_tile = 1024
    assert torch.equal(embedded.lq_latents(lq), latents), "a small image is not cut"


@pytest.mark.parametrize(("kind", "bound"), [("constant", 0.2), ("gradient", 3.0), ("photograph", 2.0)])
@torch.no_grad()
def test_tiles_of_latents_join_without_a_seam(embedded, kind, bound, record_property) -> None:
    """A seam is a straight line: the mean of the difference over columns changes by less within 8 pixels."""
    lq = pictures()[kind]
    lq = lq.repeat(1, 1, 1, 4) if kind == "photograph" else nn.functional.interpolate(lq, (44, 240))
    images, tiling = [], embedded.tiling
    assert tiling.count(44, 240) > 1
    for embedded.tiling in (None, tiling):
        images.append(upscale_tensor(embedded, lq, generator=Draws(0, 0, [0], "upscale")))
    assert not torch.equal(*images)
    line = 255 * (images[1] - images[0]).mean(-2)
    step = float((line[..., 8:] - line[..., :-8]).abs().max())
    record_property(f"{kind} ({bound:g}/255)", f"{step:.3f}")
    assert step < bound


@pytest.fixture(scope="module")
def sd(tiny):
    """Stable Diffusion's autoencoder, tiny: group norms, and attention in the middle."""
    return rewardsr.load_adapter("osediff", tiny, scale=4, tile=None)


@torch.no_grad()
def test_the_noise_is_that_of_the_whole_image(sd) -> None:
    lq = torch.rand(2, 3, 24, 40, generator=torch.Generator().manual_seed(0))
    noise = {}
    for side in (None, 64):
        sd.vae_tile = side
        noise[side] = sd.lq_latents(lq, Draws(0, 0, [3, 4])) - sd.lq_latents(lq)
    sd.vae_tile = None
    assert noise[64].shape == (2, 4, 24, 40)
    correlation = torch.corrcoef(torch.stack([part.flatten() for part in noise.values()]))[0, 1]
    assert correlation > 0.98, "the same numbers, times standard deviations that are nearly the same"


def test_nothing_is_cut_where_a_gradient_is_needed(sd) -> None:
    sd.vae_tile = 64
    latents = torch.randn(1, 4, 24, 40, generator=torch.Generator().manual_seed(0)).requires_grad_()
    image = sd.to_image(latents)
    sd.vae_tile = None
    assert torch.equal(sd.to_image(latents), image) and image.requires_grad


@torch.no_grad()
def test_dark_and_bright_halves_do_not_get_norms_of_their_own(sd, monkeypatch) -> None:
    """Without what is pooled, a tile in the dark half is stretched as if it were the image."""
    lq = torch.cat([torch.full((1, 3, 40, 40), 0.1), torch.full((1, 3, 40, 40), 0.9)], -1)
    lq += 0.05 * torch.rand(lq.shape, generator=torch.Generator().manual_seed(0))
    errors = []
    whole = sd.to_latents(sd.upsample(lq))
    sd.vae_tile = 128
    errors.append(float((sd.lq_latents(lq) - whole).abs().mean()))
    monkeypatch.setattr(Pooled, "_patched", lambda pooled: torch.no_grad())
    errors.append(float((sd.lq_latents(lq) - whole).abs().mean()))
    sd.vae_tile = None
    assert errors[0] < 0.6 * errors[1], errors


def networks() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    attention = Attention(16, heads=2, dim_head=8, norm_num_groups=4, residual_connection=True, bias=True)
    linear = SanaMultiscaleLinearAttention(16, 16, kernel_sizes=(), norm_type="rms_norm")
    norm = nn.Sequential(nn.GroupNorm(4, 16), nn.Conv2d(16, 16, 1), nn.GroupNorm(4, 16, affine=False))
    return {"norm": norm, "attention": attention, "linear attention": linear}


@pytest.mark.parametrize("kind", ["norm", "attention", "linear attention"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_patches_of_all_the_image_say_all_of_it(kind, dtype) -> None:
    """Where nothing looks beyond its place but norms and attention, any tile comes out as in the whole image."""
    network = networks()[kind].to(dtype)
    image = torch.randn(1, 16, 8, 12, generator=torch.Generator().manual_seed(1)).to(dtype)
    image[..., :6] += 3
    whole = network(image)
    pooled = Pooled([network])
    with pooled.measuring((8, 6), (0, 0)):
        network(torch.cat(image.chunk(2, -1)).contiguous())
    with pooled.held():
        tiles = [network(image[..., 2:7, part].contiguous()) for part in (slice(0, 5), slice(5, 12))]
    tolerance = 1e-5 if dtype == torch.float32 else 0.1
    assert torch.allclose(torch.cat(tiles, -1), whole[..., 2:7, :], atol=tolerance)
    assert torch.equal(network(image), whole), "and the network is as it was"


def test_a_margin_does_not_count() -> None:
    norm = nn.GroupNorm(1, 1)
    image = torch.zeros(2, 1, 12, 6)
    image[0, :, 2:-2, 1:-1], image[1, :, 2:-2, 1:-1] = 1.0, 3.0
    pooled = Pooled([norm])
    with pooled.measuring((12, 6), (2, 1)):
        norm(image)
    with pooled.held():
        assert torch.allclose(norm(torch.full((1, 1, 3, 3), 3.0)), torch.ones(1, 1, 3, 3), atol=1e-4)
