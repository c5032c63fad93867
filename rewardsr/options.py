"""Options that users set: strict models, one line for the first thing that is wrong, and the list of what there is."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePath
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, ValidationInfo, field_validator

from rewardsr.errors import UserError, nearest, shortened, shown

Model = TypeVar("Model", bound=BaseModel)

Seed = Annotated[int, Field(ge=-(2**63), lt=2**64)]  # what torch takes
Count = Annotated[int, Field(ge=1, le=10**9)]  # of steps or images: a thousand times what anybody has


class Options(BaseModel):
    """Base of all options, those of other packages included: unknown keys, NaN and infinity are refused, and so are
    true and false where a number belongs (`seed: yes`)."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_switch_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, bool) and info.field_name is not None:
            kinds = set(_plain_kinds(cls.model_fields[info.field_name].annotation))
            if kinds & {int, float} and bool not in kinds:
                raise ValueError("expected a number")
        return value


# `Field(..., json_schema_extra=FOR_LORA)` marks an adapter's option that decides what the network sees in training: it
# stands in the file of a LoRA, and loading that beside another value is warned of.
FOR_LORA: dict[str, JsonValue] = {"lora": True}


def marked_for_lora(kind: type[Options]) -> set[str]:
    """Names of the options that a LoRA depends on."""
    return {
        name
        for name, entry in kind.model_fields.items()
        if isinstance(entry.json_schema_extra, dict) and entry.json_schema_extra.get("lora") is True
    }


def parse(model: type[Model], content: Mapping[str, Any], where: str) -> Model:
    """Validate a mapping against a model.

    Args:
        model: subclass of `Options`.
        content: keys and values; a path counts as its text, which is what recipes and LoRA files hold.
        where: what to call them in a message.

    Raises:
        UserError: the first thing that is wrong: an unknown key (the nearest is named), a missing or a wrong value.
    """
    try:
        return model.model_validate(
            {key: str(value) if isinstance(value, PurePath) else value for key, value in content.items()}
        )
    except ValidationError as error:
        # A key that is misspelt is missing under its right name, too: say the former.
        first = min(error.errors(include_url=False), key=lambda entry: entry["type"] != "extra_forbidden")
        raise UserError(
            f"{where}: {_explain(model, first['loc'], first['type'], first['msg'], first['input'])}"
        ) from error


class Option(NamedTuple):
    """One option of a model, in words; `name` is dotted for those of a section."""

    name: str
    type: str
    default: str
    description: str
    bounds: str


def describe(model: type[Options]) -> list[Option]:
    """All options of a model, in its order; a section's instead of the section."""
    found = []
    for name, entry in model.model_fields.items():
        kind = entry.annotation
        if isinstance(kind, type) and issubclass(kind, Options) and not entry.is_required():
            own = entry.get_default(call_default_factory=True)
            found += [
                option._replace(name=f"{name}.{option.name}", default=_default(_at(own, option.name)))
                for option in describe(kind)
            ]
            continue
        default = "required" if entry.is_required() else _default(entry.get_default(call_default_factory=True))
        found.append(Option(name, _in_words(kind), default, entry.description or "", _bounds(entry.metadata)))
    return found


def _at(value: Any, dotted: str) -> Any:
    for name in dotted.split("."):
        value = getattr(value, name)
    return value


def _bounds(metadata: Sequence[Any]) -> str:
    """What numbers may be, in words: "1 to 64", "above 0, below 1"."""
    words = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
    found = {word: value for entry in metadata for word in words if (value := getattr(entry, word, None)) is not None}
    found = {word: value for word, value in found.items() if abs(value) < 10**8}  # the others keep nobody from anything
    if found.keys() == {"ge", "le"}:
        return f"{found['ge']:g} to {found['le']:g}"
    return ", ".join(f"{words[word]} {value:g}" for word, value in found.items())


def _plain_kinds(annotation: Any) -> Iterator[Any]:
    """The kinds that a value may be of, of a type with alternatives."""
    if get_origin(annotation) in (Union, UnionType):
        for one in get_args(annotation):
            yield from _plain_kinds(one)
    elif get_origin(annotation) is Annotated:
        yield from _plain_kinds(get_args(annotation)[0])
    else:
        yield annotation


def _in_words(annotation: Any) -> str:
    """A type as recipes have it: "int or null", "lq or noise"."""
    if get_origin(annotation) is Literal:
        return " or ".join(map(str, get_args(annotation)))
    if get_origin(annotation) in (Union, UnionType):
        return " or ".join(map(_in_words, get_args(annotation)))
    if get_origin(annotation) is Annotated:
        return _in_words(get_args(annotation)[0])
    if annotation is NoneType:
        return "null"
    if get_origin(annotation) is tuple and Ellipsis not in get_args(annotation):
        return f"[{', '.join(map(_in_words, get_args(annotation)))}]"
    if get_origin(annotation) in (list, tuple):
        return f"list of {_in_words(get_args(annotation)[0])}"
    if get_origin(annotation) is dict or (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
        return "mapping"
    return annotation.__name__ if isinstance(annotation, type) else str(annotation)


def _default(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", False: "false", True: "true"}[value]
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_default, value))}]"
    return repr(value) if value == "" else str(value)


def _explain(model: type[BaseModel], loc: tuple[int | str, ...], kind: str, message: str, value: Any) -> str:
    message = message.removeprefix("Value error, ")
    dotted = ".".join(shortened(str(part), 60) for part in loc)
    if kind == "extra_forbidden":
        return f"unknown key '{dotted}': {nearest(str(loc[-1]), _keys(model, loc[:-1]))}"
    if kind == "missing":
        return f"'{dotted}' is missing"
    if kind == "invalid_key":
        return f"the key {shown(loc[-1])} is no text: put it in quotes"
    if not loc:
        return message
    return f"'{dotted}' is {shown(value)}: {message[:1].lower()}{message[1:]}"


def _keys(model: type[BaseModel], loc: tuple[int | str, ...]) -> list[str]:
    """Names of the fields of the section at `loc`."""
    for part in loc:
        if isinstance(part, int):
            continue
        annotation = model.model_fields[part].annotation
        candidates = [annotation, *get_args(annotation)]
        model = next(kind for kind in candidates if isinstance(kind, type) and issubclass(kind, BaseModel))
    return list(model.model_fields)
