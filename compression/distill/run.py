"""The distillation of one student."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn

from compression.augment import AnyAugment, Robust, clean_part
from compression.data.dataset import Dataset, with_pool, without_labels
from compression.distill.config import DistillConfig
from compression.distill.merging import Merge, merge_branches
from compression.distill.procedures import Training
from compression.distill.step import plain_step, sample_of
from compression.distill.types import TeacherLogits
from compression.errors import CompressionError, ShapeError
from compression.features import frozen
from compression.train import Hardware, History, Row, SetTraining, fit


def distill(
    student: nn.Module,
    panel: Sequence[TeacherLogits],
    dataset: Dataset,
    config: DistillConfig,
    *,
    seed: int,
    augment: AnyAugment,
    teachers: Sequence[nn.Module] = (),
    hardware: Hardware | None = None,
    checkpoint_dir: Path | None = None,
    on_epoch: Callable[[Row], None] | None = None,
    on_step: Callable[[int, int], None] | None = None,
    set_training: SetTraining = nn.Module.train,
) -> History:
    """Return the learning curve of ``student``, trained in place on what the panel said.

    With an empty panel it is the control arm: same student, schedule, samples and views, cross entropy on labels
    alone, in one go. Views come from the panel's own seed, so that students of several seeds share one set of stored
    outputs. With a panel each row also has ``teacher_kl`` and the alarms of ``config.monitor``, which may end the
    training. ``teachers`` are the models behind the panel, in its order; wanted when ``config.needs_teachers``. The
    other arguments are those of :func:`compression.train.fit`.

    Raises:
        ShapeError: a teacher has other classes than the data, or the student another number of them.
        CompressionError: outputs were stored under another augmentation or for fewer views, the teachers are
            missing, or training diverged.
    """
    check_panel(panel, dataset, config, augment)
    _check_student(student, dataset)
    if not panel:
        return fit(
            student,
            plain_step(config.train.label_smoothing),
            dataset,
            config.train,
            seed=seed,
            augment=augment,
            views=config.views,
            augment_seed=seed,
            hardware=hardware,
            checkpoint_dir=checkpoint_dir,
            on_epoch=on_epoch,
            on_step=on_step,
            set_training=set_training,
            sampler=None if config.sampler.needs_teachers else config.sampler.build(),
        )
    if config.needs_teachers and len(teachers) != len(panel):
        raise CompressionError(
            f"Distillation has {len(teachers)} teachers beside the outputs of {len(panel)}, expected the models of all "
            f"of them, because {config.needs_teachers} runs them. Give them as teachers, in the order of the panel."
        )
    dataset = with_pool(dataset)
    training = Training(
        student=student,
        panel=panel,
        teachers=teachers if config.needs_teachers else (),
        dataset=without_labels(dataset) if config.labels == "none" else dataset,
        config=config,
        seed=seed,
        augment=augment,
        hardware=hardware,
        checkpoint_dir=checkpoint_dir,
        on_epoch=on_epoch,
        on_step=on_step,
        set_training=set_training,
    )
    history = config.procedure.build()(training)
    return history if config.merge is None else _merged(training, config.merge, history)


def _merged(training: Training, merge: Merge, history: History) -> History:
    """Let branches of the student go on, merge them, and add what it was worth to the last row."""

    def go_on(model: nn.Module, seed: int, name: str) -> None:
        training.run(model, name=name, train=merge.train, seed=seed)

    report = merge_branches(
        training.student, merge, training.dataset, seed=training.seed, train_branch=go_on, augment=training.augment
    )
    row = {
        "merge_nll_before": report.student_nll,
        "merge_nll_best_branch": min(report.member_nlls),
        "merge_nll_after": report.merged_nll,
        "merge_kept": float(report.kept == "merged"),
    }
    return History(rows=[*history.rows[:-1], history.rows[-1] | row])


def check_panel(panel: Sequence[TeacherLogits], dataset: Dataset, config: DistillConfig, augment: AnyAugment) -> None:
    """Refuse stored outputs that do not belong to the views and classes the student will see.

    Raises:
        ShapeError: other classes, or the same in another order.
        CompressionError: other augmentation, other seeds, or too few views; or teachers that run live under robust
            views.
    """
    live = config.needs_teachers or (config.teachers.adds_snapshot and f"combination '{config.teachers.kind}'")
    if panel and live and isinstance(augment, Robust):
        raise CompressionError(
            f"Augmentation 'robust' has {live} beside it, which runs teachers on what the student sees, expected "
            "stored teachers alone, whose answers are those to the clean view. Take another augmentation, or remove it."
        )
    wants_features, clean = any(loss.needs.teacher_features for loss in config.losses), clean_part(augment)
    for number, teacher in enumerate(panel):
        if wants_features and not teacher.spec.features:
            raise CompressionError(
                f"Outputs of teacher {number} of the panel have no features, but a loss needs them. "
                "Store them again with features: true."
            )
        if teacher.class_names != dataset.class_names:
            raise ShapeError(
                f"Teacher {number} of the panel has {len(teacher.class_names)} classes "
                f"({', '.join(teacher.class_names[:5])}, ...), expected the {len(dataset.class_names)} of "
                f"data set '{dataset.name}' ({', '.join(dataset.class_names[:5])}, ...). "
                "Use a teacher of the same classes."
            )
        if teacher.spec.augment != clean or teacher.spec.seed != panel[0].spec.seed:
            raise CompressionError(
                f"Outputs of teacher {number} of the panel have views of {teacher.spec.augment!r} with seed "
                f"{teacher.spec.seed}, expected {clean!r} with seed {panel[0].spec.seed}. Store them again."
            )
        if teacher.spec.views < config.views:
            raise CompressionError(
                f"Outputs of teacher {number} of the panel have {teacher.spec.views} views, expected "
                f"{config.views}. Store more, or lower distill.views."
            )


def _check_student(student: nn.Module, dataset: Dataset) -> None:
    """Run one sample through the student, without touching its state."""
    with frozen(student), torch.no_grad():
        found = list(student(sample_of(student, dataset)).shape)
    if found != [1, dataset.num_classes]:
        raise ShapeError(
            f"Student '{type(student).__name__}' has logits of shape {found} for one image, expected "
            f"[1, {dataset.num_classes}], the classes of data set '{dataset.name}'. "
            "Build it with that many classes."
        )
