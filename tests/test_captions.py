"""Prompts from text files."""

import pytest

from rewardsr.data.captions import prompt_folder, resolve_prompts, sidecar_prompt
from rewardsr.errors import UserError


def test_beside_the_image(tmp_path) -> None:
    (tmp_path / "a.txt").write_bytes("\ufeff  a cat,\r\n on a  mât \n".encode())
    assert sidecar_prompt(tmp_path / "a.png") == "a cat, on a mât"
    assert sidecar_prompt(tmp_path / "b.png") is None


def test_in_a_folder(tmp_path) -> None:
    (tmp_path / "tag").mkdir()
    (tmp_path / "tag" / "a.txt").write_text("")
    assert sidecar_prompt(tmp_path / "a.png") is None
    assert sidecar_prompt(tmp_path / "a.png", tmp_path / "tag") == ""
    assert prompt_folder(tmp_path) == tmp_path / "tag"
    assert prompt_folder(tmp_path / "tag") is None


def test_dots_in_names(tmp_path) -> None:
    (tmp_path / "a.b.txt").write_text("right")
    (tmp_path / "a.txt").write_text("wrong")
    assert sidecar_prompt(tmp_path / "a.b.png") == "right"


def test_not_utf8(tmp_path) -> None:
    (tmp_path / "a.txt").write_bytes("é".encode("latin-1"))
    with pytest.raises(UserError, match=r"a\.txt.*UTF-8"):
        sidecar_prompt(tmp_path / "a.png")


def test_resolve(tmp_path) -> None:
    paths = [tmp_path / f"{name}.png" for name in "abcde"]
    assert resolve_prompts(paths, "adapter") is None
    assert resolve_prompts(paths, "a photo") == ["a photo"] * 5
    (tmp_path / "a.txt").write_text("first")
    assert resolve_prompts(paths[:1], "sidecar") == ["first"]
    with pytest.raises(UserError, match=r"4 of 5 images have no prompt file .*b\.png, c\.png, d\.png, \.\.\."):
        resolve_prompts(paths, "sidecar")
