"""TAS: the sampling, the interpolation, the costs, what is derived, and searches that are killed and repeated."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

from compression import profile
from compression.checkpoint import load_checkpoint, save_checkpoint
from compression.distill import CrossEntropy, DistillConfig, Kd
from compression.distill.procedures.training import Training
from compression.errors import CompressionError
from compression.models import ModelSpec, ResizeModule, build_model
from compression.search import Scale, Study
from compression.search.candidate import digest_of
from compression.search.scale import fresh_model
from compression.search.space import Operator, Workshop
from compression.search.study import run_study
from compression.search.tas import Tas
from compression.search.tas.plan import (
    Plan,
    convolutions,
    cost_loss,
    cost_of_choices,
    cost_tables,
    depth_options,
    derived_spec,
    expected_cost,
    keep_probabilities,
    macs_of,
    plan_of,
    walk_down,
    width_options,
)
from compression.search.tas.space import halves
from compression.search.tas.supernet import (
    Architect,
    Supernet,
    gumbel,
    hand_down,
    interpolate_channels,
    sample_two,
)
from compression.search.trials import Latency, Score
from compression.train import Hardware, TrainConfig
from compression.zoo import PlainCnn, ResidualCnn, VisionTransformer
from export.onnx_graph import to_onnx
from tests.compression.losses.short_training import SHIFT, Stop, one_thread, stop_at, stored
from tests.compression.tiny_data import CLASSES, tiny_dataset

RATIOS = (0.25, 0.5, 0.75, 1.0)
RESIDUAL = ResidualCnn(stem_width=8, widths=(8, 16, 16), depths=(3, 1, 2), strides=(1, 1, 2))
"""Its stem and first stage share a width; the second stage has a projection that may become an identity."""
PLAIN = PlainCnn(stem_width=8, widths=(8, 12), depths=(2, 3), strides=(2, 1))
BASES = pytest.mark.parametrize("base", [RESIDUAL, PLAIN], ids=["residual", "plain"])
SMALL = ResidualCnn(stem_width=4, widths=(8,), depths=(2,), strides=(2,))
TRAIN = TrainConfig(epochs=2, batch_size=8, learning_rate=0.01, checkpoint_every_steps=3)
SHORT = TRAIN.model_copy(update={"epochs": 1})
DATASET = tiny_dataset()


class Clock:
    """A latency model by which every operator costs something for itself and something for its arithmetic."""

    batch = 1

    def __init__(self, scale: float = 1.0) -> None:
        self.scale, self.calls = scale, 0

    def predict_ms(self, model, input_shape) -> float:
        return profile.macs(model, input_shape) / 1e6

    def operators_ms(self, operators) -> list[float]:
        self.calls += 1
        return [self.scale * (0.01 + macs / 1e5) for macs in macs_of(operators)]


def plan_for(base: ResidualCnn | PlainCnn) -> Plan:
    return plan_of(base, (1, 8, 8), len(CLASSES), ratios=RATIOS, round_to=2)


def space(**changes) -> Tas:
    fields = {"base": SMALL, "ratios": RATIOS, "round_to": 2, "targets": (0.5,), "cost": "macs", "train": SHORT}
    return Tas(**(fields | {"rate": 0.05} | changes))


@pytest.fixture(scope="module")
def panel(tmp_path_factory):
    return [stored(DATASET, tmp_path_factory.mktemp("outputs"), width=6, seed=1)]


@pytest.fixture
def shop_of(panel):
    def shop(folder: Path, *, on_step=None, **changes) -> Workshop:
        def start(model, train, steps) -> Training:
            return Training(
                student=model,
                panel=panel,
                teachers=(),
                dataset=DATASET,
                config=DistillConfig(train=train, losses=(CrossEntropy(), Kd()), views=2).plain(train),
                seed=0,
                augment=SHIFT,
                hardware=Hardware(accelerator="cpu"),
                checkpoint_dir=steps,
                on_step=on_step,
            )

        fields = {"parents": {}, "dataset": DATASET, "seed": 0, "folder": folder, "start_training": start}
        return Workshop(**(fields | changes))

    return shop


def template() -> ModelSpec:
    return Workshop({}, DATASET, 0, Path("unused")).template()


def random_choices(plan: Plan, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return [int(torch.randint(0, count, (), generator=generator)) for count in plan.sizes]


def supernet_of(plan: Plan, seed: int = 0) -> Supernet:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Supernet(plan)


def prefer(supernet: Supernet, chosen: list[int], strength: float = 30.0) -> None:
    with torch.no_grad():
        supernet.choices.zero_()
        for row, place in zip(supernet.rows(), chosen, strict=True):
            row[place] = strength


def batch_of(count: int = 4, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


# --- interpolation and sampling


@pytest.mark.parametrize(("channels", "width"), [(8, 4), (6, 8), (5, 12), (12, 5), (1, 3)])
def test_interpolation_is_average_pooling_over_channels(channels, width):
    images = torch.randn(2, channels, 3, 4, generator=torch.Generator().manual_seed(0))
    expected = torch.nn.functional.adaptive_avg_pool3d(images, (width, 3, 4))
    found = interpolate_channels(images, width)
    torch.testing.assert_close(found, expected)
    constant = torch.full((1, channels, 2, 2), 1.7)
    torch.testing.assert_close(interpolate_channels(constant, width), torch.full((1, width, 2, 2), 1.7))


def test_interpolation_to_half_the_width_preserves_the_mean_of_channels():
    images = torch.randn(2, 12, 3, 3, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(interpolate_channels(images, 6).mean(1), images.mean(1))


@pytest.mark.parametrize("tau", [5.0, 0.1, 0.001])
def test_two_different_options_are_drawn_and_their_weights_sum_to_1(tau):
    logits = torch.tensor([0.0, 3.0, -1.0, 0.5], requires_grad=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for _ in range(20):
            options, weights = sample_two(logits, gumbel(4), tau)
            assert len(set(options)) == 2
            assert float(weights.detach().sum()) == pytest.approx(1.0)
    (gradient,) = torch.autograd.grad(weights[0], [logits])
    untouched = [place for place in range(4) if place not in options]
    torch.testing.assert_close(gradient[untouched], torch.zeros(2), msg="through the weights of the two alone")
    assert tau < 1 or float(gradient.abs().max()) > 0


def test_draws_follow_the_probabilities_and_one_option_comes_alone():
    logits = torch.tensor([2.0, 0.0, 0.0])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        drawn = [sample_two(logits, gumbel(3), 1.0)[0][0] for _ in range(500)]
        assert sample_two(torch.zeros(1), gumbel(1), 0.1) == ([0], torch.ones(1))
    assert drawn.count(0) > 250 > drawn.count(1) + drawn.count(2)


# --- choices and costs


def test_options_are_multiples_and_end_with_the_whole():
    assert width_options(32, (0.3, 0.5, 0.55, 1.0), 8) == (8, 16, 32)
    assert width_options(20, (0.5,), 8) == (8, 20)
    assert width_options(4, (0.3, 1.0), 8) == (4,)
    assert [depth_options(count) for count in (1, 2, 3, 6)] == [(1,), (1, 2), (1, 3), (1, 3, 5, 6)]


def test_probability_of_a_block_is_1_at_the_first_and_does_not_increase():
    depth = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    found = keep_probabilities(depth, (1, 3, 4))
    assert found.tolist() == pytest.approx([1.0, 0.8, 0.8, 0.5])


@BASES
def test_cost_of_a_network_is_what_the_profile_counts(base):
    plan = plan_for(base)
    tables = cost_tables(plan, macs_of)
    whole = profile.macs(base.build(len(CLASSES), (1, 8, 8)), (1, 8, 8))
    assert cost_of_choices(plan, tables, [count - 1 for count in plan.sizes]) == 1.0
    for seed in range(12):
        chosen = random_choices(plan, seed)
        derived = build_model(derived_spec(plan, chosen, template()))
        assert profile.macs(derived, (1, 8, 8)) == round(whole * cost_of_choices(plan, tables, chosen)), chosen


@BASES
def test_expected_cost_is_the_mean_over_networks_drawn(base):
    plan = plan_for(base)
    tables = cost_tables(plan, Clock().operators_ms)
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(count, generator=generator, dtype=torch.float64).softmax(0) for count in plan.sizes]
    draws = torch.stack([row.multinomial(200, replacement=True, generator=generator) for row in rows], dim=1)
    costs = torch.tensor([cost_of_choices(plan, tables, draw) for draw in draws.tolist()])
    error = 4 * float(costs.std()) / len(costs) ** 0.5
    assert float(expected_cost(plan, tables, rows)) == pytest.approx(float(costs.mean()), abs=error)


def test_a_latency_model_is_asked_once_for_all_operators_of_the_grid():
    seen: list[Operator] = []
    plan = plan_of(SMALL, (1, 8, 8), 4, ratios=(0.5, 1.0), round_to=4)

    def cost_of(operators):
        seen.extend(operators)
        return [1.0] * len(operators)

    tables = cost_tables(plan, cost_of)
    kinds = [each.kind for each in seen]
    assert [tuple(table.shape) for table in tables] == [(1, 1), *[(1, 2), (2, 2), (1, 2)], *[(2, 2)] * 3, (2, 1)]
    assert (kinds.count("Add"), kinds.count("Gemm")) == (2 + 4, 2)
    assert Operator("Conv", 4, 8, 4, 4, kernel=1, stride=2) in seen, "the projection"
    assert Operator("Gemm", 8, 4, 1, 1) in seen


@BASES
def test_gradient_of_the_expected_cost_reaches_every_choice(base):
    plan = plan_for(base)
    supernet, tables = supernet_of(plan), cost_tables(plan, macs_of)
    expected_cost(plan, tables, [row.double().softmax(0) for row in supernet.rows()]).backward()
    for row, options in zip(supernet.choices.grad.split(plan.sizes), plan.options, strict=True):
        assert len(options) == 1 or bool((row != 0).all())


def test_cost_loss_pushes_down_above_the_target_up_far_below_it_and_rests_between():
    expected = torch.tensor(0.6)
    loss = {found: cost_loss(expected, found, target=0.5, slack=0.05) for found in (0.51, 0.5, 0.46, 0.44)}
    assert float(loss[0.5]) == float(loss[0.46]) == 0.0
    assert float(loss[0.51]) == pytest.approx(np.log(0.6))
    assert float(loss[0.44]) == pytest.approx(-np.log(0.6))


@pytest.mark.parametrize(("target", "direction"), [(0.15, -1.0), (0.8, 1.0)], ids=["down", "up"])
def test_the_cost_alone_moves_the_choices_to_the_target(target, direction):
    plan = plan_for(RESIDUAL)
    supernet, tables = supernet_of(plan), cost_tables(plan, macs_of)

    def expected() -> float:
        return float(expected_cost(plan, tables, [row.detach().double().softmax(0) for row in supernet.rows()]))

    before = expected()
    architect = Architect(plan, tables, target=target, tolerance=0.1, cost_weight=2.0, rate=0.02, weight_decay=0.0)
    for _ in range(40):
        architect.learn(supernet, torch.zeros(()))
    assert (expected() - before) * direction > 0.005
    prefer(supernet, [0] * len(plan.sizes))
    assert not target - 0.1 <= architect.look(supernet) <= target
    architect.settle(supernet)
    found = cost_of_choices(plan, tables, supernet.likeliest())
    assert target - 0.1 <= found <= target, "the last choices on target are taken"


def test_walking_down_gives_up_the_least_likely_first_and_stops_at_the_target():
    probabilities = [torch.tensor([0.1, 0.9]).log(), torch.tensor([0.4, 0.6]).log(), torch.tensor([0.45, 0.55]).log()]

    def cost(places):
        return 0.3 * places[0] + 0.3 * places[1] + 0.1 + 0.0 * places[2]

    assert walk_down([1, 1, 1], probabilities, cost, 0.7) == [1, 1, 1]
    assert walk_down([1, 1, 1], probabilities, cost, 0.5) == [1, 0, 1], "an exchange that saves nothing waits"
    assert walk_down([1, 1, 1], probabilities, cost, 0.1) == [0, 0, 1]
    uneven = walk_down([1, 1], probabilities, lambda places: 0.1 + 0.6 * places[0] + 0.2 * places[1], 0.5)
    assert uneven == [0, 1], "the first exchange, of the less likely, is not needed once the second is made"
    with pytest.raises(CompressionError, match=r"at least 0\.1"):
        walk_down([1, 1, 1], probabilities, cost, 0.05)


# --- supernet and derived networks


@BASES
def test_likeliest_network_of_the_supernet_is_the_derived_one(base):
    plan = plan_for(base)
    supernet = supernet_of(plan)
    supernet.train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        supernet(batch_of(16, 1))  # batch norms have seen something
    for seed in range(6):
        chosen = random_choices(plan, seed)
        prefer(supernet, chosen)
        model, _ = fresh_model(derived_spec(plan, chosen, template()), 0)
        hand_down(supernet, model, convolutions(plan, chosen))
        with torch.no_grad():
            torch.testing.assert_close(supernet.eval()(batch_of()), model(batch_of()))


def test_a_strongly_preferred_width_and_depth_is_derived():
    plan = plan_for(RESIDUAL)
    supernet = supernet_of(plan)
    chosen = [1] * len(plan.widths) + [1, 0, 0]
    prefer(supernet, chosen)
    assert supernet.likeliest() == chosen
    spec = derived_spec(plan, supernet.likeliest(), template())
    assert (spec.model.stem_width, spec.model.widths, spec.model.depths) == (4, (4, 8, 8), (3, 1, 1))
    assert spec.edits == ()
    inner = plan.stages[0][1].inner
    spec = derived_spec(plan, [0 if row == inner else place for row, place in enumerate(chosen)], template())
    assert {edit.module for edit in spec.edits} == {"blocks.1.first.0", "blocks.1.first.1", "blocks.1.second.0"}


@BASES
def test_training_mode_mixes_and_its_gradient_reaches_choices_and_weights(base):
    supernet = supernet_of(plan_for(base)).train()
    supernet.tau = 2.0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        first, second = supernet(batch_of()), supernet(batch_of())
        assert not torch.equal(first, second)
        (first + second).square().sum().backward()
    for row in supernet.choices.grad.split(supernet.plan.sizes):
        assert len(row) == 1 or float(row.abs().max()) > 0
    missing = [name for name, parameter in supernet.named_parameters() if parameter.grad is None]
    assert all(".norms." in name for name in missing), "only options that were not drawn"


def test_halves_share_no_sample_and_depend_on_the_seed():
    first, second = halves(DATASET, seed=0)
    ids = [set(split.ids.tolist()) for split in (first.train, second)]
    assert not ids[0] & ids[1]
    assert ids[0] | ids[1] == set(DATASET.train.ids.tolist())
    assert set(halves(DATASET, seed=1)[1].ids.tolist()) != ids[1]
    one = replace(DATASET, train=replace(DATASET.train, labels=DATASET.train.labels[:1]))
    with pytest.raises(CompressionError, match="two at least"):
        halves(one, seed=0)


@pytest.mark.parametrize("fast", [True, False], ids=["traced", "exported"])
def test_derived_networks_export(tmp_path, fast):
    plan = plan_of(SMALL, (1, 8, 8), len(CLASSES), ratios=RATIOS, round_to=2)
    spec = derived_spec(plan, [1, 2, 1, 3, 1], template())
    assert spec.edits
    model, _ = fresh_model(spec, 0)
    to_onnx(model, tmp_path / "model.onnx", input_shape=(1, 8, 8), metadata={}, fast=fast)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"images": batch_of().numpy()})
    assert float(np.abs(logits - model(batch_of()).detach().numpy()).max()) < 1e-4


# --- the search


def test_candidates_meet_their_targets_and_are_equal_bit_for_bit_when_built_again(tmp_path, shop_of):
    tas = space(targets=(0.75, 0.3), train=TRAIN, inherit=True, rate=0.2, cost_weight=5.0)
    whole = profile.macs(SMALL.build(len(CLASSES), (1, 8, 8)), (1, 8, 8))
    state = torch.get_rng_state()
    with one_thread():
        shop = shop_of(tmp_path / "a")
        assert tas.genes(shop) == {"target": (0.3, 0.75)}
        found = {target: tas.build({"target": target}, shop) for target in (0.75, 0.3)}
        again, _ = tas.build({"target": 0.3}, shop_of(tmp_path / "b"))
        other, other_spec = tas.build({"target": 0.3}, shop_of(tmp_path / "b", seed=1))
    assert torch.equal(torch.get_rng_state(), state)
    assert not list((tmp_path / "a" / "steps").rglob("*.pt")), "step checkpoints are cleared"
    expected = {}
    for target, (model, spec) in found.items():
        assert not model.training
        assert all(parameter.requires_grad for parameter in model.parameters())
        assert profile.macs(model, spec.input_shape) <= target * whole
        (file,) = (tmp_path / "a").glob(f"*/target-{target}/search.json")
        facts = json.loads(file.read_text())
        assert facts["cost"] * whole == pytest.approx(profile.macs(model, spec.input_shape))
        expected[target] = facts["expected_cost"]
    plan = plan_of(SMALL, (1, 8, 8), 4, ratios=RATIOS, round_to=2)
    rows = [torch.full((count,), 1 / count, dtype=torch.float64) for count in plan.sizes]
    start = float(expected_cost(plan, cost_tables(plan, macs_of), rows))
    assert expected[0.3] < start < expected[0.75]
    model, spec = found[0.3]
    assert digest_of(model, spec) == digest_of(again, spec) != digest_of(other, other_spec)
    save_checkpoint(model, spec, tmp_path / "saved")
    loaded, _ = load_checkpoint(tmp_path / "saved")
    assert torch.equal(loaded(batch_of()), model(batch_of()))
    no_training = shop_of(tmp_path / "a", start_training=None)
    assert digest_of(*tas.build({"target": 0.3}, no_training)) == digest_of(model, spec), "searched once"


def test_a_search_that_was_killed_ends_where_an_unbroken_one_does(tmp_path, shop_of):
    tas = space(targets=(0.4,), train=TRAIN, inherit=True)
    with one_thread():
        unbroken = tas.build({"target": 0.4}, shop_of(tmp_path / "a"))
        with pytest.raises(Stop):
            tas.build({"target": 0.4}, shop_of(tmp_path / "b", on_step=stop_at(5)))
        assert list((tmp_path / "b" / "steps").rglob("*.pt"))
        steps: list[int] = []
        resumed = tas.build({"target": 0.4}, shop_of(tmp_path / "b", on_step=lambda done, _: steps.append(done)))
    assert steps[0] == 4, "goes on after step 3"
    assert digest_of(*resumed) == digest_of(*unbroken)
    facts = [next((tmp_path / name).rglob("search.json")).read_text() for name in "ab"]
    assert facts[0] == facts[1]


def test_fresh_candidates_depend_on_the_seed_alone(tmp_path, shop_of):
    with one_thread():
        model, spec = space().build({"target": 0.5}, shop_of(tmp_path))
    assert digest_of(model, spec) == digest_of(*fresh_model(spec, 0))


def test_latency_is_the_cost_by_default_and_asked_once_for_a_study(tmp_path, shop_of):
    clock = Clock()
    tas = space(cost="latency", targets=(0.6,))
    assert tas.wants_latency_model
    assert not space().wants_latency_model
    assert Tas(base=SMALL).cost == "latency"
    with one_thread():
        shop = shop_of(tmp_path, latency=clock)
        assert tas.genes(shop) == {"target": (0.6,)}
        _, spec = tas.build({"target": 0.6}, shop)
        assert clock.calls == 1
        later = Clock(scale=3.0)
        tas.genes(shop_of(tmp_path, latency=later))
    assert later.calls == 0, "a model that was fitted again does not change what was begun"
    facts = json.loads(next(tmp_path.rglob("search.json")).read_text())
    assert facts["cost"] <= 0.6
    assert spec.model.kind == "residual_cnn"


def test_parent_gives_the_structure_and_stays_as_it_is(tmp_path, shop_of):
    spec = template().model_copy(update={"model": SMALL})
    parent, spec = fresh_model(spec, 5)
    before = digest_of(parent, spec)
    tas = space(base=None, parent="teacher")
    assert (tas.label, tas.parent_name) == ("tas-teacher", "teacher")
    with one_thread():
        shop = shop_of(tmp_path, parents={"teacher": (parent, spec)})
        model, _ = tas.build({"target": 0.5}, shop)
    assert profile.macs(model, (1, 8, 8)) <= 0.5 * profile.macs(parent, (1, 8, 8))
    assert digest_of(parent, spec) == before


def test_a_study_trains_what_the_space_builds(tmp_path, shop_of):
    def train_trial(model, number, folder, on_epoch) -> Score:
        on_epoch(0.5)
        return Score(0.5 + profile.params(model) / 1e6)

    tas = space(targets=(0.3, 0.7))
    study = Study(spaces=(tas, Scale(base=SMALL, widths=(1.0,))), trials=3, train=TrainConfig(epochs=1))
    with one_thread():
        result = run_study(
            study,
            parents={},
            dataset=DATASET,
            seed=0,
            latency=lambda model: Latency(profile.params(model) / 1e4),
            train_trial=train_trial,
            start_training=shop_of(tmp_path).start_training,
            storage=tmp_path / "study.db",
            folder=tmp_path / "trials",
        )
    assert {trial.space for trial in result.trials} == {"tas-residual_cnn", "scale-residual_cnn"}
    assert all(trial.state in ("complete", "duplicate") for trial in result.trials)
    assert load_checkpoint(result.finalists[0])[1].model.kind == "residual_cnn"


# --- refusals


def test_what_cannot_be_searched_is_refused_before_any_training(tmp_path, shop_of):
    shop = shop_of(tmp_path, start_training=None)
    with pytest.raises(CompressionError, match="no latency model"):
        space(cost="latency").genes(shop)
    with pytest.raises(CompressionError, match=r"target 0\.01, expected at least"):
        space(targets=(0.01, 0.5)).genes(shop)
    with pytest.raises(CompressionError, match="1 network"):
        space(base=SMALL.model_copy(update={"depths": (1,)}), ratios=(1.0,), targets=(1.0,)).genes(shop)
    with pytest.raises(CompressionError, match="no choice of target"):
        space().build({}, shop)
    with pytest.raises(CompressionError, match="no way to train"):
        space().build({"target": 0.5}, shop)
    plan = plan_of(SMALL, (1, 8, 8), 4, ratios=RATIOS, round_to=2)
    with pytest.raises(CompressionError, match="not all 0"):
        cost_tables(plan, lambda operators: [0.0] * len(operators))
    for fields, found in (({}, "neither"), ({"base": SMALL, "parent": "teacher"}, "base and parent")):
        with pytest.raises(ValueError, match=found):
            Tas(**fields)


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"model": VisionTransformer()}, "kind 'vision_transformer'"),
        (
            {"edits": (ResizeModule(module="head", in_features=8, out_features=4),)},
            "kind 'residual_cnn' with edits",
        ),
    ],
    ids=["transformer", "pruned"],
)
def test_parents_of_another_structure_are_refused(tmp_path, shop_of, changes, found):
    spec = template().model_copy(update={"model": SMALL} | changes)
    shop = shop_of(tmp_path, parents={"teacher": (torch.nn.Identity(), spec)})
    with pytest.raises(CompressionError, match=found):
        space(base=None, parent="teacher").genes(shop)
