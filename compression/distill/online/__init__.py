"""Changes of a batch that stored outputs do not know. One file per method; a new one joins ``AnyOnline``."""

from compression.distill.online.base import Changed, OnlineAugment
from compression.distill.online.hard import Hard
from compression.distill.online.mixup import Mixup
from compression.distill.online.off import Off

AnyOnline = Off | Mixup | Hard
"""What a recipe may name under ``distill.online``."""

__all__ = ["AnyOnline", "Changed", "Hard", "Mixup", "Off", "OnlineAugment"]
