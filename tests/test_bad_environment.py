"""Odd environments, terminals and readers: one line, or it works all the same."""

import os
import subprocess
import sys

import pytest
from _support import Commands

from rewardsr.errors import UserError
from rewardsr.hub import connection
from rewardsr.train.processes import check_environment


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"RANK": "x"}, "RANK is 'x', expected a whole number"),
        ({"RANK": "1"}, "RANK is 1, but there are 1 processes"),
        ({"LOCAL_RANK": "-1"}, "LOCAL_RANK is '-1'"),
        ({"WORLD_SIZE": "many"}, "WORLD_SIZE is 'many'"),
        ({"WORLD_SIZE": "9" * 5000}, "WORLD_SIZE is '999"),
        ({"WORLD_SIZE": "2"}, "RANK is not set"),
        ({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}, "MASTER_ADDR is not set"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "asks for DeepSpeed"),
        ({"ACCELERATE_USE_FSDP": "1"}, "asks for FSDP"),
        ({"ACCELERATE_DYNAMO_BACKEND": "x"}, "accelerate cannot set up the processes: ValueError"),
        ({"ACCELERATE_USE_CPU": "maybe"}, "accelerate cannot set up the processes: ValueError"),
    ],
)
def test_what_no_launcher_sets(refused, tiny_base, hq_folder, tmp_path, monkeypatch, variables, says) -> None:
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)  # as in a process that has not trained yet
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert says in refused.finetune(tiny_base, hq_folder, tmp_path / "run")


@pytest.mark.parametrize(
    "variables",
    [
        {"RANK": "", "WORLD_SIZE": "", "LOCAL_RANK": ""},
        {"ACCELERATE_MIXED_PRECISION": "fp8"},
        {"ACCELERATE_MIXED_PRECISION": "nonsense"},
        {"ACCELERATE_USE_DEEPSPEED": "false"},
        {"COLUMNS": "x", "TERM": "nonsense", "LANG": "xx_YY", "LC_ALL": "C"},
    ],
)
def test_what_means_nothing_here(commands: Commands, tiny_base, hq_folder, tmp_path, monkeypatch, variables) -> None:
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    answer = commands.finetune(tiny_base, hq_folder, tmp_path / "run", "--dry-run")
    assert answer.code == 0 and "one step:" in answer.out, answer.err


def test_a_launch_as_launchers_describe_it(monkeypatch) -> None:
    launch = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    for name, value in launch.items():
        monkeypatch.setenv(name, value)
    check_environment()
    monkeypatch.setenv("RANK", "2")
    with pytest.raises(UserError, match="there are 2 processes"):
        check_environment()


@pytest.mark.parametrize(
    "endpoint", ["http://[", "https://host:port", "nonsense", "ftp://host", "https://", "http://a\x1b[31m"]
)
def test_an_endpoint_that_is_no_address(commands: Commands, contacted, monkeypatch, endpoint) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    connection.online.cache_clear()
    for command in (("search",), ("pull", "a/b"), ("export", "out", "--format", "kohya", "--run", "a/b")):
        answer = commands(*command)
        assert answer.code == 2 and "HF_ENDPOINT is " in answer.err and answer.err.count("\n") == 1, answer.err
        assert "\x1b" not in answer.err
    connection.online.cache_clear()


def piped(*arguments: str, reader: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = f"{sys.executable} -m rewardsr {' '.join(arguments)} | {reader}; exit ${{PIPESTATUS[0]}}"
    return subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, env={**os.environ, **variables}, timeout=300
    )


def test_a_reader_that_has_seen_enough() -> None:
    done = piped("adapters", reader="true")
    assert (done.returncode, done.stderr) == (0, "")


def test_a_terminal_of_few_characters(tmp_path) -> None:
    name = "größe\u202e.yaml"
    done = piped("finetune", f"'{name}'", reader="cat", PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert done.returncode == 2 and "gr\\xf6\\xdfe\\u202e.yaml" in done.stderr, done.stderr
