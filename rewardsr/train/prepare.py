"""From a recipe to everything that training needs, cheap checks first: bad input is refused before any long work."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from accelerate import Accelerator

from rewardsr import lora
from rewardsr.adapter import ISRAdapter
from rewardsr.batch import Batch
from rewardsr.data.degrade.contract import degradation_options
from rewardsr.data.folder import Data
from rewardsr.data.loader import default_workers
from rewardsr.data.protocol import open_images, open_training
from rewardsr.errors import UserError, is_out_of_memory, one_line
from rewardsr.lora.layers import tuned
from rewardsr.options import Options, parse
from rewardsr.pipelines import adapter_class, adapter_options, choose_device, load_adapter
from rewardsr.plugins import resolve_class
from rewardsr.rewards import build
from rewardsr.rewards.base import Reward
from rewardsr.rewards.probe import probe_gradient
from rewardsr.together import everywhere
from rewardsr.train.guards import build_guards
from rewardsr.train.optimiser import check_optimiser
from rewardsr.train.processes import make_accelerator
from rewardsr.train.recipe import DegradationRecipe, Recipe
from rewardsr.train.trackers import check_trackers
from rewardsr.trainers.base import Method

DECODE_UP_TO = 2000  # training images; decoding more of them beforehand would itself be long work


@dataclass(frozen=True)
class Setup:
    """What a run works with.

    Attributes:
        recipe: resolved and checked.
        accelerator: processes and device.
        adapter: the pipeline with our LoRA attached.
        method: the trainer.
        data: training images.
        validation: held-out images, if any.
        metrics: rewards and guards, by name; all are logged at validation.
        notes: what the user should know before it begins.
        margins: how far each guard may fall, by name.
    """

    recipe: Recipe
    accelerator: Accelerator
    adapter: ISRAdapter
    method: Method
    data: Data
    validation: Data | None
    metrics: dict[str, Reward]
    notes: tuple[str, ...]
    margins: Mapping[str, float] = field(default_factory=dict)


def set_up(recipe: Recipe, *, decode: bool = True) -> Setup:
    """Load and check everything, in the order of what it costs.

    Args:
        recipe: of the run.
        decode: every image once, shared by the processes; without that, only what is tried and what steps take.

    Raises:
        UserError: anything in the recipe that cannot be had or does not fit.
    """
    check_trackers(recipe.log_with)
    check_optimiser(recipe.optimiser.name)
    if recipe.lora.init is not None:
        lora.locate(recipe.lora.init)
    device, dtype = choose_device(recipe.device, recipe.precision)
    if recipe.cuda_graphs and device.type != "cuda":
        raise UserError(f"cuda_graphs needs a CUDA device, and this run is on {device}: leave it out")
    accelerator = make_accelerator(device)
    method_kind = method_class(recipe.trainer)
    options = parse(method_kind.Options, recipe.trainer_options, "trainer_options")
    _check_rewards(recipe, method_kind.rewarded)
    kind = adapter_class(recipe.adapter)
    scale = kind.scale_of(adapter_options(recipe.adapter, recipe.adapter_options))
    # The data is checked before the pipeline is loaded, unless only the pipeline knows its scale.
    adapter = None
    if scale is None:
        adapter = load_adapter(recipe.adapter, recipe.base, device=device, dtype=dtype, **recipe.adapter_options)
        scale = adapter.scale
    extras = kind.extras
    train, validation = open_folders(recipe, scale, extras)
    rewards = {entry.name: build(entry.name, **entry.options) for entry in recipe.rewards}
    guards, margins = build_guards(recipe, rewards, validation is None or validation.has_hq)
    notes = [f"device {device}, base in {str(dtype).removeprefix('torch.')}, what is trained in float32"]
    together = partial(everywhere, accelerator)
    share = accelerator.process_index, accelerator.num_processes
    _refuse_without_hq(recipe, method_kind.needs_hq(options), rewards, guards, train, validation)
    _refuse_two_dropouts(recipe, options)
    notes.append(f"training on {train.said}" + ("" if validation is None else f"; held out: {validation.said}"))
    if decode and len(train) <= DECODE_UP_TO:
        train.check(*share, together=together)
    elif decode:
        notes.append(
            f"{len(train)} training images: headers were checked, a damaged file stops the run when its turn comes"
        )
    steering = {entry.name: entry.weight for entry in recipe.rewards if entry.weight > 0}
    sample = _with_target(train.batch(recipe.seed, [0]).to(device), scale)
    sample = _judged(sample, getattr(options, "reward_crop", None), scale)
    _try_metrics({name: rewards[name] for name in steering}, sample, "a training crop")
    if validation is not None:
        if decode:
            validation.check(*share, recipe.data.validation_limit, together)
        smallest = _with_target(_smallest(validation, recipe).to(device), scale)
        _try_metrics(rewards | guards, smallest, "the smallest held-out image")
    if method_kind.differentiates:
        for name in steering:
            probe_gradient(name, rewards[name], sample)
    if adapter is None:
        adapter = load_adapter(recipe.adapter, recipe.base, device=device, dtype=dtype, **recipe.adapter_options)
    if adapter.scale != scale:
        raise UserError(
            f"adapter '{recipe.adapter}' has scale {adapter.scale}, but its options said {scale}: correct its scale_of"
        )
    with torch.no_grad():
        adapter.encode(train.batch(recipe.seed, [0]))  # says what the family misses of the images
        if validation is not None:
            adapter.encode(next(validation.validation(1, recipe.seed, recipe.data.crop)))
    _attach(adapter, recipe, method_kind.lora_targets(adapter, options))
    if recipe.gradient_checkpointing:
        notes += [
            f"gradient checkpointing: {name} cannot, and goes without"
            for name in adapter.enable_gradient_checkpointing()
        ]
    method = method_kind(adapter, {name: rewards[name] for name in steering}, steering, options)
    method.check_size((recipe.data.crop, recipe.data.crop))
    if recipe.cast_test and not tuned(adapter):
        raise UserError(f"cast_test looks at what a LoRA adds to the latents, and trainer '{recipe.trainer}' has none")
    notes += _untrained(adapter, method)
    return Setup(recipe, accelerator, adapter, method, train, validation, rewards | guards, tuple(notes), margins)


def method_class(name: str) -> type[Method]:
    """The training method of this name.

    Raises:
        UserError: there is none, or it breaks the contract.
    """
    return resolve_class("trainers", name, Method)  # type: ignore[type-abstract]  # only its subclasses are made


def _untrained(adapter: ISRAdapter, method: Method) -> Iterator[str]:
    """A note for each component whose LoRA the method leaves as it is."""
    reached = {key.partition(".")[0] for group in method.trained for key in group.parameters}
    for component in sorted({key.partition(".")[0] for key in lora.parameters(adapter)} - reached):
        yield f"the LoRA on '{component}' stays as it is: this trainer sends no gradients through encoding"


def _refuse_without_hq(
    recipe: Recipe,
    method: str | None,
    rewards: Mapping[str, Reward],
    guards: Mapping[str, Reward],
    train: Data,
    validation: Data | None,
) -> None:
    """Refuse what compares with HQ images where there are none."""
    if not train.has_hq:
        steering = [entry.name for entry in recipe.rewards if entry.weight > 0 and rewards[entry.name].needs_hq]
        needing = [f"reward {name}" for name in steering] + ([] if method is None else [method])
        if needing:
            raise UserError(f"{', '.join(needing)}: needs HQ images, and data.train has {train.said}")
    if validation is not None and not validation.has_hq:
        watching = [name for name, metric in (*rewards.items(), *guards.items()) if metric.needs_hq]
        if watching:
            raise UserError(
                f"{', '.join(watching)} compare with HQ images, and data.validation has {validation.said}: leave them "
                "out of rewards and guards (guards: [panel] takes what needs none)"
            )


def _refuse_two_dropouts(recipe: Recipe, options: Options) -> None:
    own = getattr(options, "text_dropout", 0)
    if recipe.data.prompt_dropout and own:
        raise UserError(
            f"trainer '{recipe.trainer}' leaves prompts empty itself (trainer_options.text_dropout is {own:g}), and so "
            "would data.prompt_dropout: set one of them to 0"
        )


def _with_target(batch: Batch, scale: int) -> Batch:
    """What metrics are tried on: where there is no HQ image, LQ stands in for it, enlarged."""
    if batch.hq is not None:
        return batch
    enlarged = F.interpolate(batch.lq, scale_factor=scale, mode="bicubic", antialias=True).clamp(0, 1)
    return Batch(batch.lq, enlarged, batch.prompts, batch.paths, batch.extras)


def _judged(batch: Batch, window: int | None, scale: int) -> Batch:
    """What a method's rewards see of a training crop: all of it, or a window where the method has `reward_crop`."""
    assert batch.hq is not None
    if window is None:
        return batch
    if window > min(batch.hq.shape[-2:]):
        raise UserError(
            f"trainer_options.reward_crop is {window}, but data.crop is {batch.hq.shape[-1]}: lower the former"
        )
    return batch.crop(torch.zeros(len(batch), 2, dtype=torch.int64), window, scale)


def _smallest(validation: Data, recipe: Recipe) -> Batch:
    """The smallest of the held-out images, cut as in validation: some metrics need a number of pixels."""
    limit, side = recipe.data.validation_limit, recipe.data.validation_side
    sizes = [min(item.size) for item in validation.items[:limit]]
    return next(validation.validation(limit, recipe.seed, side, sizes.index(min(sizes)), len(sizes)))


def _try_metrics(metrics: dict[str, Reward], batch: Batch, what: str) -> None:
    """Score an image against itself, so that a metric that cannot score such images says so before training."""
    assert batch.hq is not None
    for name, metric in metrics.items():
        try:
            with torch.no_grad():
                scores = metric(batch.hq, batch)
        except Exception as error:  # a metric may be a stranger's
            if isinstance(error, UserError) or is_out_of_memory(error):
                raise
            size = f"{batch.hq.shape[-2]}x{batch.hq.shape[-1]} pixels"
            raise UserError(f"reward '{name}' fails on {what} ({size}): {one_line(error)}") from error
        if tuple(scores.shape) != (len(batch),):
            raise UserError(
                f"reward '{name}' gave {tuple(scores.shape)} for {len(batch)} images, expected one score each"
            )


def open_folders(recipe: Recipe, scale: int, extras: Sequence[str] = ()) -> tuple[Data, Data | None]:
    """Training and held-out images.

    Args:
        recipe: of the run.
        scale: HQ is this many times LQ.
        extras: names of the tensors beside the images that the adapter takes.
    """
    data = recipe.data
    workers = default_workers() if data.workers is None else data.workers
    train = open_training(data, scale, extras, workers)
    if not data.validation:
        return train, None
    held_out = open_images(data, data.validation, scale, extras, max_unreadable=data.max_unreadable, workers=workers)
    return train, held_out


def complete(recipe: Recipe) -> Recipe:
    """The recipe with the options of its degradation written out, as a run's folder keeps it.

    Raises:
        UserError: unknown degradation or option, or a wrong value.
    """
    degradation = DegradationRecipe(**degradation_options(recipe.data.degradation))
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"degradation": degradation})})


def _check_rewards(recipe: Recipe, rewarded: bool) -> None:
    """Refuse a recipe without rewards for a trainer that they steer, and one that steers where they only watch."""
    if rewarded and not recipe.rewards:
        raise UserError(
            f"trainer '{recipe.trainer}' learns from rewards, and the recipe names none: give it at least one"
        )
    steering = [entry.name for entry in recipe.rewards if entry.weight > 0]
    if steering and not rewarded:
        raise UserError(
            f"trainer '{recipe.trainer}' learns from HQ images, and no reward steers it: "
            f"give '{steering[0]}' weight 0, or name it in guards"
        )


def _attach(adapter: ISRAdapter, recipe: Recipe, targets: Mapping[str, Sequence[str]]) -> None:
    """Our LoRA: a fresh one, one to start from, or none where there are no targets."""
    own = recipe.lora
    if own.init is None:
        if targets:
            lora.attach(adapter, own.rank, own.alpha, recipe.seed, targets=targets)
        return
    if not targets:
        raise UserError(
            f"lora.init: trainer '{recipe.trainer}' trains no LoRA here, but weights in full: give '{own.init}' to the "
            "base, as adapter_options.weights"
        )
    lora.load(adapter, own.init)
    held = {key.partition(".")[0] for key in lora.parameters(adapter)}
    if absent := sorted(targets.keys() - held):
        raise UserError(
            f"lora.init '{own.init}' has nothing on '{absent[0]}', which trainer '{recipe.trainer}' adapts here, too"
        )
    rank, alpha = lora.rank_and_alpha(adapter)
    if (rank, alpha) != (own.rank, own.alpha):
        raise UserError(
            f"lora.init '{own.init}' has rank {rank} and alpha {alpha:g}, the recipe has rank {own.rank} and alpha "
            f"{own.alpha:g}: set lora.rank to {rank} and lora.alpha to {alpha:g}"
        )
