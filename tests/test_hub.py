"""Publishing, fetching and finding adapters: the real client of the Hub against a Hub on 127.0.0.1."""

import hashlib
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from _publishing import BASE, CARD, OTHER, REPO, SENT, TOKEN, connected, go_offline, make_run, refusal, sent
from _support import snapshot
from safetensors.torch import load_file, save_file

import rewardsr.hub
from rewardsr import lora, run_folder
from rewardsr.hub import parcel
from rewardsr.hub.publish import pull, push, search


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_base) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "run", tiny_base)


@pytest.fixture
def run(finished, tmp_path) -> Path:
    """A run that may be changed."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with connected(monkeypatch, tmp_path / "cache") as server:
        yield server


def hashes(files: dict[str, bytes]) -> dict[str, str]:
    return {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}


def test_what_is_pushed_is_what_is_pulled(hub, run, tmp_path) -> None:
    shown: list[str] = []
    pushed = push(run, REPO, card=CARD, say=shown.append)
    model = hub.model(REPO)
    assert pushed.created and pushed.changed and pushed.commit == model.refs["main"]
    assert list(model.titles.values())[1:] == [model.titles[pushed.commit]], "one commit beside the Hub's own first"
    assert set(model.files()) == SENT | {".gitattributes"}, "no checkpoints, no optimiser state"
    assert hub.count("POST", "/commit/") == 1 and not model.private
    assert all(any(name in line for line in shown) for name in SENT)

    local = {name: (run / name).read_bytes() for name in (run_folder.LORA, "recipe.yaml", "metrics.jsonl")}
    local |= {
        f"samples/validation{kind}": (run / f"validation/step-00000002{kind}").read_bytes()
        for kind in (".json", ".png")
    }
    local |= {"README.md": CARD.encode()}
    assert hashes(local) == hashes({name: model.files()[name] for name in SENT})

    folder = pull(REPO, tmp_path / "pulled")
    del local["metrics.jsonl"]  # what training did is of no use to somebody who upscales
    assert {name: digest for name, digest in snapshot(folder).items() if digest} == hashes(local)
    assert pull(REPO).is_relative_to(tmp_path / "cache")


def test_a_pulled_lora_loads_like_that_of_the_run(hub, run, tmp_path, tiny_base) -> None:
    from rewardsr.pipelines import load_adapter

    push(run, REPO, say=lambda line: None)  # with the card that is made from the run
    adapter = load_adapter("osediff", str(tiny_base), noise_t=250)
    lora.load(adapter, pull(REPO))
    ours = load_file(run / run_folder.LORA)
    assert all(torch.equal(ours[name], tensor) for name, tensor in lora.state_dict(adapter).items())


def test_a_second_push_updates_and_a_third_has_nothing_to_say(hub, run) -> None:
    first = sent(run)
    (run / "metrics.jsonl").write_text('{"step": 2, "loss": 0.1}\n')
    second = sent(run)
    assert not second.created and second.changed and second.commit != first.commit
    assert hub.model(REPO).files()["metrics.jsonl"] == (run / "metrics.jsonl").read_bytes()
    third = sent(run)
    assert not third.changed and third.commit == second.commit and len(hub.model(REPO).commits) == 3


def test_private_is_for_new_repositories(hub, run, tmp_path, monkeypatch) -> None:
    sent(run, private=True)
    assert hub.model(REPO).private
    sent(run, private=True)  # is private, stays private
    assert pull(REPO, tmp_path / "mine")
    monkeypatch.setenv("HF_TOKEN", OTHER)
    assert "not visible to you" in refusal(pull, REPO, tmp_path / "theirs")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.model(REPO).private = False
    before = dict(hub.model(REPO).refs)
    assert "exists and is public" in refusal(sent, run, private=True)
    assert hub.model(REPO).refs == before


def test_a_pull_request_leaves_main_alone(hub, run, monkeypatch, tmp_path) -> None:
    assert "without --create-pr first" in refusal(sent, run, create_pr=True)
    assert not hub.repositories
    model = hub.add(REPO)
    main = model.refs["main"]
    monkeypatch.setenv("HF_TOKEN", OTHER)  # anybody may propose
    pushed = sent(run, create_pr=True)
    assert model.refs["main"] == main and set(model.files("refs/pr/1")) >= SENT
    assert pushed.url is not None and pushed.url.endswith("/discussions/1")
    assert (pull(f"{REPO}@refs/pr/1", tmp_path / "proposed") / run_folder.LORA).is_file()
    assert "not both" in refusal(sent, run, create_pr=True, revision="v2")


def test_a_revision_is_a_branch_that_is_made_if_need_be(hub, run, tmp_path) -> None:
    first = sent(run)
    (run / "metrics.jsonl").write_text('{"step": 2, "loss": 0.1}\n')
    second = sent(run, revision="v2")
    model = hub.model(REPO)
    assert model.refs == {"main": first.commit, "v2": second.commit}
    (run / "metrics.jsonl").write_text('{"step": 2, "loss": 0.2}\n')
    third = sent(run, revision="v2")
    assert model.refs == {"main": first.commit, "v2": third.commit}
    model.tags["frozen"] = first.commit
    assert "is a tag" in refusal(sent, run, revision="frozen")
    assert "has no revision 'v9'" in refusal(pull, f"{REPO}@v9")
    assert pull(f"{REPO}@v2").name == third.commit and pull(f"{REPO}@{first.commit}").name == first.commit


def test_a_new_repository_may_begin_with_a_branch(hub, run) -> None:
    pushed = sent(run, revision="v1")
    model = hub.model(REPO)
    assert model.refs["v1"] == pushed.commit and set(model.files("main")) == {".gitattributes"}


def test_a_dry_run_contacts_nobody(hub, run, contacted) -> None:
    before, shown = snapshot(run), list[str]()
    pushed = push(run, REPO, card=CARD, dry_run=True, say=shown.append)
    assert pushed.commit is None and not contacted and not hub.requests and snapshot(run) == before
    size = (run / run_folder.LORA).stat().st_size
    assert any(f"{size:,d} bytes" in line and run_folder.LORA in line for line in shown)


@pytest.mark.parametrize("why", ["no token", "switched off"])
def test_without_token_or_connection_all_is_made_ready(hub, run, monkeypatch, why, contacted) -> None:
    if why == "no token":
        monkeypatch.delenv("HF_TOKEN")
    else:
        go_offline(monkeypatch)
    for note in ("first", "second"):  # the second replaces the first
        (run / "metrics.jsonl").write_text(f'{{"step": 2, "note": "{note}"}}\n')
        line = refusal(sent, run, private=True, revision="v2")
        assert f"'{run / 'hub'}'" in line and not contacted
        assert line.endswith(f"run: hf upload {REPO} {run / 'hub'} . --private --revision v2")
        assert {name for name in snapshot(run / "hub") if not name.endswith("/")} == SENT
        assert (run / "hub/metrics.jsonl").read_bytes() == (run / "metrics.jsonl").read_bytes()
    assert not [path for path in run.iterdir() if path.name.startswith(".")]


def test_the_printed_command_uploads_the_ready_folder(hub, run, monkeypatch, tmp_path) -> None:
    monkeypatch.delenv("HF_TOKEN")
    command = shlex.split(refusal(sent, run, private=True).split("run: ")[1])
    client = Path(sys.executable).with_name(command[0])
    environment = os.environ | {
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": TOKEN,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_UPDATE_CHECK": "1",
        "HF_HOME": str(tmp_path / "home"),
    }
    subprocess.run([client, *command[1:]], env=environment, check=True, capture_output=True, timeout=60)
    assert set(hub.model(REPO).files()) == SENT | {".gitattributes"} and hub.model(REPO).private


def test_a_token_that_does_not_do_is_refused_before_anything_is_made(hub, run, monkeypatch) -> None:
    hub.add_token("hf_read", "ada", role="read")
    monkeypatch.setenv("HF_TOKEN", "hf_read")
    assert "can only read" in refusal(sent, run)
    monkeypatch.setenv("HF_TOKEN", "hf_of_yesterday")
    assert "does not accept the token (401" in refusal(sent, run)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    for foreign in ("bob/tiny-sr", "club/tiny-sr"):  # of the club ada may only read
        assert f"'{foreign}' is not yours" in refusal(push, run, foreign, card=CARD, say=str)
    assert not hub.repositories and not hub.objects and not hub.count("POST", "")
    assert push(run, "lab/tiny-sr", card=CARD, say=str).created


@pytest.mark.parametrize("kind", ["dataset", "space"])
def test_a_name_that_something_else_has(hub, run, kind) -> None:
    hub.add(REPO, kind)
    assert refusal(sent, run) == f"'{REPO}' is a {kind} on the Hub: choose another name"
    assert list(hub.repositories) == [(kind, REPO)]


@pytest.mark.parametrize(
    ("card", "message"),
    [
        ("# Tiny\n", "no front matter"),
        ("---\ntags: [rewardsr\n---\n", "is invalid"),
        ("---\n- rewardsr\n---\n", "is invalid"),
        ("---\ntags: [lora]\n---\n", "lacks the tag 'rewardsr'"),
        (CARD.replace(BASE, "./models/base folder"), "is invalid"),
        (CARD.replace("license: apache-2.0", "license: [a, b]"), "license is not one name"),
        (CARD.replace("tags:", "model-index: [{results: 3}]\ntags:"), "is invalid"),
        (CARD.replace("validation.png", "step-2.png"), "'samples/step-2.png', which would not be"),
    ],
)
def test_an_invalid_card(hub, run, card, message) -> None:
    assert message in refusal(push, run, REPO, card=card, say=str)
    assert not hub.requests


def test_a_card_that_only_the_hub_can_refuse(hub, run) -> None:
    line = refusal(push, run, REPO, card=CARD.replace("apache-2.0", "no-such-licence"), say=str)
    assert '"license" must be one of' in line and f"'{REPO}' was created by this push" in line
    assert set(hub.model(REPO).files()) == {".gitattributes"} and not hub.objects


def test_a_run_that_cannot_be_published(hub, run, monkeypatch, tmp_path) -> None:
    tensors = load_file(run / run_folder.LORA)
    whole, (name, tensor) = (run / run_folder.LORA).read_bytes(), next(iter(tensors.items()))

    def expect(message: str) -> None:
        assert message in refusal(sent, run)
        (run / run_folder.LORA).write_bytes(whole)

    (run / run_folder.LORA).write_bytes(whole[:-10])
    expect("is damaged")
    save_file(tensors, run / run_folder.LORA)
    expect("not written by rewardsr")
    header = {lora.OUR_HEADER: '{"base": {}}'}
    save_file(tensors | {name: tensor * torch.nan}, run / run_folder.LORA, header)
    expect(f"{name} holds values that are not finite")
    os.truncate(run / run_folder.LORA, parcel.LARGEST + 1)  # a hole, not bytes
    expect("larger than 5 GB")
    (run / run_folder.LORA).unlink()
    expect("it is not finished")
    (run / "metrics.jsonl").write_text('{"step": 1}\n')
    expect("ends at step 1 of 2")
    (run / "metrics.jsonl").write_text('{"step": 2}\n{"ste')
    expect("is damaged")
    assert "not the folder of a run" in refusal(sent, tmp_path)
    assert "Hub id of the form" in refusal(push, run, "tiny-sr", card=CARD)
    assert "cannot be a repository's name" in refusal(push, run, "ada/tiny--sr", card=CARD)
    assert "as --revision" in refusal(push, run, "ada/tiny@v2", card=CARD)
    assert not hub.requests


def test_pulling_needs_a_place_of_its_own(hub, run, tmp_path) -> None:
    sent(run)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine.txt").write_text("mine")
    assert "is not empty" in refusal(pull, REPO, tmp_path / "full")
    (tmp_path / "empty").mkdir()
    assert (pull(REPO, tmp_path / "empty") / run_folder.LORA).is_file()
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine.txt"]


def test_search_finds_by_tag_name_and_base(hub, run) -> None:
    sent(run)
    push(run, "ada/other", card=CARD.replace(BASE, "someone/else"), say=str)
    hub.add("bob/llm", **{"README.md": b"---\ntags: [text-generation]\n---\n"})
    assert {(found.id, found.base) for found in search()} == {(REPO, BASE), ("ada/other", "someone/else")}
    assert [found.id for found in search("tiny")] == [REPO]
    assert [found.id for found in search(base="someone/else")] == ["ada/other"]
    assert len(search(limit=1)) == 1 and not search("nothing like it")
    assert search("tiny")[0].updated.year == 2025


def test_search_without_a_connection(monkeypatch, hub) -> None:
    go_offline(monkeypatch)
    assert "cannot be reached" in refusal(search)
    assert not hub.requests


def test_the_card_of_a_base(hub, tmp_path, monkeypatch) -> None:
    model = hub.add(BASE, **{"README.md": b"its card"})
    assert rewardsr.hub.fetch.card_of(BASE, model.refs["main"]) == "its card"
    go_offline(monkeypatch)
    assert rewardsr.hub.fetch.card_of(BASE, model.refs["main"]) == "its card", "from the cache"
    assert rewardsr.hub.fetch.card_of("someone/else") is None and rewardsr.hub.fetch.card_of("no such folder") is None
    assert rewardsr.hub.fetch.card_of(str(tmp_path), "local") is None
    (tmp_path / "README.md").write_text("local card")
    assert rewardsr.hub.fetch.card_of(str(tmp_path), "local") == "local card"


def test_what_names_a_repository(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/tiny").mkdir(parents=True)
    for text in ("ada/tiny", "ada/tiny@v2", "ada/tiny@refs/pr/3", "a.b/c-d_e"):
        assert rewardsr.hub.fetch.is_reference(text), text
    for text in ("runs/tiny", "./tiny", "~/tiny", "/ada/tiny", "a/b/c", "tiny", "loras/x.safetensors", "a b/c", "ada/"):
        assert not rewardsr.hub.fetch.is_reference(text), text
    assert rewardsr.hub.fetch.split_reference("ada/tiny@refs/pr/3") == ("ada/tiny", "refs/pr/3")
    assert rewardsr.hub.fetch.split_reference("ada/tiny") == ("ada/tiny", None)
    assert "not a Hub id" in refusal(rewardsr.hub.fetch.split_reference, "ada/tiny@")
