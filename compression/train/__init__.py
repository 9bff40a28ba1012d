"""The one training loop: teachers, students, search trials and quantization-aware tuning pass it a step."""

from compression.train.config import Hardware, TrainConfig
from compression.train.loop import Backward, History, Row, SetTraining, StepFn, fit

__all__ = ["Backward", "Hardware", "History", "Row", "SetTraining", "StepFn", "TrainConfig", "fit"]
