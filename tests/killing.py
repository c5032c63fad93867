"""Runs two recipes and kills them, again and again, until they are finished: `python killing.py DISK RANDOM SEED`.

Each attempt is a fork of this process, which has imported everything and never trained (autograd does not survive a
fork): an attempt costs its steps and no imports. Prints what each attempt died of, as JSON.

- DISK: attempt n dies just before its n-th operation on the disk, and in the middle of a line of the log; one of them
  dies while the folder of an old checkpoint is removed, which the others may pass by.
- RANDOM: attempts die at random times.
"""

import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

import torch

from rewardsr import cli, load_adapter, run_folder
from rewardsr.rewards import build
from rewardsr.train import log
from rewardsr.train import recipe as recipes

LIMIT = 80  # attempts


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def arm(number: int, report: int, rare: str) -> None:
    """Die before the operation `number` (from 1), or the first called `rare`; its name goes into the pipe `report`."""
    count = 0

    def counted(name: str) -> bool:
        nonlocal count
        count += 1
        if count == number or name == rare:
            os.write(report, name.encode())
        return count == number or name == rare

    def wrap(name: str) -> None:
        original = getattr(os, name)

        def call(*args, **kwargs):
            if counted(name):
                die()
            return original(*args, **kwargs)

        setattr(os, name, call)

    def write(self, step, metrics, rows=()) -> None:
        if counted("half a line"):
            with self._file.open("a") as file:
                file.write(f'{{"step": {step}, "lo')
            die()
        whole(self, step, metrics, rows)

    for name in ("fsync", "replace", "unlink", "rmdir"):
        wrap(name)
    whole, log.RunLog.write = log.RunLog.write, write


def attempt(path: str, number: int | None, delay: float | None, rare: str = "") -> str | None:
    """What killed the attempt; None if it finished."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            if number is not None:
                arm(number, writing, rare)
            sys.argv = ["rewardsr", "finetune", path, "--resume"]
            cli.main()
        except SystemExit as leaving:
            os._exit(int(leaving.code or 0))
        except BaseException:
            traceback.print_exc()
        os._exit(1)
    os.close(writing)
    if delay is not None:
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    name = os.read(reading, 100).decode() or "at a random time"
    os.close(reading)
    if status not in (0, -signal.SIGKILL):
        raise SystemExit(f"an attempt ended with {status}")
    return None if status == 0 else name


def kill_until_finished(path: str, mode: str, chance: random.Random) -> list[tuple[str, int]]:
    """What each attempt died of, and the lines of the log then."""
    deaths = []
    log = Path(recipes.load_recipe(path, {}, []).output) / run_folder.METRICS
    for number in range(1, LIMIT):
        # The last attempts are left alone, for a loaded machine may never get far within the time.
        delay = chance.uniform(0.5, 2.0) if mode == "random" and number < LIMIT - 5 else None
        rare = "" if any(name == "rmdir" for name, _ in deaths) else "rmdir"
        death = attempt(path, number if mode == "disk" else None, delay, rare)
        if death is None:
            break
        deaths.append((death, log.read_text().count("\n") if log.exists() else 0))
    return deaths


def main() -> None:
    torch.set_num_threads(1)
    at_disk, at_random, seed = sys.argv[1:]
    content = recipes.load_recipe(at_disk, {}, [])
    load_adapter(content.adapter, content.base, **content.adapter_options)  # diffusers imports its classes when used
    build("psnr")
    chance = random.Random(int(seed))
    deaths = {
        mode: kill_until_finished(path, mode, chance) for mode, path in (("disk", at_disk), ("random", at_random))
    }
    print(json.dumps(deaths))


if __name__ == "__main__":
    main()
