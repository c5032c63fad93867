"""Networks from folders: of diffusers' own classes, and of such that a family has changed."""

import inspect
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rewardsr.errors import UserError
from rewardsr.weights import read_safetensors

# On a CPU it warns of a kernel that nobody asked for as soon as diffusers is imported.
logging.getLogger("bitsandbytes").setLevel(logging.CRITICAL)

Change = Callable[[Any, dict[str, Tensor]], None]


def load_network(folder: Path) -> Any:
    """A diffusers network in float32 from its folder; the class is the one that its config names."""
    import diffusers

    config = folder / "config.json"
    if not config.is_file():
        raise UserError(f"'{folder}' has no config.json: expected a diffusers network folder")
    try:
        name = json.loads(config.read_text())["_class_name"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"'{config}' is damaged or names no class") from error
    kind = getattr(diffusers, str(name), None)
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise UserError(
            f"'{config}' names the class '{name}', which is no network of diffusers {diffusers.__version__}"
        )
    return read_part(folder, kind)


def load_changed(folder: Path, kind: Any, expected: str, change: Change | None = None) -> Any:
    """A network that a family has changed, in float32 from its folder.

    Args:
        folder: with `config.json` and `diffusion_pytorch_model.safetensors`, as diffusers writes them.
        kind, change: as in `assemble`.
        expected: what the folder should be, for messages.

    Raises:
        UserError: a file is missing or damaged, or they do not fit each other.
    """
    path = folder / "diffusion_pytorch_model.safetensors"
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"'{folder}/config.json' is missing or damaged: expected {expected}") from error
    if not path.is_file():
        raise UserError(f"no weights '{path}'")
    state = {name: value.float() for name, value in read_safetensors(path)[0].items()}
    return assemble(kind, config, state, str(folder), change)


def assemble(
    kind: Any, config: Mapping[str, Any], state: dict[str, Tensor], where: str, change: Change | None = None
) -> Any:
    """A network of a configuration and tensors, none of them initialised before.

    Args:
        kind: class of the network, or the name of one of diffusers.
        config: of that class; entries that it does not know, a family's own, stay in the network's configuration.
        state: all of its tensors.
        where: they come from, for messages.
        change: adds a family's modules to the bare network, as large as the tensors have them.

    Raises:
        UserError: they do not fit each other.
    """
    import diffusers
    from accelerate import init_empty_weights

    network_class = getattr(diffusers, kind) if isinstance(kind, str) else kind
    known = inspect.signature(network_class.__init__).parameters
    try:
        with init_empty_weights(include_buffers=False):
            network = network_class.from_config({name: value for name, value in config.items() if name in known})
            own = {name: value for name, value in config.items() if name not in known and not name.startswith("_")}
            network.register_to_config(**own)
            if change is not None:
                change(network, state)
        network.load_state_dict(state, strict=True, assign=True)
    except UserError as error:
        raise UserError(f"'{where}': {error}") from error
    except Exception as error:  # diffusers and torch share no error class
        name, reason = network_class.__name__, " ".join(str(error).split())[:300]
        raise UserError(f"'{where}' does not load as {name}: {reason}") from error
    return network


def read_part(folder: Path, kind: Any) -> Any:
    """`from_pretrained` of a local folder, its many ways to fail turned into one line.

    Raises:
        UserError: damaged, or of a network a tensor is missing, which the libraries would draw at random, or too much,
            which they would leave out (of transformers' networks parts may be left out: text without vision).
    """
    options: dict[str, Any] = {"local_files_only": True}
    network = issubclass(kind, nn.Module)
    if network:
        options |= {"torch_dtype": torch.float32, "use_safetensors": True, "output_loading_info": True}
    try:
        with _silenced():
            loaded = kind.from_pretrained(folder, **options)
    except Exception as error:  # diffusers, transformers and safetensors share no error class
        raise UserError(f"'{folder}' does not load as {kind.__name__}: {' '.join(str(error).split())[:300]}") from error
    if not network:
        return loaded
    made, found = loaded
    missing, more = (sorted(map(str, found[f"{which}_keys"])) for which in ("missing", "unexpected"))
    if missing:
        raise UserError(f"'{folder}' lacks {_first(missing)}: it is damaged, or no {kind.__name__}")
    if more and kind.__module__.startswith("diffusers."):
        raise UserError(f"'{folder}' is no plain {kind.__name__}, but another family's: it has {_first(more)} besides")
    return made


def _first(keys: list[str]) -> str:
    return f"{keys[0]} and {len(keys) - 1} more" if len(keys) > 1 else keys[0]


@contextmanager
def _silenced() -> Iterator[None]:
    """What the libraries would warn of is refused here, in one line; and loading a part takes no progress bar."""
    from diffusers.utils import logging as diffusers
    from transformers.utils import logging as transformers

    before = [(library, library.get_verbosity()) for library in (diffusers, transformers)]
    for library, _ in before:
        library.set_verbosity_error()
    transformers.disable_progress_bar()
    try:
        yield
    finally:
        for library, level in before:
            library.set_verbosity(level)
