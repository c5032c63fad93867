"""Finding adapters on the Hub."""

from dataclasses import dataclass
from datetime import datetime

from huggingface_hub import HfApi

from rewardsr.errors import UserError
from rewardsr.hub.connection import online, reason

TAG = "rewardsr"  # in the front matter of every card, for others to search by


@dataclass(frozen=True)
class Found:
    """An adapter on the Hub.

    Attributes:
        id: "user/name".
        base: the pipeline it is for, where its card says.
        downloads: of the last 30 days.
        likes: in all.
        updated: time of the last commit.
    """

    id: str
    base: str | None
    downloads: int
    likes: int
    updated: datetime | None


def search(query: str = "", base: str | None = None, limit: int = 20) -> list[Found]:
    """Adapters on the Hub, most downloaded first.

    Args:
        query: part of the name.
        base: Hub id of the pipeline that they are for.
        limit: at most so many.

    Raises:
        UserError: no connection, or the Hub fails.
    """
    if not online():
        raise UserError("the Hub cannot be reached (or HF_HUB_OFFLINE is set): connect to search it")
    tags = [TAG] if base is None else [TAG, f"base_model:{base}"]
    try:
        models = HfApi().list_models(
            filter=tags,
            search=query or None,
            sort="downloads",
            limit=limit,
            expand=["tags", "downloads", "likes", "lastModified"],
        )
        return [
            Found(model.id, _base_of(model.tags or []), model.downloads or 0, model.likes or 0, model.last_modified)
            for model in models
        ]
    except Exception as error:  # no connection is requests' error or httpx's, by the version of the Hub's client
        raise UserError(f"the search failed: {reason(error)}") from error


def _base_of(tags: list[str]) -> str | None:
    """The Hub's own tags are base_model:ID and base_model:KIND:ID."""
    return next((tag.rpartition(":")[2] for tag in tags if tag.startswith("base_model:")), None)
