"""The card each method shows in the catalogue."""

from compression.types import Frozen


class MethodCard(Frozen):
    """What a reader must know before choosing a method."""

    name: str
    """Name in plain words."""
    paper: str
    """Authors, year, arXiv id."""
    summary: str
    """What it does, in one or two sentences of our own."""
    needs: str
    """What must be there to use it: labels, cached logits, features, a second teacher."""
    cost: str
    """What it adds to a run, in passes or in a share of a training step."""
    evidence: str
    """When it helped: measured on our data, or what the paper reports, and which of the two."""
