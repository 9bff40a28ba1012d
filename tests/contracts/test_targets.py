"""Every export target, whichever runtime: a value that round-trips, refuses nonsense, and explains itself."""

from typing import get_args

import pytest
from pydantic import TypeAdapter, ValidationError

from export.profiles import Form, forms_of, runs_here
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


@pytest.mark.parametrize(
    ("precision", "refused", "words"),
    [
        ("fp8", "SM86", "SM89 or newer"),
        ("bfloat16", "SM75", "SM80"),
        ("int4", "SM75", "SM80"),
        ("int8", "SM75", "SM80"),
    ],
)
def test_a_format_the_generation_lacks_is_refused_and_named(precision, refused, words):
    with pytest.raises(ValidationError, match=rf"precision {precision} with compute capability {refused}.*{words}"):
        TensorRtRtxTarget(precision=precision, compute_capabilities=("SM89", refused))
    assert TensorRtRtxTarget(precision=precision, compute_capabilities=("SM89", "SM120"))


def test_the_default_generations_do_not_fit_fp8():
    with pytest.raises(ValidationError, match="Remove SM86"):
        TensorRtRtxTarget(precision="fp8")


@pytest.mark.parametrize("wrong", ["float16", "bfloat16", "fp8"])
def test_cpus_offer_what_their_runtime_runs(wrong):
    with pytest.raises(ValidationError):
        OnnxRuntimeTarget(precision=wrong)


def test_every_target_names_its_graphs(target):
    forms = forms_of(target(), "x86")
    assert forms
    assert set(forms) <= set(get_args(Form))
    assert forms[-1].startswith(target().precision)


@pytest.mark.parametrize(
    ("isa", "here", "form", "timed"),
    [
        ("native", "x86", "int8", True),
        ("native", "arm", "int8-arm", True),
        ("x86", "arm", "int8", False),
        ("arm", "x86", "int8-arm", False),
        ("arm", "arm", "int8-arm", True),
    ],
)
def test_a_cpu_gets_its_integers_and_is_timed_where_it_is(isa, here, form, timed):
    target = OnnxRuntimeTarget(isa=isa)
    assert forms_of(target, here) == ("float32", form)
    assert runs_here(target, here) is timed
    assert forms_of(OnnxRuntimeTarget(isa=isa, precision="int4"), here) == ("float32", "int4")
    assert forms_of(OnnxRuntimeTarget(isa=isa, precision="float32"), here) == ("float32",)


def test_engines_are_never_timed_here():
    assert not any(runs_here(target()) for target in TARGETS if target is not OnnxRuntimeTarget)
