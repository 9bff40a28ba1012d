"""The latency model: operators as ONNX Runtime runs them, a fit that recovers known costs, a table that is kept."""

import json
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import astuple, replace
from functools import cache
from itertools import islice
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compression import profile
from compression.errors import CompressionError, ExportError
from compression.search.space import LatencyModel, Operator
from compression.zoo import DepthwiseCnn, Mixer, PlainCnn, ResidualCnn, VisionTransformer
from export.latency_model import (
    FittedLatency,
    LatencyTable,
    OnnxRuntimeClock,
    Row,
    TensorRtClock,
    Timing,
    build_latency_model,
    in_blocks,
    macs_of,
    operators_of,
    sample_nets,
)
from export.onnx_graph import to_onnx
from export.timing import latency_p50_ms

SHAPE = (1, 12, 12)
FACTS = {"runtime": "fake 1.0", "processor": "abacus"}


def plain(width: int = 32, depth: int = 1) -> nn.Module:
    return PlainCnn(widths=(width, width), depths=(depth, depth), strides=(1, 2), stem_width=16).build(3, SHAPE).eval()


@cache
def operators_once(model: nn.Module, shape: tuple[int, int, int], *, block: int = 16) -> list[Operator]:
    return operators_of(model, shape, block=block)


class Abacus:
    """A clock that counts multiply-accumulates and elements in blocks of channels; remembers its calls."""

    block = 16
    MAC, ELEMENT, CALL = 2e-7, 3e-6, 0.1

    def __init__(self, facts: dict[str, str] = FACTS) -> None:
        self.facts = facts
        self.calls = 0

    def ms(self, operators: Sequence[Operator]) -> float:
        filled = [replace(each, out_channels=-(-each.out_channels // 16) * 16) for each in operators]
        elements = sum(each.out_channels * each.height * each.width for each in filled)
        return self.MAC * macs_of(filled) + self.ELEMENT * elements + self.CALL

    def measure(self, model: nn.Module, *, kernels: bool = False) -> Timing:
        self.calls += 1
        operators = operators_once(model, SHAPE, block=self.block)
        alone = [Row(source="kernel", operators=(astuple(each),), ms=self.ms([each]) - 0.09) for each in operators]
        return Timing(self.ms(operators) / 2.0, 2.0, tuple(alone) if kernels else ())


@pytest.fixture(scope="module", autouse=True)
def _each_sample_is_drawn_once():
    """A smaller sample is the beginning of a larger one."""
    samples: dict[tuple, tuple[list, Iterator]] = {}

    def drawn(count: int, shape: tuple[int, int, int], **rest) -> list[tuple[str, nn.Module]]:
        key = (shape, *rest.values())
        nets, more = samples.setdefault(key, ([], sample_nets(100, shape, **rest)))
        nets += islice(more, max(0, count - len(nets)))
        return nets[:count]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("export.latency_model.build.sample_nets", drawn)
        patch.setattr("export.latency_model.build.operators_of", operators_once)
        yield


def build(tmp_path: Path, clock: Abacus | None = None, **changes) -> FittedLatency:
    return build_latency_model(
        SHAPE, **({"batch": 4, "folder": tmp_path, "nets": 8, "clock": clock or Abacus()} | changes)
    )


@pytest.fixture(scope="module")
def fitted(tmp_path_factory) -> FittedLatency:
    return build(tmp_path_factory.mktemp("tables"), nets=16)


# --- operators


def test_operators_of_a_residual_net():
    model = ResidualCnn(widths=(16, 32), depths=(1, 1), strides=(1, 2), stem_width=16).build(3, SHAPE).eval()
    assert operators_of(model, SHAPE) == [
        Operator("Conv", 1, 16, 12, 12, 3),
        Operator("Conv", 16, 16, 12, 12, 3),
        Operator("Conv", 16, 16, 12, 12, 3),
        Operator("FusedAdd", 16, 16, 12, 12),
        Operator("Conv", 16, 32, 6, 6, 3, 2),
        Operator("Conv", 32, 32, 6, 6, 3),
        Operator("Conv", 16, 32, 6, 6, 1, 2),
        Operator("FusedAdd", 32, 32, 6, 6),
        Operator("Reorder", 32, 32, 6, 6),
        Operator("ReduceMean", 32, 32, 1, 1, 6),
        Operator("Gemm", 32, 3, 1, 1),
    ]


def test_channels_that_four_does_not_divide_take_the_slower_kernel_and_add_on_their_own():
    model = ResidualCnn(widths=(18,), depths=(1,), strides=(1,), stem_width=18).build(3, SHAPE).eval()
    found = operators_of(model, SHAPE)
    assert [each.kind for each in found] == "Conv Reorder Conv Conv Add Relu ReduceMean Gemm".split()
    assert [in_blocks(each, 16) for each in found if each.kind == "Conv"] == [True, False, False]
    assert in_blocks(Operator("Conv", 24, 24, 6, 6, 3, groups=24), 16)
    assert not in_blocks(Operator("Conv", 25, 25, 6, 6, 3, groups=25), 16)
    assert not in_blocks(Operator("Conv", 32, 32, 6, 6), 1)


def test_operators_of_a_transformer_are_products_of_tokens_and_of_activations():
    model = VisionTransformer(width=24, depth=1, num_heads=2, patch_size=4, stem="patch").build(3, SHAPE).eval()
    found = operators_of(model, SHAPE)
    products = [each for each in found if each.kind == "MatMul"]
    assert products == [
        Operator("MatMul", 24, 72, 9, 1),
        Operator("MatMul", 24, 24, 9, 1),
        Operator("MatMul", 24, 48, 9, 1),
        Operator("MatMul", 48, 24, 9, 1),
    ]
    assert [each for each in found if each.kind == "BatchMatMul"] == [
        Operator("BatchMatMul", 24, 18, 9, 1, groups=2),
        Operator("BatchMatMul", 18, 24, 9, 1, groups=2),
    ]
    count = Counter(each.kind for each in found)
    assert (count["LayerNormalization"], count["Softmax"], count["Gelu"], count["Attention"]) == (3, 1, 1, 1)
    assert count["Add"] == 1 + 2 + 3  # positions, two residuals, biases but the one inside the activation


@pytest.mark.parametrize(
    "config",
    [
        ResidualCnn(widths=(8, 20), depths=(1, 1), strides=(2, 1)),
        DepthwiseCnn(widths=(16, 24), depths=(1, 1)),
        VisionTransformer(width=32, depth=1),
        Mixer(width=24, depth=1, token_hidden=8),
    ],
    ids=lambda config: config.kind,
)
def test_macs_of_the_operators_are_those_of_the_network(config):
    model = config.build(3, SHAPE).eval()
    assert macs_of(operators_of(model, SHAPE)) == profile.macs(model, SHAPE)


def test_activations_and_norms_on_their_own_and_pools_are_operators_and_the_model_stays_as_it_was():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 16, 3, padding=1)
            self.norm = nn.BatchNorm2d(16)
            self.drop = nn.Dropout()
            self.head = nn.Linear(16, 3)

        def forward(self, images: Tensor) -> Tensor:
            x = F.max_pool2d(F.hardswish(self.conv(images)), 2)
            return self.head(self.drop(F.relu(self.norm(x))).mean((2, 3)))

    model = Net().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    kinds = [each.kind for each in operators_of(model, SHAPE)]
    assert kinds == "Conv Reorder Hardswish MaxPool BatchNormalization Relu ReduceMean Gemm".split()
    assert model.training
    assert model.drop.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


# --- prediction


def test_it_is_the_latency_model_of_a_study(fitted):
    model: LatencyModel = fitted
    assert model.batch == 4
    assert model.predict_ms(plain(), SHAPE) > 0


def test_the_fit_recovers_a_known_cost(fitted):
    held = fitted.table.held_out
    assert held is not None
    assert held.nets == 4
    assert held.median_error < 0.1
    assert held.kendall_tau > 0.9
    for width in (16, 48, 96):
        model = plain(width)
        assert fitted.predict_ms(model, SHAPE) == pytest.approx(Abacus().ms(operators_of(model, SHAPE)), rel=0.15)


def test_a_whole_network_is_its_operators_and_a_call(fitted):
    model = plain()
    parts = fitted.operators_ms(operators_of(model, SHAPE))
    assert min(parts) >= 0
    assert fitted.predict_ms(model, SHAPE) == pytest.approx(fitted.call_ms + sum(parts))
    assert fitted.call_ms == pytest.approx(Abacus.CALL, rel=0.2)


def test_prediction_grows_with_width_and_depth(fitted):
    assert (
        fitted.predict_ms(plain(32), SHAPE) < fitted.predict_ms(plain(64), SHAPE) < fitted.predict_ms(plain(128), SHAPE)
    )
    assert fitted.predict_ms(plain(depth=1), SHAPE) < fitted.predict_ms(plain(depth=3), SHAPE)


@pytest.mark.parametrize("kind", ["Conv", "MatMul", "Gemm", "Add", "LayerNormalization", "NeverSeen"])
def test_cost_never_falls_with_more_channels(fitted, kind):
    size = 1 if kind == "Gemm" else 6
    for side in ("in_channels", "out_channels"):
        start = Operator(kind, 64, 64, size, size, 3 if kind == "Conv" else 1)
        costs = fitted.operators_ms([replace(start, **{side: count}) for count in range(16, 200, 4)])
        assert costs == sorted(costs)


def test_channels_cost_as_much_as_the_blocks_they_fill(fitted):
    costs = fitted.operators_ms([Operator("Conv", 64, count, 6, 6, 3) for count in (33, 40, 48, 49)])
    assert costs[0] == costs[1] == costs[2] < costs[3]


def test_an_unknown_kind_and_a_kernel_that_was_never_seen_still_cost_something(fitted):
    unseen = [Operator("Abracadabra", 64, 64, 6, 6), Operator("Conv", 36, 36, 6, 6, 3, groups=4)]
    assert all(cost > 0 for cost in fitted.operators_ms(unseen))


# --- the table


def test_a_kept_table_is_not_measured_again_and_predicts_the_same(tmp_path):
    clock = Abacus()
    seen: list[tuple[int, int]] = []
    first = build(tmp_path, clock, on_progress=lambda done, total: seen.append((done, total)))
    assert clock.calls == 8 + 4
    assert seen == [(done, 12) for done in range(1, 13)]
    second = build(tmp_path, clock)
    assert clock.calls == 12
    assert second.table == first.table
    assert second.predict_ms(plain(), SHAPE) == first.predict_ms(plain(), SHAPE)
    (path,) = tmp_path.iterdir()
    assert path.name == f"{first.table.fingerprint}-b4-1x12x12.json"


def test_json_round_trip_gives_equal_predictions(fitted):
    again = FittedLatency(LatencyTable.model_validate_json(fitted.table.model_dump_json()))
    operators = operators_of(plain(), SHAPE)
    assert again.operators_ms(operators) == fitted.operators_ms(operators)
    assert again.call_ms == fitted.call_ms


@pytest.mark.parametrize(
    "changes",
    [{"facts": FACTS | {"processor": "slide rule"}}, {"facts": FACTS | {"runtime": "fake 1.1"}}],
    ids=["machine", "runtime"],
)
def test_a_table_of_another_machine_or_runtime_is_not_used(tmp_path, changes, caplog):
    first = build(tmp_path)
    other = Abacus(**changes)
    second = build(tmp_path, other)
    assert other.calls == 12
    assert second.table.fingerprint != first.table.fingerprint
    assert len(list(tmp_path.iterdir())) == 2

    # not even under the name of the right one
    right = tmp_path / f"{first.table.fingerprint}-b4-1x12x12.json"
    right.write_text(second.table.model_dump_json())
    clock = Abacus()
    with caplog.at_level(logging.INFO):
        assert build(tmp_path, clock).table.facts == FACTS
    assert clock.calls == 12
    assert "measuring again" in caplog.text


@pytest.mark.parametrize("change", [{"seed": 1}, {"nets": 9}, {"batch": 8}], ids=["seed", "more-nets", "batch"])
def test_a_table_of_another_sample_or_batch_is_measured_again(tmp_path, change):
    first = build(tmp_path)
    clock = Abacus()
    assert build(tmp_path, clock, **change).table != first.table
    assert clock.calls >= 12


@pytest.mark.parametrize("damage", ["cut", "empty", "other", "no-rows"])
def test_a_damaged_table_is_built_again_with_a_log_line(tmp_path, damage, caplog):
    first = build(tmp_path)
    (path,) = tmp_path.iterdir()
    text = path.read_text()
    damaged = {
        "cut": text[: len(text) // 2],
        "empty": "",
        "other": "{}",
        "no-rows": json.dumps(json.loads(text) | {"rows": []}),
    }
    path.write_text(damaged[damage])
    clock = Abacus()
    with caplog.at_level(logging.WARNING):
        again = build(tmp_path, clock)
    assert clock.calls == 12
    assert again.table == first.table
    assert f"'{path.name}' is damaged" in caplog.text
    assert LatencyTable.model_validate_json(path.read_text()) == first.table


def test_too_few_networks_are_refused_before_anything_is_timed(tmp_path):
    clock = Abacus()
    with pytest.raises(CompressionError, match=r"nets 3 and batch 4, expected at least 5 networks"):
        build(tmp_path, clock, nets=3)
    assert clock.calls == 0


def test_the_sample_depends_on_the_seed_alone():
    def outline(seed: int) -> list[tuple[str, int]]:
        return [(family, profile.params(net)) for family, net in sample_nets(6, SHAPE, seed=seed, max_macs=1e6)]

    state = torch.get_rng_state()
    found = outline(0)
    assert found == outline(0) != outline(1)
    assert torch.equal(state, torch.get_rng_state())
    assert {family for family, _ in found} == {"residual", "plain", "depthwise", "transformer"}


# --- the real clock


def test_a_real_build_ranks_a_big_network_above_a_small_one(tmp_path):
    class Quick(OnnxRuntimeClock):
        ROUNDS, ROUND_MS, PROFILE_MS = 3, 1.0, 2.0

    shape, state = (1, 8, 8), torch.get_rng_state()
    fitted = build_latency_model(shape, batch=1, folder=tmp_path, nets=5, clock=Quick(shape, batch=1))
    assert torch.equal(state, torch.get_rng_state())
    small = PlainCnn(widths=(8, 8), depths=(1, 1), strides=(2, 2), stem_width=8).build(3, shape).eval()
    big = PlainCnn(widths=(96, 128), depths=(2, 2), strides=(1, 1), stem_width=16).build(3, shape).eval()
    assert 3 * fitted.predict_ms(small, shape) < fitted.predict_ms(big, shape)
    assert fitted.table.block in (1, 8, 16)
    assert "onnxruntime" in fitted.table.facts["runtime"]
    kernels = {row.operators[0][0] for row in fitted.table.rows if row.source == "kernel"}
    assert {"Conv", "Gemm", "MatMul", "LayerNormalization"} <= kernels


def test_the_operators_are_those_that_onnx_runtime_runs():
    """The kernels the profiler names, and what is read off the torch module, have the same shapes."""
    clock = OnnxRuntimeClock(SHAPE, batch=1)
    if clock.block == 1:
        pytest.skip("this CPU has no channel blocks")
    model = ResidualCnn(widths=(16, 32), depths=(1, 1), strides=(1, 2), stem_width=16).build(3, SHAPE).eval()
    clock._write(model)
    ran = [each for node in clock._profiled(calls=1) for each in node.operators(1)]
    assert Counter(ran) == Counter(operators_of(model, SHAPE, block=clock.block))


def test_the_clock_counts_no_more_than_a_stopwatch_does(tmp_path):
    """CPU time of a call can't be longer than the call."""
    model, path = plain(), tmp_path / "net.onnx"
    to_onnx(model, path, input_shape=SHAPE, metadata={}, fast=True)
    timing = OnnxRuntimeClock(SHAPE, batch=32).measure(model)
    assert 0 < timing.ratio * timing.reference_ms < 2 * latency_p50_ms(path, batch=32, seconds=0.02)
    assert timing.kernels == ()


def test_tensorrt_without_a_gpu_says_so(monkeypatch):
    monkeypatch.setattr("export.latency_model.clocks.import_backend", lambda target: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ExportError, match=r"Target 'tensorrt' has no GPU on this machine, expected one"):
        TensorRtClock(SHAPE, batch=1)


def test_a_row_names_its_operators():
    row = Row(source="kernel", operators=(("Conv", 1, 16, 12, 12, 3, 1, 1),), ms=0.01)
    assert Operator(*Row.model_validate_json(row.model_dump_json()).operators[0]) == Operator("Conv", 1, 16, 12, 12, 3)
