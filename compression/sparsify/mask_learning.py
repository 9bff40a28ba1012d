"""Masks that are learnt by gradient while the weights are frozen."""

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from compression.sparsify.nm import Layer, Masks
from compression.sparsify.session import Session, Terms
from compression.train import History, TrainConfig


class Choice(nn.Module):
    """What stands before a frozen weight while its mask is learnt; a parametrisation, gone when it is done."""

    share: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("share", torch.zeros((), dtype=torch.float64))
        self.eval()

    def forward(self, weight: Tensor) -> Tensor:
        """The masked weight, of its shape: by the soft mask in training, by the hard one in inference."""
        return weight * (self.soft(weight) if self.training else self.hard(weight))

    @abstractmethod
    def soft(self, weight: Tensor) -> Tensor:
        """A mask with a gradient to what decides it; ``share`` of the steps, 0..1, have been made."""

    @abstractmethod
    def hard(self, weight: Tensor) -> Tensor:
        """The mask as it would be if the training ended here, bool."""


@contextmanager
def _under(model: nn.Module, layers: Mapping[str, Layer], choices: Mapping[str, Choice]) -> Iterator[None]:
    """Inside, the choices are part of the model and all there is to train; afterwards it is as it was."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.requires_grad_(False)
    with torch.no_grad():
        for name, layer in layers.items():
            parametrize.register_parametrization(layer, "weight", choices[name])
    try:
        yield
    finally:
        for layer in layers.values():
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def learn_masks(
    session: Session,
    layers: Mapping[str, Layer],
    choices: Mapping[str, Choice],
    train: TrainConfig,
    *,
    terms: Terms | None = None,
) -> tuple[Masks, History]:
    """Learn a mask for each layer, by the name of its weight; the weights keep their bits.

    Everything else that has parameters is frozen too; batch norm statistics follow the masked network.
    """

    def after_step(done: int, total: int) -> None:
        for choice in choices.values():
            choice.share.fill_(done / total)

    with _under(session.model, layers, choices):
        history = session.train(train, name="masks", after_step=after_step, terms=terms, monitored=False)
    return {name: choices[name].hard(layer.weight) for name, layer in layers.items()}, history
