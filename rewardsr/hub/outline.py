"""Networks on the Hub of which only `rewardsr.outline` is wanted: headers and a sample are fetched, not gigabytes.

Their files here are as long as those on the Hub, with holes where nothing was fetched: any library reads headers and
sample from them as from whole ones.
"""

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import HfApi, hf_hub_url
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_backoff

from rewardsr import progress
from rewardsr.errors import UserError
from rewardsr.hub.connection import TIMEOUT
from rewardsr.json_object import parse_object
from rewardsr.outline import sampled

GAP = 2**18  # bytes between two tensors that are fetched as well, which is quicker than to ask twice
AT_ONCE = 8  # requests
START = 2**17  # bytes of a file that are asked for first: nearly all headers are shorter
LONGEST = 2**25  # bytes of a header

_made: dict[Path, tuple[str, str, TemporaryDirectory[str]]] = {}  # folders, removed when the process ends

Span = tuple[int, int]  # bytes of a file, from and to


def in_outline(repo: str, snapshot: Path, parts: Sequence[str]) -> Path:
    """A folder like `snapshot` that has the weights of `parts`, in outline where they are not there already.

    Args:
        repo: on the Hub.
        snapshot: its folder in the cache, named by the commit, with the configurations of these parts.
        parts: sub-folders with networks.

    Raises:
        UserError: a file is no safetensors file, or the Hub does not send parts of files.
    """
    info = HfApi().model_info(repo, revision=snapshot.name, timeout=TIMEOUT, files_metadata=True)
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
    lacking = {part: files for part in parts if (files := _weights(part, sizes)) and not _all_there(snapshot, files)}
    if not lacking:
        return snapshot
    kept = TemporaryDirectory(prefix="rewardsr-")
    folder = Path(kept.name)
    _made[folder] = repo, snapshot.name, kept
    weights = {name for files in lacking.values() for name in files}
    for path in snapshot.rglob("*"):
        inside = path.relative_to(snapshot)
        if path.is_file() and inside.as_posix() not in weights:
            (folder / inside).parent.mkdir(parents=True, exist_ok=True)
            (folder / inside).symlink_to(path.resolve())
    for part, files in lacking.items():
        (folder / part).mkdir(exist_ok=True)
        _fetch(repo, snapshot.name, folder, {name: sizes[name] for name in files})
    return folder


def origin_of(folder: Path) -> tuple[str, str] | None:
    """Repository and commit of a folder that `in_outline` has made; None: it has not."""
    return _made[folder][:2] if folder in _made else None


def _weights(part: str, names: Mapping[str, int]) -> list[str]:
    """The weights of a part; half precision only where there is nothing else, as `fetch` has it."""
    found = [name for name in sorted(names) if name.rpartition("/")[0] == part and name.endswith(".safetensors")]
    return [name for name in found if ".fp16." not in name] or found


def _all_there(snapshot: Path, names: Sequence[str]) -> bool:
    return all((snapshot / name).is_file() for name in names)


def _fetch(repo: str, commit: str, folder: Path, sizes: Mapping[str, int]) -> None:
    """Write one network's files, by names and sizes."""
    urls = {name: hf_hub_url(repo, name, revision=commit) for name in sizes}
    with ThreadPoolExecutor(AT_ONCE) as pool:
        heads = dict(zip(sizes, pool.map(lambda name: _header(urls[name], f"{repo}/{name}"), sizes), strict=True))
        tensors = {name: _tensors(head, sizes[name], f"{repo}/{name}") for name, head in heads.items()}
        wanted = sampled({key: shape for found in tensors.values() for key, (shape, _) in found.items()})
        pieces = [
            (name, span)
            for name, found in tensors.items()
            for span in _joined([span for key, (_, span) in found.items() if key in wanted])
        ]
        for name, head in heads.items():
            (folder / name).write_bytes(head)
            os.truncate(folder / name, sizes[name])
        with progress.bar(f"fetching of {repo}", sum(stop - start for _, (start, stop) in pieces), unit="B") as advance:
            contents = pool.map(lambda piece: _bytes(urls[piece[0]], *piece[1]), pieces)
            for (name, (start, _)), content in zip(pieces, contents, strict=True):
                with (folder / name).open("r+b") as file:
                    file.seek(start)
                    file.write(content)
                advance(len(content))


def _header(url: str, what: str) -> bytes:
    """The first bytes of a safetensors file: the length of its header, and that."""
    start = _bytes(url, 0, START)
    length = 8 + int.from_bytes(start[:8], "little")
    if len(start) < 8 or length > LONGEST:
        raise UserError(f"'{what}' is damaged or not a safetensors file")
    return start[:length] if len(start) >= length else start + _bytes(url, len(start), length)


def _tensors(head: bytes, size: int, what: str) -> dict[str, tuple[tuple[int, ...], Span]]:
    """Shape and place in the file of each tensor."""
    damaged = f"'{what}' is damaged or not a safetensors file"
    found = {}
    for name, about in parse_object(head[8:].decode(errors="replace"), damaged).items():
        if name == "__metadata__":
            continue
        shape, span = _entry(about)
        if not all(isinstance(number, int) and number >= 0 for number in (*shape, *span)) or len(span) != 2:
            raise UserError(damaged)
        start, stop = (len(head) + place for place in span)
        if not start <= stop <= size:
            raise UserError(damaged)
        found[name] = tuple(shape), (start, stop)
    return found


def _entry(about: Any) -> tuple[list[Any], list[Any]]:
    given = about if isinstance(about, dict) else {}
    shape, span = given.get("shape"), given.get("data_offsets")
    return (shape, span) if isinstance(shape, list) and isinstance(span, list) else ([], [])


def _joined(spans: Sequence[Span]) -> list[Span]:
    """The same bytes, and small gaps between them, in fewer pieces."""
    joined: list[Span] = []
    for start, stop in sorted(spans):
        if joined and start - joined[-1][1] <= GAP:
            joined[-1] = joined[-1][0], max(stop, joined[-1][1])
        else:
            joined.append((start, stop))
    return joined


def _bytes(url: str, start: int, stop: int) -> bytes:
    """These bytes of a file, fewer where it ends."""
    headers = {**build_hf_headers(), "Range": f"bytes={start}-{stop - 1}"}
    answer = http_backoff("GET", url, headers=headers, timeout=6 * TIMEOUT)
    hf_raise_for_status(answer)
    if answer.status_code != 206:
        raise UserError(
            f"'{url}': the Hub sends no parts of files here: fetch the base first (hf download), or give a folder"
        )
    return bytes(answer.content)
