# Copyright © 2026 MLX Contributors

"""What a run begins with: settings of the run that goes on, is tested, or came before."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ... import lora
from ..features import Feature
from ..objective.objective import objective_of
from ..policy.start import load_weights
from ..setting import Setting
from ..terminal import rprint


class _Earlier(Feature):
    def settings(self) -> dict[str, Iterable[Setting]]:
        marks: dict[str, Any] = {"kind": str, "per_rank": True, "outside": True}
        what = (
            "Adapter to start from, also PEFT's, a file or its folder; it is the "
            "reference too."
        )
        name = "resume_adapter_file"
        start = Setting(name, lora.CONFIG_DEFAULTS[name], what, tested=True, **marks)
        what = "Allow an adapter of a DPO run as the start and the new reference."
        again = Setting("new_reference", False, what, per_rank=True)
        return {"Model and optimizer": [start, again]}

    def complete(self, args: Any) -> str | Path | None:
        # It reads the table of settings, which has those from here.
        from . import adopt

        folder = args.resume
        if args.resume:
            adopt.adopt_resumed_run(args)
        if args.train:
            adopt.adopt_adapter_config(args)
            if args.resume_adapter_file:
                folder = folder or Path(args.resume_adapter_file).parent
        elif (args.test or args.inspect) and args.adapter_path:
            adopt.adopt_finished_run(args)
            folder = args.adapter_path
        return folder

    def policy_made(self, args: Any, model: Any) -> None:
        if (start := args.resume_adapter_file) is not None:
            rprint(f"Starting from the weights in {start}")
            load_weights(model, start)

    def header_rows(self, job: Any, rows: dict[str, str]) -> None:
        start = job.args.resume_adapter_file
        if start and objective_of(job.args).needs_reference:
            rows["reference"] = f"{start}, frozen"


FEATURE = _Earlier()
