"""The SeeSR adapter: where embeddings and tags come from, its LoRA, live pipelines, tiles, and what it refuses."""

import json
import shutil
from pathlib import Path

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

import rewardsr
from rewardsr import Batch, Draws, UserError, load_adapter, lora
from rewardsr.adapters.seesr import _load, add_image_attentions
from rewardsr.lora import exchange
from rewardsr.testing import check_adapter

WEIGHTS = "diffusion_pytorch_model.safetensors"


def tokens(rows: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, 10, 512, generator=torch.Generator().manual_seed(seed))


def image(rows: int = 1, side: int = 16) -> torch.Tensor:
    return torch.rand(rows, 3, side, side, generator=torch.Generator().manual_seed(1))


def sample(adapter, batch: Batch) -> torch.Tensor:
    draws = Draws(0, 0, range(len(batch)))
    with torch.no_grad():
        return adapter.sample(adapter.encode(batch, generator=draws), draws)


@pytest.fixture
def copy(tiny_seesr, tmp_path) -> Path:
    return Path(shutil.copytree(tiny_seesr, tmp_path / "seesr"))


def test_contract(tiny_seesr) -> None:
    check_adapter(load_adapter("seesr", tiny_seesr, steps=3, tagger="taggers:Means"))


def test_start_from_noise_keeps_the_contract_too(tiny_seesr) -> None:
    check_adapter(load_adapter("seesr", tiny_seesr, steps=2, start_point="noise", tagger="taggers:Means", guidance=1))


def test_what_comes_with_the_image_goes_before_the_tagger(tiny_seesr) -> None:
    alone = load_adapter("seesr", tiny_seesr, steps=2)
    tagged = load_adapter("seesr", tiny_seesr, steps=2, tagger="taggers:Means")
    given = Batch(image(), prompts=("a cat",), extras={"ram": tokens()})
    assert torch.equal(sample(alone, given), sample(tagged, given))
    by_tagger = tagged.encode(Batch(image()))
    assert not torch.equal(by_tagger.extras["ram"], tokens())
    same = alone.encode(Batch(image(), prompts=("bird, tree",), extras={"ram": by_tagger.extras["ram"]}))
    assert torch.equal(by_tagger.text, same.text)


def test_embeddings_tags_and_lq_all_matter(tiny_seesr) -> None:
    adapter = load_adapter("seesr", tiny_seesr, steps=2)
    first = sample(adapter, Batch(image(), prompts=("a cat",), extras={"ram": tokens()}))
    for other in (
        Batch(image(), prompts=("a cat",), extras={"ram": tokens(seed=1)}),
        Batch(image(), prompts=("a dog",), extras={"ram": tokens()}),
        Batch(image().flip(-1), prompts=("a cat",), extras={"ram": tokens()}),
    ):
        assert float((sample(adapter, other) - first).abs().max()) > 1e-4


def test_prompts(tiny_seesr) -> None:
    adapter = load_adapter("seesr", tiny_seesr, prompt="sea")
    bare = load_adapter("seesr", tiny_seesr, template="{tags}")
    extras = {"ram": tokens()}

    def text(of, prompt: str | None) -> torch.Tensor:
        return of.encode(Batch(image(), prompts=None if prompt is None else (prompt,), extras=extras)).text

    assert torch.equal(text(adapter, "bird"), text(bare, "bird, ,clean, high-resolution, 8k"))
    assert torch.equal(text(adapter, None), text(bare, "sea, ,clean, high-resolution, 8k"))
    assert torch.equal(text(adapter, ""), text(bare, ""))  # no text means none, as text dropout asks for


def test_lora_sits_on_image_attentions_and_controlnet(tiny_seesr, tmp_path) -> None:
    adapter = load_adapter("seesr", tiny_seesr, steps=2)
    lora.attach(adapter)
    names = list(lora.parameters(adapter))
    assert all(".image_attentions." in name for name in names if name.startswith("unet."))
    assert any(name.startswith("controlnet.controlnet_down_blocks.") for name in names)
    assert any(name.startswith("controlnet.conv_in.") for name in names)
    assert not any("time_emb" in name for name in names)
    batch = Batch(image(), extras={"ram": tokens()})
    before = sample(adapter, batch)
    with torch.no_grad():
        for parameter in lora.parameters(adapter).values():
            parameter.add_(0.05)
    after = sample(adapter, batch)
    assert float((after - before).abs().max()) > 1e-3
    lora.save(adapter, tmp_path / "lora")
    fresh = load_adapter("seesr", tiny_seesr, steps=2)
    lora.load(fresh, tmp_path / "lora")
    assert torch.equal(sample(fresh, batch), after)
    with lora.reference(fresh):
        assert torch.equal(sample(fresh, batch), before)


def test_merged_networks_load_as_weights(tiny_seesr, tmp_path) -> None:
    adapter = load_adapter("seesr", tiny_seesr, steps=2)
    lora.attach(adapter)
    with torch.no_grad():
        for parameter in lora.parameters(adapter).values():
            parameter.add_(0.02)
    batch = Batch(image(), extras={"ram": tokens()})
    tuned = sample(adapter, batch)
    exchange.export(adapter, tmp_path / "merged", "merged")
    again = load_adapter("seesr", tiny_seesr, weights=tmp_path / "merged", steps=2)
    assert float((sample(again, batch) - tuned).abs().max()) < 1e-4


def test_old_attention_names_of_the_autoencoder(tiny_seesr, copy) -> None:
    """The released SD 2 base names its attention query, key, value and proj_attn."""
    path = copy / "vae" / WEIGHTS
    state = load_file(path)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for name, value in state.items():
        for new, former in old.items():
            name = name.replace(f".attentions.0.{new}.", f".attentions.0.{former}.")
        renamed[name] = value
    assert renamed.keys() != state.keys()
    save_file(renamed, path)
    new, former = (load_adapter("seesr", folder).vae.state_dict() for folder in (tiny_seesr, copy))
    assert new.keys() == former.keys()
    assert all(torch.equal(value, former[name]) for name, value in new.items())


def test_gradient_checkpointing_changes_memory_and_nothing_else(tiny_seesr) -> None:
    def run(checkpointing: bool) -> tuple[dict[str, torch.Tensor], int]:
        adapter = load_adapter("seesr", tiny_seesr, steps=2)
        lora.attach(adapter)
        if checkpointing:
            assert adapter.enable_gradient_checkpointing() == []
        condition = adapter.encode(Batch(image(), extras={"ram": tokens()}))
        z = adapter.start(condition, Draws(0, 0, [0]))
        kept = 0

        def count(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal kept
            kept += tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            sr = adapter.to_image(adapter.predict(z, 501, condition))
        sr.square().mean().backward()
        return {name: value.grad for name, value in lora.parameters(adapter).items()}, kept

    (plain, all_kept), (checkpointed, some_kept) = run(False), run(True)
    assert some_kept < 0.7 * all_kept
    assert all(torch.allclose(plain[name], checkpointed[name], rtol=1e-4, atol=1e-9) for name in plain)
    assert any(bool(value.any()) for value in checkpointed.values())


@torch.no_grad()
def test_tiles(tiny_seesr) -> None:
    batch = Batch(image(side=32), extras={"ram": tokens()})  # latents of 16 x 16
    whole = load_adapter("seesr", tiny_seesr, steps=2, tile=None)
    large = load_adapter("seesr", tiny_seesr, steps=2, tile=16, tile_overlap=4)
    tiled = load_adapter("seesr", tiny_seesr, steps=2, tile=8, tile_overlap=4)
    released = load_adapter("seesr", tiny_seesr, steps=2, tile=8, tile_overlap=4, tile_weights="original")
    assert torch.equal(sample(whole, batch), sample(large, batch))
    results = [sample(adapter, batch) for adapter in (whole, tiled, released)]
    assert results[1].shape == results[0].shape
    assert not torch.equal(results[0], results[1]) and not torch.equal(results[1], results[2])
    # A network that looks at single places only: tiles must then change nothing.
    tiled._predict = lambda z, t, condition: z + condition.control[:, :1, ::8, ::8]
    condition = tiled.encode(batch)
    z = tiled.start(condition, Draws(0, 0, [0]))
    assert torch.allclose(tiled._stitched(z, 501, condition), tiled.predict(z, 501, condition), atol=1e-6)


# ---- live pipelines ----


def pipeline(folder: str) -> diffusers.StableDiffusionControlNetPipeline:
    """diffusers' own ControlNet pipeline, with SeeSR's networks."""
    from transformers import CLIPTextModel, CLIPTokenizer

    path = Path(folder)
    return diffusers.StableDiffusionControlNetPipeline(
        vae=diffusers.AutoencoderKL.from_pretrained(path / "vae"),
        text_encoder=CLIPTextModel.from_pretrained(path / "text_encoder"),
        tokenizer=CLIPTokenizer.from_pretrained(path / "tokenizer"),
        unet=_load(path / "unet", "UNet2DConditionModel"),
        controlnet=_load(path / "controlnet", "ControlNetModel"),
        scheduler=diffusers.DDPMScheduler.from_pretrained(path / "scheduler"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def test_a_live_pipeline_is_shared(tiny_seesr) -> None:
    pipe = pipeline(tiny_seesr)
    adapter = rewardsr.wrap(pipe, steps=2)
    assert adapter.name == "seesr"
    assert adapter.unet is pipe.unet and adapter.controlnet is pipe.controlnet and adapter.vae is pipe.vae
    batch = Batch(image(), extras={"ram": tokens()})
    assert torch.equal(sample(adapter, batch), sample(load_adapter("seesr", tiny_seesr, steps=2), batch))


class Native(diffusers.UNet2DConditionModel):
    """A UNet that takes image embeddings as an argument, as SeeSR's own class does."""

    def forward(self, *arguments, image_encoder_hidden_states=None, **options):
        self.seen = image_encoder_hidden_states
        return super().forward(*arguments, **options)


def test_a_network_that_takes_embeddings_itself(tiny_seesr) -> None:
    pipe = pipeline(tiny_seesr)
    native = Native(**{k: v for k, v in pipe.unet.config.items() if not k.startswith("_") and "image_cross" not in k})
    add_image_attentions(native, 512)
    del native.image_tokens  # what tells ours from theirs
    native.load_state_dict(pipe.unet.state_dict())
    pipe.unet = native
    adapter = rewardsr.wrap(pipe, steps=2)
    condition = adapter.encode(Batch(image(), extras={"ram": tokens()}))
    for block in (native.mid_block, *native.down_blocks, *native.up_blocks):
        for text in getattr(block, "attentions", ()):
            text._forward_hooks.clear()
    adapter.predict(adapter.start(condition, Draws(0, 0, [0])), 501, condition)
    assert torch.equal(native.seen, tokens())


# ---- bad input ----


def refused(*arguments, **options) -> str:
    with pytest.raises(UserError) as caught:
        adapter = load_adapter("seesr", *arguments, **options)
        adapter.encode(Batch(image()))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_missing_and_misshapen_embeddings(tiny_seesr) -> None:
    said = refused(tiny_seesr)
    assert "ram" in said and "safetensors" in said and "tagger" in said
    assert "(1, 10, 256)" in refused(tiny_seesr, tagger="taggers:narrow")
    adapter = load_adapter("seesr", tiny_seesr)
    for wrong in (torch.zeros(1, 10, 511), torch.zeros(1, 512), torch.zeros(2, 10, 512)):
        with pytest.raises(UserError, match="512"):
            adapter.encode(Batch(image(), extras={"ram": wrong}))
    with pytest.raises(UserError, match="not finite"):
        adapter.encode(Batch(image(), extras={"ram": torch.full((1, 10, 512), torch.nan)}))


def test_options_that_cannot_work(tiny_seesr) -> None:
    assert "'guidance' is 0.5" in refused(tiny_seesr, guidance=0.5)
    assert "'steps' is 0" in refused(tiny_seesr, steps=0)
    assert "steps is 1001" in refused(tiny_seesr, steps=1001)
    assert "overlap" in refused(tiny_seesr, tile=8, tile_overlap=8)
    assert "start_point" in refused(tiny_seesr, start_point="lr")
    assert "nowhere" in refused(tiny_seesr, tagger="nowhere:Tagger")
    assert "cannot be made without arguments: TypeError" in refused(tiny_seesr, tagger="taggers:Demanding")
    assert "did you mean 'tagger'" in refused(tiny_seesr, taggr="taggers:Means")


def test_folders_that_are_no_seesr(tiny, tiny_seesr, copy) -> None:
    assert "controlnet" in refused(tiny)  # a plain Stable Diffusion folder
    for part in ("unet", "controlnet"):
        path = copy / part / WEIGHTS
        whole = load_file(path)
        save_file({name: value for name, value in whole.items() if "image_attentions" not in name}, path)
        assert "image_attentions" in refused(copy)
        missing = dict(whole)
        del missing["conv_in.weight"]
        save_file(missing, path)
        assert "conv_in.weight" in refused(copy)
        path.write_bytes(path.read_bytes()[:1000])
        assert "damaged" in refused(copy)
        save_file(whole, path)
    config = copy / "controlnet" / "config.json"
    config.write_text("{")
    assert "config.json" in refused(copy)


def test_unet_and_controlnet_of_different_sizes(copy) -> None:
    config = json.loads((copy / "controlnet" / "config.json").read_text())
    config.pop("use_image_cross_attention")
    other = diffusers.ControlNetModel.from_config({**config, "block_out_channels": [8, 16]})
    add_image_attentions(other, 512)
    other.save_pretrained(copy / "controlnet")
    assert "do not fit each other: block_out_channels" in refused(copy)
    narrow = diffusers.ControlNetModel.from_config(config)
    add_image_attentions(narrow, 256)
    narrow.save_pretrained(copy / "controlnet")
    assert "widths 512 and 256" in refused(copy)


def test_scheduler_of_an_unknown_prediction_type(copy) -> None:
    path = copy / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"prediction_type": "flow"}))
    assert "prediction type 'flow'" in refused(copy)
