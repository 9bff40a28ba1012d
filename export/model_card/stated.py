"""What only people know of a model and its sources; the model card says it as it stands here."""

from compression.types import Frozen, Slug


class Card(Frozen):
    """Statements for the model card. They change no result: nothing is trained or measured again for them."""

    intended: str = ""
    """What the model is meant for; when empty, the recipe's description."""
    unsuited: tuple[str, ...] = ()
    """What it must not be used for, a sentence each."""
    data_licence: str = ""
    """Licence of the images and labels, best as an SPDX identifier, for example CC-BY-4.0."""
    teacher_licences: dict[Slug, str] = {}
    """Licence of each teacher's weights, by the teacher's name."""
