"""What goes wrong between here and the Hub: each fault in turn, the line that it gives, and what it leaves behind.

`pytest tests/test_hub_faults.py -rP` prints the table.
"""

import hashlib
import shutil
from pathlib import Path

import huggingface_hub
import huggingface_hub.constants
import pytest
from _publishing import BASE, CARD, REPO, SENT, connected, go_offline, make_run, refusal, sent
from _support import snapshot

import rewardsr.hub
from rewardsr import run_folder
from rewardsr.hub.publish import pull, push

ALWAYS = 99
# Where a push asks for something: the request, and whether the repository is there before.
STEPS = {
    "whoami": ("GET", "/whoami"),
    "look up": ("GET", f"/api/models/{REPO}$"),
    "create": ("POST", "/repos/create"),
    "validate": ("POST", "/validate-yaml"),
    "preupload": ("POST", "/preupload/"),
    "LFS batch": ("POST", "/objects/batch"),
    "LFS PUT": ("PUT", "/storage/"),
    "LFS verify": ("POST", "/storage/verify"),
    "commit": ("POST", "/commit/"),
}
FAULTS = (401, 403, 404, 409, 500, 503, "cut", "lost")


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_base) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "run", tiny_base)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with connected(monkeypatch, tmp_path / "cache") as server:
        yield server


def ask(hub, step: str, fault: int | str, times: int = ALWAYS) -> None:
    method, path = (STEPS | DOWNLOADS)[step]
    if isinstance(fault, int):
        hub.fail(method, path, status=fault, times=times)
    else:
        hub.fail(method, path, fault, times=times)


def state(hub) -> dict[str, dict[str, str]]:
    """Every branch of every repository with its content."""
    return {
        f"{kind} {name} {ref}": {path: hashlib.sha256(data).hexdigest() for path, data in found.files(ref).items()}
        for (kind, name), found in hub.repositories.items()
        for ref in found.refs
    }


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("step", STEPS)
def test_a_push_that_fails_leaves_the_repository_as_it_was(hub, finished, step, fault) -> None:
    new = step == "create"
    if not new:
        hub.add(REPO, **{"README.md": b"before"})
    before = state(hub)
    ask(hub, step, fault)
    if (step, fault) == ("commit", "lost"):
        assert sent(finished).commit == hub.model(REPO).refs["main"], "done all the same, and seen to be"
        assert set(hub.model(REPO).files()) >= SENT
        print(f"{step:10} {fault} | (no error) | main has the new commit")
        return
    line = refusal(sent, finished)
    assert line.startswith(f"push to '{REPO}' failed")
    assert (f"({fault}" if isinstance(fault, int) else "no proper answer from the Hub") in line
    if (step, fault) == ("create", "lost"):
        assert list(state(hub).values()) == [{".gitattributes": state(hub)[f"model {REPO} main"][".gitattributes"]}]
        assert f"'{REPO}' was created by this push" in line and f"{hub.url}/{REPO}/settings" in line
    else:
        assert state(hub) == before
        assert line.endswith(("is as it was", "nothing was sent")), line
    print(
        f"{step:10} {fault} | {line} | {'main unchanged' if before else 'empty repository' if state(hub) else 'none'}"
    )
    hub.faults.clear()
    assert set(sent(finished).plan.files) and set(hub.model(REPO).files()) >= SENT, "the same push works afterwards"


@pytest.mark.parametrize("fault", [403, 503, "cut"])
@pytest.mark.parametrize("step", ["preupload", "LFS PUT", "commit"])
def test_a_repository_that_was_made_for_nothing_is_named(hub, finished, step, fault) -> None:
    ask(hub, step, fault)
    line = refusal(sent, finished)
    assert f"'{REPO}' was created by this push and holds nothing of the run" in line
    assert f"{hub.url}/{REPO}/settings" in line and set(hub.model(REPO).files()) == {".gitattributes"}
    print(f"{step:10} {fault} | {line} | empty repository")
    hub.faults.clear()
    assert not sent(finished).created and set(hub.model(REPO).files()) >= SENT


@pytest.mark.parametrize("step", ["preupload", "LFS PUT", "commit"])
def test_a_branch_that_was_made_for_nothing_is_removed(hub, finished, step) -> None:
    hub.add(REPO)
    before = state(hub)
    ask(hub, step, 403)
    assert refusal(sent, finished, revision="v2").endswith(f"'{REPO}' is as it was")
    assert state(hub) == before
    hub.fail("DELETE", "/branch/", status=503)
    assert refusal(sent, finished, revision="v2").endswith("as it was but for the branch 'v2', which this push made")
    assert set(hub.model(REPO).refs) == {"main", "v2"}


def test_a_branch_whose_making_was_not_answered(hub, finished) -> None:
    hub.add(REPO)
    hub.fail("POST", "/branch/", "lost")
    assert refusal(sent, finished, revision="v2").endswith(f"'{REPO}' is as it was")
    assert set(hub.model(REPO).refs) == {"main"}
    hub.fail("POST", "/branch/", "cut")
    assert refusal(sent, finished, revision="v2").endswith(f"'{REPO}' is as it was")


def test_an_interrupted_push(hub, finished, monkeypatch) -> None:
    hub.add(REPO)
    before, said = state(hub), list[str]()

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(huggingface_hub.HfApi, "create_commit", interrupt)
    with pytest.raises(KeyboardInterrupt):
        push(finished, REPO, card=CARD, revision="v2", say=said.append)
    assert state(hub) == before and said[-1] == f"interrupted; '{REPO}' is as it was"


def test_a_commit_of_somebody_else_in_between_is_not_overwritten(hub, finished, monkeypatch) -> None:
    model = hub.add(REPO)
    prepare = huggingface_hub.HfApi.preupload_lfs_files

    def meanwhile(self, *arguments: object, **options: object) -> None:
        model.commit("main", {"README.md": b"theirs"}, "theirs")
        prepare(self, *arguments, **options)

    monkeypatch.setattr(huggingface_hub.HfApi, "preupload_lfs_files", meanwhile)
    assert "something else was pushed in the meantime (412" in refusal(sent, finished)
    assert model.files() == {"README.md": b"theirs"}


def test_the_client_tries_again_where_the_hub_stumbles(hub, finished, tmp_path) -> None:
    for step in ("preupload", "LFS batch", "LFS PUT"):
        ask(hub, step, 503, times=2)
    sent(finished)
    ask(hub, "download", "half", times=2)
    folder = pull(REPO, tmp_path / "pulled")
    assert (folder / run_folder.LORA).read_bytes() == (finished / run_folder.LORA).read_bytes()


# Downloads

DOWNLOADS = {
    "ask": ("GET", f"/api/models/{REPO}"),
    "head": ("HEAD", rf"/resolve/\w+/{run_folder.LORA}"),
    "download": ("GET", rf"/resolve/\w+/{run_folder.LORA}"),
}
CASES = [(step, fault) for step in DOWNLOADS for fault in (401, 403, 404, 409, 500, 503, "cut")]


@pytest.mark.parametrize(
    ("step", "fault"), [*CASES, ("download", "half"), ("download", "short"), ("download", "wrong")]
)
def test_a_pull_that_fails_leaves_nothing(hub, finished, tmp_path, step, fault) -> None:
    sent(finished)
    ask(hub, step, fault)
    line = refusal(pull, REPO, tmp_path / "pulled")
    assert (
        REPO in line
        and (str(fault) in line or not isinstance(fault, int))
        and not [path for path in tmp_path.iterdir() if path.name != "cache"]
    )
    print(f"{step:10} {fault} | {line} | nothing")
    hub.faults.clear()
    folder = pull(REPO, tmp_path / "pulled")
    assert (folder / run_folder.LORA).read_bytes() == (finished / run_folder.LORA).read_bytes()


def test_a_hub_that_is_slow(hub, finished, tmp_path, monkeypatch) -> None:
    sent(finished)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.2)
    monkeypatch.setattr(rewardsr.hub.fetch, "TIMEOUT", 0.2)
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


def test_a_lora_that_was_truncated_before_it_came_to_the_hub(hub, finished) -> None:
    whole = (finished / run_folder.LORA).read_bytes()
    hub.add(REPO, **{run_folder.LORA: whole[:-8]})
    assert "is damaged" in refusal(pull, REPO)
    hub.add(REPO, **{run_folder.LORA: whole.replace(b'"rewardsr"', b'"somebody"')})
    assert "not written by rewardsr" in refusal(pull, REPO)


def test_a_lora_in_a_subfolder(hub, finished) -> None:
    whole = (finished / run_folder.LORA).read_bytes()
    hub.add(REPO, **{f"x4/{run_folder.LORA}": whole, "x2/README.md": BASE.encode()})
    assert (rewardsr.hub.fetch.fetch_lora(REPO, "x4") / run_folder.LORA).read_bytes() == whole
    assert f"no {run_folder.LORA}" in refusal(pull, REPO)
    assert "leads out" in refusal(rewardsr.hub.fetch.fetch_lora, REPO, "../x4")


def test_a_copy_that_does_not_fit_on_the_disk(hub, finished, tmp_path, monkeypatch) -> None:
    sent(finished)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    assert "No space left on device" in refusal(pull, REPO, tmp_path / "pulled")
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]
