"""Learned steps: gradients as the paper has them, and what training, saving and converting keep."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn import functional as F

from compression.augment import NoAugment
from compression.quantize import FakeQuantized, NumberFormat, Qat, convert, prepare_qat, qat
from compression.quantize.learned_steps import LearnedFakeQuantize, gradient_share, learned_round
from compression.quantize.prepared import load_prepared, save_prepared
from compression.sparsify.nm import apply_masks, follows, magnitude_mask
from compression.train import TrainConfig
from compression.types import Batch
from compression.zoo import DepthwiseCnn
from tests.compression.tiny_data import tiny_dataset

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPE = (1, 8, 8)
LEARNED = NumberFormat(learned_steps=True)
CONFIG = Qat(
    learned_steps=True, train=TrainConfig(epochs=2, batch_size=16, learning_rate=0.01, checkpoint_every_steps=1)
)


def build() -> nn.Module:
    torch.manual_seed(0)
    model = DepthwiseCnn(widths=(8,), depths=(1,), strides=(1,), stem_width=8).build(4, SHAPE)
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # negative factors too, which folding must not mistake
            module.weight.data = torch.randn(module.num_features, generator=generator) + 0.3
            module.running_var = torch.rand(module.num_features, generator=generator) + 0.5
    return model.eval()


def images(count: int, seed: int = 2) -> Tensor:
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(seed))


def label_step(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    return {"cross_entropy": F.cross_entropy(model(batch.images), batch.labels)}


def run(folder: Path | None = None, on_step=None, model: nn.Module | None = None) -> FakeQuantized:
    return qat(
        model or build(),
        tiny_dataset(),
        CONFIG,
        step=label_step,
        seed=0,
        augment=NoAugment(),
        checkpoint_dir=folder,
        on_step=on_step,
    )[0]


def steps(model: FakeQuantized) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items() if name.endswith("log_step")}


@pytest.fixture(scope="module")
def trained() -> FakeQuantized:
    torch.set_num_threads(1)
    return run()


# --- the function -------------------------------------------------------------------------------------


def straight_through(x: Tensor, step: Tensor, low: int, high: int) -> Tensor:
    """The definition, in operations autograd knows: rounding passes gradients on."""
    places = (x / step).clamp(low, high)
    return (places + (places.round() - places).detach()) * step


@pytest.mark.parametrize(("low", "high"), [(-128, 127), (-7, 7), (-1, 1)])
@pytest.mark.parametrize("axis", [None, 0])
def test_gradients_are_those_of_the_definition(low, high, axis):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(6, 40, generator=generator, dtype=torch.float64).float() * 3
    step = torch.rand(1 if axis is None else 6, generator=generator) * 4 / high + 0.5 / high
    upstream = torch.randn(6, 40, generator=generator)
    mine, other = (each.clone().requires_grad_() for each in (x, x))
    my_step, other_step = (each.clone().requires_grad_() for each in (step, step))
    found = learned_round(mine, my_step, low, high, axis=axis, share=0.25)
    expected = straight_through(other, other_step[:, None] if axis == 0 else other_step, low, high)
    found.backward(upstream)
    expected.backward(upstream)
    torch.testing.assert_close(found, expected)
    assert torch.equal(mine.grad == upstream, other.grad != 0)
    torch.testing.assert_close(mine.grad, other.grad)
    torch.testing.assert_close(my_step.grad, 0.25 * other_step.grad, rtol=1e-4, atol=1e-4)


def test_values_pass_gradients_inside_alone_and_the_step_gets_the_end_outside():
    x = torch.tensor([-9.0, -0.7, 0.2, 2.4, 9.0], requires_grad=True)
    step = torch.ones(1, requires_grad=True)
    learned_round(x, step, -3, 3, axis=None, share=1.0).sum().backward()
    assert x.grad.tolist() == [0, 1, 1, 1, 0]
    assert step.grad.item() == pytest.approx(-3 + (-1 + 0.7) + (0 - 0.2) + (2 - 2.4) + 3, abs=1e-6)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_rounding_is_idempotent_on_at_most_two_to_the_bits_levels(bits):
    limit = 2 ** (bits - 1) - 1
    x, step = images(20).flatten() * 5, torch.tensor([0.043])
    once = learned_round(x, step, -limit - 1, limit, axis=None, share=1.0)
    assert torch.equal(learned_round(once, step, -limit - 1, limit, axis=None, share=1.0), once)
    assert len(once.unique()) <= 2**bits


def test_gradient_share():
    assert gradient_share(100, 127) == pytest.approx((100 * 127) ** -0.5)


# --- the model ----------------------------------------------------------------------------------------


def test_before_training_it_is_the_calibrated_model():
    learned, calibrated = prepare_qat(build(), SHAPE, images(64), LEARNED), prepare_qat(build(), SHAPE, images(64))
    assert torch.equal(learned(images(16)), calibrated(images(16)))


def test_with_few_bits_weights_start_at_the_step_that_rounds_them_better():
    learned = prepare_qat(build(), SHAPE, images(64), NumberFormat(learned_steps=True, weight_bits=2))
    wide = prepare_qat(build(), SHAPE, images(64), NumberFormat(weight_bits=2))
    changed = 0
    for mine, other in zip(learned.quantizers(), wide.quantizers(), strict=True):
        if not mine.is_per_channel:
            assert torch.equal(mine.scale, other.scale)
    for node in learned.body.graph.nodes:
        weight = node.args[0] if node.op == "call_module" else None
        if weight is None or weight.op != "get_attr":
            continue
        values = learned.body.get_parameter(weight.target)
        errors = [
            (model.body.get_submodule(node.target)(values) - values).square().flatten(1).sum(1)
            for model in (learned, wide)
        ]
        assert bool((errors[0] <= errors[1]).all())
        changed += int((errors[0] < errors[1]).sum())
    assert changed > 10


def test_every_step_gets_a_gradient_and_stays_positive(trained):
    prepared = prepare_qat(build(), SHAPE, images(64), LEARNED).train()
    quantizers = [each for each in prepared.quantizers() if isinstance(each, LearnedFakeQuantize)]
    assert len(quantizers) == len(prepared.quantizers())
    F.cross_entropy(prepared(images(8)), torch.arange(8) % 4).backward()
    assert all(each.log_step.grad is not None and each.log_step.grad.abs().sum() > 0 for each in quantizers)
    assert [len(each.log_step) > 1 for each in quantizers] == [each.is_per_channel for each in quantizers]
    start = steps(prepare_qat(build(), SHAPE, images(64), LEARNED))
    assert all(not torch.equal(value, start[name]) for name, value in steps(trained).items())
    assert all(bool((each.scale > 0).all()) for each in trained.quantizers())


def test_steps_are_no_weights_to_decay():
    prepared = prepare_qat(build(), SHAPE, images(8), LEARNED)
    assert all(value.ndim == 1 for name, value in prepared.named_parameters() if name.endswith("log_step"))


def test_freezing_stops_steps_at_their_last_value():
    prepared = prepare_qat(build(), SHAPE, images(64), LEARNED).train()
    optimizer = torch.optim.AdamW(prepared.parameters(), 0.01, weight_decay=0.0)

    def learn() -> None:
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(prepared(images(8)), torch.arange(8) % 4).backward()
        optimizer.step()

    learn()
    prepared.freeze()
    frozen, scales = steps(prepared), [each.scale.clone() for each in prepared.quantizers()]
    for value, scale in zip(frozen.values(), scales, strict=True):
        assert torch.equal(value.exp(), scale)
    weight = prepared.body.get_parameter("head.weight").detach().clone()
    learn()
    assert all(torch.equal(value, frozen[name]) for name, value in steps(prepared).items())
    assert all(torch.equal(*pair) for pair in zip(scales, [q.scale for q in prepared.quantizers()], strict=True))
    assert not torch.equal(prepared.body.get_parameter("head.weight"), weight)


@pytest.mark.parametrize("stop_at", [3, 7])
def test_a_stopped_training_goes_on_bit_for_bit(trained, tmp_path: Path, stop_at: int):
    """Step 7 of 8 lies after the freeze."""

    def stop(done: int, total: int) -> None:
        assert total == 8
        if done == stop_at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, stop)
    resumed, expected = run(tmp_path).state_dict(), trained.state_dict()
    assert bool(trained.frozen)
    assert resumed.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in resumed.items())


def test_state_round_trip_is_bit_equal(trained, tmp_path: Path):
    save_prepared(trained, tmp_path / "q.safetensors")
    again = load_prepared(tmp_path / "q.safetensors", build(), SHAPE, CONFIG)
    assert all(torch.equal(value, trained.state_dict()[name]) for name, value in again.state_dict().items())
    assert torch.equal(again(images(16)), trained(images(16)))
    assert torch.equal(convert(again)(images(16)), convert(trained)(images(16)))


def weights_of(graph: GraphModule) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Integers, scales and zero points of the layers of a converted graph."""
    layers = {torch.ops.aten.conv2d.default, torch.ops.aten.linear.default}
    found = [node.args[1] for node in graph.graph.nodes if node.target in layers]
    return [tuple(getattr(graph, each.target) for each in node.args[:3]) for node in found]


def test_converted_is_symmetric_int8_with_the_learned_scales(trained):
    with torch.no_grad():
        simulated, converted = trained(images(64, seed=5)), convert(trained)(images(64, seed=5))
    step = max(quantizer.scale.max().item() for quantizer in trained.quantizers())
    assert (simulated - converted).abs().mean() <= 0.02 * step
    graph = convert(trained).body
    for integers, scales, zero_points in weights_of(graph):
        assert integers.dtype == torch.int8
        assert integers.min() >= -127
        assert scales.shape == zero_points.shape == (len(integers),)
        assert not zero_points.any()
    head = next(node for node in trained.body.graph.nodes if node.target is torch.ops.aten.linear.default)
    assert torch.equal(weights_of(graph)[-1][1], trained.body.get_submodule(head.args[1].target).scale)
    assert not any("log_step" in name for name in convert(trained).state_dict())


def test_folding_changes_no_integer_weight(trained):
    body = trained.body
    layers = [node for node in body.graph.nodes if node.target is torch.ops.aten.conv2d.default]
    for layer, (integers, _, _) in zip(layers, weights_of(convert(trained).body), strict=False):
        quantizer = body.get_submodule(layer.args[1].target)
        weight = body.get_parameter(layer.args[1].args[0].target)
        gamma = body.get_parameter(next(iter(layer.users)).args[1].target)
        expected = (weight / quantizer.scale.reshape(-1, 1, 1, 1)).round().clamp(-127, 127)
        assert torch.equal(integers.float(), expected * gamma.sign().reshape(-1, 1, 1, 1))


def test_zeros_of_a_sparse_student_stay():
    model = build()
    name = next(name for name, value in model.named_parameters() if value.ndim == 4 and value.shape[1:] == (8, 1, 1))
    apply_masks(model, {name: magnitude_mask(model.get_parameter(name), 2, 4)})
    prepared = run(model=model)
    assert torch.equal(prepared.body.get_parameter(name) == 0, model.get_parameter(name) == 0)
    integers = [each for each, _, _ in weights_of(convert(prepared).body) if each.shape[1:] == (8, 1, 1)]
    assert len(integers) == 1
    assert follows(integers[0], 2, 4)
