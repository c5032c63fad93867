"""Going on with an interrupted `upscale`, what of it is kept, and images that fail on the way."""

import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from _support import snapshot
from PIL import Image

from rewardsr import load_adapter, lora
from rewardsr.data.images import read_image, write_image
from rewardsr.errors import UserError
from rewardsr.evaluation import upscale as module
from rewardsr.evaluation.record import CLAIM, FILE
from rewardsr.evaluation.upscale import upscale


def image(seed: int, *shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def load(base: Path, **options: object):
    return load_adapter("osediff", base, **{"noise_t": 250, "net_t": 100, "scale": 4, **options})


@pytest.fixture
def folder(tmp_path) -> Path:
    for number in range(3):
        write_image(image(number, 3, 6, 8), tmp_path / "in" / f"{number}.png")
    return tmp_path / "in"


@pytest.fixture(scope="module")
def adapter(tiny_base):
    return load(tiny_base)


def results(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.png"))}


def made(caplog) -> list[str]:
    """Names of the results that were computed, since the last call."""
    names = [Path(message.split()[1]).name for message in caplog.messages if "/3 " in message]
    caplog.clear()
    return names


@pytest.fixture
def log(caplog):
    caplog.set_level("INFO", "rewardsr")
    return caplog


def test_the_same_call_goes_on_and_ends_as_one_that_was_never_interrupted(adapter, folder, tmp_path, log) -> None:
    upscale(adapter, folder, tmp_path / "straight")
    whole = results(tmp_path / "straight")
    assert made(log) == ["0.png", "1.png", "2.png"]
    upscale(adapter, folder / "0.png", tmp_path / "out")
    assert upscale(adapter, folder, tmp_path / "out") == [tmp_path / "out" / f"{n}.png" for n in range(3)]
    assert "1 of 3 results are there already and are kept" in log.messages
    assert made(log) == ["1.png", "2.png"]
    assert results(tmp_path / "out") == whole
    (tmp_path / "out" / "1.png").unlink()
    upscale(adapter, folder, tmp_path / "out")
    assert made(log) == ["1.png"] and results(tmp_path / "out") == whole
    upscale(adapter, folder, tmp_path / "out", overwrite=True)
    assert len(made(log)) == 3 and results(tmp_path / "out") == whole


KILLED = """
import os, signal, sys
from rewardsr import storage
from rewardsr.cli import main
original, calls = os.fsync, []

def fsync(file):  # of each result
    calls.append(None)
    if len(calls) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    original(file)

os.fsync = fsync
main()
"""


def test_a_killed_one_leaves_nothing_that_is_in_the_way(commands, tiny_base, folder, tmp_path) -> None:
    command = ("upscale", folder, "--base", tiny_base, "--device", "cpu", "-o")
    for where in ("straight", "out"):
        process = [sys.executable, "-c", KILLED, *map(str, command), tmp_path / where]
        if where == "straight":
            assert commands(*command, tmp_path / where).code == 0
        else:
            assert subprocess.run(process, capture_output=True).returncode == -signal.SIGKILL
    left = sorted(path.name for path in (tmp_path / "out").iterdir())
    temporary = [name for name in left if name.endswith(".tmp")]
    assert [name[:7] for name in temporary] == [".1.png."]
    assert [name for name in left if name not in temporary] == [f".1.png{CLAIM}", FILE, "0.png"], "the claim has ended"
    # Something else is asked for next: what the killed one left goes all the same.
    assert commands("upscale", folder / "0.png", *command[2:], tmp_path / "out").code == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [FILE, "0.png"]
    answer = commands(*command, tmp_path / "out")
    assert answer.code == 0 and "1 of 3 results are there already and are kept" in answer.out
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [FILE, "0.png", "1.png", "2.png"]
    assert results(tmp_path / "out") == results(tmp_path / "straight")


def test_results_of_anything_else_are_refused(adapter, tiny_base, folder, tmp_path, log) -> None:
    tuned = load(tiny_base)
    lora.attach(tuned)
    with torch.no_grad():
        for parameter in lora.parameters(tuned).values():
            parameter.add_(0.05)
    upscale(tuned, folder, tmp_path / "out", prompts="a cat")
    made(log)

    def refused(message: str = "3 of the results already", /, pipeline=tuned, **options) -> None:
        before = snapshot(tmp_path)
        with pytest.raises(UserError, match=message):
            upscale(pipeline, folder, tmp_path / "out", **{"prompts": "a cat", **options})
        assert snapshot(tmp_path) == before and not made(log)

    refused(seed=1)
    refused(color_fix="adain")
    refused(prompts="a dog")
    refused(pipeline=adapter)
    refused(pipeline=load(tiny_base, noise_t=251))
    lora.set_scale(tuned, 0.5)
    refused()
    lora.set_scale(tuned, 1)
    first = next(iter(lora.parameters(tuned).values()))
    with torch.no_grad():
        first.view(-1)[0] += 1e-3
        refused()
        first.view(-1)[0] -= 1e-3
    original = (folder / "1.png").read_bytes()
    write_image(image(9, 3, 6, 8), folder / "1.png")
    refused(r"1 of the results already \(1\.png\)")
    (folder / "1.png").write_bytes(original)
    good = (tmp_path / "out" / "2.png").read_bytes()
    for foreign in (good[:-20], b"", (tmp_path / "out" / "1.png").read_bytes()):
        (tmp_path / "out" / "2.png").write_bytes(foreign)
        refused(r"1 of the results already \(2\.png\)")
    (tmp_path / "out" / "2.png").write_bytes(good)
    upscale(tuned, folder, tmp_path / "out", prompts="a cat")
    assert not made(log), "all as before, and kept"


def test_strength_0_is_the_base(adapter, tiny_base, folder, tmp_path, log) -> None:
    upscale(adapter, folder, tmp_path / "out")
    tuned = load(tiny_base)
    lora.attach(tuned)
    lora.set_scale(tuned, 0)
    made(log)
    upscale(tuned, folder, tmp_path / "out")
    assert not made(log)


@pytest.mark.parametrize("damage", [b'{"name": "0.p', b"\xff\xfe\n[]\n3\n{}\n", b"[" * 5000])
def test_a_damaged_record_is_no_obstacle(adapter, folder, tmp_path, log, damage) -> None:
    upscale(adapter, folder / "0.png", tmp_path / "out")
    with (tmp_path / "out" / FILE).open("ab") as file:
        file.write(damage)
    for count in (2, 0):
        made(log)
        upscale(adapter, folder, tmp_path / "out")
        assert len(made(log)) == count


# ---- images that fail ----


def test_an_image_that_goes_away_does_not_cost_the_others(adapter, folder, tmp_path, monkeypatch) -> None:
    """It was there when all were looked at, and was too large to stay in memory since."""
    monkeypatch.setattr(module, "KEPT", 0)
    original = module.write_bytes

    def writing(path, content):
        (folder / "1.png").unlink(missing_ok=True)
        original(path, content)

    monkeypatch.setattr(module, "write_bytes", writing)
    with pytest.raises(UserError, match=r"1 of 3 images have failed, the others are done: no image file .*1\.png'$"):
        upscale(adapter, folder, tmp_path / "out")
    assert list(results(tmp_path / "out")) == ["0.png", "2.png"]


SHORT_OF_MEMORY = """
import resource, sys
from pathlib import Path
import rewardsr
from rewardsr.evaluation import upscale as module

adapter = rewardsr.load_adapter("osediff", sys.argv[1], scale=4)
rewardsr.upscale(adapter, Path(sys.argv[2], "0.png"))
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 300_000_000,) * 2)
try:
    rewardsr.upscale(adapter, sys.argv[2], sys.argv[3])
except rewardsr.UserError as error:
    print(error)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="knows no way to tell what a process uses here")
def test_an_image_too_large_for_the_memory_does_not_cost_the_others(tiny_base, folder, tmp_path) -> None:
    Image.fromarray(np.zeros((600, 1000, 3), np.uint8)).save(folder / "1.png")
    script = [sys.executable, "-c", SHORT_OF_MEMORY, str(tiny_base), str(folder), str(tmp_path / "out")]
    done = subprocess.run(script, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("1 of 3 images have failed, the others are done: out of memory at "), done.stdout
    assert "1.png, 600x1000: smaller images, a (smaller) tile" in done.stdout and done.stdout.count("\n") == 1
    assert list(results(tmp_path / "out")) == ["0.png", "2.png"]


def test_the_command_looks_at_files_before_it_loads_a_pipeline(commands, refused, tiny_base, folder, tmp_path) -> None:
    nowhere = ("--base", tmp_path / "no such base", "-o", tmp_path / "out")
    (folder / "b.heic").write_bytes(b"")
    assert "no image file" in refused("upscale", folder / "missing.png", *nowhere)
    assert "unknown colour fix 'sepia'" in refused("upscale", folder / "0.png", *nowhere, "--color-fix", "sepia")
    assert "both become" in refused("upscale", folder / "0.png", folder / "0.png", *nowhere)
    answer = commands("upscale", folder, "--base", tiny_base, "-o", tmp_path / "out", "--device", "cpu")
    assert answer.code == 0 and answer.err.count("b.heic (this PIL does not read .heic)") == 1
    (folder / "2.png").write_bytes(b"no image")
    assert "2.png" in commands("upscale", folder, *nowhere).err


def test_all_unreadable_images_are_named_before_anything_is_done(adapter, folder, tmp_path) -> None:
    for name in ("0.png", "2.png"):
        (folder / name).write_bytes((folder / name).read_bytes()[:-30])
    before = snapshot(tmp_path)
    with pytest.raises(UserError, match=r"2 images cannot be read: .*0\.png.*2\.png"):
        upscale(adapter, folder, tmp_path / "out")
    assert snapshot(tmp_path) == before


# ---- names ----


def test_names_that_are_no_text_and_a_terminal_that_knows_ascii_only(tiny_base, folder, tmp_path) -> None:
    long = ("日" * 83 + ".png").encode()
    names = [b"caf\xe9.png", "日本.png".encode(), long, b"new\nline.png", b"esc\x1b[31m.png", b"n" * 251 + b".png"]
    for name in names:
        Path(os.fsdecode(os.fsencode(folder) + b"/" + name)).write_bytes((folder / "0.png").read_bytes())
    command = [sys.executable, "-m", "rewardsr", "upscale", str(folder), "--base", str(tiny_base), "--device", "cpu"]
    known = {key: value for key, value in os.environ.items() if not key.startswith(("LC_", "PYTHONUTF8"))}
    ascii_only = {**known, "LC_ALL": "C", "PYTHONIOENCODING": "ascii", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, "-o", str(tmp_path / "out")], capture_output=True, env=ascii_only)
    assert done.returncode == 0 and not done.stderr, done.stderr
    shown = done.stdout.decode("ascii")
    assert "\x1b" not in shown and len(shown.splitlines()) == 9
    for part in (r"caf\udce9.png", r"\u65e5\u672c.png", r"new\nline.png", r"esc\x1b[31m.png"):
        assert f"/{part}" in shown
    found = {name for name in os.listdir(os.fsencode(tmp_path / "out")) if name.endswith(b".png")}
    assert found == {*names, b"0.png", b"1.png", b"2.png"}


def test_a_name_that_is_too_long_for_its_result_is_known_before_any_work(adapter, folder, tmp_path) -> None:
    (folder / "0.png").rename(folder / ("n" * 252 + ".gz"))
    with pytest.raises(UserError, match="too long for a file name"):
        upscale(adapter, [folder, folder / ("n" * 252 + ".gz")], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_no_room_for_the_record(adapter, folder, tmp_path) -> None:
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, before[1]))
    try:
        with pytest.raises(UserError, match="cannot write"):
            upscale(adapter, folder, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    upscale(adapter, folder, tmp_path / "out")
    assert read_image(tmp_path / "out" / "2.png").shape == (3, 24, 32)
