"""The training that a sparsifier is given: one student, in place, with zeros that are put back after every step."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from compression.augment import AnyAugment
from compression.data.dataset import Dataset, with_pool, without_labels
from compression.distill import DistillConfig, plain_step
from compression.distill.procedures import Training
from compression.distill.types import TeacherLogits
from compression.models import ModelSpec
from compression.sparsify.nm import apply_masks
from compression.train import Hardware, History, StepFn, TrainConfig, fit
from compression.types import Batch

AfterStep = Callable[[int, int], None]
"""(steps done, steps in all) -> None; right after each optimiser step."""

Terms = Callable[[], dict[str, Tensor]]
"""Further loss terms, weighted, by name; asked for after each forward pass."""


@dataclass(frozen=True)
class Session:
    """One student to make sparse, in place, and how to train it meanwhile."""

    model: nn.Module
    spec: ModelSpec
    panel: Sequence[TeacherLogits]
    """Stored outputs of the teachers; with none the student learns from labels alone."""
    dataset: Dataset
    distillation: DistillConfig
    """Its losses teach; what would need live teachers, files, or more than one training is left out."""
    seed: int
    augment: AnyAugment
    checkpoint_dir: Path | None = None
    on_step: Callable[[int, int], None] | None = None
    hardware: Hardware | None = None

    def train(
        self,
        train: TrainConfig,
        *,
        name: str,
        after_step: AfterStep,
        state: nn.Module | None = None,
        terms: Terms | None = None,
        monitored: bool = True,
    ) -> History:
        """The learning curve of one training of the model.

        What ``after_step`` does to the weights is done before they are validated or saved, so that a training that
        was killed goes on with the same bits.

        Args:
            train: the schedule.
            name: of the part; its checkpoints are in a folder of this name.
            after_step: sees the weights, and the gradients that led to them, after each step.
            state: buffers that are part of the training state.
            terms: further loss terms.
            monitored: watch for a student that learns its teachers' faults, as far as the configuration says so.
        """
        config = self.distillation.plain(train)

        def on_step(done: int, total: int) -> None:
            after_step(done, total)
            if self.on_step is not None:
                self.on_step(done, total)

        if not self.panel:
            return fit(
                self.model,
                _with_terms(plain_step(train.label_smoothing), terms),
                self.dataset,
                train,
                seed=self.seed,
                augment=self.augment,
                views=config.views,
                augment_seed=self.seed,
                hardware=self.hardware,
                checkpoint_dir=None if self.checkpoint_dir is None else self.checkpoint_dir / name,
                on_step=on_step,
                helpers=state,
                sampler=config.sampler.build(),
            )
        dataset = with_pool(self.dataset)
        training = Training(
            student=self.model,
            panel=self.panel,
            teachers=(),
            dataset=without_labels(dataset) if config.labels == "none" else dataset,
            config=config,
            seed=self.seed,
            augment=self.augment,
            hardware=self.hardware,
            checkpoint_dir=self.checkpoint_dir,
            on_step=on_step,
        )
        step = training.step(self.model, epochs=train.epochs)
        return training.run(
            name=name,
            step=_with_terms(step, terms),
            helpers=nn.ModuleList([step.helpers, state or nn.Module()]),
            self_trained=step.self_trained,
            backward=step.backward,
            monitored=monitored,
        )


def train_under(session: Session, masks: Mapping[str, Tensor], train: TrainConfig, *, name: str = "weights") -> History:
    """Fine-tune the session's model with everything outside ``masks`` at zero, from before the first step on.

    AdamW's moments of such a weight move on, but nothing reads the weight before it is zero again.
    """
    apply_masks(session.model, masks)
    return session.train(train, name=name, after_step=lambda done, total: apply_masks(session.model, masks))


def _with_terms(step: StepFn, terms: Terms | None) -> StepFn:
    return step if terms is None else lambda model, batch: _together(step, terms, model, batch)


def _together(step: StepFn, terms: Terms, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    found = step(model, batch)
    return found | terms()
