"""What goes wrong between here and the Hub during a push: each fault, the line that it gives, and what it leaves.

`pytest tests/hub/test_publish_faults.py -rP` prints the table.
"""

import hashlib

import huggingface_hub
import pytest
from _publishing import REPO, SENT, refusal, sent

ALWAYS = 99
# Where a push asks for something.
STEPS = {
    "whoami": ("GET", "/whoami"),
    "look up": ("GET", f"/api/models/{REPO}$"),
    "create": ("POST", "/repos/create"),
    "refs": ("GET", "/refs"),
    "branch": ("POST", "/branch/"),
    "validate": ("POST", "/validate-yaml"),
    "preupload": ("POST", "/preupload/"),
    "LFS batch": ("POST", "/objects/batch"),
    "LFS PUT": ("PUT", "/storage/"),
    "LFS verify": ("POST", "/storage/verify"),
    "commit": ("POST", "/commit/"),
}
FAULTS = (401, 403, 404, 409, 500, 503, "cut", "lost")


def ask(hub, step: str, fault: int | str, times: int = ALWAYS) -> None:
    if isinstance(fault, int):
        hub.fail(*STEPS[step], status=fault, times=times)
    else:
        hub.fail(*STEPS[step], fault, times=times)


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
    options = {"revision": "v2"} if step in ("refs", "branch") else {}
    if step != "create":
        hub.add(REPO, **{"README.md": b"before"})
    before = state(hub)
    ask(hub, step, fault)
    line = refusal(sent, finished, **options)
    print(f"{step:10} {fault} | {line}")
    assert line.startswith(f"push to '{REPO}' failed while ") and "left every branch as it was" in line
    assert (f"({fault}" if isinstance(fault, int) else "no proper answer from the Hub") in line
    if fault == "lost" and step in ("create", "branch", "commit"):  # the Hub has done it, whole
        assert all(
            set(files) in ({".gitattributes"}, {".gitattributes", "README.md"}, SENT | {".gitattributes"})
            for files in state(hub).values()
        )
        assert state(hub) != before and ("only the answer was lost" in line) == (step == "commit")
    else:
        assert state(hub) == before
    hub.faults.clear()
    sent(finished, **options)
    model = hub.model(REPO)
    assert set(model.files(**options)) >= SENT, "the same push works afterwards"
    assert len(model.commits) == 2, "and nothing is committed twice"


@pytest.mark.parametrize("fault", [403, 503, "cut"])
@pytest.mark.parametrize("step", ["preupload", "LFS PUT", "commit"])
@pytest.mark.parametrize("revision", [None, "v2"])
def test_what_was_made_for_the_commit_is_named(hub, finished, step, fault, revision) -> None:
    if revision is not None:
        hub.add(REPO)
    ask(hub, step, fault)
    line = refusal(sent, finished, revision=revision)
    made = f"the repository ({hub.url}/{REPO}/settings)" if revision is None else "the branch 'v2'"
    assert line.endswith(f"; it created {made}")
    assert all(set(files) == {".gitattributes"} for files in state(hub).values())
    hub.faults.clear()
    sent(finished, revision=revision)
    assert set(hub.model(REPO).files(revision or "main")) >= SENT


def test_a_commit_of_somebody_else_in_between_is_not_overwritten(hub, finished, monkeypatch) -> None:
    model = hub.add(REPO)
    prepare = huggingface_hub.HfApi.preupload_lfs_files

    def meanwhile(self, *arguments: object, **options: object) -> None:
        model.commit("main", {"README.md": b"theirs"}, "theirs")
        prepare(self, *arguments, **options)

    monkeypatch.setattr(huggingface_hub.HfApi, "preupload_lfs_files", meanwhile)
    assert "something else was pushed in the meantime (412" in refusal(sent, finished)
    assert model.files() == {"README.md": b"theirs"}


def test_the_client_tries_again_where_the_hub_stumbles(hub, finished) -> None:
    for step in ("preupload", "LFS batch", "LFS PUT"):
        ask(hub, step, 503, times=2)
    assert sent(finished).commit == hub.model(REPO).refs["main"]
