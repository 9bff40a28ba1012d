"""Zeros in the weights of one student."""

from collections.abc import Callable, Sequence
from pathlib import Path

from torch import nn

from compression.augment import AnyAugment
from compression.data.dataset import Dataset
from compression.distill import DistillConfig, check_panel
from compression.distill.types import TeacherLogits
from compression.models import ModelSpec
from compression.sparsify.config import Sparsifier
from compression.sparsify.session import Session
from compression.train import Hardware, History


def sparsify(
    model: nn.Module,
    spec: ModelSpec,
    config: Sparsifier,
    panel: Sequence[TeacherLogits],
    dataset: Dataset,
    distill_config: DistillConfig,
    *,
    seed: int,
    augment: AnyAugment,
    checkpoint_dir: Path | None = None,
    on_step: Callable[[int, int], None] | None = None,
    hardware: Hardware | None = None,
) -> History:
    """Return the learning curve of ``model``, which becomes sparse, in place, and is left in inference mode.

    Its structure stays what ``spec`` says; the zeros are exact. It learns from what ``distill_config`` learns from,
    less what needs live teachers, files, or more than one training; with an empty panel from labels alone. The other
    arguments are those of :func:`compression.train.fit`.

    Raises:
        ShapeError: a teacher has other classes than the data.
        CompressionError: the model has no layer to make sparse, ``config.skip`` names none of its modules, stored
            outputs do not fit, or training diverged.
    """
    check_panel(panel, dataset, distill_config, augment)
    session = Session(
        model=model,
        spec=spec,
        panel=panel,
        dataset=dataset,
        distillation=distill_config,
        seed=seed,
        augment=augment,
        checkpoint_dir=checkpoint_dir,
        on_step=on_step,
        hardware=hardware,
    )
    return config.run(session)
