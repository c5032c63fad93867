"""The checks that plug-in authors run find what they are there to find, and say it."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from rewardsr import Batch, lora
from rewardsr.adapters.osediff import OSEDiff
from rewardsr.adapters.stable_diffusion import load_parts
from rewardsr.rewards.detail import Detail
from rewardsr.rewards.fidelity import PSNR
from rewardsr.testing import check_adapter, check_reward, tiny_pipeline


@pytest.fixture
def parts(tiny_base):
    """Loaded anew each time: a check leaves a LoRA behind."""
    return load_parts(str(tiny_base))


# ---- adapters ----


class WrongSize(OSEDiff):
    def _encode(self, batch, generator):
        condition = super()._encode(batch, generator)
        return type(condition)(condition.text, condition.latents, (condition.size[0] + 1, condition.size[1]))


class WrongLatents(OSEDiff):
    def _to_latents(self, image, generator):
        return super()._to_latents(image, generator)[..., :-1, :]


class HalfPrecision(OSEDiff):
    def _predict(self, z_t, t, condition):
        return super()._predict(z_t, t, condition).half()


class NotFinite(OSEDiff):
    def _predict(self, z_t, t, condition):
        return super()._predict(z_t, t, condition) / 0


class CutDecoder(OSEDiff):
    def _to_image(self, z0):
        return super()._to_image(z0).detach()


class CutEncoder(OSEDiff):
    @torch.no_grad()
    def _to_latents(self, image, generator):
        return super()._to_latents(image, generator)


class CutPrediction(OSEDiff):
    def _predict(self, z_t, t, condition):
        return super()._predict(z_t, t, condition.rows(slice(0, len(condition)))).detach() + z_t.requires_grad_()


class OwnNoise(OSEDiff):
    def _start(self, condition, generator):
        return condition.latents + 0.1 * torch.randn_like(condition.latents)


class MixesRows(OSEDiff):
    def _predict(self, z_t, t, condition):
        eps = super()._predict(z_t, t, condition)
        return eps - eps.mean(0, keepdim=True)


class SaysDeterministic(OSEDiff):
    deterministic = True


class SaysNoisy(OSEDiff):
    deterministic = False

    def _start(self, condition, generator):
        return condition.latents


class NoRangeCheck(OSEDiff):
    def encode(self, batch, prompts=None, generator=None):
        if isinstance(batch, Tensor):
            batch = Batch(lq=batch, prompts=prompts)
        return self._encode(batch, generator)


class ChangesWithLora(OSEDiff):
    def _predict(self, z_t, t, condition):
        return super()._predict(z_t, t, condition) + 0.01 * lora.attached(self)


class Raises(OSEDiff):
    def _to_image(self, z0):
        raise ZeroDivisionError("of all things")


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        (WrongSize, "condition.size is (49, 40), expected scale x lq = (48, 40)"),
        (WrongLatents, "to_latents"),
        (HalfPrecision, "predict: gave torch.float16, expected float32"),
        (NotFinite, "predict: gave values that are not finite"),
        (CutDecoder, "to_image: gradients do not follow"),
        (CutEncoder, "to_latents: gradients do not follow"),
        (CutPrediction, "no gradient reaches"),
        (OwnNoise, "take all randomness from rewardsr.draws.draw"),
        (MixesRows, "a row depends on the other rows"),
        (SaysDeterministic, "deterministic is True, but start draws noise"),
        (SaysNoisy, "deterministic is False, but other draws give the same start"),
        (NoRangeCheck, "accepts images in [-1, 1]"),
        (ChangesWithLora, "a fresh LoRA changes the output"),
        (Raises, "raised ZeroDivisionError: of all things"),
    ],
    ids=lambda entry: entry.__name__ if isinstance(entry, type) else "says",
)
def test_a_broken_adapter_is_caught(parts, kind, says) -> None:
    with pytest.raises(AssertionError) as caught:
        check_adapter(kind(parts, "tiny", noise_t=250))
    assert says in str(caught.value), caught.value


def test_an_adapter_that_lacks_an_attribute_is_told_which(parts) -> None:
    adapter = OSEDiff(parts, "tiny", noise_t=250)
    del adapter.lora_targets
    with pytest.raises(AssertionError, match="attribute 'lora_targets' is missing"):
        check_adapter(adapter)


@pytest.mark.parametrize("autoencoder", ["kl", "dc"])
@pytest.mark.parametrize("options", [{}, {"noise_t": 250}, {"noise_t": 250, "scale": 1}])
def test_the_built_in_adapter_passes(tmp_path, autoencoder, options) -> None:
    folder = tiny_pipeline(tmp_path / "tiny", seed=2, autoencoder=autoencoder)
    adapter = OSEDiff.load(str(folder), **options)
    check_adapter(adapter)
    assert lora.attached(adapter) and all(p.grad is None for p in lora.parameters(adapter).values())


# ---- rewards ----


class Mean(PSNR):
    def __call__(self, sr, batch):
        return super().__call__(sr, batch).mean()


class Integers(PSNR):
    def __call__(self, sr, batch):
        return super().__call__(sr, batch).round().long()


class Infinite(PSNR):
    def __call__(self, sr, batch):
        return super().__call__(sr, batch) / 0


class Relative(PSNR):
    def __call__(self, sr, batch):
        scores = super().__call__(sr, batch)
        return scores - scores.mean()


class Detached(Detail):
    def __call__(self, sr, batch):
        return super().__call__(sr.detach(), batch)


class Rounded(Detail):
    """Gradients are there, and all zero."""

    def __call__(self, sr, batch):
        return super().__call__((sr * 255).round() / 255, batch)


class Breaks(PSNR):
    def __call__(self, sr, batch):
        raise ZeroDivisionError("of all things")


class OtherKind(PSNR):
    kind = "taste"


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        (Mean, "score: gave (), expected (3,)"),
        (Integers, "score: gave torch.int64, expected float32"),
        (Infinite, "score: gave values that are not finite"),
        (Relative, "a score depends on the other images of its batch"),
        (Detached, "its gradient is zero, not finite or cut"),
        (Rounded, "its gradient is zero, not finite or cut"),
        (Breaks, "raised ZeroDivisionError: of all things"),
        (OtherKind, "kind is 'taste'"),
    ],
    ids=lambda entry: entry.__name__ if isinstance(entry, type) else "says",
)
def test_a_broken_reward_is_caught(kind, says) -> None:
    with pytest.raises(AssertionError) as caught:
        check_reward(kind())
    assert says in str(caught.value), caught.value


def test_a_reward_that_lacks_an_attribute_is_told_which() -> None:
    with pytest.raises(AssertionError, match="attribute 'licence' is missing"):
        check_reward(type("Bare", (), {"name": "bare", "differentiable": False, "needs_hq": False})())


def test_all_problems_are_listed_at_once(parts) -> None:
    class TwoFaults(CutDecoder):
        def _to_latents(self, image, generator):
            return super()._to_latents(image, generator).detach()

    with pytest.raises(AssertionError) as caught:
        check_adapter(TwoFaults(parts, "tiny", noise_t=250))
    assert "to_image: gradients" in str(caught.value) and "to_latents: gradients" in str(caught.value)


# ---- what tests are made of ----


def test_tiny_pipelines_are_small_and_the_same_every_time(tmp_path) -> None:
    one, other = (tiny_pipeline(tmp_path / name, seed=3) for name in ("one", "other"))
    sizes = [path.stat().st_size for path in Path(one).rglob("*") if path.is_file()]
    assert sum(sizes) < 2_000_000
    weights = "unet/diffusion_pytorch_model.safetensors"
    assert (one / weights).read_bytes() == (other / weights).read_bytes()
