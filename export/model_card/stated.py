"""What only people know of a model and its sources; the model card says it as it stands here."""

from compression.types import Frozen, Slug


class TeacherLicence(Frozen):
    """Under which licence a teacher's weights may be used."""

    teacher: Slug
    """Its name in the recipe."""
    licence: str
    """Best as an SPDX identifier, for example Apache-2.0."""


class Card(Frozen):
    """Statements for the model card. They change no result: nothing is trained or measured again for them."""

    intended: str = ""
    """What the model is meant for; when empty, the recipe's description."""
    unsuited: tuple[str, ...] = ()
    """What it must not be used for, a sentence each."""
    data_licence: str = ""
    """Licence of the images and labels, best as an SPDX identifier, for example CC-BY-4.0."""
    teacher_licences: tuple[TeacherLicence, ...] = ()
    """Licences of teachers' weights; those that are not named are not stated."""
