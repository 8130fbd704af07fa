# Copyright © 2026 MLX Contributors

import unittest
from unittest import mock

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import model_zoo as zoo
import numpy as np
from mlx.utils import tree_flatten, tree_map
from tiny import LORA, VOCAB, float64_logps, random_pairs, tiny_model, weights_of

from mlx_lm.preference.batch.collate import collate_pairs
from mlx_lm.preference.forward import answers as logps_module
from mlx_lm.preference.forward import head
from mlx_lm.preference.forward.answers import (
    completion_states,
    paired_sequence_logps,
    sequence_logps,
)
from mlx_lm.preference.forward.frozen import FrozenStart
from mlx_lm.preference.forward.head import (
    LARGEST_CHUNK,
    SMALLEST_CHUNK,
    chunk_sizes,
    completion_logps,
    default_chunk_bytes,
    paired_completion_logps,
    trained_outside_layers,
)
from mlx_lm.preference.forward.parts import calls_replaced
from mlx_lm.preference.policy.head import unfreeze_head
from mlx_lm.tuner.trainer import dpo_step
from mlx_lm.tuner.utils import linear_to_lora_layers

BATCH = collate_pairs(random_pairs(3))
COUNT = BATCH["targets"].size


def with_lora_head(quantize=False):
    model = tiny_model(None, tie_word_embeddings=False)
    if quantize:
        nn.quantize(model, group_size=32, bits=4)
    keys = ["lm_head", "self_attn.q_proj"]
    linear_to_lora_layers(model, 1, {**LORA, "keys": keys})
    model.lm_head.lora_b = 0.1 * mx.random.normal(model.lm_head.lora_b.shape)
    return model


def quantized(**config):
    model = tiny_model(None, **config)
    nn.quantize(model, group_size=32, bits=4)
    return model


HEADS = {
    "tied": lambda: tiny_model(),
    "untied": lambda: tiny_model(tie_word_embeddings=False),
    "quantized": lambda: quantized(tie_word_embeddings=False),
    "quantized, tied": lambda: quantized(),
    "LoRA": with_lora_head,
    "LoRA, quantized": lambda: with_lora_head(True),
    "soft-capped": lambda: zoo.build("gemma2"),
    "multiplied": lambda: zoo.build("cohere"),
    "divided": lambda: zoo.build("granite"),
    "divided states": lambda: zoo.build("minicpm"),
    "gpt2": lambda: zoo.build("gpt2"),
}


def bytes_for(chunk):
    """As many bytes as the logits of so many tokens have."""
    return 4 * VOCAB * chunk


def chunked(model, states, targets, chunk, gradient=True):
    """The log-prob of every target, so many of them at a time."""
    options = {"gradient": gradient, "chunk_bytes": bytes_for(chunk)}
    return completion_logps(model, states, targets, **options)


def whole_logps(model):
    """The log-prob of every target, from all logits of the model."""
    logits = model(BATCH["inputs"])
    scored = logits.reshape(-1, logits.shape[-1])[BATCH["positions"]]
    scored = scored - mx.logsumexp(scored, axis=-1, keepdims=True)
    return mx.take_along_axis(scored, BATCH["targets"][:, None], axis=1)[:, 0]


class TestNumbers(unittest.TestCase):
    def test_equals_the_whole_logits_in_float64(self):
        for name, build in HEADS.items():
            model = build()
            model.eval()
            logits = np.array(model(BATCH["inputs"])).reshape(-1, VOCAB)
            scored = logits[np.array(BATCH["positions"])][:, None]
            targets = np.array(BATCH["targets"])[:, None]
            expected = float64_logps(scored, targets, np.ones(targets.shape))
            states = completion_states(model, BATCH)
            for chunk in (1, 2, 7, COUNT - 1, COUNT):
                for gradient in (False, True):
                    with self.subTest(head=name, chunk=chunk, gradient=gradient):
                        ours = chunked(
                            model, states, BATCH["targets"], chunk, gradient=gradient
                        )
                        self.assertEqual(ours.dtype, mx.float32)
                        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)

    def test_gradients_equal_plain_differentiation(self):
        for name, build in HEADS.items():
            for trained in (False, True):
                if trained and "quantized" in name and "LoRA" not in name:
                    continue
                model = build()
                model.eval()
                if trained and "LoRA" not in name:
                    unfreeze_head(model)
                    self.assertTrue(trained_outside_layers(model))
                weights = mx.random.normal((COUNT,))
                parameters = model.trainable_parameters()

                def ours(chunk, model=model, weights=weights):
                    states = completion_states(model, BATCH)
                    logps = chunked(model, states, BATCH["targets"], chunk)
                    return (weights * logps).sum()

                if not tree_flatten(parameters):
                    continue
                plain = nn.value_and_grad(
                    model, lambda w, model=model: (w * whole_logps(model)).sum()
                )
                _, expected = plain(weights)
                model.update(parameters)
                expected = dict(tree_flatten(expected))
                for chunk in (1, 5, COUNT):
                    _, gradient = nn.value_and_grad(model, ours)(chunk)
                    model.update(parameters)
                    with self.subTest(head=name, trained=trained, chunk=chunk):
                        gradient = dict(tree_flatten(gradient))
                        self.assertEqual(gradient.keys(), expected.keys())
                        for k, v in expected.items():
                            size = max(1e-3, mx.abs(v).max().item())
                            np.testing.assert_allclose(
                                gradient[k], v, atol=2e-5 * size, err_msg=k
                            )

    def test_an_adapted_head_drops_the_same_in_both_passes(self):
        model = with_lora_head()
        model.lm_head.dropout = nn.Dropout(0.5)
        reference, batch = FrozenStart(model), collate_pairs(random_pairs(4))
        batch["reference_logps"] = sequence_logps(reference.policy, batch)
        start, model = model.trainable_parameters(), model.train()
        direction = tree_map(lambda x: mx.random.normal(x.shape), start)

        def loss_and_move(by):
            model.update(tree_map(lambda x, d: x + by * d, start, direction))
            before = weights_of(model)
            mx.random.seed(7)
            loss, _ = dpo_step(model, None, batch, optim.SGD(1.0), 0.5)
            gradient = {k: before[k] - x for k, x in weights_of(model).items()}
            return loss.item(), gradient

        directions = dict(tree_flatten(direction))
        for chunk_bytes in (2**30, 10 * 64 * 4):
            with mock.patch.object(
                head, "default_chunk_bytes", lambda n=chunk_bytes: n
            ):
                ahead, behind = (loss_and_move(by)[0] for by in (1e-2, -1e-2))
                gradient = loss_and_move(0.0)[1]
            slope = sum((gradient[k] * np.array(directions[k])).sum() for k in gradient)
            with self.subTest(chunk_bytes=chunk_bytes):
                self.assertAlmostEqual(
                    (ahead - behind) / 2e-2, slope, delta=2e-2 * abs(slope)
                )

    def test_states_get_the_softmax_formula(self):
        model = tiny_model(tie_word_embeddings=False)
        model.freeze()
        rng = np.random.default_rng(0)
        states = rng.normal(size=(9, 32)).astype(np.float32)
        targets, weights = rng.integers(0, VOCAB, 9), rng.normal(size=9)

        def loss(states):
            logps = chunked(model, states, mx.array(targets), 4)
            return (mx.array(weights, mx.float32) * logps).sum()

        head = np.array(model.lm_head.weight, dtype=np.float64)
        logits = states.astype(np.float64) @ head.T
        p = np.exp(logits - logits.max(axis=1, keepdims=True))
        p /= p.sum(axis=1, keepdims=True)
        expected = weights[:, None] * ((np.eye(VOCAB)[targets] - p) @ head)
        np.testing.assert_allclose(mx.grad(loss)(mx.array(states)), expected, atol=1e-5)

    def test_weights_of_a_16_bit_model_stay_float32(self):
        """A pair's weight scales its whole gradient: rounded, all of it is off."""
        model = tiny_model(tie_word_embeddings=False)
        model.freeze()
        model.set_dtype(mx.bfloat16)
        states = mx.random.normal((512, 32)).astype(mx.bfloat16)
        targets = mx.random.randint(0, VOCAB, (512,))

        def loss(states, weight):
            logps = chunked(model, states, targets, 100)
            return (weight * logps).sum()

        def float64(x):
            return np.array(x.astype(mx.float32), np.float64)

        x, head = float64(states), float64(model.lm_head.weight)
        p = np.exp(x @ head.T)
        p /= p.sum(axis=1, keepdims=True)
        expected = (np.eye(VOCAB)[np.array(targets)] - p) @ head
        shares = []
        for weight in (1.0, 1.301, 0.6035, -0.0451):  # between two of bfloat16
            gradient = mx.grad(loss)(states, mx.array(weight))
            self.assertEqual(gradient.dtype, mx.bfloat16)
            # Roundings of single numbers cancel out.
            share = (float64(gradient) * expected).sum() / (expected**2).sum()
            shares.append(share / weight)
        self.assertAlmostEqual(shares[0], 1, places=2)
        np.testing.assert_allclose(shares, shares[0], rtol=2e-4)

    def test_a_head_in_16_bits_trains_in_float32_sums(self):
        model = tiny_model("full", tie_word_embeddings=False)
        unfreeze_head(model)
        states, targets = mx.random.normal((64, 32)), mx.zeros((64,), mx.int32)
        gradients = []
        for dtype in (mx.float32, mx.bfloat16):
            model.set_dtype(dtype)
            parameters = model.trainable_parameters()

            def loss(states):
                return chunked(model, states, targets, 1).sum()

            _, gradient = nn.value_and_grad(model, loss)(states.astype(dtype))
            model.update(parameters)
            gradients.append(gradient["lm_head"]["weight"])
            self.assertEqual(gradients[-1].dtype, dtype)
        apart = mx.abs(gradients[0] - gradients[1].astype(mx.float32)).max()
        self.assertLess(apart / mx.abs(gradients[0]).max(), 0.02)

    def test_both_models_at_once(self):
        policy, reference = tiny_model(), zoo.build("gemma2")
        x, y = (completion_states(model, BATCH) for model in (policy, reference))
        heads = [
            lambda x, m=m: logps_module.head_logits(m, x) for m in (policy, reference)
        ]
        targets = BATCH["targets"]
        logits = [np.array(head(s), np.float64) for head, s in zip(heads, (x, y))]
        log_p, log_q = (
            z
            - np.log(np.exp(z - z.max(1, keepdims=True)).sum(1, keepdims=True))
            - z.max(1, keepdims=True)
            for z in logits
        )
        at = np.array(targets)[:, None]
        expected = [
            np.take_along_axis(log_p, at, 1)[:, 0],
            np.take_along_axis(log_q, at, 1)[:, 0],
            (np.exp(log_p) * (log_p - log_q)).sum(axis=1),
        ]
        for chunk in (1, 5, COUNT):
            ours = paired_completion_logps(
                *heads, x, y, targets, chunk_bytes=2 * bytes_for(chunk)
            )
            for a, b in zip(ours, expected):
                np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


class TestChunks(unittest.TestCase):
    def test_sizes(self):
        for tokens in (0, 1, 7, 100, 1001):
            for chunk in (1, 3, 64, 5000):
                sizes = chunk_sizes(tokens, 10, 4 * 10 * chunk)
                self.assertEqual(sum(sizes), tokens)
                self.assertLessEqual(max(sizes), chunk)
                self.assertLessEqual(max(sizes) - min(sizes), 1)
                self.assertEqual(len(sizes), max(1, -(-tokens // chunk)))
        # One token's logits may be more than a chunk.
        self.assertEqual(chunk_sizes(3, 1000, 4), [1, 1, 1])

    def test_default_follows_the_memory(self):
        sizes = []
        for memory in (2**30, 2**35, 2**40):
            info = {"memory_size": memory}
            with mock.patch.object(mx, "device_info", lambda info=info: info):
                sizes.append(default_chunk_bytes())
        self.assertEqual(sizes, [SMALLEST_CHUNK, 2**28, LARGEST_CHUNK])

    def test_the_head_reads_only_what_is_scored(self):
        model, seen = tiny_model(tie_word_embeddings=False), []
        states = completion_states(model, BATCH)
        watch = lambda call, x: seen.append(x.shape[-2]) or call(x)
        for gradient in (False, True):
            seen.clear()
            with calls_replaced([(model.lm_head, watch)]):
                logps = chunked(model, states, BATCH["targets"], 5, gradient=gradient)
                mx.eval(logps)
            # One more call, for the vocabulary's size, is never computed.
            self.assertEqual(seen[1:], chunk_sizes(COUNT, VOCAB, bytes_for(5)))

    def test_reference_weights_are_in_place_for_its_head_alone(self):
        model = tiny_model("full", tie_word_embeddings=False)
        unfreeze_head(model)
        reference, switches = FrozenStart(model), []
        running = logps_module.running

        def watch(reference_model):
            switches.append(reference_model)
            return running(reference_model)

        model.update(tree_map(lambda x: x + 0.1, model.trainable_parameters()))
        before = dict(tree_flatten(model.trainable_parameters()))
        one = lambda *sizes: chunk_sizes(sizes[0], sizes[1], bytes_for(8))
        expected = paired_sequence_logps(model, reference, BATCH)
        with mock.patch.object(logps_module, "running", watch):
            with mock.patch("mlx_lm.preference.forward.head.chunk_sizes", one):
                ours = paired_sequence_logps(model, reference, BATCH)
        # Once for the trunk, once for each chunk.
        self.assertEqual(switches, [reference] * (1 + len(one(COUNT, 2 * VOCAB))))
        for a, b in zip(ours, expected):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
        for k, v in tree_flatten(model.trainable_parameters()):
            self.assertIs(v, before[k])
        plain = FrozenStart(model), model
        np.testing.assert_array_equal(*paired_sequence_logps(*plain[::-1], BATCH)[:2])

    def peak(self, vocabulary, chunk_bytes, gradient=True):
        """Bytes above what was there before, for 256 tokens."""
        model = tiny_model(None, tie_word_embeddings=False, vocab_size=vocabulary)
        states = mx.random.normal((256, 32))
        targets = mx.zeros((256,), dtype=mx.int32)

        def loss(states):
            return completion_logps(
                model, states, targets, gradient=gradient, chunk_bytes=chunk_bytes
            ).sum()

        mx.eval(model.parameters(), states, targets)
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        mx.eval(mx.grad(loss)(states) if gradient else loss(states))
        return mx.get_peak_memory() - before

    def test_memory_does_not_grow_with_the_vocabulary(self):
        chunk = 2**20
        for gradient in (False, True):
            peaks = [self.peak(v, chunk, gradient) for v in (8192, 32768)]
            with self.subTest(gradient=gradient, peaks=peaks):
                self.assertLess(peaks[1], 1.2 * peaks[0] + 2**16)
                # The CPU's queue holds the arrays of some operations ahead.
                self.assertLess(max(peaks), 12 * chunk)
                whole = self.peak(32768, 2**40, gradient)
                self.assertGreater(whole, 256 * 32768 * 4)
                self.assertGreater(whole, 5 * peaks[1])


if __name__ == "__main__":
    unittest.main()
