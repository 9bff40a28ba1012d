"""Pruning as a space of a study: targets, stages, steps with distillation, order, and what a winner needs to run."""

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from compression import profile
from compression.augment import ShiftFlip
from compression.checkpoint import load_checkpoint, save_checkpoint
from compression.data.dataset import Dataset
from compression.distill import CrossEntropy, DistillConfig, Kd
from compression.distill.procedures.training import Training
from compression.errors import CompressionError
from compression.models import ModelSpec, build_model
from compression.search import Prune
from compression.search.prune import prune_model, survey_of
from compression.search.space import Workshop
from compression.teacher_outputs import OutputsSpec, StoredOutputs, write_teacher_outputs
from compression.train import Hardware, TrainConfig
from compression.zoo import DepthwiseCnn, Mixer, PlainCnn, ResidualCnn, TimmModel, VisionTransformer
from tests.compression.test_study import config_of, search
from tests.compression.tiny_data import CLASSES, tiny_dataset

SHIFT = ShiftFlip(pad=1, flip=False)
BETWEEN = TrainConfig(epochs=2, batch_size=16, learning_rate=0.01, checkpoint_every_steps=2)
PLAIN = PlainCnn(widths=(32, 32), depths=(1, 1), strides=(1, 2), stem_width=16)
ZOO = {
    "plain": PLAIN,
    "residual": ResidualCnn(widths=(16, 32), depths=(1, 1), strides=(1, 2), stem_width=16),
    "depthwise": DepthwiseCnn(widths=(16, 32), depths=(1, 1), strides=(1, 2), stem_width=16),
    "transformer": VisionTransformer(width=32, depth=1, num_heads=4, stem="patch", patch_size=2),
    "mixer": Mixer(width=32, depth=1, stem="patch", patch_size=2, token_hidden=32),
}


class Stop(BaseException):
    """Ends a training as a kill would, but in this process."""


class ByParams:
    """Stands in for a latency model: a call takes as long as there are parameters."""

    batch = 1

    def predict_ms(self, model: nn.Module, input_shape: tuple[int, int, int]) -> float:
        del input_shape
        assert not model.training
        return profile.params(model) / 1e4

    def operators_ms(self, operators: object) -> list[float]:
        raise NotImplementedError


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """Equal bits are promised for one thread."""


@pytest.fixture(scope="module")
def data() -> Dataset:
    return tiny_dataset(train=32, validation=16)


def teacher_of(model, data: Dataset, seed: int = 0) -> tuple[nn.Module, ModelSpec]:
    spec = ModelSpec(
        model=model,
        num_classes=len(CLASSES),
        input_shape=data.input_shape,
        class_names=data.class_names,
        preprocessing=data.preprocessing,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = build_model(spec)
        with torch.no_grad():
            for module in net.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.weight.uniform_(0.2, 1.8)
    return net.eval(), spec


@pytest.fixture(scope="module")
def panel(data, tmp_path_factory) -> list[StoredOutputs]:
    folder = tmp_path_factory.mktemp("outputs")
    write_teacher_outputs(teacher_of(PLAIN, data)[0], data, OutputsSpec(views=2, seed=0, augment=SHIFT), folder)
    return [StoredOutputs.open(folder)]


class Trainings:
    """Starts trainings on the panel and remembers their names; may stop the n-th at a step."""

    def __init__(self, panel: list[StoredOutputs], data: Dataset, *, stop: tuple[int, int] | None = None) -> None:
        self.panel, self.data, self.stop = panel, data, stop
        self.names: list[str] = []

    def __call__(self, model: nn.Module, train: TrainConfig, folder: Path) -> Training:
        self.names.append(folder.name)
        stop = self.stop[1] if self.stop is not None and self.stop[0] == len(self.names) else None

        def on_step(done: int, total: int) -> None:
            del total
            if done == stop:
                raise Stop

        return Training(
            student=model,
            panel=self.panel,
            teachers=(),
            dataset=self.data,
            config=DistillConfig(train=train, losses=(CrossEntropy(), Kd()), views=2),
            seed=0,
            augment=SHIFT,
            hardware=Hardware(accelerator="cpu"),
            checkpoint_dir=folder,
            on_step=on_step,
        )


def shop_of(data: Dataset, folder: Path, model=PLAIN, **changes) -> Workshop:
    return Workshop(
        **({"parents": {"t": teacher_of(model, data)}, "dataset": data, "seed": 0, "folder": folder} | changes)
    )


def prune(**changes) -> Prune:
    return Prune(**({"parent": "t", "ratios": (0.5,)} | changes))


def same(left: nn.Module, right: nn.Module) -> bool:
    a, b = left.state_dict(), right.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def widths(model: nn.Module) -> list[int]:
    return [module.out_channels for module in model.modules() if isinstance(module, nn.Conv2d)]


# ---------------------------------------------------------------- config


def test_defaults_are_plain_pruning_under_the_plain_name(data, tmp_path):
    shop = shop_of(data, tmp_path)
    space = prune(ratios=(0.25, 0.5))
    assert space.label == "prune-t-magnitude"
    assert space.genes(shop) == {"ratio": (0.25, 0.5)}
    assert not space.wants_latency_model
    built, spec = space.build({"ratio": 0.5}, shop)
    expected, expected_spec = prune_model(*shop.parents["t"], ratio=0.5)
    assert spec == expected_spec
    assert same(built, expected)
    assert all(each.requires_grad for each in built.parameters())


def test_labels_tell_arms_apart():
    arms = [
        prune(),
        prune(criterion="hessian"),
        prune(ranking="global"),
        prune(target="macs"),
        prune(target="latency"),
        prune(stage_ratios=(0.5,)),
        prune(steps=2, between=BETWEEN),
        prune(order=("distil_prune",), between=BETWEEN),
        prune(order=("prune_distil", "distil_prune"), between=BETWEEN),
        prune(heads=False),
        prune(mlp=False),
        prune(embedding=False),
    ]
    labels = [arm.label for arm in arms]
    assert len(set(labels)) == len(arms)
    assert all(label.startswith("prune-t-magnitude") for label in labels if "hessian" not in label)
    assert prune(ranking="global", steps=2, between=BETWEEN).label == "prune-t-magnitude-global-iterative"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 2}, "between has no schedule, expected one for steps 2"),
        ({"order": ("distil_prune",)}, "between has no schedule, expected one for order distil_prune"),
        ({"order": ("prune_distil", "prune_distil")}, "expected each at most once"),
        ({"stage_ratios": (0.5,), "target": "macs"}, "expected target channels"),
        ({"stage_ratios": (1.0,)}, "less than 1"),
        ({"min_keep": 1.0}, "less than 1"),
    ],
)
def test_settings_that_contradict_are_refused(changes, message):
    with pytest.raises(ValidationError, match=message):
        prune(**changes)


def test_what_the_study_lacks_is_said_before_any_work(data, tmp_path):
    shop = shop_of(data, tmp_path)
    latency = prune(target="latency")
    assert latency.wants_latency_model
    iterative = prune(steps=2, between=BETWEEN)
    for space, message in ((latency, "no latency model"), (iterative, "no way to train")):
        with pytest.raises(CompressionError, match=message):
            space.genes(shop)
        with pytest.raises(CompressionError, match=message):
            space.build({"ratio": 0.5}, shop)


# ---------------------------------------------------------------- targets


@pytest.mark.parametrize("ranking", ["per_layer", "global"])
@pytest.mark.parametrize("name", ZOO)
def test_macs_are_met_within_one_step_and_never_exceeded(name, ranking, data, tmp_path):
    shop = shop_of(data, tmp_path, ZOO[name])
    parent, spec = shop.parents["t"]
    whole = profile.macs(parent, spec.input_shape)
    space = prune(target="macs", ranking=ranking, round_to=4)
    survey = survey_of(parent, spec, round_to=4).usable()
    before = {group.name: group for group in survey.groups}
    built, built_spec = space.build({"ratio": 0.5}, shop)
    assert profile.macs(built, spec.input_shape) <= 0.5 * whole
    now = {group.name: group.count for group in survey_of(built, built_spec, round_to=4).groups}
    steps = {name: group.units.step if now[name] < group.count else 0 for name, group in before.items()}
    larger, _ = survey.cut({name: now[name] + step for name, step in steps.items()})
    assert profile.macs(larger, spec.input_shape) > 0.5 * whole, "a step more would be too much"
    assert all(now[name] % step == 0 for name, step in steps.items() if step)


def test_a_share_of_macs_nothing_leaves_is_refused(data, tmp_path):
    with pytest.raises(CompressionError, match=r"ratio 0\.99 of macs to remove, expected at most 0\.[0-9]+"):
        prune(target="macs", ratios=(0.99,)).build({"ratio": 0.99}, shop_of(data, tmp_path))


def test_latency_is_that_of_the_model_and_once_found_stays(data, tmp_path):
    shop = shop_of(data, tmp_path, latency=ByParams())
    space = prune(target="latency", round_to=4)
    built, spec = space.build({"ratio": 0.5}, shop)
    parent = profile.params(shop.parents["t"][0])
    assert 0.3 * parent < profile.params(built) <= 0.5 * parent

    class Other(ByParams):
        def predict_ms(self, model: nn.Module, input_shape: tuple[int, int, int]) -> float:
            raise AssertionError("asked again")

    again, again_spec = space.build({"ratio": 0.5}, shop_of(data, tmp_path, latency=Other()))
    assert again_spec == spec
    assert same(again, built)


def test_ratio_zero_of_anything_is_the_parent(data, tmp_path, panel):
    for changes in ({"target": "macs"}, {"ranking": "global"}, {"steps": 3, "between": BETWEEN}):
        started = Trainings(panel, data)
        shop = shop_of(data, tmp_path, start_training=started)
        built, spec = prune(ratios=(0.0,), **changes).build({"ratio": 0.0}, shop)
        assert spec == shop.parents["t"][1]
        assert built is not shop.parents["t"][0]
        assert same(built, shop.parents["t"][0])
        assert not started.names


# ---------------------------------------------------------------- stages


@pytest.mark.parametrize("ranking", ["per_layer", "global"])
def test_every_resolution_has_a_gene_and_changes_with_it_alone(ranking, data, tmp_path):
    shop = shop_of(data, tmp_path)
    space = prune(stage_ratios=(0.5, 0.0), ranking=ranking, ratios=(0.9,))
    assert space.genes(shop) == {"ratio_0": (0.0, 0.5), "ratio_1": (0.0, 0.5)}
    assert widths(shop.parents["t"][0]) == [16, 32, 32]
    assert widths(space.build({"ratio_0": 0.0, "ratio_1": 0.5}, shop)[0]) == [16, 32, 16]
    fine = widths(space.build({"ratio_0": 0.5, "ratio_1": 0.0}, shop)[0])
    assert sum(fine[:2]) == 24
    assert fine[2] == 32
    assert widths(space.build({"ratio_0": 0.0, "ratio_1": 0.0}, shop)[0]) == [16, 32, 32]


def test_heads_mlp_and_embedding_have_a_gene_each(data, tmp_path):
    shop = shop_of(data, tmp_path, ZOO["transformer"])
    space = prune(stage_ratios=(0.0, 0.5))
    assert list(space.genes(shop)) == ["ratio_0", "ratio_1", "ratio_2"]

    def sizes(*ratios: float) -> tuple[int, int, int]:
        net, _ = space.build({f"ratio_{stage}": ratio for stage, ratio in enumerate(ratios)}, shop)
        return net.blocks[0].attn.num_heads, net.blocks[0].mlp[0].out_features, net.head.in_features

    heads, hidden, width = sizes(0, 0, 0)
    assert sizes(0.5, 0, 0) == (heads // 2, hidden, width)
    assert sizes(0, 0.5, 0) == (heads, hidden // 2, width)
    assert sizes(0, 0, 0.5) == (heads, hidden, width // 2)
    assert list(prune(stage_ratios=(0.5,), heads=False).genes(shop)) == ["ratio_0", "ratio_1"]


def test_a_small_timm_transformer_has_its_three_stages(tmp_path, data):
    model = TimmModel(name="vit_tiny_patch16_224")
    spec = teacher_of(PLAIN, data)[1].model_copy(update={"model": model, "input_shape": (1, 32, 32)})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = build_model(spec).eval()
    shop = Workshop({"t": (net, spec)}, data, 0, tmp_path)
    space = prune(stage_ratios=(0.0, 0.34))
    assert len(space.genes(shop)) == 3
    built, _ = space.build({"ratio_0": 0.34, "ratio_1": 0.0, "ratio_2": 0.34}, shop)
    assert built.blocks[0].attn.num_heads == 2
    assert built.blocks[0].mlp.fc1.out_features == 768
    assert built.head.in_features == 128
    assert built(torch.zeros(2, 1, 32, 32)).shape == (2, len(CLASSES))


# ---------------------------------------------------------------- steps and order


def test_steps_reach_the_width_of_one_cut_with_a_distillation_between(data, panel, tmp_path):
    started = Trainings(panel, data)
    shop = shop_of(data, tmp_path, start_training=started)
    parent, spec = shop.parents["t"]
    before = {key: value.clone() for key, value in parent.state_dict().items()}
    space = prune(ratios=(0.25, 0.75), steps=3, between=BETWEEN)
    built, built_spec = space.build({"ratio": 0.75}, shop)
    once, _ = prune_model(parent, spec, ratio=0.75)
    assert widths(built) == widths(once)
    assert not same(built, once), "the distillations left their mark"
    assert len(started.names) == 2
    assert len(set(started.names)) == 2
    assert not any((shop.folder / "steps").iterdir()), "step checkpoints are cleared"
    assert all(torch.equal(before[key], value) for key, value in parent.state_dict().items())
    assert not built.training
    assert all(each.requires_grad for each in built.parameters())

    again, again_spec = space.build({"ratio": 0.75}, shop_of(data, tmp_path, start_training=started))
    assert len(started.names) == 2, "it was kept on disk"
    assert again_spec == built_spec
    assert same(again, built)
    space.build({"ratio": 0.25}, shop)
    assert len(started.names) == 4, "another choice is another candidate"

    save_checkpoint(built, built_spec, tmp_path / "checkpoint")
    loaded, _ = load_checkpoint(tmp_path / "checkpoint")
    images = shop.calibration()[0]
    assert torch.equal(loaded(images), built(images))


def test_each_step_removes_its_share_of_macs(data, panel, tmp_path):
    started = Trainings(panel, data)
    shop = shop_of(data, tmp_path, start_training=started)
    parent, spec = shop.parents["t"]
    seen: list[int] = []

    def start(model: nn.Module, train: TrainConfig, folder: Path) -> Training:
        seen.append(profile.macs(model, spec.input_shape))
        return started(model, train, folder)

    space = prune(ratios=(0.75,), target="macs", steps=2, between=BETWEEN)
    built, _ = space.build({"ratio": 0.75}, shop_of(data, tmp_path, start_training=start))
    whole = profile.macs(parent, spec.input_shape)
    assert 0.25 * whole < seen[0] <= 0.5 * whole
    assert profile.macs(built, spec.input_shape) <= 0.25 * whole


@pytest.mark.parametrize("killed", [(1, 3), (2, 1)], ids=["first", "second"])
def test_a_killed_build_goes_on_and_ends_the_same(killed, data, panel, tmp_path):
    space = prune(criterion="taylor", order=("prune_distil", "distil_prune"), steps=2, between=BETWEEN)
    choices = {"ratio": 0.5, "order": "distil_prune"}
    unbroken, _ = space.build(choices, shop_of(data, tmp_path / "a", start_training=Trainings(panel, data)))
    with pytest.raises(Stop):
        space.build(choices, shop_of(data, tmp_path / "b", start_training=Trainings(panel, data, stop=killed)))
    resumed = Trainings(panel, data)
    model, _ = space.build(choices, shop_of(data, tmp_path / "b", start_training=resumed))
    assert len(resumed.names) == 3 - killed[0], "a training that was done is not repeated"
    assert same(model, unbroken)


def test_order_is_a_choice_and_the_distilled_parent_is_made_once(data, panel, tmp_path):
    started = Trainings(panel, data)
    shop = shop_of(data, tmp_path, start_training=started)
    space = prune(ratios=(0.0, 0.5, 0.75), order=("prune_distil", "distil_prune"), between=BETWEEN)
    assert space.genes(shop) == {"ratio": (0.0, 0.5, 0.75), "order": ("prune_distil", "distil_prune")}
    plain, _ = space.build({"ratio": 0.5, "order": "prune_distil"}, shop)
    assert same(plain, prune_model(*shop.parents["t"], ratio=0.5)[0])
    assert not started.names

    distilled, spec = space.build({"ratio": 0.0, "order": "distil_prune"}, shop)
    assert spec == shop.parents["t"][1]
    assert not same(distilled, shop.parents["t"][0])
    built, _ = space.build({"ratio": 0.5, "order": "distil_prune"}, shop)
    assert same(built, prune_model(distilled, spec, ratio=0.5)[0])
    other = prune(criterion="random", order=("distil_prune",), between=BETWEEN)
    assert set(other.genes(shop)) == {"ratio"}
    other.build({"ratio": 0.5}, shop_of(data, tmp_path, start_training=started))
    assert len(started.names) == 1, "also for another space"
    assert widths(built) == widths(plain)


# ---------------------------------------------------------------- seeds


@pytest.mark.parametrize("changes", [{}, {"ranking": "global"}, {"target": "macs"}, {"stage_ratios": (0.5,)}])
def test_equal_seeds_cut_alike_and_other_seeds_do_not(changes, data, tmp_path):
    space = prune(criterion="random", **changes)
    choices = {"ratio": 0.5, "ratio_0": 0.5, "ratio_1": 0.5}
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    nets = [space.build(choices, shop_of(data, tmp_path, seed=seed))[0] for seed in (0, 0, 1)]
    assert torch.equal(torch.rand(3), expected), "the global random state is left alone"
    shop = shop_of(data, tmp_path)
    nets.append(space.build(choices, shop)[0])
    nets.append(space.build(choices, shop)[0])
    assert same(nets[0], nets[1])
    assert same(nets[0], nets[3])
    assert same(nets[0], nets[4]), "what a workshop remembers changes nothing"
    assert not same(nets[0], nets[2])


def test_calibration_is_read_once_for_all_candidates(data, tmp_path, monkeypatch):
    asked: list[int] = []
    original: Callable = Workshop.calibration

    def counting(shop: Workshop):
        asked.append(1)
        return original(shop)

    monkeypatch.setattr(Workshop, "calibration", counting)
    shop = shop_of(data, tmp_path)
    space = prune(criterion="hessian", ratios=(0.25, 0.5))
    first = [space.build({"ratio": ratio}, shop)[0] for ratio in space.ratios]
    assert len(asked) == 1
    calibration = original(shop)
    for ratio, built in zip(space.ratios, first, strict=True):
        expected, _ = prune_model(*shop.parents["t"], ratio=ratio, criterion="hessian", calibration=calibration)
        assert same(built, expected)


# ---------------------------------------------------------------- a study, and its winner elsewhere


def test_a_study_over_orders_stages_and_targets(data, panel, tmp_path):
    spaces = (
        prune(ranking="global", target="macs", ratios=(0.3, 0.6)),
        prune(stage_ratios=(0.0, 0.5)),
        prune(ratios=(0.5,), steps=2, order=("prune_distil", "distil_prune"), between=BETWEEN),
    )
    result = search(
        tmp_path,
        config_of(spaces=spaces, trials=6),
        parents={"t": teacher_of(PLAIN, data)},
        dataset=data,
        start_training=Trainings(panel, data),
    )
    assert [trial.reason for trial in result.trials if trial.state == "failed"] == []
    assert {trial.space for trial in result.trials if trial.state == "complete"} == {space.label for space in spaces}
    orders = {trial.choices.get("order") for trial in result.trials if trial.space == spaces[2].label}
    assert orders == {"prune_distil", "distil_prune"}
    parent = profile.macs(*teacher_of(PLAIN, data)[:1], data.input_shape)
    assert all(
        trial.macs <= (1 - trial.choices["ratio"]) * parent for trial in result.trials if trial.space == spaces[0].label
    )


ELSEWHERE = """
import sys
from pathlib import Path

import torch

sys.modules["torch_pruning"] = None
torch.set_num_threads(1)
from compression.checkpoint import load_checkpoint
from compression.errors import CompressionError
from compression.search.prune import prune_model
from export.onnx_graph import to_onnx
from export.parity import compare
from export.runtime import OnnxSession, predict_fn
from safetensors.torch import load_file

folder = Path(sys.argv[1])
model, spec = load_checkpoint(folder)
seen = load_file(folder / "seen.safetensors")
with torch.no_grad():
    logits = model(seen["images"])
assert torch.equal(logits, seen["logits"])
labels = logits.argmax(1)
for fast in (True, False):
    path = folder / f"{fast}.onnx"
    to_onnx(model, path, input_shape=spec.input_shape, metadata={}, fast=fast)
    found = compare(logits, predict_fn(OnnxSession(path))(seen["images"]), labels)
    assert found.max_abs < 1e-5 and found.flips == 0, found
try:
    prune_model(model, spec, ratio=0.5)
except (CompressionError, ImportError) as error:
    assert "torch_pruning" in str(error)
else:
    raise AssertionError("it was not blocked")
print("same")
"""


def test_a_winner_runs_and_ships_where_torch_pruning_is_not_installed(data, tmp_path):
    from safetensors.torch import save_file

    shop = shop_of(data, tmp_path, ZOO["transformer"])
    space = prune(ranking="global", target="macs")
    model, spec = space.build({"ratio": 0.5}, shop)
    save_checkpoint(model, spec, tmp_path / "winner")
    images = shop.calibration()[0]
    with torch.no_grad():
        save_file({"images": images, "logits": model(images)}, tmp_path / "winner" / "seen.safetensors")
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(ELSEWHERE), str(tmp_path / "winner")],
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("same")
