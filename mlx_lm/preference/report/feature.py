# Copyright © 2026 MLX Contributors

"""The test, single pairs, several runs, and the report."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ... import lora
from ..errors import InputError
from ..features import Feature
from ..run.folder import METRICS
from ..setting import Setting
from ..watch.trackers import check_matplotlib
from .page import LEFT_BY_TESTS


class _Report(Feature):
    def settings(self) -> dict[str, Iterable[Setting]]:
        free: dict[str, Any] = {"resume": "free"}
        tests = "Evaluate the test split, after training if both are set."
        count = "Batches of the test; -1 for all."
        batches = lora.CONFIG_DEFAULTS["test_batches"]
        what = "Show so many held-out pairs, the surest mistakes first."
        number: dict[str, Any] = {"kind": int, "least": 1, "metavar": "N", **free}
        page = "Write report.html and curves.png beside the adapter; needs matplotlib."
        return {
            "What to do": [
                Setting("test", lora.CONFIG_DEFAULTS["test"], tests, **free),
                Setting("test_batches", batches, count, least=1, all=True, **free),
                Setting("inspect", None, what, **number),
            ],
            "What looks on": [Setting("report", False, page, per_rank=True, **free)],
        }

    def rows(self, args: Any) -> dict[str, Any]:
        return {"test": args.test, "inspect": bool(args.inspect)}

    def check(self, args: Any) -> None:
        if not args.report:
            return
        check_matplotlib()
        if not args.adapter_path:
            raise InputError("report needs adapter_path: it is written there.")
        if not args.train and not (Path(args.adapter_path) / METRICS).exists():
            raise InputError(
                f"report shows a run, but {args.adapter_path} has no {METRICS}. Leave "
                "it out, or give --adapter-path the folder of a run."
            )

    def takes_over(self, args: Any) -> bool:
        several = isinstance(args.adapter_path, list)
        if several:
            from .testing import compare

            compare(args)
        return several

    def after_loading(self, job: Any) -> None:
        if job.args.inspect and not (job.test_set or job.valid_set):
            raise InputError(
                "inspect shows held-out pairs, and there are none: add a test or "
                "validation set, raise valid_fraction, or leave it out."
            )

    def clear_folder(self, job: Any) -> None:
        if job.state is None:
            for name in LEFT_BY_TESTS:
                (Path(job.args.adapter_path) / name).unlink(missing_ok=True)

    def finish(self, job: Any) -> None:
        # What it needs reads the table of settings, which has those from here.
        from .testing import finish

        finish(job)


FEATURE = _Report()
