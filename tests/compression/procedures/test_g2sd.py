"""The student sees a quarter of the tokens and says what its teacher sees in all; then it learns the task."""

import copy

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from compression.data.dataset import without_labels
from compression.distill import CrossEntropy, DistillConfig, Kd
from compression.distill.procedures import Training
from compression.distill.procedures.g2sd import (
    Decoder,
    G2sd,
    GenericStep,
    TokenNetwork,
    generic_loss,
    generic_target,
    random_mask,
)
from compression.errors import CompressionError, ShapeError
from compression.teacher_outputs import OutputsSpec, StoredOutputs, write_teacher_outputs
from compression.train import Hardware, History, TrainConfig
from compression.train.step_checkpoint import load_state
from compression.types import Batch
from compression.zoo import Mixer, ResidualCnn, VisionTransformer
from compression.zoo.vision_transformer import TransformerBlock
from tests.compression.losses.short_training import SHIFT, Stop, assert_same
from tests.compression.tiny_data import CLASSES, tiny_dataset

SHAPE = (1, 8, 8)
IMAGES = torch.randn(6, *SHAPE, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 3, -1, 1, 2, -1])

TEACHER = VisionTransformer(width=12, depth=2, num_heads=2, patch_size=2, stem="patch")
STUDENT = VisionTransformer(width=8, depth=2, num_heads=2, patch_size=2, stem="patch")
COARSE = STUDENT.model_copy(update={"patch_size": 4})


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """The suite's own fixture, for every test here."""


def built(config, seed: int = 0, shape: tuple[int, int, int] = SHAPE) -> nn.Module:
    """A network of four classes, in inference mode."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return config.build(len(CLASSES), shape).eval()


def tokens_of(config, seed: int = 0) -> TokenNetwork:
    return TokenNetwork.of(built(config, seed), IMAGES[:1])


class WithClassToken(nn.Module):
    """Named as timm names its transformers, with a token before those of the image."""

    num_prefix_tokens = 1

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = nn.Sequential(nn.Conv2d(1, 8, 2, 2), nn.Flatten(2))
        self.patch_embed.append(Swapped())
        self.cls_token = nn.Parameter(torch.ones(1, 1, 8))
        self.blocks = nn.Sequential(TransformerBlock(8, 2, 16), TransformerBlock(8, 2, 16))
        self.head = nn.Linear(8, 4)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patch_embed(images)
        tokens = torch.cat([self.cls_token.expand(len(tokens), -1, -1), tokens], dim=1)
        return self.head(self.blocks(tokens)[:, 0])


class Swapped(nn.Module):
    def forward(self, values: Tensor) -> Tensor:
        return values.transpose(1, 2)


# ---------------------------------------------------------------- masks


@pytest.mark.parametrize(("tokens", "ratio", "count"), [(16, 0.75, 12), (49, 0.75, 37), (4, 0.05, 1), (4, 0.99, 3)])
def test_every_image_has_the_same_number_of_masked_tokens(tokens, ratio, count):
    mask = random_mask(50, tokens, ratio)
    assert mask.shape == (50, tokens)
    assert (mask.sum(1) == count).all()


def test_masks_are_even_over_places_differ_between_images_and_repeat_with_the_random_state():
    torch.manual_seed(3)
    mask = random_mask(4000, 16, 0.75)
    assert (mask.float().mean(0) - 0.75).abs().max() < 0.03  # four standard errors
    assert not torch.equal(mask[0], mask[1])
    torch.manual_seed(3)
    assert torch.equal(random_mask(4000, 16, 0.75), mask)
    assert not torch.equal(random_mask(4000, 16, 0.75), mask)


def test_the_student_sees_the_token_where_the_mask_is_and_the_image_elsewhere():
    student, token = tokens_of(STUDENT), torch.arange(8.0)
    mask = random_mask(6, 16, 0.75)
    seen: list[Tensor] = []
    handle = student.model.blocks.register_forward_hook(lambda _module, inputs, _output: seen.append(inputs[0]))
    student(IMAGES, mask, token)
    student(IMAGES)
    handle.remove()
    masked, plain = (each - student.model.positions for each in seen)
    torch.testing.assert_close(masked[mask], token.expand(int(mask.sum()), -1))
    assert torch.equal(masked[~mask], plain[~mask])
    torch.testing.assert_close(plain, student.model.tokens(IMAGES))


def test_masked_pixels_do_not_reach_the_student():
    student, token, mask = tokens_of(STUDENT), torch.ones(8), random_mask(6, 16, 0.75)
    pixels = mask.reshape(6, 1, 4, 4).repeat_interleave(2, 2).repeat_interleave(2, 3)
    changed = torch.where(pixels, torch.randn(IMAGES.shape), IMAGES)
    assert torch.equal(student(changed, mask, token), student(IMAGES, mask, token))
    assert not torch.allclose(student(changed), student(IMAGES))


def test_the_network_is_as_before_once_it_has_been_looked_at():
    student = tokens_of(STUDENT)
    before = student.model(IMAGES)
    student(IMAGES, random_mask(6, 16, 0.75), torch.ones(8))
    assert torch.equal(student.model(IMAGES), before)


# ---------------------------------------------------------------- networks of tokens


def test_tokens_are_those_after_the_last_block():
    for config in (STUDENT, Mixer(width=8, depth=2, patch_size=2, stem_width=4)):
        network = tokens_of(config)
        assert (network.num_tokens, network.width, network.prefix) == (16, 8, 0)
        tokens = network(IMAGES)
        assert tokens.shape == (6, 16, 8)
        torch.testing.assert_close(network.model.head(network.model.norm(tokens).mean(1)), network.model(IMAGES))


def test_class_tokens_are_neither_masked_nor_a_target():
    model = WithClassToken().eval()
    network = TokenNetwork.of(model, IMAGES[:1])
    assert (network.num_tokens, network.width, network.prefix) == (16, 8, 1)
    seen: list[Tensor] = []
    handle = model.blocks.register_forward_hook(lambda _module, inputs, output: seen.extend([inputs[0], output]))
    tokens = network(IMAGES, torch.ones(6, 16, dtype=torch.bool), torch.zeros(8))
    handle.remove()
    assert torch.equal(seen[0][:, 0], torch.ones(6, 8))
    assert (seen[0][:, 1:] == 0).all()
    assert torch.equal(tokens, seen[1][:, 1:])


def test_other_networks_are_refused_by_name():
    with pytest.raises(ShapeError, match=r"'ResidualNet' has no modules 'tokens' \(or 'patch_embed'\) and 'blocks'"):
        TokenNetwork.of(built(ResidualCnn(widths=(4,), depths=(1,), strides=(2,))), IMAGES[:1])
    single = built(VisionTransformer(width=8, depth=1, num_heads=2, patch_size=8, stem="patch"))
    with pytest.raises(ShapeError, match=r"tokens of shape \[1, 1, 8\].*expected two or more"):
        TokenNetwork.of(single, IMAGES[:1])
    unannounced = WithClassToken()
    unannounced.num_prefix_tokens = 0
    with pytest.raises(ShapeError, match=r"\[1, 16, 8\] that leave its blocks as \[1, 17, 8\]"):
        TokenNetwork.of(unannounced, IMAGES[:1])


# ---------------------------------------------------------------- target and loss


@pytest.mark.parametrize("places", [16, 4])
def test_target_has_zero_mean_and_unit_variance_in_every_token(places):
    target = generic_target(5 * torch.randn(6, 16, 12) + 3, places)
    assert target.shape == (6, places, 12)
    torch.testing.assert_close(target.mean(-1), torch.zeros(6, places), atol=1e-5, rtol=0)
    torch.testing.assert_close(target.var(-1, unbiased=False), torch.ones(6, places), atol=1e-4, rtol=0)


def test_target_does_not_change_with_scale_and_offset_of_a_token_and_passes_no_gradient():
    values = torch.randn(2, 16, 12, dtype=torch.float64, requires_grad=True)
    target = generic_target(values, 16)
    factor, offset = torch.rand(2, 16, 1).double() + 1, torch.randn(2, 16, 1).double()
    torch.testing.assert_close(generic_target(values * factor + offset, 16), target, atol=1e-4, rtol=0)
    assert not target.requires_grad


def test_a_finer_grid_is_averaged_place_by_place():
    values = torch.randn(2, 16, 12)
    expected = torch.stack(
        [
            values.reshape(2, 4, 4, 12)[:, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2].mean((1, 2))
            for y in (0, 1)
            for x in (0, 1)
        ],
        dim=1,
    )
    torch.testing.assert_close(generic_target(values, 4), generic_target(expected, 4))


def test_grids_that_do_not_fit_are_refused():
    assert generic_target(torch.randn(1, 15, 4), 15).shape == (1, 15, 4)
    for theirs, ours in ((15, 16), (16, 15)):
        with pytest.raises(
            ShapeError, match=f"{ours} tokens and the teacher {theirs}, expected the same number, or two"
        ):
            generic_target(torch.randn(1, theirs, 4), ours)


def test_loss_is_zero_at_equality_quadratic_near_and_linear_far():
    target = torch.randn(2, 3, 4, dtype=torch.float64)
    assert generic_loss(target, target, beta=2.0) == 0
    assert float(generic_loss(target + 1.0, target, beta=2.0)) == pytest.approx(1 / 4)
    assert float(generic_loss(target - 2.0, target, beta=2.0)) == pytest.approx(1.0)
    assert float(generic_loss(target + 5.0, target, beta=2.0)) == pytest.approx(4.0)


def step_and_parts(student=STUDENT) -> tuple[GenericStep, TokenNetwork, TokenNetwork, Decoder]:
    ours, theirs = tokens_of(student), tokens_of(TEACHER, seed=1)
    decoder = Decoder(ours.width, theirs.width, decoder_width=32, depth=1)
    return GenericStep(ours, theirs, decoder, mask_ratio=0.75, beta=2.0), ours, theirs, decoder


def batch(labels: Tensor = LABELS) -> Batch:
    return Batch(images=IMAGES, labels=labels, ids=torch.arange(6), view=0, epoch=0, step=0)


@pytest.mark.parametrize("student", [STUDENT, COARSE])
def test_step_teaches_body_and_decoder_and_nothing_else(student):
    step, ours, theirs, decoder = step_and_parts(student)
    before = copy.deepcopy(theirs.model.state_dict())
    terms = step(ours.model.train(), batch())
    assert list(terms) == ["generic"]
    terms["generic"].backward()
    learnt = {
        name for name, each in ours.model.named_parameters() if each.grad is not None and each.grad.abs().max() > 0
    }
    untaught = {"norm.weight", "norm.bias", "head.weight", "head.bias"}
    assert learnt == {name for name, _ in ours.model.named_parameters()} - untaught
    assert all(each.grad is not None and each.grad.abs().max() > 0 for each in decoder.parameters())
    assert all(each.grad is None for each in theirs.model.parameters())
    assert_same(theirs.model.state_dict(), before)


def test_step_compares_all_tokens_of_the_whole_image_and_looks_at_no_label():
    step, ours, theirs, decoder = step_and_parts()
    torch.manual_seed(5)
    found = step(ours.model, batch())["generic"]
    torch.manual_seed(5)
    mask = random_mask(6, 16, 0.75)
    gap = decoder(ours(IMAGES, mask, decoder.mask_token)) - generic_target(theirs(IMAGES), 16)
    expected = torch.where(gap.abs() < 2, gap.square() / 4, gap.abs() - 1).sum() / (6 * 16 * 12)
    torch.testing.assert_close(found, expected)
    torch.manual_seed(5)
    assert torch.equal(step(ours.model, batch(torch.full((6,), -1)))["generic"], found)


def test_loss_is_float32_under_autocast():
    step, ours, _, _ = step_and_parts()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = step(ours.model, batch())["generic"]
    assert loss.dtype == torch.float32
    assert torch.isfinite(loss)


# ---------------------------------------------------------------- training


@pytest.fixture(scope="module")
def teacher() -> nn.Module:
    return built(TEACHER, seed=9)


@pytest.fixture(scope="module")
def panel(teacher, tmp_path_factory):
    folder = tmp_path_factory.mktemp("outputs")
    write_teacher_outputs(teacher, tiny_dataset(), OutputsSpec(views=2, seed=0, augment=SHIFT), folder)
    return [StoredOutputs.open(folder)]


class StopAfter:
    """Counts the steps of both stages."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    def __call__(self, done: int, total: int) -> None:
        self.left -= 1
        if self.left == 0:
            raise Stop


def training(panel, teacher, folder, *, epochs: int = 4, student=STUDENT, dataset=None, on_step=None) -> Training:
    """Four steps an epoch."""
    train = TrainConfig(epochs=epochs, batch_size=16, learning_rate=0.01, checkpoint_every_steps=3)
    return Training(
        student=built(student, seed=3),
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


def test_student_learns_tokens_then_the_task_and_resumes_in_either(panel, teacher, tmp_path):
    procedure, whole = G2sd(decoder_width=32).build(), training(panel, teacher, tmp_path / "whole")
    start, original = copy.deepcopy(whole.student.state_dict()), copy.deepcopy(teacher.state_dict())
    rows = procedure(whole).rows
    assert [row["epoch"] for row in rows] == [0, 1, 2, 3]
    assert ["generic" in row for row in rows] == [True, True, False, False]
    assert rows[1]["generic"] < rows[0]["generic"]
    trained = whole.student.state_dict()
    assert list(trained) == list(start)
    assert_same(teacher.state_dict(), original)
    decoder = load_state(tmp_path / "whole" / "generic")["helpers"]
    assert "mask_token" in decoder
    assert load_state(tmp_path / "whole" / "specific")["helpers"] == {}

    for steps in (5, 13):
        folder = tmp_path / str(steps)
        with pytest.raises(Stop):
            procedure(training(panel, teacher, folder, on_step=StopAfter(steps)))
        again = training(panel, teacher, folder)
        procedure(again)
        assert_same(again.student.state_dict(), trained)
        assert_same(load_state(folder / "generic")["helpers"], decoder)


def test_the_first_stage_needs_no_labels_and_leaves_the_classifier_alone(panel, teacher):
    datasets = (tiny_dataset(), without_labels(tiny_dataset()))
    trainings = [training(panel, teacher, None, on_step=StopAfter(8), dataset=each) for each in datasets]
    for each in trainings:
        with pytest.raises(Stop):
            G2sd(decoder_width=32).build()(each)
    first, second = (each.student.state_dict() for each in trainings)
    assert_same(first, second)
    start = built(STUDENT, seed=3).state_dict()
    changed = {name for name, value in first.items() if not torch.equal(value, start[name])}
    assert changed == set(start) - {"norm.weight", "norm.bias", "head.weight", "head.bias"}


def test_what_cannot_be_trained_is_refused_before_any_step(panel, teacher):
    procedure, unreachable = G2sd().build(), StopAfter(1)
    convolutional = ResidualCnn(widths=(4,), depths=(1,), strides=(2,))
    for changes, error, message in (
        ({"epochs": 1}, CompressionError, "1 epoch, expected at least 2"),
        ({"student": convolutional}, ShapeError, "'ResidualNet' has no modules 'tokens'"),
    ):
        with pytest.raises(error, match=message):
            procedure(training(panel, teacher, None, on_step=unreachable, **changes))
    with pytest.raises(CompressionError, match="has 1 teachers, expected number 1"):
        G2sd(teacher=1).build()(training(panel, teacher, None, on_step=unreachable))
    with pytest.raises(ShapeError, match="'ResidualNet' has no modules 'tokens'"):
        procedure(training(panel, built(convolutional), None, on_step=unreachable))


@pytest.mark.parametrize(("share", "epochs", "first"), [(0.5, 4, 2), (0.01, 3, 1), (0.99, 3, 2), (0.29, 100, 29)])
def test_each_stage_gets_its_share_of_the_epochs(monkeypatch, panel, teacher, share, epochs, first):
    lengths: list[int] = []

    def record(self: Training, *_args: object, train: TrainConfig, **_options: object) -> History:
        lengths.append(train.epochs)
        return History()

    monkeypatch.setattr(Training, "run", record)
    G2sd(generic_share=share).build()(training(panel, teacher, None, epochs=epochs))
    assert lengths == [first, epochs - first]


@pytest.mark.parametrize(
    "wrong",
    [
        {"generic_share": 1.0},
        {"mask_ratio": 0.0},
        {"decoder_depth": 5},
        {"decoder_width": 100},
        {"beta": 0},
        {"teacher": -1},
        {"distillation_token": True},
    ],
)
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(ValidationError):
        G2sd.model_validate(wrong)
