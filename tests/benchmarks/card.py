"""All that one card has to show, in order of its worth, each within a limit of time.

    python tests/benchmarks/card.py --output FOLDER [--minutes 10]

Leaves a text file for each part; what runs out of its time has left there what it printed until then.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
STEP = ("gdpo_step.py", "--size", "sd21", "--device", "cuda", "--no-count")
RECORDED = (*STEP, "--cuda-graphs")
# Name, command (a script of this folder, or a module of Python's), seconds at most.
PARTS = (
    ("gpu_tests", ("-m", "pytest", "-q", "-m", "gpu", str(HERE.parent)), 180),
    ("gdpo", (*RECORDED, "--form", "paper", "conditional", "shared", "--against", "released"), 90),
    ("gdpo_as_written", (*STEP, "--no-parts"), 40),
    ("gdpo_batch_2", (*RECORDED, "--batch", "2", "--no-parts", "--fixed-prompt"), 40),
    ("rfsr", (*RECORDED, "--trainer", "rfsr", "--against", "released"), 60),
    ("checkpointing", (*RECORDED, "--gradient-checkpointing", "--no-parts"), 30),
    ("rewards", ("rewards.py", "--device", "cuda", "--size", "512", "--images", "6", "--metrics", "maniqa,musiq"), 90),
    ("growth", ("growth.py", "--size", "sd21", "--device", "cuda", "--steps", "1"), 120),
    (
        "rfsr_seesr",
        (*RECORDED, "--trainer", "rfsr", "--adapter", "seesr", "--rollout", "none", "--against", "released"),
        90,
    ),
    ("compile", (*STEP, "--compile", "--fixed-prompt", "--no-parts"), 540),
)


def main() -> None:
    """Run the parts, one after another, while there is time."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder of the text files")
    parser.add_argument("--minutes", type=float, default=60, help="for all parts together")
    parser.add_argument("--only", nargs="+", choices=[name for name, *_ in PARTS])
    chosen = parser.parse_args()
    chosen.output.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * chosen.minutes
    for name, command, most in PARTS:
        left = min(most, end - time.monotonic())
        if (chosen.only and name not in chosen.only) or left <= 0:
            continue
        whole = command if command[0] == "-m" else (str(HERE / command[0]), *command[1:])
        began = time.monotonic()
        with (chosen.output / f"{name}.txt").open("w") as file:
            try:
                code = subprocess.run([sys.executable, "-u", *whole], stdout=file, stderr=file, timeout=left).returncode
            except subprocess.TimeoutExpired:
                code = "out of time"
        print(f"{name}: {code}, {time.monotonic() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
