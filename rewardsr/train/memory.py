"""How much of a batch fits the memory at once: tried out at the start, lowered where it was too much after all."""

import logging

import torch

from rewardsr.draws import Draws
from rewardsr.errors import is_out_of_memory
from rewardsr.together import everywhere
from rewardsr.train.checkpoint import State
from rewardsr.train.graphs import use_graphs
from rewardsr.train.prepare import Setup

logger = logging.getLogger(__name__)

MEMORY_OPTIONS = ("micro_batch", "reward_crop")  # of methods, where they have them; what helps most comes first
SPARE = 0.08  # share of the card that is left alone: memory falls into pieces, and libraries take some for themselves


def memory_advice(setup: Setup, *first: str) -> str:
    """What to change where memory ran out; `first` are keys of the recipe's `data` that help before all others."""
    recipe = setup.recipe
    levers = [f"data.{name} (now {getattr(recipe.data, name)})" for name in first]
    levers += [f"gradient_checkpointing (now {recipe.gradient_checkpointing})"]
    options = [name for name in MEMORY_OPTIONS if name in setup.method.Options.model_fields]
    levers += [f"trainer_options.{name} (now {_now(setup, name)})" for name in options]
    levers += [f"data.crop (now {recipe.data.crop})"]
    return f"out of memory on {setup.accelerator.device}; what helps most, in this order: {', '.join(levers)}"


def _now(setup: Setup, option: str) -> object:
    value = getattr(setup.method.options, option)
    return value if value != "auto" else f"auto: {setup.method.micro_batch or 'all'}"


def is_automatic(setup: Setup) -> bool:
    """Whether the method's `micro_batch` is to be found out."""
    return getattr(setup.method.options, "micro_batch", None) == "auto"


def choose_micro_batch(setup: Setup, state: State) -> None:
    """Let the method take as many rows at once as fit the card: all, or what two small passes tell of one row's share.

    A run that goes on keeps what it had. On a CPU memory is not what limits a pass: it takes all.
    """
    method, device = setup.method, setup.accelerator.device
    if not is_automatic(setup) or device.type != "cuda":
        return
    whole = method.rows_per_image * setup.recipe.batch_size
    if state.micro_batch == 0:  # processes wait for each other in every step: the least of them serves all
        state.micro_batch = min(everywhere(setup.accelerator, lambda: _fitting(setup, whole)))
    method.micro_batch = None if state.micro_batch >= whole else state.micro_batch
    if method.micro_batch is not None:
        logger.info("micro_batch: %d of %d rows at once fit the memory of %s", method.micro_batch, whole, device)


def lower_micro_batch(setup: Setup, state: State) -> bool:
    """Halve the rows of a pass after memory ran out, if they may be and no update of this step has been made yet."""
    whole = setup.method.rows_per_image * setup.recipe.batch_size
    now = setup.method.micro_batch or whole
    if not is_automatic(setup) or now == 1 or state.updates != state.step * setup.recipe.updates_per_group:
        return False
    setup.method.micro_batch = state.micro_batch = now // 2
    if setup.adapter.network_call is not None:  # they hold the memory of what was too much
        use_graphs(setup.adapter, setup.method.trained_weights().values())
    logger.warning("out of memory: the step is taken again, and all that follow, with %d rows at once", now // 2)
    if setup.accelerator.device.type == "cuda":
        torch.cuda.empty_cache()
    return True


def _fitting(setup: Setup, whole: int) -> int:
    """Rows that fit: what one and two need tells what more would. Memory grows with rows in a straight line."""
    device = setup.accelerator.device
    indices = list(range(setup.recipe.batch_size))
    batch = setup.data.batch(setup.recipe.seed, indices).to(device)
    needed = []
    for rows in (1, 2):
        setup.method.micro_batch = min(rows, whole)
        try:
            group = setup.method.prepare(batch, Draws(setup.recipe.seed, 0, indices, "group"))
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
            loss = next(iter(setup.method.losses(group, Draws(setup.recipe.seed, 0, indices, "update-0"))))
            loss.value.backward()
            needed.append(torch.cuda.max_memory_allocated(device) - before)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            break
        finally:
            for parameter in setup.method.trained_weights().values():
                parameter.grad = None
    if len(needed) < 2:
        return 1
    free, total = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device) - int(SPARE * total)
    more = max(1, needed[1] - needed[0])
    return int(min(max(1, 1 + (free - needed[0]) // more), whole))
