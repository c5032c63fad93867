"""What users get wrong: one clear line, exit code 2, nothing changed on the disk, nothing fetched."""

import errno
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from _support import QUICK, Commands, snapshot
from PIL import Image

from rewardsr.hub import connection
from rewardsr.run_folder import LORA

pytestmark = pytest.mark.usefixtures("contacted")


# ---- recipe ----


def test_recipe_that_is_not_there(refused, tmp_path) -> None:
    assert "'nowhere.yaml'" in refused("finetune", "nowhere.yaml")
    assert "Is a directory" in refused("finetune", tmp_path)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("steps: [1", "not valid YAML"),
        ("- steps", "not a mapping"),
        ("!!python/object/apply:os.mkdir [made]", "not valid YAML"),
        ("step: 3", "did you mean 'steps'?"),
        ("optimiser: {learning_rat: 1}", "did you mean 'learning_rate'?"),
        ("{base: b, rewards: [{name: psnr}], data: {train: d}, output: o, steps: many}", "'steps' is 'many'"),
        ("{base: b, rewards: [{name: psnr}], data: {train: d}, output: o}", "'steps' is missing"),
    ],
)
def test_recipe_that_says_nonsense(refused, tmp_path, monkeypatch, text, says) -> None:
    (tmp_path / "recipe.yaml").write_text(text)
    monkeypatch.chdir(tmp_path)
    assert says in refused("finetune", "recipe.yaml")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--adapter", "osedif"), "did you mean 'osediff'?"),
        (("--adapter", "no_such_module:Thing"), "importing no_such_module failed"),
        (("--adapter", "json:dumps"), "expected a subclass of rewardsr.adapter.ISRAdapter"),
        (("--trainer", "gdp"), "did you mean 'gdpo'?"),
        (("--trainer", "json:dumps"), "expected a subclass of rewardsr.trainers.base.Method"),
        (("--rewards", "psn"), "did you mean"),
        (("--rewards", "psnr=much"), "not a number"),
        (("--rewards", ""), "learns from rewards, and the recipe names none"),
        (("--rewards", "json:JSONDecodeErro"), "has no 'JSONDecodeErro'"),
        (("--set", "adapter_options.nois_t=250"), "did you mean 'noise_t'?"),
        (("--set", "adapter_options.noise_t=soon"), "'noise_t' is 'soon'"),
        (("--set", "adapter_options.scale=0"), "scale"),
        (("--set", "adapter_options.noise_t=1000"), "noise_t is 1000, expected 0 to 999"),
        (("--set", "trainer_options.bet=1"), "did you mean 'beta'?"),
        (("--set", "trainer_options.group_size=1"), "group_size"),
        (("--set", 'rewards=[{"name":"ssim","options":{"windo":1}}]'), "reward 'ssim': unknown key 'windo'"),
        (("--set", "rewards.0=psnr"), "'rewards.0' is 'psnr': input should be"),
        (("--set", "steps"), "expected key=value"),
        (("--set", "data.crop=30"), "multiple of the scale"),
        (("--device", "gpu"), "'device' is 'gpu'"),
        (("--set", "adapter_options.noise_t=null"), "set its option noise_t"),
        (("--set", "lora.rank=0"), "lora.rank"),
        (("--set", "lora.init=nowhere.safetensors"), "no LoRA at 'nowhere.safetensors'"),
    ],
)
def test_settings_that_do_not_exist_or_fit(refused, tiny_base, hq_folder, tmp_path, options, says) -> None:
    assert says in refused.finetune(tiny_base, hq_folder, tmp_path / "run", *options)


# ---- data ----


def test_data_that_is_not_there(refused, tiny_base, hq_folder, tmp_path) -> None:
    (tmp_path / "empty").mkdir()
    assert "nowhere" in refused.finetune(tiny_base, tmp_path / "nowhere", tmp_path / "run")
    assert "no images" in refused.finetune(tiny_base, tmp_path / "empty", tmp_path / "run")
    assert "no images" in refused("upscale", tmp_path / "empty", "--base", tiny_base, "-o", tmp_path / "out")
    assert "no image file" in refused("upscale", tmp_path / "x.png", "--base", tiny_base, "-o", tmp_path / "out")
    validation = ("--validation", tmp_path / "empty")
    assert "no images" in refused.finetune(tiny_base, hq_folder, tmp_path / "run", *validation)


@pytest.mark.parametrize("damage", ["truncated", "text", "empty"])
@pytest.mark.parametrize("role", ["data", "validation", "upscale"])
def test_damaged_images_are_named_before_anything_is_written(
    refused, tiny_base, hq_folder, tmp_path, damage, role
) -> None:
    folder = Path(shutil.copytree(hq_folder, tmp_path / "images"))
    whole = (folder / "001.png").read_bytes()
    broken = {"truncated": whole[: len(whole) // 2], "text": b"not an image", "empty": b""}[damage]
    (folder / "001.png").write_bytes(broken)
    if role == "upscale":
        said = refused("upscale", folder, "--base", tiny_base, "--option", "noise_t=250", "-o", tmp_path / "out")
    elif role == "data":
        said = refused.finetune(tiny_base, folder, tmp_path / "run")
    else:
        said = refused.finetune(tiny_base, hq_folder, tmp_path / "run", "--validation", folder)
    assert "001.png" in said


def test_training_images_smaller_than_the_crop(refused, tiny_base, tmp_path) -> None:
    (tmp_path / "images").mkdir()
    Image.new("RGB", (1, 1)).save(tmp_path / "images" / "dot.png")
    assert "dot.png" in refused.finetune(tiny_base, tmp_path / "images", tmp_path / "run")


# ---- output ----


def test_output_with_another_run_in_it(commands: Commands, refused, tiny_base, hq_folder, tmp_path) -> None:
    run = tmp_path / "run"
    assert commands.finetune(tiny_base, hq_folder, run).code == 0
    assert "--resume" in refused.finetune(tiny_base, hq_folder, run)
    another = ("--resume", "--set", "optimiser.learning_rate=1e-3", "--seed", 7)
    assert "another recipe (differs in: optimiser" in refused.finetune(tiny_base, hq_folder, run, *another)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.txt").write_text("years of work")
    for more in ((), ("--resume",)):
        said = refused.finetune(tiny_base, hq_folder, tmp_path / "thesis", *more)
        assert "not empty and holds no run" in said
    (tmp_path / "file").write_text("")
    assert "is a file" in refused.finetune(tiny_base, hq_folder, tmp_path / "file")
    assert "is a file" in refused("upscale", hq_folder, "--base", tiny_base, "-o", tmp_path / "file")


def test_upscale_onto_its_own_input(refused, tiny_base, hq_folder, tmp_path) -> None:
    folder = Path(shutil.copytree(hq_folder, tmp_path / "images"))
    for more in ((), ("--overwrite",)):
        assert "is an input" in refused("upscale", folder, "--base", tiny_base, "-o", folder, *more)


@contextmanager
def full_disk(limit: int):
    """Files cannot grow past `limit` bytes: a real failure of the system's own write, at every level below us."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)


def test_no_space_for_the_first_file(commands: Commands, tiny_base, hq_folder, tmp_path) -> None:
    base = ("--base", tiny_base, "--option", "noise_t=250")
    with full_disk(1000):  # less than a recipe or a picture, more than what the test itself captures
        finetune = commands.finetune(tiny_base, hq_folder, tmp_path / "run")
        upscale = commands("upscale", hq_folder, *base, "-o", tmp_path / "out")
    for answer, name in ((finetune, "recipe.yaml"), (upscale, "000.png")):
        assert answer.code == 2 and "error: cannot write" in answer.err and name in answer.err, answer.err
        assert "Traceback" not in answer.err
    assert not [path for path in tmp_path.rglob("*") if path.is_file()], "no pieces of files"


def test_no_space_later_in_a_run(commands: Commands, tiny_base, hq_folder, tmp_path, monkeypatch) -> None:
    """The log is appended to, the checkpoint is a folder, and merged networks are written by diffusers."""
    assert commands.finetune(tiny_base, hq_folder, tmp_path / "whole").code == 0
    before = snapshot(tmp_path / "whole")
    with full_disk(3000):  # enough for recipe and metrics, too little for a checkpoint
        answer = commands.finetune(tiny_base, hq_folder, tmp_path / "run")
        merged = commands("export", tmp_path / "merged", "--format", "merged", "--run", tmp_path / "whole")
    assert answer.code == 2 and "step-00000002" in answer.err.splitlines()[-1], answer.err
    assert merged.code == 2 and "error: " in merged.err and "Traceback" not in merged.err, merged.err
    assert not (tmp_path / "merged").exists() and not list(tmp_path.glob(".*"))
    assert snapshot(tmp_path / "whole") == before
    assert not list((tmp_path / "run" / "checkpoints").iterdir()) and not (tmp_path / "run" / LORA).exists()
    answer = commands.finetune(tiny_base, hq_folder, tmp_path / "run", "--resume")
    assert answer.code == 0, answer.err


def test_no_space_for_a_line_of_the_log(commands: Commands, tiny_base, hq_folder, tmp_path) -> None:
    with full_disk(2500):
        answer = commands.finetune(tiny_base, hq_folder, tmp_path / "run", "--steps", 12)
    assert answer.code == 2 and "metrics.jsonl" in answer.err.splitlines()[-1], answer.err
    assert "Traceback" not in answer.err
    answer = commands.finetune(tiny_base, hq_folder, tmp_path / "run", "--steps", 12, "--resume")
    assert answer.code == 0, answer.err
    lines = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines == list(range(1, 13))


def test_a_full_disk_noticed_anywhere_is_one_line(commands: Commands, monkeypatch) -> None:
    from rewardsr import doctor

    def full() -> list[str]:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "some/file")

    monkeypatch.setattr(doctor, "examine", full)
    answer = commands("doctor")
    assert (answer.code, answer.err) == (2, "error: No space left on device: 'some/file'\n")


# ---- devices and network ----


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for what is there")
def test_cuda_asked_for_and_absent(refused, tiny_base, hq_folder, tmp_path) -> None:
    assert "--device cpu" in refused.finetune(tiny_base, hq_folder, tmp_path / "run", "--device", "cuda")
    upscale = ("upscale", hq_folder, "--base", tiny_base, "-o", tmp_path / "out")
    assert "device cuda was asked for" in refused(*upscale, "--device", "cuda")
    assert "unknown device 'gpu'" in refused(*upscale, "--device", "gpu")
    assert "unknown precision 'fp16'" in refused(*upscale, "--precision", "fp16")


def on_a_device() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate a lot")


@pytest.mark.parametrize(
    "call",
    [on_a_device, lambda: torch.empty(2**60, dtype=torch.uint8), lambda: bytearray(2**60)],
    ids=["device", "torch", "python"],
)
def test_memory_that_runs_out_is_one_line(commands: Commands, monkeypatch, call) -> None:
    from rewardsr import doctor

    monkeypatch.setattr(doctor, "examine", call)
    answer = commands("doctor")
    assert answer.code == 2 and "out of memory" in answer.err and answer.err.count("\n") == 1


@pytest.mark.parametrize("offline", ["switched off", "no connection"])
def test_a_hub_base_without_network_fails_at_once(
    commands: Commands, contacted, hq_folder, tmp_path, monkeypatch, offline
) -> None:
    if offline == "no connection":
        monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    connection.online.cache_clear()
    began = time.monotonic()
    answer = commands.finetune("stabilityai/stable-diffusion-2-1-base", hq_folder, tmp_path / "run")
    connection.online.cache_clear()
    assert time.monotonic() - began < 5
    assert answer.code == 2 and "the Hub cannot be reached" in answer.err and answer.err.count("\n") == 1, answer.err
    assert len(contacted) == (offline == "no connection"), "one look whether there is a connection, no more"
    assert not (tmp_path / "run").exists()


def test_a_name_that_does_not_resolve_in_time_is_no_connection(monkeypatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)

    def slow(*_: object, **__: object) -> None:
        time.sleep(1.5)
        raise OSError("no such host")

    monkeypatch.setattr(socket, "create_connection", slow)
    connection.online.cache_clear()
    began = time.monotonic()
    assert not connection.online(timeout=0.2)
    assert time.monotonic() - began < 1.2
    connection.online.cache_clear()


def test_a_hub_id_that_cannot_be_one(refused, hq_folder, tmp_path) -> None:
    for name in ("no spaces/please", "user/--name", "a/b/c"):
        assert "base '" in refused.finetune(name, hq_folder, tmp_path / "run")
    assert "'base' is ''" in refused.finetune("", hq_folder, tmp_path / "run")


def test_a_metric_that_needs_a_download(commands: Commands, contacted, tiny_base, hq_folder, tmp_path) -> None:
    pytest.importorskip("pyiqa")
    commands("rewards")
    commands.finetune(tiny_base, hq_folder, tmp_path / "run", rewards="musiq")  # the first call pays for the imports
    began = time.monotonic()
    answer = commands.finetune(tiny_base, hq_folder, tmp_path / "run", rewards="musiq")
    assert time.monotonic() - began < 5
    assert answer.code == 2 and "metric 'musiq'" in answer.err and "weights: PATH" in answer.err
    assert answer.err.count("\n") == 1, answer.err
    assert not contacted and not (tmp_path / "run").exists()


def test_ctrl_c_before_training_begins_is_no_traceback(tiny_base, hq_folder, tmp_path) -> None:
    """While things load there is nothing to save yet."""
    code = (
        "import signal, os, time; from rewardsr import cli; from rewardsr.train import prepare; "
        # Where the tests run in the background of a shell, that has told its children to ignore the signal.
        "signal.signal(signal.SIGINT, signal.default_int_handler); "
        # The sleep is what is interrupted: a signal to a process may take a moment to reach its main thread.
        "prepare.open_folders = lambda *_: (os.kill(os.getpid(), signal.SIGINT), time.sleep(60)); cli.main()"
    )
    settings = [part for setting in QUICK for part in ("--set", setting)]
    options = ["--base", str(tiny_base), "--data", str(hq_folder), "--output", str(tmp_path / "run")]
    command = [sys.executable, "-c", code, "finetune", *options, "--rewards", "psnr", "--steps", "2", *settings]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode in (1, 130), done.stderr  # typer's own, by its version
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()
