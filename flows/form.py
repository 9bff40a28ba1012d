"""What a person fills in to start a run: a recipe by its name with changes for this run, or a recipe written out.

Prefect makes the form from the JSON schema of these types, and its server refuses what the schema does not allow. The
overrides are taken from the recipe's own fields, so that a new section appears in the form by itself.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import yaml
from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    ValidationError,
    create_model,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import CoreSchema

from compression.errors import RecipeError
from compression.types import Frozen
from flows.form_schema import FormSchema, plain
from flows.recipe import Recipe, explain, load_recipe, parse_recipe
from flows.safe_yaml import load_yaml
from tasks.settings import settings

SECTIONS = {name: field for name, field in Recipe.model_fields.items() if name not in ("name", "description")}
"""What a run may override; name and description belong to the file."""
REQUIRED = tuple(name for name, field in SECTIONS.items() if field.is_required())
OPTIONAL = tuple(name for name, field in SECTIONS.items() if type(None) in get_args(field.annotation))
"""Sections that a recipe may do without: None is a value of theirs."""
LINE = r"^\s*\w[\w.]*\s*="


def recipe_files() -> dict[str, Path]:
    """Name -> file of every recipe in ``<root>/recipes``, templates left out."""
    files = {file.stem: file for file in (settings().root / "recipes").glob("*.yaml")}
    return {name: files[name] for name in sorted(files) if not name.endswith("template")}


def recipe_file(name: str) -> Path:
    """The file of that name.

    Raises:
        RecipeError: there is none.
    """
    files = recipe_files()
    if name not in files:
        raise RecipeError(
            f"Recipe '{name}' has no file in '{settings().root / 'recipes'}', expected one of: "
            f"{', '.join(files) or '(none)'}. Choose one of them, or write '{name}.yaml'."
        )
    return files[name]


def _known(name: str) -> str:
    try:
        recipe_file(name)
    except RecipeError as error:
        raise ValueError(str(error)) from error
    return name


class OfferedRecipes:
    """An annotation: the names of the recipe files as an enum; a Field's own extras would give way to Prefect's."""

    def __get_pydantic_json_schema__(self, core: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        names = list(recipe_files())
        return handler(core) | ({"enum": names} if names else {})  # an enum without values is no valid schema


RecipeName = Annotated[str, AfterValidator(_known), OfferedRecipes()]
"""The name of a recipe file; in the form a dropdown of those that were there when the deployment was registered."""


class _Choice(Frozen):
    name: RecipeName = "digits"
    """The recipe file of the folder recipes to start from."""
    set: tuple[Annotated[str, Field(pattern=LINE, title="Change")], ...] = ()
    """Single values to change, each as name.name=value, for example `distill.train.epochs=5`. They are applied last."""
    without: tuple[Literal[OPTIONAL], ...] = ()  # pyright: ignore[reportInvalidTypeForm]
    """Sections of the file to leave out in this run."""


def _override(name: str, field: FieldInfo) -> Any:
    kind: Any = field.annotation
    if not get_args(kind) or get_origin(kind) is tuple:
        kind = Annotated[kind, *field.metadata, Field(title="another")]
    title = name.replace("_", " ").capitalize()
    return kind | None, Field(default=None, title=title, description=field.description)


_Overrides = create_model(
    "_Overrides", __base__=_Choice, **{name: _override(name, field) for name, field in SECTIONS.items()}
)


def _label(schema: dict[str, Any]) -> None:
    for name in SECTIONS:
        field = schema["properties"][name]
        kinds = [member for member in field["anyOf"] if member.get("type") != "null"]
        # First and without a default, the form leaves the section out; for a default of None it would write None, of
        # which the server says that a recipe written out has no such thing.
        field["anyOf"] = [{"title": "as in the file", "enum": [None]}, *kinds]
        del field["default"]
    # A description marks a recipe that is written out: wrong here, but not what is wrong in it.
    schema |= {"patternProperties": {"^description$": {}}, "not": {"required": ["description"]}}


class NamedRecipe(_Overrides):
    """A recipe file, and what is different in this run. A section that is None is as the file says; one that is filled
    in takes the place of the file's whole section. To change single values, use *set*."""

    model_config = ConfigDict(title="By name", json_schema_extra=_label)

    @model_validator(mode="after")
    def _not_both(self) -> "NamedRecipe":
        for section in self.without:
            if getattr(self, section) is not None:
                raise ValueError(f"{section} is filled in and left out by without, expected one of both. Drop one.")
        return self

    def overrides(self) -> list[str]:
        """All changes as the command line's ``--set`` takes them."""
        given = self.model_dump(mode="json")
        sections = [name for name in SECTIONS if given[name] is not None or name in self.without]
        return [f"{name}={yaml.safe_dump(given[name])}" for name in sections] + list(self.set)


class RecipeText(Frozen):
    """A whole recipe as text."""

    # The form checks values before the server does, and its only message is that nothing fits. It does not look at
    # additional properties, so that all values fit this member, and the server answers, with the name of the field.
    model_config = ConfigDict(title="As text")

    yaml: str = ""
    """What a recipe file holds; the sections and their fields are those of *Written out*."""


def resolve(choice: NamedRecipe | Recipe | RecipeText) -> Recipe:
    """The whole recipe that a choice stands for.

    Raises:
        RecipeError: the file or text, or what the overrides make of it, is not a recipe.
    """
    if isinstance(choice, NamedRecipe):
        return load_recipe(recipe_file(choice.name), choice.overrides())
    if isinstance(choice, Recipe):
        return choice
    raw, _ = load_yaml(choice.yaml, what="The text of the recipe")
    if not isinstance(raw, dict):
        raise RecipeError(f"The text of the recipe holds {type(raw).__name__}, expected a mapping of sections.")
    return parse_recipe(raw)


def understand(value: Any) -> Any:
    """Plain values as the choice that they are; with every required section, a recipe written out.

    Raises:
        RecipeError: they fit neither; the message lists every problem with its place.
    """
    if not isinstance(value, Mapping):
        return value
    value = plain(value)
    if set(value) == {"yaml"}:
        return resolve(RecipeText.model_validate(value))
    if "description" in value or all(value.get(name) is not None for name in REQUIRED):
        return parse_recipe(value)
    try:
        return NamedRecipe.model_validate(value)
    except ValidationError as error:
        rows = [f"  {'.'.join(map(str, place)) or 'recipe'}: {text}" for place, text in explain(error, value)]
        raise RecipeError("The choice of a recipe does not fit; nothing was run.\n" + "\n".join(rows)) from error


RecipeChoice = Annotated[
    NamedRecipe | Recipe | RecipeText, BeforeValidator(understand), FormSchema(vague=("Written out", "As text"))
]
"""The type of a flow's parameter: three tabs in the form."""
