"""Every error this project raises on purpose.

    StillhouseError
    ├── InputError          what the user gave is wrong; nothing was computed (exit code 2)
    │   ├── RecipeError     a recipe, or a value set on the command line
    │   ├── DataError       images, labels, splits
    │   └── CheckpointError a model specification or its weights
    ├── CompressionError    a method failed while it ran (exit code 3)
    │   └── ShapeError      two tensors or models do not fit together
    ├── ExportError         a graph or engine could not be built or checked
    └── ArtifactError       the store: unwritable, full, or a file that changed

Messages read ``<thing> '<name>' has <found>, expected <wanted>. <Way out>.``
"""


class StillhouseError(Exception):
    """Base of all errors raised on purpose; ``str(error)`` is meant for people."""


class InputError(StillhouseError):
    """What the user gave is wrong, and was refused before any compute."""


class RecipeError(InputError):
    """A recipe, or a value set on the command line, is not usable."""


class DataError(InputError):
    """Images, labels or splits are not usable."""


class CheckpointError(InputError):
    """A model specification and its weights do not load, or do not fit each other."""


class CompressionError(StillhouseError):
    """A method failed while it ran."""


class ShapeError(CompressionError):
    """Two tensors or models do not fit together."""


class ExportError(StillhouseError):
    """A graph or an engine could not be built, loaded or checked."""


class ArtifactError(StillhouseError):
    """The store cannot be written, is full, or holds a file that changed."""
