# Copyright © 2026 MLX Contributors

"""Rows of several sequences against a row for each, for every family that can."""

import contextlib
import gc
import io
import sys
import tempfile
import unittest
from pathlib import Path
from unittest import mock

import mlx.core as mx
import mlx.optimizers as optim
import model_zoo as zoo
import numpy as np
from test_shared_prompt import NOISE, PAIRS, distance, gradients, whole_logps
from tiny import (
    Pairs,
    pair,
    random_pairs,
    save_rows,
    save_tiny_model,
    tiny_model,
    train,
    weights_of,
)

from mlx_lm import dpo
from mlx_lm.models.cache import ArraysCache, KVCache, RotatingKVCache
from mlx_lm.preference.batch.buckets import plan_batches
from mlx_lm.preference.batch.collate import collate_pairs, count_tokens, epoch_batches
from mlx_lm.preference.batch.packing import batch_shapes, best_width, pack_rows
from mlx_lm.preference.batch.shape import (
    BatchShape,
    input_lengths,
    needed_tokens,
    padded_tokens,
    pair_lengths,
)
from mlx_lm.preference.forward.answers import sequence_logps
from mlx_lm.preference.forward.packed import PackedKeysValues, packed_states
from mlx_lm.preference.forward.probe import Sharing, check_packing
from mlx_lm.preference.forward.recompute import NOT_RECOMPUTABLE
from mlx_lm.preference.run import layouts
from mlx_lm.preference.run.forecast import predict_run
from mlx_lm.preference.run.plan import training_plan
from mlx_lm.tuner.trainer import DPOTrainingArgs, training_step

# Recurrent states, absolute positions, positions that scale, masks of another shape.
REFUSED = set(
    """
    afm7 baichuan_m1 bailing_hybrid bailing_moe_linear bailing_moe_v3 falcon_h1 gear
    gemma2 gpt2 gpt_bigcode granitemoehybrid hunyuan hunyuan_v1_dense iquestloopcoder
    jamba kimi_k3 kimi_linear lfm2 lfm2-vl lfm2_moe llama4 longcat_flash_ngram mamba
    mamba2 minimax_m3_vl ministral3 mistral3 mistral4 nemotron_h olmo_hybrid phi3small
    plamo2 prism_hadamard_qwen35 qwen3_5 qwen3_5_moe qwen3_next rwkv7
    """.split()
)
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
import packing_benchmark  # noqa: E402

PLAIN, PACKED = BatchShape(0, 24), BatchShape(0, 40, packed=2)


def lognormal_pairs(count, mean, seed=0):
    rng = np.random.default_rng(seed)
    lengths = np.ceil(rng.lognormal(np.log(mean / 2), 0.6, (count, 3))).astype(int)
    return Pairs(pair(*([1] * n for n in row)) for row in lengths.tolist())


class TestRows(unittest.TestCase):
    def test_no_row_overflows_or_overlaps(self):
        rng = np.random.default_rng(0)
        for step in (1, 2, 3):
            for _ in range(30):
                lengths = rng.integers(0, 20, rng.integers(1, 17)).tolist()
                places, (rows, width) = pack_rows(lengths, 24, step)
                self.assertLessEqual(width, 24)
                self.assertEqual(rows % step, 0)
                used = np.zeros((rows, width), int)
                for (row, start), length in zip(places, lengths):
                    self.assertLessEqual(start + length, width)
                    used[row, start : start + length] += 1
                self.assertLessEqual(used.max(), 1)
                self.assertEqual(used.sum(), sum(lengths))

    def test_free_shapes_hold_little_padding(self):
        lengths = np.random.default_rng(0).integers(20, 60, 16).tolist()
        _, (rows, width) = pack_rows(lengths, 500, 1)
        self.assertLess(rows * width, 1.1 * sum(lengths))
        # One sequence can't be split, so a narrow limit wins nothing.
        self.assertEqual(pack_rows([9, 9, 9], 10, 1)[1], (3, 9))

    def test_width_weighs_padding_against_attention(self):
        # Wider rows win nothing, or much, or less than attention costs.
        for lengths, width in (((60, 60), 60), ((60, 40), 104), ((9000, 6000), 9000)):
            inputs = np.array([lengths] * 8)
            self.assertEqual(best_width(inputs, 4, 2, 1, 10**6), width)
        self.assertEqual(best_width(np.array([(60, 60)] * 8), 4, 2, 8, 70), 64)
        self.assertEqual(list(batch_shapes(inputs, 4, 9000, 2)), [(8, 9000)] * 2)


class TestMask(unittest.TestCase):
    def test_against_a_loop(self):
        segments = [[3, 3, 3, 1, 1, 0], [2, 2, 2, 2, 2, 2]]
        for window in (None, 1, 2, 4):
            cache = PackedKeysValues(mx.array(segments), window)
            mask = np.array(cache.make_mask(6))
            self.assertEqual(mask.shape, (2, 1, 6, 6))
            for r, row in enumerate(segments):
                for i in range(6):
                    for j in range(6):
                        sees = row[i] == row[j] and 0 <= i - j < (window or 6)
                        self.assertEqual(bool(mask[r, 0, i, j]), sees)


class TestBatches(unittest.TestCase):
    def test_every_sequence_is_whole(self):
        pairs = [([], [4, 5], [6]), ([7, 8, 9], [1], [2, 3])]
        pairs = [pair(*p) for p in pairs]
        batch = collate_pairs(pairs, 3, PACKED)
        self.assertEqual(batch["inputs"].shape, batch["segments"].shape)
        inputs, segments = np.array(batch["inputs"]), np.array(batch["segments"])
        at, scored = np.array(batch["positions"]), np.array(batch["rows"])
        targets = np.array(batch["targets"])
        for i, (index, answer) in enumerate([(0, 1), (1, 1), (0, 2), (1, 2)]):
            number = i + i // 2  # The third pair is filling.
            whole = pairs[index][0] + pairs[index][answer]
            places = np.flatnonzero(segments == number + 1)
            self.assertEqual(inputs.reshape(-1)[places].tolist(), whole[:-1])
            mine = scored == number
            start = max(len(pairs[index][0]), 1)
            self.assertEqual(targets[mine].tolist(), whole[start:])
            self.assertEqual(at[mine].tolist(), places[start - 1 :].tolist())
        self.assertFalse(((segments == 3) | (segments == 6)).any())
        self.assertEqual(batch["weights"].tolist(), [1, 1, 0])
        self.assertEqual(count_tokens(batch)[1], inputs.size)

    def test_filling_takes_no_room(self):
        pairs = [pair([7] * 9, [1] * 9, [2] * 9), pair([8] * 4, [1] * 5, [2] * 5)]
        for size in (2, 3, 6):
            batch = collate_pairs(pairs, size, PACKED)
            # Four sequences of 17, 17, 8 and 8 tokens fit into two rows of 40.
            self.assertEqual(batch["inputs"].shape, (2, 40))
            self.assertEqual((np.array(batch["segments"]) > 0).sum(), 50)
            self.assertEqual(np.array(batch["inputs"]).tolist(), self.rows(pairs))

    def rows(self, pairs):
        return np.array(collate_pairs(pairs, 2, PACKED)["inputs"]).tolist()

    def test_plan_holds_every_pair_in_few_shapes(self):
        pairs = lognormal_pairs(300, 60)
        for size, most, pad in ((1, 8, 1), (4, 8, 8), (4, 32, 1), (16, 32, 8)):
            plan = plan_batches(pairs, size, "packed", max_shapes=most, pad=pad)
            shapes = set()
            for epoch in range(2):
                batches = epoch_batches(plan, size, 0, epoch)
                self.assertEqual(
                    sorted(sum((b for _, b in batches), [])), [*range(300)]
                )
                for shape, indices in batches:
                    batch = collate_pairs([pairs[i] for i in indices], size, shape)
                    shapes.add((batch["inputs"].shape, batch["targets"].shape))
            self.assertLessEqual(len(shapes), most, (size, most))

    def test_less_padding_than_a_row_for_each(self):
        pairs = lognormal_pairs(200, 60)
        lengths = pair_lengths(pairs)
        packed = plan_batches(pairs, 4, "packed", max_shapes=1000, max_length=2048)
        plain = plan_batches(pairs, 4, "plain", max_shapes=1000)
        needed = needed_tokens(packed, lengths)
        self.assertEqual(needed, input_lengths(lengths)[:, 1:].sum())
        computed = padded_tokens(packed, 4, lengths)
        self.assertLess(computed, 1.1 * needed)
        self.assertLess(computed, 0.9 * padded_tokens(plain, 4))
        # What is announced is what is computed.
        batches = [
            collate_pairs([pairs[i] for i in indices], 4, shape)
            for shape, indices in epoch_batches(packed, 4)
        ]
        self.assertEqual(sum(count_tokens(b)[1] for b in batches), computed)


class TestModels(unittest.TestCase):
    def test_every_family_is_right_or_refused(self):
        refused = set()
        batch, plain = (collate_pairs(PAIRS, shape=s) for s in (PACKED, PLAIN))
        self.assertLess(batch["inputs"].shape[0], plain["inputs"].shape[0])
        for name in zoo.CONFIGS:
            with self.subTest(model_type=name):
                model = zoo.build(name)
                try:
                    self.assertEqual(check_packing(model, 100), Sharing("packed", ""))
                except ValueError as e:
                    self.assertIn("can't pack several sequences", str(e))
                    refused.add(name)
                    continue
                expected, gradient = gradients(model, plain, whole_logps)
                for checkpoint in (False, True)[: 1 + (name not in NOT_RECOMPUTABLE)]:
                    logps, ours = gradients(model, batch, scored, checkpoint)
                    np.testing.assert_allclose(logps, expected, rtol=5e-5, atol=2e-5)
                    bound = 2 * NOISE.get(name, 1e-5)
                    self.assertLess(distance(ours, gradient), bound, checkpoint)
        self.assertEqual(refused, REFUSED)

    def test_compiled_and_checkpointed(self):
        model = tiny_model("lora", dropout=0.3)
        batch, plain = (collate_pairs(PAIRS, shape=s) for s in (PACKED, PLAIN))
        model.eval()
        packed = sequence_logps(model, batch)
        np.testing.assert_allclose(packed, sequence_logps(model, plain), rtol=1e-5)
        model = tiny_model("lora")
        expected = gradients(model, plain, scored)[1]
        for checkpoint in (False, True):
            ours = gradients(model, batch, scored, checkpoint, compiled=True)[1]
            self.assertLess(distance(ours, expected), 1e-5)

    def test_positions_that_tell_are_found_far_out(self):
        model = tiny_model()
        layer = model.layers[0].self_attn
        rope = layer.rope
        self.assertEqual(check_packing(model, 4000).grade, "packed")

        # Another function beyond position 1000.
        def late(x, offset=0):
            return rope(x, offset=offset) * (2 if offset > 1000 else 1)

        layer.rope = late
        self.assertEqual(check_packing(model, 900).grade, "packed")
        with self.assertRaisesRegex(ValueError, "set pack: false"):
            check_packing(model, 4000)

    def test_other_caches_are_refused(self):
        class Model:
            layers = [0]

            def __init__(self, cache):
                self.make_cache = lambda: [cache]

            def __call__(self, tokens, cache=None):
                return cache[0].make_mask(tokens.shape[1])

        ones = mx.ones((1, 2), dtype=mx.int32)
        batch = {"inputs": ones, "segments": ones}
        for cache in (KVCache(), RotatingKVCache(max_size=1)):
            mask = packed_states(Model(cache), batch)
            window = getattr(cache, "max_size", 2)
            self.assertEqual(mask[0, 0, 1, 0].item(), window > 1)
        with self.assertRaisesRegex(TypeError, "can't be packed for a ArraysCache"):
            packed_states(Model(ArraysCache(1)), batch)


class TestTraining(unittest.TestCase):
    def test_a_run_gives_the_same_adapters(self):
        pairs = random_pairs(12)
        weights = []
        for sharing in ("plain", "packed"):
            model = tiny_model("lora")
            # All in one batch, so that both see the same pairs.
            settings = {"batch_size": 12, "iters": 8, "sharing": sharing}
            train(model, pairs, pairs, optim.SGD(0.5), **settings)
            weights.append(weights_of(model))
        plain, packed = weights
        start = weights_of(tiny_model("lora"))
        for name, value in plain.items():
            self.assertGreater(np.abs(value - start[name]).max(), 1e-4)
            np.testing.assert_allclose(packed[name], value, rtol=1e-4, atol=1e-5)


class TestRun(unittest.TestCase):
    def command(self, folder, model, *more):
        args = f"--model {model} --data {folder}/data --adapter-path {folder}/adapters"
        args += " --train --batch-size 2 --iters 2 --num-layers 1 --no-reference-cache"
        screen = io.StringIO()
        with contextlib.redirect_stdout(screen), contextlib.redirect_stderr(screen):
            dpo.run(dpo.resolve_args([*args.split(), *more]))
        return screen.getvalue()

    def test_flag(self):
        with tempfile.TemporaryDirectory() as folder:
            save_rows(f"{folder}/data")
            model = save_tiny_model(f"{folder}/model")
            text = self.command(folder, model, "--pack", "--test")
            self.assertIn("not shared, rows packed", text)
            self.assertNotIn("packed", self.command(folder, model))
            with mock.patch.object(
                layouts, "check_packing", side_effect=ValueError("no")
            ):
                with self.assertRaisesRegex(ValueError, "no"):
                    self.command(folder, model, "--pack")

    def test_memory_is_that_of_packed_rows(self):
        gc.collect()
        before = mx.get_active_memory()
        pairs = random_pairs(8, vocab=512, longest=60)
        args = DPOTrainingArgs(batch_size=2, sharing="packed")
        wide = {"hidden_size": 128, "intermediate_size": 512, "vocab_size": 512}
        model = tiny_model("lora", **wide)
        optimizer = optim.Adam(1e-3)
        predicted = predict_run(model, None, optimizer, pairs, args).total
        shape, indices = max(
            epoch_batches(training_plan(pairs, args), 2),
            key=lambda b: sum(sum(pairs[i][3][1:]) for i in b[1]),
        )
        batch = collate_pairs([pairs[i] for i in indices], 2, shape)
        batch["reference_logps"] = mx.zeros((4,))
        step, state = training_step(model, optimizer, args)
        mx.eval(state, batch)
        for _ in range(2):
            mx.reset_peak_memory()
            mx.eval(step(None, batch, True), state)
        peak = mx.get_peak_memory() - before
        self.assertLess(abs(predicted / peak - 1), 0.15)


class TestBenchmark(unittest.TestCase):
    def test_table(self):
        screen = io.StringIO()
        options = (
            "--pairs 16 --mean 12 --batch-size 2 --batches 1 --rounds 2 --cpu-time"
        )
        with tempfile.TemporaryDirectory() as folder:
            model = save_tiny_model(folder)
            with contextlib.redirect_stdout(screen):
                packing_benchmark.run(["--model", str(model), *options.split()])
        lines = screen.getvalue().splitlines()
        rows = [line.split(" | ") for line in lines if line.startswith("| ")][1:]
        names = ["| padded rows", "| packed rows", "| shared prompts"]
        self.assertEqual([row[0] for row in rows], names)
        computed = [float(row[5]) for row in rows]
        self.assertLess(computed[1], computed[0])
        self.assertGreaterEqual(computed[1], 1)


def scored(model, batch):
    return sequence_logps(model, batch, gradient=True)


if __name__ == "__main__":
    unittest.main()
