"""Networks in pieces compute what they do in one; the meta model only teaches; a killed training goes on."""

import copy
from itertools import pairwise

import pytest
import torch
from pydantic import ValidationError
from torch import nn
from torch.nn import functional as F

from compression.data.dataset import without_labels
from compression.distill import CrossEntropy, DistillConfig, Kd
from compression.distill.procedures import Training
from compression.distill.procedures.module_to_module import (
    Hybrid,
    ModuleStep,
    ModuleToModule,
    Still,
    boundaries,
    common_count,
    meta_layer,
    most_segments,
    segments,
    shared_out,
    stitch,
)
from compression.errors import CompressionError, ShapeError
from compression.teacher_outputs import OutputsSpec, StoredOutputs, write_teacher_outputs
from compression.train import Hardware, TrainConfig
from compression.types import Batch
from compression.zoo import DepthwiseCnn, PlainCnn, ResidualCnn, VisionTransformer
from tests.compression.losses.short_training import SHIFT, Stop, assert_same, net
from tests.compression.tiny_data import CLASSES, tiny_dataset

SHAPE = (1, 8, 8)
IMAGES = torch.randn(6, *SHAPE, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 3, -1, 1, 2, -1])

RESIDUAL = ResidualCnn(widths=(6, 8, 8), depths=(1, 2, 1), strides=(1, 2, 2), stem_width=4)
SMALL = ResidualCnn(widths=(4, 6), depths=(1, 1), strides=(1, 2), stem_width=4)
TRANSFORMER = VisionTransformer(width=8, depth=3, num_heads=2, patch_size=2, stem="patch")


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """The suite's own fixture, for every test here."""


def built(config, seed: int = 0) -> nn.Module:
    """A network of four classes for images of one channel, in inference mode."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return config.build(len(CLASSES), SHAPE).eval()


def run(parts, values: torch.Tensor) -> torch.Tensor:
    for part in parts:
        values = part(values)
    return values


def batch(labels: torch.Tensor = LABELS) -> Batch:
    return Batch(images=IMAGES, labels=labels, ids=torch.arange(6), view=0, epoch=0, step=0)


# ---------------------------------------------------------------- cutting


@pytest.mark.parametrize(
    ("config", "most", "shapes"),
    [
        (RESIDUAL, 3, [(6, 8, 8), (8, 4, 4)]),
        (SMALL, 2, [(4, 8, 8)]),
        (PlainCnn(widths=(4, 6, 8), stem_width=4), 3, [(4, 8, 8), (4, 4, 4)]),
        (DepthwiseCnn(widths=(4, 6), stem_width=4), 2, [(4, 4, 4)]),
        (TRANSFORMER, 3, [(16, 8), (16, 8)]),
    ],
    ids=lambda value: getattr(value, "kind", None),
)
def test_modules_give_what_the_network_gives_and_share_its_weights(config, most, shapes):
    model = built(config)
    assert most_segments(model, IMAGES) == most
    for count in range(1, most + 1):
        parts = segments(model, IMAGES, count)
        assert len(parts) == count
        assert torch.equal(run(parts, IMAGES), model(IMAGES))
        owned = [parameter for part in parts for parameter in part.parameters()]
        assert {id(each) for each in owned} == {id(each) for each in model.parameters()}
        assert len(owned) == len(list(model.parameters()))
        assert all(any(True for _ in part.parameters()) for part in parts)
    assert boundaries(segments(model, IMAGES, most), IMAGES) == [*shapes, (len(CLASSES),)]


def test_a_plain_sequence_is_cut_where_its_resolution_changes():
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 6, 3, 2, 1),
        nn.Flatten(),
        nn.Linear(24, 4),
    )
    parts = segments(model, IMAGES, 2)
    # Pooling alone is no module, since it has nothing to learn; it comes with the layers after it.
    assert most_segments(model, IMAGES) == 2
    assert boundaries(parts, IMAGES) == [(4, 8, 8), (4,)]
    assert torch.equal(run(parts, IMAGES), model(IMAGES))


def test_late_changes_of_resolution_are_cut_first_and_blocks_evenly():
    assert boundaries(segments(built(RESIDUAL), IMAGES, 2), IMAGES)[0] == (8, 4, 4)
    deep = built(VisionTransformer(width=8, depth=6, num_heads=2, patch_size=4, stem="patch"))
    blocks = [
        sum(name.endswith("norm1.weight") for name, _ in part.named_parameters()) for part in segments(deep, IMAGES, 3)
    ]
    assert blocks == [2, 2, 2]


def test_cutting_leaves_mode_weights_and_statistics_alone():
    model = built(RESIDUAL).train()
    before = copy.deepcopy(model.state_dict())
    segments(model, IMAGES, 3)
    assert_same(model.state_dict(), before)
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


class Branching(nn.Module):
    """Its path depends on a value."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(nn.Sequential(nn.Conv2d(1, 1, 3, 2, 1)) for _ in range(2)))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.blocks(images).flatten(1) if images.sum() > 0 else images.flatten(1)[:, :4]


class Dropping(nn.Module):
    """Asks for its own mode in its forward pass, which a cut cannot do."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 8, stride=2, padding=3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(F.dropout(self.stem(images), 0.5, self.training)).mean((2, 3))


class Bridged(nn.Module):
    """The last layer sees the first one's output too."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.middle = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, 2, 1)
        self.head = nn.Linear(8, 4)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        early = self.stem(images)
        return self.head(torch.cat([self.middle(early).mean((2, 3)), early.mean((2, 3))], dim=1))


def test_networks_that_are_no_chain_are_refused():
    with pytest.raises(CompressionError, match=r"'Branching' has a forward pass that cannot be followed"):
        most_segments(Branching(), IMAGES)
    assert most_segments(Dropping(), IMAGES) == 2
    with pytest.raises(CompressionError, match=r"'Dropping' has other outputs in 2 modules than in one piece"):
        segments(Dropping().eval(), IMAGES, 2)
    assert most_segments(Bridged(), IMAGES) == 1
    with pytest.raises(ShapeError, match=r"'Bridged' has 1 modules, expected 2 or more. Ask for 1 to 1"):
        segments(Bridged(), IMAGES, 2)


def test_both_networks_get_the_smaller_number_of_modules():
    teacher, student = built(RESIDUAL), built(SMALL)
    assert common_count(teacher, student, SHAPE, 4) == 2
    assert common_count(teacher, teacher, SHAPE, 4) == 3
    assert common_count(teacher, teacher, SHAPE, 2) == 2
    with pytest.raises(ShapeError, match=r"Student 'Sequential' has 1 module, expected 2 at least"):
        common_count(teacher, net(4, seed=0), SHAPE, 4)


# ---------------------------------------------------------------- meta model and stitches


@pytest.mark.parametrize("before", [(3, 8, 8), (5, 7, 7), (16, 6), (4, 6)])
@pytest.mark.parametrize("after", [(3, 8, 8), (7, 4, 4), (2, 1, 1), (16, 6), (9, 5)])
def test_stitches_and_layers_turn_any_boundary_into_any_other(before, after):
    values = torch.randn(2, *before, generator=torch.Generator().manual_seed(1))
    assert stitch(before, after)(values).shape == (2, *after)
    assert meta_layer(before, after)(values).shape == (2, *after)
    assert meta_layer(before, (4,))(values).shape == (2, 4)


def test_equal_boundaries_are_stitched_by_nothing():
    assert isinstance(stitch((4, 8, 8), (4, 8, 8)), nn.Identity)
    assert not isinstance(stitch((4, 8, 8), (4, 4, 4)), nn.Identity)


def test_tokens_that_make_no_square_are_refused():
    with pytest.raises(ShapeError, match="17 tokens, expected a square number"):
        stitch((17, 8), (16, 8))
    with pytest.raises(ShapeError, match="17 tokens, expected a square number"):
        meta_layer((4, 8, 8), (17, 8))


def pieces(config=RESIDUAL) -> tuple[list[nn.Module], list[nn.Module]]:
    """Modules of a network, and a meta model for them."""
    parts = segments(built(config), IMAGES, 3)
    shapes = [SHAPE, *boundaries(parts, IMAGES)]
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return parts, [meta_layer(a, b) for a, b in pairwise(shapes)]


@pytest.mark.parametrize("place", [0, 1, 2])
def test_the_meta_model_gets_no_gradient_but_passes_it_on(place):
    parts, meta = pieces()
    before = copy.deepcopy(nn.ModuleList(meta).state_dict())
    hybrid = Hybrid(meta, place, parts[place])
    nn.Module.train(hybrid, True)  # as the trainer does
    F.cross_entropy(hybrid(IMAGES), LABELS.clamp(min=0)).backward()
    assert all((parameter.grad.abs() > 0).any() for parameter in parts[place].parameters() if parameter.ndim > 1)
    assert all(module.training for module in parts[place].modules())
    for number, layer in enumerate(meta):
        if number != place:
            assert all(parameter.grad is None for parameter in layer.parameters())
            assert not any(module.training for module in layer.modules())
    assert_same(nn.ModuleList(meta).state_dict(), before)  # batch norm saw the batch and kept its statistics


@pytest.mark.parametrize("config", [RESIDUAL, TRANSFORMER])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_divergence_is_zero_where_the_student_has_the_teachers_module(config, place):
    parts, meta = pieces(config)
    taught = Hybrid(meta, place, copy.deepcopy(parts[place]))
    step = ModuleStep(taught, kd_weight=0.5, temperature=1.0)
    ours = Hybrid(meta, place, parts[place]).eval()
    assert step(ours, batch())["module_kd"].abs() < 1e-6
    with torch.no_grad():
        next(iter(parts[place].parameters())).add_(1.0)
    assert step(ours, batch())["module_kd"] > 1e-4


@pytest.mark.parametrize(("weight", "temperature"), [(0.5, 1.0), (0.25, 3.0)])
def test_step_is_the_weighted_sum_of_labels_and_divergence_over_the_batch(weight, temperature):
    logits, target = (3 * torch.randn(6, 4, generator=torch.Generator().manual_seed(seed)) for seed in (3, 4))

    class Says(nn.Module):
        def __init__(self, values: torch.Tensor) -> None:
            super().__init__()
            self.values = nn.Parameter(values)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.values + 0 * images.sum()

    student, teacher = Says(logits), Says(target)
    terms = ModuleStep(teacher, kd_weight=weight, temperature=temperature)(student, batch())
    p, q = (each.double().div(temperature).softmax(-1) for each in (target, logits))
    divergence = temperature**2 * (p * (p / q).log()).sum() / 6
    known = LABELS >= 0
    hard = -logits.double().log_softmax(-1)[known, LABELS[known]].sum() / 6
    expected = {"module_cross_entropy": (1 - weight) * hard, "module_kd": weight * divergence}
    assert terms.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(terms[name].double(), value)
    sum(terms.values()).backward()
    assert student.values.grad.abs().max() > 0
    assert teacher.values.grad is None


def test_step_on_a_batch_without_labels_teaches_by_the_teachers_module_alone():
    parts, meta = pieces()
    step = ModuleStep(Hybrid(meta, 1, copy.deepcopy(parts[1])), kd_weight=0.5, temperature=1.0)
    terms = step(Hybrid(meta, 1, segments(built(RESIDUAL, seed=5), IMAGES, 3)[1]), batch(torch.full((6,), -1)))
    assert terms["module_cross_entropy"] == 0
    assert terms["module_kd"] > 0


# ---------------------------------------------------------------- epochs


def test_epochs_are_shared_out_to_the_last():
    for modules in (2, 3, 4, 8):
        for epochs in range(2 * modules + 2, 60):
            for shares in ((0.15, 0.25, 0.25), (0.9, 0.05, 0.04), (0.01, 0.01, 0.97), (0.01, 0.97, 0.01)):
                names = ("meta_share", "teacher_share", "module_share")
                meta, theirs, ours, whole = shared_out(epochs, modules, **dict(zip(names, shares, strict=True)))
                assert min(meta, theirs, ours, whole) >= 1
                assert meta + modules * (theirs + ours) + whole == epochs
    assert shared_out(40, 2, meta_share=0.15, teacher_share=0.25, module_share=0.25) == (6, 5, 5, 14)


def test_too_few_epochs_are_refused():
    with pytest.raises(
        CompressionError, match=r"has 9 epochs, expected at least 10.*Raise train.epochs, or lower modules"
    ):
        shared_out(9, 4, meta_share=0.1, teacher_share=0.1, module_share=0.1)


# ---------------------------------------------------------------- training


@pytest.fixture(scope="module")
def teacher() -> nn.Module:
    return built(RESIDUAL, seed=9)


@pytest.fixture(scope="module")
def panel(teacher, tmp_path_factory):
    folder = tmp_path_factory.mktemp("outputs")
    write_teacher_outputs(teacher, tiny_dataset(), OutputsSpec(views=2, seed=0, augment=SHIFT), folder)
    return [StoredOutputs.open(folder)]


class StopAfter:
    """Counts the steps of all parts."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    def __call__(self, done: int, total: int) -> None:
        self.left -= 1
        if self.left == 0:
            raise Stop


def training(panel, teacher, folder, *, epochs: int = 6, student=SMALL, dataset=None, on_step=None) -> Training:
    """Four steps an epoch."""
    train = TrainConfig(epochs=epochs, batch_size=16, learning_rate=0.01, checkpoint_every_steps=3)
    return Training(
        student=built(student, seed=3) if not isinstance(student, nn.Module) else student,
        panel=panel,
        teachers=[teacher],
        dataset=tiny_dataset() if dataset is None else dataset,
        config=DistillConfig(train=train, losses=(CrossEntropy(), Kd()), views=2),
        seed=0,
        augment=SHIFT,
        hardware=Hardware(accelerator="cpu"),
        checkpoint_dir=folder,
        on_step=on_step,
    )


def test_student_is_trained_by_modules_then_whole_and_resumes_anywhere(panel, teacher, tmp_path):
    procedure, whole = ModuleToModule().build(), training(panel, teacher, tmp_path / "whole")
    start, original = copy.deepcopy(whole.student.state_dict()), copy.deepcopy(teacher.state_dict())
    history = procedure(whole)
    assert sorted(each.name for each in (tmp_path / "whole").iterdir()) == [
        "assembled", "meta", "module-1", "module-2", "teacher-1", "teacher-2"
    ]  # fmt: skip
    assert [row["epoch"] for row in history.rows] == list(range(6))
    terms = ("meta_cross_entropy", "teacher_module_cross_entropy", "module_kd", "kd")
    assert [next(name for name in terms if name in row) for row in history.rows] == [
        terms[number] for number in (0, 1, 2, 1, 2, 3)
    ]
    trained = whole.student.state_dict()
    assert list(trained) == list(start)
    assert all((trained[name] - value).abs().max() > 1e-4 for name, value in start.items() if value.ndim > 1)
    assert_same(teacher.state_dict(), original)

    for steps in (7, 18):  # in a teacher's module; in a student's, before its first checkpoint
        folder = tmp_path / str(steps)
        with pytest.raises(Stop):
            procedure(training(panel, teacher, folder, on_step=StopAfter(steps)))
        again = training(panel, teacher, folder)
        procedure(again)
        assert_same(again.student.state_dict(), trained)


def test_a_module_is_trained_while_the_others_wait(panel, teacher, tmp_path):
    stopped = training(panel, teacher, None, on_step=StopAfter(11))  # 4 meta, 4 teacher, 3 of the first module
    start = copy.deepcopy(stopped.student.state_dict())
    with pytest.raises(Stop):
        ModuleToModule().build()(stopped)
    first = ("stem", "blocks.0")
    for name, value in stopped.student.state_dict().items():
        assert torch.equal(value, start[name]) != name.startswith(first), name


def test_a_transformer_can_be_taught_by_a_convolutional_teacher(panel, teacher):
    mixed = training(panel, teacher, None, epochs=8, student=TRANSFORMER, on_step=StopAfter(28))
    start = copy.deepcopy(mixed.student.state_dict())
    with pytest.raises(Stop):  # at the end of the last module; the whole has not been trained yet
        ModuleToModule().build()(mixed)
    for name, value in mixed.student.state_dict().items():
        assert (value - start[name]).abs().max() > 1e-4, name


def test_what_cannot_be_trained_is_refused_before_any_step(panel, teacher):
    procedure = ModuleToModule().build()
    unreachable = StopAfter(1)
    for changes, error, message in (
        ({"dataset": without_labels(tiny_dataset())}, CompressionError, "0 samples with a label"),
        ({"epochs": 5}, CompressionError, "5 epochs, expected at least 6"),
        ({"student": net(4, seed=0)}, ShapeError, "Student 'Sequential' has 1 module"),
    ):
        with pytest.raises(error, match=message):
            procedure(training(panel, teacher, None, on_step=unreachable, **changes))
    with pytest.raises(CompressionError, match="has 1 teachers, expected number 1"):
        ModuleToModule(teacher=1).build()(training(panel, teacher, None, on_step=unreachable))


@pytest.mark.parametrize(
    "wrong",
    [
        {"modules": 1},
        {"teacher": -1},
        {"kd_weight": 0},
        {"temperature": 0},
        {"meta_share": 0.5, "teacher_share": 0.3, "module_share": 0.2},
        {"stitch": 1024},
    ],
)
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(ValidationError):
        ModuleToModule.model_validate(wrong)


def test_still_modules_stay_in_inference_mode():
    still = Still(nn.Sequential(nn.BatchNorm2d(1), nn.Dropout()))
    assert not any(module.training for module in still.train().modules())
    assert not any(parameter.requires_grad for parameter in still.parameters())
