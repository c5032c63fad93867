"""YAML as recipes have it: read safely and within bounds, and single keys set."""

import re
from typing import Annotated, Any

import yaml
from pydantic import AfterValidator

from rewardsr.errors import UserError, one_line, shortened, shown
from rewardsr.storage import expand

MOST_VALUES, DEEPEST = 10_000, 50  # of a recipe, once its aliases are followed


def _of_user(text: str) -> str:
    """A path with `~` replaced; whatever else it is (a Hub id, say) stays as it is written."""
    full = expand(text)
    return str(full) if text.startswith("~") else text


Place = Annotated[str, AfterValidator(_of_user)]


def read_yaml(text: str, where: str) -> Any:
    """The content of a text, of which `where` tells the origin.

    Raises:
        UserError: it is not YAML, too large or too deep.
    """
    try:
        content = yaml.load(text, _Loader)  # a SafeLoader
    except yaml.YAMLError as error:
        raise UserError(f"{where} is not valid YAML: {shortened(' '.join(str(error).split()), 200)}") from error
    except RecursionError as error:
        raise UserError(f"{where} is not valid YAML: it is nested too deeply") from error
    except Exception as error:  # a value that is not of its tag makes Python stumble in many ways: !!bool x, 2026-13-45
        raise UserError(f"{where} is not valid YAML: a value does not read as what it is: {one_line(error)}") from error
    _check_size(content, where)
    return content


def _check_size(content: Any, where: str) -> None:
    """Refuse what grows or never ends when its aliases are followed, and text that no file can hold."""
    level = [content]
    seen = 0
    for _ in range(DEEPEST):
        seen += len(level)
        if seen > MOST_VALUES:
            raise UserError(f"{where} holds more than {MOST_VALUES:,d} values")
        below: list[Any] = []
        for value in level:
            if isinstance(value, str) and any("\ud800" <= letter <= "\udfff" for letter in value):
                raise UserError(f"{where} holds half of a surrogate pair, which is no character: {shown(value)}")
            if isinstance(value, dict):
                below += [*value, *value.values()]
            elif isinstance(value, list | tuple | set):
                below += value
            if len(below) > MOST_VALUES:
                break
        level = below
        if not level:
            return
    raise UserError(f"{where} is nested more than {DEEPEST} levels deep")


class _Loader(yaml.SafeLoader):
    """Safe YAML that reads 5e-5 (no dot) as the number it is meant as, and refuses a key that is given twice."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen and key.tag != "tag:yaml.org,2002:merge":
                raise yaml.YAMLError(f"the key '{key.value}' occurs twice, again in line {key.start_mark.line + 1}")
            seen.add(key.value)
        return super().construct_mapping(node, deep)

    def flatten_mapping(self, node: Any) -> None:
        super().flatten_mapping(node)
        if len(node.value) > MOST_VALUES:  # merge keys can multiply at each level
            raise yaml.YAMLError(f"a mapping has more than {MOST_VALUES:,d} keys")


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def assign(content: Any, dotted: str, value: Any) -> None:
    """Set a key in sections and lists; `rewards.0.weight` is that of the first reward.

    Raises:
        UserError: the way there leads through a value, or past the end of a list.
    """
    *parents, last = (part.strip() for part in dotted.split("."))
    for place, part in enumerate(parents):
        if isinstance(content, list):
            content = content[_index(content, part, dotted)]
        else:
            if content.get(part) is None:
                content[part] = {}
            content = content[part]
        if not isinstance(content, dict | list):
            raise UserError(f"'{dotted}': '{'.'.join(parents[: place + 1])}' is a value, not a section")
    content[_index(content, last, dotted) if isinstance(content, list) else last] = value


def _index(content: list[Any], part: str, dotted: str) -> int:
    if part.isascii() and part.isdecimal() and len(part) < 10 and int(part) < len(content):
        return int(part)
    held = f"0 to {len(content) - 1}" if content else "nothing: it is empty"
    raise UserError(f"'{dotted}': '{shortened(part, 40)}' is not in the list, which has {held}")
