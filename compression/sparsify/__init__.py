"""Zeros in the weights of a student, in a pattern or without. A new method adds its name to ``AnySparsifier``."""

from compression.sparsify.config import Sparsifier
from compression.sparsify.learned_nm import LearnedNm
from compression.sparsify.magnitude_nm import MagnitudeNm
from compression.sparsify.nm import Masks, apply_masks, masks_of_zeros, share_of_zeros
from compression.sparsify.run import sparsify
from compression.sparsify.sparse_ift import Rigl
from compression.sparsify.supermask import Supermask

AnySparsifier = MagnitudeNm | LearnedNm | Rigl | Supermask
"""What a recipe may name under ``sparsify``."""

__all__ = [
    "AnySparsifier",
    "LearnedNm",
    "MagnitudeNm",
    "Masks",
    "Rigl",
    "Sparsifier",
    "Supermask",
    "apply_masks",
    "masks_of_zeros",
    "share_of_zeros",
    "sparsify",
]
