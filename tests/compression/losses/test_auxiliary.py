"""Auxiliary branches: they teach early stages, learn, resume, and leave nothing in the student or its file."""

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from compression.distill import Auxiliary, CrossEntropy, DistillationStep, DistillConfig, Shapes, Uniform, distill
from compression.errors import ShapeError
from compression.features import looked_at, stage_names
from compression.train import Hardware, TrainConfig
from compression.types import Batch, Outputs, TeacherOutputs
from compression.zoo import ResidualCnn, VisionTransformer
from tests.compression.losses.short_training import SHIFT, Stop, assert_same, one_thread, stop_at, stored
from tests.compression.tiny_data import CLASSES, tiny_dataset

LABELS = torch.tensor([0, 1, 2, 3])


def panel(batch: int = 4, classes: int = len(CLASSES)) -> TeacherOutputs:
    generator = torch.Generator().manual_seed(1)
    return TeacherOutputs(torch.randn(1, batch, classes, generator=generator), torch.ones(1, batch))


def student_of(model) -> tuple[nn.Module, tuple[str, ...]]:
    torch.manual_seed(0)
    student = model.build(len(CLASSES), (1, 8, 8))
    return student, stage_names(student, torch.zeros(1, 1, 8, 8))


def prepared(student: nn.Module, stages: tuple[str, ...]):
    maps = looked_at(student.eval(), torch.zeros(1, 1, 8, 8), stages=stages).maps
    loss = Auxiliary().build()
    torch.manual_seed(0)
    loss.prepare(Shapes(num_classes=4, student_width=8, student_maps=tuple(tuple(m.shape[1:]) for m in maps)))
    return loss


@pytest.mark.parametrize(
    "model",
    [
        ResidualCnn(widths=(8, 8), depths=(1, 1), strides=(1, 2), stem_width=8),
        VisionTransformer(width=8, depth=3, num_heads=2, patch_size=2, stem_width=8),
    ],
    ids=["images", "tokens"],
)
def test_early_stages_get_a_gradient_that_did_not_pass_the_last(model):
    student, stages = student_of(model)
    loss = prepared(student, stages)
    student.train()
    seen = looked_at(student, torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0)), stages=stages)
    value = loss(seen, panel(), LABELS)
    value.backward()
    assert value.item() > 0
    reached = {name for name, each in student.named_parameters() if each.grad is not None and each.grad.any()}
    assert any(name.startswith(("stem", "tokens")) for name in reached)
    assert not any(name.startswith("head") for name in reached), "the student's classifier is another term's"
    last = stages[-1] + "."
    assert not any(name.startswith(last) for name in reached)
    assert len(loss.branch_logits(seen)) == len(stages) - 1


def test_is_least_where_every_branch_gives_the_teachers_answer():
    """Cross entropy plus kd of a branch whose logits are the teacher's: kd is 0, what is left is half the nll."""
    loss = Auxiliary(temperature=3.0).build()
    loss.prepare(Shapes(num_classes=4, student_width=8, student_maps=((4, 2, 2), (4, 1, 1))))
    teachers = panel()
    loss.branches = nn.ModuleList([nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())])
    maps = (teachers.logits[0][:, :, None, None].expand(-1, -1, 2, 2), torch.zeros(4, 4, 1, 1))
    value = loss(Outputs(torch.zeros(4, 4), maps=maps), teachers, LABELS)
    expected = 0.5 * nn.functional.cross_entropy(teachers.logits[0], LABELS)
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)


def test_refuses_a_student_of_one_stage_and_other_maps():
    loss = Auxiliary().build()
    with pytest.raises(ShapeError, match="has 1 stages of the student, expected at least 2"):
        loss.prepare(Shapes(num_classes=4, student_width=8, student_maps=((4, 2, 2),)))
    loss.prepare(Shapes(num_classes=4, student_width=8, student_maps=((4, 2, 2), (4, 1, 1))))
    with pytest.raises(ShapeError, match=r"\[\[5, 2, 2\]\], expected \[\[4, 2, 2\]\]"):
        loss(Outputs(torch.zeros(4, 4), maps=(torch.zeros(4, 5, 2, 2), torch.zeros(4, 4, 1, 1))), panel(), LABELS)


def test_is_refused_alone():
    with pytest.raises(ValidationError, match="'auxiliary' alone, expected another term"):
        DistillConfig.model_validate({"train": {"epochs": 1}, "losses": (Auxiliary(),)})


def test_unlabelled_images_teach_no_branch(tmp_path):
    data = tiny_dataset(validation=16)
    teachers = [stored(data, tmp_path / "outputs", width=6, seed=6)]
    step = DistillationStep((CrossEntropy(), Auxiliary()), Uniform(), teachers)
    student = ResidualCnn(widths=(8, 8), depths=(1, 1), strides=(1, 2), stem_width=8).build(4, (1, 8, 8))
    step.prepare(student, data)
    batch = Batch(torch.randn(4, 1, 8, 8), torch.full((4,), -1), data.train.ids[:4], view=0, epoch=0, step=0)
    assert step(student, batch)["auxiliary"].item() == 0.0


def test_branches_learn_resume_and_stay_out_of_the_student(tmp_path):
    data = tiny_dataset(validation=16)
    teachers = [stored(data, tmp_path / "outputs", width=6, seed=6)]
    train = TrainConfig(epochs=3, batch_size=16, learning_rate=0.01, checkpoint_every_steps=2)
    config = DistillConfig(train=train, losses=(CrossEntropy(), Auxiliary()), views=2)

    def trained(folder: str, on_step=None) -> tuple[nn.Module, list]:
        student, _ = student_of(ResidualCnn(widths=(8, 8), depths=(1, 1), strides=(1, 2), stem_width=8))
        arguments = {"seed": 0, "augment": SHIFT, "hardware": Hardware(accelerator="cpu")}
        with one_thread():
            history = distill(
                student, teachers, data, config, checkpoint_dir=tmp_path / folder, on_step=on_step, **arguments
            )
        return student, history.rows

    student, rows = trained("whole")
    assert rows[-1]["auxiliary"] < rows[0]["auxiliary"]
    fresh, _ = student_of(ResidualCnn(widths=(8, 8), depths=(1, 1), strides=(1, 2), stem_width=8))
    assert list(student.state_dict()) == list(fresh.state_dict())
    with pytest.raises(Stop):
        trained("cut", on_step=stop_at(7))
    assert_same(trained("cut")[0].state_dict(), student.state_dict())
