# Copyright © 2026 MLX Contributors

"""Which layout of batches a run measures on its first steps, and keeps."""

import contextlib
import io
import tempfile
import unittest
from pathlib import Path
from unittest import mock

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
from tiny import Pairs, pair, tiny_model, weights_of

from mlx_lm.preference.batch.collate import iterate_preference_batches
from mlx_lm.preference.batch.shape import batches_per_epoch, padded_tokens
from mlx_lm.preference.run import layouts as layouts_room
from mlx_lm.preference.run.checkpoint import newest_state
from mlx_lm.preference.run.layouts import LayoutTrial, possible_layouts
from mlx_lm.preference.run.plan import training_plan
from mlx_lm.tuner.trainer import DPOTrainingArgs, train_dpo


def alike_pairs(count=48, prompt=9, answer=4):
    """Pairs of one length each, so that every layout has one shape."""
    rng = np.random.default_rng(0)
    row = lambda n: rng.integers(1, 64, n).tolist()
    return Pairs(pair(row(prompt), row(answer), row(answer)) for _ in range(count))


ARGS = {"batch_size": 2, "sharing": "ragged", "try_layouts": True, "compile": False}


def trial(pairs, **args):
    args = DPOTrainingArgs(**{**ARGS, "compile": True, **args})
    plan = training_plan(pairs, args)
    layouts = possible_layouts(pairs, args, plan)
    given = plan, args.batch_size, layouts
    return LayoutTrial(*given, args.grad_accumulation_steps), plan


def take(found, seconds):
    """Take all of a trial's steps, each as long as its layout takes; what is said."""
    names, said = [], []
    while found.chosen is None:
        name = found.reshape(found.shape).layout
        names.append(name)
        said.append(found.time(seconds[name]))
    return names, said[-1]


class TestTrial(unittest.TestCase):
    def test_the_quickest_is_kept_and_said(self):
        for times, best, text in (
            ({"plain": 1.0, "equal": 2.0, "ragged": 4.0}, "plain", "50% less"),
            ({"plain": 4.0, "equal": 2.0, "ragged": 1.0}, "ragged", "50% less"),
            # Within a clock's noise the plan's own layout stays.
            ({"plain": 1.0, "equal": 0.98, "ragged": 0.98}, None, "A step takes"),
        ):
            found, plan = trial(alike_pairs())
            self.assertEqual(sorted(found.names), ["equal", "plain", "ragged"])
            names, said = take(found, times)
            with self.subTest(times=times):
                self.assertEqual(found.chosen, best or plan[0].shape.layout)
                self.assertIn(text, said)
                # In turns, the first of each untimed.
                self.assertEqual(names, found.names * 3)
                self.assertEqual({len(x) for x in found.seconds.values()}, {2})

    def test_the_first_turn_may_take_its_time(self):
        found, _ = trial(alike_pairs())
        for _ in found.names:
            found.time(100.0 if found.reshape(found.shape).layout == "plain" else 1.0)
        take(found, {"plain": 0.5, "equal": 1.0, "ragged": 1.0})
        self.assertEqual(found.chosen, "plain")

    def test_turns_are_as_long_as_an_update_takes(self):
        found, _ = trial(alike_pairs(96), grad_accumulation_steps=2)
        names, _ = take(found, {"plain": 1.0, "equal": 2.0, "ragged": 2.0})
        self.assertEqual(names[::2], names[1::2])
        self.assertEqual(found.seconds["plain"], [2.0, 2.0])

    def test_no_trial_where_nothing_is_to_choose(self):
        for pairs, args in (
            (alike_pairs(), {"try_layouts": False}),
            (alike_pairs(), {"sharing": "plain"}),
            (alike_pairs(), {"sharing": "packed"}),
            (alike_pairs(20), {}),
            # Without a prompt there is nothing to share.
            (alike_pairs(prompt=1), {}),
        ):
            found, plan = trial(pairs, **args)
            self.assertIsNone(found.lead)
            shape = plan[0].shape
            self.assertEqual(found.reshape(shape), shape)
            self.assertIsNone(found.time(1.0))

    def test_ranks_choose_alike(self):
        slowest = lambda x, group=None: mx.maximum(x, mx.array([9.0, 1.0, 9.0]))
        with mock.patch.object(mx.distributed, "all_max", slowest):
            found, _ = trial(alike_pairs())
            take(found, dict.fromkeys(("plain", "equal", "ragged"), 0.5))
        self.assertEqual(found.chosen, found.names[1])

    def test_a_checkpoint_keeps_it(self):
        found, _ = trial(alike_pairs())
        for _ in range(4):
            found.reshape(found.shape)
            found.time(1.0)
        other, _ = trial(alike_pairs())
        other.load_state_dict({}, found.state_dict()[1])
        self.assertEqual(other.reshape(other.shape), found.reshape(found.shape))
        self.assertEqual(other.state_dict(), found.state_dict())
        take(found, {"plain": 0.1, "equal": 1.0, "ragged": 1.0})
        other.load_state_dict({}, found.state_dict()[1])
        self.assertEqual(other.chosen, "plain")
        # The first batches of the epoch remain the first ones.
        self.assertEqual(other.lead, found.lead)


class TestBatches(unittest.TestCase):
    def test_the_same_pairs_whatever_is_chosen(self):
        rng = np.random.default_rng(1)
        row = lambda n: rng.integers(1, 64, n).tolist()
        lengths = rng.permutation([(9, 5, 4), (9, 3, 4), (30, 4, 9)] * 80).tolist()
        pairs = Pairs(pair(*map(row, three)) for three in lengths)
        found, plan = trial(pairs, batch_size=4)
        shape, count = found.lead
        orders = []
        for name, shapes in found.layouts.items():
            batches = iterate_preference_batches(
                pairs, 4, plan, seed=0, lead=found.lead, reshape=shapes.get
            )
            batches = list(batches)
            orders.append([batch.indices for batch in batches])
            width = batches[0].arrays["inputs"].shape[1]
            self.assertEqual(width, found.layouts[name][shape].width)
        self.assertTrue(all(order == orders[0] for order in orders))
        self.assertEqual(len(orders[0]), batches_per_epoch(plan, 4))
        (home,) = [b.indices for b in plan if b.shape == shape]
        self.assertTrue(np.isin(orders[0][:count], home).all())

    def test_long_rows_are_not_worth_a_try_where_prompts_are_long(self):
        pairs = alike_pairs(prompt=200)
        args = DPOTrainingArgs(**{**ARGS, "compile": True})
        plan = training_plan(pairs, args)
        found = possible_layouts(pairs, args, plan)
        self.assertNotIn("plain", found)
        self.assertEqual(plan[0].shape.prompt > 0, True)
        self.assertLess(padded_tokens(plan, 2), 48 * 260)


class TestRuns(unittest.TestCase):
    def run_to(self, folder, iters, best, resume=None):
        """A run whose clock finds one layout quickest."""
        real = LayoutTrial.time

        def time(self, seconds):
            name = self.names[self.taken // self.steps_a_turn % len(self.names)]
            return real(self, 0.1 if name == best else 1.0)

        screen = io.StringIO()
        with contextlib.redirect_stdout(screen), mock.patch.object(
            LayoutTrial, "time", time
        ):
            model = tiny_model("lora")
            settings = {"iters": iters, "steps_per_save": 100, **ARGS}
            settings["adapter_file"] = f"{folder}/adapters.safetensors"
            args = DPOTrainingArgs(**settings)
            state = newest_state(folder) if resume else None
            pairs = alike_pairs(prompt=4, answer=8)
            train_dpo(model, optim.SGD(0.1), pairs, None, args, resume=state)
        return weights_of(model), screen.getvalue()

    def test_the_choice_changes_numbers_by_rounding_alone(self):
        weights = []
        for best in ("plain", "ragged"):
            with tempfile.TemporaryDirectory() as folder:
                found, said = self.run_to(folder, 14, best)
                self.assertIn(layouts_room.NAMES[best] + ", 90%", said)
                weights.append(found)
        for name, x in weights[0].items():
            np.testing.assert_allclose(weights[1][name], x, atol=1e-6)

    def test_a_resumed_run_goes_on_with_it(self):
        with tempfile.TemporaryDirectory() as folder:
            for stop in (4, 12):
                whole, cut = Path(folder, f"whole{stop}"), Path(folder, f"cut{stop}")
                expected, _ = self.run_to(whole, 16, "plain")
                self.run_to(cut, stop, "plain")
                # What the clock says later no longer counts.
                after = "plain" if stop == 4 else "ragged"
                weights, _ = self.run_to(cut, 16, after, resume=True)
                for name, x in expected.items():
                    np.testing.assert_array_equal(weights[name], x)


if __name__ == "__main__":
    unittest.main()
