# Copyright © 2026 MLX Contributors

import unittest
from unittest import mock

import mlx.core as mx
import mlx.optimizers as optim
from folders import FolderCase
from resuming import Setup
from tiny import tiny_model

from mlx_lm.preference.measure.window import LastGradient, MetricsWindow
from mlx_lm.preference.policy.masters import MasterWeights
from mlx_lm.preference.run import state as run_state
from mlx_lm.preference.run.loop import SkippedSteps
from mlx_lm.preference.run.state import (
    OptimizerState,
    TreeState,
    apply_snapshot,
    take_snapshot,
)

WORLD = mx.distributed.init()


def make_parts():
    model = tiny_model("lora")
    optimizer = MasterWeights(optim.AdamW(optim.linear_schedule(1.0, 0, 9)), model)
    accumulator = {"gradients": [mx.zeros((2,))], "pairs": mx.array(0.0)}
    return {
        "optimizer": OptimizerState(optimizer),
        "accumulator": TreeState(accumulator),
        "window": MetricsWindow(),
        "gradient": LastGradient(),
        "skipped": SkippedSteps(),
    }


class TestSnapshot(unittest.TestCase):
    def setUp(self):
        self.parts = make_parts()
        self.parts["optimizer"].tree["optimizer"]["step"] += 5
        self.parts["accumulator"].tree["gradients"][0] = mx.array([1.0, 2.0])
        self.parts["window"].add({"pairs": mx.array(3.0)}, 20, 30)
        self.parts["gradient"].norm = mx.array(0.5)
        self.parts["skipped"].count()

    def test_what_is_taken_can_be_put_back(self):
        arrays, info = take_snapshot(self.parts, WORLD)
        others = make_parts()
        trees = {k: x.tree for k, x in others.items() if isinstance(x, TreeState)}
        apply_snapshot(others, arrays, info, WORLD)
        again, same = take_snapshot(others, WORLD)
        self.assertEqual((again.keys(), same), (arrays.keys(), info))
        for name, x in arrays.items():
            self.assertTrue(mx.array_equal(again[name], x).item(), name)
        self.assertEqual(again["window.padded"].item(), 30)
        # In place: compiled steps hold on to the trees.
        for name, tree in trees.items():
            self.assertIs(others[name].tree, tree)

    def test_ranks_put_their_shares_together(self):
        group = mock.Mock(**{"size.return_value": 2})
        twice = lambda arrays, group: {k: 2 * x for k, x in arrays.items()}
        with mock.patch.object(run_state, "sum_over_ranks", twice):
            arrays, info = take_snapshot(self.parts, group)
        self.assertEqual(arrays["window.pairs"].item(), 6)
        self.assertEqual(arrays["accumulator.gradients.0"].tolist(), [2, 4])
        self.assertEqual(arrays["gradient.norm"].item(), 0.5)
        for rank, pairs in ((0, 6), (1, 0)):
            group.rank.return_value = rank
            others = make_parts()
            apply_snapshot(others, arrays, info, group)
            self.assertEqual(others["window"].sums["pairs"].item(), pairs)
            self.assertEqual(others["gradient"].norm.item(), 0.5)
            self.assertEqual(others["skipped"].total, 1)

    def test_a_constant_rate_may_change(self):
        for rate, expected in ((0.5, 0.5), (optim.linear_schedule(0.5, 0, 9), 0.1)):
            saved, new = optim.SGD(0.1), optim.SGD(rate)
            for optimizer in (saved, new):
                optimizer.init({"w": mx.zeros((1,))})
            OptimizerState(new).load_state_dict(*OptimizerState(saved).state_dict())
            self.assertAlmostEqual(new.state["learning_rate"].item(), expected)


class TestRun(FolderCase):
    def test_a_state_of_another_optimizer_is_refused(self):
        sgd = Setup(optimizer=lambda rate: optim.SGD(rate, momentum=0.9))
        sgd.start(self.folder, iters=2)
        with self.assertRaisesRegex(ValueError, "it is of another run"):
            Setup().go_on(self.folder)


if __name__ == "__main__":
    unittest.main()
