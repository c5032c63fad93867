"""The commands, from options to files: `finetune`, and what is done with its LoRA."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from _support import Commands, snapshot
from PIL import Image
from safetensors.torch import load_file

import rewardsr
from rewardsr.data.images import read_image, write_image
from rewardsr.run_folder import LORA


@pytest.fixture
def run(tiny_run) -> Path:
    """Folder of a finished run of three steps; read only."""
    return tiny_run


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory, tiny_base, hq_folder) -> Path:
    folder = tmp_path_factory.mktemp("run") / "run"
    rewardsr.finetune(
        {
            "base": str(tiny_base),
            "adapter_options": {"noise_t": 250},
            "trainer_options": {"group_size": 3},
            "rewards": [{"name": "psnr"}, {"name": "detail"}],
            "data": {"train": str(hq_folder), "crop": 32},
            "optimiser": {"learning_rate": 0.01},  # so that three steps are visible in the pictures
            "output": str(folder),
            "steps": 3,
            "device": "cpu",
        }
    )
    return folder


def pictures(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.png"))}


# ---- finetune ----


def test_finetune_leaves_a_run(commands: Commands, tiny_base, hq_folder, tmp_path) -> None:
    answer = commands.finetune(tiny_base, hq_folder, tmp_path / "run", "--validation", hq_folder)
    assert answer.code == 0, answer.err
    assert f"finished 2 steps: {tmp_path / 'run'}" in answer.out
    assert (tmp_path / "run" / LORA).is_file()
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2, 2]  # held-out images are scored before and after
    panel = {"lq_consistency", "high_frequency", "color_shift", "clipping", "periodic_pattern"}
    assert set(lines[-1]["validation"]) == {"psnr", "detail", "ssim"} | panel
    assert (tmp_path / "run" / "validation" / "step-00000002.png").is_file()
    assert f"look at it: {tmp_path / 'run' / 'report.html'}" in answer.out
    page = (tmp_path / "run" / "report.html").read_text()
    assert '"LQ",' in page and "ssim (validation)" in page and "group_size: 3" in page and "<dt>torch</dt>" in page
    again = commands(
        "report", tmp_path / "run", tmp_path / "run", "-o", tmp_path / "two.html", "--plots", tmp_path / "plots"
    )
    assert again.code == 0, again.err
    assert '"runs":["run","run (2)"]' in (tmp_path / "two.html").read_text()
    assert (tmp_path / "plots" / "psnr-validation.png").read_bytes().startswith(b"\x89PNG")


def test_report_refuses_before_it_writes(commands: Commands, tmp_path, monkeypatch) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.yaml").write_text("steps: 1\n")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    before = snapshot(tmp_path)
    for arguments, said in (
        ((run, run), "several runs"),
        ((tmp_path / "absent",), "no such run or evaluation"),
        ((tmp_path / "full",), "neither the folder of a run"),
        ((run, "-o", tmp_path / "page.png"), "let the name end in .html"),
        ((run, "--plots", tmp_path / "full"), "is not empty"),
    ):
        answer = commands("report", *arguments)
        assert answer.code == 2 and said in answer.err and len(answer.err.splitlines()) == 1, answer.err
    monkeypatch.setattr("rewardsr.evaluation.page.plots.find_spec", lambda name: None)
    answer = commands("report", run, "--plots", tmp_path / "plots")
    assert answer.code == 2 and "pip install 'rewardsr[plots]'" in answer.err
    assert snapshot(tmp_path) == before


def test_options_override_the_recipe_and_set_comes_last(commands: Commands, tiny_base, hq_folder, tmp_path) -> None:
    recipe = tmp_path / "recipe.yaml"
    content = {
        "base": "nowhere",
        "output": "nowhere",
        "steps": 50,
        "data": {"train": "nowhere"},
        "rewards": [{"name": "ssim"}],
        "optimiser": {"learning_rate": 5e-3, "warmup": 1},
    }
    recipe.write_text(yaml.safe_dump(content))
    answer = commands(
        *("finetune", recipe, "--base", tiny_base, "--data", hq_folder, "--output", tmp_path / "run"),
        *("--steps", 9, "--set", "steps=1", "--set", "data.crop=32", "--set", "adapter_options.noise_t=250"),
        *("--rewards", "psnr", "--set", "optimiser.learning_rate=5e-4", "--set", "trainer_options.group_size=2"),
    )
    assert answer.code == 0, answer.err
    resolved = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())
    assert (resolved["steps"], resolved["base"], resolved["data"]["train"]) == (1, str(tiny_base), str(hq_folder))
    assert resolved["rewards"] == [{"name": "psnr", "weight": 1.0, "options": {}}]
    assert resolved["optimiser"]["learning_rate"] == 5e-4, "YAML 1.1 takes 5e-4 for text"
    assert resolved["optimiser"]["warmup"] == 1, "what is not overridden stays"
    assert resolved["lora"]["alpha"] == 8, "defaults are written out"


def test_the_resolved_recipe_runs_again_to_the_same_lora(commands: Commands, run, tmp_path) -> None:
    answer = commands("finetune", run / "recipe.yaml", "--output", tmp_path / "again")
    assert answer.code == 0, answer.err
    one, other = (load_file(folder / LORA) for folder in (run, tmp_path / "again"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_dry_run_measures_and_writes_nothing(commands: Commands, tiny_base, hq_folder, tmp_path) -> None:
    before = snapshot(tmp_path)
    answer = commands.finetune(tiny_base, hq_folder, tmp_path / "run", "--dry-run")
    assert answer.code == 0, answer.err
    assert "one step:" in answer.out and "peak memory" in answer.out
    assert f"would save {tmp_path / 'run' / LORA}" in answer.out
    assert snapshot(tmp_path) == before


def test_dry_run_tells_the_size_of_the_lora(commands: Commands, run, tmp_path) -> None:
    answer = commands("finetune", run / "recipe.yaml", "--dry-run", "--output", tmp_path / "x")
    told = float(answer.out.split(f"{LORA} (")[1].split(" MiB")[0])
    assert abs(told - (run / LORA).stat().st_size / 2**20) < 0.1


def test_a_run_on_another_device_than_the_one_before(commands: Commands, tiny_base, hq_folder, tmp_path) -> None:
    """accelerate remembers the device of a process; whoever goes on in a notebook would be stuck with it."""
    from accelerate.state import AcceleratorState, PartialState

    PartialState(cpu=True)
    AcceleratorState(cpu=True)
    for remembered in (PartialState._shared_state, AcceleratorState._shared_state):
        remembered["device"] = torch.device("cuda", 0)
    answer = commands.finetune(tiny_base, hq_folder, tmp_path / "run")
    assert answer.code == 0, answer.err
    assert PartialState().device == torch.device("cpu")


def test_prompts_from_sidecar_files(commands: Commands, tiny_base, hq_folder, tmp_path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for image in hq_folder.iterdir():
        (data / image.name).write_bytes(image.read_bytes())
        (data / f"{image.stem}.txt").write_text(f"a photo of {image.stem}")
    answer = commands.finetune(tiny_base, data, tmp_path / "run", "--set", "data.prompts=sidecar")
    assert answer.code == 0, answer.err
    base = ("upscale", data, "--base", tiny_base, "--option", "noise_t=250")
    assert commands(*base, "-o", tmp_path / "own", "--prompts", "sidecar").code == 0
    assert commands(*base, "-o", tmp_path / "one", "--prompts", "something else entirely").code == 0
    assert pictures(tmp_path / "own") != pictures(tmp_path / "one"), "the text must reach the network"
    (data / "000.txt").unlink()
    answer = commands(*base, "-o", tmp_path / "none", "--prompts", "sidecar")
    assert answer.code == 2 and "000.png" in answer.err and not (tmp_path / "none").exists()


# ---- upscale ----


def test_a_run_is_upscaled_with_its_lora(commands: Commands, run, hq_folder, tmp_path) -> None:
    for name, more in (("tuned", ()), ("base", ("--strength", 0)), ("again", ())):
        answer = commands("upscale", hq_folder, "--run", run, "-o", tmp_path / name, *more)
        assert answer.code == 0, answer.err
    assert answer.out.count("/3 ") == 3
    tuned, base = pictures(tmp_path / "tuned"), pictures(tmp_path / "base")
    assert set(tuned) == {"000.png", "001.png", "002.png"}
    assert tuned == pictures(tmp_path / "again")
    assert all(tuned[name] != base[name] for name in tuned)
    plain = ("--base", yaml.safe_load((run / "recipe.yaml").read_text())["base"], "--option", "noise_t=250")
    assert commands("upscale", hq_folder, *plain, "-o", tmp_path / "plain").code == 0
    assert pictures(tmp_path / "plain") == base, "strength 0 is the base, bit for bit"


def strange_images(folder: Path) -> dict[str, tuple[int, int]]:
    """Readable images of every kind, and their heights and widths."""
    random = np.random.default_rng(0)
    images = {
        "one_pixel": Image.new("RGB", (1, 1), (200, 30, 60)),
        "gray": Image.fromarray(random.integers(0, 256, (9, 14), dtype=np.uint8)),
        "rgba": Image.fromarray(random.integers(0, 256, (10, 7, 4), dtype=np.uint8)),
        "deep": Image.fromarray(random.integers(0, 65536, (8, 12), dtype=np.uint16)),
        "odd": Image.fromarray(random.integers(0, 256, (13, 17, 3), dtype=np.uint8)),
        "line": Image.fromarray(random.integers(0, 256, (1, 23, 3), dtype=np.uint8)),
    }
    folder.mkdir()
    for name, image in images.items():
        image.save(folder / f"{name}.png")
    return {name: (image.height, image.width) for name, image in images.items()}


@pytest.mark.parametrize("scale", [4, 1])
def test_every_readable_image_comes_out_at_exactly_scale(commands: Commands, tiny_base, scale, tmp_path) -> None:
    sizes = strange_images(tmp_path / "in")
    base = ("--base", tiny_base, "--option", "noise_t=250", "--option", f"scale={scale}")
    answer = commands("upscale", tmp_path / "in", *base, "-o", tmp_path / "out")
    assert answer.code == 0, answer.err
    for name, (height, width) in sizes.items():
        assert tuple(read_image(tmp_path / "out" / f"{name}.png").shape) == (3, scale * height, scale * width), name


def test_colour_fixes_bring_the_colours_back(commands: Commands, tiny_base, tmp_path) -> None:
    image = torch.tensor([0.8, 0.2, 0.4]).view(3, 1, 1) + torch.linspace(-0.1, 0.1, 24)
    write_image(image.expand(3, 24, 24), tmp_path / "in" / "pink.png")
    distance = {}
    for fix in ("none", "adain", "wavelet"):
        base = ("--base", tiny_base, "--color-fix", fix)
        assert commands("upscale", tmp_path / "in" / "pink.png", *base, "-o", tmp_path / fix).code == 0
        out = read_image(tmp_path / fix / "pink.png").mean((1, 2))
        distance[fix] = float((out - torch.tensor([0.8, 0.2, 0.4])).abs().max())
    assert distance["adain"] < 0.02 and distance["wavelet"] < 0.05 < distance["none"], distance


def test_earlier_results_are_kept_unless_asked(commands: Commands, tiny_base, hq_folder, tmp_path) -> None:
    arguments = ("upscale", hq_folder / "000.png", "--base", tiny_base, "-o", tmp_path / "out")
    assert commands(*arguments).code == 0
    before = snapshot(tmp_path)
    answer = commands(*arguments)
    assert answer.code == 0 and answer.out == "1 of 1 results are there already and are kept\n"
    assert snapshot(tmp_path) == before
    answer = commands(*arguments, "--seed", 1, "--option", "noise_t=250")
    assert answer.code == 2 and "000.png" in answer.err and "of other settings" in answer.err
    assert snapshot(tmp_path) == before
    assert commands(*arguments, "--overwrite").code == 0


# ---- evaluate, merge ----


def test_evaluate_compares_base_and_tuned(commands: Commands, run, hq_folder, tmp_path) -> None:
    options = ("--run", run, "--metrics", "psnr, detail", "--limit", 2, "--draws", 2)
    answer = commands("evaluate", hq_folder, *options, "-o", tmp_path / "scores")
    assert answer.code == 0, answer.err
    assert "psnr" in answer.out and "detail" in answer.out
    scores = json.loads((tmp_path / "scores" / "evaluation.json").read_text())
    assert scores["images"] == ["000.png", "001.png"] and scores["draws_per_image"] == 2
    base, tuned = scores["systems"].values()
    assert base["psnr"]["scores"] != tuned["psnr"]["scores"]
    repeated = commands("evaluate", hq_folder, *options)
    assert repeated.out.splitlines() == answer.out.splitlines()[:-1]


def test_merged_networks_give_the_tuned_pictures(commands: Commands, run, hq_folder, tiny_base, tmp_path) -> None:
    answer = commands("export", tmp_path / "merged", "--format", "merged", "--run", run)
    assert answer.code == 0, answer.err
    assert {path.name for path in (tmp_path / "merged").iterdir()} == {"unet", "vae"}
    tuned = rewardsr.load_lora(rewardsr.load_adapter("osediff", str(tiny_base), noise_t=250), run)
    merged = rewardsr.load_adapter("osediff", str(tiny_base), weights=str(tmp_path / "merged"), noise_t=250)
    rewardsr.upscale(tuned, [hq_folder], tmp_path / "a")
    rewardsr.upscale(merged, [hq_folder], tmp_path / "b")
    for name in pictures(tmp_path / "a"):
        one, other = (read_image(tmp_path / folder / name) for folder in ("a", "b"))
        assert float((one - other).abs().max()) <= 1 / 255 + 1e-6, "one rounding of 8 bits at most"
    before = snapshot(tmp_path)
    assert commands("export", tmp_path / "merged", "--format", "merged", "--run", run).code == 2, (
        "never into an existing folder"
    )
    assert snapshot(tmp_path) == before


def test_an_option_of_the_command_line_overrides_the_runs(commands: Commands, run, hq_folder, tmp_path) -> None:
    answer = commands("upscale", hq_folder / "000.png", "--run", run, "--option", "scale=1", "-o", tmp_path)
    assert answer.code == 0, answer.err
    assert tuple(read_image(tmp_path / "000.png").shape) == (3, 48, 48)


# ---- lists, doctor, help ----


def test_lists(commands: Commands) -> None:
    assert "osediff" in commands("adapters").out
    rewards = commands("rewards").out
    names = "psnr ssim detail detail_correlation sharpness lq_consistency perceptual imagereward musiq"
    assert all(name in rewards for name in names.split())


def test_a_plug_in_that_does_not_load_is_listed_with_the_reason(commands: Commands, monkeypatch) -> None:
    from importlib.metadata import EntryPoint

    from rewardsr import plugins

    broken = EntryPoint("broken", "no_such_module_at_all:Thing", "rewardsr.adapters")
    monkeypatch.setattr(plugins, "_registered", lambda kind: {"broken": broken})
    answer = commands("adapters")
    assert answer.code == 0 and "broken" in answer.out and "does not load" in answer.out


def test_doctor_names_versions_devices_and_connection(commands: Commands) -> None:
    answer = commands("doctor")
    assert answer.code == 0
    assert all(name in answer.out for name in ("torch", "diffusers", "peft", "CPU", "cuda", "Hub"))
    assert "not reachable" in answer.out, "HF_HUB_OFFLINE is set in the tests"


@pytest.mark.parametrize(("rank", "out", "err"), [("0", "by the way\n", "warning: careful\n"), ("1", "", "")])
def test_messages_of_the_package_are_shown_once_by_the_main_process(
    commands: Commands, capfd, monkeypatch, rank, out, err
) -> None:
    monkeypatch.setenv("RANK", rank)
    for _ in range(2):
        assert commands("rewards").code == 0
    logger = logging.getLogger("rewardsr.somewhere")
    logger.info("by the way")
    logger.warning("careful")
    assert tuple(capfd.readouterr()) == (out, err)


def test_version_and_help(commands: Commands) -> None:
    assert commands("--version").out.strip() == rewardsr.__version__
    answer = commands("finetune", "--help")
    assert answer.code == 0 and "--gradient-checkpointing" in answer.out


def test_help_needs_no_heavy_imports() -> None:
    code = (
        "import sys; from rewardsr.cli import app; app(['--help'], standalone_mode=False); "
        "print(sorted({'torch', 'diffusers', 'transformers', 'peft', 'numpy', 'pyiqa'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip().endswith("[]")


def test_python_dash_m_answers_like_the_command(tmp_path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "rewardsr", "finetune", "no_such_recipe.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=300)
    assert done.returncode == 2
    assert done.stderr.splitlines() == ["error: recipe 'no_such_recipe.yaml': No such file or directory"]
    assert not list(tmp_path.iterdir())
