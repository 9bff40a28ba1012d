"""Fine-tuning in simulated INT8 keeps the zeros of a sparse student, and changes nothing for a dense one."""

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from compression.augment import NoAugment, normalise
from compression.data.dataset import Dataset
from compression.quantize import FakeQuantized, Qat, convert, prepare_qat, qat
from compression.sparsify.nm import apply_masks, follows, layers_of, magnitude_mask
from compression.train import TrainConfig, fit
from compression.types import Batch
from tests.compression.losses.short_training import Stop
from tests.compression.sparse_training import SPARSE, student
from tests.compression.tiny_data import tiny_dataset

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = Qat(train=TrainConfig(epochs=2, batch_size=16, learning_rate=0.01, checkpoint_every_steps=1))


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    return tiny_dataset()


def label_step(model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
    return {"cross_entropy": F.cross_entropy(model(batch.images), batch.labels)}


def quantized(model: nn.Module, dataset: Dataset, folder: Path | None = None, on_step=None) -> FakeQuantized:
    prepared, _ = qat(
        model, dataset, CONFIG, step=label_step, seed=0, augment=NoAugment(), checkpoint_dir=folder, on_step=on_step
    )
    return prepared


def sparse_student(dataset: Dataset) -> nn.Module:
    model, _ = student(dataset)
    masks = {name: magnitude_mask(layer.weight, 2, 4) for name, layer in layers_of(model).items()}
    apply_masks(model, masks)
    return model


@pytest.fixture(scope="module")
def prepared(dataset):
    torch.set_num_threads(1)
    return quantized(sparse_student(dataset), dataset)


def test_zeros_stay_and_the_rest_is_trained(prepared, dataset):
    before = sparse_student(dataset)
    for name in SPARSE:
        start, weight = before.get_parameter(name), prepared.body.get_parameter(name)
        assert torch.equal(weight == 0, start == 0), name
        assert (weight != start)[start != 0].any()
    assert not torch.equal(prepared.body.get_parameter("stem.0.weight"), before.get_parameter("stem.0.weight"))


def test_integers_after_folding_are_two_of_four(prepared):
    graph = convert(prepared).body
    layers = {torch.ops.aten.conv2d.default, torch.ops.aten.linear.default}
    weights = [getattr(graph, node.args[1].args[0].target) for node in graph.graph.nodes if node.target in layers]
    assert [weight.dtype for weight in weights] == [torch.int8] * 4
    assert not follows(weights[0], 2, 4)  # the stem, which stays dense
    assert all(follows(weight, 2, 4) for weight in weights[1:])


def test_a_killed_training_goes_on_bit_for_bit(prepared, dataset, tmp_path):
    def stop(done: int, total: int) -> None:
        if done == 3:
            raise Stop

    with pytest.raises(Stop):
        quantized(sparse_student(dataset), dataset, tmp_path, stop)
    again = quantized(sparse_student(dataset), dataset, tmp_path)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in prepared.state_dict().items())


def test_a_dense_student_is_trained_as_without_masks(dataset):
    """Bit for bit; a few zeros that happen to be there are not kept."""
    model, _ = student(dataset)
    with torch.no_grad():
        model.get_parameter("head.weight")[0, 0] = 0
    images = normalise(dataset.calibration.images, dataset.preprocessing)
    expected = prepare_qat(model, dataset.input_shape, images)

    def freeze(done: int, total: int) -> None:
        if done == round(total * (1 - CONFIG.freeze_share)):
            expected.freeze()

    fit(
        expected,
        label_step,
        dataset,
        CONFIG.train,
        seed=0,
        augment=NoAugment(),
        on_step=freeze,
        set_training=lambda module, mode: module.train(mode),
    )
    found = quantized(model, dataset)
    assert all(torch.equal(value, found.state_dict()[name]) for name, value in expected.state_dict().items())
    assert found.body.get_parameter("head.weight")[0, 0] != 0
