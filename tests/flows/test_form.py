"""The form: what a person sees in it, what becomes of what they fill in, and what the server refuses."""

import copy
import importlib
import json
import shutil
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from compression.errors import RecipeError
from flows.form import OPTIONAL, SECTIONS, NamedRecipe, RecipeText, recipe_files, resolve, understand
from flows.form_schema import ONE, plain, shown
from flows.recipe import Recipe, load_recipe
from tasks.settings import settings
from tests.flows.running_up import ROOT

DIGITS = yaml.safe_load((ROOT / "recipes" / "digits.yaml").read_text())
DEPLOYMENTS = yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]
Json = dict[str, Any]


@pytest.fixture
def recipes(home: Path) -> Path:
    """A root with the shipped recipes."""
    shutil.copytree(ROOT / "recipes", home / "recipes")
    return home / "recipes"


def schema_of(deployment: Json) -> Json:
    """The form's schema as Prefect makes it when a deployment is registered."""
    from prefect.utilities.callables import parameter_schema

    file, name = deployment["entrypoint"].split(":")
    module = importlib.import_module(file.removesuffix(".py").replace("/", "."))
    return parameter_schema(getattr(module, name)).model_dump_for_openapi()


@pytest.fixture(scope="module")
def compress_schema() -> Json:
    """The form of ``compress``, with the shipped recipes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STILLHOUSE_ROOT", str(ROOT))
        settings.cache_clear()
        schema = schema_of(DEPLOYMENTS[0])
    settings.cache_clear()
    return schema


def objects_in(schema: Any) -> Iterator[Json]:
    if isinstance(schema, dict):
        yield schema
        for each in schema.values():
            yield from objects_in(each)
    elif isinstance(schema, list):
        for each in schema:
            yield from objects_in(each)


def refusal(values: Json, schema: Json) -> str:
    """The server's own check; empty when it takes the values."""
    from prefect.utilities.schema_tools.validation import ValidationError, validate

    try:
        validate(values, schema, raise_on_error=True)
    except ValidationError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("deployment", DEPLOYMENTS, ids=lambda each: each["name"])
def test_every_parameter_is_described_and_the_form_starts_with_allowed_values(deployment: Json, recipes: Path) -> None:
    schema = schema_of(deployment)
    for name, each in schema["properties"].items():
        assert each.get("description"), name
        assert {"type", "anyOf", "enum"} & set(each), f"{name} would be a JSON editor"
    given = deployment.get("parameters", {})
    assert set(given) <= set(schema["properties"])
    assert refusal({**dict.fromkeys(schema.get("required", ()), "text"), **given}, schema) == ""


def test_every_field_of_the_compress_form_is_described_and_no_union_has_a_discriminator(compress_schema: Json) -> None:
    for name, definition in compress_schema["definitions"].items():
        for field, each in definition.get("properties", {}).items():
            named = any("$ref" in member for member in (each, *each.get("anyOf", ())))  # shows its own description
            marks = each.get("const") is not None or (name, field) == ("Teacher", "name")
            assert each.get("description") or named or marks, f"{name}.{field}"
    for each in objects_in(compress_schema):
        assert "discriminator" not in each
        assert not isinstance(each.get("oneOf"), list)


def test_the_recipes_are_a_dropdown_without_templates(recipes: Path) -> None:
    (recipes / "my-parts.yaml").write_text("name: my-parts")
    names = schema_of(DEPLOYMENTS[0])["definitions"]["NamedRecipe"]["properties"]["name"]["enum"]
    assert names == sorted(names)
    assert {"digits", "my-parts"} <= set(names)
    assert "image-folder-template" not in names
    assert list(recipe_files()) == names


def test_the_form_tells_every_kind_from_the_others(compress_schema: Json) -> None:
    """It picks the tab whose definition knows most of the value's names, the first of several."""
    definitions = compress_schema["definitions"]

    def properties(member: Json) -> Json:
        return definitions[member["$ref"].rpartition("/")[2]]["properties"]

    unions = [
        [member for member in each["anyOf"] if "$ref" in member]
        for each in objects_in(definitions)
        if sum("$ref" in member for member in each.get("anyOf", ())) > 1
    ]
    assert len(unions) > 20
    for union in unions:
        for number, member in enumerate(union):
            fields = properties(member)
            starts_with = {name for name, field in fields.items() if "default" in field or "const" in field}
            for names in (starts_with, set(fields)):
                known = [len(names & set(properties(other))) for other in union]
                assert known.index(max(known)) == number, member


def test_no_list_of_kinds_is_a_json_editor(compress_schema: Json) -> None:
    lists = [each["items"] for each in objects_in(compress_schema) if isinstance(each.get("items"), dict)]
    for items in lists:
        assert {"type", "$ref", "enum"} & set(items), items
    assert sum(ONE in items.get("properties", {}) for items in lists) >= 4


def test_every_default_of_the_form_is_allowed(compress_schema: Json) -> None:
    fields = {
        f"{name}.{field}": each
        for name, definition in compress_schema["definitions"].items()
        for field, each in definition.get("properties", {}).items()
        if "default" in each
    }
    assert len(fields) > 200
    schema = {"type": "object", "properties": fields, "definitions": compress_schema["definitions"]}
    assert refusal({field: each["default"] for field, each in fields.items()}, schema) == ""


def test_what_a_form_gives_is_read_as_recipes_are_written() -> None:
    for path in (ROOT / "recipes").glob("*.yaml"):
        raw = yaml.safe_load(path.read_text())
        assert plain(shown(raw)) == raw
        assert shown(raw) != raw


def test_a_choice_by_name_is_the_file_with_the_same_sets(recipes: Path) -> None:
    sets = ["distill.train.epochs=3", "policy.max_accuracy_drop=null"]
    assert resolve(NamedRecipe(name="digits")) == load_recipe(recipes / "digits.yaml")
    assert resolve(understand({"name": "digits", "set": sets})) == load_recipe(recipes / "digits.yaml", sets)


def test_sections_take_the_place_of_the_files_and_sets_come_last(recipes: Path) -> None:
    ptq = {"kind_ptq": "ptq", "calibration": "percentile"}  # as the form gives it
    found = resolve(understand({"name": "digits", "seed": 7, "quantize": ptq, "set": ["seed=8"]}))
    file = load_recipe(recipes / "digits.yaml")
    assert found.seed == 8
    assert (found.quantize.kind, found.quantize.calibration) == ("ptq", "percentile")  # pyright: ignore
    assert found.teachers == file.teachers


def test_every_section_can_be_overridden_with_what_another_recipe_has(recipes: Path) -> None:
    other = load_recipe(recipes / "fashion-mnist.yaml")
    given = {name: value for name, value in other.model_dump(mode="json").items() if name in SECTIONS}
    given = {name: value for name, value in given.items() if value is not None}
    gone = [name for name in OPTIONAL if name not in given]
    choice = NamedRecipe.model_validate({"name": "digits", "without": gone, **given})
    kept = {"name": "digits", "description": DIGITS["description"]}
    assert resolve(choice) == other.model_copy(update=kept)


def test_a_section_can_be_left_out_but_not_filled_in_too(recipes: Path) -> None:
    found = resolve(NamedRecipe(name="digits", without=("robustness", "attention")))
    assert found.robustness is None
    assert found.attention is None
    with pytest.raises(RecipeError, match="quantize is filled in and left out"):
        understand({"name": "digits", "quantize": {"kind": "ptq"}, "without": ["quantize"]})
    with pytest.raises(RecipeError, match="has precision int8, but the recipe has no quantize section"):
        resolve(understand({"name": "digits", "without": ["quantize"]}))


def test_a_recipe_written_out_is_not_taken_for_a_choice_by_name(recipes: Path) -> None:
    """All its sections could be overrides of the file of that name, but its None is no "as the file says"."""
    whole = {name: value for name, value in DIGITS.items() if name != "description"}
    targets = [{"kind": "onnxruntime", "name": "cpu", "precision": "float32"}]
    found = understand({**whole, "quantize": None, "targets": targets})
    assert isinstance(found, Recipe)
    assert found.quantize is None


def test_a_recipe_can_be_pasted_as_text(recipes: Path) -> None:
    text = (recipes / "digits.yaml").read_text()
    assert understand({"yaml": text}) == resolve(RecipeText(yaml=text)) == load_recipe(recipes / "digits.yaml")
    with pytest.raises(RecipeError, match="The text of the recipe is not YAML"):
        understand({"yaml": "a: [1"})
    with pytest.raises(RecipeError, match="holds str, expected a mapping"):
        understand({"yaml": "digits"})


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"name": "nope"}, r"name: Recipe 'nope' has no file in .*expected one of: digits"),
        ({"name": "digits", "seed": -1}, "seed: is -1"),
        ({"name": "digits", "speed": 1}, "speed: unknown key"),
        ({"name": "digits", "quantize": {"kind": "qad"}}, r"quantize.kind: is 'qad', expected one of: ptq, qat"),
        ({**DIGITS, "seed": -1}, "seed: is -1"),
    ],
)
def test_what_gets_past_the_server_is_refused_with_its_place(value: Json, words: str, recipes: Path) -> None:
    with pytest.raises(RecipeError, match=words):
        understand(value)


def test_the_flow_takes_a_recipe_object_and_plain_values_alike(recipes: Path) -> None:
    from flows.compress import compress

    whole = load_recipe(recipes / "digits.yaml")
    assert compress.validate_parameters({"recipe": whole})["recipe"] == whole
    assert compress.validate_parameters({"recipe": {"name": "digits"}})["recipe"] == NamedRecipe(name="digits")
    written = whole.model_dump(mode="json")
    assert compress.validate_parameters({"recipe": written})["recipe"] == whole


def changed(place: str, value: Any) -> Json:
    """The digits recipe written out, with another value at a dotted place."""
    raw = copy.deepcopy(DIGITS)
    *path, last = [int(part) if part.isdigit() else part for part in place.split(".")]
    target: Any = raw
    for part in path:
        target = target[part]
    target[last] = value
    return raw


REFUSED = [
    ({"recipe": {"name": "digits", "set": [], "without": [], "seed": -1}, "restart_from": None}, "recipe.seed"),
    ({"recipe": {"name": "nope"}}, "recipe.name"),
    ({"recipe": {"name": "digits", "seed": -1}}, "recipe.seed"),
    ({"recipe": {"name": "digits", "speed": 1}}, "recipe.speed"),
    ({"recipe": {"name": "digits", "set": ["distill.views=3", "epochs 5"]}}, "recipe.set[1]"),
    ({"recipe": {"name": "digits", "without": ["data"]}}, "recipe.without[0]"),
    ({"recipe": {"name": "digits", "quantize": {"kind": "qad"}}}, "recipe.quantize.kind"),
    ({"recipe": {"name": "digits", "quantize": {"kind": "ptq", "speed": 1}}}, "recipe.quantize.speed"),
    ({"recipe": {"name": "digits", "quantize": {"kind_ptq": "ptq", "weight_bits": 9}}}, "recipe.quantize.weight_bits"),
    ({"recipe": {"name": "digits", "distill": {"views": 3}}}, "recipe.distill"),
    ({"recipe": changed("seed", -1)}, "recipe.seed"),
    ({"recipe": changed("speed", 1)}, "recipe.speed"),
    ({"recipe": changed("data.kind", "mnist")}, "recipe.data.kind"),
    ({"recipe": changed("quantize.kind", "qad")}, "recipe.quantize.kind"),
    ({"recipe": changed("quantize.train.epochs", 0)}, "recipe.quantize.train.epochs"),
    ({"recipe": changed("teachers.1.source.train.epochs", 0)}, "recipe.teachers[1].source.train.epochs"),
    ({"recipe": changed("distill.losses.0.kind", "mse")}, "recipe.distill.losses[0].kind"),
    ({"recipe": changed("distill.speed", 1)}, "recipe.distill.speed"),
    ({"recipe": changed("search.spaces.0.ratios", [2])}, "recipe.search.spaces[0].ratios[0]"),
    ({"recipe": {"name": "digits"}, "restart_from": "distil"}, "restart_from"),
    ({"recipe": {"name": "digits"}, "if_running": "kill"}, "if_running"),
    ({}, "recipe"),
]


@pytest.mark.parametrize(("values", "field"), REFUSED, ids=[f"{n} {field}" for n, (_, field) in enumerate(REFUSED)])
def test_the_refusal_names_the_field(values: Json, field: str, compress_schema: Json) -> None:
    said = refusal(values, compress_schema)
    assert f"'{field}'" in said
    assert len(said) < 1500, "it repeats the whole recipe"


@pytest.fixture(scope="module")
def server(compress_schema: Json, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """API and id of the compress deployment of a real Prefect server; no worker."""
    from prefect.client.orchestration import SyncPrefectClient

    from flows.temporary_server import temporary_server

    root = tmp_path_factory.mktemp("form")
    shutil.copytree(ROOT / "recipes", root / "recipes")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STILLHOUSE_ROOT", str(root))
        patch.setenv("PREFECT_HOME", str(root / "prefect"))
        settings.cache_clear()
        with temporary_server() as api:
            client = SyncPrefectClient(api)
            deployment = client.create_deployment(
                flow_id=client.create_flow_from_name("compress"),
                name="compress",
                parameters={"recipe": {"name": "digits"}},
                parameter_openapi_schema=compress_schema,
                enforce_parameter_schema=True,
            )
            yield api, str(deployment)
    settings.cache_clear()


def start(server: tuple[str, str], values: Json) -> tuple[int, str]:
    api, deployment = server
    request = urllib.request.Request(
        f"{api}/deployments/{deployment}/create_flow_run",
        data=json.dumps({"parameters": values}).encode(),
        headers={"content-type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())["detail"]


@pytest.mark.slow
@pytest.mark.e2e
def test_a_real_server_refuses_wrong_values_and_takes_right_ones(server: tuple[str, str]) -> None:
    for values, field in REFUSED[:-1]:  # the deployment has a recipe
        code, said = start(server, values)
        assert code in (409, 422), (values, said)
        assert f"'{field}'" in said
    for values in ({}, {"recipe": {"name": "fashion-mnist", "seed": 3, "set": ["seed=4"]}}, {"recipe": DIGITS}):
        code, said = start(server, values)
        assert code == 201, said
    code, _ = start(server, {"recipe": {"name": "digits"}, "restart_from": "gate", "if_running": "leave"})
    assert code == 201
