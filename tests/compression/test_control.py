"""Accuracy control: which layers go back to float, what is kept of a training, and what the exported file says."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compression.data import Dataset
from compression.data.dataset import Split
from compression.errors import CompressionError
from compression.metrics import evaluate
from compression.quantize import FakeQuantized, NumberFormat, Quantized, convert, prepare_qat
from compression.quantize.control import AccuracyControl, Reverted, carried_over, revert_layers
from compression.quantize.number_format import INT8
from compression.quantize.sensitivity import Layerwise
from compression.types import Preprocessing
from compression.zoo import PlainCnn, ResidualCnn, VisionTransformer

SHAPE = (1, 12, 12)
PLAIN = PlainCnn(widths=(8, 8), depths=(1, 1), strides=(1, 2), stem_width=8)
BROKEN, SECOND = "blocks.0.0", "blocks.1.0"


def noise(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(seed))


def network(config=PLAIN) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = config.build(4, SHAPE).train()
        with torch.no_grad():
            for seed in range(5):
                model(noise(32, seed + 100))
            model.eval()
            logits = model(noise(64, 7))
            model.get_parameter("head.weight").div_(logits.std())
            model.get_parameter("head.bias").sub_(logits.mean(dim=0)).div_(logits.std())
    return model


def broken(*layers: str, factor: float = 1000.0) -> nn.Module:
    """With one weight in each channel of these convolutions ``factor`` times the others.

    It reads an input channel that is always zero: in float it does nothing, in INT8 it leaves the others no steps.
    """
    model = network()
    with torch.no_grad():
        for layer in layers:
            before = {BROKEN: "stem.1", SECOND: "blocks.0.1"}[layer]
            model.get_parameter(f"{before}.weight")[0] = 0.0
            model.get_parameter(f"{before}.bias")[0] = -1.0  # of which ReLU makes zero
            weight = model.get_parameter(f"{layer}.weight")
            weight[:, 0] = 0.0
            weight[:, 0, 1, 1] = factor * weight.abs().amax()
    return model


def dataset_of(model: nn.Module, count: int = 64) -> Dataset:
    """Images the float model is sure of, labelled with its own answers: its accuracy is 1."""

    def split(first: int) -> Split:
        images = noise(4 * count, first)
        with torch.no_grad():
            best = model(images).topk(2, dim=1)
        sure = (best.values[:, 0] - best.values[:, 1]).argsort(descending=True)[:count]
        return Split(images=images[sure], labels=best.indices[sure, 0], ids=torch.arange(first, first + count))

    parts = {name: split(1000 * i) for i, name in enumerate(("train", "validation", "calibration", "test"))}
    return Dataset(
        name="noise",
        class_names=("a", "b", "c", "d"),
        preprocessing=Preprocessing(scale=1.0, mean=(0.0,), std=(1.0,)),
        hashes={},
        warnings=(),
        **parts,
    )


def trained(model: nn.Module, number_format: NumberFormat = INT8) -> FakeQuantized:
    """Two steps from the calibrated model, then frozen: weights, ranges and statistics are its own."""
    prepared = prepare_qat(model, SHAPE, noise(64, 1), number_format).train()
    optimizer = torch.optim.SGD(prepared.parameters(), 1e-3)
    for seed in range(2):
        F.cross_entropy(prepared(noise(8, seed)), torch.arange(8) % 4).backward()
        optimizer.step()
        optimizer.zero_grad()
    prepared.freeze()
    return prepared.eval()


def drop_of(prepared: FakeQuantized, model: nn.Module, dataset: Dataset) -> float:
    found = (evaluate(each, dataset.validation, dataset.preprocessing) for each in (model, convert(prepared)))
    return next(found).accuracy - next(found).accuracy


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """Equal bits are promised for one thread."""


@pytest.fixture(scope="module")
def one_broken() -> tuple[nn.Module, Dataset, FakeQuantized]:
    model = broken(BROKEN)
    return model, dataset_of(model), prepare_qat(model, SHAPE, noise(64, 1))


@pytest.fixture(scope="module")
def two_broken() -> tuple[nn.Module, Dataset, FakeQuantized]:
    model = broken(BROKEN, SECOND)
    return model, dataset_of(model), prepare_qat(model, SHAPE, noise(64, 1))


@pytest.fixture(scope="module")
def repaired(one_broken) -> Reverted:
    model, dataset, prepared = one_broken
    bound = AccuracyControl(max_drop=0.05)
    return revert_layers(prepared, model, dataset, INT8, bound, order=["stem.0", BROKEN, SECOND, "head"])


# --- which layers


def test_exactly_the_broken_layer_goes_back_and_the_bound_holds(one_broken, repaired):
    model, dataset, prepared = one_broken
    assert drop_of(prepared, model, dataset) > 0.1
    assert repaired.keep_float == (BROKEN,)
    assert repaired.met
    assert repaired.drop <= 0.05
    assert repaired.drop == pytest.approx(drop_of(repaired.prepared, model, dataset))
    layerwise = Layerwise(repaired.prepared)
    assert [layer for layer in layerwise.layers if not layerwise.is_rounded(layer)] == [BROKEN]


def test_every_try_is_a_row_and_drops_follow_from_one_to_the_next(one_broken, repaired):
    model, dataset, prepared = one_broken
    assert [row.layer for row in repaired.rows if row.to == "float"] == ["stem.0", BROKEN]  # the rest wasn't needed
    current = drop_of(prepared, model, dataset)
    for row in repaired.rows:
        assert row.drop_before == pytest.approx(current)
        assert row.kept or row.to == "int8" or row.drop_after >= row.drop_before
        current = row.drop_after if row.kept else current
    assert current == pytest.approx(repaired.drop)


def test_the_model_that_was_given_is_left_as_it_was(one_broken, repaired):
    model, _, prepared = one_broken
    fresh = prepare_qat(model, SHAPE, noise(64, 1))
    assert all(torch.equal(value, prepared.state_dict()[name]) for name, value in fresh.state_dict().items())
    assert repaired.prepared is not prepared


def test_nothing_goes_back_when_the_bound_already_holds(one_broken):
    model, dataset, prepared = one_broken
    found = revert_layers(prepared, model, dataset, INT8, AccuracyControl(max_drop=1.0), order=[BROKEN, "head"])
    assert (found.keep_float, found.rows, found.met) == ((), (), True)
    assert found.prepared is not prepared
    images = noise(8)
    assert torch.equal(found.prepared(images), prepared(images))


@pytest.mark.parametrize("most", [0, 1])
def test_no_more_layers_than_allowed_go_back_and_an_unmet_bound_is_said(two_broken, most):
    model, dataset, prepared = two_broken
    steps: list[tuple[int, int]] = []
    found = revert_layers(
        prepared,
        model,
        dataset,
        INT8,
        AccuracyControl(max_drop=0.02, max_layers=most),
        order=[SECOND, BROKEN],
        on_step=lambda *step: steps.append(step),
    )
    assert not found.met
    assert found.drop > 0.02
    assert found.keep_float == (SECOND,)[:most]
    assert [row.layer for row in found.rows] == [SECOND][:most]
    assert steps[-1] == (2 * most, 2 * most)


def test_layers_that_a_bound_no_longer_needs_are_given_back():
    """The first changes no answer alone and goes back for the divergence; with the second one it is not needed."""
    model = broken(BROKEN, SECOND, factor=150.0)
    dataset, prepared = dataset_of(model), prepare_qat(model, SHAPE, noise(64, 1))
    found = revert_layers(prepared, model, dataset, INT8, AccuracyControl(max_drop=0.0), order=[SECOND, BROKEN])
    outline = [(row.layer, row.to, row.kept) for row in found.rows]
    assert outline == [(SECOND, "float", True), (BROKEN, "float", True), (SECOND, "int8", True)]
    assert found.rows[0].drop_after == found.rows[0].drop_before > 0.0
    assert found.keep_float == (BROKEN,)
    assert found.drop == drop_of(found.prepared, model, dataset) == 0.0


def test_layers_already_in_float_are_kept_and_not_tried(one_broken):
    model, dataset, _ = one_broken
    known = NumberFormat(keep_float=("blocks.0.*",))
    prepared = prepare_qat(model, SHAPE, noise(64, 1), known)
    found = revert_layers(prepared, model, dataset, known, AccuracyControl(max_drop=0.0), order=[BROKEN, "head"])
    assert found.keep_float[0] == "blocks.0.*"
    assert BROKEN not in {row.layer for row in found.rows}


def test_one_layer_stays_in_int8():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 12), nn.Flatten()).eval()
    coarse = NumberFormat(weight_bits=2)
    prepared = prepare_qat(model, SHAPE, noise(32), coarse)
    found = revert_layers(prepared, model, dataset_of(model), coarse, AccuracyControl(max_drop=0.0), order=["0"])
    assert (found.keep_float, found.rows, found.met) == ((), (), False)
    assert found.drop > 0.0


def test_an_order_of_another_model_is_refused_before_anything_is_measured(one_broken):
    model, dataset, prepared = one_broken
    with pytest.raises(CompressionError, match=r"Layer 'blocks.7' of the order.*stem.0, blocks.0.0"):
        revert_layers(prepared, model, dataset, INT8, AccuracyControl(), order=["head", "blocks.7"])


def test_the_record_holds_the_bound_and_every_row(repaired):
    record = repaired.record(AccuracyControl(max_drop=0.05))
    assert (record["max_drop"], record["max_layers"], record["met"]) == (0.05, 8, True)
    assert record["keep_float"] == [BROKEN]
    assert [row["layer"] for row in record["rows"]] == [row.layer for row in repaired.rows]


# --- what is carried over


class Pooled(nn.Module):
    """A maximum, whose input and output are rounded by one quantizer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(1, 8, 3), nn.Linear(8, 4)
        self.second = nn.Conv2d(8, 8, 3)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.second(F.max_pool2d(self.stem(images).relu(), 2)).mean((2, 3)))


@pytest.fixture(params=["residual", "tokens", "maximum"])
def any_network(request) -> nn.Module:
    torch.manual_seed(0)
    if request.param == "maximum":
        return Pooled().eval()
    residual = ResidualCnn(widths=(8,), depths=(1,), strides=(1,), stem_width=8)
    tokens = VisionTransformer(width=16, depth=1, num_heads=2, stem="patch", patch_size=4)
    return network({"residual": residual, "tokens": tokens}[request.param])


def test_all_state_is_carried_over_bit_for_bit(any_network):
    model = any_network
    source = trained(model)
    target = carried_over(source, prepare_qat(model, SHAPE, None))
    images = noise(16)
    assert torch.equal(target(images), source(images))
    assert all(torch.equal(value, source.state_dict()[name]) for name, value in target.state_dict().items())
    assert bool(target.frozen)
    assert len(target.quantizers()) == len(source.quantizers())  # those at several places are one


@pytest.mark.parametrize("options", [{}, {"learned_steps": True}], ids=str)
def test_trained_weights_and_ranges_survive_a_layer_that_goes_back(options):
    model = network()
    source = trained(model, NumberFormat(**options))
    target = carried_over(source, prepare_qat(model, SHAPE, None, NumberFormat(**options, keep_float=("head",))))
    theirs = source.state_dict()
    own = [name for name in target.state_dict() if "activation_post_process" not in name]
    assert any(not torch.equal(theirs[f"body.{name}"], value) for name, value in model.state_dict().items())
    assert all(torch.equal(target.state_dict()[name], theirs[name]) for name in own)
    assert (
        len(target.quantizers()) == len(source.quantizers()) - 2
    )  # its weight and its input, which nothing else reads
    layerwise = Layerwise(source)
    values = layerwise.float_values(noise(16))
    together = {}
    for layer in layerwise.layers:
        together |= layerwise.changes(layer, "int8", values) or {}
    for gone in layerwise.changes("head", "int8 weights", values) or {}:
        del together[gone]
    read = [node for node in layerwise.changes("head", "int8 activations", values) or {} if len(node.users) == 1]
    found = layerwise.logits(values, {node: change for node, change in together.items() if node not in read})
    assert torch.equal(found, target(noise(16)))


def test_a_target_that_rounds_more_is_refused():
    model = network()
    source = prepare_qat(model, SHAPE, noise(32), NumberFormat(keep_float=("head",)))
    with pytest.raises(CompressionError, match=r"quantizer for '.*more layers in keep_float"):
        carried_over(source, prepare_qat(model, SHAPE, None))
    other = PLAIN.model_copy(update={"widths": (8, 16)}).build(4, SHAPE)
    with pytest.raises(CompressionError, match="another structure .*size mismatch"):
        carried_over(prepare_qat(model, SHAPE, noise(32)), prepare_qat(other, SHAPE, None))


# --- what ships


def test_the_exported_file_has_that_layer_in_float(repaired, tmp_path: Path):
    from export.onnx_graph import load_graph, to_onnx
    from export.qdq import check_symmetric

    quantized: Quantized = convert(repaired.prepared)
    graph = to_onnx(quantized, tmp_path / "int8.onnx", input_shape=SHAPE, metadata={})
    assert check_symmetric(graph.path).weights == 3  # two convolutions and the head
    proto = load_graph(graph.path).graph
    makers = {name: node.op_type for node in proto.node for name in node.output}
    plain = [node for node in proto.node if node.op_type == "Conv" and makers.get(node.input[1]) is None]
    assert len(plain) == 1
    stored = {tensor.name: list(tensor.dims) for tensor in proto.initializer}
    assert stored[plain[0].input[1]] == [8, 8, 3, 3]
