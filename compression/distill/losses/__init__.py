"""What the student is asked to match. One file per loss; a new one adds its name to ``AnyLoss``."""

from compression.distill.losses.bd_kd import BdKd
from compression.distill.losses.cross_entropy import CrossEntropy
from compression.distill.losses.dhkd import Dhkd
from compression.distill.losses.dist import Dist
from compression.distill.losses.dkd import Dkd
from compression.distill.losses.kd import Kd
from compression.distill.losses.nd import Nd
from compression.distill.losses.ofa import Ofa
from compression.distill.losses.pld import Pld
from compression.distill.losses.sinkd import Sinkd
from compression.distill.losses.top_kld import TopKld

AnyLoss = CrossEntropy | Kd | Pld | Dkd | Dist | BdKd | TopKld | Ofa | Sinkd | Dhkd | Nd
"""What a recipe may list under ``distill.losses``."""

__all__ = ["AnyLoss", "BdKd", "CrossEntropy", "Dhkd", "Dist", "Dkd", "Kd", "Nd", "Ofa", "Pld", "Sinkd", "TopKld"]
