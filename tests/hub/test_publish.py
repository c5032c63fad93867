"""Publishing: the real client of the Hub against a Hub on 127.0.0.1."""

import hashlib
import logging
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from _publishing import BASE, CARD, OTHER, REPO, SENT, TOKEN, client_environment, go_offline, refusal, sent
from _support import snapshot
from huggingface_hub import HfApi
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from huggingface_hub.utils import tqdm as hub_bar
from safetensors.torch import load_file, save_file

from rewardsr import progress, run_folder
from rewardsr.hub import publish
from rewardsr.hub.fetch import LARGEST, pull
from rewardsr.hub.publish import push


def hashes(files: dict[str, bytes]) -> dict[str, str]:
    return {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}


def test_what_is_pushed_is_what_is_pulled(hub, run, tmp_path, caplog) -> None:
    caplog.set_level(logging.INFO, "rewardsr")
    pushed = sent(run, keep_paths=True)
    model = hub.model(REPO)
    assert pushed.commit == model.refs["main"]
    assert list(model.titles.values())[1:] == [model.titles[pushed.commit]], "one commit beside the Hub's own first"
    assert set(model.files()) == SENT | {".gitattributes"}, "no checkpoints, no optimiser state"
    assert set(pushed.plan.files) == SENT and all(any(name in line for line in caplog.messages) for name in SENT)
    assert hub.count("POST", "/commit/") == 1 and not model.private

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


def test_bytes_are_counted_as_they_are_sent(hub, tmp_path, monkeypatch, capfd) -> None:
    """Each once, though an upload is tried twice, and the client reads some of them before."""
    monkeypatch.setattr(progress, "SELDOM", 0)
    files = {
        "a.safetensors": bytes(range(250)) * 10_000,
        "b.png": bytes(500_000),
        "README.md": CARD.encode() + b" " * 100_000,
    }
    hub.fail("PUT", "/storage/", status=503)
    publish._send(HfApi(token=TOKEN), publish.Plan(tmp_path, REPO, files), None)
    assert {name: content for name, content in hub.model(REPO).files().items() if name in files} == files
    counts = re.findall(rf"^sending to {REPO} (\d\.\d)/3\.1 MB  ", capfd.readouterr().err, re.MULTILINE)
    assert counts == sorted(counts) and counts[-1] == "3.1" and len(set(counts)) > 10


def test_what_xet_takes_is_counted_by_the_clients_own_bars(capfd) -> None:
    """Which show nothing meanwhile, are as before after it, and are made even where another library wants none."""
    before, told = (hub_bar.__init__, hub_bar.display), list[int]()
    disable_progress_bars()
    with publish._by_xet(told.append):
        whole, new, single = (hub_bar(total=0, unit="B", miniters=1) for _ in range(3))
        for bar, step in ((single, 1_000), (whole, 3_000), (new, 2_000), (whole, 4_000)):
            bar.total = 7_000
            bar.update(step)
        for bar in (whole, new, single):
            bar.close()
        assert sum(hub_bar([1, 2, 3], desc="Upload 3 LFS files")) == 6
    assert sum(told) == 7_000 and [count for count in told if count] == [1_000, 2_000, 4_000]
    assert capfd.readouterr().err == "" and (hub_bar.__init__, hub_bar.display) == before
    assert are_progress_bars_disabled()
    enable_progress_bars()
    reporter = pytest.importorskip("huggingface_hub.utils._xet_progress_reporting")
    with publish._by_xet(told.append):
        assert reporter.tqdm is hub_bar, "it makes its bars of another class"


def test_a_second_push_updates_and_a_third_has_nothing_to_say(hub, run) -> None:
    first = sent(run)
    (run / "metrics.jsonl").write_text('{"step": 2, "loss": 0.1}\n')
    second = sent(run)
    assert second.commit != first.commit
    assert hub.model(REPO).files()["metrics.jsonl"] == (run / "metrics.jsonl").read_bytes()
    assert sent(run).commit == second.commit and len(hub.model(REPO).commits) == 3


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


def test_a_revision_is_a_branch_that_is_made_if_need_be(hub, run) -> None:
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
    before = snapshot(run)
    pushed = sent(run, dry_run=True, keep_paths=True)
    assert pushed.commit is None and not contacted and not hub.requests and snapshot(run) == before
    size = (run / run_folder.LORA).stat().st_size
    assert any(f"{size:,d} bytes" in line and run_folder.LORA in line for line in pushed.plan.lines())


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
    environment = client_environment(hub, tmp_path / "home")
    subprocess.run([client, *command[1:]], env=environment, check=True, capture_output=True, timeout=60)
    assert set(hub.model(REPO).files()) == SENT | {".gitattributes"} and hub.model(REPO).private


@pytest.mark.parametrize(
    ("token", "repo", "message"),
    [
        ("hf_read", REPO, "can only read"),
        ("hf_of_yesterday", REPO, "does not accept the token (401"),
        (TOKEN, "bob/tiny-sr", "'bob/tiny-sr' is not yours"),
        (TOKEN, "club/tiny-sr", "'club/tiny-sr' is not yours"),  # there ada may only read
    ],
)
def test_a_token_that_does_not_do_is_refused_before_anything_is_made(
    hub, finished, monkeypatch, token, repo, message
) -> None:
    hub.add_token("hf_read", "ada", role="read")
    monkeypatch.setenv("HF_TOKEN", token)
    assert message in refusal(push, finished, repo, card=CARD)
    assert not hub.repositories and not hub.objects and not hub.count("POST", "")


def test_an_organisation_that_one_may_write_to(hub, finished) -> None:
    assert push(finished, "lab/tiny-sr", card=CARD).commit == hub.model("lab/tiny-sr").refs["main"]


@pytest.mark.parametrize("kind", ["dataset", "space"])
def test_a_name_that_something_else_has(hub, finished, kind) -> None:
    hub.add(REPO, kind)
    assert refusal(sent, finished) == f"'{REPO}' is a {kind} on the Hub: choose another name"
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
def test_an_invalid_card(hub, finished, card, message) -> None:
    assert message in refusal(push, finished, REPO, card=card)
    assert not hub.requests


def test_a_card_that_only_the_hub_can_refuse(hub, finished) -> None:
    line = refusal(push, finished, REPO, card=CARD.replace("apache-2.0", "no-such-licence"))
    assert '"license" must be one of' in line and "it created the repository" in line
    assert set(hub.model(REPO).files()) == {".gitattributes"} and not hub.objects


def no_lora(run: Path) -> None:
    (run / run_folder.LORA).unlink()


def truncated(run: Path) -> None:
    (run / run_folder.LORA).write_bytes((run / run_folder.LORA).read_bytes()[:-10])


def without_header(run: Path) -> None:
    save_file(load_file(run / run_folder.LORA), run / run_folder.LORA)


def not_finite(run: Path) -> None:
    tensors = load_file(run / run_folder.LORA)
    header = {run_folder.OUR_HEADER: '{"base": {"revision": "local"}, "rank": 2, "alpha": 8}'}
    save_file(tensors | {"unet.conv_in.lora_A.weight": torch.tensor(torch.nan)}, run / run_folder.LORA, header)


def too_large(run: Path) -> None:
    os.truncate(run / run_folder.LORA, LARGEST + 1)  # a hole, not bytes


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (no_lora, "it is not finished"),
        (truncated, "is damaged"),
        (without_header, "was not written by rewardsr"),
        (not_finite, "unet.conv_in.lora_A.weight holds values that are not finite"),
        (too_large, "larger than 5 GB"),
        (lambda run: (run / "metrics.jsonl").write_text('{"step": 1}\n'), "ends at step 1 of 2"),
        (lambda run: (run / "metrics.jsonl").write_text('{"step": 2}\n{"ste'), "is damaged"),
        (lambda run: (run / "recipe.yaml").unlink(), "not the folder of a run"),
    ],
)
def test_a_run_that_cannot_be_published(hub, run, damage, message) -> None:
    damage(run)
    assert message in refusal(sent, run)
    assert not hub.requests


@pytest.mark.parametrize(
    ("repo", "options", "message"),
    [
        ("tiny-sr", {}, "Hub id of the form"),
        ("ada/tiny--sr", {}, "cannot be a repository's name"),
        ("ada/tiny@v2", {}, "as --revision"),
        (REPO, {"create_pr": True, "revision": "v2"}, "not both"),
        (REPO, {"card": CARD, "licence": "mit"}, "not both"),
    ],
)
def test_arguments_that_cannot_be(hub, finished, repo, options, message) -> None:
    assert message in refusal(push, finished, repo, **options)
    assert not hub.requests
