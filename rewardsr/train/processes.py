"""The processes of a launch, as the environment describes them; accelerate is the engine."""

import atexit
import os
from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import InitProcessGroupKwargs

from rewardsr.errors import UserError, one_line, shown

# What a configuration of accelerate may ask for. They split or rewrite networks, which is not done here: every process
# has the whole pipeline, and the LoRA's gradients are averaged.
ENGINES = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
}
# How long a process waits for another: shares of a validation may differ by the size of their images. A process that
# fails takes the others along at once.
PATIENCE = timedelta(hours=2)
COUNTERS = ("WORLD_SIZE", "RANK", "LOCAL_RANK")
_OFF = {"", "0", "false", "no", "off", "n", "f"}


def make_accelerator(device: torch.device) -> Accelerator:
    """accelerate, set up for the processes that the environment speaks of; alone where it speaks of none.

    Its mixed precision stays off, whatever the environment says: precision is the recipe's.

    Raises:
        UserError: the environment is not that of a launch, or asks for an engine that splits networks.
    """
    check_environment()
    for name in COUNTERS:
        if os.environ.get(name) == "":  # as good as none; accelerate would read a number
            del os.environ[name]
    # accelerate has one state a process: a second run there, on another device, needs a fresh one.
    if PartialState._shared_state and PartialState().device.type != device.type:
        AcceleratorState._reset_state(reset_partial_state=True)
    try:
        waiting = InitProcessGroupKwargs(timeout=PATIENCE)
        made = Accelerator(cpu=device.type == "cpu", mixed_precision="no", kwargs_handlers=[waiting])
    except Exception as error:  # it raises what it stumbles over in the environment, or what torch.distributed does
        raise UserError(
            f"accelerate cannot set up the processes: {one_line(error)}; look at the variables ACCELERATE_*, "
            "MASTER_ADDR and MASTER_PORT, or start with accelerate launch"
        ) from error
    if made.num_processes > 1:  # its threads must not outlive the interpreter: that ends a finished run with an abort
        atexit.unregister(_leave_group)
        atexit.register(_leave_group)
    return made


def _leave_group() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def check_environment() -> None:
    """Refuse variables that no launcher sets so.

    Raises:
        UserError: as `make_accelerator`.
    """
    for name, engine in ENGINES.items():
        if os.environ.get(name, "").lower() not in _OFF:
            raise UserError(f"{name} asks for {engine}, which has no use here: unset it, or launch without {engine}")
    given = {name: os.environ[name] for name in COUNTERS if os.environ.get(name)}
    for name, value in given.items():
        if not (value.isascii() and value.isdecimal() and len(value) < 7):
            raise UserError(
                f"{name} is {shown(value)}, expected a whole number: unset it, or start with accelerate launch"
            )
    processes, rank = int(given.get("WORLD_SIZE", 1)), int(given.get("RANK", 0))
    if not rank < processes:
        raise UserError(
            f"RANK is {rank}, but there are {processes} processes by WORLD_SIZE: start with accelerate launch"
        )
    lacking = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if processes > 1 and lacking:
        raise UserError(f"WORLD_SIZE is {processes}, but {lacking[0]} is not set: start with accelerate launch")
