"""LoRAs to other programs and back, in the formats of `rewardsr.lora.formats`."""

from pathlib import Path

from torch import nn

from rewardsr.adapter import ISRAdapter
from rewardsr.errors import UserError, nearest
from rewardsr.interrupts import keeping
from rewardsr.lora import full, layers
from rewardsr.lora.file import described, file_name, fitted, held, put, write
from rewardsr.lora.formats import FORMATS
from rewardsr.lora.layers import NAME
from rewardsr.lora.pairs import Lora
from rewardsr.lora.targets import tensor_shapes
from rewardsr.progress import waiting
from rewardsr.run_folder import DIFFUSERS_HEADER
from rewardsr.storage import expand, write_folder
from rewardsr.weights import read_safetensors


@keeping("nothing was written")
def export(adapter: ISRAdapter, output: Path | str, form: str, *, name: str = NAME) -> Path:
    """Write the adapter's LoRA in the format of another program, to a new folder.

    Args:
        adapter: with its LoRA; its strength is taken into the files.
        output: the folder; must not exist.
        form: one of `rewardsr.lora.formats.FORMATS`: diffusers, peft, kohya, osediff or merged. After "merged" the
            adapter carries that LoRA no more: it is part of the networks.
        name: of the LoRA.

    Returns:
        The folder.

    Raises:
        UserError: unknown format, a folder that exists, a LoRA that the format cannot hold, or weights trained in full
            beside it, which only merged networks have.
    """
    folder = check_output(output, form)
    in_full = full.names(adapter)
    if in_full and form != "merged":
        raise UserError(
            f"{in_full[0]} was trained in full, and {form}'s form holds a LoRA alone: export --format merged, or train "
            "with trainer_options.full=none"
        )
    if form != "merged":
        return write_as(adapter, held(adapter, name), folder, form)
    if others := [other for other in layers.names(adapter) if other != name]:
        raise UserError(f"merged networks hold one LoRA: merge or detach {', '.join(others)} first")
    layers.merge(adapter, name)
    return write_as(adapter, Lora({}, 1, 1.0), folder, form)


def write_as(adapter: ISRAdapter, given: Lora, folder: Path, form: str) -> Path:
    """Write a LoRA that the adapter need not carry, in the format of another program, to a new folder; returns that.

    Raises:
        UserError: the format cannot hold it.
    """
    with waiting(f"writing '{folder}'"):
        write_folder(folder, lambda path: FORMATS[form].write(adapter, given, path))
    return folder


@keeping("nothing was written")
def import_lora(adapter: ISRAdapter, source: Path | str, output: Path | str | None = None) -> Path | None:
    """Attach a LoRA of another program, and save it as one of ours.

    Args:
        adapter: the pipeline that it is for; carries no LoRA yet.
        source: a safetensors file of kohya's, ComfyUI's, diffusers' (its training scripts' as well) or peft's names, a
            peft folder (or a folder of such, by component), or a checkpoint of the adapter's family.
        output: new folder for our file; None: it is attached only.

    Returns:
        The file, if one was written.

    Raises:
        UserError: a folder that exists, a pipeline that carries a LoRA, nothing that can be read, or the first tensor
            or setting that is no part of a plain LoRA on modules that the adapter adapts.
    """
    folder = None if output is None else check_output(output)
    if layers.attached(adapter):
        raise UserError(f"this pipeline carries a {NAME} LoRA already")
    given = read_foreign(adapter, source)
    put(adapter, given, f"'{source}'")
    return None if folder is None else write(adapter, given, folder / file_name())


def read_foreign(adapter: ISRAdapter, source: Path | str) -> Lora:
    """A LoRA of another program for this pipeline, which may be loaded in outline.

    Raises:
        UserError: as `import_lora`.
    """
    path = expand(source)
    readers = (form.read for form in FORMATS.values() if form.read is not None)
    with waiting(f"reading '{path}'"):
        given = next((found for read in readers if (found := read(adapter, path)) is not None), None)
    if given is None:
        raise UserError(f"'{path}' is neither safetensors nor a checkpoint of adapter '{adapter.name}'")
    return fitted(adapter, given, f"'{path}'")


def check_output(output: Path | str, form: str | None = None) -> Path:
    """The new folder of an export or import.

    Raises:
        UserError: it exists, or the format of the export is unknown.
    """
    folder = expand(output)
    if form is not None and form not in FORMATS:
        raise UserError(f"unknown format '{form}': {nearest(form, FORMATS)}")
    if folder.exists():
        raise UserError(f"'{folder}' exists already: choose a new folder")
    return folder


def load_component(network: nn.Module, path: Path | str) -> None:
    """Put the LoRA of one component, as `export` writes it for diffusers, onto that component of a plain pipeline.

    For components that diffusers' `load_lora_weights` passes over: a ControlNet, an autoencoder.

    Args:
        network: `pipe.controlnet`, say.
        path: `controlnet_lora.safetensors`.

    Raises:
        UserError: the file is damaged, holds another component, or does not fit; the network is as it was then.
    """
    tensors, header = read_safetensors(Path(path))
    components = {name.split(".")[0] for name in tensors}
    if DIFFUSERS_HEADER not in header or len(components) != 1:
        raise UserError(f"'{path}' is no file of one component, as `rewardsr export --format diffusers` writes it")
    (component,) = components
    given, _ = described(Path(path), tensors, header)
    targets = (given.targets or {}).get(component, [])
    own = {name.removeprefix(f"{component}."): value for name, value in tensors.items()}
    try:
        layers.checked(tensor_shapes(network, given.rank, targets), own)
    except UserError as error:
        raise UserError(f"'{path}' does not fit {type(network).__name__}: {error}") from error
    layers.inject(network, NAME, given.rank, given.alpha, 0, targets)
    layers.fill(layers.parameters_of(network), own, f"'{path}'")
