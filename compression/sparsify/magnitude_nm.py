"""N:M sparsity by magnitude: the smallest weights of each group go, the others are fine-tuned."""

from typing import ClassVar, Literal

from compression.card import MethodCard
from compression.sparsify.config import NmSparsifier
from compression.sparsify.nm import layers_of, magnitude_mask
from compression.sparsify.session import Session, train_under
from compression.train import History


class MagnitudeNm(NmSparsifier):
    """Keep the largest weights of each group and fine-tune them; the choice is made once."""

    kind: Literal["magnitude_nm"] = "magnitude_nm"

    card: ClassVar[MethodCard] = MethodCard(
        name="N:M sparsity by magnitude",
        paper="Mishra et al. 2021, Accelerating Sparse Deep Neural Networks, arXiv:2104.08378",
        summary="Of every four consecutive inputs the two smallest weights become zero; the rest is fine-tuned with "
        "the losses of the distillation.",
        needs="A trained student with layers of 4 inputs or more, better 16.",
        cost="One fine-tuning. A gain in size where zeros are packed, and in time only on sparse tensor cores: none on "
        "CPUs.",
        evidence="The paper reports about dense accuracy after retraining. Not measured on our data yet.",
    )

    def run(self, session: Session) -> History:
        """See the base."""
        layers = layers_of(session.model, multiple_of=self.m, skip=self.skip)
        masks = {name: magnitude_mask(layer.weight, self.n, self.m) for name, layer in layers.items()}
        return train_under(session, masks, self.train)
