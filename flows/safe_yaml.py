"""YAML from people we may not know: plain values only, a limited size, and no aliases that unfold without end."""

from pathlib import Path
from typing import Any

import yaml

from compression.errors import RecipeError

MAX_BYTES = 2**20
MAX_VALUES = 100_000
"""A recipe has a few hundred; nine aliases of nine aliases and so on have billions."""


def read_limited(path: Path, *, what: str) -> str:
    """The text of a file that may be anything.

    Raises:
        RecipeError: larger than any recipe.
    """
    with path.open("rb") as file:
        content = file.read(MAX_BYTES + 1)
    _refuse_size(len(content), what)
    return content.decode("utf-8")


def _refuse_size(size: int, what: str) -> None:
    if size > MAX_BYTES:
        raise RecipeError(f"{what} has more than {MAX_BYTES:,} bytes, expected a recipe. Name another file.")


def load_yaml(text: str, *, what: str) -> tuple[Any, yaml.Node | None]:
    """The plain value of a YAML text, and its node tree, for line numbers.

    Args:
        text: The YAML.
        what: How messages call it, e.g. ``Recipe 'a.yaml'``.

    Raises:
        RecipeError: not YAML, tags of Python objects, larger or deeper than any recipe.
    """
    _refuse_size(len(text), what)
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        _refuse_bombs(node, what)
        return yaml.safe_load(text), node
    except yaml.YAMLError as error:
        raise RecipeError(f"{what} is not YAML: {error}") from error
    except RecursionError as error:
        raise RecipeError(f"{what} is nested too deeply, expected a mapping of sections. Flatten it.") from error


def _refuse_bombs(node: yaml.Node | None, what: str) -> None:
    sizes: dict[int, int] = {}

    def size(part: yaml.Node | None) -> int:
        if id(part) not in sizes:
            sizes[id(part)] = MAX_VALUES + 1  # what an alias inside of its own anchor finds
            children: list[yaml.Node] = []
            if isinstance(part, yaml.MappingNode):
                children = [each for pair in part.value for each in pair]
            elif isinstance(part, yaml.SequenceNode):
                children = part.value
            sizes[id(part)] = 1 + sum(size(child) for child in children)
        return sizes[id(part)]

    if size(node) > MAX_VALUES:
        raise RecipeError(
            f"{what} unfolds to more than {MAX_VALUES:,} values by its aliases, expected a recipe. "
            "Write the values out instead of `&name` and `*name`."
        )
