"""Every export target, whichever runtime: a value that round-trips, refuses nonsense, and explains itself."""

from typing import get_args

import pytest
from pydantic import TypeAdapter, ValidationError

from export.targets import AnyTarget, OnnxRuntimeTarget, TensorRtRtxTarget, TensorRtTarget

TARGETS = get_args(AnyTarget)
ADAPTER = TypeAdapter(AnyTarget)


@pytest.fixture(params=TARGETS, ids=lambda target: target.__name__)
def target(request):
    return request.param


def test_defaults_are_usable_and_round_trip(target):
    made = target()
    assert ADAPTER.validate_json(made.model_dump_json()) == made
    assert ADAPTER.validate_python({"kind": made.kind, "name": "mine"}).name == "mine"


def test_kinds_and_default_names_are_distinct():
    assert len({target().kind for target in TARGETS}) == len(TARGETS)
    assert len({target().name for target in TARGETS}) == len(TARGETS)


def test_targets_are_immutable_and_refuse_unknown_keys(target):
    with pytest.raises(ValidationError):
        target().name = "other"
    with pytest.raises(ValidationError):
        target(threds=2)


@pytest.mark.parametrize("name", ["", "Up", "a b", "../x", "a/b", "-a", "a-", "a--b", "x" * 41])
def test_names_are_safe_as_folders(target, name):
    with pytest.raises(ValidationError):
        target(name=name)


@pytest.mark.parametrize("name", ["cpu", "rtx-int8", "a_1", "x" * 40])
def test_plain_names_are_accepted(target, name):
    assert target(name=name).name == name


def test_every_field_is_described(target):
    assert all(field.description or key == "kind" for key, field in target.model_fields.items())


@pytest.mark.parametrize("engine", [TensorRtRtxTarget, TensorRtTarget])
def test_batches_ascend(engine):
    with pytest.raises(ValidationError, match="ascending"):
        engine(min_batch=4, opt_batch=2, max_batch=8)
    assert engine(min_batch=2, opt_batch=2, max_batch=2)


def test_generations_are_those_the_builder_knows():
    with pytest.raises(ValidationError):
        TensorRtRtxTarget(compute_capabilities=("SM87",))
    with pytest.raises(ValidationError):
        TensorRtRtxTarget(compute_capabilities=())


def test_budgets_and_threads_are_positive():
    for wrong in ({"threads": 0}, {"max_latency_p95_ms": 0}, {"max_size_kib": -1}, {"batch_sizes": ()}):
        with pytest.raises(ValidationError):
            OnnxRuntimeTarget(**wrong)
