"""Fetching and finding what others published: each fault in turn, the line that it gives, and what it leaves behind.

`pytest tests/hub/test_fetch.py -rP` prints the table.
"""

import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from _publishing import BASE, CARD, REPO, SENT, client_environment, go_offline, refusal, sent
from _support import snapshot
from safetensors.torch import load_file, save

from rewardsr import progress, run_folder
from rewardsr.hub import fetch
from rewardsr.hub.fetch import fetch_lora, pull
from rewardsr.hub.publish import push
from rewardsr.hub.search import search

ALWAYS = 99
STEPS = {
    "ask": ("GET", f"/api/models/{REPO}"),
    "head": ("HEAD", rf"/resolve/\w+/{run_folder.LORA}"),
    "download": ("GET", rf"/resolve/\w+/{run_folder.LORA}"),
}
CASES = [(step, fault) for step in STEPS for fault in (401, 403, 404, 409, 500, 503, "cut")]


@pytest.mark.parametrize(
    ("step", "fault"), [*CASES, ("download", "half"), ("download", "short"), ("download", "wrong")]
)
def test_a_pull_that_fails_leaves_nothing(hub, finished, tmp_path, step, fault) -> None:
    sent(finished, keep_paths=True)
    hub.fail(*STEPS[step], **({"status": fault} if isinstance(fault, int) else {"kind": fault}), times=ALWAYS)
    line = refusal(pull, REPO, tmp_path / "pulled")
    print(f"{step:10} {fault} | {line}")
    assert REPO in line and (str(fault) in line or not isinstance(fault, int))
    assert not [path for path in tmp_path.iterdir() if path.name != "cache"]
    hub.faults.clear()
    folder = pull(REPO, tmp_path / "pulled")
    assert (folder / run_folder.LORA).read_bytes() == (finished / run_folder.LORA).read_bytes()


def test_a_download_that_breaks_off_is_tried_again(hub, finished, tmp_path) -> None:
    sent(finished, keep_paths=True)
    hub.fail(*STEPS["download"], "half", times=2)
    folder = pull(REPO, tmp_path / "pulled")
    assert (folder / run_folder.LORA).read_bytes() == (finished / run_folder.LORA).read_bytes()


def test_a_hub_that_is_slow(hub, finished, tmp_path, monkeypatch) -> None:
    sent(finished)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.2)
    monkeypatch.setattr(fetch, "TIMEOUT", 0.2)
    hub.fail("GET", "/resolve/", "slow", seconds=0.5, times=2)
    assert (pull(REPO, tmp_path / "pulled") / run_folder.LORA).is_file(), "tried again"
    hub.fail("GET", f"/api/models/{REPO}", "slow", seconds=0.5, times=ALWAYS)
    assert (pull(REPO) / run_folder.LORA).is_file(), "from the cache"


def test_the_cache_serves_without_a_connection(hub, finished, tmp_path, monkeypatch) -> None:
    first = sent(finished, revision="v2")
    folder = pull(f"{REPO}@v2")
    hub.fail("GET", "/api/", status=503, times=ALWAYS)
    assert pull(f"{REPO}@v2") == folder, "the Hub has trouble"
    go_offline(monkeypatch)
    hub.requests.clear()
    assert pull(f"{REPO}@v2") == folder and pull(f"{REPO}@{first.commit}") == folder
    assert (pull(f"{REPO}@v2", tmp_path / "pulled") / run_folder.LORA).is_file()
    for unseen in (REPO, f"{REPO}@v3", "bob/unseen"):
        assert "nor in the Hub's cache" in refusal(pull, unseen)
    (folder / run_folder.LORA).unlink()
    assert "in the Hub's cache" in refusal(pull, f"{REPO}@v2")
    assert not hub.requests


@pytest.mark.parametrize(
    "name", ["../evil.safetensors", "/etc/evil", "samples/../../../evil.png", "..\\evil", "C:\\evil", "C:evil", "a\nb"]
)
def test_a_file_name_that_leads_out(hub, finished, tmp_path, name) -> None:
    sent(finished)
    model = hub.model(REPO)
    model.commit("main", {**model.files(), name: b"evil"}, "evil")
    line = refusal(pull, REPO, tmp_path / "pulled")
    assert repr(name) in line and "leads out" in line
    assert not snapshot(tmp_path) and not hub.count("GET", "/resolve/"), "nothing was fetched"


@pytest.mark.parametrize(("name", "size"), [(run_folder.LORA, 10**10), ("recipe.yaml", 10**9), ("README.md", 10**12)])
def test_a_file_that_is_larger_than_any_of_a_run(hub, finished, tmp_path, name, size) -> None:
    sent(finished)
    hub.model(REPO).sizes[name] = size
    assert f"its {name} has {size:,d} bytes" in refusal(pull, REPO, tmp_path / "pulled")
    assert not snapshot(tmp_path) and not hub.count("GET", "/resolve/"), "nothing was fetched"


def test_only_a_runs_own_files_are_fetched(hub, finished, tmp_path) -> None:
    sent(finished)
    model = hub.model(REPO)
    more = {"run.py": b"import os", "model.bin": b"pickle", "samples/deep/x.png": b"x", "samples/x.exe": b"x"}
    model.commit("main", {**model.files(), **more}, "more")
    folder = pull(REPO, tmp_path / "pulled")
    assert {name for name in snapshot(folder) if not name.endswith("/")} == SENT - {"metrics.jsonl"}
    assert not [path for path in pull(REPO).rglob("*") if path.name in {Path(name).name for name in more}]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "not published with rewardsr push"),
        ({"osediff.pkl": b"\x80\x04"}, "but 'osediff.pkl': pickles can run code and are refused"),
        ({"pytorch_lora_weights.bin": b"\x80"}, "pickles can run code"),
        ({"other.safetensors": b"x"}, "but 'other.safetensors': not one of ours"),
        ({run_folder.LORA: b"\x80\x04 a pickle by another name"}, "is damaged or not a safetensors file"),
        ({run_folder.LORA: b""}, "is damaged or not a safetensors file"),
    ],
)
def test_a_repository_without_a_lora_of_ours(hub, tmp_path, files, message) -> None:
    hub.add(REPO, **files)
    assert message in refusal(pull, REPO, tmp_path / "pulled")
    assert not (tmp_path / "pulled").exists()


def with_value(path: Path, value: torch.Tensor) -> bytes:
    return save(
        load_file(path) | {"x": value}, {run_folder.OUR_HEADER: '{"base": {"revision": ""}, "rank": 2, "alpha": 8}'}
    )


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.read_bytes()[:-8], "is damaged"),
        (lambda path: path.read_bytes().replace(b'"rewardsr"', b'"somebody"'), "was not written by rewardsr"),
        (lambda path: with_value(path, torch.zeros(1, dtype=torch.bfloat16)), "or not float32"),
        (lambda path: with_value(path, torch.tensor([torch.inf])), "x holds values that are not finite"),
    ],
)
def test_a_lora_that_was_damaged_before_it_came_to_the_hub(hub, finished, damage, message) -> None:
    hub.add(REPO, **{run_folder.LORA: damage(finished / run_folder.LORA)})
    assert message in refusal(pull, REPO)


def test_a_lora_in_a_subfolder(hub, finished) -> None:
    whole = (finished / run_folder.LORA).read_bytes()
    hub.add(REPO, **{f"x4/{run_folder.LORA}": whole, "x2/README.md": BASE.encode()})
    assert (fetch_lora(REPO, "x4") / run_folder.LORA).read_bytes() == whole
    assert f"no {run_folder.LORA}" in refusal(pull, REPO)
    assert "leads out" in refusal(fetch_lora, REPO, "../x4")


def test_a_copy_that_does_not_fit_on_the_disk(hub, finished, tmp_path, monkeypatch) -> None:
    sent(finished)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    assert "No space left on device" in refusal(pull, REPO, tmp_path / "pulled")
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


def test_a_folder_that_is_in_use_is_refused(hub, finished, tmp_path) -> None:
    sent(finished)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine.txt").write_text("mine")
    assert "is not empty" in refusal(pull, REPO, tmp_path / "full")
    (tmp_path / "empty").mkdir()
    assert (pull(REPO, tmp_path / "empty") / run_folder.LORA).is_file()
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("arguments", [["pull", REPO, "-o", "pulled"], ["search", "tiny"]])
def test_these_commands_load_nothing_heavy(hub, finished, tmp_path, arguments) -> None:
    sent(finished)
    code = f"""if True:
        import sys
        from rewardsr.cli import main
        sys.argv = ["rewardsr", *{arguments}]
        try:
            main()
        except SystemExit as stop:
            assert not stop.code, stop.code
        heavy = ("torch", "accelerate", "diffusers", "transformers", "peft", "pyiqa", "kornia")
        print([name for name in heavy if name in sys.modules])
        """
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=client_environment(hub, tmp_path / "home"),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    *shown, loaded = done.stdout.splitlines()
    assert loaded == "[]"
    assert REPO in shown[0] if arguments[0] == "search" else (tmp_path / "pulled" / run_folder.LORA).is_file()


def test_search_finds_by_tag_name_and_base(hub, finished) -> None:
    sent(finished)
    push(finished, "ada/other", card=CARD.replace(BASE, "someone/else"))
    hub.add("bob/llm", **{"README.md": b"---\ntags: [text-generation]\n---\n"})
    assert {(found.id, found.base) for found in search()} == {(REPO, BASE), ("ada/other", "someone/else")}
    assert [found.id for found in search("tiny")] == [REPO]
    assert [found.id for found in search(base="someone/else")] == ["ada/other"]
    assert len(search(limit=1)) == 1 and not search("nothing like it")
    assert search("tiny")[0].updated.year == 2025


@pytest.mark.parametrize(
    ("fault", "message"), [({"status": 503}, "the Hub has trouble, try later (503"), ({"kind": "cut"}, "no proper")]
)
def test_a_search_that_fails(hub, fault, message) -> None:
    hub.fail("GET", "/api/models", **fault, times=ALWAYS)
    line = refusal(search)
    assert line.startswith("the search failed: ") and message in line


def test_search_without_a_connection(monkeypatch, hub) -> None:
    go_offline(monkeypatch)
    assert "cannot be reached" in refusal(search)
    assert not hub.requests


def test_what_names_a_repository(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/tiny").mkdir(parents=True)
    for text in ("ada/tiny", "ada/tiny@v2", "ada/tiny@refs/pr/3", "a.b/c-d_e"):
        assert fetch.is_reference(text), text
    for text in ("runs/tiny", "./tiny", "~/tiny", "/ada/tiny", "a/b/c", "tiny", "loras/x.safetensors", "a b/c", "ada/"):
        assert not fetch.is_reference(text), text
    assert fetch.split_reference("ada/tiny@refs/pr/3") == ("ada/tiny", "refs/pr/3")
    assert fetch.split_reference("ada/tiny") == ("ada/tiny", None)
    assert "not a Hub id" in refusal(fetch.split_reference, "ada/tiny@")


def test_a_cache_that_cannot_be_written(hub, finished, tmp_path, monkeypatch) -> None:
    sent(finished)
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "file" / "cache"))
    line = refusal(pull, REPO)
    assert "the Hub's cache cannot be used: Not a directory: '" in line and "look at HF_HOME" in line


def test_what_the_hubs_client_counts_shows_in_a_bar_of_ours(capfd, monkeypatch) -> None:
    """It counts bytes twice, as they come and as they are written, and files besides."""
    monkeypatch.setattr(progress, "SELDOM", 0)
    with fetch._counted("fetching ada/lora") as counter:
        came, written = (counter(total=0, unit="B", desc="bytes", unit_scale=True) for _ in range(2))
        assert sum(counter([1, 2, 3], desc="Fetching 3 files")) == 6
        for bar in (came, written):
            bar.total += 40_000_000
            bar.update(10_000_000)
        came.update(20_000_000)
        came.close()
    lines = capfd.readouterr().err.splitlines()
    assert lines[0].startswith("fetching ada/lora 10.0/40.0 MB") and lines[-1].startswith(
        "fetching ada/lora 30.0/40.0 MB"
    )
    assert all(line.startswith("fetching ada/lora ") for line in lines)
