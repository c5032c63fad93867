"""What of a run is published: checked, and without the paths of the disk that it was made on."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from rewardsr.ending import last_validation, read_ending
from rewardsr.errors import UserError, one_line
from rewardsr.hub.fetch import LARGEST, check_lora
from rewardsr.options import parse
from rewardsr.places import without_places
from rewardsr.run_folder import FULL, LORA, METRICS, RECIPE, SAMPLES
from rewardsr.storage import read_bytes
from rewardsr.train.log import LARGEST_LOG, step_of
from rewardsr.train.recipe import Recipe, load_recipe, to_yaml

Note = Callable[[str, str, str], None]


class Shortened(NamedTuple):
    """A path that is published as its last part: in which file, where in it, and what it was."""

    file: str
    where: str
    before: str
    after: str


def shortened_recipe(recipe: Recipe, note: Note = lambda *_: None) -> Recipe:
    """A recipe with every path in it shortened to its last part."""
    content = without_places(recipe.model_dump(mode="json"), note, here=True)
    return parse(Recipe, content, "the recipe without its paths")


def read_run(run: Path, keep_paths: bool = False) -> tuple[dict[str, bytes], list[Shortened]]:
    """Content of the files to publish by their names in the repository, and what was shortened in them.

    Args:
        run: its folder.
        keep_paths: publish paths as they are.

    Raises:
        UserError: it is not a finished run, or something in it is damaged.
    """
    if not (run / RECIPE).is_file():
        raise UserError(f"'{run}' is not the folder of a run: no {RECIPE}")
    recipe = load_recipe(str(run / RECIPE), {}, [])
    if (run / FULL).is_file():
        raise UserError(
            f"the run in '{run}' trained weights in full, and what is published is a LoRA: publish its networks, as "
            "export --format merged writes them"
        )
    if not (run / LORA).is_file():
        raise UserError(
            f"the run in '{run}' has no {LORA}: it is not finished, and a checkpoint is not published; go on with "
            "finetune --resume"
        )
    check_lora(run / LORA, f"'{run / LORA}'")
    ending = read_ending(run)
    _check_metrics(run / METRICS, recipe.steps if ending is None else ending.step)
    sources = {name: run / name for name in (LORA, RECIPE, METRICS)}
    for kind in (".json", ".png"):  # the same names for every run: a second push leaves no stale picture behind
        validation = last_validation(run, kind)
        if validation is not None:
            sources[f"{SAMPLES}/validation{kind}"] = validation
    files = {name: read_bytes(path, f"'{path}'", LARGEST) for name, path in sources.items()}
    found: dict[Shortened, None] = {}
    if not keep_paths:
        for name, content in files.items():

            def note(where: str, before: str, after: str, name: str = name) -> None:
                found[Shortened(name, where, before, after)] = None

            try:
                files[name] = _private(name, content, recipe, note)
            except Exception as error:  # of JSON, or of PIL, which knows many formats and ways to fail
                raise UserError(f"'{sources[name]}' is damaged: {one_line(error)}") from error
    return files, list(found)


def _private(name: str, content: bytes, recipe: Recipe, note: Note) -> bytes:
    """A file without paths; the very same bytes where it holds none."""
    if name == RECIPE:
        private = shortened_recipe(recipe, note)
        return content if private == recipe else to_yaml(private).encode()
    if name == LORA:
        return _private_lora(content, note)
    if name == METRICS:
        return b"".join(_private_json(line, note) for line in content.splitlines(keepends=True))
    return _private_picture(content) if name.endswith(".png") else _private_json(content, note)


def _private_json(content: bytes, note: Note) -> bytes:
    read = json.loads(content)
    private = without_places(read, note)
    return content if private == read else json.dumps(private).encode() + b"\n"


def _private_lora(content: bytes, note: Note) -> bytes:
    """The same tensors, byte for byte; the texts of the header are JSON where they are ours."""
    size = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:size])
    texts = header.get("__metadata__", {})
    private = {key: _private_text(text, note, key) for key, text in texts.items()}
    if private == texts:
        return content
    written = json.dumps({**header, "__metadata__": private}).encode()
    written += b" " * (-len(written) % 8)  # tensors begin at a multiple of eight bytes
    return len(written).to_bytes(8, "little") + written + content[size:]


def _private_text(text: str, note: Note, key: str) -> str:
    try:
        read = json.loads(text)
    except ValueError:
        read = text
    private = without_places(read, note, key)
    return text if private == read else private if isinstance(private, str) else json.dumps(private)


def _private_picture(content: bytes) -> bytes:
    """The picture alone, without whatever texts a program has put beside it."""
    with Image.open(io.BytesIO(content)) as image:
        image.load()
        if not image.info and not image.getexif():
            return content
        written = io.BytesIO()
        image.save(written, "PNG")
        return written.getvalue()


def _check_metrics(path: Path, steps: int) -> None:
    last = 0
    for place, line in enumerate(read_bytes(path, f"'{path}'", LARGEST_LOG).splitlines(), 1):
        step = step_of(line)
        if step is None:
            raise UserError(f"'{path}' is damaged: not a step's metrics in every line (line {place})")
        last = step
    if last < steps:
        raise UserError(f"'{path}' ends at step {last} of {steps}: the run is not finished; go on with --resume")
