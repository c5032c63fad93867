"""Bars of long work, on terminals of several widths and without one."""

import os
import subprocess
import sys
import time

import pytest
from _terminal import Terminal

from rewardsr import progress
from rewardsr.progress import Work

UPSCALE = """
import sys, time
from rewardsr import console, progress
with progress.bar("upscale", 4) as advance:
    for number in range(4):
        with progress.bar("tiles of a photograph", 3) as tile:
            for _ in range(3):
                time.sleep(0.2)
                tile()
        console.say(f"image {number} is done")
        advance(note="psnr 22.31  a note of many words that is only for the widest of all screens, with much room left")
"""


@pytest.mark.parametrize("columns", [40, 80, 200])
def test_what_fits_is_shown_and_what_is_printed_stands_above(columns) -> None:
    terminal = Terminal("-c", UPSCALE, columns=columns)
    assert terminal.end() == 0
    assert [line for line in terminal.lines if line] == [f"image {number} is done" for number in range(4)]
    assert max(map(len, terminal.frames)) <= columns
    late = next(line for line in reversed(terminal.frames) if line.startswith("upscale"))
    assert late.startswith("upscale 3/4  1.") and "  ETA 0:00:0" in late
    assert ("psnr 22.31" in late) == (columns > 40)
    assert ("only for the widest" in late) == (columns == 200)
    assert "━" in late or columns == 40
    tiles = [line for line in terminal.frames if line.startswith("tiles")]
    assert tiles and all("/3" in line for line in tiles)
    # The one that is nested appears below.
    place = terminal.frames.index(tiles[0])
    assert terminal.frames[place - 1].startswith("upscale 0/4")


@pytest.mark.parametrize("width", [1, 12, 20, 30, 36, 40, 60, 80, 120, 200])
def test_a_line_is_never_wider_than_the_screen_and_says_how_far_first(width) -> None:
    work = Work("step", 1_000_000, done=123_456, note="loss 0.693  a part of several words  " + "x" * 99)
    work.pace.extend([(time.monotonic() - 10, 123_425), (time.monotonic(), 123_456)])
    line = work.line(width)
    assert len(line) <= width
    full = "step 123456/1000000  3.1 it/s  ETA 78:"
    assert line.startswith(full if width > 60 else full[: min(width, 19)])
    assert width < 36 or "ETA 78:" in line
    for part in ("loss 0.693", "a part of several words"):
        assert part in line or part.split()[-1] not in line  # whole, or not at all


def test_the_first_is_slower_than_the_others_and_not_counted() -> None:
    work = Work("step", 12)
    work.began -= 100
    work.advance(1, "")
    assert work.rate == pytest.approx(0.01, rel=0.1) and work.left == pytest.approx(1100, rel=0.1)
    work.pace[0] = (work.pace[0][0] - 2, 1)
    work.advance(1, "")
    assert work.rate == pytest.approx(0.5, rel=0.1) and work.left == pytest.approx(20, rel=0.1)


@pytest.mark.parametrize("seconds,said", [(0.01, "100 it/s"), (0.32, "3.1 it/s"), (3.2, "3.2 s/it"), (60, "60 s/it")])
def test_speeds_are_said_so_that_they_can_be_read(seconds, said) -> None:
    work = Work("step", 1000, done=3)
    work.pace.extend([(time.monotonic() - seconds, 2), (time.monotonic(), 3)])
    assert f"  {said}  " in work.line(80)


def test_bytes_are_counted_in_megabytes() -> None:
    work = Work("pull", 40_000_000, done=10_000_000, unit="B")
    work.pace.extend([(time.monotonic() - 2, 0), (time.monotonic(), 10_000_000)])
    assert work.line(80).startswith("pull 10.0/40.0 MB  5.0 MB/s  ETA 0:00:0")


def test_wide_letters_are_counted_as_the_screen_has_them() -> None:
    line = Work("図" * 60, 9).line(40)
    assert len(line) < 36 and line.endswith("0/9  ETA -:--:--")


def run(script: str, **env: str) -> subprocess.CompletedProcess[str]:
    plain = {name: value for name, value in os.environ.items() if name != "RANK"}
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=plain | env, timeout=60)


def test_without_a_terminal_what_is_brief_says_nothing() -> None:
    done = run(UPSCALE)
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout == "".join(f"image {number} is done\n" for number in range(4))


def test_without_a_terminal_there_is_a_line_now_and_then_of_the_outermost() -> None:
    done = run(UPSCALE.replace("import console, progress\n", "import console, progress\nprogress.SELDOM = 1.0\n"))
    lines = done.stderr.splitlines()
    assert 1 <= len(lines) <= 3
    assert all(line.startswith("upscale ") and "/4  1." in line and "ETA 0:00:0" in line for line in lines)


def test_without_a_terminal_a_long_one_within_another_speaks() -> None:
    script = """
import time
from rewardsr import progress
progress.SELDOM = 0.5
with progress.bar("step", 2, every=1) as step:
    step()
    with progress.bar("validation", 9) as advance:
        for _ in range(9):
            time.sleep(0.15)
            advance()
    time.sleep(0.6)
    advance()  # nobody waits for it any more
    step()
"""
    lines = run(script).stderr.splitlines()
    assert [line.split()[0] for line in lines] == ["step", *["validation"] * (len(lines) - 2), "step"]
    assert 2 <= len(lines) - 2 <= 3 and all("/9  " in line and "ETA 0:00:0" in line for line in lines[1:-1])


def test_what_counts_within_a_wait_stands_for_it() -> None:
    script = """
import time
from rewardsr import progress
progress.PATIENCE = 0.1
with progress.waiting("importing"):
    time.sleep(0.6)
    with progress.bar("reading", 2):
        time.sleep(1.0)
    time.sleep(0.6)
"""
    terminal = Terminal("-c", script)
    assert terminal.end() == 0
    words = [line.split()[0] for line in terminal.frames]
    first, last = words.index("reading"), len(words) - 1 - words[::-1].index("reading")
    assert set(words[first : last + 1]) == {"reading"} and {words[first - 1], words[last + 1]} == {"importing"}


def test_lines_by_count() -> None:
    script = "from rewardsr import progress\nwith progress.bar('step', 100, done=7, every=25) as advance:\n"
    done = run(script + "    for number in range(93): advance(note=f'loss {number}')")
    assert [line.split()[1] for line in done.stderr.splitlines()] == ["25/100", "50/100", "75/100", "100/100"]
    assert "loss 92" in done.stderr


@pytest.mark.parametrize("rank,lines", [("0", 1), ("1", 0), ("12", 0)])
def test_of_several_processes_one_speaks(rank, lines) -> None:
    script = "import time\nfrom rewardsr import progress\nprogress.PATIENCE = 0.1\n"
    done = run(script + "with progress.waiting('loading x'): time.sleep(0.4)", RANK=rank)
    assert done.returncode == 0 and done.stderr == "loading x ...\n" * lines
    done = run(
        UPSCALE.replace("import console, progress\n", "import console, progress\nprogress.SELDOM = 0\n"), RANK=rank
    )
    assert bool(done.stderr) == bool(lines)


def test_waiting_says_so_in_time_and_not_of_what_is_quick(capfd, monkeypatch) -> None:
    monkeypatch.setattr(progress, "PATIENCE", 1.0)
    with progress.waiting("loading a small thing"):
        pass
    time.sleep(1.2)
    assert capfd.readouterr().err == ""
    began = time.monotonic()
    with progress.waiting("loading \x1b[31mnetworks"):
        while not (said := capfd.readouterr().err):
            assert time.monotonic() - began < 2
            time.sleep(0.05)
    assert said == "loading \\x1b[31mnetworks ...\n"


def test_waiting_on_a_terminal_shows_the_time() -> None:
    script = "import time\nfrom rewardsr import progress\nwith progress.waiting('loading x'): time.sleep(2.5)"
    terminal = Terminal("-c", script)
    assert terminal.end() == 0
    assert "loading x ... 0:00:02" in terminal.frames and not "".join(terminal.lines).strip()


def test_an_error_inside_leaves_the_screen_as_it_was_and_the_next_bar_works() -> None:
    script = """
import time
from rewardsr import progress
try:
    with progress.bar("outer", 2) as advance, progress.bar("inner", 2):
        time.sleep(0.5)
        raise ValueError
except ValueError:
    print("failed")
with progress.bar("next", 2) as advance:
    advance()
    time.sleep(0.5)
"""
    terminal = Terminal("-c", script)
    assert terminal.end() == 0
    assert [line for line in terminal.lines if line] == ["failed"]
    assert any(line.startswith("inner 0/2") for line in terminal.frames)
    assert terminal.frames[-1].startswith("next 1/2") and terminal.cursor


def test_ctrl_c_leaves_the_screen_as_it_was() -> None:
    script = "import time\nfrom rewardsr import progress\nwith progress.bar('long', 2) as advance: time.sleep(60)"
    terminal = Terminal("-c", script)
    terminal.read(terminal.shows("long 0/2"))
    terminal.send(2)
    assert terminal.end(seconds=5) == -2
    assert terminal.cursor and not any("long" in line for line in terminal.lines if "progress" not in line)


def test_a_pipe_beside_the_terminal_gets_what_is_printed(tmp_path) -> None:
    script = UPSCALE.replace("import sys, time", "import sys, time\nsys.stdout = open('printed', 'w')")
    terminal = Terminal("-c", script, cwd=tmp_path)
    assert terminal.end() == 0
    assert (tmp_path / "printed").read_text().count(" is done\n") == 4
    assert not any("is done" in line for line in terminal.frames)


def test_a_terminal_of_few_characters() -> None:
    terminal = Terminal("-c", UPSCALE, columns=100, env={"PYTHONIOENCODING": "ascii"})
    assert terminal.end() == 0
    assert any("###" in line for line in terminal.frames) and "".join(terminal.frames).isascii()
