# Copyright © 2026 MLX Contributors

import tempfile
import unittest

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from folders import FolderCase
from mlx.utils import tree_flatten, tree_map
from tiny import Pairs, Recorder, random_pairs, tiny_model, train, weights_of

from mlx_lm.preference.batch.collate import PairBatch, collate_pairs
from mlx_lm.preference.forward.answers import sequence_logps
from mlx_lm.preference.forward.frozen import FrozenStart
from mlx_lm.preference.reference.cache import ReferenceCache
from mlx_lm.preference.reference.fingerprint import variant_fingerprint
from mlx_lm.preference.reference.live import LiveReference, NoReference
from mlx_lm.preference.reference.moving import MovingReference
from mlx_lm.preference.reference.remembered import RememberedReference
from mlx_lm.tuner.trainer import dpo_step

PAIRS = Pairs(random_pairs(4))
BATCH = PairBatch([0, 1, 2, 3], collate_pairs(PAIRS))


def move(model, by=0.1, seed=0):
    """Change what is trained, as an optimizer would."""
    key = mx.random.key(seed)
    model.update(
        tree_map(
            lambda x: x + (by * mx.random.normal(x.shape, key=key)).astype(x.dtype),
            model.trainable_parameters(),
        )
    )


class TestSync(unittest.TestCase):
    def test_follows_the_formula(self):
        for kind in ("lora", "full"):
            model = tiny_model(kind)
            reference, start = FrozenStart(model), weights_of(model)
            move(model)
            first = weights_of(model)
            reference.sync(0.6)
            move(model, seed=1)
            reference.sync(0.1)
            now = weights_of(model)
            ours = dict(tree_flatten(reference.state))
            self.assertEqual(ours.keys(), start.keys())
            for k, x in ours.items():
                a, b, c = (w[k].astype(np.float64) for w in (start, first, now))
                expected = 0.1 * c + 0.9 * (0.6 * b + 0.4 * a)
                np.testing.assert_allclose(x, expected, rtol=1e-6, atol=1e-7)
            np.testing.assert_array_equal(now[k], weights_of(model)[k])

    def test_all_of_it_makes_the_policy_the_reference(self):
        model = tiny_model()
        reference = FrozenStart(model)
        move(model)
        before = sequence_logps(model, BATCH.arrays)
        reference.sync(1.0)
        for k, x in tree_flatten(reference.state):
            np.testing.assert_array_equal(x, weights_of(model)[k])
        # The policy goes on alone.
        move(model, seed=2)
        tokens = BATCH.arrays["inputs"]
        self.assertGreater(mx.abs(reference(tokens) - model(tokens)).max().item(), 0)
        with self.assertRaises(AssertionError):
            np.testing.assert_allclose(before, sequence_logps(model, BATCH.arrays))

    def test_16_bits_are_mixed_in_32(self):
        layer = nn.Linear(64, 64, bias=False)
        layer.set_dtype(mx.bfloat16)
        start = np.array(layer.weight.astype(mx.float32), np.float64)
        reference = FrozenStart(layer)
        move(layer, by=0.02)
        now = np.array(layer.weight.astype(mx.float32), np.float64)
        reference.sync(0.3)
        ours = reference.state["weight"]
        self.assertEqual(ours.dtype, mx.bfloat16)
        exact = 0.3 * now + 0.7 * start
        error = np.abs(np.array(ours.astype(mx.float32), np.float64) - exact)
        # Rounded once: half a unit in the last of 8 bits.
        self.assertLessEqual((error / np.abs(exact)).max(), 2**-8 * 1.001)

    def test_16_bits_follow_a_little_at_a_time(self):
        layer = nn.Linear(64, 64, bias=False)
        layer.set_dtype(mx.bfloat16)
        float64 = lambda x: np.array(x.astype(mx.float32), np.float64)
        for mixing in (0.05, 0.3):
            reference, exact = FrozenStart(layer), float64(layer.weight)
            # Less than a half of what the last bit counts.
            move(layer, by=1e-3)
            for _ in range(60):
                reference.sync(mixing)
                exact = mixing * float64(layer.weight) + (1 - mixing) * exact
            with self.subTest(mixing=mixing):
                rounded = float64(reference.state["weight"])
                np.testing.assert_allclose(rounded, exact, rtol=2**-8 * 1.001)
                found = reference.exact["weight"]
                np.testing.assert_allclose(found, exact, rtol=1e-5, atol=1e-7)
                self.assertEqual(reference.state["weight"].dtype, mx.bfloat16)

    def test_compiled_steps_see_it_without_another_trace(self):
        model, traces = tiny_model(), []
        reference = RememberedReference(FrozenStart(model), moving=True)

        def function(reference_model, batch):
            traces.append(reference_model)
            with_reference = reference_model(batch["inputs"])
            return with_reference - model(batch["inputs"])

        run = reference.compiled(function, [model.state])
        gaps = []
        for mixing in (0.5, 1.0):
            move(model)
            gaps.append(mx.abs(run(BATCH.arrays)).max().item())
            reference.sync(mixing)
            gaps.append(mx.abs(run(BATCH.arrays)).max().item())
        self.assertEqual(len(traces), 1)
        self.assertLess(gaps[1], gaps[0])
        self.assertGreater(gaps[1], 1e-3)
        self.assertLess(gaps[3], 1e-6)

    def test_compiled_steps_see_an_adapter_that_no_longer_idles(self):
        model = tiny_model("lora")
        reference = RememberedReference(FrozenStart(model), moving=True)
        logps = lambda reference_model, batch: sequence_logps(reference_model, batch)
        run = reference.compiled(logps, [model.state])
        start = run(BATCH.arrays)
        np.testing.assert_allclose(start, sequence_logps(model, BATCH.arrays), 1e-6)
        for mixing in (1.0, 0.5):
            move(model)
            reference.sync(mixing)
            now = run(BATCH.arrays)
            self.assertGreater(mx.abs(now - start).max().item(), 1e-3)
            expected = sequence_logps(reference.model, BATCH.arrays)
            np.testing.assert_allclose(now, expected, rtol=1e-6)
            start = now

    def test_a_step_after_a_full_sync_starts_from_nothing(self):
        model = tiny_model("lora")
        reference, optimizer = FrozenStart(model), optim.SGD(0.1)
        losses = []
        for _ in range(2):
            losses.append(dpo_step(model, reference, BATCH.arrays, optimizer)[0])
        reference.sync(1.0)
        losses.append(dpo_step(model, reference, BATCH.arrays, optimizer)[0])
        self.assertLess(losses[1].item(), losses[0].item())
        self.assertAlmostEqual(losses[2].item(), np.log(2), places=5)

    def test_updates_are_counted_not_batches(self):
        recorder = Recorder()
        train(
            tiny_model("lora"),
            random_pairs(2),
            callback=recorder,
            **{"iters": 8, "grad_accumulation_steps": 2, "steps_per_report": 1},
            **{"sync_reference": True, "sync_steps": 2, "sync_alpha": 1.0},
        )
        losses = [line["loss"] for line in recorder.train]
        # Updates follow batches 2, 4, 6 and 8; the second brings a new reference.
        at_start = [abs(loss - np.log(2)) < 1e-5 for loss in losses]
        self.assertEqual(at_start, [True, True, False, False] * 2)

    def test_a_checkpoint_brings_it_back(self):
        for kind, dtype in (("lora", mx.float32), ("full", mx.bfloat16)):
            with self.subTest(kind=kind), tempfile.TemporaryDirectory() as folder:
                self.check_a_checkpoint(kind, dtype, f"{folder}/state.safetensors")

    def check_a_checkpoint(self, kind, dtype, path):
        model, other = tiny_model(kind), tiny_model(kind)
        for one in (model, other):
            one.set_dtype(dtype)
        reference = FrozenStart(model)
        move(model)
        reference.sync(0.3)
        moved = MovingReference(LiveReference(reference), 0.3, 1)
        mx.save_safetensors(path, moved.state_dict()[0])
        saved = mx.load(path)
        again = RememberedReference(FrozenStart(other), moving=True)
        scores = again.compiled(
            lambda model, batch: sequence_logps(model, batch), [other.state]
        )
        before = scores(BATCH.arrays)
        state = MovingReference(again, 0.3, 1)
        state.load_state_dict(saved | {"more": mx.zeros((1,))}, {})
        after, expected = scores(BATCH.arrays), sequence_logps(reference, BATCH.arrays)
        np.testing.assert_allclose(after, expected, rtol=1e-6)
        self.assertGreater(mx.abs(after - before).max().item(), 1e-4)
        with self.assertRaisesRegex(ValueError, "has no .*of another run"):
            state.load_state_dict({"more": mx.zeros((1,))}, {})
        np.testing.assert_array_equal(scores(BATCH.arrays), after)
        # It goes on from where it was, not from where it was rounded to.
        move(other)
        reference.sync(0.1)
        again.sync(0.1)
        for tree in ("exact", "state"):
            ours, theirs = (getattr(x, tree) for x in (again.model, reference))
            for (name, x), (_, y) in zip(tree_flatten(ours), tree_flatten(theirs)):
                self.assertTrue(mx.array_equal(x, y).item(), (tree, name))

    def test_mixing_out_of_range(self):
        for mixing in (0.0, -0.1, 1.5, float("nan")):
            with self.assertRaisesRegex(ValueError, "above 0 and at most 1"):
                FrozenStart(nn.Linear(1, 1)).sync(mixing)

    def test_another_model_cannot_move(self):
        for model in (tiny_model(), None):
            reference = RememberedReference(model, moving=True)
            with self.assertRaisesRegex(ValueError, "its own frozen start"):
                reference.sync(0.5)


class TestForgetting(FolderCase):
    def setUp(self):
        super().setUp()
        self.logps = mx.arange(8).astype(mx.float32)

    def fill(self):
        cache = ReferenceCache(self.folder, "a" * 64)
        RememberedReference(None, cache).remember(PAIRS, BATCH, self.logps)
        cache.save()

    def files(self):
        return {p.name: p.read_bytes() for p in self.folder.glob("*.sqlite")}

    def test_a_moving_reference_never_meets_the_disk(self):
        self.fill()
        before = self.files()
        cache = ReferenceCache(self.folder, "a" * 64)
        model = tiny_model()
        reference = RememberedReference(FrozenStart(model), cache, False, moving=True)
        self.assertEqual(reference.unknown(PAIRS), 4)
        reference.remember(PAIRS, BATCH, self.logps - 9)
        self.assertEqual(reference.unknown(PAIRS), 0)
        # It is asked again after it moved.
        self.assertFalse(reference.release(PAIRS))
        reference.sync(0.5)
        self.assertEqual(reference.unknown(PAIRS), 4)
        self.assertIs(reference.recall(PAIRS, BATCH), BATCH.arrays)
        reference.remember(PAIRS, BATCH, self.logps - 7)
        reference.cache.exchange(mx.distributed.init())
        reference.cache.save()
        self.assertEqual(self.files(), before)
        # A checkpoint is of the same run's reference.
        self.assertEqual(reference.cache.fingerprint, "a" * 64)
        self.assertEqual(len(reference.cache.arrays()["keys"]), 4)

    def test_forgetting_leaves_the_disk(self):
        self.fill()
        before = self.files()
        reference = RememberedReference(None, ReferenceCache(self.folder, "a" * 64))
        self.assertEqual(reference.unknown(PAIRS), 0)
        reference.forget()
        self.assertEqual(reference.unknown(PAIRS), 4)
        reference.cache.save()
        self.assertEqual(self.files(), before)

    def test_variants_do_not_share_numbers(self):
        self.fill()
        names = {
            variant_fingerprint("a" * 64, v)
            for v in ("", "ld_alpha=0.5", "ld_alpha=0.25")
        }
        self.assertEqual(len(names), 3)
        self.assertIn("a" * 64, names)
        for name in names - {"a" * 64}:
            self.assertRegex(name, "^[0-9a-f]{64}$")
            self.assertEqual(len(ReferenceCache(self.folder, name)), 0)


class TestNoReference(unittest.TestCase):
    def test_nothing_is_computed_or_kept(self):
        reference, model = NoReference(), tiny_model()
        batch = PairBatch([0, 1, 0], collate_pairs(PAIRS[:2], 3))
        arrays = reference.recall(PAIRS, batch)
        self.assertEqual(arrays["reference_logps"].tolist(), [0.0] * 6)
        self.assertEqual(arrays["reference_logps"].dtype, mx.float32)
        self.assertEqual(arrays.keys() - batch.arrays.keys(), {"reference_logps"})
        reference.remember(PAIRS, batch, mx.ones((6,)))
        self.assertEqual(reference.recall(PAIRS, batch)["reference_logps"].sum(), 0)
        self.assertIsNone(reference.model)
        seen = []

        def function(reference_model, batch):
            seen.append(reference_model)
            return sequence_logps(model, batch) - batch["reference_logps"]

        run = reference.compiled(function, [model.state])
        expected = sequence_logps(model, batch.arrays)
        np.testing.assert_allclose(run(arrays), expected, rtol=1e-6)
        self.assertEqual(seen, [None])

    def test_it_does_not_move(self):
        reference = NoReference()
        with self.assertRaisesRegex(ValueError, "its own frozen start"):
            reference.sync(0.5)


if __name__ == "__main__":
    unittest.main()
