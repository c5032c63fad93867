"""Options that users set: strict models, and one line for the first thing that is wrong."""

from collections.abc import Mapping
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from rewardsr.errors import UserError, nearest

Model = TypeVar("Model", bound=BaseModel)


class Options(BaseModel):
    """Base of all options, those of other packages included: unknown keys, NaN and infinity are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def parse(model: type[Model], content: Mapping[str, Any], where: str) -> Model:
    """Validate a mapping against a model.

    Args:
        model: subclass of `Options`.
        content: keys and values.
        where: what to call them in a message.

    Raises:
        UserError: the first thing that is wrong: an unknown key (the nearest is named), a missing or a wrong value.
    """
    try:
        return model.model_validate(dict(content))
    except ValidationError as error:
        # A key that is misspelt is missing under its right name, too: say the former.
        first = min(error.errors(), key=lambda entry: entry["type"] != "extra_forbidden")
        raise UserError(
            f"{where}: {_explain(model, first['loc'], first['type'], first['msg'], first['input'])}"
        ) from error


def _explain(model: type[BaseModel], loc: tuple[int | str, ...], kind: str, message: str, value: Any) -> str:
    dotted = ".".join(str(part) for part in loc)
    if kind == "extra_forbidden":
        return f"unknown key '{dotted}': {nearest(str(loc[-1]), _keys(model, loc[:-1]))}"
    if kind == "missing":
        return f"'{dotted}' is missing"
    if not loc:
        return message.removeprefix("Value error, ")
    return f"'{dotted}' is {value!r}: {message[:1].lower()}{message[1:]}"


def _keys(model: type[BaseModel], loc: tuple[int | str, ...]) -> list[str]:
    """Names of the fields of the section at `loc`."""
    for part in loc:
        if isinstance(part, int):
            continue
        annotation = model.model_fields[part].annotation
        candidates = [annotation, *get_args(annotation)]
        model = next(kind for kind in candidates if isinstance(kind, type) and issubclass(kind, BaseModel))
    return list(model.model_fields)
