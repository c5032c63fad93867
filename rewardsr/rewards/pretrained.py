"""Pretrained weights of networks that judge images: had once, read without running code, fitted to a network.

Every message begins with the `owner`: whose weights they are ("reward 'imagereward'").
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import huggingface_hub
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from torch import Tensor, nn

from rewardsr.errors import UserError, one_line
from rewardsr.hub import connection
from rewardsr.storage import expand
from rewardsr.weights import read_pickle, read_safetensors

Got = TypeVar("Got")
Network = TypeVar("Network", bound=nn.Module)


class NotCachedError(Exception):
    """Weights are in no cache; the text says which ("its weights")."""


def cached_or_fetched(owner: str, cached: Callable[[], Got], fetch: Callable[[], Got], instead: str) -> Got:
    """What a cache holds; else, if there is a connection, what a download brings.

    Args:
        owner: for messages.
        cached: looks into the cache and raises `NotCachedError`; must not try a connection.
        fetch: downloads.
        instead: what the user may do without a connection, for messages.

    Raises:
        UserError: neither works.
    """
    try:
        return cached()
    except NotCachedError as error:
        what, cause = str(error), error
    if not connection.online():
        raise UserError(
            f"{owner}: {what} cannot be found in a cache, and there is no connection (or HF_HUB_OFFLINE is set): "
            f"connect once, or {instead}"
        ) from cause
    try:
        return fetch()
    except UserError:
        raise
    except Exception as error:  # of urllib, torch, or what the Hub's client stands on, by its version
        raise UserError(f"{owner}: {what} could not be fetched: {one_line(error)}; try again, or {instead}") from error


def from_hub(owner: str, repository: str, file: str, instead: str) -> Path:
    """A file of the Hub, from its cache or downloaded once.

    Raises:
        UserError: as `cached_or_fetched`.
    """

    def cached() -> Path:
        try:
            return Path(huggingface_hub.hf_hub_download(repository, file, local_files_only=True))
        except LocalEntryNotFoundError as error:
            raise NotCachedError(f"{file} of {repository}") from error

    return cached_or_fetched(owner, cached, lambda: Path(huggingface_hub.hf_hub_download(repository, file)), instead)


def from_url(owner: str, url: str, instead: str) -> Path:
    """A file of torch's model zoo (`name-<start of its SHA-256>.pth`), from torch's cache or downloaded once.

    Raises:
        UserError: as `cached_or_fetched`.
    """
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[-1]

    def cached() -> Path:
        if not path.is_file():
            raise NotCachedError(path.name)
        return path

    def fetch() -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path), path.stem.rpartition("-")[2], progress=False)
        return path

    return cached_or_fetched(owner, cached, fetch, instead)


def local_file(owner: str, path: Path | str) -> Path:
    """The path of a weights file that the user gave.

    Raises:
        UserError: there is none.
    """
    path = expand(path)
    if not path.is_file():
        raise UserError(f"{owner}: no weights file '{path}'")
    return path


class Checkpoint:
    """The tensors of a file, by name, all of them finite; nothing that the file may contain is run.

    Args:
        owner: for messages.
        path: safetensors by its name, else a torch pickle; the tensors, or a mapping that holds them as `params` or
            `state_dict`. `module.` in front of a name is dropped.
        unused: names that match at their beginning are left out.

    Raises:
        UserError: it cannot be read, or holds something else.
    """

    def __init__(self, owner: str, path: Path, unused: re.Pattern[str] | None = None) -> None:
        self._where = f"{owner}: the weights in '{path}'"
        try:
            content: Any = read_safetensors(path)[0] if path.suffix == ".safetensors" else read_pickle(path)
        except Exception as error:  # unpicklers raise whatever they stumble over in a damaged file
            known = isinstance(error, UserError)
            said = " ".join(str(error).split()) if known else f"'{path}' is damaged: {one_line(error)}"
            raise UserError(f"{owner}: {said}") from error
        if isinstance(content, dict):
            wrapped = (content.get(key) for key in ("params", "state_dict"))
            content = next((inner for inner in wrapped if isinstance(inner, dict)), content)
        if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
            raise self.unfit("it holds no state dict (tensors by name)")
        named = {str(name).removeprefix("module."): value for name, value in content.items()}
        self.state = {name: value for name, value in named.items() if unused is None or not unused.match(name)}
        for name, value in self.state.items():
            if value.is_floating_point() and not value.isfinite().all():
                raise self.unfit(f"it holds values that are not finite, in {name}")

    def unfit(self, why: str) -> UserError:
        """The error that says why these weights cannot be used."""
        return UserError(f"{self._where} do not fit: {why}")

    def fit(self, network: Network, released_name: Callable[[str], str] = str) -> Network:
        """Put the tensors into a network, in the network's precision, and freeze it.

        Args:
            network: may be on the meta device, without storage.
            released_name: what the file calls a tensor of the network.

        Raises:
            UserError: tensors are missing, unknown, or of another shape or type; the first of each are named.
        """
        own = {released_name(name): (name, value) for name, value in network.state_dict().items()}

        def differs(name: str) -> bool:
            ours, theirs = own[name][1], self.state[name]
            return ours.shape != theirs.shape or ours.is_floating_point() != theirs.is_floating_point()

        wrong = {
            "missing": own.keys() - self.state.keys(),
            "unknown": self.state.keys() - own.keys(),
            "of another shape or type": {name for name in own.keys() & self.state.keys() if differs(name)},
        }
        faults = [f"{len(names)} {what} ({min(names)}, ...)" for what, names in wrong.items() if names]
        if faults:
            raise self.unfit(", ".join(faults))
        values = {name: self.state[released].to(value.dtype) for released, (name, value) in own.items()}
        network.load_state_dict(values, assign=any(value.is_meta for _, value in own.values()))
        return network.eval().requires_grad_(False)
