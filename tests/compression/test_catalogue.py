"""The catalogue shows every method of every union, each with a card and a schema."""

from typing import get_args

from compression.augment import AnyAugment
from compression.card import MethodCard
from compression.catalogue import catalogue, members
from compression.distill import AnyCombination, AnyLoss, AnySampler, DistillConfig
from compression.quantize import AnyQuantizer, Qat
from compression.select import AnySelector

KINDS = [
    "sources",
    "selectors",
    "searchers",
    "spaces",
    "proposers",
    "filters",
    "priors",
    "criteria",
    "combinations",
    "losses",
    "samplers",
    "procedures",
    "mergers",
    "augmenters",
    "sparsifiers",
    "quantizers",
    "sensitivity",
    "evidence",
]


def test_holds_every_union_in_its_order():
    found = catalogue()
    assert list(found) == KINDS
    assert found["losses"] == list(get_args(AnyLoss))
    assert found["combinations"] == list(get_args(AnyCombination))
    assert found["samplers"] == list(get_args(AnySampler))
    assert found["selectors"] == list(get_args(AnySelector))
    assert found["quantizers"] == members(AnyQuantizer)
    assert all(found.values())


def test_every_method_can_be_named_and_has_a_full_card():
    for kind, configs in catalogue().items():
        names = [config.model_fields["kind"].default for config in configs]
        assert len(set(names)) == len(names), kind
        for config in configs:
            card = getattr(config, "card", None)
            assert isinstance(card, MethodCard), config
            for field, text in card.model_dump().items():
                assert text.strip(), f"{config.__name__}.card.{field}"
            assert config.model_json_schema()["properties"]["kind"]["const"] in names


def test_a_union_of_one_is_a_list_of_one():
    assert members(Qat) == [Qat]
    assert members(AnyAugment) == list(get_args(AnyAugment))


def test_distillation_form_shows_alternatives_as_a_plain_union():
    """``anyOf`` becomes tabs in the form; ``oneOf`` with a discriminator becomes a raw JSON box."""
    properties = DistillConfig.model_json_schema()["properties"]
    assert "anyOf" in properties["teachers"]
    assert "anyOf" in properties["losses"]["items"]
    assert "discriminator" not in str(properties)
