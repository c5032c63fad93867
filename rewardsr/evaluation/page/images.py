"""Pictures of a page: chosen and encoded so that the page stays small, and merged where runs share them."""

import io
from collections.abc import Mapping, Sequence

from PIL import Image

from rewardsr.errors import UserError, one_line
from rewardsr.evaluation.page.content import EvaluationView, Picture, distinct

LARGEST = 4_000_000  # bytes of all encoded pictures of a page; base64 makes a third more of it
MOST, SIDE = 24, 1024  # images on a page, and their pixels a side
QUALITIES = (95, 85, 70)  # of WebP, tried in this order where pictures as they are do not fit

_KINDS = {b"\x89PNG": "image/png", b"\xff\xd8\xff": "image/jpeg", b"RIFF": "image/webp"}


def fitted(pictures: Sequence[Picture], largest: int = LARGEST) -> tuple[list[Picture], str]:
    """The pictures in at most so many bytes, and how they are kept, in words.

    Where they do not fit as they are, they are encoded again with losses; where that is not enough, the last ones are
    left out. Larger ones than `SIDE` are cut at the centre.

    Raises:
        UserError: something that is not a picture.
    """
    if not pictures:
        return [], ""
    cut = [_read(picture) for picture in pictures]
    whole = all(max(image.size) <= SIDE for images in cut for image in images.values())
    if whole and _size(pictures) <= largest:
        return list(pictures), "as they were written"
    found: list[Picture] = []
    for quality in QUALITIES:
        found = [_encoded(picture, images, quality) for picture, images in zip(pictures, cut, strict=True)]
        if _size(found) <= largest:
            break
    count = len(found)
    while _size(found) > largest and len(found) > 1:
        found.pop()
    missing = f"; the last {count - len(found)} of {count} are left out" if len(found) < count else ""
    said = f"as WebP of quality {quality} (differences of a few levels of 255 may be compression){missing}"
    return found, said if whole else f"cut to {SIDE} pixels at the centre, {said}"


def kind_of(content: bytes) -> str:
    """The media type of an encoded picture.

    Raises:
        UserError: another kind than PNG, JPEG and WebP.
    """
    for beginning, kind in _KINDS.items():
        if content.startswith(beginning):
            return kind
    raise UserError("a picture of the page is no PNG, JPEG or WebP")


def chosen(pictures: Sequence[Picture], view: EvaluationView | None, most: int = MOST) -> list[Picture]:
    """At most so many pictures, in their order: of the images that lost and won most under the first metric."""
    if len(pictures) <= most or view is None:
        return list(pictures[:most])
    found = view.evaluation
    first = next(iter(found.rewards.values()))
    gains = dict(zip(distinct(found.images), first.differences, strict=True))
    ranked = sorted(range(len(pictures)), key=lambda place: gains.get(pictures[place].name, 0.0))
    kept = {*ranked[: (most + 1) // 2], *ranked[len(ranked) - most // 2 :]}
    return [picture for place, picture in enumerate(pictures) if place in kept]


def merged(parts: Mapping[str, Sequence[Picture]]) -> list[Picture]:
    """Pictures of several runs, an image once: LQ, base and HQ that differ between them are told apart by the run.

    Args:
        parts: by the name of the run, pictures with the labels LQ, base, tuned and HQ; tuned gets the run's name.
    """
    if len(parts) == 1:
        return list(next(iter(parts.values())))
    images: dict[str, dict[str, bytes]] = {}
    scores: dict[str, dict[str, Mapping[str, float]]] = {}
    for run, pictures in parts.items():
        for picture in pictures:
            held, scored = images.setdefault(picture.name, {}), scores.setdefault(picture.name, {})
            for label, content in picture.images.items():
                name = run if label == "tuned" else label
                if held.get(name, content) != content:
                    name = f"{label} of {run}"
                held[name] = content
                if label in picture.scores:
                    scored[name] = picture.scores[label]
    return [
        Picture(name, dict(sorted(held.items(), key=lambda entry: _place(entry[0]))), scores[name])
        for name, held in images.items()
    ]


def _place(label: str) -> int:
    first = label.split(" ")[0]
    return {"LQ": 0, "base": 1, "HQ": 3}.get(first, 2)


def _size(pictures: Sequence[Picture]) -> int:
    return sum(map(len, {content for picture in pictures for content in picture.images.values()}))


def _read(picture: Picture) -> dict[str, Image.Image]:
    """The images of a picture, cut to the same part of the whole."""
    images: dict[str, Image.Image] = {}
    for label, content in picture.images.items():
        kind_of(content)
        try:
            images[label] = Image.open(io.BytesIO(content))
            images[label].load()
        except Exception as error:  # PIL fails in many ways
            raise UserError(f"picture '{picture.name}' ({label}) is damaged: {one_line(error)}") from error
    return images


def _encoded(picture: Picture, images: Mapping[str, Image.Image], quality: int) -> Picture:
    wide, tall = (max(image.size[axis] for image in images.values()) for axis in (0, 1))
    across, down = min(1.0, SIDE / wide), min(1.0, SIDE / tall)
    content = {}
    for label, image in images.items():
        width, height = max(1, round(image.width * across)), max(1, round(image.height * down))
        left, top = (image.width - width) // 2, (image.height - height) // 2
        written = io.BytesIO()
        part = image.convert("RGB").crop((left, top, left + width, top + height))
        part.save(written, "WEBP", quality=quality, method=2)
        content[label] = written.getvalue()
    return Picture(picture.name, content, picture.scores)
