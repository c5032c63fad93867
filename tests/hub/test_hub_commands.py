"""From training to somebody else's pipeline, by commands alone, over a Hub on 127.0.0.1."""

import pytest
import torch
import yaml

from rewardsr import load_adapter, load_lora, run_folder
from rewardsr.data.images import read_image


def test_finetune_push_pull_and_use(commands, hub, tiny_base, hq_folder, tmp_path) -> None:
    run = tmp_path / "run"
    assert commands.finetune(tiny_base, hq_folder, run, "--validation", hq_folder).code == 0
    shown = commands("push", run, "ada/crisp", "--dry-run")
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
    assert (pulled / run_folder.LORA).read_bytes() == (run / run_folder.LORA).read_bytes()
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
        where = () if source[0] == "--run" else ("--base", tiny_base, "--option", "noise_t=250")
        answer = commands("upscale", picture, *source, *where, "-o", tmp_path / name, "--device", "cpu")
        assert answer.code == 0, answer.err
        results[name] = read_image(tmp_path / name / "000.png")
    halves = results.pop("in halves")
    assert all(torch.equal(image, results["run"]) for image in results.values())
    assert float((halves - results["run"]).abs().max()) < 1.5 / 255  # summed in another order, then rounded to 8 bit


def test_the_python_side_takes_references_and_pipelines(commands, hub, tiny_base, hq_folder, tmp_path) -> None:
    import diffusers
    from transformers import CLIPTextModel, CLIPTokenizer

    run = tmp_path / "run"
    assert commands.finetune(tiny_base, hq_folder, run, "--set", "optimiser.learning_rate=0.01").code == 0
    assert commands("push", run, "ada/crisp").code == 0
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
    load_lora(pipe, "ada/crisp", scale=0.7)
    other = load_adapter("osediff", tiny_base, noise_t=250)
    load_lora(other, run, scale=0.7)
    assert torch.equal(eps(pipe.unet), eps(other.unet)) and not torch.equal(eps(pipe.unet), before)
    several = load_adapter("osediff", tiny_base, noise_t=250)
    load_lora(several, {"ada/crisp": 0.3, str(run): 0.4})
    assert torch.allclose(eps(several.unet), eps(other.unet), atol=1e-5)


def test_mistakes_cost_one_line(commands, hub, tiny_base, hq_folder, tmp_path, monkeypatch) -> None:
    def refused(*arguments: object) -> str:
        answer = commands(*arguments)
        assert answer.code == 2 and answer.err.count("\n") == 1, answer.err + answer.out
        return answer.err

    upscale = ("upscale", hq_folder, "--base", tiny_base, "-o", tmp_path / "out")
    assert "ada/nothing" in refused(*upscale, "--lora", "ada/nothing")
    assert "weight is not a finite number" in refused(*upscale, "--lora", "ada/nothing:nan")
    assert "recipe.yaml" in refused("push", tmp_path, "ada/crisp")
    run = tmp_path / "run"
    assert commands.finetune(tiny_base, hq_folder, run).code == 0
    monkeypatch.delenv("HF_TOKEN")
    said = refused("push", run, "ada/crisp")
    assert "no token" in said and "hf upload" in said
    ready = {path.name for path in (run / "hub").iterdir()}
    assert {"README.md", run_folder.LORA, "recipe.yaml"} <= ready and "checkpoints" not in ready
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("key", "value"), [("adapter", "torch:hub"), ("adapter_options", {"tagger": "webbrowser:open"})]
)
def test_a_run_from_the_hub_chooses_no_code(commands, hub, tiny_base, hq_folder, tmp_path, key, value) -> None:
    run = tmp_path / "run"
    assert commands.finetune(tiny_base, hq_folder, run).code == 0
    recipe = yaml.safe_load((run / "recipe.yaml").read_text()) | {key: value}
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert commands("push", run, "ada/crisp").code == 0
    answer = commands("upscale", hq_folder, "--run", "ada/crisp", "-o", tmp_path / "out")
    assert answer.code == 2 and "names code" in answer.err and answer.err.count("\n") == 1, answer.err
    assert not (tmp_path / "out").exists()


def test_another_base_is_refused_with_both_names(commands, hub, tiny_base, hq_folder, tmp_path) -> None:
    from rewardsr.testing import tiny_pipeline

    run = tmp_path / "run"
    assert commands.finetune(tiny_base, hq_folder, run).code == 0
    assert commands("push", run, "ada/crisp").code == 0
    other = tiny_pipeline(tmp_path / "other", seed=5)
    answer = commands("upscale", hq_folder, "--base", other, "--lora", "ada/crisp", "-o", tmp_path / "out")
    assert answer.code == 2 and str(tiny_base) in answer.err and str(other) in answer.err


def test_export_and_import_by_command(commands, tiny_base, hq_folder, tmp_path) -> None:
    run = tmp_path / "run"
    assert commands.finetune(tiny_base, hq_folder, run).code == 0
    for form, files in {
        "diffusers": {run_folder.LORA},
        "kohya": {"lora.safetensors"},
        "peft": {"adapter_config.json", "adapter_model.safetensors"},
    }.items():
        answer = commands("export", tmp_path / form, "--run", run, "--format", form)
        assert answer.code == 0, answer.err
        assert {path.name for path in (tmp_path / form).rglob("*") if path.is_file()} == files
    source = tmp_path / "kohya" / "lora.safetensors"
    answer = commands("import", "lora", source, tmp_path / "back", "--base", tiny_base, "--option", "noise_t=250")
    assert answer.code == 0 and "rank 4, alpha 8" in answer.out, answer.err
    upscale = ("upscale", hq_folder / "000.png", "--base", tiny_base, "--option", "noise_t=250", "--device", "cpu")
    for name, where in {"one": run, "two": tmp_path / "back"}.items():
        assert commands(*upscale, "--lora", where, "-o", tmp_path / name).code == 0
    assert (tmp_path / "one" / "000.png").read_bytes() == (tmp_path / "two" / "000.png").read_bytes()
    assert commands("export", tmp_path / "x", "--run", run, "--format", "onnx").code == 2
    assert commands("export", tmp_path / "x", "--run", run, "--format", "osediff").code == 2
    assert not (tmp_path / "x").exists()
