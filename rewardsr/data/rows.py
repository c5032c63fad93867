"""Images in a table of the package `datasets`, local or from the Hub; each reads like a file."""

import io
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

from rewardsr.errors import UserError, one_line
from rewardsr.hub import connection
from rewardsr.storage import expand
from rewardsr.train.recipe import SourceRecipe


class Table:
    """The images and texts of a data set. Images are not decoded, and the table stays on the disk.

    Args:
        source: with `dataset`: a folder that `datasets` has saved or can read (Parquet, images, ...), or an id.

    Raises:
        UserError: `datasets` is not installed; there is no such data set, configuration, split or column of images; or
            it is in no cache and the Hub cannot be reached.
    """

    def __init__(self, source: SourceRecipe) -> None:
        self.place = source.place
        self._column = source.image_column
        self._data = _loaded(source)
        features = self._data.features
        if type(features.get(self._column)).__name__ != "Image":
            found = [name for name, kind in features.items() if type(kind).__name__ == "Image"]
            raise UserError(
                f"data set '{self.place}' has no column '{self._column}' of images: set image_column to one of "
                f"{', '.join(found) or 'those, which it has none of'}"
            )
        self._images = self._data.cast_column(self._column, type(features[self._column])(decode=False))
        self._images = self._images.select_columns([self._column]).with_format("arrow")

    def __len__(self) -> int:
        return len(self._data)

    @property
    def columns(self) -> list[str]:
        """Names of all columns."""
        return list(self._data.features)

    def texts(self, column: str) -> list[str]:
        """The texts of a column; what is missing in a row is empty.

        Raises:
            UserError: there is no such column of texts.
        """
        kind = self._data.features.get(column)
        if getattr(kind, "dtype", None) not in ("string", "large_string"):
            raise UserError(
                f"data set '{self.place}' has no column '{column}' of texts for prompts 'metadata': set "
                f"data.caption_column to one of its columns ({', '.join(self.columns)})"
            )
        return [" ".join((text or "").split()) for text in self._data[column]]

    def open(self, number: int) -> BinaryIO:
        """The file in a row.

        Raises:
            OSError: it lies outside the table, and is not there; or the row is empty.
        """
        entry = self._images[number : number + 1].column(self._column).chunk(0)
        content, path = entry.field("bytes")[0], entry.field("path")[0]
        if content.is_valid:
            return io.BufferedReader(_Memory(content.as_buffer()))
        if not path.is_valid:
            raise FileNotFoundError("the row holds no image")
        return Path(path.as_py()).open("rb")


@dataclass(frozen=True)
class Row:
    """An image of a table."""

    table: Table
    number: int

    def __str__(self) -> str:
        return f"{self.table.place} row {self.number}"

    @property
    def name(self) -> str:
        """What tells it from the other images of the table."""
        return f"row {self.number}"

    def open(self, mode: Literal["rb"] = "rb") -> BinaryIO:
        """The file in it; errors are those of `Table.open`."""
        return self.table.open(self.number)


Stored = Path | Row
"""Where an image is kept."""


class _Memory(io.RawIOBase):
    """A table's own memory as a file, so that of a large image no more is read from the disk than is asked for."""

    def __init__(self, content: Any) -> None:
        self._content, self._at = memoryview(content).cast("B"), 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, target: Any) -> int:
        part = self._content[self._at : self._at + len(target)]
        memoryview(target).cast("B")[: len(part)] = part
        self._at += len(part)
        return len(part)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: len(self._content)}[whence]
        if self._at < 0:
            raise OSError("a place before the beginning")
        return self._at


def _loaded(source: SourceRecipe) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise UserError("data sets need the package datasets: pip install 'rewardsr[datasets]'") from error
    assert source.dataset is not None
    what, folder = f"data set '{source.dataset}'", expand(source.dataset)
    local = folder.exists()
    if not local and not connection.online():
        datasets.config.HF_HUB_OFFLINE = True  # else its client tries for minutes; now it looks into its cache
    try:
        if any((folder / name).is_file() for name in ("dataset_info.json", "dataset_dict.json")):
            if source.config is not None:
                raise KeyError("a saved data set has no configurations: leave config out")
            saved = datasets.load_from_disk(str(folder))
            if isinstance(saved, datasets.DatasetDict):
                return saved[source.split]
            if "split" in source.model_fields_set and (held := str(saved.split or "train")) != source.split:
                raise KeyError(f"it is the split '{held}'")
            return saved
        return datasets.load_dataset(str(folder) if local else source.dataset, source.config, split=source.split)
    except Exception as error:  # of the Hub's client, of Arrow, or of what reads the files
        if not local and datasets.config.HF_HUB_OFFLINE:
            raise UserError(
                f"{what} is no folder here and in no cache, and there is no connection (or HF_HUB_OFFLINE is set): "
                "connect once, or give its folder"
            ) from error
        raise UserError(f"{what}, split '{source.split}', cannot be loaded: {one_line(error)}") from error
