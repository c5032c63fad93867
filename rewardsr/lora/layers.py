"""LoRAs by name on the networks of a pipeline: attach, switch, read and write, merge.

A LoRA is a peft adapter on modules of one or more of the pipeline's networks (`ISRAdapter.networks`); its tensors are
float32 even on a bf16 base. A tensor is named as in the file: component, module and peft's own key
(`unet.<module>.lora_A.weight`). Where several LoRAs are on, their changes are added in the order of the sorted names.
"""

import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from rewardsr.adapter import ISRAdapter
from rewardsr.errors import UserError
from rewardsr.lora import full
from rewardsr.lora.pairs import LARGEST_RANK, Pair, floats
from rewardsr.lora.targets import target_shapes

NAME = "rewardsr"  # the LoRA that is trained and shipped, unless a method names others

# The peft layers of a network by module name, and the LoRAs that it carried when they were looked up.
_CACHE: WeakKeyDictionary[nn.Module, tuple[tuple[str, ...], dict[str, Any]]] = WeakKeyDictionary()


def attach(
    adapter: ISRAdapter,
    rank: int = 4,
    alpha: float = 8,
    seed: int = 0,
    *,
    name: str = NAME,
    targets: Mapping[str, Sequence[str]] | None = None,
    active: bool = True,
) -> None:
    """Put a fresh LoRA on every target module; outputs stay bit-equal until it is trained (B is zero).

    The first LoRA on a network freezes the network's weights; other LoRAs stay as they are.

    Args:
        adapter: the pipeline.
        rank: r of the LoRA.
        alpha: the LoRA is scaled by alpha / rank; 8 at rank 4 is what OSEDiff and GDPO-SR release.
        seed: of the initial A matrices.
        name: letters, digits, - and _.
        targets: module names (suffixes) by component of `adapter.networks`; `adapter.lora_targets` by default.
        active: whether the LoRA is on; otherwise it takes part inside `only` alone.

    Raises:
        UserError: a LoRA of that name is there already, or the name, a component or a target module does not exist.
    """
    if not re.fullmatch(r"[\w-]+", name) or hasattr(nn.ModuleDict, name):
        raise UserError(f"'{name}' cannot name a LoRA: use letters, digits, - and _, and no word of torch's")
    if not 1 <= rank <= LARGEST_RANK:
        raise UserError(f"a LoRA's rank is at least 1 and at most {LARGEST_RANK}, got {rank}")
    if attached(adapter, name):
        raise UserError(f"this pipeline carries a {name} LoRA already")
    wanted = adapter.lora_targets if targets is None else targets
    for component, modules in wanted.items():
        target_shapes(adapter, component, modules)
    before = {layer: layer.active_adapters for layer in _layers(adapter)}
    for component, modules in wanted.items():
        inject(adapter.networks[component], name, rank, alpha, seed, modules)
    for layer in _layers(adapter):  # peft activates LoRAs by rules of its own
        own = [name] if active and name in layer.lora_A else []
        layer._active_adapter = sorted([*before.get(layer, []), *own])
    for parameter in parameters(adapter, name).values():  # peft gives them the base's precision
        parameter.data = parameter.data.float()
        parameter.requires_grad_(True)


def inject(network: nn.Module, name: str, rank: int, alpha: float, seed: int, targets: Sequence[str]) -> None:
    """peft's layers on the targets; what trained before on a network with LoRAs still does, and nothing else."""
    from peft import LoraConfig, inject_adapter_in_model  # slow to import, and commands of the Hub need it not

    from rewardsr.lora.forward import compute_in_precision

    trained = {parameter: parameter.requires_grad for parameter in network.parameters()} if _layers_of(network) else {}
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets), init_lora_weights="gaussian")
    # A is drawn by peft from torch's global generator: seed it here and give it back as it was.
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        torch.manual_seed(seed)
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several LoRAs are meant
        inject_adapter_in_model(config, network, adapter_name=name)
    for parameter, flag in trained.items():  # peft changes those of the LoRAs that are off
        parameter.requires_grad_(flag)
    _CACHE.pop(network, None)
    for layer in _layers_of(network).values():
        compute_in_precision(layer)


def names(adapter: ISRAdapter) -> list[str]:
    """Names of the LoRAs that the pipeline carries, sorted."""
    return sorted({name for layer in _layers(adapter) for name in layer.lora_A})


def active(adapter: ISRAdapter) -> list[str]:
    """Names of the LoRAs that are on, sorted."""
    return sorted({name for layer in _layers(adapter) for name in layer.active_adapters if name in layer.lora_A})


def attached(adapter: ISRAdapter, name: str = NAME) -> bool:
    """Whether the pipeline carries the LoRA, on or off."""
    return next(_layers(adapter, name), None) is not None


def tuned(adapter: ISRAdapter) -> bool:
    """Whether the pipeline is another than its base: it carries our LoRA, or weights that were trained in full."""
    return attached(adapter) or bool(full.names(adapter))


def parameters(adapter: ISRAdapter, name: str = NAME) -> dict[str, nn.Parameter]:
    """The LoRA's tensors by their names in the file, in a fixed order; empty where the pipeline does not carry it."""
    found = {
        f"{component}.{key}": parameter
        for component, network in adapter.networks.items()
        for key, parameter in parameters_of(network, name).items()
    }
    return dict(sorted(found.items()))


def parameters_of(network: nn.Module, name: str = NAME) -> dict[str, nn.Parameter]:
    """The LoRA's tensors on one network, by module and peft's key."""
    return {
        f"{module}.{matrix}.weight": getattr(layer, matrix)[name].weight
        for module, layer in _layers_of(network).items()
        if name in layer.lora_A
        for matrix in ("lora_A", "lora_B")
    }


def reference(adapter: ISRAdapter, *off: str) -> AbstractContextManager[None]:
    """Inside, these LoRAs (by default the one named "rewardsr") are off and the others as they are.

    So the pipeline is what it was before they were trained, without a second network. Weights that were trained in full
    go with the LoRA named "rewardsr". Never back-propagate inside: their gradients would be zero, silently.
    """
    gone = off or (NAME,)
    return _switched(adapter, lambda on: [name for name in on if name not in gone], NAME not in gone)


def only(adapter: ISRAdapter, *on: str) -> AbstractContextManager[None]:
    """Inside, exactly these LoRAs are on; without any, the pipeline is its base.

    Weights that were trained in full go with the LoRA named "rewardsr".

    Raises:
        UserError: the pipeline does not carry one of them.
    """
    for name in on:
        _require(adapter, name)
    return _switched(adapter, lambda _: sorted(on), NAME in on)


@contextmanager
def _switched(adapter: ISRAdapter, choose: Callable[[list[str]], list[str]], in_full: bool) -> Iterator[None]:
    """Inside, each layer uses the LoRAs that are chosen from those that it used; `in_full`: and what was so trained.

    Writes the attribute that peft's forward pass reads: `set_adapter` and `enable_adapters` would change requires_grad.
    """
    before = [(layer, layer.active_adapters) for layer in _layers(adapter)]
    for layer, on in before:
        layer._active_adapter = choose(on)
    _set_gates(adapter)
    try:
        with nullcontext() if in_full else full.off(adapter):
            yield
    finally:
        for layer, on in before:
            layer._active_adapter = on
        _set_gates(adapter)


def add_gates(adapter: ISRAdapter) -> None:
    """Give the LoRAs their gates, through which they are switched where networks are compiled (`lora.forward`)."""
    for network in adapter.networks.values():
        layers = _layers_of(network)
        names = sorted({name for layer in layers.values() for name in layer.lora_A})
        gates = {name: torch.ones((), device=adapter.device) for name in names}
        for layer in layers.values():
            layer.gates = {name: gates[name] for name in names if name in layer.lora_A}
    _set_gates(adapter)


def _set_gates(adapter: ISRAdapter) -> None:
    # A LoRA is on or off on all layers of a pipeline; one gate a network serves them.
    found = {
        gate: float(name in layer.active_adapters)
        for layer in _layers(adapter)
        for name, gate in (layer.gates or {}).items()
    }
    for gate, value in found.items():
        gate.fill_(value)


def switches(adapter: ISRAdapter) -> tuple[object, ...]:
    """What is on, layer by layer, and with which scale: equal where forward passes launch the same work."""
    return tuple((*layer.active_adapters, *layer.scaling.values()) for layer in _layers(adapter))


def set_scale(adapter: ISRAdapter, scale: float, name: str = NAME) -> None:
    """Strength of the LoRA: 0 is the base bit for bit, 1 as trained. Weights that were trained in full stay."""
    for layer in _layers(adapter, name):
        layer.set_scale(name, scale)


def state_dict(adapter: ISRAdapter, name: str = NAME) -> dict[str, Tensor]:
    """The LoRA's tensors on the CPU, float32, by their names in the file.

    Raises:
        UserError: the pipeline does not carry it.
    """
    _require(adapter, name)
    return {key: value.detach().float().cpu().contiguous() for key, value in parameters(adapter, name).items()}


def load_state_dict(
    adapter: ISRAdapter, tensors: Mapping[str, Tensor], source: str = "LoRA", *, name: str = NAME
) -> None:
    """Put tensors into the attached LoRA.

    Raises:
        UserError: as `checked`; `source` is named, and nothing has been copied then.
    """
    fill(parameters(adapter, name), tensors, source)


def fill(own: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor], source: str) -> None:
    """Copy tensors into parameters of the same names.

    Raises:
        UserError: as `load_state_dict`.
    """
    try:
        fitting = checked({key: tuple(parameter.shape) for key, parameter in own.items()}, tensors)
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
    with torch.no_grad():
        for key, parameter in own.items():
            parameter.copy_(fitting[key])


def checked(shapes: Mapping[str, tuple[int, ...]], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors in float32.

    Args:
        shapes: that they must have, by name.
        tensors: by name.

    Raises:
        UserError: missing, unexpected or misshapen tensors, or values that are not finite numbers.
    """
    missing, extra = sorted(shapes.keys() - tensors.keys()), sorted(tensors.keys() - shapes.keys())
    if missing or extra:
        parts = [
            f"{len(keys)} {kind} (first: {keys[0]})"
            for kind, keys in (("missing", missing), ("unexpected", extra))
            if keys
        ]
        raise UserError(f"it does not fit this pipeline: {', '.join(parts)}")
    for key, shape in shapes.items():
        if tensors[key].shape != shape:
            raise UserError(f"{key} is {tuple(tensors[key].shape)}, expected {shape}")
    return {key: floats(key, tensors[key]) for key in shapes}


def merge(adapter: ISRAdapter, name: str = NAME) -> None:
    """Add the LoRA into the base weights and drop it; other LoRAs stay.

    Weights that were trained in full are the base's from then on.

    Raises:
        UserError: there is no such LoRA, nor such weights, or the base is not in float32 (bf16 loses about a tenth of a
            LoRA).
    """
    if not attached(adapter, name) and not full.names(adapter):
        raise UserError(f"nothing to merge: this pipeline carries no {name} LoRA")
    if adapter.dtype != torch.float32:
        raise UserError("merge in float32: load the adapter with dtype=torch.float32, and cast afterwards")
    for layer in _layers(adapter, name):
        a, b = layer.lora_A[name].weight.detach(), layer.lora_B[name].weight.detach()
        add(layer.get_base_layer().weight.data, Pair(a, b, layer.scaling[name]))
    detach(adapter, name)
    full.settle(adapter)


def detach(adapter: ISRAdapter, name: str = NAME) -> None:
    """Drop the LoRA; modules that carry no other become plain again, and a network without any is frozen."""
    for network in adapter.networks.values():
        detach_from(network, name)


def detach_from(network: Any, name: str = NAME) -> None:
    """Drop the LoRA from one network, if it is there."""
    if name not in getattr(network, "peft_config", ()):
        return
    for module, layer in _layers_of(network).items():
        layer._active_adapter = [other for other in layer.active_adapters if other != name]
        layer.delete_adapter(name)
        if not layer.lora_A:
            parent, _, child = module.rpartition(".")
            setattr(network.get_submodule(parent), child, layer.get_base_layer())
    _CACHE.pop(network, None)
    del network.peft_config[name]
    if not network.peft_config:
        del network.peft_config
        network.requires_grad_(False)


def add(weight: Tensor, pair: Pair) -> None:
    """Add what a module is changed by to its weight, in place; one without values (`rewardsr.outline`) keeps none."""
    if not weight.is_meta:
        weight.add_(delta(*pair))


def delta(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """scale * B A in full: (out, in) of (r, in) and (out, r), or a kernel of (r, in, kh, kw) and (out, r, 1, 1)."""
    return scale * torch.einsum("or,r...->o...", b.flatten(1), a)


def rank_and_alpha(adapter: ISRAdapter, name: str = NAME) -> tuple[int, float]:
    """Rank of the LoRA, and the alpha that it was attached with.

    Raises:
        UserError: the pipeline does not carry it.
    """
    layer = _require(adapter, name)
    return layer.r[name], layer.lora_alpha[name]


def scales(adapter: ISRAdapter, name: str = NAME) -> dict[tuple[str, str], float]:
    """By which B A acts, by component and module: alpha / rank, times the strength."""
    return {
        (component, module): float(layer.scaling[name])
        for component, network in adapter.networks.items()
        for module, layer in _layers_of(network).items()
        if name in layer.lora_A
    }


def set_alpha(adapter: ISRAdapter, alpha: float, name: str = NAME) -> None:
    """Alpha of the LoRA; its strength is 1 then."""
    for layer in _layers(adapter, name):
        layer.lora_alpha[name] = alpha
    for network in adapter.networks.values():
        configs: dict[str, Any] = getattr(network, "peft_config", {})
        if name in configs:
            configs[name].lora_alpha = alpha
    set_scale(adapter, 1, name)


def _require(adapter: ISRAdapter, name: str) -> Any:
    """A layer that carries the LoRA; a `UserError` where none does."""
    layer = next(_layers(adapter, name), None)
    if layer is None:
        raise UserError(f"this pipeline carries no {name} LoRA: attach or load one first")
    return layer


def _layers(adapter: ISRAdapter, name: str | None = None) -> Iterator[Any]:
    """The peft layers of the pipeline's networks: those that carry the LoRA, or any."""
    for network in adapter.networks.values():
        yield from (layer for layer in _layers_of(network).values() if name is None or name in layer.lora_A)


def _layers_of(network: Any) -> dict[str, Any]:
    """The peft layers of a network by module name; looked up again only where its LoRAs have changed."""
    present = tuple(getattr(network, "peft_config", ()))
    if not present:
        return {}
    if network not in _CACHE or _CACHE[network][0] != present:
        found = {
            name: module
            for name, module in network.named_modules()
            if isinstance(getattr(module, "lora_A", None), nn.ModuleDict)
        }
        _CACHE[network] = present, found
    return _CACHE[network][1]
