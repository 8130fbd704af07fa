# Copyright © 2026 MLX Contributors

import contextlib
import re
import shutil
import unittest
from unittest import mock

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
from folders import FolderCase
from mlx.utils import tree_flatten
from resuming import STEPS, Setup, lines_of, signals
from test_dpo_command import CommandCase, command, metrics_of
from tiny import Recorder, random_pairs, tiny_model, train

from mlx_lm.preference import step as preference_step
from mlx_lm.preference.batch.collate import collate_pairs
from mlx_lm.preference.objective.objective import pair_losses
from mlx_lm.preference.policy.masters import with_master_weights
from mlx_lm.preference.reference.remembered import RememberedReference
from mlx_lm.preference.run.checkpoint import newest_state
from mlx_lm.preference.run.loop import PreferenceRun, TrainingStopped
from mlx_lm.tuner.trainer import dpo_step, gradient_accumulator

REFERENCE = mx.array([-9.0, -8.0, -9.0, -7.0])
POISON = {
    "nan": mx.array([-9.0, mx.nan, -9.0, -7.0]),
    "inf": mx.array([-9.0, mx.inf, -9.0, -7.0]),
    "-inf": mx.array([-9.0, -mx.inf, -9.0, -7.0]),
}


def batch_of(seed, reference=REFERENCE):
    return collate_pairs(random_pairs(2, seed)) | {"reference_logps": reference}


def raw(*trees):
    """The bits of all arrays of some trees."""
    return [
        (name, np.array(x.reshape(-1).view(mx.uint8)).tobytes())
        for tree in trees
        for name, x in tree_flatten(tree)
    ]


class TestStep(unittest.TestCase):
    """A batch that gives numbers that are not finite changes no bit."""

    def test_nothing_changes(self):
        makers = {
            "adamw": lambda: optim.AdamW(optim.cosine_decay(1e-2, 9)),
            "sgd": lambda: optim.SGD(1e-2, momentum=0.9),
            "muon": lambda: optim.Muon(1e-2),
        }
        for name, make in makers.items():
            for dtype in (None, mx.bfloat16):
                model = tiny_model("full" if dtype else "lora")
                if dtype:
                    model.set_dtype(dtype)
                optimizer = with_master_weights(make(), model)
                dpo_step(model, None, batch_of(0), optimizer, max_grad_norm=1.0)
                before = raw(model.parameters(), optimizer.state)
                for kind, poison in POISON.items():
                    with self.subTest(optimizer=name, dtype=dtype, kind=kind):
                        _, metrics = dpo_step(
                            model, None, batch_of(1, poison), optimizer
                        )
                        self.assertEqual(metrics["skipped"].item(), 1)
                        after = raw(model.parameters(), optimizer.state)
                        self.assertTrue(after == before)
                # It is not stuck.
                _, metrics = dpo_step(model, None, batch_of(2), optimizer)
                self.assertEqual(metrics["skipped"].item(), 0)
                self.assertFalse(raw(model.parameters(), optimizer.state) == before)

    def test_a_gradient_alone_is_not_finite(self):
        # Its square root is 0 at 0 and its slope infinite.
        def steep(*args, **kwargs):
            losses = pair_losses(*args, **kwargs)
            return losses + mx.sqrt(losses - losses)

        model, optimizer = tiny_model("lora"), optim.Adam(1e-2)
        dpo_step(model, None, batch_of(0), optimizer)
        before = raw(model.parameters(), optimizer.state)
        for accumulator in (None, gradient_accumulator(model)):
            with mock.patch.object(preference_step, "pair_losses", steep):
                loss, metrics = dpo_step(
                    model, None, batch_of(1), optimizer, accumulator=accumulator
                )
            self.assertTrue(np.isfinite(loss.item()))
            self.assertEqual(metrics["skipped"].item(), 1)
            self.assertTrue(raw(model.parameters(), optimizer.state) == before)

    def test_of_several_batches_the_finite_ones_count(self):
        def after(*batches):
            model, optimizer = tiny_model("lora"), optim.Adam(1e-2)
            accumulator = gradient_accumulator(model)
            skipped = []
            for i, batch in enumerate(batches):
                _, metrics = dpo_step(
                    *(model, None, batch, optimizer),
                    accumulator=accumulator,
                    do_update=i == len(batches) - 1,
                )
                skipped.append(metrics["skipped"].item())
            self.assertFalse(any(x.any() for x in map(np.array, leaves(accumulator))))
            return raw(model.parameters(), optimizer.state), skipped

        leaves = lambda tree: [x for _, x in tree_flatten(tree)]
        expected, _ = after(batch_of(0), batch_of(2))
        for poison in POISON.values():
            bad = batch_of(1, poison)
            for order in ((0, bad, 2), (bad, 0, 2), (0, 2, bad)):
                batches = [b if b is bad else batch_of(b) for b in order]
                found, skipped = after(*batches)
                self.assertEqual(skipped, [float(b is bad) for b in order])
                self.assertTrue(found == expected)
        start = raw(tiny_model("lora").parameters())
        found, skipped = after(batch_of(0, POISON["nan"]), batch_of(1, POISON["inf"]))
        self.assertEqual(skipped, [1, 1])
        self.assertTrue(found[: len(start)] == start)


@contextlib.contextmanager
def poisoned(*steps):
    """Spoil the reference's numbers in these steps of a run."""
    original, calls = PreferenceRun._take_step, iter(range(1, 10**6))
    recall = RememberedReference.recall

    def take_step(self, it, batch):
        def spoilt(reference, dataset, batch):
            arrays = recall(reference, dataset, batch)
            logps = mx.full((2 * arrays["weights"].size,), mx.nan)
            return arrays | {"reference_logps": logps}

        with contextlib.ExitStack() as stack:
            if next(calls) in steps:
                patch = mock.patch.object(RememberedReference, "recall", spoilt)
                stack.enter_context(patch)
            return original(self, it, batch)

    with mock.patch.object(PreferenceRun, "_take_step", take_step):
        yield


class TestRun(FolderCase):
    def test_counted_and_shown(self):
        setup = Setup(steps_per_report=1, max_skipped_steps=3)
        with poisoned(1, 4, 5):
            out = setup.start(self.folder)
        lines = [m for m in lines_of(self.folder) if "train_loss" in m]
        counts = [line["skipped_steps"] for line in lines]
        self.assertEqual(counts, [1, 1, 1, 2, 3, 3, 3, 3, 3])
        self.assertEqual(out.count("skipped: its loss or gradient is not finite"), 3)
        # Of no pairs, nothing is known: no loss of 0 and no perplexity of 1.
        for line in (lines[0], lines[3]):
            unknown = {name for name, value in line.items() if value is None}
            self.assertLessEqual({"loss", "train_loss", "perplexity/policy"}, unknown)
            self.assertLessEqual({"rewards/accuracies", "logps/chosen"}, unknown)
        self.assertIsNone(lines[0]["grad_norm"])
        plain = re.sub(r"\x1b\[[0-9;]*m", "", out)
        shown = [x.split() for x in plain.splitlines() if " - " in x]
        self.assertEqual(
            [row[:4] for row in shown], [[i, "-", "-", "-"] for i in "145"]
        )
        for line in (*lines[1:3], *lines[5:]):
            self.assertTrue(all(np.isfinite(v) for v in line.values()), line)
        # The norm is that of the last update.
        self.assertEqual(lines[3]["grad_norm"], lines[2]["grad_norm"])
        self.assertEqual(lines[3]["trained_pairs"], lines[2]["trained_pairs"])
        # What was due while steps were skipped is saved when one was taken.
        saved = [int(p.name[:7]) for p in sorted(self.folder.glob("*_adapters*"))]
        self.assertEqual(saved, [2, 3, *range(6, STEPS + 1)])

    def test_a_broken_run_keeps_its_last_good_checkpoint(self):
        names = lambda: sorted(p.name[:15] for p in self.folder.glob("0*"))
        expected = ["0000002_adapter", "0000002_state.s"]
        setup = Setup(max_skipped_steps=3, steps_per_save=2, keep_checkpoints=1)
        # The update of step 4 is what breaks it: what was saved then is no good.
        with poisoned(*range(5, 99)), self.assertRaises(TrainingStopped) as caught:
            setup.start(self.folder)
        self.assertEqual(names()[:2], expected)
        self.assertRegex(
            str(caught.exception),
            "The last checkpoint is .*/0000002_adapters.safetensors. To resume from it, "
            "delete 0000004_state.safetensors.$",
        )
        # Nor does a signal, or the end, make room meanwhile.
        for stop in (lambda: signals("_take_step", 3), lambda: poisoned(*range(99))):
            with poisoned(*range(99)), stop():
                with contextlib.suppress(SystemExit):
                    setup.go_on(self.folder, iters=6, max_skipped_steps=99)
            self.assertEqual(names()[:2], expected)
        setup.go_on(self.folder)
        self.assertEqual(names(), ["0000009_adapter", "0000009_state.s"])

    def test_filling_is_never_infinite(self):
        longer = random_pairs(3, longest=30)
        for more in (
            {"loss_type": "ipo", "f_divergence": "alpha", "f_alpha": 4.0},
            {"loss_type": ["sppo_hard", "apo_zero"]},
        ):
            recorder = Recorder()
            train(
                tiny_model(),
                *(longer, longer, optim.SGD(0.0), recorder),
                **{"iters": 4, "steps_per_eval": 2, "steps_per_report": 4, **more},
            )
            # The first validation asks the reference, the others know its numbers.
            first, *others = [line["val_loss"] for line in recorder.val]
            with self.subTest(**more):
                np.testing.assert_allclose(others, first, rtol=1e-5)
                self.assertEqual(recorder.train[-1]["skipped_steps"], 0)

    def test_counts_survive_a_break(self):
        setup = Setup(max_skipped_steps=2)
        with signals("_take_step", 4), poisoned(4), self.assertRaises(SystemExit):
            setup.start(self.folder)
        with poisoned(1), self.assertRaisesRegex(
            TrainingStopped, "in 2 steps in a row"
        ):
            setup.go_on(self.folder)
        state = newest_state(self.folder)
        self.assertEqual(
            (state.iteration, state.info["parts"]["skipped"]["total"]), (4, 1)
        )

    def test_too_many_in_a_row(self):
        setup = Setup(max_skipped_steps=3, steps_per_save=2)
        with poisoned(1, 2, 4, 5, 6, 7), self.assertRaises(TrainingStopped) as caught:
            setup.start(self.folder)
        message = str(caught.exception)
        self.assertRegex(
            message, r"in 3 steps in a row, last with rows \d(, \d)?\. Lower"
        )
        self.assertIn("Lower learning_rate", message)
        self.assertRegex(
            message, "0000003_adapters.safetensors. No step was taken from it"
        )

    def test_skipped_to_the_end(self):
        with poisoned(STEPS - 1, STEPS):
            out = Setup(steps_per_save=2).start(self.folder)
        self.assertRegex(
            out,
            r"\[WARNING\] The run ends with 2 skipped steps, .* Lower learning_rate, .* "
            r"The last checkpoint is .*/0000006_adapters\S* To resume from it, delete "
            r"0000009_state.safetensors\.",
        )

    def test_stopped_early_since_nothing_was_trained(self):
        setup = Setup(max_skipped_steps=9, early_stopping=1, steps_per_eval=2)
        with poisoned(*range(9)), self.assertRaisesRegex(
            TrainingStopped, "Nothing was trained: .* in all 4 steps. No step was taken"
        ):
            setup.start(self.folder)

    def test_too_many_before_the_first_update(self):
        for dtype, advice in ((None, ""), (mx.float16, "float16 ends at 65,504, .*")):
            with poisoned(1, 2), self.assertRaisesRegex(
                TrainingStopped,
                "No step was taken yet, so this is not the learning rate's fault: "
                f"{advice}look at these rows.$",
            ):
                Setup(max_skipped_steps=2, dtype=dtype).start(self.folder / str(dtype))


class TestCommand(CommandCase):
    def stop(self, pattern, *argv):
        code, _, err = command(*argv)
        self.assertEqual(code, 1)
        self.assertRegex(err, rf"\AError: .*{pattern}.*\n\Z")

    def test_rows_and_checkpoint_are_named(self):
        more = self.flags("--iters", 30, "--save-every", 2)
        with poisoned(*range(3, 30)):
            self.stop(
                r"not finite in 10 steps in a row, last with rows .*train.*\d.* Lower "
                r"learning_rate.*The last checkpoint is .*0000002_adapters",
                *more,
            )
        lines = metrics_of(self.adapters)
        self.assertEqual(lines[-1]["skipped_steps"], 8)
        out = self.succeed("--resume", self.adapters, "--iters", 4)
        self.assertIn("Going on after step 2 of 4", out)

    def test_errors_of_the_backend(self):
        memory = "[malloc] Unable to allocate 99999999999 bytes."
        metal = "[METAL] Command buffer execution failed: %s)"
        long = "The GPU took too long over one piece of work in .*CTXSTORE_TIMEOUT=1"
        many = "Metal can't hold more buffers, in a validation.*clear_cache_threshold"
        for method, error, where in (
            ("step", memory, r"a step with prompts \(.*\) and inputs \(.*\)"),
            ("score", memory, "a validation"),
            ("score", metal % "Impacting Interactivity (0000000e:kIO", long),
            ("step", metal % "Caused GPU Timeout Error (00000002:kIO", long),
            ("step", metal % "Insufficient Memory (00000008:kIO", "a step"),
            ("score", "[metal::malloc] Resource limit (499000) exceeded.", many),
            ("step", "[matmul] Shapes do not fit.", None),
        ):
            shutil.rmtree(self.adapters, ignore_errors=True)
            fail = mock.Mock(side_effect=RuntimeError(error))
            original = PreferenceRun.train

            def train(run, method=method, fail=fail, original=original):
                compiled = run.reference.compiled
                calls = iter(("step", "score", "score"))

                def replace(*args, **kwargs):
                    real = compiled(*args, **kwargs)
                    return fail if next(calls) == method else real

                with mock.patch.object(run.reference, "compiled", replace):
                    return original(run)

            with self.subTest(where), mock.patch.object(PreferenceRun, "train", train):
                if where in (long, many):
                    self.stop(f"{where}.*There is no checkpoint yet", *self.flags())
                elif where:
                    self.stop(f"Memory ran out in {where}.*batch_size", *self.flags())
                else:
                    # A bug keeps its traceback.
                    with self.assertRaisesRegex(RuntimeError, "Shapes do not fit"):
                        command(*self.flags())


if __name__ == "__main__":
    unittest.main()
