# Copyright © 2026 MLX Contributors

from ..preference.forward.frozen import FrozenStart
from ._upstream___init__ import TrainingArgs, evaluate, linear_to_lora_layers, train
from .trainer import DPOTrainingArgs, evaluate_dpo, train_dpo
