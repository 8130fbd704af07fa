# Copyright © 2026 MLX Contributors

import contextlib
import io
import tempfile
import unittest
from pathlib import Path

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten
from tiny import random_pairs, tiny_model, weights_of

from mlx_lm.preference.forward.frozen import FrozenStart
from mlx_lm.preference.reference.remembered import RememberedReference
from mlx_lm.preference.run.checkpoint import (
    load_state,
    numbered,
    save_adapter,
    save_state,
)
from mlx_lm.preference.run.loop import PreferenceRun, apply_snapshot, take_snapshot
from mlx_lm.tuner.trainer import DPOTrainingArgs, training_step


class TestSnapshot(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)

    def new_run(self, iters, **settings):
        model = tiny_model("lora")
        args = DPOTrainingArgs(
            batch_size=2,
            iters=iters,
            grad_accumulation_steps=2,
            adapter_file=str(self.folder / "adapters.safetensors"),
            **settings,
        )
        reference = RememberedReference(FrozenStart(model))
        optimizer = optim.Adam(1e-2)
        step = training_step(model, optimizer, args)
        data = random_pairs(8)
        return PreferenceRun(model, reference, optimizer, args, data, step=step)

    def train(self, run, resume=None):
        with contextlib.redirect_stdout(io.StringIO()):
            run.train(resume)

    def test_what_is_taken_can_be_put_back(self):
        run = self.new_run(3, debug_gradients=True)
        self.train(run)
        self.assertTrue(run.describe_gradients())
        # As if a fourth step had only added to the accumulator.
        run.state[3]["pairs"] = mx.array(2.0)
        arrays, info = take_snapshot(run, pending=True)
        self.assertEqual(info["gradients"], run.describe_gradients())
        save_adapter(run.policy_model, numbered(self.folder, 3, "adapters"))
        state = load_state(save_state(self.folder, 3, arrays, info))
        other = self.new_run(6)
        other.optimizer.init(other.policy_model.trainable_parameters())
        other.state = [None, None, None, dict(run.state[3], pairs=mx.array(0.0))]
        self.assertEqual(apply_snapshot(other, state), (3, True))
        for name, x in tree_flatten(run.optimizer.state):
            np.testing.assert_array_equal(
                x, dict(tree_flatten(other.optimizer.state))[name]
            )
        for name, x in weights_of(run.policy_model).items():
            np.testing.assert_array_equal(x, weights_of(other.policy_model)[name])
        self.assertEqual(other.state[3]["pairs"].item(), 2)
        self.assertEqual(len(other.reference.cache), len(run.reference.cache))

    def test_a_state_of_another_optimizer_is_refused(self):
        run = self.new_run(2)
        run.optimizer = optim.SGD(1e-2, momentum=0.9)
        self.train(run)
        state = load_state(numbered(self.folder, 2, "state"))
        other = self.new_run(4)
        with self.assertRaisesRegex(ValueError, "it is of another run"):
            self.train(other, state)


if __name__ == "__main__":
    unittest.main()
