"""A step learns from what each sample offers: a label or none, stored or live teachers, one gradient or two."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from compression.distill import CrossEntropy, Dhkd, DistillationStep, Dkd, Kd, Uniform, live_distillation_step
from compression.distill.alignment import AlignedBackward, without_conflict
from compression.distill.online import Changed, OnlineAugment
from compression.errors import CompressionError
from compression.types import Batch
from tests.compression.losses.short_training import net
from tests.compression.tiny_data import tiny_dataset

pytestmark = pytest.mark.usefixtures("one_thread")


def batch_of(count: int, unlabelled: int = 0) -> Batch:
    split = tiny_dataset().train
    images = split.images[:count].float() / 255
    labels = split.labels[:count].clone()
    labels[:unlabelled] = -1
    return Batch(images, labels, split.ids[:count], view=0, epoch=0, step=0)


def step_of(*losses, online: OnlineAugment | None = None) -> DistillationStep:
    step = DistillationStep(losses, Uniform(), (), [net(5, 1).eval()], online=online)
    step.prepare(net(6, 3), tiny_dataset())
    return step


def part(batch: Batch, rows: slice) -> Batch:
    return replace(batch, images=batch.images[rows], labels=batch.labels[rows], ids=batch.ids[rows])


def test_samples_without_a_label_teach_through_the_teachers_alone():
    student = net(6, 3).eval()
    step = step_of(CrossEntropy(weight=1.0), Dkd(weight=1.0), Kd(weight=1.0))
    mixed = step(student, batch_of(8, unlabelled=6))
    labelled = step(student, part(batch_of(8), slice(6, 8)))
    torch.testing.assert_close(mixed["cross_entropy"], labelled["cross_entropy"] * 2 / 8)
    torch.testing.assert_close(mixed["dkd"], labelled["dkd"] * 2 / 8)
    torch.testing.assert_close(mixed["kd"], step(student, batch_of(8))["kd"])


def test_a_batch_without_any_label_gives_the_losses_of_labels_nothing():
    student = net(6, 3)
    terms = step_of(CrossEntropy(), Kd())(student, batch_of(4, unlabelled=4))
    assert terms["cross_entropy"] == 0
    torch.stack(list(terms.values())).sum().backward()
    gradients = [parameter.grad for parameter in student.parameters()]
    alone = net(6, 3)
    step_of(Kd())(alone, batch_of(4))["kd"].backward()
    for found, wanted in zip(gradients, alone.parameters(), strict=True):
        torch.testing.assert_close(found, wanted.grad)


class Blend(OnlineAugment):
    """Replaces the second half of the batch by its mean with the first."""

    def forward(self, batch: Batch, student: nn.Module, teachers) -> Changed:
        half = len(batch.labels) // 2
        images, labels = batch.images.clone(), batch.labels.clone()
        images[half:] = (images[:half] + images[half:]) / 2
        hot = torch.eye(4)[batch.labels]
        soft = torch.cat([hot[:half], (hot[:half] + hot[half:]) / 2])
        labels[half:] = -1
        return Changed(images, labels, soft)


def test_mixed_images_reach_student_and_teachers_and_their_soft_labels_the_cross_entropy():
    student = net(6, 3).eval()
    batch = batch_of(8)
    terms = step_of(CrossEntropy(weight=1.0), Dkd(weight=1.0), Kd(weight=1.0), online=Blend())(student, batch)
    changed = Blend()(batch, student, [])
    logits = student(changed.images)
    assert changed.soft_labels is not None
    torch.testing.assert_close(terms["cross_entropy"], -(changed.soft_labels * logits.log_softmax(1)).sum(1).mean())
    plain = step_of(Dkd(weight=1.0), Kd(weight=1.0))
    torch.testing.assert_close(terms["kd"], plain(student, replace(batch, images=changed.images))["kd"])
    torch.testing.assert_close(terms["dkd"], plain(student, part(batch, slice(0, 4)))["dkd"] / 2)


def test_stored_teachers_cannot_say_what_they_think_of_a_changed_batch():
    class Stored:
        pass

    with pytest.raises(CompressionError, match="1 stored teachers, expected live ones"):
        DistillationStep((Kd(),), Uniform(), [Stored()], online=Blend())  # pyright: ignore[reportArgumentType]


# ---------------------------------------------------------------- gradient alignment


def flat(tensors) -> Tensor:
    return torch.cat([each.flatten() for each in tensors])


def test_a_gradient_in_conflict_loses_its_part_along_the_guide():
    generator = torch.Generator().manual_seed(0)
    guide = [torch.randn(3, 2, generator=generator), torch.randn(4, generator=generator)]
    against = [-g + 0.5 * torch.randn(g.shape, generator=generator) for g in guide]
    kept = without_conflict(guide, against)
    assert abs(float(flat(kept) @ flat(guide))) < 1e-5
    total = flat(kept) + flat(guide)
    torch.testing.assert_close(total @ flat(guide), flat(guide).square().sum())
    assert float(flat(kept).norm()) < float(flat(against).norm())


def test_a_gradient_without_conflict_stays_as_it_is():
    guide, other = [torch.tensor([1.0, 0.0])], [torch.tensor([0.5, -2.0])]
    assert torch.equal(without_conflict(guide, other)[0], other[0])
    assert torch.equal(without_conflict([torch.zeros(2)], other)[0], other[0])


def test_alignment_changes_the_shared_parameters_alone():
    shared, first, second = (nn.Parameter(torch.tensor(1.0)) for _ in range(3))
    terms = {"a": 2 * shared + first, "b": -3 * shared + second}
    AlignedBackward(lambda: [shared, first, second], ["b"])(terms, lambda loss, **more: loss.backward(**more))
    assert shared.grad == 2  # all of -3 runs against it
    assert first.grad == 1
    assert second.grad == 1


def test_dual_head_with_alignment_gives_the_backbone_no_pull_against_the_labels():
    def gradient(*losses, backward: bool) -> Tensor:
        student = net(6, 3)
        assert isinstance(student, nn.Sequential)
        step = DistillationStep(losses, Uniform(), (), [net(5, 1).eval()])
        with torch.random.fork_rng():
            torch.manual_seed(0)
            step.prepare(student, tiny_dataset())
        terms = step(student, batch_of(16))
        how = step.backward if backward else None
        if how is None:
            torch.stack(list(terms.values())).sum().backward()
        else:
            how(terms, lambda loss, **more: loss.backward(**more))
        return flat([p.grad for layer in student[:2] for p in layer.parameters()])

    labels = gradient(CrossEntropy(weight=1.0), backward=False)
    aligned = gradient(CrossEntropy(weight=1.0), Dhkd(weight=5.0, align_gradients=True), backward=True)
    plain = gradient(CrossEntropy(weight=1.0), Dhkd(weight=5.0), backward=False)
    assert live_distillation_step((Dhkd(), CrossEntropy()), Uniform(), [net(5, 1)]).backward is None
    assert not torch.allclose(aligned, labels)
    assert not torch.allclose(aligned, plain)
    assert float((aligned - labels) @ labels) >= -1e-4 * float(labels.square().sum())
