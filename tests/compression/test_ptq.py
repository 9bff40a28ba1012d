"""INT8 without training, what both quantizers share, and the layers that accuracy control leaves in float."""

from pathlib import Path

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch import nn

from compression.augment import NoAugment
from compression.checkpoint import save_checkpoint
from compression.distill import CrossEntropy, DistillConfig, Dkd, Kd, Nd, Sinkd, TopKld, plain_step
from compression.errors import CompressionError
from compression.metrics import evaluate
from compression.models import ModelSpec
from compression.quantize import (
    AccuracyControl,
    AnyQuantizer,
    Ptq,
    Qat,
    QuantizedStudent,
    convert,
    load_quantized,
    ptq,
    quantize,
    save_quantized,
)
from compression.quantize.sensitivity import LayerSensitivity, Sensitivity
from compression.train import TrainConfig, fit
from compression.zoo import DepthwiseCnn
from tests.compression.tiny_data import CLASSES, tiny_dataset

pytestmark = pytest.mark.usefixtures("one_thread")

DATASET = tiny_dataset()
SHAPE = DATASET.input_shape
FAMILY = DepthwiseCnn(widths=(8,), depths=(1,), strides=(1,), stem_width=8)
SHORT = TrainConfig(epochs=1, batch_size=32, max_steps_per_epoch=2)
DISTILLATION = DistillConfig(train=SHORT)
NONE_MAY_BE_LOST = AccuracyControl(max_drop=0.0)


def student() -> nn.Module:
    torch.manual_seed(0)
    return FAMILY.build(len(CLASSES), SHAPE).eval()


def images(count: int) -> torch.Tensor:
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(2))


def quantized(config: AnyQuantizer, model: nn.Module | None = None, **options) -> QuantizedStudent:
    options = {"distillation": DISTILLATION, **options}
    return quantize(model or student(), DATASET, config, panel=(), seed=0, augment=NoAugment(), **options)


@pytest.fixture(scope="module")
def broken() -> nn.Module:
    """A good student whose head 8 bits cannot hold: in each row one weight, for a feature of 0, dwarfs the others."""
    torch.set_num_threads(1)
    model = student()
    fit(model, plain_step(), DATASET, TrainConfig(epochs=20, batch_size=16), seed=0, augment=NoAugment())
    with torch.no_grad():
        norm = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)][-1]
        norm.weight[0], norm.bias[0] = 0.0, -1.0
        model.get_parameter("head.weight")[:, 0] = 1e4
    assert evaluate(model, DATASET.validation, DATASET.preprocessing).accuracy > 0.8
    return model


# --- without training ---------------------------------------------------------------------------------


@pytest.mark.parametrize("calibration", ["min_max", "percentile"])
def test_weights_and_statistics_are_the_students(calibration):
    model = student()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result = quantized(Ptq(calibration=calibration), model)
    assert result.history.rows == []
    assert result.control is None
    assert not result.prepared.training
    state = result.prepared.body.state_dict()
    for name, value in before.items():
        assert torch.equal(model.state_dict()[name], value)
        assert name.endswith("num_batches_tracked") or torch.equal(state[name], value)


def test_only_as_many_images_as_asked_for_set_the_ranges():
    few, all_of_them = ptq(student(), DATASET, Ptq(calibration_images=1)), ptq(student(), DATASET, Ptq())
    assert few.quantizers()[-1].scale != all_of_them.quantizers()[-1].scale


def test_learned_steps_without_training_are_refused():
    with pytest.raises(ValidationError, match="learned_steps is true, but ptq trains nothing"):
        Ptq(learned_steps=True)


@pytest.mark.parametrize(
    "config",
    [Ptq(calibration="mse", weight_bits=4), Qat(train=SHORT, learned_steps=True, calibration="percentile")],
    ids=["ptq", "qat"],
)
def test_either_kind_is_read_back_as_it_was(config: AnyQuantizer, tmp_path: Path):
    model = student()
    spec = ModelSpec(
        model=FAMILY,
        num_classes=len(CLASSES),
        input_shape=SHAPE,
        class_names=CLASSES,
        preprocessing=DATASET.preprocessing,
    )
    result = quantized(config, model)
    save_checkpoint(model, spec, tmp_path)
    save_quantized(result.prepared, tmp_path, result.config)
    text = (tmp_path / "quantizer.json").read_text()
    assert TypeAdapter(AnyQuantizer).validate_json(text) == config
    stored = load_quantized(tmp_path)
    assert torch.equal(stored.prepared(images(32)), result.prepared(images(32)))
    assert torch.equal(stored.converted(images(32)), convert(result.prepared)(images(32)))


# --- accuracy control ---------------------------------------------------------------------------------


def test_a_layer_that_8_bits_cannot_hold_goes_back_to_float(broken, tmp_path: Path):
    free, controlled = quantized(Ptq(), broken), quantized(Ptq(control=NONE_MAY_BE_LOST), broken)
    assert controlled.control is not None
    assert controlled.config.keep_float == controlled.control.keep_float
    assert "head" in controlled.config.keep_float
    assert free.metrics.accuracy < 0.5
    assert controlled.metrics.accuracy > 0.8
    assert controlled.control.rows
    save_quantized(controlled.prepared, tmp_path, controlled.config)
    assert '"head"' in (tmp_path / "quantizer.json").read_text()


def test_control_that_nothing_breaks_changes_nothing():
    free, controlled = (quantized(Ptq(control=control)) for control in (None, AccuracyControl(max_drop=1.0)))
    assert controlled.config.keep_float == ()
    assert torch.equal(controlled.prepared(images(8)), free.prepared(images(8)))


def test_control_follows_the_order_it_is_given(broken):
    layers = [name for name, module in broken.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    rows = [
        LayerSensitivity(layer=layer, format="int8", kl=float(place), flips=0.0, accuracy_drop=0.0)
        for place, layer in enumerate(layers)
    ]
    table = Sensitivity(rows=tuple(rows), num_samples=8, accuracy=0.5)
    result = quantized(Ptq(control=NONE_MAY_BE_LOST), broken, sensitivity=table)
    assert result.control is not None
    assert result.control.rows[0].layer == layers[-1] == "head"


def test_control_keeps_what_training_learnt(broken):
    config = Qat(train=SHORT, learned_steps=True, control=NONE_MAY_BE_LOST)
    result = quantized(config, broken)
    assert "head" in result.config.keep_float
    before = quantized(config.model_copy(update={"control": None}), broken).prepared.body
    weights = [name for name, _ in student().named_parameters()]
    assert all(torch.equal(result.prepared.body.get_parameter(name), before.get_parameter(name)) for name in weights)


# --- losses of its own --------------------------------------------------------------------------------


def test_losses_of_its_own_take_the_place_of_the_distillations():
    own = Qat(train=SHORT, losses=(Kd(weight=1.0, temperature=1.0), TopKld(top_k=2)))
    row = quantized(own).history.rows[0]
    assert {"kd", "top_kld"} <= set(row)
    assert "cross_entropy" not in row
    assert {"cross_entropy", "kd"} <= set(quantized(Qat(train=SHORT)).history.rows[0])


def test_of_the_distillations_losses_those_on_logits_are_left():
    inside = DistillConfig(train=SHORT, losses=(CrossEntropy(), Nd()))
    assert Qat().losses_for(inside) == (CrossEntropy(),)
    helpless = DistillConfig(train=SHORT, losses=(CrossEntropy(weight=0.0), Kd(weight=0.1), Nd(), Sinkd()))
    assert [loss.kind for loss in Qat().losses_for(helpless)] == ["cross_entropy", "kd", "sinkd"]


@pytest.mark.parametrize(
    ("losses", "words"),
    [((Kd(), Nd()), "features or maps"), ((Sinkd(),), "can teach alone"), ((Kd(weight=0.0),), "can teach alone")],
)
def test_losses_that_cannot_work_are_refused(losses, words):
    with pytest.raises(ValidationError, match=words):
        Qat(losses=losses)


def test_labels_that_are_hidden_cannot_be_learnt():
    hidden = DistillConfig(train=SHORT, losses=(Kd(),), labels="none")
    with pytest.raises(CompressionError, match="'dkd', which learns from labels"):
        quantized(Qat(train=SHORT, losses=(Kd(), Dkd())), distillation=hidden)
