"""What every way of merging must keep to; a new one adds one row to CASES."""

import copy
import importlib
import pkgutil
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import get_args

import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor, nn

import compression.distill.merging as package
from compression.augment import normalise
from compression.card import MethodCard
from compression.data.dataset import Dataset
from compression.distill.merging import AnyMerge, FisherMerge, Merging, TaskVectors, UniformSoup, reestimate_batch_norm
from compression.errors import CompressionError, ShapeError
from compression.types import Frozen
from compression.zoo import VisionTransformer
from tests.compression.tiny_data import CLASSES, tiny_dataset

pytestmark = pytest.mark.usefixtures("one_thread")

CASES = [
    UniformSoup(),
    FisherMerge(samples=24),
    FisherMerge(samples=24, exact_classes=2),
    TaskVectors(steps=5),
    TaskVectors(steps=3, learning_rate=0.1),
]
DATA = tiny_dataset()


@pytest.fixture(params=CASES, ids=str)
def config(request) -> AnyMerge:
    return request.param


class Net(nn.Module):
    """Batch norm, a buffer of each type, and two names for one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.inner = nn.Linear(4, 4)
        self.again = nn.Linear(4, 4)
        self.again.weight = self.inner.weight
        self.head = nn.Linear(4, len(CLASSES))
        self.register_buffer("scale", torch.ones(4))
        self.register_buffer("order", torch.arange(4))

    def forward(self, images: Tensor) -> Tensor:
        values = self.norm(self.stem(images)).relu().mean((2, 3))[:, self.order] * self.scale
        return self.head(self.again(self.inner(values).relu()))


def net(seed: int) -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Net()


def moved(model: nn.Module, seed: int, by: float = 0.1) -> nn.Module:
    """A copy with other numbers in every parameter and floating-point buffer."""
    generator = torch.Generator().manual_seed(seed)
    model = copy.deepcopy(model)
    with torch.no_grad():
        for value in (*model.parameters(), *(each for each in model.buffers() if each.is_floating_point())):
            value += torch.randn(value.shape, generator=generator).abs() * by
    return model


def merged(
    config: AnyMerge, base: nn.Module, members: Sequence[nn.Module], *, data: Dataset = DATA, seed: int = 0
) -> nn.Module:
    return config.build()(Merging(base=base, members=members, dataset=data, seed=seed))


def family() -> tuple[nn.Module, list[nn.Module]]:
    base = net(0)
    return base, [moved(base, seed) for seed in (1, 2, 3)]


def assert_close(left: nn.Module, right: nn.Module, tolerance: float = 1e-5) -> None:
    for (name, value), other in zip(left.state_dict().items(), right.state_dict().values(), strict=True):
        torch.testing.assert_close(
            value, other, rtol=tolerance, atol=tolerance, msg=lambda text, n=name: f"{n}: {text}"
        )


def snapshot(models: Sequence[nn.Module]) -> list[object]:
    return [
        [
            {name: value.clone() for name, value in model.state_dict().items()},
            [module.training for module in model.modules()],
            [(parameter.requires_grad, parameter.grad) for parameter in model.parameters()],
        ]
        for model in models
    ]


# ---------------------------------------------------------------- the catalogue


def test_every_config_with_a_kind_in_the_folder_is_in_the_union():
    found = set()
    for module in pkgutil.iter_modules(package.__path__):
        name = f"{package.__name__}.{module.name}"
        found |= {
            item
            for item in vars(importlib.import_module(name)).values()
            if isinstance(item, type) and issubclass(item, Frozen) and "kind" in item.model_fields
            if item.__module__ == name
        }
    assert found == set(get_args(AnyMerge))


def test_every_member_has_a_case_a_card_and_a_round_trip():
    assert {type(case) for case in CASES} == set(get_args(AnyMerge))
    for member in get_args(AnyMerge):
        assert isinstance(member.card, MethodCard)
        assert all(member.card.model_dump().values())
        assert member().kind == member.model_fields["kind"].default
        assert all(field.description for name, field in member.model_fields.items() if name != "kind")
    for case in CASES:
        assert TypeAdapter(AnyMerge).validate_json(case.model_dump_json()) == case


# ---------------------------------------------------------------- the result


def test_identical_models_give_the_model_itself(config):
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 5), nn.LayerNorm(5), nn.ReLU(), nn.Linear(5, len(CLASSES)))
    result = merged(config, model, [copy.deepcopy(model) for _ in range(3)])
    for name, value in model.state_dict().items():
        assert torch.equal(result.state_dict()[name], value), name


def test_order_of_the_members_changes_nothing(config):
    base, members = family()
    assert_close(merged(config, base, members[::-1]), merged(config, base, members))
    assert_close(merged(config, base, [members[1], members[2], members[0]]), merged(config, base, members))


def test_same_seed_same_bits(config):
    base, members = family()
    again = merged(config, base, members).state_dict()
    for name, value in merged(config, base, members).state_dict().items():
        assert torch.equal(value, again[name]), name


def test_result_keeps_structure_modes_and_flags_and_is_finite(config):
    base, members = family()
    base.eval()
    base.norm.train()
    base.stem.requires_grad_(False)
    result = merged(config, base, members)
    assert type(result) is Net
    assert [module.training for module in result.modules()] == [module.training for module in base.modules()]
    assert [each.requires_grad for each in result.parameters()] == [each.requires_grad for each in base.parameters()]
    for (name, value), (other, wanted) in zip(result.state_dict().items(), base.state_dict().items(), strict=True):
        assert (name, value.shape, value.dtype) == (other, wanted.shape, wanted.dtype)
        assert value.isfinite().all()
    assert (result.head.weight - base.head.weight).abs().max() > 1e-2
    assert result.again.weight is result.inner.weight


def test_inputs_and_the_random_state_are_left_alone(config):
    base, members = family()
    members[0].eval()
    before, state = snapshot([base, *members]), torch.get_rng_state()
    result = merged(config, base, members)
    assert torch.equal(torch.get_rng_state(), state)
    with torch.no_grad():
        for value in (*result.parameters(), *result.buffers()):
            value.zero_()
    for old, new in zip(before, snapshot([base, *members]), strict=True):
        assert old[1:] == new[1:]
        assert all(torch.equal(value, new[0][name]) for name, value in old[0].items())


def test_integer_buffers_are_the_bases_and_others_the_mean(config):
    base, members = family()
    for number, member in enumerate(members):
        member.order.copy_(member.order.flip(0))
        member.norm.num_batches_tracked.fill_(5)
        member.scale.fill_(1.0 + number)
    base.norm.num_batches_tracked.fill_(3)
    result = merged(config, base, members)
    assert result.order.tolist() == [0, 1, 2, 3]
    assert int(result.norm.num_batches_tracked) == 3
    assert torch.equal(result.scale, torch.full((4,), 2.0))


def test_batch_norm_statistics_belong_to_the_merged_weights(config):
    base, members = family()
    result = merged(config, base, members)
    images = normalise(DATA.train.images, DATA.preprocessing)
    values = result.stem(images).detach()
    torch.testing.assert_close(result.norm.running_mean, values.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    again = copy.deepcopy(result)
    reestimate_batch_norm(again, DATA)
    assert_close(again, result, tolerance=1e-7)


def test_neither_validation_nor_test_split_is_looked_at(config):
    base, members = family()
    blind = replace(DATA, validation=None, test=None)
    assert_close(merged(config, base, members, data=blind), merged(config, base, members), tolerance=0)


def test_attention_is_merged_without_warnings(config):
    spec = VisionTransformer(patch_size=4, width=16, num_heads=2, depth=1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base = spec.build(len(CLASSES), DATA.input_shape)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = merged(config, base, [moved(base, 1, by=0.02), moved(base, 2, by=0.02)])
    assert all(value.isfinite().all() for value in result.state_dict().values())


# ---------------------------------------------------------------- refusals


class Wide(Net):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, len(CLASSES) + 1)


class More(Net):
    def __init__(self) -> None:
        super().__init__()
        self.extra = nn.Linear(2, 2)


class Untied(Net):
    def __init__(self) -> None:
        super().__init__()
        self.again.weight = nn.Parameter(self.inner.weight.detach().clone())


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (Wide, r"Member 1 has a parameter of shape \[5, 4\] at 'head.weight', expected a parameter of shape \[4, 4\]"),
        (More, r"Member 1 has a parameter of shape \[2, 2\] at 'extra.weight', expected nothing"),
        (Untied, r"Member 1 has a parameter of shape \[4, 4\] at 'again.weight', expected a shared parameter"),
    ],
)
def test_other_names_and_shapes_are_refused(config, other, message):
    base, members = family()
    with pytest.raises(ShapeError, match=message):
        merged(config, base, [members[0], other(), More()])
    with pytest.raises(ShapeError, match="Member 0"):
        merged(config, other(), [base])


def test_a_missing_weight_is_refused(config):
    _, members = family()
    with pytest.raises(ShapeError, match="Member 0 has nothing at 'extra.weight'"):
        merged(config, More(), members)


def test_quantized_weights_are_refused(config):
    base, members = family()
    member = members[1]
    member.head.weight = nn.Parameter((member.head.weight.detach() * 127).to(torch.int32), requires_grad=False)
    with pytest.raises(CompressionError, match=r"Member 1 has values of type int32 in 'head.weight'.*quantization"):
        merged(config, base, members)
    base.register_buffer("packed", torch.zeros(4, dtype=torch.int8))
    with pytest.raises(CompressionError, match="Base has values of type int8 in 'packed'"):
        merged(config, base, [copy.deepcopy(base)])


def test_packed_state_that_is_no_tensor_is_refused(config):
    class Packed(Net):
        def get_extra_state(self) -> tuple[int, ...]:
            return (8, 4)

    with pytest.raises(CompressionError, match="Base has values of type tuple in '_extra_state'"):
        merged(config, Packed(), [Packed()])


def test_weights_that_are_not_finite_are_refused(config):
    base, members = family()
    with torch.no_grad():
        members[2].inner.bias[1] = float("nan")
    with pytest.raises(CompressionError, match="Member 2 has numbers in 'inner.bias' that are not finite"):
        merged(config, base, members)


def test_nothing_to_merge_is_refused(config):
    with pytest.raises(CompressionError, match="0 members"):
        merged(config, net(0), [])
    with pytest.raises(CompressionError, match="0 parameters"):
        merged(config, nn.Flatten(), [nn.Flatten()])
