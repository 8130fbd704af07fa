# Copyright © 2026 MLX Contributors

from ._upstream___init__ import TrainingArgs, evaluate, linear_to_lora_layers, train
from .trainer import DPOTrainingArgs, evaluate_dpo, train_dpo
