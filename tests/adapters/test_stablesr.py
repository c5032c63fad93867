"""The StableSR adapter: what its output depends on, its LoRA under the modulation, checkpointing, tiles."""

import pytest
import torch
from torch import Tensor

from rewardsr import Batch, Draws, UserError, load_adapter, lora
from rewardsr.adapters._sft import ModulatedBlock, modulated
from rewardsr.adapters.stablesr import respaced
from rewardsr.lora import exchange
from rewardsr.testing import check_adapter, tiny_pipeline


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return str(tiny_pipeline(tmp_path_factory.mktemp("base") / "stablesr", family="stablesr"))


def image(rows: int = 1, side: int = 8, seed: int = 1) -> Tensor:
    return torch.rand(rows, 3, side, side, generator=torch.Generator().manual_seed(seed))


def sample(adapter, lq: Tensor, prompt: str = "") -> Tensor:
    draws = Draws(0, 0, range(len(lq)))
    with torch.no_grad():
        return adapter.sample(adapter.encode(Batch(lq, prompts=(prompt,) * len(lq)), generator=draws), draws)


def shake(adapter, amount: float = 0.05) -> None:
    """A LoRA that does something."""
    lora.attach(adapter)
    random = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in lora.parameters(adapter).values():
            parameter.add_(amount * torch.randn(parameter.shape, generator=random))


@pytest.mark.parametrize("start_point", ["lq", "noise"])
def test_contract(folder, start_point) -> None:
    check_adapter(load_adapter("stablesr", folder, steps=3, start_point=start_point))


def test_one_step_is_sampled_as_well(folder) -> None:
    adapter = load_adapter("stablesr", folder, steps=1)
    assert adapter.steps == (0,) and not adapter.deterministic
    assert sample(adapter, image()).isfinite().all()


def test_lq_text_and_start_all_matter(folder) -> None:
    adapter = load_adapter("stablesr", folder, steps=2)
    noise = load_adapter("stablesr", folder, steps=2, start_point="noise")
    first = sample(adapter, image())
    for other in (sample(adapter, image(seed=2)), sample(adapter, image(), "a cat"), sample(noise, image())):
        assert float((other - first).abs().max()) > 1e-4
    # From noise, the LQ image is seen through the features alone.
    assert float((sample(noise, image()) - sample(noise, image(seed=2))).abs().max()) > 1e-4


def test_the_encoder_is_told_the_time(folder) -> None:
    adapter = load_adapter("stablesr", folder)
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    early, late = (adapter.struct_encoder(latents, torch.tensor([t, t])) for t in (999, 0))
    mixed = adapter.struct_encoder(latents, torch.tensor([999, 0]))
    assert sorted(early) == [4, 8]
    for width in early:
        assert float((early[width] - late[width]).abs().max()) > 1e-3
        assert torch.allclose(mixed[width], torch.stack([early[width][0], late[width][1]]), atol=1e-6)


def test_a_unet_without_features_says_so(folder) -> None:
    adapter = load_adapter("stablesr", folder)
    z, text = torch.zeros(1, 4, 8, 8), torch.zeros(1, 4, 16)
    with pytest.raises(ValueError, match="needs the features"):
        adapter.unet(z, 0, text)
    modulated(adapter.unet, adapter.struct_encoder(z, torch.tensor([0])), z, 0, text)
    with pytest.raises(ValueError, match="needs the features"):
        adapter.unet(z, 0, text)


# ---- LoRA ----


def test_lora_sits_on_attentions_and_convolutions_but_not_on_the_modulation(folder) -> None:
    adapter = load_adapter("stablesr", folder)
    lora.attach(adapter)
    modules = {name.rpartition(".lora_")[0] for name in lora.parameters(adapter)}
    assert any(name.endswith("resnets.0.conv2") for name in modules)
    assert any(name.endswith("attn1.to_q") for name in modules)
    assert not any("spade" in name or name.startswith("struct_encoder") for name in modules)


@torch.no_grad()
def test_the_modulation_comes_after_the_lora_of_conv2(folder) -> None:
    """A LoRA that is merged into the weights must change the output as it does beside them."""
    adapter, other = (load_adapter("stablesr", folder) for _ in range(2))
    condition = adapter.encode(image(), generator=Draws(0, 0, [0]))
    z = adapter.start(condition, Draws(0, 0, [0]))
    before = adapter.predict(z, 500, condition)
    shake(adapter, 0.1)
    beside = adapter.predict(z, 500, condition)
    lora.attach(other)
    lora.load_state_dict(other, lora.state_dict(adapter))
    lora.merge(other)
    merged = other.predict(z, 500, condition)
    assert not any("lora" in name for name in other.unet.state_dict())
    assert float((beside - before).abs().max()) > 1e-2
    assert float((merged - beside).abs().max()) < 1e-5
    # The trap: a hook on conv2 stays with the wrapped convolution.
    blocks = [module for module in adapter.unet.modules() if isinstance(module, ModulatedBlock)]
    assert blocks and all(hasattr(block.conv2, "base_layer") for block in blocks)


def test_a_saved_lora_loads_and_merged_networks_load_as_weights(folder, tmp_path) -> None:
    adapter = load_adapter("stablesr", folder, steps=2)
    base = sample(adapter, image())
    shake(adapter)
    tuned = sample(adapter, image())
    assert float((tuned - base).abs().max()) > 1e-3
    lora.save(adapter, tmp_path / "lora")
    fresh = load_adapter("stablesr", folder, steps=2)
    lora.load(fresh, tmp_path / "lora")
    assert torch.equal(sample(fresh, image()), tuned)
    exchange.export(adapter, tmp_path / "merged", "merged")
    again = load_adapter("stablesr", folder, weights=tmp_path / "merged", steps=2)
    assert float((sample(again, image()) - tuned).abs().max()) < 1e-4


@pytest.mark.parametrize("between", [False, True])
def test_gradient_checkpointing_changes_memory_and_nothing_else(folder, between) -> None:
    """Also where the UNet is called with other features before the gradients are asked for."""

    def run(checkpointing: bool) -> tuple[dict[str, Tensor], int]:
        adapter = load_adapter("stablesr", folder)
        shake(adapter)
        if checkpointing:
            assert adapter.enable_gradient_checkpointing() == []
        condition = adapter.encode(image(), generator=Draws(0, 0, [0]))
        z, kept = adapter.start(condition, Draws(0, 0, [0])), 0

        def count(tensor: Tensor) -> Tensor:
            nonlocal kept
            kept += tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            loss = adapter.predict(z, 500, condition).square().mean()
        if between:
            other = adapter.encode(image(seed=5), generator=Draws(0, 0, [0]))
            with torch.no_grad(), lora.reference(adapter):
                adapter.predict(z, 10, other)
        loss.backward()
        return {name: parameter.grad for name, parameter in lora.parameters(adapter).items()}, kept

    plain, whole = run(False)
    saved, less = run(True)
    assert less < whole / 2
    for name, gradient in plain.items():
        assert torch.allclose(saved[name], gradient, atol=1e-7, rtol=1e-4), name


def test_half_precision_stays_near(folder) -> None:
    exact, half = (load_adapter("stablesr", folder, dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    condition = exact.encode(image(), generator=Draws(0, 0, [0]))
    z = exact.start(condition, Draws(0, 0, [0]))
    with torch.no_grad():
        one, other = exact.predict(z, 500, condition), half.predict(z, 500, condition)
    assert other.dtype == torch.float32 and 0 < float((other - one).abs().max()) < 0.05 * float(one.abs().max())


# ---- sizes, tiles, times ----


def test_any_image_is_padded_to_what_the_levels_need(folder) -> None:
    adapter = load_adapter("stablesr", folder, steps=1)
    assert adapter.size_multiple == 8  # four pixels a latent, two levels
    for size in ((1, 1), (5, 7), (9, 16)):
        sr = sample(adapter, torch.rand(1, 3, *size))
        assert sr.shape == (1, 3, 4 * size[0], 4 * size[1])
    condition = adapter.encode(image(), generator=Draws(0, 0, [0]))
    with pytest.raises(ValueError, match="latents are 7 x 8, expected multiples of 2"):
        adapter.predict(torch.zeros(1, 4, 7, 8), 0, condition)


@pytest.mark.parametrize("weights", ["centred", "original"])
def test_tiles_see_their_part_of_the_lq_latents(folder, weights) -> None:
    """Against the weighted mean of the tiles, each predicted as an image of its own."""
    adapter = load_adapter("stablesr", folder, tile=8, tile_overlap=4, tile_weights=weights)
    condition = adapter.encode(torch.rand(1, 3, 12, 16, generator=torch.Generator().manual_seed(4)))
    assert condition.latents.shape == (1, 4, 12, 16)
    z = adapter.start(condition, Draws(0, 0, [0]))
    total, weight = torch.zeros_like(z, dtype=torch.float64), torch.zeros(12, 16, dtype=torch.float64)
    places = torch.arange(8, dtype=torch.float64)
    gaussians = [
        torch.exp(-(((places - centre) / 8) ** 2) / 0.02) for centre in (4 if weights == "original" else 3.5, 3.5)
    ]
    window = torch.outer(*gaussians)
    with torch.no_grad():
        for top in (0, 4):
            for left in (0, 4, 8):
                part = (slice(top, top + 8), slice(left, left + 8))
                alone = condition.window(*part)
                assert torch.equal(alone.latents, condition.latents[..., part[0], part[1]])
                total[..., part[0], part[1]] += window * adapter.predict(z[..., part[0], part[1]], 500, alone)
                weight[part] += window
        stitched = adapter._stitched(z, 500, condition)
    assert torch.allclose(stitched.double(), total / weight, atol=1e-5)
    whole = load_adapter("stablesr", folder, tile=None)
    with torch.no_grad():
        assert not torch.allclose(whole.predict(z, 500, condition), stitched, atol=1e-3)


def test_times_hold_both_ends() -> None:
    assert respaced(1, 1000) == (0,)
    assert respaced(1000, 1000) == tuple(range(999, -1, -1))
    assert respaced(200, 1000)[:3] == (999, 994, 989)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"steps": 0}, "'steps' is 0"),
        ({"steps": 1001}, "steps is 1001, expected 1 to 1000"),
        ({"tile": 7, "tile_overlap": 3}, "tile is 7, expected a multiple of 2 latents"),
        ({"tile": 8, "tile_overlap": 8}, "expected 0 <= overlap < tile"),
        ({"scale": 0}, "'scale' is 0"),
        ({"start_point": "middle"}, "start_point"),
        ({"guidance": 2}, "guidance"),
    ],
)
def test_options_that_cannot_work(folder, options, says) -> None:
    with pytest.raises(UserError, match=says):
        load_adapter("stablesr", folder, **options)


def test_live_pipelines_are_refused() -> None:
    from rewardsr.adapters.stablesr import StableSR

    with pytest.raises(UserError, match="takes no live pipelines"):
        StableSR.from_pipeline(object(), StableSR.Options())
