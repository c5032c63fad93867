"""From training to somebody else's pipeline, by commands alone, over a Hub on 127.0.0.1."""

import diffusers
import pytest
import torch
from _publishing import REPO, sent
from safetensors.torch import load_file
from transformers import CLIPTextModel, CLIPTokenizer

from rewardsr import load_adapter, load_lora, run_folder
from rewardsr.data.images import read_image
from rewardsr.testing import tiny_pipeline


def test_finetune_push_pull_and_use(commands, hub, tiny_base, hq_folder, tmp_path) -> None:
    run = tmp_path / "run"
    assert commands.finetune(tiny_base, hq_folder, run, "--validation", hq_folder).code == 0
    shown = commands("push", run, "ada/crisp", "--dry-run")
    assert shown.out.count("bytes  recipe.yaml") == 1  # each file once
    assert shown.code == 0 and "README.md" in shown.out and "nothing was sent" in shown.out
    answer = commands("push", run, "ada/crisp", "--base-model", "ada/base", "--license", "openrail++")
    assert answer.code == 0, answer.err
    assert answer.out.strip().splitlines()[-1].startswith(hub.url)
    found = commands("search", "crisp")
    assert found.code == 0 and "ada/crisp" in found.out and "ada/base" in found.out
    assert "ada/crisp" not in commands("search", "--base", "ada/other").out

    answer = commands("pull", "ada/crisp", "-o", tmp_path / "pulled")
    assert answer.code == 0, answer.err
    pulled = tmp_path / "pulled"
    theirs, ours = (load_file(folder / run_folder.LORA) for folder in (pulled, run))
    assert theirs.keys() == ours.keys() and all(torch.equal(theirs[name], ours[name]) for name in ours)
    assert commands("pull", "ada/crisp", "-o", tmp_path / "pulled").code == 2

    picture = hq_folder / "000.png"
    results = {}
    for name, source in {
        "run": ("--run", run),
        "reference as a run": ("--run", "ada/crisp"),
        "reference as a LoRA": ("--lora", "ada/crisp@main"),
        "weighted": ("--lora", "ada/crisp:1.0"),
        "in halves": ("--lora", "ada/crisp:0.5", "--lora", f"{run}:0.5"),
    }.items():
        # The base was a local one: where it lies here, a published recipe cannot say.
        where = () if source[1] == run else ("--base", tiny_base)
        where += () if source[0] == "--run" else ("--option", "noise_t=250")
        answer = commands("upscale", picture, *source, *where, "-o", tmp_path / name, "--device", "cpu")
        assert answer.code == 0, answer.err
        results[name] = read_image(tmp_path / name / "000.png")
    halves = results.pop("in halves")
    assert all(torch.equal(image, results["run"]) for image in results.values())
    assert float((halves - results["run"]).abs().max()) < 1.5 / 255  # summed in another order, then rounded to 8 bit


def test_the_python_side_takes_references_and_pipelines(hub, finished, tiny_base) -> None:
    sent(finished)
    pipe = diffusers.StableDiffusionPipeline(
        vae=diffusers.AutoencoderKL.from_pretrained(tiny_base / "vae"),
        text_encoder=CLIPTextModel.from_pretrained(tiny_base / "text_encoder"),
        tokenizer=CLIPTokenizer.from_pretrained(tiny_base / "tokenizer"),
        unet=diffusers.UNet2DConditionModel.from_pretrained(tiny_base / "unet"),
        scheduler=diffusers.DDPMScheduler.from_pretrained(tiny_base / "scheduler"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    random = torch.Generator().manual_seed(0)
    z, text = torch.randn(1, 4, 8, 8, generator=random), torch.randn(1, 7, 16, generator=random)

    @torch.no_grad()
    def eps(unet) -> torch.Tensor:
        return unet(z, 100, text).sample

    before = eps(pipe.unet)
    load_lora(pipe, REPO, scale=0.7)
    other = load_adapter("osediff", tiny_base, noise_t=250)
    load_lora(other, finished, scale=0.7)
    assert torch.equal(eps(pipe.unet), eps(other.unet)) and not torch.equal(eps(pipe.unet), before)
    several = load_adapter("osediff", tiny_base, noise_t=250)
    load_lora(several, {REPO: 0.3, str(finished): 0.4})
    assert torch.allclose(eps(several.unet), eps(other.unet), atol=1e-5)


def test_mistakes_cost_one_line(hub, refused, tiny_base, hq_folder, tmp_path) -> None:
    upscale = ("upscale", hq_folder, "--base", tiny_base, "-o", tmp_path / "out")
    assert "weight is not a finite number" in refused(*upscale, "--lora", "ada/nothing:nan")
    assert "recipe.yaml" in refused("push", tmp_path, "ada/crisp")
    assert "not empty" in refused("pull", "ada/crisp", "-o", hq_folder)


@pytest.mark.parametrize("reference", [REPO, "ada/nothing"])
def test_another_base_and_no_such_repository_are_refused_by_name(
    commands, hub, finished, tiny_base, hq_folder, tmp_path, reference
) -> None:
    sent(finished)
    other = tiny_pipeline(tmp_path / "other", seed=5)
    answer = commands("upscale", hq_folder, "--base", other, "--lora", reference, "-o", tmp_path / "out")
    named = [f"'{tiny_base.name}' (local)", str(other)] if reference == REPO else [reference]
    assert answer.code == 2 and all(name in answer.err for name in named) and answer.err.count("\n") == 1, answer.err
    assert not (tmp_path / "out").exists()
