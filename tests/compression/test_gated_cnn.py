"""Gates learn from the network what each image needs, leave the network's own gradients alone, and export plainly."""

import copy
from dataclasses import replace
from itertools import pairwise

import onnxruntime
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn import functional as F

from compression import profile
from compression.augment import normalise
from compression.checkpoint import load_checkpoint, save_checkpoint
from compression.distill import CrossEntropy, DistillConfig, Kd
from compression.errors import ShapeError
from compression.features import penultimate
from compression.models import ModelSpec, build_model
from compression.quantize import convert, prepare_qat
from compression.search import Design, Scale
from compression.train import TrainConfig
from compression.types import Preprocessing
from compression.zoo.gated_cnn import GatedBlock, GatedCnn, GatedNet, expected_kept, inject, predicted_kept, truth
from compression.zoo.plain_cnn import PlainCnn
from export.onnx_graph import to_onnx
from tests.compression.losses.short_training import assert_same, stored
from tests.compression.procedures.test_sparse_finetuning import training
from tests.compression.test_study import config_of, search
from tests.compression.tiny_data import CLASSES, tiny_dataset

SHAPE = (1, 8, 8)
TINY = GatedCnn(widths=(8, 16), depths=(1, 1), strides=(2, 1), stem_width=8)


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """The suite's own fixture, for every test here."""


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def built(config: GatedCnn | PlainCnn = TINY, *, seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return config.build(len(CLASSES), SHAPE)


def choosy(seed: int = 0) -> GatedNet:
    """In inference mode, with gates of which some are open for some images, none near its threshold."""
    model = built(seed=seed).eval()
    for number, block in enumerate(model.blocks):
        block.predictor.weight.data = randn(*block.predictor.weight.shape, seed=number)
        block.predictor.bias.data.zero_()
    return model


def gates_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: each for name, each in model.named_parameters() if "predictor" in name}


def spec_of(config: GatedCnn = TINY) -> ModelSpec:
    return ModelSpec(
        model=config,
        num_classes=len(CLASSES),
        input_shape=SHAPE,
        class_names=CLASSES,
        preprocessing=Preprocessing(scale=255.0, mean=(0.3,), std=(0.2,)),
    )


# ---------------------------------------------------------------- what is worth computing


@pytest.mark.parametrize("mass", [0.01, 0.3, 0.5, 0.9, 0.999])
def test_kept_channels_hold_the_mass_and_one_less_would_not(mass):
    outputs = randn(64, 24, 3, 3, dtype=torch.float64).relu()
    heights = outputs.abs().amax((2, 3))
    kept = truth(outputs, mass)
    total, held = heights.sum(dim=1), (heights * kept).sum(dim=1)
    smallest = heights.masked_fill(~kept, torch.inf).amin(dim=1)
    assert (held >= mass * total * (1 - 1e-12)).all()
    assert (held - smallest < mass * total).all()
    assert (heights.masked_fill(kept, -1).amax(dim=1) <= smallest).all(), "those kept are the largest"


def test_mass_one_keeps_every_channel_that_is_not_zero_throughout():
    outputs = randn(16, 12, 3, 3).relu()
    outputs[:, ::3] = 0
    outputs[:, 1] *= 1e-30
    assert torch.equal(truth(outputs, 1.0), outputs.amax((2, 3)) > 0)
    assert truth(outputs, 1.0)[:, 1].any()


def test_more_mass_keeps_more_and_nothing_is_kept_of_nothing():
    outputs = randn(16, 12, 3, 3)
    masks = [truth(outputs, mass) for mass in (0.1, 0.4, 0.8, 1.0)]
    assert all((less <= more).all() and less.sum() < more.sum() for less, more in pairwise(masks))
    assert not truth(torch.zeros(2, 5, 3, 3), 0.5).any()
    assert truth(torch.ones(1, 4, 2, 2), 0.5).tolist() == [[True, True, False, False]]


def test_sign_of_the_output_makes_no_difference():
    outputs = randn(8, 6, 3, 3)
    assert torch.equal(truth(-outputs, 0.7), truth(outputs, 0.7))


# ---------------------------------------------------------------- gradients


def test_injected_gradient_has_factor_one_whatever_the_loss():
    for factor in (0.0, 1.0, 1e3):
        values, other = randn(3).requires_grad_(), randn(2, seed=1).requires_grad_()
        found = inject(values, other.square().sum())
        assert torch.equal(found, values)
        (factor * found.sum()).backward()
        assert torch.equal(values.grad, torch.full((3,), factor))
        torch.testing.assert_close(other.grad, 2 * other.detach())


def test_the_networks_own_gradients_and_the_loss_are_those_without_the_injection(monkeypatch):
    images, labels = randn(16, *SHAPE), torch.arange(16) % len(CLASSES)
    found = {}
    for injected in (True, False):
        if not injected:
            monkeypatch.setattr("compression.zoo.gated_cnn.inject", lambda values, loss: values)
        model = choosy().train()
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        found[injected] = loss.detach(), {name: each.grad for name, each in model.named_parameters()}
    assert torch.equal(found[True][0], found[False][0])
    gates = set(gates_of(choosy()))
    for name, gradient in found[True][1].items():
        assert torch.equal(gradient, found[False][1][name]) != (name in gates), name


def test_gates_get_the_gradient_of_the_cross_entropy_beside_that_of_the_task():
    block = GatedBlock(3, 5, kernel=3, stride=1, mass=0.6)
    x = randn(4, 3, 6, 6).relu().requires_grad_()
    logits = block.predictor(x.detach().amax((2, 3)))
    expected = torch.autograd.grad(block.loss(logits, block.layers(x)), block.predictor.bias)[0]
    (0.0 * block(x).sum()).backward()
    torch.testing.assert_close(block.predictor.bias.grad, expected)
    assert x.grad.abs().max() == 0, "nothing of it reaches the layers before"
    assert all(each.grad.abs().max() == 0 for each in block.layers.parameters())


def test_the_task_reaches_the_gates_through_the_sigmoid(monkeypatch):
    monkeypatch.setattr("compression.zoo.gated_cnn.inject", lambda values, loss: values)
    block = GatedBlock(3, 5, kernel=3, stride=1, mass=0.6)
    x = randn(4, 3, 6, 6).relu()
    block(x).sum().backward()
    soft = torch.tensor(2.0).sigmoid()
    through = block.layers(x).sum((0, 2, 3)).detach() * soft * (1 - soft)
    torch.testing.assert_close(block.predictor.bias.grad, through)


def test_without_gradients_and_in_inference_nothing_is_injected(monkeypatch):
    def never(values, loss):
        raise AssertionError

    monkeypatch.setattr("compression.zoo.gated_cnn.inject", never)
    model = built()
    with torch.no_grad():
        model(randn(2, *SHAPE))
    model.eval()(randn(2, *SHAPE)).sum().backward()
    assert all(each.grad is None for each in gates_of(model).values())


# ---------------------------------------------------------------- the network


@pytest.mark.parametrize("training_mode", [True, False])
def test_it_starts_out_as_its_plain_form(training_mode):
    plain = built(PlainCnn(**TINY.model_dump(exclude={"kind", "mass"})), seed=1).train(training_mode)
    gated = built().train(training_mode)
    weights = {
        name.replace(".layers", ""): each for name, each in gated.state_dict().items() if "predictor" not in name
    }
    plain.load_state_dict(weights)
    images = randn(6, *SHAPE)
    assert torch.equal(gated(images), plain(images))
    assert predicted_kept(gated, images) == [1.0, 1.0]


def test_closed_channels_are_zero_and_others_as_they_were():
    model, images = choosy(), randn(6, *SHAPE)
    block, x = model.blocks[0], model.stem(images)
    gates = block.predictor(x.amax((2, 3))) > 0
    assert 0 < int(gates.sum()) < gates.numel()
    assert torch.equal(block(x), block.layers(x) * gates[:, :, None, None])
    model.train()
    with torch.no_grad():
        hard = block(x).amax((2, 3)) > 0
    assert not (hard & ~gates).any(), "gates are hard in training too"


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32)], ids=str)
@pytest.mark.parametrize("config", [TINY, GatedCnn()], ids=["tiny", "default"])
def test_builds_scales_and_every_parameter_learns(config, shape):
    model = config.build(7, shape).to(memory_format=torch.channels_last)
    logits = model(randn(4, *shape).contiguous(memory_format=torch.channels_last))
    assert logits.shape == (4, 7)
    F.cross_entropy(logits, torch.arange(4)).backward()
    assert all(each.grad is not None and torch.isfinite(each.grad).all() for each in model.parameters())
    scaled = config.scaled(width=2.0, depth_delta=1)
    assert (type(scaled), scaled.mass) == (GatedCnn, config.mass)
    assert scaled.widths == tuple(2 * width for width in config.widths)
    assert scaled.build(3, (1, 8, 8))(randn(2, 1, 8, 8)).shape == (2, 3)
    features = penultimate(model, randn(4, *shape))[1]
    assert features.shape == (4, config.widths[-1])


def test_gates_learn_what_the_network_needs():
    data = tiny_dataset(train=128)
    images, labels = normalise(data.train.images, data.preprocessing), data.train.labels
    model = built(TINY.model_copy(update={"mass": 0.6}))

    def gates() -> Tensor:
        """Of each layer: cross entropy of its gates, accuracy, and the cross entropy of the best constants; [2,3]."""
        rows = []
        with torch.no_grad():
            x = model.stem(images)
            for block in model.blocks:
                logits, outputs = block.predictor(x.amax((2, 3))), block.layers(x)
                wanted = truth(outputs, 0.6).float()
                constants = wanted.mean(dim=0, keepdim=True).clamp(1e-6, 1 - 1e-6).expand_as(wanted)
                right = ((logits > 0) == wanted.bool()).float().mean()
                rows.append(
                    torch.stack([block.loss(logits, outputs), right, F.binary_cross_entropy(constants, wanted)])
                )
                x = block(x)
        return torch.stack(rows)

    before, losses = gates(), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    after = gates()
    assert (after[:, 0] < 0.7 * before[:, 0]).all()
    assert (after[:, 1] > before[:, 1]).all()
    assert after[0, 0] < 0.9 * after[0, 2], "each image has gates of its own"
    assert losses[-1] < losses[0] / 4, "and the task is learnt through them"
    assert all(0.2 < share < 0.8 for share in predicted_kept(model, images))


def test_expected_shares_are_those_of_the_open_network_and_modes_are_given_back():
    model, images = choosy(), randn(16, *SHAPE)
    model.train()
    state = copy.deepcopy(model.state_dict())
    found = expected_kept(model, images)
    assert model.training
    assert_same(model.state_dict(), state)
    x = model.eval().stem(images)
    for block, share in zip(model.blocks, found, strict=True):
        x = block.layers(x)
        assert share == pytest.approx(float(truth(x, 0.9).double().mean()))
    less = built(TINY.model_copy(update={"mass": 0.3}))
    less.load_state_dict(state)
    assert all(small < large for small, large in zip(expected_kept(less, images), found, strict=True))
    with pytest.raises(ShapeError, match=r"'PlainNet' has no gates, expected a network of kind 'gated_cnn'"):
        expected_kept(built(PlainCnn()), images)
    with pytest.raises(ShapeError, match="has no gates"):
        predicted_kept(nn.Linear(2, 2), images)


@pytest.mark.parametrize("wrong", [{"mass": 0}, {"mass": 1.1}, {"depths": (1,)}])
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(ValidationError):
        GatedCnn.model_validate(wrong)


# ---------------------------------------------------------------- with the rest


@pytest.mark.parametrize("fast", [True, False], ids=["traced", "exported"])
def test_exports_as_plain_operators_and_says_the_same(fast, tmp_path):
    model, images = choosy(), randn(32, *SHAPE)
    info = to_onnx(model, tmp_path / "model.onnx", input_shape=SHAPE, metadata={}, fast=fast)
    plain = "Conv Relu ReduceMax Gemm Greater Cast Unsqueeze Mul ReduceMean Constant Identity Reshape".split()
    assert set(info.nodes) <= set(plain)
    (logits,) = onnxruntime.InferenceSession(tmp_path / "model.onnx").run(None, {"images": images.numpy()})
    assert float((torch.from_numpy(logits) - model(images).detach()).abs().max()) < 1e-4
    assert all(0.1 < share < 0.9 for share in predicted_kept(model, images))


def test_quantization_keeps_gates_and_trains_the_rest():
    model, images = choosy(), randn(32, *SHAPE)
    prepared = prepare_qat(model, SHAPE, images)
    agreed = (prepared(images).argmax(1) == model(images).argmax(1)).double().mean()
    assert agreed > 0.8
    prepared.train()
    F.cross_entropy(prepared(images), torch.arange(32) % len(CLASSES)).backward()
    without = {name for name, each in prepared.named_parameters() if each.grad is None}
    assert len(without) == len(gates_of(model)) == 4
    assert all("predictor" in name for name in without)
    quantized = convert(prepared.eval())
    torch.testing.assert_close(quantized(images), prepared(images), rtol=0, atol=1e-3)


def test_checkpoint_is_read_back_bit_for_bit(tmp_path):
    save_checkpoint(choosy(), spec_of(), tmp_path / "model")
    model, spec = load_checkpoint(tmp_path / "model")
    assert spec == spec_of()
    assert spec.model.kind == "gated_cnn"
    assert torch.equal(model(randn(4, *SHAPE)), choosy()(randn(4, *SHAPE)))
    assert profile.params(build_model(spec)) == profile.params(model)


def test_equal_seeds_build_equal_networks():
    assert_same(built().state_dict(), built().state_dict())
    assert not torch.equal(built().stem[0].weight, built(seed=1).stem[0].weight)


def test_gates_learn_in_a_distillation_whatever_its_losses(tmp_path):
    data = tiny_dataset(validation=16)
    panel = [stored(data, tmp_path / "outputs", width=8, seed=8)]
    config = DistillConfig(
        train=TrainConfig(epochs=3, batch_size=16, learning_rate=0.01), losses=(CrossEntropy(), Kd()), views=2
    )
    given = replace(training(panel, data), student=built(TINY.model_copy(update={"mass": 0.5})), config=config)
    before = copy.deepcopy(gates_of(given.student))
    rows = given.run().rows
    assert {"cross_entropy", "kd"} < set(rows[-1])
    assert not any("gate" in name or "predictor" in name for name in rows[-1]), "no term of its own"
    assert all(not torch.equal(each, before[name]) for name, each in gates_of(given.student).items())
    assert rows[-1]["loss"] < rows[0]["loss"]


def test_a_study_scales_and_designs_it(tmp_path):
    base = TINY.model_copy(update={"strides": (2, 2)})
    spaces = (Scale(base=base, widths=(1.0, 2.0)), Design(base=base, widths=((8, 16), (8, 16))))
    result = search(tmp_path, config_of(spaces=spaces, trials=4, train=TrainConfig(epochs=1), finalists=1))
    assert {trial.space for trial in result.trials} == {"scale-gated_cnn", "design-gated_cnn"}
    assert isinstance(load_checkpoint(result.finalists[0])[0], GatedNet)
