"""`check_adapter` finds what it is there to find, and says it."""

from types import SimpleNamespace

import pydantic
import pytest
import torch
from torch import Tensor

from rewardsr import Batch, lora
from rewardsr.adapters.osediff import OSEDiff
from rewardsr.adapters.stable_diffusion import load_parts
from rewardsr.testing import check_adapter, tiny_pipeline
from rewardsr.testing.flow import TinyFlow


@pytest.fixture
def parts(tiny_base):
    """Loaded anew each time: a check leaves a LoRA behind."""
    return load_parts(str(tiny_base))


class WrongSize(OSEDiff):
    def _encode(self, batch, generator):
        condition = super()._encode(batch, generator)
        return type(condition)(condition.text, condition.latents, (condition.size[0] + 1, condition.size[1]))


class WrongLatents(OSEDiff):
    def _to_latents(self, image, generator):
        return super()._to_latents(image, generator)[..., :-1, :]


class HalfPrecision(OSEDiff):
    def predict(self, z_t, t, condition):
        return super().predict(z_t, t, condition).half()


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


class LooseOptions(OSEDiff):
    class Options(pydantic.BaseModel):
        noise_t: int
        net_t: int | None = None
        scale: int = 4
        prompt: str = ""
        vae_tile: int | None = None

        def tiling(self):
            return None


class OwnSchedule(OSEDiff):
    def __init__(self, parts, base, options):
        super().__init__(parts, base, options)
        self.schedule = 999


class EncoderToo(OSEDiff):
    """A LoRA on the encoder as well, as methods with a learnt encoding have it."""

    def __init__(self, parts, base, options):
        super().__init__(parts, base, options)
        self.trainable = {"unet": self.unet, "vae": self.vae}
        self.lora_targets |= {"vae": ["encoder.conv_in", "encoder.conv_out"]}


class UnnamedEncoder(EncoderToo):
    encoders = ()


class UnknownTarget(OSEDiff):
    def __init__(self, parts, base, options):
        super().__init__(parts, base, options)
        self.trainable = {"unet": self.unet, "text_encoder": self._text_encoder}
        self.lora_targets |= {"text_encoder": ["q_proj"]}


class RisingSteps(OSEDiff):
    def __init__(self, parts, base, options):
        super().__init__(parts, base, options)
        self.steps = (100, 200)


class NoisyEnd(OSEDiff):
    def transition(self, z, prediction, t, t_next):
        return super().transition(z, prediction, t, t_next)[0], 0.1


class DiesInBFloat16(OSEDiff):
    def _predict(self, z_t, t, condition):
        if self.dtype == torch.bfloat16:
            raise NotImplementedError("no kernel for bfloat16")
        return super()._predict(z_t, t, condition)


class OverflowsInBFloat16(OSEDiff):
    def _predict(self, z_t, t, condition):
        return super()._predict(z_t, t, condition) * (1e30 if self.dtype == torch.bfloat16 else 1) * 1e30


class RoundsTheLora(OSEDiff):
    def to(self, device, dtype):
        super().to(device, dtype)
        self.unet.to(dtype)
        return self


class KeepsNoOptions(OSEDiff):
    def __init__(self, parts, base, options):
        super().__init__(parts, base, options)
        self.options = SimpleNamespace(**options.model_dump())


class Raises(OSEDiff):
    def _to_image(self, z0):
        raise ZeroDivisionError("of all things")


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        (WrongSize, "condition.size is (49, 40), expected scale x lq = (48, 40)"),
        (WrongLatents, "to_latents"),
        (KeepsNoOptions, "options: 'net_t' is marked FOR_LORA, but"),
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
        (LooseOptions, "Options is no subclass of rewardsr.Options"),
        (OwnSchedule, "schedule is int, expected a rewardsr.schedule.Schedule"),
        (UnnamedEncoder, "encode: a LoRA on 'vae' changes its result, but `encoders` does not name 'vae'"),
        (UnknownTarget, "trainable names 'text_encoder', which is none of networks"),
        (RisingSteps, "steps are (100, 200), expected times that fall"),
        (NoisyEnd, "transition: the last step, to z0, draws noise"),
        (DiesInBFloat16, "in bfloat16: raised NotImplementedError: no kernel for bfloat16"),
        (OverflowsInBFloat16, "in bfloat16: predict: gave values that are not finite"),
        (RoundsTheLora, "in bfloat16: to: the LoRA is in torch.bfloat16, expected float32 always"),
        (Raises, "raised ZeroDivisionError: of all things"),
    ],
    ids=lambda entry: entry.__name__ if isinstance(entry, type) else "says",
)
def test_a_broken_adapter_is_caught(parts, kind, says) -> None:
    with pytest.raises(AssertionError) as caught:
        check_adapter(kind(parts, "tiny", kind.Options(noise_t=250)))
    assert says in str(caught.value), caught.value


def test_an_adapter_that_lacks_an_attribute_is_told_which(parts) -> None:
    adapter = OSEDiff(parts, "tiny", OSEDiff.Options(noise_t=250))
    del adapter.lora_targets
    with pytest.raises(AssertionError, match="attribute 'lora_targets' is missing"):
        check_adapter(adapter)


@pytest.mark.parametrize("autoencoder", ["kl", "dc"])
@pytest.mark.parametrize("options", [{}, {"noise_t": 250}, {"noise_t": 250, "scale": 1}])
def test_the_built_in_adapter_passes(tmp_path, autoencoder, options) -> None:
    folder = tiny_pipeline(tmp_path / "tiny", seed=2, autoencoder=autoencoder)
    adapter = OSEDiff.load(str(folder), OSEDiff.Options(**options))
    check_adapter(adapter)
    assert lora.attached(adapter) and all(p.grad is None for p in lora.parameters(adapter).values())


class CutEncoding(EncoderToo):
    @torch.no_grad()
    def _encode(self, batch, generator):
        return super()._encode(batch, generator)


def test_a_lora_on_the_encoder_is_reached_through_the_encoding(parts) -> None:
    adapter = EncoderToo(parts, "tiny", EncoderToo.Options(noise_t=250))
    check_adapter(adapter)
    assert any(name.startswith("vae.") for name in lora.parameters(adapter))


def test_a_lora_on_the_encoder_that_the_encoding_cuts_off_is_caught(parts) -> None:
    with pytest.raises(AssertionError, match=r"no gradient reaches 4 LoRA tensors \(first: vae\."):
        check_adapter(CutEncoding(parts, "tiny", CutEncoding.Options(noise_t=250)))


@pytest.mark.parametrize("options", [{}, {"guidance": 3.0}, {"steps": 1}, {"scale": 1, "shift": 1.0}], ids=str)
def test_a_flow_adapter_written_from_the_contract_alone_passes(tmp_path, options) -> None:
    base = tiny_pipeline(tmp_path / "flow", family="flow")
    check_adapter(TinyFlow.load(str(base), TinyFlow.Options(**options)))


def test_a_check_leaves_the_base_as_it_was(parts) -> None:
    adapter = OSEDiff(parts, "tiny", OSEDiff.Options(noise_t=250))
    before = {name: value.clone() for name, value in adapter.unet.state_dict().items()}
    check_adapter(adapter)
    after = {name.replace(".base_layer.", "."): value for name, value in adapter.unet.state_dict().items()}
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert (adapter.device, adapter.dtype) == (torch.device("cpu"), torch.float32)


def test_all_problems_are_listed_at_once(parts) -> None:
    class TwoFaults(CutDecoder):
        def _to_latents(self, image, generator):
            return super()._to_latents(image, generator).detach()

    with pytest.raises(AssertionError) as caught:
        check_adapter(TwoFaults(parts, "tiny", TwoFaults.Options(noise_t=250)))
    assert "to_image: gradients" in str(caught.value) and "to_latents: gradients" in str(caught.value)
