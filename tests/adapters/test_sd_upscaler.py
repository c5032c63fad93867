"""The upscaler's adapter: equal to diffusers' pipeline, loaded or live, at any size, in tiles, and for training."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from rewardsr import UserError, load_adapter, lora
from rewardsr.adapters.sd_upscaler import SDUpscaler
from rewardsr.draws import Draws, Replay
from rewardsr.testing import check_adapter, tiny_pipeline

PROMPTS, NEGATIVE = ["a photo", "a cat"], "blur"
LQ = torch.rand(2, 3, 12, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny_pipeline(tmp_path_factory.mktemp("upscaler"), family="upscaler")


@pytest.fixture
def spoiled(folder, tmp_path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(folder, tmp_path / "base"))


def change(config: Path, **values: object) -> None:
    """Change keys of a JSON file."""
    config.write_text(json.dumps({**json.loads(config.read_text()), **values}))


def live(folder: Path):
    from diffusers import StableDiffusionUpscalePipeline

    pipe = StableDiffusionUpscalePipeline.from_pretrained(folder, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def recorded(lq: torch.Tensor, seed: int = 0) -> Replay:
    """The noise that diffusers' pipeline takes from a generator of this seed: for the LQ images, then to start from."""
    random = torch.Generator().manual_seed(seed)
    count, _, height, width = lq.shape
    return Replay([torch.randn(count, channels, height, width, generator=random) for channels in (3, 4)])


def ours(adapter: SDUpscaler, lq: torch.Tensor = LQ) -> torch.Tensor:
    """(B, 3, H, W) in [0, 1], from recorded noise."""
    noise = recorded(lq)
    with torch.no_grad():
        image = adapter.sample(adapter.encode(lq, PROMPTS[: len(lq)], generator=noise), noise)
    assert not noise.left
    return image


def theirs(pipe, steps: int, guidance: float, level: int = 20) -> torch.Tensor:
    return pipe(
        PROMPTS,
        image=LQ,
        num_inference_steps=steps,
        guidance_scale=guidance,
        noise_level=level,
        negative_prompt=[NEGATIVE] * len(LQ),
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    ).images


def gap(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max())


# ---- agreement with diffusers ----


@pytest.mark.parametrize("to_one", [False, True])
@pytest.mark.parametrize("prediction", ["v_prediction", "epsilon"])
@pytest.mark.parametrize(("steps", "guidance", "level"), [(6, 9.0, 20), (7, 1.0, 20), (1, 2.5, 0)])
def test_equals_the_pipeline_of_diffusers(spoiled, prediction, to_one, steps, guidance, level, record_property) -> None:
    config = spoiled / "scheduler" / "scheduler_config.json"
    change(config, prediction_type=prediction, set_alpha_to_one=to_one)
    expected = theirs(live(spoiled), steps, guidance, level)
    options = {"steps": steps, "guidance": guidance, "noise_level": level, "negative_prompt": NEGATIVE}
    adapter = load_adapter("sd_upscaler", spoiled, **options)
    error = gap(ours(adapter), expected)
    record_property("image (1e-5)", f"{error:.2e}")
    assert error <= 1e-5
    assert expected.shape == (2, 3, 48, 32) and expected.std() > 0.05


@pytest.mark.parametrize("guidance", [9.0, 1.0])
def test_the_bound_tells_options_apart(spoiled, guidance) -> None:
    right = {"steps": 3, "guidance": guidance, "noise_level": 20, "negative_prompt": NEGATIVE}
    expected = theirs(live(spoiled), 3, guidance)
    wrong = [{"noise_level": 21}, {"guidance": guidance + 0.5}, {"steps": 4}]
    if guidance != 1:
        wrong.append({"negative_prompt": ""})
    for options in wrong:
        assert gap(ours(load_adapter("sd_upscaler", spoiled, **{**right, **options})), expected) > 1e-4, options
    schedules = {"set_alpha_to_one": "scheduler", "steps_offset": "scheduler", "beta_end": "low_res_scheduler"}
    for key, value in {"set_alpha_to_one": True, "steps_offset": 0, "beta_end": 0.012}.items():
        path = spoiled / schedules[key] / "scheduler_config.json"
        content = path.read_text()
        change(path, **{key: value})
        assert gap(ours(load_adapter("sd_upscaler", spoiled, **right)), expected) > 5e-5, key
        path.write_text(content)


def test_what_a_missing_set_alpha_to_one_means(spoiled) -> None:
    path = spoiled / "scheduler" / "scheduler_config.json"
    config = json.loads(path.read_text())
    del config["set_alpha_to_one"]
    path.write_text(json.dumps(config))
    adapter = load_adapter("sd_upscaler", spoiled, steps=3, negative_prompt=NEGATIVE)
    assert gap(ours(adapter), theirs(live(spoiled), 3, 9.0)) <= 1e-5


def test_the_scaling_factor_is_that_of_diffusers(spoiled) -> None:
    change(spoiled / "vae" / "config.json", scaling_factor=0.5)
    adapter = load_adapter("sd_upscaler", spoiled, steps=3, negative_prompt=NEGATIVE)
    with pytest.warns(FutureWarning, match="0.08333"):
        pipe = live(spoiled)
    assert gap(ours(adapter), theirs(pipe, 3, 9.0)) <= 1e-5


def test_without_noise_the_condition_is_its_mode(folder) -> None:
    adapter = load_adapter("sd_upscaler", folder)
    condition = adapter.encode(LQ)
    alphas = live(folder).low_res_scheduler.alphas_cumprod
    assert condition.control is not None and gap(condition.control, (LQ * 2 - 1) * alphas[20].sqrt()) <= 1e-6
    noise = recorded(LQ)
    noisy = adapter.encode(LQ, generator=noise).control
    assert noisy is not None and noise.left == 1
    spread = (noisy - condition.control) / (1 - alphas[20]).sqrt()
    assert gap(spread, recorded(LQ).take(LQ.shape, None)) <= 1e-4
    assert condition.latents.shape == (2, 4, 12, 8) and condition.size == (48, 32) and adapter.scale == 4
    with pytest.raises(ValueError, match="starts from noise"):
        adapter.start(condition)


def test_negative_prompt_only_with_guidance(folder) -> None:
    assert load_adapter("sd_upscaler", folder, guidance=1).encode(LQ).negative is None
    adapter = load_adapter("sd_upscaler", folder, negative_prompt=NEGATIVE)
    condition = adapter.encode(LQ, PROMPTS)
    expected = adapter.encode(LQ, [NEGATIVE] * 2).text
    assert condition.negative is not None and torch.equal(condition.negative, expected)
    assert not torch.equal(condition.negative, condition.text)


# ---- the contract ----


@pytest.mark.parametrize("steps", [1, 3])
def test_keeps_the_contract(folder, steps) -> None:
    adapter = load_adapter("sd_upscaler", folder, steps=steps)
    assert adapter.noisy_condition and not adapter.deterministic
    check_adapter(adapter)


def test_any_autoencoder(tmp_path) -> None:
    check_adapter(load_adapter("sd_upscaler", tiny_pipeline(tmp_path, autoencoder="dc", family="upscaler"), steps=2))


@pytest.mark.parametrize("size", [(1, 1), (7, 5), (3, 16), (1, 9)])
def test_any_size(folder, size) -> None:
    adapter = load_adapter("sd_upscaler", folder, steps=2)
    lq = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(2))
    sr = ours(adapter, lq)
    assert sr.shape == (1, 3, size[0] * 4, size[1] * 4) and sr.isfinite().all()


def test_gradients_reach_the_lora_and_what_is_decoded(folder) -> None:
    adapter = load_adapter("sd_upscaler", folder, steps=2)
    lora.attach(adapter)
    noise = Draws(0, 0, [0, 1])
    condition = adapter.encode(LQ, PROMPTS, generator=noise)
    with torch.no_grad():
        for name, parameter in lora.parameters(adapter).items():  # B starts at zero, and so would A's gradients
            if "lora_B" in name:
                parameter.fill_(0.01)
    adapter.sample(condition, noise).mean().backward()  # all steps, with guidance, and the decoder
    parameters = lora.parameters(adapter)
    assert parameters and all(p.grad is not None and p.grad.isfinite().all() for p in parameters.values())
    reached = [name for name, p in parameters.items() if p.grad is not None and p.grad.any()]
    assert any("conv_in" in name for name in reached) and any("attn2.to_q" in name for name in reached)
    assert all(parameter.grad is None for parameter in adapter.vae.parameters())
    z = adapter.start(condition, noise).requires_grad_()
    (gradient,) = torch.autograd.grad(adapter.predict(z, adapter.net_t, condition).square().mean(), z)
    assert gradient.isfinite().all() and gradient.any()


def test_half_precision_stays_near(folder) -> None:
    exact, half = (load_adapter("sd_upscaler", folder, steps=2, guidance=2) for _ in range(2))
    half.to("cpu", torch.bfloat16)
    assert 0 < gap(ours(exact), ours(half)) < 0.1


# ---- live pipelines ----


def test_a_live_pipeline_is_shared(folder) -> None:
    pipe = live(folder)
    options = {"steps": 4, "negative_prompt": NEGATIVE, "noise_level": 10}
    adapter = SDUpscaler.from_pipeline(pipe, SDUpscaler.Options(**options))
    loaded = load_adapter("sd_upscaler", folder, **options)
    for own, network in ((adapter.unet, pipe.unet), (adapter.vae, pipe.vae)):
        pairs = zip(own.parameters(), network.parameters(), strict=True)
        assert all(one.data_ptr() == other.data_ptr() for one, other in pairs)
    assert torch.equal(ours(adapter), ours(loaded))
    assert adapter.base_model.fingerprint == loaded.base_model.fingerprint and adapter.base_model.revision == "live"
    lora.attach(adapter)
    assert any("lora_" in name for name, _ in pipe.unet.named_parameters())


def test_a_live_pipeline_stays_as_it_is(folder) -> None:
    pipe = live(folder).to(torch.bfloat16)
    adapter = SDUpscaler.from_pipeline(pipe, SDUpscaler.Options(steps=1))
    assert adapter.dtype == pipe.unet.dtype == pipe.vae.dtype == torch.bfloat16
    assert ours(adapter).dtype == torch.float32


def test_which_pipelines_fit(folder, tiny_base) -> None:
    pipe = live(folder)
    parts = {name: pipe.components[name] for name in ("unet", "vae", "text_encoder", "tokenizer", "scheduler")}
    assert SDUpscaler.fits(pipe)
    assert not SDUpscaler.fits(SimpleNamespace(**parts))
    plain = SimpleNamespace(**{**parts, "unet": load_adapter("osediff", tiny_base).unet}, low_res_scheduler=object())
    assert not SDUpscaler.fits(plain)

    for thing in (None, 3, object(), SimpleNamespace(unet=None, vae=None, low_res_scheduler=None)):
        assert SDUpscaler.fits(thing) is False
    with pytest.raises(UserError, match=r"^SimpleNamespace has no low_res_scheduler: it is no Stable"):
        SDUpscaler.from_pipeline(SimpleNamespace(**parts), SDUpscaler.Options())
    with pytest.raises(UserError, match=r"^int has no low_res_scheduler"):
        SDUpscaler.from_pipeline(3, SDUpscaler.Options())
    pipe.register_to_config(max_noise_level=15)
    with pytest.raises(UserError, match="noise_level is 20, expected 0 to 15"):
        SDUpscaler.from_pipeline(pipe, SDUpscaler.Options())
    pipe.low_res_scheduler.register_to_config(beta_schedule="sigmoid")
    with pytest.raises(UserError, match=r"StableDiffusionUpscalePipeline\.low_res_scheduler': .*sigmoid"):
        SDUpscaler.from_pipeline(pipe, SDUpscaler.Options())


# ---- tiles ----


class Local(SDUpscaler):
    """Predicts each place from what is at that place, and from nothing else."""

    def _predict(self, z_t, t, condition):
        control, text = condition.control, condition.text.mean((1, 2))[:, None, None, None]
        assert control.shape[-2:] == z_t.shape[-2:]
        return 0.5 * z_t + control.mean(1, keepdim=True) + control[:, :1] * text


@pytest.mark.parametrize(("tile", "overlap"), [(6, 3), (5, 0), (8, 7), (9, 2)])
def test_tiles_see_their_part_of_the_image(folder, tile, overlap) -> None:
    whole = ours(Local.load(str(folder), Local.Options(steps=3, negative_prompt=NEGATIVE)))
    cut = Local.load(str(folder), Local.Options(steps=3, negative_prompt=NEGATIVE, tile=tile, tile_overlap=overlap))
    assert cut.tiling is not None and cut.tiling.cuts(LQ)
    assert gap(ours(cut), whole) <= 1e-4


def test_tiles_that_cut_nothing_change_nothing(folder) -> None:
    whole, cut, small = (
        load_adapter("sd_upscaler", folder, steps=2, tile=tile, tile_overlap=2) for tile in (None, 12, 6)
    )
    assert whole.tiling is None and torch.equal(ours(whole), ours(cut))
    assert ours(small).shape == (2, 3, 48, 32) and 0 < gap(ours(small), ours(whole)) < 0.5


# ---- what cannot be used ----


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"noise_level": 50}, "noise_level is 50, expected 0 to 49"),  # as many as the UNet has classes
        ({"noise_level": -1}, "adapter 'sd_upscaler': 'noise_level' is -1: input should be greater than or equal to 0"),
        ({"steps": 0}, "adapter 'sd_upscaler': 'steps' is 0: input should be greater than or equal to 1"),
        ({"steps": 1001}, "steps is 1001, expected 1 to 1000"),
        ({"guidance": 0.5}, "adapter 'sd_upscaler': 'guidance' is 0.5: input should be greater than or equal to 1"),
        ({"guidance": float("inf")}, "adapter 'sd_upscaler': 'guidance' is inf: input should be a finite number"),
        ({"guidance": float("nan")}, "adapter 'sd_upscaler': 'guidance' is nan: input should be a finite number"),
        ({"tile": 8}, "adapter 'sd_upscaler': tile is 8 with an overlap of 16: expected 0 <= overlap < tile"),
        (
            {"tile": 0, "tile_overlap": 0},
            "adapter 'sd_upscaler': tile is 0 with an overlap of 0: expected 0 <= overlap < tile",
        ),
        ({"scale": 4}, "adapter 'sd_upscaler': unknown key 'scale'"),
        ({"noise_level": "much"}, "adapter 'sd_upscaler': 'noise_level' is 'much'"),
    ],
)
def test_bad_options(folder, options, line) -> None:
    with pytest.raises(UserError) as caught:
        load_adapter("sd_upscaler", folder, **options)
    assert str(caught.value).startswith(line) and "\n" not in str(caught.value)


def refusal(base: Path, **options: object) -> str:
    with pytest.raises(UserError) as caught:
        load_adapter("sd_upscaler", base, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_bases_that_are_no_upscaler(spoiled, tiny_base, tmp_path) -> None:
    assert f"base '{tiny_base}' has no folder 'low_res_scheduler/'" in refusal(tiny_base)
    assert "no such folder" in refusal(tmp_path / "nowhere")
    plain = Path(shutil.copytree(tiny_base, tmp_path / "plain"))
    shutil.copytree(spoiled / "low_res_scheduler", plain / "low_res_scheduler")
    assert "the UNet takes 4 channels, but adapter 'sd_upscaler' gives it 4 of latents and 3 more" in refusal(plain)
    change(spoiled / "low_res_scheduler" / "scheduler_config.json", beta_schedule="sigmoid")
    assert "low_res_scheduler/scheduler_config.json': DDPMScheduler has beta_schedule 'sigmoid'" in refusal(spoiled)
    (spoiled / "low_res_scheduler" / "scheduler_config.json").unlink()
    assert "low_res_scheduler/scheduler_config.json' is missing or damaged" in refusal(spoiled)


def test_the_pipeline_s_own_limit_of_the_noise(spoiled) -> None:
    index = spoiled / "model_index.json"
    change(index, max_noise_level=30)
    assert refusal(spoiled, noise_level=31) == "noise_level is 31, expected 0 to 30"
    assert load_adapter("sd_upscaler", spoiled, noise_level=30).options.noise_level == 30
    for content in ("{", "[]", '{"max_noise_level": "many"}'):
        index.write_text(content)
        assert refusal(spoiled) == f"'{index}' is damaged"
    index.unlink()
    assert load_adapter("sd_upscaler", spoiled, noise_level=49).options.noise_level == 49
