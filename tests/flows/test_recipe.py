from pathlib import Path

import pytest
import yaml

from compression.errors import RecipeError
from flows.recipe import Recipe, dump_recipe, load_recipe, parse_recipe

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = sorted((ROOT / "recipes").glob("*.yaml"))


def raw() -> dict:
    return yaml.safe_load((ROOT / "recipes" / "digits.yaml").read_text())


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_recipe_loads(path: Path) -> None:
    assert load_recipe(path).name == path.stem


def test_all_three_recipes_are_shipped() -> None:
    assert {path.stem for path in SHIPPED} >= {"digits", "fashion-mnist", "image-folder-template"}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_resolved_recipe_loads_to_the_same_recipe(path: Path) -> None:
    recipe = load_recipe(path)
    assert Recipe.model_validate(yaml.safe_load(dump_recipe(recipe))) == recipe


def change(place: str, value: object) -> dict:
    content = raw()
    target = content
    *parents, last = place.split(".")
    for part in parents:
        target = target[int(part)] if isinstance(target, list) else target[part]
    target[int(last) if isinstance(target, list) else last] = value
    return content


@pytest.mark.parametrize(
    ("place", "value", "where", "says"),
    [
        ("sead", 1, "sead", "unknown key"),
        ("distill.train.epochs", 0, "distill.train.epochs", "greater than"),
        ("distill.train.epochs", "many", "distill.train.epochs", "'many'"),
        ("distill.losses.1.kind", "kdd", "distill.losses.1.kind", "Did you mean 'kd'"),
        ("distill.losses.1.temprature", 2, "distill.losses.1.temprature", "unknown key"),
        ("distill.losses.1.temperature", "hot", "distill.losses.1.temperature", "'hot'"),
        ("data.kind", "digit", "data.kind", "Did you mean 'digits'"),
        ("teachers.0.model.widths", "wide", "teachers.0.model.widths", "'wide'"),
        ("teachers.1.name", "residual", "(whole recipe)", "twice"),
        ("search.spaces.0.parent", "nobody", "(whole recipe)", "expected one of residual"),
        ("search.max_macs_share", 1.5, "search.max_macs_share", "less than or equal to 1"),
        ("select.panel_size", 9, "(whole recipe)", "there are 3 teachers"),
        ("quantize", None, "(whole recipe)", "has precision int8"),
        ("policy.max_accuracy_drop", 3, "policy.max_accuracy_drop", "less than or equal to 1"),
        ("targets.0.precision", "int2", "targets.0.precision", "'int2'"),
        (
            "card.teacher_licences",
            [{"teacher": "nobody", "licence": "MIT"}],
            "(whole recipe)",
            "of the teachers residual",
        ),
        ("name", "My Parts", "name", "match"),
    ],
)
def test_a_wrong_value_is_refused_with_its_place_and_a_way_out(
    place: str, value: object, where: str, says: str
) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(change(place, value))
    lines = str(caught.value).splitlines()
    assert "1 problem" in lines[0], str(caught.value)
    assert "nothing was run" in lines[0]
    assert len(lines) == 2
    assert f" {where}: " in lines[1]
    assert says in lines[1]


def test_every_problem_is_listed_at_once_with_its_line(tmp_path: Path) -> None:
    text = (ROOT / "recipes" / "digits.yaml").read_text()
    text = text.replace("seed: 0", "seed: -1").replace("views: 10", "views: 0")
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    message = str(caught.value)
    assert "2 problems" in message
    seed_line = next(number for number, line in enumerate(text.splitlines(), start=1) if line.startswith("seed"))
    assert f"broken.yaml:{seed_line}  seed" in message


def test_overrides_reach_nested_values_and_are_checked() -> None:
    path = ROOT / "recipes" / "digits.yaml"
    recipe = load_recipe(path, ["distill.train.epochs=3", "distill.losses.1.temperature=5", "seed=7"])
    assert (recipe.distill.train.epochs, recipe.distill.losses[1].temperature, recipe.seed) == (3, 5, 7)


def test_an_override_changes_one_place_of_those_with_the_same_anchor(tmp_path: Path) -> None:
    content = raw()
    content["distill"]["train"] = content["teachers"][0]["source"]["train"]  # dumped as an anchor and an alias
    (tmp_path / "digits.yaml").write_text(yaml.safe_dump(content))
    assert "*id" in (tmp_path / "digits.yaml").read_text()
    recipe = load_recipe(tmp_path / "digits.yaml", ["distill.train.epochs=1"])
    assert recipe.distill.train.epochs == 1
    assert recipe.teachers[0].source.train.epochs == 24  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("distill.train.epochs", "has no '='"),
        ("distil.train.epochs=3", "Did you mean 'distill'"),
        ("teachers.7.name=x", "expected one of: 0, 1, 2"),
        ("distill.train.epoch=3", "unknown key"),
        ("seed=[1", "not YAML"),
    ],
)
def test_a_wrong_override_is_refused(override: str, says: str) -> None:
    with pytest.raises(RecipeError, match=".") as caught:
        load_recipe(ROOT / "recipes" / "digits.yaml", [override])
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("content", "says"),
    [("a: [1", "is not YAML"), ("- 1\n- 2", "expected a mapping"), ("", "expected a mapping")],
)
def test_a_file_that_is_no_recipe_is_refused(tmp_path: Path, content: str, says: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(content)
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert says in str(caught.value)


def test_a_missing_recipe_names_the_ones_there_are() -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(ROOT / "recipes" / "digit.yaml")
    assert "digits.yaml" in str(caught.value)


def test_yaml_cannot_run_code(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    path = tmp_path / "recipe.yaml"
    path.write_text(f"name: !!python/object/apply:os.system ['touch {marker}']\n")
    with pytest.raises(RecipeError):
        load_recipe(path)
    assert not marker.exists()


def test_the_form_has_tabs_not_a_json_box() -> None:
    """Prefect's form shows `anyOf` as tabs; `oneOf` with a discriminator, and a mapping with any names, as raw JSON."""
    schema = str(Recipe.model_json_schema())
    assert "'additionalProperties': {" not in schema
    assert "oneOf" not in schema
    assert "discriminator" not in schema
