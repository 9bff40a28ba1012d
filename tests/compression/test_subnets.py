"""Supernets: what a small network shares with the large one, how all are trained, and the search among them."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from compression import profile
from compression.checkpoint import load_checkpoint, save_checkpoint
from compression.data.dataset import Dataset
from compression.distill import CrossEntropy, Dhkd, DistillConfig, Kd, NormalisedFeatures
from compression.distill.merging.batch_norm import batch_statistics
from compression.distill.procedures import Training
from compression.errors import CompressionError
from compression.metrics import evaluate
from compression.models import build_model
from compression.search.filters.inherited import Inherited
from compression.search.space import Workshop
from compression.search.study import Study, run_study
from compression.search.subnets import Subnets
from compression.search.subnets.slicing import block_roles, leading
from compression.search.subnets.supernet import SandwichStep, Supernet, logit_losses, relation_loss, relations, sandwich
from compression.search.trials import Latency, Score, TrialResult
from compression.teacher_outputs import StoredOutputs
from compression.train import Hardware, TrainConfig
from compression.types import Batch
from compression.zoo import DepthwiseCnn, PlainCnn, ResidualCnn, VisionTransformer
from export.onnx_graph import to_onnx
from tests.compression.losses.short_training import SHIFT, Stop, assert_same, one_thread, stop_at, stored
from tests.compression.tiny_data import tiny_dataset

TRAIN = TrainConfig(epochs=3, batch_size=16, learning_rate=0.02, checkpoint_every_steps=2)
COMMON = {"train": TRAIN, "widths": (0.5,), "round_to": 4}
PLAIN = PlainCnn(widths=(16, 16), depths=(1, 2), strides=(2, 2), stem_width=8)
VIT = VisionTransformer(width=16, depth=2, num_heads=2, patch_size=4, stem_width=8)
SPACES = {
    "residual": Subnets(
        base=ResidualCnn(widths=(8, 16), depths=(1, 3), strides=(2, 1), stem_width=8),
        depths=((1,), (1, 2)),
        stem_widths=(0.5,),
        **COMMON,
    ),
    "residual-tied": Subnets(
        base=ResidualCnn(widths=(8, 8), depths=(2, 1), strides=(2, 1), stem_width=8), depths=((1,), (1,)), **COMMON
    ),
    "plain": Subnets(base=PLAIN, depths=((1,), (1,)), **COMMON),
    "depthwise": Subnets(
        base=DepthwiseCnn(widths=(8, 8, 16), depths=(2, 2, 1), strides=(1, 2, 1), stem_width=8),
        depths=((1,), (1,), (1,)),
        **COMMON,
    ),
    "transformer": Subnets(base=VIT, depths=((1,),), stem_widths=(0.5,), heads=(1,), mlp_ratios=(1.0,), **COMMON),
}


@pytest.fixture(scope="module")
def data() -> Dataset:
    return tiny_dataset()


@pytest.fixture(scope="module")
def panel(data, tmp_path_factory) -> list[StoredOutputs]:
    return [stored(data, tmp_path_factory.mktemp("teacher"), width=8, seed=1)]


@pytest.fixture(params=SPACES, scope="module")
def space(request) -> Subnets:
    return SPACES[request.param]


def images_of(count: int = 5) -> torch.Tensor:
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def shop_of(data: Dataset, panel, folder: Path, *, seed: int = 0, parents=None, on_step=None, losses=None) -> Workshop:
    def start_training(model: nn.Module, train: TrainConfig, checkpoints: Path) -> Training:
        return Training(
            student=model,
            panel=panel,
            teachers=(),
            dataset=data,
            config=DistillConfig(train=train, losses=losses or (CrossEntropy(), Kd()), views=2),
            seed=seed,
            augment=SHIFT,
            hardware=Hardware(accelerator="cpu"),
            checkpoint_dir=checkpoints,
            on_step=on_step,
        )

    return Workshop(parents or {}, data, seed, folder, start_training)


def untrained(data: Dataset, space: Subnets, *, seed: int = 0) -> Supernet:
    """A supernet, eval mode, with weights and batch-norm statistics that differ from channel to channel."""
    template = Workshop({}, data, 0, Path("nowhere")).template()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        full = build_model(space.spec({}, template))
        for module in full.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.2, 1.8)
                nn.init.normal_(module.bias, 0, 0.2)
                module.running_mean.normal_(0, 0.2)
                module.running_var.uniform_(0.5, 1.5)
    return Supernet(full, lambda choices: space.spec(choices, template)).eval()


def smallest(space: Subnets) -> dict:
    return {gene: values[0] for gene, values in space.options.items()}


def some_choices(space: Subnets, count: int = 4) -> list[dict]:
    return list(sandwich(space.options, count=count, seed=0, epoch=0, step=0).values())


# --- one set of weights


def test_the_largest_network_is_the_supernet(data, space):
    supernet = untrained(data, space)
    with torch.no_grad():
        expected = supernet(images_of())
        supernet.active = {gene: values[-1] for gene, values in space.options.items()}
        assert torch.equal(supernet(images_of()), expected)
        assert torch.equal(supernet.extract(supernet.active)[0](images_of()), expected)


def test_a_part_computes_what_it_computes_alone(data, space):
    supernet = untrained(data, space)
    for choices in some_choices(space):
        alone, spec = supernet.extract(choices)
        supernet.active = choices
        with torch.no_grad():
            torch.testing.assert_close(supernet(images_of()), alone(images_of()), rtol=0, atol=1e-6)
            with batch_statistics(alone):
                expected = alone(images_of())
            supernet.train()
            torch.testing.assert_close(supernet(images_of()), expected, rtol=0, atol=1e-6)
            supernet.eval()
        assert build_model(spec).state_dict().keys() == alone.state_dict().keys()


def test_small_networks_differ_from_each_other_and_are_smaller(data, space):
    supernet = untrained(data, space)
    sizes = {
        gene: profile.params(supernet.extract(smallest(space) | {gene: space.options[gene][-1]})[0])
        for gene in space.options
    }
    least = profile.params(supernet.extract(smallest(space))[0])
    assert all(size > least for size in sizes.values()), sizes


def test_running_a_part_leaves_the_statistics_alone(data):
    supernet = untrained(data, SPACES["residual"]).train()
    before = {name: buffer.clone() for name, buffer in supernet.named_buffers()}
    supernet.active = smallest(SPACES["residual"])
    supernet(images_of())
    assert_same(before, dict(supernet.named_buffers()))


def test_gradients_of_a_small_network_reach_its_part_alone(data, space):
    supernet = untrained(data, space).train()
    supernet.active = smallest(space)
    supernet(images_of()).square().sum().backward()
    touched = {name: parameter.grad for name, parameter in supernet.full.named_parameters()}
    spec = space.spec(smallest(space), supernet.spec_of({}))
    places = {role: number for number, role in enumerate(block_roles(space.base))}
    inside = dict.fromkeys(touched, 0)
    for name, parameter in build_model(spec).named_parameters():
        if name.startswith("blocks."):
            _, number, rest = name.split(".", 2)
            name = f"blocks.{places[block_roles(spec.model)[int(number)]]}.{rest}"
        part = leading(touched[name], parameter.shape, parts=3 if "attn.qkv." in name else 1)
        inside[name] = int(part.count_nonzero())
    for name, gradient in touched.items():
        assert (0 if gradient is None else int(gradient.count_nonzero())) == inside[name], name
    assert sum(inside.values()) > 0


def test_queries_keys_and_values_lose_the_same_rows():
    stack = torch.arange(12.0).reshape(12, 1)
    assert leading(stack, (6, 1), parts=3).flatten().tolist() == [0, 1, 4, 5, 8, 9]


def test_blocks_are_matched_by_stage_and_place():
    tall, low = (
        DepthwiseCnn(widths=(8, 8), depths=depths, strides=(1, 2), stem_width=8) for depths in ((3, 2), (1, 1))
    )
    assert block_roles(tall) == [
        (0, 0, "block"),
        (0, 1, "block"),
        (0, 2, "block"),
        (1, 0, "entry"),
        (1, 0, "block"),
        (1, 1, "block"),
    ]
    assert block_roles(low) == [(0, 0, "block"), (1, 0, "entry"), (1, 0, "block")]


# --- what there is to choose


def test_genes_are_widths_and_depths_of_stages_that_can_differ(data, panel, tmp_path):
    shop = shop_of(data, panel, tmp_path)
    assert SPACES["residual"].genes(shop) == {
        "width_0": (4, 8),
        "width_1": (8, 16),
        "depth_1": (1, 2, 3),
        "stem": (4, 8),
    }
    assert SPACES["residual-tied"].genes(shop) == {"width_0": (4, 8), "depth_0": (1, 2)}
    assert SPACES["depthwise"].genes(shop) == {
        "width_0": (4, 8),
        "depth_0": (1, 2),
        "width_1": (4, 8),
        "depth_1": (1, 2),
        "width_2": (8, 16),
    }
    assert SPACES["transformer"].genes(shop) == {
        "width": (8, 16),
        "depth": (1, 2),
        "heads": (1, 2),
        "mlp_ratio": (1.0, 2.0),
        "stem": (4, 8),
    }


def test_the_step_trains_both_ends_and_random_ones_that_depend_on_where_it_is():
    genes = SPACES["residual"].options
    picks = sandwich(genes, count=2, seed=0, epoch=0, step=0)
    assert list(picks) == ["largest", "smallest", "random_1", "random_2"]
    assert picks["largest"] == {"width_0": 8, "width_1": 16, "depth_1": 3, "stem": 8}
    assert picks["smallest"] == {"width_0": 4, "width_1": 8, "depth_1": 1, "stem": 4}
    assert picks == sandwich(genes, count=2, seed=0, epoch=0, step=0)
    places = [(seed, epoch, step) for seed in range(2) for epoch in range(3) for step in range(8)]
    drawn = [sandwich(genes, count=1, seed=s, epoch=e, step=t)["random_1"] for s, e, t in places]
    for gene, values in genes.items():
        assert Counter(pick[gene] for pick in drawn).keys() == set(values)
    assert drawn[:24] != drawn[24:], "seeds differ"
    assert drawn[:8] != drawn[8:16], "epochs differ"
    assert any(pick != drawn[0] for pick in drawn[:8]), "steps differ"


def test_a_step_runs_the_supernet_once_for_each_size(data):
    space = SPACES["plain"]
    supernet = untrained(data, space).train()
    sizes = []

    def inner(model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        sizes.append(supernet.active)
        return {"a": model(batch.images).square().mean(), "b": torch.tensor(1.0)}

    batch = Batch(images_of(), torch.arange(5) % 4, torch.arange(5), view=0, epoch=1, step=2)
    terms = SandwichStep(supernet, inner, space.options, count=3, seed=7)(supernet, batch)
    picks = sandwich(space.options, count=3, seed=7, epoch=1, step=2)
    assert sizes == [None, *list(picks.values())[1:]]
    assert list(terms) == list(picks)
    supernet.active = picks["smallest"]
    torch.testing.assert_close(terms["smallest"], (supernet(batch.images).square().mean() + 1) / 5)


# --- relations


def test_relations_are_scaled_products_within_each_head():
    qkv = torch.randn(2, 3, 3 * 8, generator=torch.Generator().manual_seed(0))
    found = relations(qkv, heads=2)
    assert found.shape == (3, 2, 2, 3, 3)
    keys = qkv[1, :, 8:16][:, 4:]
    torch.testing.assert_close(found[1, 1, 1], keys @ keys.T / 2)


def test_relation_loss_is_zero_for_equal_relations_and_counts_no_split_of_the_student():
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(2, 5, 3 * 8, generator=generator)
    assert relation_loss(teacher, teacher, heads=4) == 0
    turn = torch.linalg.qr(torch.randn(2, 2, generator=generator))[0]
    turned = (teacher.reshape(2, 5, 12, 2) @ turn).reshape(2, 5, 24)
    torch.testing.assert_close(relation_loss(turned, teacher, heads=4), torch.tensor(0.0), atol=1e-6, rtol=0)
    narrow = torch.randn(2, 5, 3 * 4, generator=generator, requires_grad=True)
    wide = teacher.clone().requires_grad_(True)
    loss = relation_loss(narrow, wide, heads=4)
    by_hand = sum((relations(narrow, 4)[i] - relations(wide, 4)[i]).square().mean() for i in range(3))
    torch.testing.assert_close(loss, by_hand)
    loss.backward()
    assert wide.grad is None
    assert narrow.grad.abs().sum() > 0


def test_every_size_learns_the_relations_of_the_parent(data):
    space = SPACES["transformer"]
    teacher = untrained(data, space, seed=5).full
    supernet = untrained(data, space).train()
    supernet.keeps_qkv = True
    step = SandwichStep(
        supernet,
        lambda model, batch: {"nothing": model(batch.images).sum() * 0.0},
        space.options,
        count=0,
        seed=0,
        teacher=teacher,
        weight=5.0,
    )
    optimizer = torch.optim.Adam(supernet.parameters(), lr=0.01)
    batch = Batch(images_of(), torch.arange(5) % 4, torch.arange(5), view=0, epoch=0, step=0)
    curve = []
    for _ in range(12):
        terms = step(supernet, batch)
        optimizer.zero_grad()
        sum(terms.values()).backward()
        optimizer.step()
        curve.append({name: term.item() for name, term in terms.items()})
    for name in ("largest", "smallest"):
        assert curve[-1][name] < 0.7 * curve[0][name]
    assert supernet.active is None


def test_features_have_no_fixed_width_so_losses_on_them_are_left_out():
    assert logit_losses((CrossEntropy(), Kd(), Dhkd())) == (CrossEntropy(), Kd())
    assert logit_losses((NormalisedFeatures(),)) == (Kd(temperature=2.0),)


# --- training and candidates


def test_training_teaches_the_smallest_network_too_and_is_done_once(data, panel, tmp_path):
    space, steps = SPACES["plain"], []
    with one_thread():
        shop = shop_of(data, panel, tmp_path, on_step=lambda done, total: steps.append(done))
        start = untrained(data, space).extract(smallest(space))[0]
        small, spec = space.build(smallest(space), shop)
        assert steps == list(range(1, 13))
        gain = [evaluate(model, data.validation, data.preprocessing).nll for model in (start, small)]
        assert gain[1] < gain[0] - 0.1
        again = shop_of(data, panel, tmp_path, on_step=lambda done, total: steps.append(done))
        for choices in (*some_choices(space), smallest(space)):
            model, _ = space.build(choices, again)
        assert len(steps) == 12, "a second process finds the trained supernet"
        assert_same(small.state_dict(), model.state_dict())
        assert not list((tmp_path / "steps").glob("*"))
        other = space.build(smallest(space), shop_of(data, panel, tmp_path / "other", seed=1))[0]
    assert not torch.equal(small.head.weight, other.head.weight)
    assert not small.training
    assert all(parameter.requires_grad for parameter in small.parameters())
    assert spec.model == space.spec(smallest(space), shop.template()).model


def test_a_killed_training_goes_on_to_the_same_bits(data, panel, tmp_path):
    space = SPACES["plain"]
    with one_thread():
        whole, _ = space.build(smallest(space), shop_of(data, panel, tmp_path / "whole"))
        with pytest.raises(Stop):
            space.build(smallest(space), shop_of(data, panel, tmp_path / "killed", on_step=stop_at(7)))
        done = []
        rest = shop_of(data, panel, tmp_path / "killed", on_step=lambda step, total: done.append(step))
        resumed, _ = space.build(smallest(space), rest)
    assert done[0] == 7
    assert_same(whole.state_dict(), resumed.state_dict())


@pytest.mark.parametrize("name", ["residual", "transformer"])
def test_candidates_are_built_again_and_stored_and_exported(name, data, panel, tmp_path):
    space = SPACES[name].model_copy(update={"train": TrainConfig(epochs=1, batch_size=32), "parent": "parent"})
    if name == "transformer":
        space = space.model_copy(update={"relations": 1.0})
    teacher = untrained(data, space)
    parent = (teacher.full.train(), teacher.spec_of({}))
    before = {key: tensor.clone() for key, tensor in parent[0].state_dict().items()}
    torch.manual_seed(3)
    random_state = torch.get_rng_state()
    shop = shop_of(data, panel, tmp_path / "shop", parents={"parent": parent})
    space.genes(shop)
    choices = smallest(space) | ({"heads": 2} if name == "transformer" else {})
    model, spec = space.build(choices, shop)
    again, spec_again = space.build(choices, shop)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert_same(before, parent[0].state_dict())
    assert parent[0].training
    assert all(parameter.requires_grad for parameter in parent[0].parameters())
    assert spec == spec_again
    assert_same(model.state_dict(), again.state_dict())
    assert bool(spec.edits) == (name == "transformer"), "2 heads of 8 beside tokens of 8 are no zoo network"
    save_checkpoint(model, spec, tmp_path / "kept")
    loaded, _ = load_checkpoint(tmp_path / "kept")
    with torch.no_grad():
        expected = model(images_of())
        assert torch.equal(loaded(images_of()), expected)
    import onnxruntime

    for fast in (True, False) if spec.edits else (True,):
        path = tmp_path / f"{fast}.onnx"
        to_onnx(model, path, input_shape=(1, 8, 8), metadata={}, fast=fast)
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        found = session.run(None, {"images": images_of().numpy()})[0]
        torch.testing.assert_close(torch.from_numpy(found), expected, rtol=0, atol=1e-4)


def test_statistics_are_those_of_the_candidate_itself(data, panel, tmp_path):
    space = SPACES["plain"].model_copy(update={"train": TrainConfig(epochs=1, batch_size=32), "norm_images": 64})
    model, _ = space.build(smallest(space), shop_of(data, panel, tmp_path))
    images = data.train.images / 255.0
    images = (images - data.preprocessing.mean[0]) / data.preprocessing.std[0]
    with torch.no_grad():
        before_norm = model.stem[0](images)
    torch.testing.assert_close(model.stem[1].running_mean, before_norm.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("larger", [False, True], ids=["same", "deeper-and-wider"])
def test_the_start_is_the_parents_leading_part(larger, data, panel, tmp_path):
    parent = untrained(data, SPACES["transformer"]).full
    spec = untrained(data, SPACES["transformer"]).spec_of({})
    base = VIT.model_copy(update={"width": 8, "depth": 1, "num_heads": 1}) if larger else VIT
    space = Subnets(base=base, parent="vit", mlp_ratios=(1.0,), **COMMON)
    shop = shop_of(data, panel, tmp_path, parents={"vit": (parent, spec)})
    start, _ = space._start(shop)
    if not larger:
        assert_same(start.state_dict(), parent.state_dict())
    assert torch.equal(start.blocks[0].attn.qkv.weight[:8], parent.blocks[0].attn.qkv.weight[:8, : base.width])
    assert torch.equal(start.blocks[0].norm1.weight, parent.blocks[0].norm1.weight[: base.width])


def test_a_whole_search_looks_at_inherited_accuracy_and_never_trains_the_supernet_again(data, panel, tmp_path):
    steps: list[int] = []
    base = shop_of(data, panel, tmp_path, on_step=lambda done, total: steps.append(done))
    space = SPACES["plain"].model_copy(update={"train": TrainConfig(epochs=1, batch_size=16)})
    config = Study(
        spaces=(space,), trials=4, train=TrainConfig(epochs=1), filter=Inherited(keep=0.5, first=2), finalists=1
    )

    def train_trial(model: nn.Module, number: int, folder: Path, on_epoch: Callable[[float], None]) -> Score:
        return Score(evaluate(model, data.validation, data.preprocessing).accuracy)

    result = run_study(
        config,
        parents={},
        dataset=data,
        seed=0,
        latency=lambda model: Latency(profile.params(model) / 1e4),
        train_trial=train_trial,
        start_training=base.start_training,
        storage=tmp_path / "study.db",
        folder=tmp_path / "trials",
    )
    complete = [trial for trial in result.trials if trial.state == "complete"]
    assert len(complete) == 4
    assert all(trial.score == trial.accuracy for trial in complete), "nothing was trained between look and score"
    assert {trial.space for trial in complete} == {"subnets-plain_cnn"}
    assert len(steps) == 4
    model, _ = load_checkpoint(result.finalists[0])
    assert profile.params(model) == result.chosen[0].params


def test_inherited_accuracy_is_looked_at_in_the_named_spaces_alone(data):
    model = untrained(data, SPACES["plain"]).full
    spec = untrained(data, SPACES["plain"]).spec_of({})
    shop = Workshop({}, data, 0, Path("nowhere"))
    row = TrialResult(0, "subnets-plain_cnn-2", {}, "complete")
    expected = evaluate(model, data.validation, data.preprocessing).accuracy
    assert Inherited().score(model, spec, row, [], shop) == pytest.approx(expected)
    assert Inherited(spaces=("prune", "subnets")).score(model, spec, row, [], shop) == pytest.approx(expected)
    assert Inherited(spaces=("prune",)).score(model, spec, row, [], shop) is None


# --- refusals


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"base": PLAIN, "heads": (1,)}, "heads is set and base is 'plain_cnn'"),
        ({"base": PLAIN, "depths": ((1,),)}, "depths has 1 entries, expected 2"),
        ({"base": PLAIN, "depths": ((1,), (3,))}, r"depths\[1\] has 3, expected at most the 2"),
        ({"base": VIT, "heads": (4,)}, "heads has 4, expected at most the 2"),
        ({"base": VIT, "mlp_ratios": (3.0,)}, "mlp_ratios has 3.0, expected at most the 2.0"),
        ({"base": VIT, "relations": 1.0}, "relations is above 0, expected a vision_transformer as base and a parent"),
        (
            {"base": VIT.model_copy(update={"stem": "patch"}), "stem_widths": (0.5,)},
            "stem_widths is set and the stem of base is 'patch'",
        ),
    ],
    ids=lambda value: value.split(",")[0] if isinstance(value, str) else "",
)
def test_what_does_not_fit_the_family_is_refused(fields, message):
    with pytest.raises(ValidationError, match=message):
        Subnets(**({"train": TRAIN} | fields))


def test_refusals_before_anything_is_trained(data, panel, tmp_path):
    plain = (untrained(data, SPACES["plain"]).full, untrained(data, SPACES["plain"]).spec_of({}))
    vit = (untrained(data, SPACES["transformer"]).full, untrained(data, SPACES["transformer"]).spec_of({}))
    shop = shop_of(data, panel, tmp_path, parents={"plain": plain, "vit": vit})
    for space, message in (
        (Subnets(base=PLAIN, train=TRAIN, parent="missing"), "parent 'missing'"),
        (Subnets(base=PLAIN, train=TRAIN, parent="vit"), "kind 'vision_transformer', expected 'plain_cnn'"),
        (Subnets(base=PLAIN, train=TRAIN, widths=()), "has 1 network"),
        (
            Subnets(base=VIT.model_copy(update={"patch_size": 2}), train=TRAIN, parent="vit", relations=1.0),
            "has 4 tokens, expected 16",
        ),
        (
            Subnets(
                base=VisionTransformer(width=15, depth=1, num_heads=3, patch_size=4),
                train=TRAIN,
                parent="vit",
                relations=1.0,
            ),
            "2 heads, which do not divide the 15 queries",
        ),
    ):
        with pytest.raises(CompressionError, match=message):
            space.genes(shop)
    with pytest.raises(CompressionError, match="no way to train its supernet"):
        SPACES["plain"].genes(Workshop({}, data, 0, tmp_path))
    with pytest.raises(CompressionError, match="depth_1 None, expected one of 1, 2"):
        SPACES["plain"].build({"width_0": 8, "width_1": 8}, shop)
    with pytest.raises(CompressionError, match="width_0 12, expected one of 8, 16"):
        SPACES["plain"].build(smallest(SPACES["plain"]) | {"width_0": 12}, shop)
