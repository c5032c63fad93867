"""Nothing that comes from outside steers a terminal: control and escape sequences are shown, not sent."""

import json
import logging

import pytest
from _support import Commands

from rewardsr.hub import search
from rewardsr.hub.search import Found
from rewardsr.train.log import RunLog
from rewardsr.train.recipe import load_recipe

EVIL = "a\x1b]0;owned\x07\x1b[2J\x9b31m\u202ebc\u2066\r\x00"
SHOWN = "a\\x1b]0;owned\\x07\\x1b[2J\\x9b31m\\u202ebc\\u2066\\r\\x00"


def harmless(text: str) -> bool:
    return all(letter.isprintable() or letter == "\n" for letter in text)


def test_messages_and_warnings(commands: Commands, capfd) -> None:
    assert commands("rewards").code == 0  # sets the console up
    for level in (logging.INFO, logging.WARNING):
        logging.getLogger("rewardsr.x").log(level, "prompt %s\nsecond line", EVIL)
    out, err = capfd.readouterr()
    assert SHOWN in out and SHOWN in err and harmless(out) and harmless(err)
    assert out.count("\n") == 2


def test_answers_of_a_server(commands: Commands, monkeypatch) -> None:
    monkeypatch.setattr(search, "online", lambda: True)
    found = Found(f"ada/{EVIL}\nforged line", EVIL, 1, 1, None)
    monkeypatch.setattr(search, "search", lambda *_: [found])
    answer = commands("search")
    assert SHOWN in answer.out and harmless(answer.out) and answer.out.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ("finetune", EVIL.replace("\0", "")),
        ("finetune", "--set", f"{EVIL}=1"),
        ("finetune", "--adapter", EVIL),
        ("upscale", EVIL.replace("\0", ""), "-o", "out", "--base", "x"),
        ("adapters", EVIL),
        ("pull", EVIL),
        ("push", "run", EVIL),
        ("export", "out", "--format", EVIL, "--base", "embedded"),
        ("upscale", "x", "-o", "out", "--base", "embedded", "--option", f"{EVIL}=1"),
    ],
)
def test_errors(refused, tmp_path, monkeypatch, arguments) -> None:
    monkeypatch.chdir(tmp_path)
    assert harmless(refused(*arguments))


def test_names_of_rewards_in_the_progress_of_a_run(tmp_path, capfd) -> None:
    least = {"base": "b", "rewards": [{"name": "psnr"}], "data": {"train": "x"}, "output": "o", "steps": 3}
    with RunLog(tmp_path, load_recipe(None, least, []), 0, active=True) as log:
        log.write(1, {"loss": 1.0, f"reference/[red]{EVIL}": 2.0})
    shown = "".join(capfd.readouterr())
    assert harmless(shown) and f"[red]{SHOWN}" in shown.replace("\n", "")


@pytest.mark.parametrize(
    "line",
    ["[1]", "3", '"x"', "null", '{"step": "2"}', '{"step": NaN}', '{"step": -1}', "{", "[" * 9999, '{"a": 1}', "ÿ"],
)
def test_odd_lines_of_the_log_do_not_break_a_resume(tmp_path, line) -> None:
    least = {"base": "b", "rewards": [{"name": "psnr"}], "data": {"train": "x"}, "output": "o", "steps": 3}
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(b'{"step": 0, "validation": {}}\n' + line.encode("latin-1") + b'\n{"step": 1}\n{"step": 2}\n{"st')
    with RunLog(tmp_path, load_recipe(None, least, []), 1, active=True) as log:
        assert set(log.validated) == {0}
    assert [json.loads(one)["step"] for one in file.read_text().splitlines()] == [0, 1]
