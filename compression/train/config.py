"""How long, how fast and on what a model is trained."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from compression.types import Frozen

if TYPE_CHECKING:
    from lightning_fabric import Fabric

Precision = Literal["32-true", "bf16-mixed", "16-mixed"]


class TrainConfig(Frozen):
    """The schedule of one training: AdamW under a one-cycle learning rate."""

    epochs: Annotated[int, Field(gt=0)]
    """Passes over the training split."""
    batch_size: Annotated[int, Field(gt=0)] = 128
    """Samples per optimiser step, over all devices together."""
    learning_rate: Annotated[float, Field(gt=0, le=10)] = 3e-3
    """Peak of the one-cycle schedule; it starts at 1/25 of it and ends near zero."""
    weight_decay: Annotated[float, Field(ge=0, le=1)] = 0.02
    """Decoupled decay of matrices and kernels; biases and norms are never decayed."""
    warmup_share: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Share of all steps in which the learning rate rises."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Mass spread over all classes when training on labels alone (teachers and control arms)."""
    checkpoint_every_steps: Annotated[int, Field(gt=0)] = 200
    """Most work, in optimiser steps, that a killed training repeats."""
    precision: Precision = "32-true"
    """Arithmetic of the forward pass; losses and weights stay float32."""
    max_steps_per_epoch: Annotated[int, Field(gt=0)] | None = None
    """Cut every epoch after this many steps, for quick runs."""


class Hardware(Frozen):
    """Where training runs; a fact of the machine, never of a recipe."""

    accelerator: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """``auto`` takes a GPU when there is one."""
    devices: Annotated[int, Field(gt=0)] = 1
    """Devices per node, each with a process of its own that :mod:`compression.train.launcher` or torchrun starts."""
    num_nodes: Annotated[int, Field(gt=0)] = 1
    """Machines that train together; start the program with torchrun on each."""

    def fabric(self, precision: Precision) -> Fabric:
        """Return the launched Lightning Fabric that owns device, precision and gradient exchange."""
        from lightning_fabric import Fabric
        from lightning_fabric.strategies.ddp import DDPStrategy

        several = self.devices * self.num_nodes > 1
        fabric = Fabric(
            accelerator=self.accelerator,
            devices=self.devices,
            num_nodes=self.num_nodes,
            strategy=DDPStrategy(forward_sync_buffers=False) if several else "auto",  # see ranks.agree_on_buffers
            precision=precision,
        )
        fabric.launch()
        return fabric
