"""Networks from folders: of diffusers' own classes, and of such that a family has changed."""

import inspect
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rewardsr.errors import UserError, shown
from rewardsr.hub.fetch import fetch_whole
from rewardsr.json_object import read_object
from rewardsr.outline import is_outlined
from rewardsr.weights import read_network, read_outline, variant_of

# On a CPU it warns of a kernel that nobody asked for as soon as diffusers is imported.
logging.getLogger("bitsandbytes").setLevel(logging.CRITICAL)

WEIGHTS = "diffusion_pytorch_model"  # what diffusers calls the weights of a network
SAMPLED = 64  # words of a vocabulary
Change = Callable[[Any, dict[str, Tensor]], None]


def load_network(folder: Path) -> Any:
    """A diffusers network in float32 from its folder; the class is the one that its config names."""
    import diffusers

    config = folder / "config.json"
    if not config.is_file():
        raise UserError(f"'{folder}' has no config.json: expected a diffusers network folder")
    name = read_object(config).get("_class_name")
    if name is None:
        raise UserError(f"'{config}' is damaged: it names no class")
    kind = getattr(diffusers, str(name), None)
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise UserError(
            f"'{config}' names the class {shown(name)}, which is no network of diffusers {diffusers.__version__}"
        )
    return read_part(folder, kind)


def load_changed(folder: Path, kind: Any, expected: str, change: Change | None = None) -> Any:
    """A network that a family has changed, in float32 from its folder.

    Args:
        folder: with `config.json` and weights in one file or several, as diffusers writes them.
        kind, change: as in `assemble`.
        expected: what the folder should be, for messages.

    Raises:
        UserError: a file is missing or damaged, or they do not fit each other.
    """
    try:
        config = read_object(folder / "config.json")
        read = read_outline if is_outlined(folder.name) else read_network
        state = {name: value.float() for name, value in read(folder, WEIGHTS).items()}
    except UserError as error:
        raise UserError(f"{error} (expected {expected})") from error
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
    if network and is_outlined(folder.name):
        if (outline := _outline(folder, kind)) is not None:
            return outline
        folder = fetch_whole(folder)
    if network:
        options |= {"torch_dtype": torch.float32, "use_safetensors": True, "output_loading_info": True}
        options["variant"] = variant_of(folder, WEIGHTS if kind.__module__.startswith("diffusers.") else "model")
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


def _outline(folder: Path, kind: Any) -> Any:
    """The network without its weights (`rewardsr.outline`); None where names or shapes are not plainly its own.

    What is wrong then, or how the libraries understand it all the same, shows when they read all of it.
    """
    from accelerate import init_empty_weights

    diffusers = kind.__module__.startswith("diffusers.")
    state = read_outline(folder, WEIGHTS if diffusers else "model")
    config = read_object(folder / "config.json")
    try:
        with init_empty_weights(include_buffers=False):
            network = kind.from_config(config) if diffusers else kind(kind.config_class.from_dict(config))
    except Exception:  # the libraries share no error class
        return None
    network.eval()
    own = {_plain(name): name for name in network.state_dict()}
    named = {own[plain]: value.float() for name, value in state.items() if (plain := _plain(name)) in own}
    if len(named) < len(own) or (diffusers and len(state) > len(own)):
        return None
    if any(value.shape != named[name].shape for name, value in network.state_dict().items()):
        return None
    network.load_state_dict(named, strict=True, assign=True)
    return network


_OF_OLD = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # in autoencoders of diffusers


def _plain(name: str) -> str:
    """A tensor's name as current libraries have it, without the prefix that only some of their versions have."""
    *parents, layer, kind = name.removeprefix("text_model.").split(".") if "." in name else ("", name)
    old = "attentions" in parents
    return ".".join((*parents, _OF_OLD.get(layer, layer) if old else layer, kind))


def read_tokenizer(folder: Path) -> Any:
    """CLIP's tokenizer from its folder; `check_tokenizer` looks at what it does.

    Raises:
        UserError: a file is missing or damaged, or it is another tokenizer's folder.
    """
    from transformers import CLIPTokenizer

    config = folder / "tokenizer_config.json"
    if config.is_file():
        kind = read_object(config).get("tokenizer_class", "CLIPTokenizer")
        if kind not in ("CLIPTokenizer", "CLIPTokenizerFast"):
            raise UserError(f"'{config}' is of {shown(kind)}, expected CLIPTokenizer")
    return read_part(folder, CLIPTokenizer)


def check_tokenizer(where: str, tokenizer: Any, text_encoder: Any) -> None:
    """Refuse a tokenizer whose numbers mean nothing to the text encoder.

    Raises:
        UserError: its vocabulary is not the text encoder's, or it spells the words that it has (merges are missing).
    """
    expected = getattr(text_encoder.config, "vocab_size", None)
    if not hasattr(tokenizer, "get_vocab") or expected is None:
        return  # of a user's own making
    length = tokenizer.model_max_length
    if isinstance(length, bool) or not isinstance(length, int | float) or length < 2:
        raise UserError(f"base '{where}': model_max_length of the tokenizer is {shown(length)}, expected a number")
    vocabulary = tokenizer.get_vocab()
    clip = type(tokenizer).__name__.startswith("CLIP")  # other families fill up the text encoder's table
    if max(vocabulary.values(), default=0) >= expected or (clip and len(vocabulary) != expected):
        raise UserError(
            f"base '{where}': the tokenizer has {len(vocabulary)} tokens, but the text encoder expects {expected}"
        )
    words = sorted((w for w in vocabulary if w.endswith("</w>") and w[:-4].isascii() and w[:-4].isalpha()), key=len)
    chosen = [word for word in words[:: max(1, len(words) // SAMPLED)] if clip and len(word) > len("a</w>")]
    for word, ids in zip(chosen, tokenizer([word[:-4] for word in chosen]).input_ids if chosen else [], strict=True):
        if ids[1:-1] != [vocabulary[word]]:
            raise UserError(
                f"base '{where}': the tokenizer spells '{word[:-4]}', which it has a token for: its merges are missing"
            )


def encoder_layers(vae: Any) -> list[str]:
    """Names of the convolutions and projections that an autoencoder encodes with, as OSEDiff adapts them."""
    layers = [name for name, module in vae.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    return [name for name in layers if name.startswith("encoder.") or name == "quant_conv"]


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


def _in_rows(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
    return output.contiguous() if output.is_cuda else output


def decode_in_rows(vae: Any) -> None:
    """Let a decoder on CUDA keep its images in the order in which norms take them.

    Attention in its first block leaves them channels last, and all layers after it would go on so, each norm with a
    copy of its own: a fifth of the time of decoding (an H100, six images of 512 px).
    """
    block = getattr(getattr(vae, "decoder", None), "mid_block", None)
    if block is not None and _in_rows not in block._forward_hooks.values():
        block.register_forward_hook(_in_rows)
