"""What a method says it trains is what is optimised, clipped, saved and switched off: several groups, of all kinds."""

from collections.abc import Iterator

import pytest
import torch
from runs import content, lines
from safetensors.torch import load_file

import rewardsr
from rewardsr import load_adapter, lora, run_folder
from rewardsr.adapters.osediff import OSEDiff
from rewardsr.lora import train_in_full
from rewardsr.testing import tiny_pipeline, write_images
from rewardsr.trainers.base import Loss, Method, ParameterGroup

CRITIC = "critic"


class Encoding(OSEDiff):
    """OSEDiff with a LoRA on the autoencoder's encoder as well."""

    name = "encoding"

    def __init__(self, *arguments, **options) -> None:
        super().__init__(*arguments, **options)
        self.trainable = {"unet": self.unet, "vae": self.vae}
        self.lora_targets = self.lora_targets | {"vae": ("encoder.conv_in", "encoder.conv_out")}


class Several(Method):
    """Our LoRA, a second one, and a layer in full; every other step has a metric of its own."""

    trains_encoders = True

    def __init__(self, *arguments) -> None:
        super().__init__(*arguments)
        lora.attach(self.adapter, rank=2, seed=1, name=CRITIC, targets={"unet": ("conv_out",)}, active=False)
        self.layer = train_in_full(self.adapter, "unet.conv_norm_out")

    def parameters(self) -> list[ParameterGroup]:
        return [
            *super().parameters(),
            ParameterGroup("critic", lora.parameters(self.adapter, CRITIC), CRITIC, clip=1e-3),
            ParameterGroup("full", self.layer, learning_rate=0.0),
        ]

    def prepare(self, batch, draws) -> "Several":
        self.batch, self.metrics = batch, {}
        return self

    def losses(self, group, draws) -> Iterator[Loss]:
        condition = self.adapter.encode(self.batch, generator=draws)
        z = self.adapter.start(condition, draws)
        yield Loss(100 * self.adapter.predict(z, self.adapter.net_t, condition).square().mean(), {"ours": 1.0}, 0.5)
        with lora.only(self.adapter, CRITIC):
            second = 100 * self.adapter.predict(z.detach(), self.adapter.net_t, condition.rows(slice(None)))
        yield Loss(second.square().mean(), {"critic": float(len(self.batch))}, 0.5)


@pytest.fixture
def folder(tmp_path):
    write_images(tmp_path / "images", 3, 24)
    tiny_pipeline(tmp_path / "base")
    return tmp_path


def run(folder, output: str, trainer: str, **changes):
    recipe = content(folder, str(folder / "base"), output, **{"trainer": trainer, "trainer_options": {}} | changes)
    return rewardsr.finetune(recipe | {"adapter": "test_parameters:Encoding"}, resume=changes.get("steps") != 2).output


def test_groups_have_their_own_weights_clip_and_rate_and_are_kept(folder) -> None:
    straight = run(folder, "straight", "test_parameters:Several", steps=4)
    told = lines(straight)
    assert {"grad_norm", "grad_norm/critic", "grad_norm/full", "ours", "critic"} <= told[-1].keys()
    assert told[-1]["ours"] == 1 and told[-1]["critic"] == 1  # each averaged over the losses that have it
    newest = straight / "checkpoints" / "step-00000004"
    kept = load_file(newest / run_folder.TRAINED)
    assert {name.partition("/")[0] for name in kept} == {"lora", "critic", "full"}
    assert any(name.startswith("lora/vae.encoder.conv_in") for name in kept)
    fresh = load_adapter("test_parameters:Encoding", folder / "base", noise_t=250)
    norm = dict(fresh.unet.conv_norm_out.named_parameters())
    assert all(
        torch.equal(kept[f"full/unet.conv_norm_out.{name}"], value) for name, value in norm.items()
    )  # at a learning rate of 0
    assert all(value.any() for name, value in kept.items() if ".lora_B." in name)  # the encoder's among them
    # The run's file holds our LoRA, on the autoencoder too, and loads into a fresh pipeline.
    lora.load(fresh, straight)
    assert {name.partition(".")[0] for name in lora.parameters(fresh)} == {"unet", "vae"}


def test_a_layer_in_full_is_float32_in_a_bf16_network(folder) -> None:
    adapter = load_adapter("test_parameters:Encoding", folder / "base", noise_t=250, dtype=torch.bfloat16)
    plain = load_adapter("test_parameters:Encoding", folder / "base", noise_t=250, dtype=torch.bfloat16)
    layer = train_in_full(adapter, "unet.conv_in")
    z, condition = torch.randn(1, 4, 8, 8), adapter.encode(torch.rand(1, 3, 8, 8))
    prediction = adapter.predict(z, 100, condition)
    expected = plain.predict(z, 100, condition)
    assert float((prediction - expected).norm() / expected.norm()) < 0.02
    prediction.square().sum().backward()
    assert {(p.dtype, p.grad.dtype) for p in layer.values()} == {(torch.float32, torch.float32)}
    assert all(float(p.grad.norm()) > 0 for p in layer.values())
    assert adapter.unet.conv_out.weight.dtype == torch.bfloat16
    adapter.to("cpu", torch.bfloat16)
    assert all(p.dtype == torch.float32 for p in layer.values())


def test_the_reference_is_without_any_of_them(folder) -> None:
    adapter = load_adapter("test_parameters:Encoding", folder / "base", noise_t=250)
    image = torch.rand(1, 3, 8, 8)
    lora.attach(adapter)
    method = Several(adapter, {}, {}, None)
    with torch.no_grad():
        before = adapter.sample(adapter.encode(image), rewardsr.Draws(0, 0, [0]))
        for group in method.trained:
            for parameter in group.parameters.values():
                parameter.add_(0.1)
        with lora.only(adapter, lora.NAME, CRITIC):
            changed = adapter.sample(adapter.encode(image), rewardsr.Draws(0, 0, [0]))
            with method.reference():
                after = adapter.sample(adapter.encode(image), rewardsr.Draws(0, 0, [0]))
    assert not torch.equal(before, changed)
    assert torch.equal(before, after)


@pytest.mark.parametrize("trainer", ["gdpo", "rfsr"])
def test_methods_that_do_not_train_encoders_leave_their_lora_alone(trainer, folder, caplog) -> None:
    options = {"gdpo": {"group_size": 2}, "rfsr": {"kl_weight": 0}}[trainer]
    with caplog.at_level("INFO", logger="rewardsr"):
        made = run(folder, trainer, trainer, steps=2, trainer_options=options)
    assert "the LoRA on 'vae' stays as it is" in caplog.text
    tensors = load_file(made / run_folder.LORA)
    moved = {name.partition(".")[0] for name, value in tensors.items() if ".lora_B." in name and value.any()}
    assert moved == {"unet"} and any(name.startswith("vae.") for name in tensors)
