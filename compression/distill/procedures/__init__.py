"""How a training is organised. One file per procedure; a new one adds its name to ``AnyProcedure``."""

from compression.distill.procedures.active import Active
from compression.distill.procedures.g2sd import G2sd
from compression.distill.procedures.module_to_module import ModuleToModule
from compression.distill.procedures.online_teacher import OnlineTeacher
from compression.distill.procedures.peers import Peers
from compression.distill.procedures.progressive import Progressive
from compression.distill.procedures.single import Single
from compression.distill.procedures.sparse_finetuning import SparseFinetuning
from compression.distill.procedures.training import ProcedureFn, Training, joined

AnyProcedure = Single | Active | Progressive | OnlineTeacher | Peers | ModuleToModule | G2sd | SparseFinetuning
"""What a recipe may name under ``distill.procedure``."""

__all__ = [
    "Active",
    "AnyProcedure",
    "G2sd",
    "ModuleToModule",
    "OnlineTeacher",
    "Peers",
    "ProcedureFn",
    "Progressive",
    "Single",
    "SparseFinetuning",
    "Training",
    "joined",
]
