"""The constant-offset control: it finds what a LoRA adds everywhere, and nothing else."""

import pytest
import torch

from rewardsr import Batch, Draws, UserError, load_adapter, lora
from rewardsr.evaluation.offset import latent_offset, shifted
from rewardsr.evaluation.protocol import HeldOut
from rewardsr.evaluation.report import side_by_side
from rewardsr.rewards import build


@pytest.fixture
def adapter(tiny_base):
    return load_adapter("osediff", str(tiny_base), noise_t=250)


def images(count: int = 2) -> list[Batch]:
    random = torch.Generator().manual_seed(4)
    pixels = [torch.rand(1, 3, 32, 32, generator=random) for _ in range(count)]
    return [Batch(lq=torch.nn.functional.avg_pool2d(hq, 4), hq=hq) for hq in pixels]


def latents(adapter, batch: Batch) -> torch.Tensor:
    return adapter.sample_latents(adapter.encode(batch), Draws(0, 0, [0]))


def test_it_is_the_mean_change_of_the_latents(adapter) -> None:
    lora.attach(adapter)
    assert torch.equal(latent_offset(adapter, images()), torch.zeros(4)), "a fresh LoRA changes nothing"
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in lora.parameters(adapter).values():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=random))
    expected = []
    for place, batch in enumerate(images()):
        draws = [Draws(7, 0, [place], "offset") for _ in range(2)]
        tuned = adapter.sample_latents(adapter.encode(batch), draws[0])
        with lora.reference(adapter):
            expected.append((tuned - adapter.sample_latents(adapter.encode(batch), draws[1])).mean((0, 2, 3)))
    found = latent_offset(adapter, images(), seed=7)
    assert found.abs().min() > 1e-4
    assert torch.allclose(found, torch.stack(expected).mean(0), atol=1e-6)


def test_a_change_that_is_constant_is_found_whole(adapter) -> None:
    """As the bias of a network's last convolution is: a constant of the prediction, and so of x0."""
    lora.attach(adapter)
    before = latents(adapter, images()[0])
    plain = type(adapter)._predict
    added = torch.tensor([0.3, -0.1, 0.2, 0.0])

    def predict(self, z_t, t, condition):
        on = bool(lora.active(self))
        return plain(self, z_t, t, condition) + (added[:, None, None] if on else 0)

    type(adapter)._predict = predict
    try:
        found = latent_offset(adapter, images())
        after = latents(adapter, images()[0])
    finally:
        type(adapter)._predict = plain
    assert torch.allclose(found, (after - before).mean((0, 2, 3)), atol=1e-5)
    assert torch.allclose(after - before, found[:, None, None].expand_as(after), atol=1e-5)


def test_shifted_decodes_what_was_added_and_stops(adapter) -> None:
    batch = images()[0]
    condition = adapter.encode(batch)
    z0 = adapter.sample_latents(condition, Draws(0, 0, [0]))
    offset = torch.tensor([0.5, -0.5, 0.25, 0.0])
    plain, moved = adapter.decode(z0, condition), adapter.decode(z0 + offset[:, None, None], condition)
    assert not torch.equal(plain, moved)
    with shifted(adapter, offset):
        assert torch.equal(adapter.sample(condition, Draws(0, 0, [0])), moved)
        with shifted(adapter, None):
            assert torch.equal(adapter.sample(condition, Draws(0, 0, [0])), plain)
        assert torch.equal(adapter.decode(z0, condition), moved)
    assert torch.equal(adapter.decode(z0, condition), plain)
    assert "decode" not in vars(adapter)


def test_beside_the_others_in_one_table(adapter) -> None:
    lora.attach(adapter)
    lora.parameters(adapter)["unet.conv_out.lora_B.weight"].data.fill_(0.3)
    held_out = {"images": lambda first, every: images()[first::every], "rewards": {"psnr": build("psnr")}}
    tuned = HeldOut(adapter, **held_out).score()
    with lora.reference(adapter), shifted(adapter, torch.full((4,), 0.5)):
        constant = HeldOut(adapter, **held_out, base=lambda: shifted(adapter, None)).score()
    assert constant.rewards["psnr"].base == tuned.rewards["psnr"].base
    assert constant.rewards["psnr"].tuned != constant.rewards["psnr"].base
    lines = side_by_side({"tuned": tuned, "constant offset": constant}).splitlines()
    assert lines[0].split() == ["reward", "base", "tuned", "constant", "offset"]
    assert lines[1].count("[") == 2 and f"{constant.rewards['psnr'].difference:+.4f}" in lines[1]
    assert len(lines) == 3 and lines[2].startswith("2 images")


def test_it_needs_a_lora_and_images(adapter) -> None:
    with pytest.raises(UserError, match="carries none"):
        latent_offset(adapter, images())
    lora.attach(adapter)
    with pytest.raises(UserError, match="there are none"):
        latent_offset(adapter, [])
