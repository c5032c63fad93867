"""Paths as users write them, and writing whole or not at all."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from rewardsr.errors import UserError
from rewardsr.storage import check_folder, expand, remove_own_leftovers, write_bytes, write_folder

STUCK = """
import sys, time
from pathlib import Path
from rewardsr import storage

def stuck(*_):
    print("writing", flush=True)
    time.sleep(60)

def fill(folder):
    (folder / "half").write_bytes(b"half")
    stuck()

storage.os.fsync = stuck
path = Path(sys.argv[1])
storage.write_folder(path, fill) if path.suffix == "" else storage.write_bytes(path, b"half")
"""


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


def test_where_no_folder_can_be(tmp_path, monkeypatch) -> None:
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "dead").symlink_to("gone")
    for path in (tmp_path / "file", tmp_path / "file" / "a" / "b", tmp_path / "dead" / "a"):
        with pytest.raises(UserError, match="is a file; give a folder"):
            check_folder(path)
    check_folder(tmp_path / "a" / "b")
    monkeypatch.chdir(tmp_path)
    check_folder(Path("a"))
    monkeypatch.setattr(os, "access", lambda path, _: Path(path) != tmp_path)  # root may write anywhere
    with pytest.raises(UserError, match=f"output '{tmp_path}/a': no permission to write in '{tmp_path}'"):
        check_folder(Path("a"))
    assert sorted(os.listdir(tmp_path)) == ["dead", "file"]


# ---- writing ----


def stuck(path: Path) -> subprocess.Popen:
    """A process that does not get on while it writes a file or, without a suffix, a folder."""
    process = subprocess.Popen([sys.executable, "-c", STUCK, str(path)], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"writing\n"
    return process


def whole(folder: Path) -> None:
    (folder / "whole").write_bytes(b"whole")


def listing(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_the_next_writer_clears_away_what_a_killed_one_left(tmp_path) -> None:
    for name in ("a.bin", "folder"):
        process = stuck(tmp_path / name)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert [name.endswith(".tmp") for name in os.listdir(tmp_path)] == [True, True]
    write_bytes(tmp_path / "a.bin", b"whole")
    write_folder(tmp_path / "folder", whole)
    assert listing(tmp_path) == ["a.bin", "folder", "folder/whole"]


def test_leftovers_are_removed_but_not_what_is_being_written(tmp_path) -> None:
    processes = [stuck(tmp_path / name) for name in ("a.bin", "folder")]
    before = listing(tmp_path)
    assert len(before) == 3
    remove_own_leftovers(tmp_path)
    assert listing(tmp_path) == before
    for process in processes:
        process.kill()
        process.wait()
    (tmp_path / ".notes.tmp").write_text("somebody else's")
    remove_own_leftovers(tmp_path)
    assert listing(tmp_path) == [".notes.tmp"]


def test_writers_of_one_file_do_not_mix(tmp_path) -> None:
    contents = [bytes([number]) * 300_000 for number in range(8)]
    threads = [threading.Thread(target=write_bytes, args=(tmp_path / "a.bin", content)) for content in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (tmp_path / "a.bin").read_bytes() in contents
    assert listing(tmp_path) == ["a.bin"]


@pytest.mark.parametrize("length", [249, 255])
def test_names_as_long_as_the_file_system_takes(tmp_path, length) -> None:
    for name in ("n" * length, "é" * (length // 2)):
        write_bytes(tmp_path / name, b"whole")
        write_folder(tmp_path / "in" / name, whole)
        assert (tmp_path / name).read_bytes() == b"whole"
    with pytest.raises(UserError, match=r"cannot write .* too long"):
        write_bytes(tmp_path / ("n" * 256), b"")
    assert len(listing(tmp_path)) == 7
