"""Talking models: what it is without coders, its scale, what each part learns from, and training with it."""

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from compression.distill import DistillConfig, Shapes
from compression.distill.losses.talking import Talk, Talking, distance, standardised
from compression.errors import ShapeError
from compression.types import Outputs, TeacherOutputs
from tests.compression.losses.short_training import (
    CLASSES,
    Stop,
    assert_same,
    distilled,
    fresh_parts,
    net,
    stop_at,
    stored,
)
from tests.compression.tiny_data import tiny_dataset

WIDTH, BATCH = 6, 5
LABELS = torch.zeros(BATCH, dtype=torch.int64)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def prepared(widths: tuple[int, ...] = (WIDTH,), **options) -> Talk:
    """The loss in float64, ready for teachers of these widths."""
    loss = Talking(**options).build()
    assert isinstance(loss, Talk)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        loss.prepare(Shapes(num_classes=len(CLASSES), student_width=WIDTH, teacher_widths=widths))
    return loss.double()


def without_coders(loss: Talk) -> Talk:
    """The loss when every message is the features themselves."""
    loss.encoder = loss.decoder = nn.Identity()
    for coders in (loss.teacher_encoders, loss.teacher_decoders):
        for number in range(len(coders)):
            coders[number] = nn.Identity()
    return loss


def outputs(features: Tensor) -> Outputs:
    return Outputs(torch.zeros(len(features), len(CLASSES)), {"penultimate": features})


def panel(*features: Tensor, weights: Tensor | None = None) -> TeacherOutputs:
    count, batch = len(features), len(features[0])
    shares = torch.full((count, batch), 1 / count, dtype=torch.float64) if weights is None else weights
    return TeacherOutputs(torch.zeros(count, batch, len(CLASSES)), shares, features)


def unit_rows(values: Tensor) -> Tensor:
    centred = values - values.mean(dim=-1, keepdim=True)
    return centred / centred.square().mean(dim=-1, keepdim=True).sqrt()


# ---------------------------------------------------------------- the formula


def test_without_coders_it_is_the_mean_squared_error_of_standardised_features():
    loss = without_coders(prepared(interaction=1.0, message=0.3, state=5.0))
    ours, theirs = randn(BATCH, WIDTH), randn(BATCH, WIDTH, seed=1)
    expected = 1.3 * nn.functional.mse_loss(unit_rows(ours), unit_rows(theirs))
    torch.testing.assert_close(loss(outputs(ours), panel(theirs), LABELS), expected, rtol=1e-4, atol=1e-4)


def test_without_coders_it_is_zero_where_features_agree_up_to_scale_and_offset():
    loss, ours = without_coders(prepared()), randn(BATCH, WIDTH)
    assert loss(outputs(ours), panel(ours * 7 + 3), LABELS) < 1e-6
    assert loss(outputs(ours), panel(-ours), LABELS) > 1


@pytest.mark.parametrize("scale", [0.1, 1.0, 1000.0])
@pytest.mark.parametrize("width", [8, 512])
def test_unrelated_sides_cost_about_as_much_at_any_width_and_scale(scale, width):
    ours, theirs = standardised(randn(64, width) * scale), standardised(randn(64, width, seed=1) * scale)
    assert 1.8 < float(distance(ours, theirs).mean()) < 2.2
    loss = Talking(interaction=1.0, message=0.0, state=0.0).build()
    loss.prepare(Shapes(len(CLASSES), width, (width,)))
    fresh = loss(outputs(randn(64, width).float() * scale), panel(randn(64, width, seed=1).float() * scale), LABELS)
    assert 0.9 < fresh.item() < 2.5


def test_no_coder_gains_by_whispering():
    loss, student, theirs = prepared((4,)), outputs(randn(BATCH, WIDTH)), panel(randn(BATCH, 4, seed=1))
    before = loss(student, theirs, LABELS)
    with torch.no_grad():
        for coder in (loss.encoder, loss.teacher_encoders[0]):
            coder.weight.mul_(0.2)
            coder.bias.mul_(0.2)
    torch.testing.assert_close(loss(student, theirs, LABELS), before, rtol=1e-2, atol=1e-2)


def test_is_the_weighted_sum_of_its_three_parts():
    student, theirs = outputs(randn(BATCH, WIDTH)), panel(randn(BATCH, 4, seed=1))
    parts = {"interaction": 0.0, "message": 0.0, "state": 0.0}
    alone = [prepared((4,), **{**parts, name: 1.0})(student, theirs, LABELS) for name in parts]
    assert all(value > 0.1 for value in alone)
    whole = prepared((4,), interaction=2.0, message=3.0, state=5.0)(student, theirs, LABELS)
    torch.testing.assert_close(whole, 2 * alone[0] + 3 * alone[1] + 5 * alone[2])


def test_teachers_count_with_their_weights_per_sample():
    loss, ours = prepared((4, 7)), randn(BATCH, WIDTH)
    first, second = randn(BATCH, 4, seed=1), randn(BATCH, 7, seed=2)
    share = torch.rand(BATCH, generator=torch.Generator().manual_seed(5)).double()

    def singly(number: int) -> Tensor:
        weights = torch.zeros(2, 1, dtype=torch.float64)
        weights[number] = 1
        rows = [
            loss(outputs(ours[i : i + 1]), panel(first[i : i + 1], second[i : i + 1], weights=weights), LABELS[:1])
            for i in range(BATCH)
        ]
        return torch.stack(rows)

    assert (singly(0) - singly(1)).abs().max() > 1e-2
    found = loss(outputs(ours), panel(first, second, weights=torch.stack([share, 1 - share])), LABELS)
    torch.testing.assert_close(found, (share * singly(0) + (1 - share) * singly(1)).mean())


# ---------------------------------------------------------------- gradients


def test_each_part_teaches_the_coders_it_is_made_of():
    """The state term alone teaches the teacher's decoder, and says nothing across the two sides."""
    coders = {
        "interaction": {"teacher_encoders.0", "decoder"},
        "message": {"teacher_encoders.0", "encoder"},
        "state": {"teacher_encoders.0", "teacher_decoders.0", "encoder", "decoder"},
    }
    for part, wanted in coders.items():
        loss = prepared((4,), **{"interaction": 0.0, "message": 0.0, "state": 0.0, part: 1.0})
        ours, theirs = randn(BATCH, WIDTH).requires_grad_(), randn(BATCH, 4, seed=1).requires_grad_()
        loss(outputs(ours), panel(theirs), LABELS).backward()
        moved = {name.rsplit(".", 1)[0] for name, each in loss.named_parameters() if each.grad.abs().max() > 1e-9}
        assert moved == wanted, part
        assert ours.grad.abs().max() > 1e-6
        assert theirs.grad is None


def test_gradient_is_that_of_finite_differences():
    loss, theirs = prepared((4,), message_width=3), panel(randn(2, 4, seed=1))
    assert torch.autograd.gradcheck(
        lambda ours: loss(outputs(ours), theirs, LABELS[:2]), randn(2, WIDTH).requires_grad_(), atol=1e-6
    )


def test_features_of_zeros_give_finite_numbers():
    ours = torch.zeros(BATCH, WIDTH, dtype=torch.float64, requires_grad=True)
    value = prepared((4,))(outputs(ours), panel(torch.zeros(BATCH, 4).double()), LABELS)
    value.backward()
    assert torch.isfinite(value)
    assert torch.isfinite(ours.grad).all()


# ---------------------------------------------------------------- refusals


def test_refuses_other_teachers():
    loss = prepared((7,))
    with pytest.raises(ShapeError, match=r"\[\[5, 3\]\], expected \[\[5, 7\]\]"):
        loss(outputs(randn(BATCH, WIDTH)), panel(randn(BATCH, 3)), LABELS)
    none = TeacherOutputs(torch.zeros(1, BATCH, len(CLASSES)), torch.ones(1, BATCH))
    with pytest.raises(ShapeError, match=r"\[\], expected \[\[5, 7\]\]"):
        loss(outputs(randn(BATCH, WIDTH)), none, LABELS)
    more = TeacherOutputs(torch.zeros(1, BATCH, 9), torch.ones(1, BATCH), (randn(BATCH, 7),))
    with pytest.raises(ShapeError, match="Use teachers of the same classes"):
        loss(outputs(randn(BATCH, WIDTH)), more, LABELS)


@pytest.mark.parametrize("wrong", [{"message_width": 1}, {"state": -0.1}, {"weight": -1}, {"rounds": 2}])
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(ValidationError):
        Talking.model_validate(wrong)


def test_is_refused_alone_since_nothing_would_train_the_classifier():
    with pytest.raises(ValidationError, match="'talking' alone, expected another term beside it"):
        DistillConfig.model_validate({"train": {"epochs": 1}, "losses": (Talking(),)})


# ---------------------------------------------------------------- training


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    """One as wide as the student, and a wider one."""
    folder = tmp_path_factory.mktemp("outputs")
    return [stored(tiny_dataset(validation=16), folder / str(width), width=width, seed=width) for width in (6, 8)]


def test_coders_learn_resume_and_stay_out_of_the_student(teachers, tmp_path):
    data, loss = tiny_dataset(validation=16), Talking(message_width=4)
    start = fresh_parts(loss, net(6, seed=3), teachers, data)
    student, parts, history = distilled(loss, teachers, data, tmp_path / "whole")
    assert sorted(parts) == sorted(start)
    assert len(parts) == 12
    for key, value in parts.items():
        assert (value - start[key]).abs().max() > 1e-3, key
    assert history.rows[-1]["talking"] < history.rows[0]["talking"]
    assert list(student.state_dict()) == list(net(6, seed=3).state_dict())

    with pytest.raises(Stop):
        distilled(loss, teachers, data, tmp_path / "cut", on_step=stop_at(7))
    again, parts_again, _ = distilled(loss, teachers, data, tmp_path / "cut")
    assert_same(again.state_dict(), student.state_dict())
    assert_same(parts_again, parts)
