"""Agreement of the StableSR adapter with vectors measured on StableSR."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from _support import picked
from accelerate import init_empty_weights
from torch import Tensor

from rewardsr import load_adapter
from rewardsr.adapters import _stablesr_checkpoint as checkpoint
from rewardsr.adapters._sft import StructEncoder, add_modulation, modulated
from rewardsr.adapters.stablesr import StableSR, import_checkpoint, respaced
from rewardsr.batch import Condition
from rewardsr.draws import Replay
from rewardsr.evaluation.colour import _coarse, adain, wavelet

FEATURES, HIDDEN = 256, 128  # of the released networks


@pytest.fixture
def close(record_property):
    """Compares with what was recorded, and notes the largest error."""

    def compare(ours: Tensor, recorded: dict[str, Tensor], name: str, tolerance: float) -> None:
        mine, theirs = picked(ours, recorded, name)
        error = float((mine - theirs).abs().max())
        record_property(f"{name} ({tolerance:g})", f"{error:.2e}")
        assert error <= tolerance, f"{name}: {error:.2e} > {tolerance:g}"

    return compare


@contextmanager
def small_sizes() -> Iterator[None]:
    """The recorded networks have 8 groups and heads of 8 channels, which the sizes of tensors do not tell."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "GROUPS", 8)
        patch.setattr(checkpoint, "HEAD_WIDTH", 8)
        yield


@pytest.fixture(scope="module")
def networks(data):
    """UNet and encoder, straight from the checkpoint."""
    with small_sizes():
        return checkpoint.read_checkpoint(data / "tiny_stablesr.safetensors")


@pytest.fixture(scope="module")
def folders(data, tmp_path_factory) -> dict[str, Path]:
    """The checkpoint imported, read as predicting noise and as predicting velocity."""
    made = {kind: tmp_path_factory.mktemp("imported") / kind for kind in checkpoint.PREDICTIONS}
    with small_sizes():
        for kind, folder in made.items():
            import_checkpoint(data / "tiny_stablesr.safetensors", folder, kind, check=False)
    return made


@pytest.fixture
def adapter(tiny, folders):
    """The imported pipeline on the tiny base, four steps."""

    def load(kind: str = "epsilon", **options) -> StableSR:
        return load_adapter("stablesr", tiny, weights=str(folders[kind]), **({"steps": 4, "scale": 1} | options))

    return load


def condition_of(latents: Tensor, text: Tensor) -> Condition:
    return Condition(text=text, latents=latents, size=(latents.shape[-2] * 4, latents.shape[-1] * 4))


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "at"),
    [("t0", [0]), ("t333", [333]), ("t999", [999]), ("mixed_t999_333", [999, 333]), ("nonsquare_t500", [500])],
)
def test_struct_encoder(name, at, networks, golden, close) -> None:
    v = golden("stablesr_struct_encoder")
    latents = v["lr_latent_nonsquare" if name.startswith("nonsquare") else "lr_latent"]
    features = networks[1](latents, torch.tensor(at).expand(len(latents)))
    width = latents.shape[-1]
    assert sorted(features) == [width // 2, width]
    for each, feature in features.items():
        close(feature, v, f"{name}.w{each}", 1e-4)


def test_time_embedding_is_cosine_first(networks, golden, close) -> None:
    v = golden("stablesr_struct_encoder")
    close(networks[1].time_proj(torch.tensor([333])), v, "temb_t333_sinusoid", 1e-6)


@pytest.fixture
def probed(networks) -> Iterator[dict[str, Tensor]]:
    """What every residual block of the UNet gives, by its released name."""
    seen: dict[str, Tensor] = {}
    unet = networks[0]
    places = {f"input_blocks.{1 + 3 * i + j}.0": unet.down_blocks[i].resnets[j] for i in (0, 1) for j in (0, 1)}
    places |= {f"middle_block.{2 * j}": unet.mid_block.resnets[j] for j in (0, 1)}
    places |= {f"output_blocks.{3 * i + j}.0": unet.up_blocks[i].resnets[j] for i in (0, 1) for j in (0, 1, 2)}
    handles = [
        block.register_forward_hook(lambda _, given, result, name=name: seen.update({name: result}))
        for name, block in places.items()
    ]
    yield seen
    for handle in handles:
        handle.remove()


@torch.no_grad()
def test_unet_with_modulation(networks, golden, close, probed) -> None:
    v = golden("stablesr_unet_forward")
    unet, encoder = networks
    features = encoder(v["lr_latent"], v["timesteps"])
    for width in (16, 8):
        close(features[width], v, f"struct_cond.w{width}", 1e-4)
    recorded = {width: v[f"struct_cond.w{width}"] for width in (16, 8)}
    close(modulated(unet, recorded, v["latent"], v["timesteps"], v["context"]).sample, v, "out", 1e-4)
    assert len(probed) == 12
    for name, result in probed.items():
        close(result, v, f"probe.resblock.{name}", 1e-4)
    spade = unet.down_blocks[0].resnets[0].spade
    before, after = "probe.spade_input_blocks.1.0.in", "probe.spade_input_blocks.1.0.out"
    close(spade(v[before], recorded[16]), v, after, 1e-4)
    features = encoder(v["ns_lr_latent"], v["ns_timesteps"])
    close(modulated(unet, features, v["ns_latent"], v["ns_timesteps"], v["ns_context"]).sample, v, "ns_out", 1e-4)


@torch.no_grad()
def test_unet_without_modulation(networks, golden, close, monkeypatch) -> None:
    v = golden("stablesr_unet_forward")
    recorded = {width: v[f"struct_cond.w{width}"] for width in (16, 8)}
    monkeypatch.setattr("rewardsr.adapters._sft.Modulation.forward", lambda self, residual, features: residual)
    plain = modulated(networks[0], recorded, v["latent"], v["timesteps"], v["context"]).sample
    close(plain, v, "out_spade_bypassed", 1e-4)


@torch.no_grad()
def test_sampling_step_by_step(adapter, golden, close, monkeypatch) -> None:
    v = golden("stablesr_ddpm4")
    pipeline = adapter()
    assert list(pipeline.steps) == [999, 666, 333, 0] == v["ori_timesteps"].tolist()[::-1]
    seen: list[tuple[Tensor, Tensor, float]] = []
    transition = pipeline.transition

    def watch(z, prediction, *times):
        seen.append((prediction, *transition(z, prediction, *times)))
        return seen[-1][1:]

    monkeypatch.setattr(pipeline, "transition", watch)
    condition = condition_of(v["lr_latent"], v["context"])
    close(pipeline.start(condition, Replay([v["start_noise"]])), v, "x_T", 1e-5)
    replay = Replay([v["start_noise"], *(v[f"step{index}.noise"] for index in range(3))])
    final = pipeline.sample_latents(condition, replay)
    assert replay.left == 0 and len(seen) == 4
    z = v["x_T"]
    for index, (prediction, mean, std) in enumerate(seen):
        close(prediction, v, f"step{index}.model_out", 5e-4)
        close(mean + std * v[f"step{index}.noise"] if std else mean, v, f"step{index}.x_next", 5e-4)
        z0 = pipeline.schedule.x0(z, v[f"step{index}.model_out"], pipeline.steps[index])
        close(z0, v, f"step{index}.pred_x0", 5e-4)
        z = v[f"step{index}.x_next"]
    close(final, v, "final", 5e-4)


def test_steps_follow_the_posterior_of_the_respaced_schedule(adapter, golden) -> None:
    """The coefficients of our step, found by giving it units, against the recorded buffers (rebuilt in float32)."""
    v = golden("stablesr_ddpm4")
    pipeline = adapter()
    alphas = pipeline.schedule.alphas_cumprod.double()
    zero, one = torch.zeros(1, 1, 1, 1, dtype=torch.float64), torch.ones(1, 1, 1, 1, dtype=torch.float64)
    for place in (1, 2, 3):  # of the respaced schedule, ascending; at 0 the step gives z0 itself
        t, following = pipeline.steps[3 - place], pipeline.steps[4 - place]
        a = alphas[t].float().double()
        # z = 0 and eps chosen so that z0 = 1, then z = 1 and eps so that z0 = 0.
        coefficient0, std = pipeline.transition(zero, -a.sqrt() / (1 - a).sqrt() * one, t, following)
        coefficient1, _ = pipeline.transition(one, one / (1 - a).sqrt(), t, following)
        for ours, name in (
            (coefficient0, "posterior_mean_coef1"),
            (coefficient1, "posterior_mean_coef2"),
            (std**2 * one, "posterior_variance"),
        ):
            assert float(ours) == pytest.approx(float(v[f"buf.{name}"][place]), rel=1e-4), (t, name)


def test_times_of_the_sampler(data) -> None:
    """Recorded ones, and for which counts diffusers' linspace is off."""
    recorded = json.loads((data / "stablesr_space_timesteps.json").read_text())
    unlike = recorded.pop("space_timesteps_vs_linspace_mismatch_N")
    for count, kept in recorded.items():
        assert list(respaced(int(count), 1000)) == kept[::-1], count
    scheduler = diffusers.DDPMScheduler(timestep_spacing="linspace")

    def linspace(count: int) -> tuple[int, ...]:
        scheduler.set_timesteps(count)
        return tuple(scheduler.timesteps.tolist())

    found = [count for count in range(1, 1001) if respaced(count, 1000) != linspace(count)]
    assert found == unlike


@torch.no_grad()
def test_training_loss(adapter, golden, close, record_property) -> None:
    v = golden("stablesr_training_loss")
    t = v["timesteps"]
    for kind, loss in (("epsilon", "loss_eps"), ("v_prediction", "loss_v")):
        pipeline = adapter(kind)
        noisy = pipeline.schedule.add_noise(v["z_gt"], v["noise"], t)
        close(noisy, v, "x_noisy", 1e-5)
        prediction = pipeline.predict(noisy, t, condition_of(v["z_lq"], v["context"]))
        close(prediction, v, "model_out", 1e-4)
        target = pipeline.schedule.target(v["z_gt"], v["noise"], t)
        if kind == "v_prediction":
            close(target, v, "target_v", 1e-5)
        error = abs(float((prediction - target).square().mean()) - float(v[loss]))
        record_property(f"{loss} (1e-5)", f"{error:.2e}")
        assert error <= 1e-5


def test_colour_fixes(golden, close) -> None:
    """StableSR's work on [-1, 1]. There AdaIN's 1e-5 means a quarter of what it does on [0, 1], where ours has it as
    OSEDiff does: a hundredth of an 8-bit level."""
    v = golden("stablesr_colour_fix")
    content, style = v["content"], v["style"]
    low = _coarse(content)
    close(low, v, "content_low", 1e-5)
    close(content - low, v, "content_high", 1e-5)
    close(content - low + _coarse(style), v, "wavelet", 1e-5)
    clamped = {name: value.clamp(-1, 1) for name, value in v.items()}
    for name, fix, tolerance in (("adain", adain, 2e-4), ("wavelet", wavelet, 1e-5)):
        close(fix(content / 2 + 0.5, style / 2 + 0.5) * 2 - 1, clamped, name, tolerance)


def full_size(config: dict[str, Any]) -> Any:
    """StableSR's UNet of this configuration, without storage."""
    with init_empty_weights():
        unet = diffusers.UNet2DConditionModel.from_config(config)
        add_modulation(unet, FEATURES, HIDDEN)
    return unet


def test_names_and_sizes_of_the_released_networks(data) -> None:
    """At the size of Stable Diffusion 2.1, without storage: every key of a released checkpoint, and where it goes."""
    v = json.loads((data / "stablesr_keymap.json").read_text())
    names, config = v["ldm_to_diffusers"], v["unet_config_diffusers"]
    unet = full_size(config)
    state = unet.state_dict()
    prefix = checkpoint.UNET
    released = {key.removeprefix(prefix): state[ours] for key, ours in names.items()}
    assert len(released) == 686 + 176 == len(state)
    found = checkpoint._unet_config(released)
    built = checkpoint.assemble("UNet2DConditionModel", found, state, "the UNet", checkpoint._modulate)
    assert {key: value.shape for key, value in built.state_dict().items()} == {k: x.shape for k, x in state.items()}
    assert built.config.attention_head_dim == list(config["attention_head_dim"])
    ours = checkpoint.unet_names(released, found)
    assert {id(value): key for key, value in ours.items()} == {id(value): key for key, value in state.items()}
    assert {
        f"{prefix}{key}": next(k for k, x in ours.items() if x is value) for key, value in released.items()
    } == names


def test_names_and_sizes_of_the_released_encoder(data) -> None:
    shapes = json.loads((data / "stablesr_keymap.json").read_text())["structcond_stage_model"]
    assert len(shapes) == 200
    released = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    config = checkpoint._encoder_config(released)
    built = checkpoint.assemble(StructEncoder, config, checkpoint.encoder_names(released, config), "the encoder")
    with torch.device("meta"):
        default = StructEncoder()
    assert {key: config[key] for key in config} == {key: _plain(default.config[key]) for key in config}
    sizes = [{key: value.shape for key, value in network.state_dict().items()} for network in (built, default)]
    assert sizes[0] == sizes[1]
    assert sum(value.numel() for value in released.values()) == sum(value.numel() for value in built.parameters())


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


def test_modulation_has_the_released_sizes(data) -> None:
    blocks = json.loads((data / "stablesr_keymap.json").read_text())["spade_blocks"]
    assert len(blocks) == 22
    unet = full_size(json.loads((data / "stablesr_keymap.json").read_text())["unet_config_diffusers"])
    found = {
        name.removesuffix(".spade"): {key: list(value.shape) for key, value in module.state_dict().items()}
        for name, module in unet.named_modules()
        if name.endswith(".spade")
    }
    assert found == {block["diffusers_block"]: block["shapes"] for block in blocks}
