# Copyright © 2026 MLX Contributors

import contextlib
import io
import json
import re
import shutil
import tempfile
import unittest
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
from folders import FolderCase
from resuming import STEPS, Setup, bits, copy_at, lines_of, masks_drawn, result, signals
from test_dpo_command import CommandCase, command, metrics_of, write_yaml
from tiny import random_pairs

from mlx_lm.preference.errors import InputError
from mlx_lm.preference.reference.cache import ReferenceCache
from mlx_lm.preference.run.checkpoint import (
    data_fingerprint,
    numbered,
)
from mlx_lm.preference.run.loop import PreferenceRun
from mlx_lm.preference.run.screen import PreferenceTrainUI
from mlx_lm.preference.settings.adopt import adopt_resumed_run

momentum = partial(optim.SGD, momentum=0.9)
KINDS = {
    "lora, dropout, accumulation, schedule": Setup(
        **{"dropout": 0.3, "grad_checkpoint": True, "grad_accumulation_steps": 2},
        **{"schedule": optim.cosine_decay, "optimizer": optim.AdamW},
    ),
    "full, master weights": Setup(
        *("full", mx.bfloat16), optimizer=optim.Adafactor, save_best="loss"
    ),
    "dora from an adapter": Setup(
        *("dora", None, None, False, True),
        **{"seed": 3, "max_grad_norm": None, "debug_gradients": True},
        optimizer=optim.Muon,
        grad_accumulation_steps=3,
    ),
    "separate reference": Setup(
        **{"other_reference": True, "optimizer": momentum, "save_best": "accuracy"},
        **{"grad_accumulation_steps": 4, "val_batches": -1},
    ),
}


class TestEveryStep(FolderCase):
    """Broken off after any step and gone on with: the same bits."""

    def check(self, name, setup, steps, disk=None):
        """Break a run off after these steps, go on, compare with the whole run."""
        whole = self.folder / name / "whole"
        with masks_drawn() as masks:
            setup.start(whole, disk=disk)
        # Equal runs would not show that every step drops the same.
        masks = [np.array(mask).tobytes() for mask in masks]
        calls = len(masks) // STEPS
        starts = masks[::calls] if calls else []
        self.assertEqual(len(set(starts)), STEPS if setup.dropout else 0)
        expected = result(whole)
        # The start, then every second and every third step, and the last one.
        its = [line["iteration"] for line in expected["metrics"]]
        self.assertEqual(its, [0, 2, 3, 4, 6, 6, 8, 9, 9])
        for step in steps:
            broken = copy_at(whole, self.folder / name / str(step), step)
            with masks_drawn() as drawn:
                setup.go_on(broken, disk=disk)
            drawn = [np.array(mask).tobytes() for mask in drawn]
            self.assertTrue(drawn == masks[step * calls :])
            found = result(broken)
            for part in expected:
                with self.subTest(kind=name, step=step, part=part):
                    self.assertTrue(found[part] == expected[part])
        return expected

    def test_resumed_at_every_step(self):
        for name, setup in KINDS.items():
            self.check(name, setup, range(1, STEPS + 1))

    def test_with_the_reference_on_disk(self):
        for name, setup in KINDS.items():
            disk = self.folder / name / "references"
            # The second run finds in the cache what the first one knew at its end.
            self.check(name, setup, (3, 8), disk)

    def test_compiled(self):
        setup = Setup(compile=True, grad_accumulation_steps=2)
        self.check("compiled", setup, (3,))


class TestGoingOn(CommandCase):
    """The command's --resume: what it takes over, refuses and says."""

    def start(self, *more, stop=3):
        with signals("_take_step", stop):
            code, _, err = command(*self.flags("--iters", 5, *more))
        self.assertEqual(code, 143, err)

    def refuse(self, pattern, *argv):
        before = {path: path.read_bytes() for path in self.adapters.rglob("*.*")}
        code, _, err = command(*argv)
        self.assertEqual(code, 2)
        self.assertRegex(err, rf"\AError: .*{pattern}.*\n\Z")
        after = {path: path.read_bytes() for path in self.adapters.rglob("*.*")}
        self.assertEqual(after.keys(), before.keys())
        self.assertTrue(after == before)

    def test_a_file_of_settings_may_be_given_again(self):
        config = write_yaml(
            self.folder / "dpo.yaml",
            **{"model": str(self.model), "data": str(self.data), "train": True},
            **{"optimizer": "AdamW", "lora_parameters": {"rank": 4}, "epochs": 2},
            **{"adapter_path": str(self.adapters), "num_layers": 2},
            **{"max_seq_length": 64, "lr_schedule": {"name": "cosine"}},
        )
        with signals("_take_step", 2):
            self.assertEqual(command("-c", config)[0], 143)
        out = self.succeed("-c", config, "--resume", self.adapters)
        self.assertIn("Going on after step 2 of 6.", out)
        self.assertEqual(metrics_of(self.adapters)[-1]["iteration"], 6)

    def test_what_differs_is_named(self):
        self.start("--reference-model", self.model)
        cases = {
            "beta is 0.3, but the run in .* was started with 0.1": ["--beta", 0.3],
            "batch_size is 2, .* with 4": ["--batch-size", 2],
            "model is '.*other'": ["--model", self.folder / "other"],
            "seed is 1": ["--seed", 1],
            "learning_rate is 0.1": ["--learning-rate", 0.1],
            "--resume-anyway": ["--max-seq-length", 32],
        }
        for pattern, more in cases.items():
            with self.subTest(more=more):
                self.refuse(pattern, "--resume", self.adapters, *more)
        for more in (["--num-layers", 1], ["--optimizer", "sgd"]):
            self.refuse(
                "what it saved has that shape",
                *("--resume", self.adapters, "--resume-anyway", *more),
            )

    def test_other_settings_on_request(self):
        self.start("--learning-rate", 1e-3, "--steps-per-report", 1)
        out = self.succeed(
            *("--resume", self.adapters, "--resume-anyway", "--steps-per-report", 1),
            *("--learning-rate", 1e-4, "--beta", 0.2),
        )
        self.assertIn("[WARNING] learning_rate is 0.0001, no longer 0.001.", out)
        rates = [line.get("learning_rate", 0) for line in metrics_of(self.adapters)]
        self.assertEqual([round(x, 9) for x in rates if x], [1e-3] * 3 + [1e-4] * 2)
        saved = json.loads((self.adapters / "adapter_config.json").read_text())
        self.assertEqual((saved["beta"], saved["resume_anyway"]), (0.2, False))
        self.assertIsNone(saved["resume"])

    def test_other_files_than_at_the_start(self):
        model = shutil.copytree(self.model, self.folder / "model")
        data = shutil.copytree(self.data, self.folder / "data")
        other = shutil.copytree(self.model, self.folder / "other")
        files = "--model", model, "--data", data, "--reference-model", other
        self.start(*files, "--no-reference-cache")

        def change_weights(folder):
            file = str(folder / "model.safetensors")
            weights = mx.load(file)
            weights["model.norm.weight"] = weights["model.norm.weight"] * 2
            mx.save_safetensors(file, weights)

        def drop_row(name):
            lines = (data / name).read_text().splitlines(keepends=True)
            (data / name).write_text("".join(lines[1:]))

        for pattern, change in {
            "the validation pairs are not": lambda: drop_row("valid.jsonl"),
            "the training pairs are not": lambda: drop_row("train.jsonl"),
            "the reference model is not": lambda: change_weights(other),
            r"the model \(.*\) is not": lambda: change_weights(model),
        }.items():
            change()
            with self.subTest(pattern=pattern):
                self.refuse(pattern, "--resume", self.adapters)
        out = self.succeed("--resume", self.adapters, "--resume-anyway")
        self.assertEqual(out.count("[WARNING] The "), 4)
        last = metrics_of(self.adapters)[-1]
        self.assertEqual(last["iteration"], 5)
        # What the checkpoint knew of the old reference does not count.
        new = ["--adapter-path", self.folder / "new", "--no-reference-cache"]
        self.succeed(*self.flags(*files), *new)
        first, name = metrics_of(self.folder / "new")[0], "val_perplexity/reference"
        self.assertAlmostEqual(last[name] / first[name], 1, places=5)

    def test_longer_than_planned(self):
        more = ["--steps-per-report", 1, "--learning-rate", 1e-3]
        config = write_yaml(self.folder / "dpo.yaml", lr_schedule={"name": "linear"})
        self.succeed(*self.flags("-c", config, *more))
        out = self.succeed("--resume", self.adapters, "--iters", 6)
        self.assertRegex(" ".join(out.split()), "6 steps now instead of 3.*at step 6")
        rates = [line.get("learning_rate") for line in metrics_of(self.adapters)]
        rates = [round(rate, 7) for rate in rates if rate is not None]
        self.assertEqual(rates, [1e-3, 6.667e-4, 3.333e-4, 5e-4, 3.333e-4, 1.667e-4])
        out = self.succeed("--resume", self.adapters)
        self.assertIn("is complete", out)

    def test_longer_after_a_part_of_an_accumulation_window(self):
        more = ["--steps-per-report", 1, "--learning-rate", 1e-2, "--iters", 5]
        config = write_yaml(self.folder / "dpo.yaml", lr_schedule={"name": "linear"})
        more += ["-c", config, "--grad-accumulation-steps", 2, "--save-every", 6]
        self.succeed(*self.flags(*more))
        with signals("_take_step", 3):
            code, _, err = command("--resume", self.adapters, "--iters", 10)
        self.assertEqual(code, 143, err)
        self.succeed("--resume", self.adapters)
        lines = [x for x in metrics_of(self.adapters) if "learning_rate" in x]
        rates = [lines[i - 1]["learning_rate"] for i in (2, 4, 5, 6, 8, 10)]
        # Three updates were planned and happened; of six in all three are left.
        planned = [1 - i / 3 for i in range(3)] + [1 - i / 6 for i in (3, 4, 5)]
        np.testing.assert_allclose(rates, [1e-2 * x for x in planned], rtol=1e-5)

    def test_another_measure_of_the_best(self):
        every = ("--steps-per-eval", 1, "--save-every", 1)
        self.succeed(*self.flags("--learning-rate", 1e-3, *every))
        best = self.adapters / "best" / "adapters.safetensors"
        # Of an accuracy of 1 no loss is above, and of a loss near 0 no accuracy below.
        for measure, iters in (("accuracy", 6), ("loss", 9), ("accuracy", 12)):
            more = ("--save-best", measure, "--iters", iters)
            self.succeed("--resume", self.adapters, *more)
            lines = [x for x in metrics_of(self.adapters) if "val_loss" in x]
            lines = [x for x in lines if x["iteration"] > iters - 3]
            key = {"accuracy": "val_rewards/accuracies", "loss": "val_loss"}[measure]
            sign = -1 if measure == "loss" else 1
            chosen = max(lines, key=lambda x: sign * x[key])["iteration"]
            same = bits(best) == bits(numbered(self.adapters, chosen, "adapters"))
            with self.subTest(measure=measure, chosen=chosen):
                self.assertTrue(same)

    def test_a_renamed_folder(self):
        self.start()
        moved = self.adapters.rename(self.folder / "moved")
        out = self.succeed("--resume", moved, "--adapter-path", moved)
        self.assertIn("Going on after step 3", out)
        self.refuse(
            "adapter_path is .*adapters",
            "--resume",
            moved,
            "--adapter-path",
            self.adapters,
        )

    def test_complete(self):
        self.succeed(*self.flags())
        before = result(self.adapters)
        out = self.succeed("--resume", self.adapters)
        self.assertIn(
            f"The run in {self.adapters} is complete: it has taken all of its 3 steps.",
            out,
        )
        self.assertTrue(result(self.adapters) == before)
        self.assertEqual(len(re.findall("is complete|Going on", out)), 1)

    def test_nothing_to_resume(self):
        for folder in (self.folder / "nowhere", self.data):
            code, _, err = command("--resume", folder)
            self.assertEqual(code, 2)
            self.assertRegex(err, r"\AError: Nothing to resume in .*\n\Z")

    def test_before_the_first_checkpoint(self):
        with mock.patch.object(PreferenceRun, "_take_step", side_effect=InputError):
            command(*self.flags())
        out = self.succeed("--resume", self.adapters)
        self.assertIn("has no checkpoint yet: the run starts again", out)
        again = self.folder / "again"
        self.succeed(*self.flags("--adapter-path", again))
        self.assertTrue(result(again) == result(self.adapters))

    def test_a_new_run_in_the_folder_of_an_old_one(self):
        self.succeed(*self.flags("--iters", 4, "--save-every", 1))
        more = ["--learning-rate", 1e-3, "--save-every", 2, "--keep-checkpoints", 1]
        with signals("_take_step", 1):
            code, *_ = command(*self.flags(*more))
        self.assertEqual(code, 143)
        # Not the old run's last state.
        out = self.succeed("--resume", self.adapters)
        self.assertIn("Going on after step 1 of 3.", out)
        again = self.folder / "again"
        self.succeed(*self.flags(*more, "--adapter-path", again))
        for part in ("adapter", "state", "metrics"):
            self.assertTrue(result(again)[part] == result(self.adapters)[part], part)

    def test_tests_that_were_asked_for(self):
        self.start("--test")
        out = self.succeed("--resume", self.adapters)
        self.assertIn("reward accuracy", out)

    def test_deleted_metrics(self):
        self.start("--steps-per-report", 1)
        (self.adapters / "metrics.jsonl").unlink()
        self.succeed("--resume", self.adapters)
        its = [line["iteration"] for line in metrics_of(self.adapters)]
        self.assertEqual(its, [4, 5, 5])


class TestParts(unittest.TestCase):
    def test_more_validation_than_before(self):
        setup = Setup(other_reference=True, val_batches=1)
        with tempfile.TemporaryDirectory() as folder:
            setup.start(folder, iters=6)
            more = {"val_batches": -1, "steps_per_eval": 1}
            setup.go_on(folder, **more)
            whole = Path(folder) / "whole"
            setup.start(whole, **more)
            found, expected = (
                [x for x in lines_of(f) if "val_loss" in x and x["iteration"] > 6]
                for f in (folder, whole)
            )
        self.assertEqual(found, expected)

    def test_fingerprint_of_data(self):
        pairs = random_pairs(4)
        names = {data_fingerprint(x) for x in (pairs, pairs[:3], pairs[::-1], [], None)}
        self.assertEqual(len(names), 4)
        self.assertEqual(data_fingerprint(pairs), data_fingerprint(random_pairs(4)))

    def test_settings_of_a_new_version(self):
        # A setting that did not exist when the run began has its default.
        with tempfile.TemporaryDirectory() as folder:
            config = {
                "trained_with": "mlx_lm.dpo",
                "beta": 0.3,
                "gone": 1,
                "seed": None,
            }
            (Path(folder) / "adapter_config.json").write_text(json.dumps(config))
            args = SimpleNamespace(
                **{"resume": folder, "resume_anyway": False, "explicit": set()},
                **{"beta": 0.1, "brand_new": 7, "train": False, "adapter_path": "x"},
                seed=5,
            )
            adopt_resumed_run(args)
        self.assertEqual((args.beta, args.brand_new, args.train), (0.3, 7, True))
        # So has one that is null, as in a YAML file.
        self.assertEqual(args.seed, 0)
        self.assertEqual(args.adapter_path, folder)
        self.assertFalse(hasattr(args, "gone"))

    def test_pairs_may_be_looked_at_after_a_resumed_run(self):
        with tempfile.TemporaryDirectory() as folder:
            config = {"trained_with": "mlx_lm.dpo", "inspect": None}
            (Path(folder) / "adapter_config.json").write_text(json.dumps(config))
            args = SimpleNamespace(
                **{"resume": folder, "resume_anyway": False, "explicit": {"inspect"}},
                **{"inspect": 3, "train": False, "adapter_path": "x"},
            )
            adopt_resumed_run(args)
        self.assertEqual(args.inspect, 3)

    def test_weights_of_other_losses_are_not_kept(self):
        saved = {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]}
        for loss_type, weights in (("ipo", None), (saved["loss_type"], [1.0, 0.5])):
            with tempfile.TemporaryDirectory() as folder:
                config = {"trained_with": "mlx_lm.dpo", **saved}
                (Path(folder) / "adapter_config.json").write_text(json.dumps(config))
                args = SimpleNamespace(
                    **{"resume": folder, "resume_anyway": True, "train": False},
                    **{"loss_type": loss_type, "loss_weights": None},
                    **{"explicit": {"loss_type"}, "adapter_path": "x"},
                )
                with contextlib.redirect_stdout(io.StringIO()):
                    adopt_resumed_run(args)
            self.assertEqual((args.loss_type, args.loss_weights), (loss_type, weights))

    def test_screen_goes_on(self):
        uis = [PreferenceTrainUI(10, rank=1) for _ in range(2)]
        for _ in range(4):
            uis[0].advance()
        uis[1].load_state_dict(*uis[0].state_dict())
        self.assertEqual(uis[1]._progress.tasks[0].completed, 4)

    def test_absorbing_a_checkpoint_of_the_cache(self):
        theirs, ours = ReferenceCache(None, ""), ReferenceCache(None, "")
        theirs.store([b"a" * 16, b"b" * 16], np.array([[-1.0, -2.0], [-3.0, -4.0]]))
        ours.store([b"b" * 16, b"c" * 16], np.array([[-5.0, -6.0], [-7.0, -8.0]]))
        ours.absorb(**theirs.arrays())
        known = ours.lookup([b"a" * 16, b"b" * 16, b"c" * 16])
        self.assertEqual(known.tolist(), [[-1, -2], [-3, -4], [-7, -8]])


if __name__ == "__main__":
    unittest.main()
