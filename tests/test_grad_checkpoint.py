# Copyright © 2026 MLX Contributors

import unittest
from collections import Counter
from contextlib import nullcontext
from unittest import mock

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten
from resuming import masks_drawn
from tiny import LORA, random_pairs, tiny_model, train, weights_of

from mlx_lm.models import llama
from mlx_lm.preference.batch.collate import collate_pairs
from mlx_lm.preference.forward.dropout import KeyedDropout
from mlx_lm.preference.forward.frozen import FrozenStart
from mlx_lm.preference.forward.recompute import keyed_layers
from mlx_lm.preference.memory.predict import predict_peak
from mlx_lm.tuner.trainer import DPOTrainingArgs, dpo_step, training_step
from mlx_lm.tuner.utils import linear_to_lora_layers


def gradients(kind, checkpoint, compiled, dropout=0.3, keyed=True):
    """The weights' movement by SGD of rate 1, two steps so that LoRA's A moves."""
    model = tiny_model(kind, dropout=dropout)
    reference, batch = FrozenStart(model), collate_pairs(random_pairs(3))
    optimizer = optim.SGD(0.1)
    model.train()

    def step(batch):
        return dpo_step(model, reference, batch, optimizer)[0]

    if compiled:
        state = [model.state, optimizer.state, mx.random.state]
        inputs = [*state, reference.state]
        step = mx.compile(step, inputs=inputs, outputs=state)
    with keyed_layers(model, checkpoint) if keyed else nullcontext():
        if compiled:
            state[0] = model.state
        for it in range(2):
            mx.random.seed(it)
            loss = step(batch)
            mx.eval(loss, model.parameters())
    return loss.item(), weights_of(model)


def dora_peak(layers, known):
    """The peak of a compiled step with DoRA on 4-bit layers, as it was predicted too."""
    model = tiny_model(
        None, hidden_size=128, intermediate_size=512, num_hidden_layers=layers
    )
    nn.quantize(model, group_size=32, bits=4)
    linear_to_lora_layers(model, layers, LORA, use_dora=True)
    start, batch = FrozenStart(model), collate_pairs(random_pairs(1))
    if known:
        batch["reference_logps"] = mx.zeros((2,))
    settings = DPOTrainingArgs(grad_checkpoint=True)
    plain_step, state = training_step(model.train(), optim.SGD(0.1), settings)
    step = lambda batch: plain_step(None if known else start, batch, True)
    inputs = [*state, start.state]
    compiled = mx.compile(step, inputs, state)
    with keyed_layers(model, True):
        predicted = predict_peak(step, (batch,), inputs).total
        for _ in range(2):
            mx.reset_peak_memory()
            before = mx.get_active_memory()
            mx.eval(compiled(batch), state)
    arrays = {id(x): x for _, x in tree_flatten(inputs) if isinstance(x, mx.array)}
    held = sum(x.nbytes for x in arrays.values())
    peak = mx.get_peak_memory() - before + held
    if abs(predicted / peak - 1) > 0.15:
        raise AssertionError(f"predicted {predicted}, measured {peak}")
    return peak


def as_bytes(masks):
    return [np.array(mask).tobytes() for mask in masks]


class TestGradCheckpoint(unittest.TestCase):
    def test_dropout_is_the_same_in_the_recompute(self):
        # With masks drawn anew the gradient is off by more than its size.
        for kind in ("lora", "dora"):
            with masks_drawn() as masks:
                gradients(kind, False, False)
            given = iter(masks)

            def dropout(module, x, given=given):
                return next(given) * x / 0.7 if module.training else x

            # No dropout of ours runs here, nothing is drawn or computed again.
            with mock.patch.object(nn.Dropout, "__call__", dropout):
                plain_loss, plain = gradients(kind, False, False, keyed=False)
            self.assertIsNone(next(given, None))
            for checkpoint in (False, True):
                for compiled in (False, True):
                    with self.subTest(kind, checkpoint=checkpoint, compiled=compiled):
                        loss, ours = gradients(kind, checkpoint, compiled)
                        self.assertAlmostEqual(loss, plain_loss, places=5)
                        for k, v in plain.items():
                            np.testing.assert_allclose(ours[k], v, atol=2e-6)

    def test_every_step_and_every_module_has_a_mask_of_its_own(self):
        for checkpoint in (False, True):
            with masks_drawn() as masks:
                train(
                    tiny_model("lora", dropout=0.3),
                    random_pairs(2),
                    iters=3,
                    grad_checkpoint=checkpoint,
                )
            # Seven projections in two layers; a recompute repeats its mask.
            counts = Counter(as_bytes(masks))
            self.assertEqual(len(counts), 3 * 7 * 2)
            self.assertEqual(set(counts.values()), {2 if checkpoint else 1})
            kept = np.mean([np.array(mask).mean() for mask in masks])
            self.assertAlmostEqual(kept, 0.7, delta=0.01)

    def test_gradients_without_dropout(self):
        for kind in ("lora", "full"):
            _, plain = gradients(kind, False, False, dropout=0.0)
            _, ours = gradients(kind, True, False, dropout=0.0)
            for k, v in plain.items():
                np.testing.assert_allclose(ours[k], v, atol=2e-6)

    def test_keyed_dropout_keeps_the_mean_and_follows_its_key(self):
        dropout, x = KeyedDropout(0.25), mx.ones((20000,))
        dropout.set_key(mx.random.key(0))
        first, second = dropout(x), dropout(x)
        self.assertAlmostEqual(first.mean().item(), 1.0, delta=0.02)
        self.assertAlmostEqual((first == 0).mean().item(), 0.25, delta=0.02)
        self.assertFalse(mx.array_equal(first, second).item())
        dropout.set_key(mx.random.key(0))
        self.assertTrue(mx.array_equal(dropout(x), first).item())
        dropout.eval()
        self.assertTrue(mx.array_equal(dropout(x), x).item())

    def test_only_this_model_is_changed_and_only_for_a_while(self):
        call = llama.TransformerBlock.__call__
        model, other = tiny_model("lora"), tiny_model("lora", seed=2)
        with keyed_layers(model, True):
            self.assertIs(llama.TransformerBlock.__call__, call)
            self.assertIs(type(other.layers[0]), llama.TransformerBlock)
            self.assertIsNot(type(model.layers[0]), llama.TransformerBlock)
            self.assertIsInstance(model.layers[0], llama.TransformerBlock)
        self.assertIs(type(model.layers[0]), llama.TransformerBlock)

    def test_a_second_run_has_the_dropout_of_the_first(self):
        model = tiny_model("lora", dropout=0.3)
        plain = [m for _, m in model.named_modules() if type(m) is nn.Dropout]
        for _ in range(2):
            with keyed_layers(model, True):
                self.assertIsInstance(
                    model.layers[-1].self_attn.q_proj.dropout, KeyedDropout
                )
            again = [m for _, m in model.named_modules() if type(m) is nn.Dropout]
            self.assertEqual(len(again), len(plain))
        model.train()
        mx.eval(model(mx.array([[1, 2, 3]])))

    def test_the_model_has_no_tracers_left(self):
        model = tiny_model("lora")
        with keyed_layers(model, True):
            batch = collate_pairs(random_pairs(2))
            dpo_step(model, FrozenStart(model), batch, optim.SGD(0.1))
        for _, v in tree_flatten(model.parameters()):
            np.array(v)

    def test_what_is_made_of_frozen_weights_is_not_kept(self):
        # DoRA unpacks the weights of a layer, for each of its passes.
        unpacked = 4 * (4 * 128 * 128 + 3 * 128 * 512)
        for known in (True, False):
            with self.subTest(known=known):
                few, many = (dora_peak(layers, known) for layers in (2, 6))
                self.assertLess((many - few) / 4, unpacked)

    def test_models_that_cannot_be_recomputed_are_refused(self):
        model = nn.Module()
        model.model_type, model.layers = "kimi_k3", []
        with self.assertRaisesRegex(ValueError, "kimi_k3"):
            with keyed_layers(model, True):
                pass
        with keyed_layers(model, False):
            pass


if __name__ == "__main__":
    unittest.main()
