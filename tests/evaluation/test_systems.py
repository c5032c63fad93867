"""Several systems on the same images: runs, LoRAs at strengths, bases, bicubic, folders of images."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from _support import Commands, snapshot
from torch.nn import functional as F

import rewardsr
from rewardsr import cli, lora
from rewardsr.batch import Batch
from rewardsr.data.images import read_image, write_image
from rewardsr.evaluation.asked import Pipelines, asked_for
from rewardsr.evaluation.report import Evaluation
from rewardsr.rewards.fidelity import PSNR
from rewardsr.testing import write_images

CPU = ("--device", "cpu", "--metrics", "psnr,sharpness")


@pytest.fixture(scope="module")
def made(tiny_base, tmp_path_factory) -> Path:
    """Images, pairs of them, and two runs on one base that differ in rank and weights."""
    folder = tmp_path_factory.mktemp("systems")
    write_images(folder / "hq", count=3, size=48)
    for file in sorted((folder / "hq").iterdir()):
        hq = read_image(file)
        write_image(hq, folder / "pairs" / "gt" / file.name)
        lq = F.interpolate(hq[None], scale_factor=0.25, mode="bicubic", antialias=True).clamp(0, 1)
        write_image(lq, folder / "pairs" / "lq" / file.name)
    for name, rank, reward, margin in (("one", 2, "psnr", 0.03), ("two", 3, "sharpness", 0.02)):
        adapter = rewardsr.load_adapter("osediff", tiny_base, noise_t=250)
        lora.attach(adapter, rank=rank)
        for key, parameter in lora.parameters(adapter).items():
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(rank + len(key)))
        lora.save(adapter, folder / name)
        recipe = {"base": str(tiny_base), "adapter_options": {"noise_t": 250}, "rewards": [{"name": reward}]}
        recipe["guards"] = [{"name": "ssim", "margin": margin}, "lq_consistency"]
        recipe |= {"data": {"train": "images"}, "output": name, "steps": 1, "device": "cpu", "seed": 3}
        (folder / name / "recipe.yaml").write_text(json.dumps(recipe))
    return folder


def read(folder: Path) -> Evaluation:
    return Evaluation.read(folder / "evaluation.json")


@pytest.fixture(scope="module")
def everything(made, tmp_path_factory) -> Path:
    """What one command leaves of all kinds of systems."""
    out = tmp_path_factory.mktemp("out") / "all"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(made)
        arguments = ["evaluate", "pairs", "--run", "one", "--run", "again=two", "--lora", "one:0.5"]
        arguments += ["--lora", "sum=one:0.5+one:0.5", "--bicubic", "--images", "perfect=hq", "--draws", "2"]
        patch.setattr("sys.argv", ["rewardsr", *arguments, *CPU, "-o", str(out)])
        with pytest.raises(SystemExit) as left:
            cli.main()
        assert not left.value.code
    return out


def test_all_systems_see_the_same_images_and_noise(everything, made) -> None:
    found = read(everything)
    assert list(found.scores) == ["base", "one", "again", "one:0.5", "sum", "bicubic", "perfect"]
    assert found.trained_on == ("psnr", "sharpness") and found.draws_per_image == 2 and found.seed == 3
    assert found.margins == {}, "it was trained on both"
    adapter, recipe = rewardsr.pipelines.open_run(str(made / "one"), device="cpu")
    alone = rewardsr.evaluate(
        adapter, made / "pairs", ["psnr", "sharpness"], seed=3, draws_per_image=2, protocol=recipe.data
    )
    assert alone.scores == {"base": found.scores["base"], "tuned": found.scores["one"]}
    assert alone.margins == {"psnr": 1.0}
    half, _ = rewardsr.pipelines.open_run(str(made / "one"), device="cpu", strength=0.5)
    other = rewardsr.evaluate(half, made / "pairs", ["psnr", "sharpness"], seed=3, draws_per_image=2)
    assert other.scores["tuned"] == found.scores["one:0.5"]
    assert found.scores["sum"]["psnr"] == pytest.approx(found.scores["one"]["psnr"], abs=1e-3)
    assert found.scores["again"] != found.scores["one"]
    assert found.scores["perfect"]["psnr"] == pytest.approx([80.0] * 3)
    for place, name in enumerate(found.images):
        lq, hq = (read_image(made / "pairs" / kind / name)[None] for kind in ("lq", "gt"))
        enlarged = F.interpolate(lq, scale_factor=4, mode="bicubic", antialias=True).clamp(0, 1)
        assert found.scores["bicubic"]["psnr"][place] == pytest.approx(float(PSNR()(enlarged, Batch(lq, hq))), abs=1e-4)


def test_what_was_done_is_recorded(everything, made) -> None:
    found = read(everything)
    settings = found.settings
    assert settings["protocol"]["name"] == "plain" and settings["protocol"]["changed"] == ["metrics"]
    assert settings["data"]["images"][0] == {"name": "000.png", "width": 48, "height": 48}
    assert settings["versions"]["rewardsr"] == rewardsr.__version__ and settings["versions"]["torch"]
    assert settings["systems"]["one:0.5"]["strength"] == 0.5 and settings["systems"]["bicubic"] == {"kind": "bicubic"}
    hashes = found.weights
    assert hashes["base"]["base"] == hashes["one"]["base"] == hashes["again"]["base"] and "lora" not in hashes["base"]
    assert len({hashes[name]["lora"] for name in ("one", "again", "one:0.5", "sum")}) == 4
    files = {path.name for path in everything.iterdir()}
    assert files == {"evaluation.json", "scores.csv", "table.md", "table.tex", "pictures", "report.html"}
    assert {path.name for path in (everything / "pictures").iterdir()} == {*found.scores, "LQ", "HQ"}
    assert len((everything / "scores.csv").read_text().splitlines()) == 1 + 3 * 7
    assert "trained on" in (everything / "table.md").read_text()


def test_margins_are_those_of_the_recipes_or_the_metrics_own(made, commands: Commands, monkeypatch, tmp_path) -> None:
    monkeypatch.chdir(made)
    metrics = ("--device", "cpu", "--limit", 1, "--metrics", "ssim,lq_consistency,color_shift")
    assert commands("evaluate", "pairs", "--run", "one", "--run", "two", *metrics, "-o", tmp_path / "runs").code == 0
    assert read(tmp_path / "runs").margins == {"ssim": 0.02, "lq_consistency": 0.01, "color_shift": 2.0}
    assert commands("evaluate", "pairs", "--bicubic", "--images", "hq", *metrics, "-o", tmp_path / "none").code == 0
    assert read(tmp_path / "none").margins["ssim"] != 0.02


def test_running_again_gives_the_same_bytes_and_nothing_else_is_overwritten(
    everything, made, commands: Commands, monkeypatch, tmp_path
) -> None:
    monkeypatch.chdir(made)
    command = ["evaluate", "pairs", "--run", "one", "--bicubic", *CPU, "-o", tmp_path / "x"]
    assert commands(*command).code == 0
    before = snapshot(tmp_path / "x")
    (tmp_path / "x" / "table.md").unlink()
    again = commands(*command)
    assert again.code == 0, again.err
    assert snapshot(tmp_path / "x") == before
    for more, said in (
        (["--seed", 4], "of other settings (seed: 3 there, 4 here)"),
        (["--color-fix", "adain"], "of other settings (protocol.color_fix: 'none' there, 'adain' here)"),
        (["--images", "hq"], "of other settings (systems.hq: None there"),
    ):
        answer = commands(*command, *more)
        assert answer.code == 2 and said in answer.err and answer.err.count("\n") == 1, answer.err
        assert snapshot(tmp_path / "x") == before
    # An interrupted one goes on: it left its settings, and no scores.
    content = json.loads((tmp_path / "x" / "evaluation.json").read_text())
    (tmp_path / "x" / "evaluation.json").write_text(json.dumps({"unfinished": True, "settings": content["settings"]}))
    assert commands(*command).code == 0 and snapshot(tmp_path / "x") == before


def test_another_lora_of_the_same_name_is_noticed(made, commands: Commands, tmp_path) -> None:
    run = shutil.copytree(made / "one", tmp_path / "run")
    command = ("evaluate", made / "pairs", "--run", run, "--limit", 1, *CPU, "-o", tmp_path / "x")
    assert commands(*command).code == 0
    before = snapshot(tmp_path / "x")
    shutil.copyfile(next((made / "two").glob("*.safetensors")), next(run.glob("*.safetensors")))
    answer = commands(*command)
    assert answer.code == 2 and "evaluation of another 'run' (its lora has changed since)" in answer.err
    assert snapshot(tmp_path / "x") == before


def test_a_base_alone_and_none(made, commands: Commands, tiny_base, tmp_path) -> None:
    options = ("--base", tiny_base, "--option", "noise_t=250", "--limit", 2, *CPU)
    answer = commands("evaluate", made / "pairs", *options, "-o", tmp_path / "x")
    assert answer.code == 0 and list(read(tmp_path / "x").scores) == ["base"], answer.err
    answer = commands("evaluate", made / "pairs", "--run", made / "one", "--bicubic", "--no-base", *CPU, "--limit", 2,
                      "-o", tmp_path / "y")  # fmt: skip
    assert answer.code == 0 and list(read(tmp_path / "y").scores) == ["one", "bicubic"], answer.err
    api = rewardsr.evaluate(rewardsr.load_adapter("osediff", tiny_base, noise_t=250), made / "pairs", limit=1)
    assert list(api.scores) == ["base"] and "base" in str(api)


def test_lq_alone_for_metrics_without_hq(made, commands: Commands, tmp_path) -> None:
    shutil.copytree(made / "pairs" / "lq", tmp_path / "only" / "lq")
    command = ("evaluate", tmp_path / "only", "--bicubic", "--images", f"hq={made / 'hq'}", "--device", "cpu")
    answer = commands(*command, "--metrics", "sharpness", "-o", tmp_path / "x")
    assert answer.code == 0, answer.err
    assert not (tmp_path / "x" / "pictures" / "HQ").exists() and (tmp_path / "x" / "pictures" / "LQ").is_dir()
    answer = commands(*command)
    assert answer.code == 2 and "psnr, ssim compare with an HQ image" in answer.err


def test_images_of_others_are_cut_as_the_data(made, commands: Commands, tmp_path) -> None:
    answer = commands("evaluate", made / "hq", "--images", made / "hq", "--side", 20, *CPU, "-o", tmp_path / "x")
    assert answer.code == 0, answer.err
    assert read(tmp_path / "x").scores["hq"]["psnr"] == pytest.approx([80.0] * 3)
    assert read_image(tmp_path / "x" / "pictures" / "hq" / "000.png").shape == (3, 20, 20)
    answer = commands("evaluate", made / "hq", "--images", tmp_path / "x" / "pictures" / "hq", "--side", 20, *CPU)
    assert answer.code == 0 and "80.0000" in answer.out, answer.err


def test_bad_input_is_one_line_before_any_work(made, refused, tmp_path) -> None:
    def said(*arguments: object) -> str:
        return refused("evaluate", made / "pairs", *CPU, *arguments, "-o", tmp_path / "out")

    assert "nothing to evaluate" in said()
    (tmp_path / "few").mkdir()
    shutil.copy(made / "hq" / "000.png", tmp_path / "few")
    assert "has no image for 2 of 3 images of the data (001, 002)" in said("--images", tmp_path / "few")
    shutil.copytree(made / "hq", tmp_path / "other")
    write_image(torch.zeros(3, 48, 44), tmp_path / "other" / "001.png")
    assert "001.png' is 44x48 pixels, expected 48x48" in said("--images", tmp_path / "other")
    (tmp_path / "other" / "000.jpg").write_bytes((made / "hq" / "000.png").read_bytes())
    assert "are of one name" in said("--images", tmp_path / "other")
    assert "no folder" in said("--images", f"x={tmp_path / 'nowhere'}")
    assert "nowhere" in said("--run", tmp_path / "nowhere")
    assert "say on which pipeline the LoRA sits" in said("--lora", made / "one")
    assert "a system cannot be called 'HQ'" in said("--images", f"HQ={made / 'hq'}")
    assert "expected NAME.KEY=VALUE" in said("--bicubic", "--metric-option", "psnr")
    assert "no system carries one" in said("--bicubic", "--cast")
    shutil.copytree(made / "hq", tmp_path / "out")
    assert "holds something else than an evaluation" in said("--bicubic")


def test_pairs_that_do_not_fit(made, refused, tmp_path) -> None:
    shutil.copytree(made / "pairs", tmp_path / "pairs")
    write_image(torch.zeros(3, 40, 48), tmp_path / "pairs" / "gt" / "001.png")
    assert "001.png" in refused("evaluate", tmp_path / "pairs", "--bicubic", *CPU, "-o", tmp_path / "out")
    (tmp_path / "pairs" / "gt" / "001.png").unlink()
    assert "001" in refused("evaluate", tmp_path / "pairs", "--bicubic", *CPU, "-o", tmp_path / "out")


def test_names_of_systems(made, tiny_base, monkeypatch) -> None:
    monkeypatch.chdir(made)
    asked = asked_for(Pipelines(), ["one", "one", "x=one:0.5", "two:0"], ["one+two:2"], ["hq"])
    assert list(asked.systems) == ["base", "one", "one-2", "x", "two:0", "one+two:2", "hq"]
    elsewhere = asked_for(
        Pipelines(base=str(tiny_base), options=["noise_t=100"]), [], ["one/pytorch_lora_weights.safetensors"]
    )
    assert list(elsewhere.systems) == ["base", "one"] and elsewhere.recipe is None
