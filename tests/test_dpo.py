# Copyright © 2026 MLX Contributors

import math
import unittest

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
from tiny import (
    ROWS,
    bos_tokenizer,
    float64_logps,
    random_pairs,
    tiny_model,
    weights_of,
)

from mlx_lm.preference.batch.collate import collate_pairs
from mlx_lm.preference.forward.answers import sequence_logps
from mlx_lm.preference.forward.frozen import FrozenStart, running
from mlx_lm.tuner.datasets import PreferenceDataset
from mlx_lm.tuner.losses import dpo_loss
from mlx_lm.tuner.trainer import DPOTrainingArgs, dpo_step, evaluate_dpo, train_dpo


class TestDPO(unittest.TestCase):
    def test_dpo_loss_computation(self):
        rng = np.random.default_rng(0)
        B, V, beta = 3, 50, 0.3
        shapes = {"chosen": (B, 7, V), "rejected": (B, 4, V)}
        logits, kwargs, logps = [], {}, {}
        for shape in [*shapes.values()] * 2:
            logits.append(rng.normal(size=shape).astype(np.float32) * 3)
        for name, shape in shapes.items():
            kwargs[f"{name}_targets"] = rng.integers(0, V, shape[:2])
            kwargs[f"{name}_mask"] = rng.random(shape[:2]) < 0.7
        names = [(w, n) for w in ("policy", "reference") for n in shapes]
        for (who, name), x in zip(names, logits):
            targets, mask = kwargs[f"{name}_targets"], kwargs[f"{name}_mask"]
            logps[who, name] = float64_logps(x, targets, mask)
        h = logps["policy", "chosen"] - logps["policy", "rejected"]
        h = h - (logps["reference", "chosen"] - logps["reference", "rejected"])
        expected = np.log1p(np.exp(-beta * h)).mean()
        loss = dpo_loss(
            *map(mx.array, logits),
            beta,
            **{k: mx.array(v) for k, v in kwargs.items()},
        )
        self.assertEqual(loss.dtype, mx.float32)
        self.assertEqual(loss.shape, ())
        self.assertAlmostEqual(loss.item(), expected, delta=1e-5 * expected)

    def test_preference_dataset_loading(self):
        dataset = PreferenceDataset(ROWS, bos_tokenizer(), max_length=64)
        self.assertEqual(len(dataset), len(ROWS))
        prompt, chosen, rejected, lengths = dataset[0]
        self.assertEqual(lengths[0], len(prompt))
        self.assertEqual(lengths[1], len(prompt) + len(chosen))
        self.assertEqual(lengths[2], len(prompt) + len(rejected))
        ids = [dataset[i][:3] for i in range(len(dataset))]
        largest = max(int(x.max()) for pair in ids for x in pair)
        self.assertEqual(dataset.largest_token(), largest)
        self.assertEqual(
            bos_tokenizer().decode([*prompt, *chosen]),
            "<s>[user] Say tea.</s>\n[assistant] tea</s>\n",
        )

    def test_dpo_training_step(self):
        for kind in ("lora", "dora", "full"):
            with self.subTest(kind=kind):
                policy = tiny_model(kind)
                reference = FrozenStart(policy)
                start = weights_of(policy)
                batch = collate_pairs(random_pairs(4))
                optimizer = optim.Adam(1e-2)
                losses = []
                for _ in range(15):
                    loss, metrics = dpo_step(
                        policy, reference, batch, optimizer, beta=0.1
                    )
                    losses.append(loss.item())
                self.assertAlmostEqual(losses[0], math.log(2), places=6)
                self.assertLess(losses[-1], 0.5 * losses[0])
                self.assertEqual(metrics["rewards/accuracies"].item(), 1.0)
                self.assertGreater(metrics["kl_estimate"].item(), 0)
                # The exact one needs both models' whole distributions.
                test = evaluate_dpo(policy, reference, random_pairs(4))
                self.assertGreater(test["kl"], 0)
                self.assertAlmostEqual(
                    test["rewards/accuracies"], metrics["rewards/accuracies"].item()
                )
                now = weights_of(policy)
                self.assertTrue(any((now[k] != start[k]).any() for k in now))

    def test_known_reference_equals_live_reference(self):
        pairs = random_pairs(4)
        results = []
        for known in (False, True):
            policy = tiny_model("lora")
            reference, batch = FrozenStart(policy), collate_pairs(pairs)
            if known:
                with running(reference) as model:
                    batch["reference_logps"] = sequence_logps(model, batch)
            optimizer = optim.Adam(1e-2)
            for _ in range(3):
                loss, metrics = dpo_step(
                    policy, None if known else reference, batch, optimizer
                )
            results.append((loss.item(), weights_of(policy), metrics))
        self.assertAlmostEqual(results[0][0], results[1][0], places=6)
        for k, v in results[0][1].items():
            np.testing.assert_allclose(v, results[1][1][k], atol=1e-5)
        self.assertEqual(results[0][2].keys(), results[1][2].keys())
        for k, v in results[0][2].items():
            self.assertAlmostEqual(v.item(), results[1][2][k].item(), places=4, msg=k)

    def test_batch_without_reference_is_refused(self):
        batch = collate_pairs(random_pairs(2))
        with self.assertRaisesRegex(ValueError, "reference_logps"):
            dpo_step(tiny_model("lora"), None, batch, optim.SGD(0.1))

    def test_names_are_exported(self):
        self.assertEqual(DPOTrainingArgs().beta, 0.1)
        self.assertTrue(callable(train_dpo) and callable(evaluate_dpo))

    def test_cli_lists_dpo(self):
        import contextlib
        import io
        import sys
        from unittest import mock

        from mlx_lm import cli

        screen = io.StringIO()
        with mock.patch.object(sys, "argv", ["mlx_lm", "--help"]):
            with contextlib.redirect_stdout(screen):
                cli.main()
        self.assertIn("'dpo'", screen.getvalue())


if __name__ == "__main__":
    unittest.main()
