"""What the student is asked to match. One file per loss; a new one adds its name to ``AnyLoss``."""

from compression.distill.losses.aggregated import Aggregated
from compression.distill.losses.auxiliary import Auxiliary
from compression.distill.losses.bd_kd import BdKd
from compression.distill.losses.class_relation import ClassRelation
from compression.distill.losses.cross_entropy import CrossEntropy
from compression.distill.losses.dhkd import Dhkd
from compression.distill.losses.dist import Dist
from compression.distill.losses.dkd import Dkd
from compression.distill.losses.kd import Kd
from compression.distill.losses.mix_std import MixStd
from compression.distill.losses.multi_aspect import MultiAspect
from compression.distill.losses.nd import Nd
from compression.distill.losses.normalised_features import NormalisedFeatures
from compression.distill.losses.ofa import Ofa
from compression.distill.losses.pld import Pld
from compression.distill.losses.proc_kd import ProcKd
from compression.distill.losses.sigmoid_kd import SigmoidKd
from compression.distill.losses.sinkd import Sinkd
from compression.distill.losses.talking import Talking
from compression.distill.losses.tgeo import Tgeo
from compression.distill.losses.top_kld import TopKld
from compression.distill.losses.trg import Trg

AnyLoss = (
    CrossEntropy
    | Kd
    | Pld
    | Dkd
    | Dist
    | BdKd
    | TopKld
    | Ofa
    | MixStd
    | Sinkd
    | Dhkd
    | Nd
    | Talking
    | Aggregated
    | Tgeo
    | NormalisedFeatures
    | Trg
    | ProcKd
    | SigmoidKd
    | ClassRelation
    | MultiAspect
    | Auxiliary
)
"""What a recipe may list under ``distill.losses``."""

__all__ = [
    "Aggregated",
    "AnyLoss",
    "Auxiliary",
    "BdKd",
    "ClassRelation",
    "CrossEntropy",
    "Dhkd",
    "Dist",
    "Dkd",
    "Kd",
    "MixStd",
    "MultiAspect",
    "Nd",
    "NormalisedFeatures",
    "Ofa",
    "Pld",
    "ProcKd",
    "SigmoidKd",
    "Sinkd",
    "Talking",
    "Tgeo",
    "TopKld",
    "Trg",
]
