"""A policy that several recipes share: a file with the sections ``policy`` and ``promotion``."""

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from compression.errors import RecipeError
from flows.safe_yaml import load_yaml, read_limited

SECTIONS = ("policy", "promotion")


def include_policy(raw: dict[str, Any], recipe: Path, lines: dict[tuple, Any]) -> dict[str, str]:
    """Put the sections of the file that ``policy: FILE`` names in its place; section -> the file it came from.

    Args:
        raw: The recipe as plain values; changed.
        recipe: The recipe's file: a relative path starts at its folder.
        lines: Place in the recipe -> line; the places of the included sections get the lines of their file.

    Raises:
        RecipeError: the file is missing or unreadable, is no policy file, or sets a section that the recipe sets too.
    """
    named = raw.get("policy")
    if not isinstance(named, str):
        return {}
    path = recipe.parent / named
    given, numbers = _read(path, f"'{recipe}{_line(lines, ('policy',))}'")
    for key in given:
        if key not in SECTIONS:
            close = difflib.get_close_matches(str(key), SECTIONS, n=1)
            raise RecipeError(
                f"Policy file '{path}{_line(numbers, (key,))}' has the section '{key}', expected policy or promotion."
                + (f" Did you mean '{close[0]}'?" if close else " Remove it.")
            )
    if "promotion" in given and "promotion" in raw:
        raise RecipeError(
            f"Section 'promotion' is in '{recipe}{_line(lines, ('promotion',))}' and in the policy file "
            f"'{path}{_line(numbers, ('promotion',))}', expected one of them. Remove it from one."
        )
    del raw["policy"], lines["policy",]
    raw.update(given)
    lines.update(numbers)
    return dict.fromkeys(SECTIONS if "promotion" in given else ("policy",), str(path))


def _read(path: Path, named_in: str) -> tuple[dict[str, Any], dict[tuple, int]]:
    try:
        text = read_limited(path, what=f"Policy file '{path}'")
    except FileNotFoundError as error:
        raise RecipeError(
            f"Policy file '{path}', named in {named_in}, does not exist, expected a file with the sections policy and "
            "promotion. Correct the path: it starts at the recipe's folder."
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"Policy file '{path}', named in {named_in}, cannot be read: {error}.") from error
    given, node = load_yaml(text, what=f"Policy file '{path}'")
    if not isinstance(given, dict):
        raise RecipeError(
            f"Policy file '{path}' holds {type(given).__name__}, expected the sections policy and promotion. Write "
            "`policy:` and the limits below it."
        )
    return given, _line_numbers(node)


def _line_numbers(node: yaml.Node | None, place: tuple = ()) -> dict[tuple, int]:
    lines: dict[tuple, int] = {}
    for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
        lines[(*place, key.value)] = key.start_mark.line + 1
        lines |= _line_numbers(value, (*place, key.value))
    return lines


def _line(lines: Mapping[tuple, Any], place: tuple) -> str:
    return f":{lines[place]}" if place in lines else ""
