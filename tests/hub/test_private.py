"""What a push tells of the machine that a run was made on: nothing, unless it is asked to."""

import io
import json

import pytest
import yaml
from _publishing import REPO, refusal
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors import safe_open
from safetensors.torch import load_file

from rewardsr import run_folder
from rewardsr.hub.publish import push
from rewardsr.places import without_places

SECRET = "ada-of-acme"


@pytest.fixture
def told(run, tmp_path, monkeypatch):
    """A run whose every file names places on its author's disk."""
    home = tmp_path / SECRET
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(home)
    (home / "sub" / "photos").mkdir(parents=True)
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe |= {
        "base": str(home / "models" / "sd"),
        "output": f"{SECRET}/runs/one",
        "adapter_options": {"noise_t": 250, "weights": f"C:\\Users\\{SECRET}\\naosd", "prompt": "a cat and/or a dog"},
        "trainer_options": {"vgg": "~/vgg.pth"},
        "rewards": [{"name": "psnr", "options": {"weights": [f"/mnt/{SECRET}/psnr.pth", f"\\\\{SECRET}\\w.pth"]}}],
        "data": {
            "train": f"../{SECRET}/sub/photos",
            "validation": str(home),
            "prompts": f"a photo of {home}/cat.png, sharp",
        },
        "lora": {"init": "sub/photos"},
    }
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 2, "not_finite": f"reward of {home}/x.png"}) + "\n")
    newest = run / "validation" / "step-00000002.json"
    scores = json.loads(newest.read_text())
    newest.write_text(json.dumps({**scores, "images": [str(home / "a.png"), "b.png"]}))
    texts = PngInfo()
    texts.add_text("Comment", f"made in {home}")
    Image.new("RGB", (8, 8)).save(newest.with_suffix(".png"), pnginfo=texts)
    return run


def test_nothing_that_is_published_names_a_place(told, caplog) -> None:
    caplog.set_level("INFO", "rewardsr")
    before = (told / run_folder.LORA).read_bytes()
    plan = push(told, REPO, dry_run=True).plan
    assert not [name for name, content in plan.files.items() if SECRET.encode() in content or b"/tmp/" in content]
    recipe = yaml.safe_load(plan.files["recipe.yaml"])
    assert recipe["base"] == "sd" and recipe["adapter_options"]["weights"] == "naosd" and recipe["output"] == "one"
    assert recipe["data"]["train"] == "photos" and recipe["data"]["validation"] == "home"
    assert recipe["adapter_options"]["prompt"] == "a cat and/or a dog"
    assert recipe["data"]["prompts"] == "a photo of cat.png, sharp"
    assert recipe["rewards"][0]["options"] == {"weights": ["psnr.pth", "w.pth"]}
    assert recipe["trainer_options"] == {"vgg": "vgg.pth"} and recipe["lora"]["init"] == "photos"
    assert json.loads(plan.files["metrics.jsonl"].splitlines()[-1])["not_finite"] == "reward of x.png"
    assert json.loads(plan.files["samples/validation.json"])["images"] == ["a.png", "b.png"]
    assert Image.open(io.BytesIO(plan.files["samples/validation.png"])).info == {}
    assert plan.files["samples/validation.png"] and (told / run_folder.LORA).read_bytes() == before, "the run stays"

    lines = "\n".join(caplog.messages)
    assert lines == "\n".join(plan.lines()) and "--keep-paths" in lines
    for file, where in (
        ("recipe.yaml", "base"),
        ("recipe.yaml", "rewards.0.options.weights.1"),
        ("metrics.jsonl", "not"),
    ):
        assert f"  {file}, {where}" in lines
    kept = push(told, REPO, dry_run=True, keep_paths=True).plan
    assert (
        not kept.shortened
        and SECRET.encode() in kept.files["recipe.yaml"]
        and SECRET.encode() in kept.files["README.md"]
    )


def test_the_lora_stays_what_it_is(told, tmp_path) -> None:
    sent, again = (push(told, REPO, dry_run=True).plan.files[run_folder.LORA] for _ in range(2))
    assert sent == again, "or each push would make a commit"
    (tmp_path / "sent.safetensors").write_bytes(sent)
    ours, theirs = load_file(told / run_folder.LORA), load_file(tmp_path / "sent.safetensors")
    assert ours.keys() == theirs.keys() and all(bool((ours[name] == theirs[name]).all()) for name in ours)
    with safe_open(tmp_path / "sent.safetensors", "pt") as file, safe_open(told / run_folder.LORA, "pt") as before:
        header, whole = file.metadata(), before.metadata()
    assert header.keys() == whole.keys() and header[run_folder.DIFFUSERS_HEADER] == whole[run_folder.DIFFUSERS_HEADER]
    base, local = (json.loads(one[run_folder.OUR_HEADER])["base"] for one in (header, whole))
    assert base["id"] == "tiny" and base == {**local, "id": "tiny"}


@pytest.mark.parametrize(
    ("text", "published"),
    [
        ("user/name", "user/name"),
        ("user/name + /mnt/x/weights", "user/name + weights"),
        ("https://example.org/a/b", "https://example.org/a/b"),
        ("module:Name", "module:Name"),
        ("embedded", "embedded"),
        ("reference/psnr", "reference/psnr"),
        ("/", "here"),
        ("~", "home"),
        ("~bob", "bob"),
        ("..", "here"),
        ("D:/data/x/", "x"),
        ("cannot read '/mnt/x/y.png': gone", "cannot read 'y.png': gone"),
    ],
)
def test_what_is_a_path(text, published) -> None:
    assert without_places({"a": [text]}, lambda *_: None) == {"a": [published]}


@pytest.mark.parametrize(
    "line",
    ["[]", "3", "null", '{"step": "2"}', '{"step": NaN}', '{"step": 1e999}', '{"step": true}', "[" * 9999, "\xff"],
)
def test_lines_that_are_no_metrics(run, line) -> None:
    (run / "metrics.jsonl").write_bytes(b'{"step": 1}\n' + line.encode("latin-1") + b'\n{"step": 2}\n')
    assert "(line 2)" in refusal(push, run, REPO, dry_run=True)
