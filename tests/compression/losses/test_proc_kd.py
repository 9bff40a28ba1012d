"""Prototypes of teachers: how tokens are assigned, the two phases, the correction, and training with them."""

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn import functional as F

from compression.distill import CrossEntropy, DistillationStep, DistillConfig, Shapes, Uniform, distill
from compression.distill.losses.proc_kd import (
    ProcKd,
    PrototypeGuided,
    assignments,
    mean_assignment,
    reconstruction,
)
from compression.distill.types import Progress
from compression.errors import ShapeError
from compression.features import tokens_of
from compression.teacher_outputs import OutputsSpec, StoredOutputs, write_teacher_outputs
from compression.train import Hardware, TrainConfig
from compression.train.step_checkpoint import load_state
from compression.types import Outputs, TeacherOutputs
from tests.compression.losses.short_training import SHIFT, Stop, assert_same, one_thread, stop_at
from tests.compression.tiny_data import CLASSES, tiny_dataset

OURS, THEIRS, TOKENS = (5, 4, 4), (7, 2, 3), (6, 3)
"""Last maps of a student, of a teacher, and of one that gives tokens."""
LABELS = torch.tensor([0, 1, 2, 3, 0, 1])
BATCH = len(LABELS)
FIRST, SECOND = Progress(epoch=0, epochs=5), Progress(epoch=1, epochs=5)
"""Of the two phases with a share of 0.2."""


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def prepared(*theirs: tuple[int, ...], ours=OURS, progress: Progress = SECOND, **options) -> PrototypeGuided:
    """The loss in float64, ready for networks with these last maps."""
    loss = ProcKd(**({"prototypes": 9} | options)).build()
    assert isinstance(loss, PrototypeGuided)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        # An earlier stage stands before the last one of either side.
        loss.prepare(
            Shapes(
                num_classes=4,
                student_width=2,
                student_maps=((1, 8, 8), ours),
                teacher_maps=tuple(((2, 8, 8), shape) for shape in theirs or (THEIRS,)),
            )
        )
    loss.progress = progress
    return loss.double()


def outputs(logits: Tensor, last: Tensor) -> Outputs:
    return Outputs(logits, maps=(torch.zeros(len(last), 1, 8, 8), last))


def panel(*lasts: Tensor, weights: Tensor | None = None) -> TeacherOutputs:
    count, batch = len(lasts), len(lasts[0])
    shares = torch.full((count, batch), 1 / count, dtype=torch.float64) if weights is None else weights
    maps = tuple((torch.zeros(batch, 2, 8, 8), last) for last in lasts)
    return TeacherOutputs(torch.zeros(count, batch, 4), shares, maps=maps)


def normalised(last: Tensor) -> Tensor:
    tokens = tokens_of(last)
    centred = tokens - tokens.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()


# ---------------------------------------------------------------- assignments


def test_assignments_are_distributions_and_their_mean_is_one():
    tokens, prototypes = randn(3, 5, 4), randn(9, 4, seed=1)
    found = assignments(tokens, prototypes).exp()
    torch.testing.assert_close(found.sum(-1), torch.ones(3, 5).double())
    torch.testing.assert_close(mean_assignment(tokens, prototypes).exp(), found.mean(1))
    for k in range(9):
        torch.testing.assert_close(
            found[2, 3, k] / found[2, 3, 0], torch.exp(tokens[2, 3] @ (prototypes[k] - prototypes[0]) / 2)
        )
    far = mean_assignment(tokens * 1e4, prototypes)
    assert torch.isfinite(far).all()


def test_reconstruction_is_the_error_of_the_assigned_mean_of_prototypes():
    tokens, prototypes = randn(3, 5, 4), randn(9, 4, seed=1)
    for i, value in enumerate(reconstruction(tokens, prototypes)):
        total = 0.0
        for n in range(5):
            shares = (prototypes @ tokens[i, n] / 2).softmax(0)
            total += float((tokens[i, n] - sum(shares[k] * prototypes[k] for k in range(9))).square().sum())
        assert float(value) == pytest.approx(total / (5 * 4))
    own = 30 * torch.eye(4).double()
    assert reconstruction(own[[0, 2, 1]].unsqueeze(0), own).item() == pytest.approx(0.0, abs=1e-12)


# ---------------------------------------------------------------- first phase


@pytest.mark.parametrize(
    ("share", "epochs", "first"),
    [(0.2, 1, 0), (0.2, 2, 1), (0.2, 10, 2), (0.2, 12, 3), (0.07, 100, 7), (0.0, 5, 0), (0.99, 5, 4)],
)
def test_first_phase_is_a_share_of_the_epochs_rounded_up_and_leaves_the_last(share, epochs, first):
    loss = ProcKd(prototype_share=share).build()
    found = []
    for epoch in range(epochs):
        loss.progress = Progress(epoch=epoch, epochs=epochs)
        found.append(loss.learning)
    assert found == [True] * first + [False] * (epochs - first)


def test_in_the_first_phase_prototypes_alone_learn():
    logits, ours = randn(BATCH, 4).requires_grad_(), randn(BATCH, *OURS, seed=1).requires_grad_()
    first, second = randn(BATCH, *THEIRS, seed=2).requires_grad_(), randn(BATCH, *TOKENS, seed=3)
    share = torch.rand(BATCH, generator=torch.Generator().manual_seed(5)).double()
    loss = prepared(THEIRS, TOKENS, progress=FIRST).eval()
    found = loss(outputs(logits, ours), panel(first, second, weights=torch.stack([share, 1 - share])), LABELS)
    errors = [
        reconstruction(normalised(last), book.prototypes)
        for last, book in zip((first, second), loss.books, strict=True)
    ]
    torch.testing.assert_close(found, (share * errors[0] + (1 - share) * errors[1]).mean())
    found.backward()
    assert torch.equal(logits.grad, torch.zeros(BATCH, 4).double())
    assert ours.grad is None
    assert first.grad is None
    for name, parameter in loss.named_parameters():
        learns = parameter.grad is not None and bool(parameter.grad.any())
        assert learns == name.endswith("prototypes"), name


def test_prototypes_start_from_the_first_tokens_seen_in_training_and_once():
    loss, last = prepared(progress=FIRST, prototypes=40), randn(BATCH, *THEIRS)
    book, student = loss.books[0], outputs(randn(BATCH, 4), randn(BATCH, *OURS))
    before = book.prototypes.detach().clone()
    loss.eval()(student, panel(last), LABELS)
    assert torch.equal(book.prototypes, before)
    assert not book.started
    loss.train()(student, panel(last), LABELS).backward()
    assert book.prototypes.grad.any()
    gaps = torch.cdist(book.prototypes.detach(), normalised(last).flatten(0, 1)).min(1).values
    assert gaps.min() > 0
    assert gaps.max() < 0.1  # noise of 0.01 in 7 directions
    assert len(book.prototypes.unique(dim=0)) == 40
    drawn = book.prototypes.detach().clone()
    loss(student, panel(last + 1), LABELS)
    assert torch.equal(book.prototypes, drawn)


def test_first_phase_lowers_the_error():
    loss, last = prepared(progress=FIRST), randn(BATCH, *THEIRS)
    optimiser = torch.optim.AdamW(loss.parameters(), lr=0.05)
    values = []
    for _ in range(30):
        value = loss(outputs(randn(BATCH, 4), randn(BATCH, *OURS)), panel(last), LABELS)
        optimiser.zero_grad()
        value.backward()
        optimiser.step()
        values.append(float(value.detach()))
    assert values[-1] < values[0] / 2


# ---------------------------------------------------------------- second phase


def test_with_gamma_zero_it_is_the_plain_student_to_the_bit():
    logits, ours = randn(BATCH, 4).requires_grad_(), randn(BATCH, *OURS, seed=1).requires_grad_()
    plain = logits.detach().clone().requires_grad_()
    loss = prepared(alignment=0.0)
    found, expected = loss(outputs(logits, ours), panel(randn(BATCH, *THEIRS)), LABELS), F.cross_entropy(plain, LABELS)
    found.backward()
    expected.backward()
    assert torch.equal(found, expected)
    assert torch.equal(logits.grad, plain.grad)
    assert not ours.grad.any()
    assert loss.books[0].gamma.grad.abs() > 1e-4  # so that it does not stay there


def test_correction_is_a_linear_layer_of_what_the_tokens_attend_to():
    logits, ours = randn(BATCH, 4), randn(BATCH, *OURS, seed=1)
    lasts = (randn(BATCH, *THEIRS, seed=2), randn(BATCH, *TOKENS, seed=3))
    share = torch.rand(BATCH, generator=torch.Generator().manual_seed(5)).double()
    weights = torch.stack([share, 1 - share])
    loss = prepared(THEIRS, TOKENS, alignment=0.6)
    helped, alignment = logits.clone(), torch.zeros(BATCH).double()
    for k, (last, book) in enumerate(zip(lasts, loss.books, strict=True)):
        book.gamma.data.fill_(0.5 + k)
        theirs = normalised(last)
        for i in range(BATCH):
            tokens = normalised(book.query(tokens_of(ours[i : i + 1])))[0]
            shares = [(book.prototypes @ token / theirs.shape[-1] ** 0.5).softmax(0) for token in tokens]
            attended = sum(row @ book.prototypes for row in shares) / len(shares)
            helped[i] += weights[k, i] * book.gamma * book.correction(attended)
            mine, wanted = sum(shares) / len(shares), assignments(theirs[i], book.prototypes).exp().mean(0)
            alignment[i] += weights[k, i] * (wanted * (wanted / mine).log()).sum()
    expected = F.cross_entropy(helped, LABELS) + 0.6 * alignment.mean()
    found = loss(outputs(logits, ours), panel(*lasts, weights=weights), LABELS)
    torch.testing.assert_close(found, expected)
    assert (helped - logits).abs().max() > 1e-2
    assert alignment.min() > 1e-3


def test_alignment_is_zero_for_a_student_that_has_the_teachers_features():
    last, logits = randn(BATCH, *THEIRS), randn(BATCH, 4)
    loss = prepared(THEIRS, ours=THEIRS)
    query = loss.books[0].query
    query.weight.data.copy_(3 * torch.eye(7))  # size of features does not matter
    query.bias.data.zero_()
    plain = F.cross_entropy(logits, LABELS)
    torch.testing.assert_close(loss(outputs(logits, last), panel(last), LABELS).detach(), plain)
    shuffled = tokens_of(last).flip(1)  # nor the place of tokens
    torch.testing.assert_close(loss(outputs(logits, shuffled), panel(last), LABELS).detach(), plain)
    assert loss(outputs(logits, last.flip(1)), panel(last), LABELS) - plain > 1e-3


def test_in_the_second_phase_prototypes_stand_still():
    logits, ours = randn(BATCH, 4).requires_grad_(), randn(BATCH, *OURS, seed=1).requires_grad_()
    theirs, loss = randn(BATCH, *THEIRS, seed=2).requires_grad_(), prepared()
    optimiser = torch.optim.AdamW(loss.parameters(), lr=0.1, weight_decay=0.1)
    student = outputs(logits, ours)
    loss.progress = FIRST
    loss(student, panel(theirs), LABELS).backward()
    optimiser.step()  # from now on the optimiser has momentum for them
    loss.progress = SECOND
    before = {name: value.clone() for name, value in loss.state_dict().items()}
    for _ in range(2):
        optimiser.zero_grad()
        loss(student, panel(theirs), LABELS).backward()
        optimiser.step()
    for name, value in loss.state_dict().items():
        still = name.endswith(("prototypes", "started"))
        assert torch.equal(value, before[name]) == still, name
    assert logits.grad.any()
    assert ours.grad.any()
    assert theirs.grad is None


@pytest.mark.parametrize("progress", [FIRST, SECOND], ids=["first", "second"])
@pytest.mark.parametrize("scale", [0.0, 1e-4, 1e4])
def test_maps_of_any_size_give_finite_numbers(progress, scale):
    loss = prepared(progress=progress).float()
    ours = (randn(BATCH, *OURS).float() * scale).requires_grad_()
    logits = (randn(BATCH, 4).float() * 1e4).requires_grad_()
    found = loss(outputs(logits, ours), panel(randn(BATCH, *THEIRS, seed=1).float() * scale), LABELS)
    found.backward()
    assert torch.isfinite(found)
    assert ours.grad is None or torch.isfinite(ours.grad).all()
    assert all(each.grad is None or torch.isfinite(each.grad).all() for each in loss.parameters())


def test_refuses_other_networks():
    logits, ours = randn(BATCH, 4), randn(BATCH, *OURS)
    with pytest.raises(ShapeError, match=r"widths \[5, 3\], expected \[5, 7\].*'proc_kd'"):
        prepared()(outputs(logits, ours), panel(randn(BATCH, *TOKENS)), LABELS)
    with pytest.raises(ShapeError, match=r"widths \[7, 7\], expected \[5, 7\]"):
        prepared()(outputs(logits, randn(BATCH, *THEIRS)), panel(randn(BATCH, *THEIRS)), LABELS)
    with pytest.raises(ShapeError, match="Use teachers of the same classes"):
        prepared()(outputs(randn(BATCH, 5), ours), panel(randn(BATCH, *THEIRS)), LABELS)


# ---------------------------------------------------------------- training


def net(width: int, seed: int) -> nn.Module:
    """A network whose last map is ``width`` x 4 x 4."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, width, 3, stride=2, padding=1),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(width * 16, len(CLASSES)),
        )


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    """Two models, and what is stored of them."""
    folder, models = tmp_path_factory.mktemp("outputs"), [net(8, seed=1), net(5, seed=2)]
    spec = OutputsSpec(views=2, seed=0, augment=SHIFT, features=False)
    for number, model in enumerate(models):
        write_teacher_outputs(model, tiny_dataset(validation=16), spec, folder / str(number))
    return [StoredOutputs.open(folder / str(number)) for number in range(2)], models


def test_prototypes_then_the_student_learn_resume_and_are_left_behind(teachers, tmp_path):
    panel, models = teachers
    loss = ProcKd(prototypes=12, prototype_share=0.3)

    def distilled(name: str, on_step=None):
        student = net(6, seed=3)
        train = TrainConfig(epochs=3, batch_size=16, learning_rate=0.01, checkpoint_every_steps=2)
        config = DistillConfig(train=train, losses=(CrossEntropy(), loss), views=2)
        with one_thread():
            history = distill(
                student,
                panel,
                tiny_dataset(validation=16),
                config,
                seed=0,
                augment=SHIFT,
                teachers=models,
                hardware=Hardware(accelerator="cpu"),
                checkpoint_dir=tmp_path / name,
                on_step=on_step,
            )
        return student, load_state(tmp_path / name)["helpers"], history

    step = DistillationStep((CrossEntropy(), loss), Uniform(), (), models)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        step.prepare(net(6, seed=3), tiny_dataset(validation=16))
    start = step.helpers.state_dict()

    student, parts, history = distilled("whole")
    assert sorted(parts) == sorted(start)
    for name, value in start.items():
        assert not torch.equal(parts[name], value), name
    assert parts["0.codebooks.0.prototypes"].shape == (12, 8)
    assert parts["0.codebooks.1.prototypes"].shape == (12, 5)
    assert history.rows[2]["proc_kd"] < history.rows[1]["proc_kd"]
    assert list(student.state_dict()) == list(net(6, seed=3).state_dict())

    # An epoch is 4 steps and the first is that of the prototypes; a state is saved after every second step.
    for stop, saved in ((3, 2), (5, 4)):
        with pytest.raises(Stop):
            distilled(f"cut-{stop}", stop_at(stop))
        held = load_state(tmp_path / f"cut-{stop}")["helpers"]
        for name, value in held.items():
            moved = name.endswith(("prototypes", "started"))
            assert torch.equal(value, start[name]) != moved, name
            if name.endswith("prototypes"):
                assert torch.equal(value, parts[name]) == (saved == 4), name
        again, parts_again, _ = distilled(f"cut-{stop}")
        assert_same(again.state_dict(), student.state_dict())
        assert_same(parts_again, parts)


def test_is_refused_alone_since_the_exported_student_has_no_help():
    with pytest.raises(ValidationError, match="'proc_kd' alone, expected another term beside it"):
        DistillConfig.model_validate({"train": {"epochs": 1}, "losses": (ProcKd(),)})


@pytest.mark.parametrize("wrong", [{"prototypes": 1}, {"prototype_share": 1.0}, {"alignment": -1}, {"gamma": 0}])
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(ValidationError):
        ProcKd.model_validate(wrong)
