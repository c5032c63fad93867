"""Several LoRAs by name on one pipeline: which are on, which train, what each file holds."""

import itertools

import pytest
import torch
from safetensors.torch import load_file

from rewardsr import Batch, Draws, UserError, load_adapter, lora, run_folder
from rewardsr.testing import tiny_pipeline

WIDE = {"unet": ("to_q", "to_v", "conv1"), "vae": ("encoder.conv_in", "quant_conv")}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    return str(tiny_pipeline(tmp_path_factory.mktemp("names") / "base"))


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def adapter(base, request):
    """One LoRA on the UNet and one ("second") on some of it and on the autoencoder's encoder, as after training."""
    made = load_adapter("osediff", base, noise_t=250, dtype=request.param)
    lora.attach(made, 2, 3)
    lora.attach(made, 3, 6, seed=1, name="second", targets=WIDE)
    return shaken(made)


def shaken(adapter):
    random = torch.Generator().manual_seed(3)
    for name in lora.names(adapter):
        for parameter in lora.parameters(adapter, name).values():
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=random)
    return adapter


def output(adapter) -> torch.Tensor:
    """Prediction from the image: through the autoencoder's encoder and the UNet."""
    lq = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    condition = adapter.encode(Batch(lq=lq, prompts=("a cat",)))
    return adapter.predict(adapter.start(condition, Draws(0, 0, [0])), 100, condition)


@pytest.fixture
def outputs(adapter, base) -> dict[tuple[str, ...], torch.Tensor]:
    """What the pipeline makes with each set of LoRAs; without any, from a pipeline that has never had one."""
    with torch.no_grad():
        plain = load_adapter("osediff", base, noise_t=250, dtype=adapter.dtype)
        found = {(): output(plain)}
        for chosen in (("rewardsr",), ("second",), ("rewardsr", "second")):
            with lora.only(adapter, *chosen):
                found[chosen] = output(adapter)
    for one, other in itertools.combinations(found.values(), 2):
        assert not torch.equal(one, other)
    return found


@torch.no_grad()
def test_only_and_reference_switch_and_restore(adapter, outputs) -> None:
    def now() -> torch.Tensor:
        assert torch.equal(output(adapter), outputs[tuple(lora.active(adapter))])
        return lora.active(adapter)

    assert now() == ["rewardsr", "second"]
    with lora.reference(adapter):
        assert now() == ["second"]
        with lora.reference(adapter, "second"):
            assert now() == []
            with lora.only(adapter, "rewardsr"), lora.reference(adapter, "second"):
                assert now() == ["rewardsr"]
            assert now() == []
        assert now() == ["second"]
    with pytest.raises(RuntimeError), lora.only(adapter):
        assert now() == []
        raise RuntimeError
    assert now() == ["rewardsr", "second"]
    with pytest.raises(UserError, match="carries no third LoRA"), lora.only(adapter, "third"):
        pass


def test_gradients_reach_the_loras_that_are_on(adapter) -> None:
    own = {name: lora.parameters(adapter, name) for name in lora.names(adapter)}
    assert {key.partition(".")[0] for key in own["second"]} == {"unet", "vae"}
    for chosen in (("rewardsr",), ("second",), ("rewardsr", "second")):
        with lora.only(adapter, *chosen):
            output(adapter).square().mean().backward()
        for name, parameters in own.items():
            for key, parameter in parameters.items():
                assert (parameter.grad is not None and bool(parameter.grad.any())) == (name in chosen), key
                assert parameter.requires_grad and parameter.dtype == torch.float32
                parameter.grad = None
    trained = {id(parameter) for parameters in own.values() for parameter in parameters.values()}
    for network in adapter.networks.values():
        assert all(parameter.requires_grad == (id(parameter) in trained) for parameter in network.parameters())


def test_each_has_its_file_and_loads_on_its_own(adapter, outputs, base, tmp_path) -> None:
    written = {name: lora.save(adapter, tmp_path, name) for name in lora.names(adapter)}
    assert {path.name for path in written.values()} == {"pytorch_lora_weights.safetensors", "second.safetensors"}
    fresh = load_adapter("osediff", base, noise_t=250, dtype=adapter.dtype)
    for name in ("second", "rewardsr"):  # the order of loading does not matter
        lora.load(fresh, tmp_path, name=name)
        assert all(torch.equal(load_file(written[name])[k], v) for k, v in lora.state_dict(fresh, name).items())
    with torch.no_grad():
        assert torch.equal(output(fresh), outputs["rewardsr", "second"])
        lora.detach(fresh)
        assert torch.equal(output(fresh), outputs["second",])
        lora.set_scale(fresh, 0, "second")
        assert torch.equal(output(fresh), outputs[()])
    assert lora.names(fresh) == ["second"]
    lora.load(fresh, written["second"])  # and under another name than it was trained with
    assert lora.parameters(fresh).keys() == lora.parameters(fresh, "second").keys()


def test_a_lora_that_is_attached_as_inactive_waits_for_only(base) -> None:
    adapter = load_adapter("osediff", base, noise_t=250)
    lora.attach(adapter)
    lora.attach(adapter, name="quiet", targets=WIDE, active=False)
    shaken(adapter)
    assert lora.active(adapter) == ["rewardsr"] and lora.names(adapter) == ["quiet", "rewardsr"]
    with torch.no_grad():
        without = output(adapter)
        with lora.reference(adapter, "quiet"):
            assert torch.equal(output(adapter), without)
        with lora.only(adapter, "quiet", "rewardsr"):
            assert not torch.equal(output(adapter), without)
    assert all(parameter.requires_grad for parameter in lora.parameters(adapter, "quiet").values())


def test_merging_one_leaves_the_other(base) -> None:
    adapter = load_adapter("osediff", base, noise_t=250)
    lora.attach(adapter)
    lora.attach(adapter, name="second", targets=WIDE)
    shaken(adapter)
    with torch.no_grad():
        both = output(adapter)
        lora.merge(adapter, "second")
        assert lora.names(adapter) == lora.active(adapter) == ["rewardsr"]
        assert not any("peft" in type(module).__module__ for module in adapter.vae.modules())
        assert float((output(adapter) - both).abs().max()) <= 1e-5
        lora.attach(adapter, name="second", targets=WIDE)  # and the name is free again


def test_switching_walks_no_network(base, monkeypatch) -> None:
    adapter = load_adapter("osediff", base, noise_t=250)
    lora.attach(adapter)
    lora.attach(adapter, name="second", targets=WIDE)
    lora.names(adapter)
    walked = []
    monkeypatch.setattr(torch.nn.Module, "named_modules", lambda self, *_, **__: walked.append(self) or iter(()))
    with lora.reference(adapter), lora.only(adapter, "second"):
        lora.parameters(adapter)
    assert not walked


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "second"}, "carries a second LoRA already"),
        ({"name": "a.b"}, "cannot name a LoRA"),
        ({"name": "keys"}, "cannot name a LoRA"),
        ({"name": "third", "rank": 0}, "rank is at least 1"),
        ({"name": "third", "targets": {"unett": ("to_q",)}}, "no network here: did you mean 'unet'"),
        ({"name": "third", "targets": {"vae": ("nowhere",)}}, "fit no module: nowhere"),
        ({"name": "third", "targets": {"unet": ("to_q",), "vae": ("conv_norm_out",)}}, "is GroupNorm, expected"),
    ],
)
def test_what_cannot_be_attached_leaves_nothing(arguments, message, base) -> None:
    adapter = load_adapter("osediff", base, noise_t=250)
    lora.attach(adapter, name="second")
    with pytest.raises(UserError, match=message):
        lora.attach(adapter, **arguments)
    assert lora.names(adapter) == ["second"]


def test_the_checkpoint_of_a_run_of_0_1_0(tiny, data) -> None:
    """Its LoRA is the file that the run left, too."""
    adapter = load_adapter("osediff", tiny, noise_t=250, net_t=100, scale=1)
    checkpoint = data / "run_0.1.0" / "checkpoints" / "step-00000002"
    expected, tensors = (
        load_file(data / "run_0.1.0" / "prediction.safetensors"),
        load_file(checkpoint / run_folder.LORA),
    )
    lora.load(adapter, checkpoint)
    assert all(torch.equal(parameter, tensors[key]) for key, parameter in lora.parameters(adapter).items())
    with torch.no_grad():
        found = adapter.unet(expected["z"], 100, expected["text"]).sample
        assert float((found - expected["prediction"]).abs().max()) <= 1e-5
        with lora.reference(adapter):
            assert float((adapter.unet(expected["z"], 100, expected["text"]).sample - found).abs().max()) > 0.1
