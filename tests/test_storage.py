"""Paths as users write them."""

from pathlib import Path

import pytest

from rewardsr.errors import UserError
from rewardsr.storage import expand


def test_home_folders_are_put_in(monkeypatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    assert expand("~/runs/x") == expand(Path("~/runs/x")) == Path("/home/somebody/runs/x")
    assert expand("~") == Path("/home/somebody")
    assert expand("~root/x") == Path("~root/x").expanduser() != Path("~root/x")
    for same in ("runs/x", "a/~/b", "../x", "/x"):
        assert expand(same) == Path(same)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("~nosuchuser/x", "'~nosuchuser/x': there is no home folder of ~nosuchuser: write the whole path"),
        ("a/b\0c", r"'a/b\\x00c' holds a character"),
        ("missing/\ud800", r"'missing/\\ud800' holds a character"),
        ("missing/" + "n" * 256 + "/x", "too long for a file name"),
        ("/".join(["n" * 250] * 20), "too long for a file name"),
        ("", "a path is empty"),
    ],
)
def test_paths_that_cannot_be(path, message) -> None:
    for given in (path, Path(path)) if path else (path,):
        with pytest.raises(UserError, match=message) as caught:
            expand(given)
        assert len(str(caught.value)) < 200


def test_a_file_whose_name_begins_with_a_tilde(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("./~nosuchuser.png").write_bytes(b"")
    assert expand("~nosuchuser.png") == Path("~nosuchuser.png")
    assert expand("n" * 255) == Path("n" * 255)
