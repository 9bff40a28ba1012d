"""When the state of a training is written."""

import time
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from compression.train.batches import Batches
from compression.train.config import TrainConfig
from compression.train.ranks import agree_on_buffers

SECONDS_BETWEEN_SAVES = 2.0
"""Most training that a kill undoes, where steps and their states are small."""
LARGEST_SHARE_OF_SAVING = 0.02
"""Large states are written less often, so that writing takes no more than this share of the time."""


class SavedTraining(Protocol):
    """What is asked of a training (``compression.train.loop``)."""

    model: nn.Module
    helpers: nn.Module
    fabric: Any
    batches: Batches
    config: TrainConfig
    total_steps: int

    @property
    def steps_done(self) -> int: ...

    def save(self, folder: Path) -> None: ...


class Saving:
    """Decides when the state of a training is written."""

    def __init__(self, training: SavedTraining, folder: Path | None) -> None:
        self.training, self.folder = training, folder
        self.alone = training.batches.world_size == 1
        """Several ranks must save together, so only at steps that they can count."""
        self.saved, self.took = time.monotonic(), 0.0

    def after_step(self) -> None:
        """Write when it is due."""
        done, every = self.training.steps_done, self.training.config.checkpoint_every_steps
        pause = max(SECONDS_BETWEEN_SAVES, self.took / LARGEST_SHARE_OF_SAVING)
        late = self.alone and time.monotonic() - self.saved > pause
        if self.folder is not None and (late or done % every == 0 or done == self.training.total_steps):
            agree_on_buffers(self.training.model, self.training.helpers, self.training.fabric)
            self.write(self.folder)

    def at_the_end(self) -> None:
        """Write what was done until somebody ended the training."""
        if self.folder is not None and self.alone:
            self.write(self.folder)

    def write(self, folder: Path) -> None:
        """Write now."""
        started = time.monotonic()
        self.training.save(folder)
        self.saved = time.monotonic()
        self.took = self.saved - started
