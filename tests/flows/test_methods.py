"""``stillhouse methods`` shows the catalogue to people and to programs."""

import io
import json
import re
from typing import Annotated, Literal

import pytest
from pydantic import Field
from rich.console import Console
from typer.testing import CliRunner

from compression.augment import NoAugment
from compression.card import MethodCard
from compression.catalogue import catalogue
from compression.errors import InputError
from compression.types import Frozen
from flows.cli import app
from flows.methods import STAGES, method_facts, show_methods


def shown(kind: str | None = None, name: str | None = None, *, as_json: bool = False, width: int = 200) -> str:
    text = io.StringIO()
    show_methods(Console(width=width, file=text), kind, name, as_json=as_json)
    return text.getvalue()


def as_json(kind: str | None = None, name: str | None = None) -> dict:
    return json.loads(shown(kind, name, as_json=True, width=40))


def names(configs: list[type[Frozen]]) -> list[str]:
    return [config.model_fields["kind"].default for config in configs]


# ---------------------------------------------------------------- for programs


def test_the_whole_catalogue_is_json():
    found = as_json()
    assert {kind: [method["kind"] for method in methods] for kind, methods in found.items()} == {
        kind: names(configs) for kind, configs in catalogue().items()
    }
    for methods in found.values():
        for method in methods:
            assert set(method) == {"kind", *MethodCard.model_fields, "measured", "fields"}
            for field in method["fields"].values():
                assert {"type", "meaning"} <= set(field) <= {"type", "meaning", "default"}


def test_one_kind_and_one_method_are_json_too():
    assert list(as_json("losses")) == ["losses"]
    assert as_json("loss") == as_json("losses")
    found = as_json("combinations", "confidence")
    assert [method["kind"] for method in found["combinations"]] == ["confidence"]
    field = found["combinations"][0]["fields"]["labels"]
    assert field["type"] == "bool"
    assert field["default"] is True
    assert "true label" in field["meaning"]


def test_fields_say_type_default_and_meaning():
    class Made(Frozen):
        """A method without a card."""

        kind: Literal["made", "built"] = "made"
        needed: int
        """Must be given."""
        many: Annotated[tuple[float, ...], Field(min_length=1)] = (0.5, 1.0)
        parts: list[NoAugment | None] = [NoAugment(), None]

    found = method_facts("losses", Made)
    assert found["kind"] == "made"
    fields = found["fields"]
    assert fields["kind"]["type"] == "'made' | 'built'"
    assert fields["needed"] == {"type": "int", "meaning": "Must be given."}
    assert fields["many"] == {"type": "tuple[float, ...]", "meaning": "", "default": [0.5, 1.0]}
    assert fields["parts"]["type"] == "list[NoAugment | None]"
    assert json.loads(json.dumps(fields["parts"]["default"])) == [NoAugment().model_dump(mode="json"), None]


# ---------------------------------------------------------------- names of kinds


@pytest.mark.parametrize(
    ("alias", "kind"),
    [
        ("selector", "selectors"),
        ("searcher", "searchers"),
        ("space", "spaces"),
        ("criterion", "criteria"),
        ("combination", "combinations"),
        ("loss", "losses"),
        ("quantizer", "quantizers"),
    ],
)
def test_the_singular_is_understood(alias, kind):
    assert list(as_json(alias)) == [kind]


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_means_its_kinds_in_order(stage):
    known = catalogue()
    kinds = [kind for kind in STAGES[stage] if kind in known]
    assert kinds
    assert list(as_json(stage)) == kinds
    for kind in kinds:
        for name in names(known[kind]):
            assert [method["kind"] for method in next(iter(as_json(stage, name).values()))] == [name]


def test_a_method_is_found_in_any_kind_of_its_stage():
    assert list(as_json("distill", "kd")) == ["losses"]
    assert list(as_json("distill", "partition")) == ["combinations"]
    assert list(as_json("search", "taylor")) == ["criteria"]
    assert "Fantastic Gains" in shown("distill", "partition")


def test_what_does_not_exist_is_refused_with_what_does():
    with pytest.raises(InputError, match=r"Kind 'lossess' does not exist, expected one of: .*Did you mean 'losses'"):
        shown("lossess")
    with pytest.raises(InputError, match=r"Method 'partitoin' does not exist.*kd.*Did you mean 'partition'"):
        shown("distill", "partitoin")
    with pytest.raises(InputError, match="Method 'kd' does not exist"):
        shown("combinations", "kd")


# ---------------------------------------------------------------- for people


def test_the_tables_show_every_method_with_its_needs():
    text = shown()
    for kind, configs in catalogue().items():
        assert kind in text
        assert all(name in text for name in names(configs))
    assert "hard labels" in text


def test_a_card_shows_its_texts_and_fields_as_written():
    text = shown("selectors", "ped")
    for part in ("name:", "paper:", "evidence:", "reach", "0.6", "max_per_class"):
        assert part in text
    assert len(re.findall("^name:", text, re.MULTILINE)) == 1


def test_the_program_prints_json_alone(monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    result = CliRunner().invoke(app, ["methods", "distill", "kd", "--json"])
    assert result.exit_code == 0
    assert json.loads(result.stdout)["losses"][0]["kind"] == "kd"
    help_text = CliRunner().invoke(app, ["methods", "--help"]).stdout
    assert "--json" in help_text
    assert "distill" in help_text


def test_what_was_measured_is_shown_beside_the_card(monkeypatch):
    from compression import measured

    gaps = (
        measured.Gap(base="no teachers", points=0.5, low=0.1, high=0.9),
        measured.Gap(base="kd", points=-0.25, low=-0.5, high=0.0),
    )
    row = measured.Measured(
        method="losses.pld",
        arm="pld",
        data="digits",
        setting="a small student, 3 seeds",
        accuracy=97.5,
        ece=0.02,
        gaps=gaps,
        cost=1.1,
    )
    monkeypatch.setattr(measured, "measured", lambda: (row,))
    assert "digits: -0.25 (-0.50 to +0.00) points to 'kd', cost x1.10; a small student, 3 seeds" in shown(
        "distill", "pld"
    )
    assert "digits: -0.25" in " ".join(shown("losses").split())
    assert as_json("distill", "pld")["losses"][0]["measured"][0]["gaps"][0]["points"] == 0.5
    assert as_json("distill", "dkd")["losses"][0]["measured"] == []


def test_every_record_belongs_to_a_method_of_the_catalogue():
    from compression.measured import measured

    known = {f"{kind}.{name}" for kind, configs in catalogue().items() for name in names(configs)}
    assert {row.method for row in measured()} <= known
    assert all(gap.low <= gap.points <= gap.high for row in measured() for gap in row.gaps)
