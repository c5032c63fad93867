"""Prompts that lie beside images as text files: `0001.txt` for `0001.png`."""

from pathlib import Path

from rewardsr.errors import UserError

PROMPT_FOLDERS = ("prompts", "prompt", "tag", "tags")  # `tag` is what SeeSR's training sets call it
ADAPTER = "adapter"
SIDECAR = "sidecar"


def sidecar_prompt(image_path: Path | str, folder: Path | str | None = None) -> str | None:
    """The prompt of an image from a text file of the same stem.

    Args:
        image_path: the image; it need not exist.
        folder: where the text lies; beside the image by default.

    Returns:
        The text in one line, without surrounding white space (an empty file is an empty prompt); None: no such file.

    Raises:
        UserError: the text is not UTF-8, or cannot be read.
    """
    image_path = Path(image_path)
    path = (image_path.parent if folder is None else Path(folder)) / f"{image_path.stem}.txt"
    if not path.is_file():
        return None
    try:
        return " ".join(path.read_text(encoding="utf-8-sig").split())
    except UnicodeDecodeError as error:
        raise UserError(f"cannot read '{path}': it is not UTF-8 text; save it as UTF-8") from error
    except OSError as error:
        raise UserError(f"cannot read '{path}': {error.strerror or error}") from error


def prompt_folder(root: Path | str) -> Path | None:
    """The folder of prompts inside a data folder (`prompts`, `prompt`, `tag` or `tags`), if there is one."""
    return next((Path(root) / name for name in PROMPT_FOLDERS if (Path(root) / name).is_dir()), None)


def resolve_prompts(images: list[Path], prompts: str, folder: Path | str | None = None) -> list[str] | None:
    """The prompts of a list of images.

    Args:
        images: the image files.
        prompts: "adapter" leaves the text to the adapter; "sidecar" reads the text files; anything else is the one
            prompt of all images.
        folder: where the text files lie; beside the images by default.

    Returns:
        One text an image, or None where the adapter decides.

    Raises:
        UserError: a text file is missing; the first few are named.
    """
    if prompts == ADAPTER:
        return None
    if prompts != SIDECAR:
        return [prompts] * len(images)
    found = [sidecar_prompt(path, folder) for path in images]
    missing = [path.name for path, text in zip(images, found, strict=True) if text is None]
    if missing:
        where = "beside them" if folder is None else f"in '{folder}'"
        raise UserError(
            f"{len(missing)} of {len(images)} images have no prompt file {where} ({first_few(missing)}): "
            f"write <name>.txt, or choose prompts '{ADAPTER}' or a fixed text"
        )
    return [text for text in found if text is not None]


def first_few(names: list[str], count: int = 3) -> str:
    """The first names, for a message of one line."""
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")
