"""Sensitivity: one layer at a time, against what the whole graph, a rebuilt model and arithmetic say."""

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn import functional as F

from compression.errors import CompressionError, ShapeError
from compression.quantize import FakeQuantized, NumberFormat, prepare_qat
from compression.quantize.sensitivity import (
    FORMATS,
    LayerSensitivity,
    Layerwise,
    Sensitivity,
    SensitivityConfig,
    measured,
    sensitivity,
)
from compression.zoo import DepthwiseCnn, ResidualCnn, VisionTransformer

SHAPE = (1, 12, 12)
FAMILIES = {
    "residual": ResidualCnn(widths=(8, 16), depths=(1, 1), strides=(1, 2), stem_width=8),
    "depthwise": DepthwiseCnn(widths=(8,), depths=(2,), strides=(1,), stem_width=8),
    "transformer": VisionTransformer(width=16, depth=1, num_heads=2, patch_size=4, stem_width=8),
}
LABELS = torch.arange(24) % 4


def noise(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(seed))


def network(family: str) -> nn.Module:
    """With logits that differ between images, so that a change shows."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = FAMILIES[family].build(4, SHAPE).train()
        with torch.no_grad():
            for seed in range(5):
                model(noise(32, seed + 100))
            model.eval()
            head: nn.Linear = model.get_submodule("head")  # pyright: ignore[reportAssignmentType]
            head.weight.div_(model(noise(64, 7)).std())
    return model


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """Equal bits are promised for one thread."""


@pytest.fixture(scope="module", params=FAMILIES)
def family(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def prepared(family: str) -> FakeQuantized:
    return prepare_qat(network(family), SHAPE, noise(64, 1))


@pytest.fixture(scope="module")
def table(prepared: FakeQuantized) -> Sensitivity:
    return measured(Layerwise(prepared), noise(24), LABELS, FORMATS)


def test_layers_come_in_the_order_they_run(family, prepared):
    ran: list[str] = []
    model = network(family)
    hooks = [
        module.register_forward_hook(lambda *_, name=name: ran.append(name))
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    ]
    model(noise(2))
    for hook in hooks:
        hook.remove()
    assert Layerwise(prepared).layers == list(dict.fromkeys(ran))


def test_nothing_changed_is_the_float_model_and_everything_the_prepared_one(family, prepared):
    layerwise, images = Layerwise(prepared), noise(24)
    values = layerwise.float_values(images)
    with torch.no_grad():
        assert torch.equal(layerwise.logits(values), network(family)(images))
        together = {}
        for layer in layerwise.layers:
            together |= layerwise.changes(layer, "int8", values) or {}
        assert torch.equal(layerwise.logits(values, together), prepared(images))


def test_the_prepared_model_is_left_as_it_was(prepared):
    images = noise(24)
    with torch.no_grad():
        before, state = prepared(images), {name: value.clone() for name, value in prepared.state_dict().items()}
    flags = [(each.rounding, each.observing) for each in prepared.quantizers()]
    measured(Layerwise(prepared), images, LABELS, FORMATS)
    assert flags == [(each.rounding, each.observing) for each in prepared.quantizers()]
    assert all(torch.equal(value, state[name]) for name, value in prepared.state_dict().items())
    with torch.no_grad():
        assert torch.equal(prepared(images), before)


def test_every_layer_has_every_format_and_only_the_classifier_keeps_its_channels(table, prepared):
    layers = Layerwise(prepared).layers
    for format in FORMATS:
        rest = layers[:-1] if format == "half the channels" else layers
        assert list(table.column(format)) == rest
    assert all(row.kl >= 0 and 0 <= row.flips <= 1 and abs(row.accuracy_drop) <= 1 for row in table.rows)
    assert sum(row.kl for row in table.rows if row.format == "4-bit weights") > sum(
        row.kl for row in table.rows if row.format == "int8 weights"
    )
    assert Sensitivity.model_validate_json(table.model_dump_json()) == table


@pytest.mark.parametrize("family", ["residual"], scope="module")
def test_a_layer_of_weights_alone_is_a_model_with_that_layer_quantized(family, prepared):
    """Against arithmetic on the float model: rounded weights put in, batch norm as it was."""
    model, images, layer = network(family), noise(24), "blocks.1.first.0"
    layerwise = Layerwise(prepared)
    values = layerwise.float_values(images)
    weight = model.get_parameter(f"{layer}.weight")
    for format, limit in (("int8 weights", 127), ("4-bit weights", 7)):
        step = weight.detach().abs().amax(dim=(1, 2, 3), keepdim=True) / limit
        other = network(family)
        with torch.no_grad():
            other.get_parameter(f"{layer}.weight").copy_((weight / step).round() * step)
            found = layerwise.logits(values, layerwise.changes(layer, format, values))
            torch.testing.assert_close(found, other(images), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["residual"], scope="module")
def test_four_bits_are_those_of_a_number_format_with_four(family, prepared):
    eight = Layerwise(prepared)
    four = Layerwise(prepare_qat(network(family), SHAPE, noise(64, 1), NumberFormat(weight_bits=4)))
    left, right = eight.float_values(noise(24)), four.float_values(noise(24))
    for layer in eight.layers:
        assert torch.equal(
            eight.logits(left, eight.changes(layer, "4-bit weights", left)),
            four.logits(right, four.changes(layer, "int8 weights", right)),
        )


@pytest.mark.parametrize("family", ["residual"], scope="module")
def test_weights_on_the_grid_cost_nothing(family):
    model = network(family)
    weight = model.get_parameter("blocks.0.first.0.weight")
    with torch.no_grad():
        weight.copy_((weight * 2**9).round().clamp(-126, 126))
        weight[:, 0, 0, 0] = 127.0  # the largest of each channel: its step is 2**-9 exactly
        weight.mul_(2**-9)
    column = sensitivity(model, SHAPE, noise(24), LABELS, calibration=noise(64, 1), formats=("int8 weights",)).column(
        "int8 weights"
    )
    assert column["blocks.0.first.0"].kl == 0.0
    assert all(row.kl > 0.0 for layer, row in column.items() if layer != "blocks.0.first.0")


@pytest.mark.parametrize("family", ["residual"], scope="module")
def test_half_the_channels_is_the_network_without_them(family, prepared):
    """The channels that stay give what they gave; the others are 0 to the layer that reads them."""
    model, images = network(family), noise(24)
    block: nn.Module = model.get_submodule("blocks.0")
    weight, norm = block.get_parameter("first.0.weight"), block.get_submodule("first.1")
    size = weight.flatten(1).norm(dim=1) * norm.weight.abs() / (norm.running_var + norm.eps).sqrt()
    gone = size.argsort()[:4]
    with torch.no_grad():
        block.get_parameter("second.0.weight")[:, gone] = 0.0
    layerwise = Layerwise(prepared)
    values = layerwise.float_values(images)
    with torch.no_grad():
        found = layerwise.logits(values, layerwise.changes("blocks.0.first.0", "half the channels", values))
        torch.testing.assert_close(found, model(images), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["residual"], scope="module")
def test_a_layer_made_bad_is_ranked_worst(family):
    """A channel nobody reads, ten thousand times the others: the one scale of the tensor leaves them no steps."""
    model = network(family)
    with torch.no_grad():
        model.get_parameter("blocks.1.first.1.weight")[0] *= 1e4
        model.get_parameter("blocks.1.second.0.weight")[:, 0] = 0.0
    table = sensitivity(model, SHAPE, noise(24), LABELS, calibration=noise(64, 1))
    bad = {"blocks.1.first.0", "blocks.1.second.0"}  # the one that writes the tensor, and the one that reads it
    assert set(table.worst()[:2]) == bad
    for layer in bad:
        assert table.column()[layer].kl > 5 * table.column()[table.worst()[2]].kl
        assert table.column("int8 activations")[layer].kl > 100 * table.column("int8 weights")[layer].kl


def test_numbers_are_the_definitions(family, prepared):
    images = noise(24)
    layerwise = Layerwise(prepared)
    found = measured(layerwise, images, LABELS, ("4-bit weights",)).rows[0]
    values = layerwise.float_values(images)
    base = layerwise.logits(values).double()
    changed = layerwise.logits(values, layerwise.changes(found.layer, "4-bit weights", values)).double()
    expected = F.kl_div(changed.log_softmax(1), base.log_softmax(1), reduction="batchmean", log_target=True)
    assert found.kl == pytest.approx(float(expected))
    assert found.flips == pytest.approx(float((base.argmax(1) != changed.argmax(1)).double().mean()))
    right = [(each.argmax(1) == LABELS).double().mean() for each in (base, changed)]
    assert found.accuracy_drop == pytest.approx(float(right[0] - right[1]))


def test_batches_do_not_change_the_numbers(family, prepared, monkeypatch):
    steps: list[tuple[int, int]] = []
    layerwise = Layerwise(prepared)
    whole = measured(layerwise, noise(24), LABELS, ("int8",))
    monkeypatch.setattr("compression.quantize.sensitivity.MOST_IMAGES_AT_ONCE", 10)
    parts = measured(layerwise, noise(24), LABELS, ("int8",), on_step=lambda *step: steps.append(step))
    for left, right in zip(whole.rows, parts.rows, strict=True):
        assert left.kl == pytest.approx(right.kl, rel=1e-2, abs=1e-9)
    assert steps == [(done, 3 * len(layerwise.layers)) for done in range(1, 3 * len(layerwise.layers) + 1)]


class InPlace(nn.Module):
    """Writes over its own convolution's output."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 3)
        self.head = nn.Linear(8, 4)

    def forward(self, images: Tensor) -> Tensor:
        values = self.first(images)
        torch.ops.aten.mul_(values, 2.0)
        return self.head(self.second(values).relu_().mean((2, 3)))


def test_operations_that_write_over_their_input_change_nothing():
    torch.manual_seed(0)
    model = InPlace().eval()
    prepared = prepare_qat(model, SHAPE, noise(64, 1))
    layerwise, images = Layerwise(prepared), noise(24)
    values = layerwise.float_values(images)
    together = {}
    for layer in layerwise.layers:
        assert layerwise.logits(values).equal(model(images))
        together |= layerwise.changes(layer, "int8", values) or {}
        layerwise.logits(values, together)
    assert layerwise.logits(values, together).equal(prepared(images))


@pytest.mark.parametrize("family", ["residual"], scope="module")
def test_a_layer_kept_in_float_is_measured_too(family, table):
    kept = NumberFormat(keep_float=("stem.0",))
    assert sensitivity(network(family), SHAPE, noise(24), LABELS, kept, calibration=noise(64, 1)) == table


def test_equal_costs_keep_the_order_of_layers():
    def row(layer: str, kl: float) -> LayerSensitivity:
        return LayerSensitivity(layer=layer, format="int8", kl=kl, flips=0.0, accuracy_drop=0.0)

    table = Sensitivity(rows=(row("b", 1.0), row("c", 2.0), row("a", 1.0)), num_samples=1, accuracy=1.0)
    assert table.worst() == ["c", "b", "a"]
    assert table.layers == ["b", "c", "a"]
    with pytest.raises(CompressionError, match=r"'4-bit weights' has no rows.*measured: int8\)"):
        table.worst("4-bit weights")


def test_refusals_say_what_is_wrong(prepared):
    model = network("residual")
    with pytest.raises(ShapeError, match=r"24, 3 and 64 samples.*Pass images with their labels"):
        sensitivity(model, SHAPE, noise(24), LABELS[:3], calibration=noise(64, 1))
    with pytest.raises(ShapeError, match="24, 24 and 0 samples"):
        sensitivity(model, SHAPE, noise(24), LABELS, calibration=noise(64, 1)[:0])
    with torch.no_grad():
        model.get_parameter("head.bias").fill_(torch.inf)
    with pytest.raises(CompressionError, match="logits that are not finite"):
        sensitivity(model, SHAPE, noise(24), LABELS, calibration=noise(64, 1))
    with pytest.raises(CompressionError, match=r"train mode.*eval\(\) first"):
        try:
            Layerwise(prepared.train())
        finally:
            prepared.eval()


def test_config_names_formats_once():
    assert SensitivityConfig(formats=("int8", "int8 weights", "int8")).formats == ("int8", "int8 weights")
    with pytest.raises(ValidationError):
        SensitivityConfig(formats=())
    with pytest.raises(ValidationError, match="int9"):
        SensitivityConfig.model_validate({"formats": ["int9"]})
