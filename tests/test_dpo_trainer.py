# Copyright © 2026 MLX Contributors

import json
import math
import tempfile
import unittest
from pathlib import Path
from unittest import mock

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten
from tiny import Pairs, Recorder, pair, random_pairs, tiny_model, train, weights_of

from mlx_lm.preference import step
from mlx_lm.preference.batch.collate import collate_pairs
from mlx_lm.preference.batch.shape import BatchShape
from mlx_lm.preference.errors import InputError
from mlx_lm.preference.forward.answers import (
    completion_states,
    paired_sequence_logps,
    sequence_logps,
    sum_by_row,
)
from mlx_lm.preference.forward.frozen import FrozenStart
from mlx_lm.preference.forward.parts import calls_replaced
from mlx_lm.preference.measure.metrics import sum_values
from mlx_lm.preference.policy.masters import with_master_weights
from mlx_lm.preference.policy.model import prepare_policy
from mlx_lm.preference.run import loop
from mlx_lm.preference.run.adapters import save_adapter
from mlx_lm.preference.run.folder import CallbackList, MetricsFile
from mlx_lm.preference.run.notices import slow_dtype_notice
from mlx_lm.tuner import trainer as training_step
from mlx_lm.tuner.trainer import (
    DPOTrainingArgs,
    dpo_step,
    evaluate_dpo,
    gradient_accumulator,
)


class TestLogps(unittest.TestCase):
    def test_a_pair_scores_the_same_in_any_batch(self):
        model = tiny_model()
        pairs = random_pairs(5)
        long = pair(list(range(1, 40)), [1], [2])
        alone = [sequence_logps(model, collate_pairs([p])) for p in pairs]
        alone = mx.stack(alone, axis=1).reshape(-1)
        for shape in (None, BatchShape(0, 64), BatchShape(40, 12, True)):
            together = collate_pairs([*pairs, long], 8, shape)
            logps = sequence_logps(model, together)
            self.assertEqual(logps.shape, (16,))
            # Filling has no scored token at all.
            self.assertEqual(logps[6:8].tolist() + logps[14:].tolist(), [0.0] * 4)
            logps = mx.concatenate([logps[:5], logps[8:13]])
            np.testing.assert_allclose(logps, alone, rtol=1e-5)

    def test_states_are_those_before_the_scored_tokens(self):
        model = tiny_model()
        batch = collate_pairs(random_pairs(3))
        inputs = np.array(batch["inputs"])
        states = np.array(model.model(batch["inputs"])).reshape(inputs.size, -1)
        ours = completion_states(model, batch)
        np.testing.assert_allclose(ours, states[np.array(batch["positions"])])

    def test_layers_in_common_run_once(self):
        model = tiny_model("lora")
        start = FrozenStart(model)
        moved = [(k, x + 0.1) for k, x in tree_flatten(model.trainable_parameters())]
        model.update(tree_unflatten(moved))
        pairs = random_pairs(3)
        # A function of tokens shares nothing.
        plain = collate_pairs(pairs)
        whole = paired_sequence_logps(model, lambda x: start(x), plain)
        for shape in (None, BatchShape(40, 12, True)):
            batch = collate_pairs(pairs, shape=shape)
            calls = [0] * len(model.layers)

            def counting(i, calls=calls):
                def call(original, *args, **kwargs):
                    calls[i] += 1
                    return original(*args, **kwargs)

                return call

            counted = [(layer, counting(i)) for i, layer in enumerate(model.layers)]
            with calls_replaced(counted):
                shared = paired_sequence_logps(model, start, batch)
            for x, y in zip(shared, whole):
                np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)
            self.assertGreater(shared[2].min().item(), 1e-4)
            self.assertEqual(calls[-1], 2 * calls[0])

    def test_layers_above_the_first_trained_one_run_again(self):
        pairs, key = random_pairs(3), mx.random.key(0)
        for trained in range(3):
            model = tiny_model(None)
            model.layers[trained].self_attn.unfreeze()
            start = FrozenStart(model)
            moved = [
                (k, x + 0.1 * mx.random.normal(x.shape, key=key))
                for k, x in tree_flatten(model.trainable_parameters())
            ]
            model.update(tree_unflatten(moved))
            plain = collate_pairs(pairs)
            whole = paired_sequence_logps(model, lambda x, s=start: s(x), plain)
            for shape in (None, BatchShape(40, 12, True)):
                batch = collate_pairs(pairs, shape=shape)
                with self.subTest(trained=trained, shape=shape):
                    shared = paired_sequence_logps(model, start, batch)
                    for x, y in zip(shared, whole):
                        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)
                    self.assertGreater(shared[2].min().item(), 1e-4)

    def test_reference_with_a_wider_head(self):
        # Checkpoints of one family may pad the same vocabulary differently.
        model = tiny_model()
        pairs = random_pairs(2, vocab=60)
        batch = collate_pairs(pairs)
        logits = model(batch["inputs"])

        def padded(tokens):
            return mx.concatenate([model(tokens), logits[..., :8] - 1e9], axis=-1)

        policy, reference, kl = paired_sequence_logps(model, padded, batch)
        np.testing.assert_allclose(policy, reference, rtol=1e-6)
        np.testing.assert_allclose(kl, 0, atol=1e-5)
        # Each model's log-probs are those of its own, whole vocabulary.
        expected = sequence_logps(model, batch)
        for cut in (lambda tokens: model(tokens)[..., :60], padded):
            policy, *_ = paired_sequence_logps(model, cut, batch)
            np.testing.assert_allclose(policy, expected, rtol=1e-6)

    def test_summing_by_row_leaves_filling_out(self):
        batch = {"rows": mx.array([0, 1, 1, 4, 4]), "lengths": mx.zeros((4, 2))}
        values = mx.array([1.0, 2.0, 4.0, 8.0, mx.nan])
        self.assertEqual(sum_by_row(values, batch).tolist(), [1.0, 6.0, 0.0, 0.0])


class TestTrainer(unittest.TestCase):
    def test_step_0_is_log_2_with_the_gradient_of_finite_differences(self):
        pairs = random_pairs(3)
        model = tiny_model("lora")
        reference, batch = FrozenStart(model), collate_pairs(pairs)
        # SGD with rate 1 moves by exactly the gradient.
        before = weights_of(model)
        loss, _ = dpo_step(model, reference, batch, optim.SGD(1.0))
        self.assertAlmostEqual(loss.item(), np.log(2), places=6)
        gradient = {k: before[k] - v for k, v in weights_of(model).items()}
        name = max(gradient, key=lambda k: np.abs(gradient[k]).max())
        index = np.unravel_index(np.abs(gradient[name]).argmax(), gradient[name].shape)

        def loss_at(shift):
            moved = {k: mx.array(v) for k, v in before.items()}
            moved[name][index] += shift
            model.load_weights(list(moved.items()), strict=False)
            return evaluate_dpo(model, reference, Pairs(pairs))["loss"]

        numeric = (loss_at(1e-2) - loss_at(-1e-2)) / 2e-2
        self.assertAlmostEqual(
            gradient[name][index] / numeric, 1, delta=0.02, msg=f"{name} {index}"
        )

    def test_accumulation_equals_the_big_batch(self):
        # Ragged on purpose: 3 + 2 pairs must weigh like 5.
        pairs = random_pairs(5)
        big = tiny_model("lora")
        dpo_step(
            big, FrozenStart(big), collate_pairs(pairs), optim.SGD(0.5), max_grad_norm=1
        )
        small = tiny_model("lora")
        reference, accumulator = FrozenStart(small), gradient_accumulator(small)
        optimizer = optim.SGD(0.5)
        for part, do_update in ((pairs[:3], False), (pairs[3:], True)):
            start = weights_of(small)
            dpo_step(
                small,
                reference,
                collate_pairs(part),
                optimizer,
                max_grad_norm=1,
                accumulator=accumulator,
                do_update=do_update,
            )
            changed = any((weights_of(small)[k] != v).any() for k, v in start.items())
            self.assertEqual(changed, do_update)
        self.assertEqual(accumulator["pairs"].item(), 0)
        for k, v in weights_of(big).items():
            np.testing.assert_allclose(weights_of(small)[k], v, atol=1e-6)

    def test_the_norm_is_that_before_clipping(self):
        batch, limit, found = collate_pairs(random_pairs(3)), 0.01, []
        for most in (None, limit):
            model = tiny_model("lora")
            before = weights_of(model)
            _, metrics = dpo_step(
                *(model, FrozenStart(model), batch, optim.SGD(1.0)), max_grad_norm=most
            )
            moved = [before[k] - v for k, v in weights_of(model).items()]
            length = np.sqrt(sum((x.astype(np.float64) ** 2).sum() for x in moved))
            found.append((metrics["grad_norm"].item(), length))
        (norm, moved), (clipped_norm, clipped) = found
        self.assertGreater(norm, 10 * limit)
        self.assertAlmostEqual(moved / norm, 1, places=3)
        self.assertAlmostEqual(clipped / limit, 1, places=3)
        self.assertAlmostEqual(clipped_norm / norm, 1, places=5)

    def test_gradients_of_16_bit_layers_are_summed_in_float32(self):
        pairs, runs = random_pairs(6), []
        for split in (6, 3):
            model = tiny_model("full")
            model.set_dtype(mx.bfloat16)
            reference = FrozenStart(model)
            optimizer = with_master_weights(optim.SGD(0.5), model)
            accumulator = gradient_accumulator(model)
            for i in range(0, 6, split):
                batch = collate_pairs(pairs[i : i + split])
                last = i + split == 6
                _, metrics = dpo_step(
                    model,
                    reference,
                    batch,
                    optimizer,
                    accumulator=accumulator,
                    do_update=last,
                )
            self.assertEqual(metrics["grad_norm"].dtype, mx.float32)
            runs.append(metrics["grad_norm"].item())
        # What remains is the 16-bit backward pass itself.
        self.assertAlmostEqual(runs[0] / runs[1], 1, delta=5e-3)

    def test_a_plain_optimizer_keeps_16_bits(self):
        model = tiny_model("full")
        model.set_dtype(mx.bfloat16)
        batch = collate_pairs(random_pairs(2))
        dpo_step(model, FrozenStart(model), batch, optim.SGD(0.1))
        dtypes = {v.dtype for _, v in tree_flatten(model.parameters())}
        self.assertEqual(dtypes, {mx.bfloat16})

    def test_each_shape_is_compiled_once(self):
        calls, original = [], training_step.dpo_step

        def counted(*args, **kwargs):
            # With a reference and, from the second epoch on, with its numbers.
            calls.append((args[1] is None, args[2]["inputs"].shape))
            return original(*args, **kwargs)

        with mock.patch.object(training_step, "dpo_step", counted):
            model = tiny_model("lora", dropout=0.2)
            train(model, random_pairs(8), iters=12, compile=True)
        self.assertEqual(len(calls), len(set(calls)))
        self.assertEqual({known for known, _ in calls}, {False, True})

    def test_accumulation_in_the_loop_updates_at_the_end_too(self):
        optimizer = optim.Adam(1e-3)
        train(
            tiny_model("lora"),
            random_pairs(6),
            iters=5,
            grad_accumulation_steps=2,
            optimizer=optimizer,
        )
        self.assertEqual(optimizer.step.item(), 3)

    def test_filling_pairs_weigh_nothing(self):
        pairs = random_pairs(3)
        results = []
        for batch_size in (None, 8):
            model = tiny_model("lora")
            batch = collate_pairs(pairs, batch_size)
            loss, values = dpo_step(
                model, FrozenStart(model), batch, optim.SGD(0.5), reduce=False
            )
            norm = values.pop("grad_norm")
            for name in ("policy_logps", "reference_logps"):
                self.assertFalse(values[name].reshape(2, -1)[:, 3:].any().item())
            metrics = {**sum_values(values, batch), "grad_norm": norm}
            results.append((weights_of(model), loss.item(), metrics))
        for k, v in results[0][0].items():
            np.testing.assert_allclose(results[1][0][k], v, atol=1e-6)
        for k, v in results[0][2].items():
            np.testing.assert_allclose(results[1][2][k], v, rtol=2e-5, atol=1e-6)

    def test_training_is_repeatable_and_depends_on_the_seed(self):
        runs = []
        for seed in (0, 0, 1):
            model = tiny_model("lora", dropout=0.1)
            train(model, random_pairs(8), seed=seed, iters=6)
            runs.append(weights_of(model))
        for k, v in runs[0].items():
            np.testing.assert_array_equal(runs[1][k], v)
        self.assertTrue(any((runs[2][k] != v).any() for k, v in runs[0].items()))

    def test_16_bit_layers_keep_float32_masters(self):
        # A step of 1e-6 is far below bfloat16's resolution at 0.02.
        model = tiny_model("full")
        model.set_dtype(mx.bfloat16)
        before = weights_of_dtype(model)
        optimizer = optim.Adam(1e-5)
        train(model, random_pairs(4), optimizer=optimizer, iters=60)
        after = weights_of_dtype(model)
        dtypes = {v.dtype for _, v in tree_flatten(model.trainable_parameters())}
        self.assertEqual(dtypes, {mx.bfloat16})
        moved = sum((after[k] != before[k]).sum() for k in before)
        self.assertGreater(moved, 0.01 * sum(v.size for v in before.values()))

    def test_lines_that_a_checkpoint_counts_on_are_on_the_disk(self):
        with tempfile.TemporaryDirectory() as folder:
            file = MetricsFile(f"{folder}/metrics.jsonl")
            with mock.patch("os.fsync") as synced:
                file.on_train_loss_report({"iteration": 1, "loss": math.nan})
            # JSON has no NaN.
            self.assertEqual(file.path.read_text(), '{"iteration": 1, "loss": null}\n')
        synced.assert_called_once()

    def test_reports_have_all_metrics_and_validation_sees_the_start(self):
        recorder = Recorder()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "metrics.jsonl"
            callback = CallbackList([None, MetricsFile(path), recorder])
            train(
                tiny_model("lora"),
                random_pairs(7),
                Pairs(random_pairs(3, seed=5)),
                callback=callback,
                iters=8,
                steps_per_report=3,
                steps_per_eval=4,
            )
            lines = [json.loads(line) for line in path.read_text().splitlines()]
        self.assertEqual([r["iteration"] for r in recorder.train], [3, 6, 8])
        self.assertEqual([r["iteration"] for r in recorder.val], [0, 4, 8])
        self.assertEqual(len(lines), 6)
        start = recorder.val[0]
        self.assertAlmostEqual(start["val_loss"], np.log(2), places=5)
        self.assertEqual(start["val_rewards/accuracies"], 0.0)
        self.assertEqual(start["val_rewards/margins"], 0.0)
        for key in ("loss", "kl_estimate", "perplexity/policy", "rewards/chosen"):
            self.assertIn(key, recorder.train[0])
            self.assertIn(f"val_{key}", start)
        for key in ("grad_norm", "learning_rate", "pairs_per_second", "padding"):
            self.assertIn(key, recorder.train[0])
        last = recorder.train[-1]
        # Two epochs of 4 batches, one of which holds a single pair.
        self.assertEqual(last["trained_pairs"], 14)
        self.assertTrue(0 <= last["padding"] < 1)

    def test_before_the_first_step_one_forward_tells_both(self):
        recorders, counts = [], []

        def run(known):
            recorders.append(Recorder())
            find = mock.Mock(side_effect=known or loop.is_start)
            with (
                mock.patch.object(loop, "is_start", find),
                mock.patch.object(step, "answer_logps", wraps=step.answer_logps) as ask,
            ):
                train(
                    tiny_model("lora", dropout=0.5),
                    random_pairs(8),
                    Pairs(random_pairs(5, seed=5)),
                    callback=recorders[-1],
                    iters=2,
                    steps_per_eval=2,
                )
            counts.append(ask.call_count)

        run(None)
        run(lambda *_: False)
        self.assertEqual(counts, [3, 6])
        first, second = ([*r.train, *r.val] for r in recorders)
        for ours, theirs in zip(first, second, strict=True):
            for name in theirs:
                if "second" not in name and "time" not in name and "memory" not in name:
                    np.testing.assert_equal(ours[name], theirs[name], name)

    def test_evaluation_counts_every_pair_once(self):
        model, other = tiny_model(), tiny_model(seed=4)
        pairs = Pairs(random_pairs(7))
        whole = evaluate_dpo(model, other, pairs, batch_size=7)
        parts = evaluate_dpo(model, other, pairs, batch_size=3)
        single = [evaluate_dpo(model, other, Pairs([p]))["loss"] for p in pairs]
        self.assertAlmostEqual(np.mean(single), whole["loss"], places=5)
        self.assertEqual(whole["pairs"], 7)
        for k, v in whole.items():
            self.assertAlmostEqual(parts[k], v, delta=2e-4 * max(1, abs(v)), msg=k)
        sample = evaluate_dpo(model, other, pairs, batch_size=2, num_batches=2)
        again = evaluate_dpo(model, other, pairs, batch_size=2, num_batches=2)
        self.assertEqual(sample, again)
        with self.assertRaisesRegex(ValueError, "no pairs"):
            evaluate_dpo(model, other, Pairs())

    def test_evaluation_is_compiled_where_that_pays(self):
        models, pairs = (tiny_model(), tiny_model(seed=4)), random_pairs(4)
        losses = []
        for setting in (None, False, True):
            with mock.patch.object(mx, "compile", wraps=mx.compile) as compiler:
                losses.append(evaluate_dpo(*models, pairs, compile=setting)["loss"])
            by_default = mx.default_device() == mx.gpu
            expected = by_default if setting is None else setting
            self.assertEqual(compiler.called, expected)
        np.testing.assert_allclose(losses, losses[0], rtol=1e-5)

    def test_checkpoints_are_written_whole(self):
        model = tiny_model("lora")
        with tempfile.TemporaryDirectory() as folder:
            file = f"{folder}/adapters.safetensors"
            train(model, random_pairs(4), iters=4, steps_per_save=2, adapter_file=file)
            names = sorted(p.name for p in Path(folder).iterdir())
            self.assertEqual(
                names,
                [
                    "0000002_adapters.safetensors",
                    "0000002_state.safetensors",
                    "0000004_adapters.safetensors",
                    "0000004_state.safetensors",
                    "adapters.safetensors",
                ],
            )
            for k, v in mx.load(file).items():
                np.testing.assert_array_equal(np.array(v), weights_of(model)[k])
            with self.assertRaises(InputError):
                save_adapter(model, f"{folder}/missing/adapters.safetensors")

    def test_full_training_of_quantized_layers_is_refused(self):
        model = tiny_model(None)
        nn.quantize(model, group_size=32, bits=4)
        with self.assertRaisesRegex(InputError, "can't train quantized layers"):
            prepare_policy(model, "full", 1)

    def test_16_bit_models_on_the_cpu_are_noticed(self):
        model = tiny_model()
        with mx.stream(mx.cpu):
            self.assertIsNone(slow_dtype_notice(model))
            model.set_dtype(mx.bfloat16)
            self.assertIn("--dtype float32", slow_dtype_notice(model))

    def test_the_best_adapter_is_not_the_last(self):
        # What training makes better is worse for the pairs the other way round.
        pairs = Pairs([pair([1, 2], [3, 4], [5, 6]), pair([7], [8, 9], [10])])
        turned = Pairs([pair(p, rejected, chosen) for p, chosen, rejected, _ in pairs])
        for val, best in ((turned, 1), (pairs, 4)):
            with tempfile.TemporaryDirectory() as folder:
                train(
                    *(tiny_model("lora"), pairs, val, optim.Adam(1e-3)),
                    adapter_file=f"{folder}/adapters.safetensors",
                    **{"iters": 4, "steps_per_eval": 1, "steps_per_save": 1},
                    save_best="loss",
                )
                kept = mx.load(f"{folder}/best/adapters.safetensors")
                for step in range(1, 5):
                    other = mx.load(f"{folder}/{step:07d}_adapters.safetensors")
                    same = all(mx.array_equal(kept[k], v) for k, v in other.items())
                    self.assertEqual(same, step == best)

    def test_too_few_pairs_is_an_error_not_a_hang(self):
        with self.assertRaisesRegex(ValueError, "fewer than batch_size=4"):
            train(tiny_model("lora"), random_pairs(2), batch_size=4)

    def test_what_can_not_be_trained_is_refused(self):
        model, pairs, ranked = (
            tiny_model("lora"),
            random_pairs(4),
            Pairs(random_pairs(4)),
        )
        ranked.values = {"places": np.array([[0.0, 1.0]] * 4)}
        for pattern, given, more in (
            ("Nothing to train", (tiny_model(None), pairs), {}),
            ("the policy itself", (model, pairs), {"reference_model": model}),
            (
                "kto learns from labels, not from pairs",
                (model, pairs),
                {"loss_type": "kto"},
            ),
            ("sigmoid learns from pairs, not from rankings", (model, ranked), {}),
        ):
            with self.subTest(pattern), self.assertRaisesRegex(InputError, pattern):
                train(*given, **more)

    def test_bad_settings_are_refused(self):
        counts = "batch_size iters val_batches steps_per_report steps_per_eval"
        counts += " steps_per_save grad_accumulation_steps max_skipped_steps sync_steps"
        wrong = dict.fromkeys(counts.split(), 0) | {"beta": 0.0, "save_best": "best"}
        wrong["sharing"] = "all"
        for name, value in {**wrong, "iters": 2.0, "seed": -1}.items():
            with self.subTest(name), self.assertRaisesRegex(InputError, rf"\b{name} "):
                train(tiny_model("lora"), random_pairs(4), **{name: value})
        counted = DPOTrainingArgs(iters=np.int64(3), max_grad_norm=np.float32(1))
        self.assertEqual((counted.iters, counted.max_grad_norm), (3, 1.0))

    def test_an_optimizer_may_have_no_rate_of_its_own(self):
        metrics = train(
            tiny_model("lora"), random_pairs(4), optimizer=optim.Adafactor(), iters=2
        )
        self.assertTrue(math.isfinite(metrics["loss"]))
        self.assertNotIn("learning_rate", metrics)


def weights_of_dtype(model):
    parameters = tree_flatten(model.trainable_parameters())
    return {k: np.array(v.astype(mx.float32)) for k, v in parameters}


if __name__ == "__main__":
    unittest.main()
