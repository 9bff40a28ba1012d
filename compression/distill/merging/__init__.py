"""Merging the weights of models of one architecture. One file per method; a new one adds its name to ``AnyMerge``."""

from compression.distill.merging.batch_norm import reestimate_batch_norm
from compression.distill.merging.branches import AnyMerge, Merge, MergeReport, merge_branches
from compression.distill.merging.fisher import FisherMerge
from compression.distill.merging.soup import UniformSoup
from compression.distill.merging.task_vectors import TaskVectors
from compression.distill.merging.types import MergeFn, Merging

__all__ = [
    "AnyMerge",
    "FisherMerge",
    "Merge",
    "MergeFn",
    "MergeReport",
    "Merging",
    "TaskVectors",
    "UniformSoup",
    "merge_branches",
    "reestimate_batch_norm",
]
