# Copyright © 2026 MLX Contributors

from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

from .objective.objective import Objective
from .setting import declared, setting

_FREE: dict[str, Any] = {"resume": "free"}  # may change when a run goes on
_COUNT: dict[str, Any] = {"least": 1, **_FREE}


@dataclass(frozen=True)
class DPOTrainingArgs(Objective):
    """
    The settings of a preference run: those of an ``Objective``, and of the loop.

    Has the fields of ``TrainingArgs`` under their names. Fields that are settings of
    ``mlx_lm.dpo`` have the flag's help in their metadata.

    Args:
        beta (float): Inverse temperature. Default: ``0.1``. The further settings of
            ``Objective`` may be given, too.
        batch_size (int): Pairs a batch, over all ranks. Default: ``4``.
        iters (int): Batches to train on. Default: ``100``.
        adapter_file (str): Where the trained weights go; checkpoints and metrics
            lie beside it. Default: ``"adapters.safetensors"``.
        sharing (str): How prompts are shared: ``"ragged"``, ``"equal"``,
            ``"plain"``, or rows ``"packed"``. Default: ``"plain"``.
        try_layouts (bool): Time this and what shares less on the first steps, and
            keep the quickest. Default: ``False``.
        compile (bool, optional): Compile the step. Default: on a GPU.

    Raises:
        mlx_lm.preference.errors.InputError: If a setting is out of range, or of
            another type.

    Example:
        >>> from dataclasses import replace
        >>> args = DPOTrainingArgs(iters=10, loss_type="ipo")
        >>> replace(args, beta=0.5).objective.beta, args.objective.losses
        (0.5, {'ipo': 1.0})
    """

    batch_size: int = setting(4, "Pairs a batch, two sequences each.", least=1)
    iters: int = setting(100, "Iterations, one batch each.", **_COUNT)
    val_batches: int = setting(
        25,
        "Validation batches, spread over all lengths; -1 for all.",
        all=True,
        **_COUNT,
    )
    steps_per_report: int = setting(
        10, "Iterations between lines of training metrics.", **_COUNT
    )
    steps_per_eval: int = setting(200, "Iterations between validations.", **_COUNT)
    steps_per_save: int = setting(
        100, "Iterations between saves.", name="save_every", **_COUNT
    )
    max_seq_length: int = setting(
        2048,
        "Most tokens of prompt and answer, at least 2. The default is lowered to the "
        "model's positions, a given value beyond them is an error.",
        least=1,
        tested=True,
        compared=True,
    )
    adapter_file: str = "adapters.safetensors"
    grad_checkpoint: bool = setting(
        False, "Compute layers again in the backward pass to save memory."
    )
    grad_accumulation_steps: int = setting(1, "Batches an optimizer update.", least=1)
    clear_cache_threshold: int | None = setting(
        None,
        "Empty the allocator's cache between steps when it is larger: bytes, or 500MB, "
        "2GB on the command line. Default: an eighth of the memory, of a CUDA card "
        "three quarters.",
        kind=int,
        **_FREE,
    )
    max_grad_norm: float | None = setting(
        1.0, "Clip the gradient to this L2 norm; 0 for no clipping.", least=0
    )
    debug_gradients: bool = setting(
        False,
        "Write the gradient of every module to metrics.jsonl.",
        brought=True,
        **_FREE,
    )
    keep_checkpoints: int | None = setting(
        None,
        "Checkpoints to keep, the newest ones. Default: every adapter, and the newest "
        "two states.",
        kind=int,
        metavar="N",
        brought=True,
        **_COUNT,
    )
    save_best: str | None = setting(
        None,
        "Keep the adapter that validates best in the folder best/.",
        kind=str,
        choices=["accuracy", "loss"],
        brought=True,
        **_FREE,
    )
    early_stopping: int | None = setting(
        None,
        "Stop after so many validations in a row without gain of save_best's measure, "
        "by default accuracy.",
        kind=int,
        metavar="N",
        brought=True,
        **_COUNT,
    )
    load_best: bool = setting(
        False,
        "When the run ends, let adapters.safetensors be the adapter that validated "
        "best by save_best's measure, by default accuracy.",
        brought=True,
        **_FREE,
    )
    max_skipped_steps: int = setting(
        10,
        "Stop after so many steps in a row without finite numbers.",
        flag=False,
        **_COUNT,
    )
    sync_reference: bool = setting(
        False, "Let the reference follow the policy.", brought=True
    )
    sync_alpha: float = setting(
        0.6, "The policy's share in the new reference.", above=0, most=1, brought=True
    )
    sync_steps: int = setting(
        512, "Optimizer updates between two new references.", least=1, brought=True
    )
    sharing: str = "plain"
    try_layouts: bool = False
    compile: bool | None = None
    seed: int = setting(
        0,
        "Of adapter weights, order of the data, dropout and held-out pairs.",
        least=0,
        below=2**32,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        own = [f.name for f in fields(self) if "help" in f.metadata]
        for name, one in zip(own, declared(type(self))):
            replace(one, name=name).check(getattr(self, name))

    @cached_property
    def objective(self) -> Objective:
        """What is minimised."""
        return Objective(**{f.name: getattr(self, f.name) for f in fields(Objective)})
