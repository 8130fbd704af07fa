# Copyright © 2026 MLX Contributors

import unittest

import mlx.core as mx
import mlx.optimizers as optim
import model_zoo
import numpy as np
from mlx.utils import tree_flatten
from tiny import LORA, Pairs, Recorder, random_pairs, tiny_model, train, weights_of

from mlx_lm.preference.batch.collate import collate_pairs
from mlx_lm.preference.forward.answers import sequence_logps
from mlx_lm.preference.forward.frozen import FrozenStart
from mlx_lm.preference.policy.model import check_token_ids
from mlx_lm.preference.policy.reference import check_same_tokens, load_reference_model
from mlx_lm.tuner.trainer import evaluate_dpo
from mlx_lm.tuner.utils import linear_to_lora_layers


class TestReference(unittest.TestCase):
    def test_every_reference_tensor_is_untouched_after_20_steps(self):
        pairs = random_pairs(8)
        for kind in ("lora", "dora", "full"):
            for checkpoint in (False, True):
                with self.subTest(kind=kind, checkpoint=checkpoint):
                    model = tiny_model(kind)
                    reference = FrozenStart(model)
                    before = {
                        k: np.array(v) for k, v in tree_flatten(model.parameters())
                    }
                    frozen = {k for k, _ in tree_flatten(reference.exact)}
                    optimizer = optim.Adam(1e-2)
                    train(
                        model,
                        pairs,
                        optimizer=optimizer,
                        reference_model=reference,
                        grad_checkpoint=checkpoint,
                    )
                    for k, v in tree_flatten(reference.exact):
                        np.testing.assert_array_equal(np.array(v), before[k])
                    for k, v in tree_flatten(model.parameters()):
                        if k not in frozen:
                            np.testing.assert_array_equal(np.array(v), before[k])
                    self.assertNotEqual(before, weights_of(model))
                    trained = {k for k, _ in tree_flatten(model.trainable_parameters())}
                    state = {k for k, _ in tree_flatten(optimizer.state)}
                    state = {k.rsplit(".", 1)[0] for k in state if "." in k}
                    self.assertEqual(state, trained)

    def test_a_separate_reference_is_untouched_and_has_no_gradient(self):
        model, reference = tiny_model("lora"), tiny_model(seed=3)
        reference.eval()
        before = {k: np.array(v) for k, v in tree_flatten(reference.parameters())}
        train(model, random_pairs(6), reference_model=reference)
        for k, v in tree_flatten(reference.parameters()):
            np.testing.assert_array_equal(np.array(v), before[k])

    def test_frozen_start_equals_a_second_model(self):
        pairs = random_pairs(6)
        for kind in ("lora", "dora", "full"):
            for checkpoint in (False, True):
                results = []
                for separate in (False, True):
                    model = tiny_model(kind)
                    reference = tiny_model(kind) if separate else FrozenStart(model)
                    recorder = Recorder()
                    train(
                        model,
                        pairs,
                        reference_model=reference,
                        callback=recorder,
                        iters=6,
                        steps_per_report=1,
                        grad_checkpoint=checkpoint,
                    )
                    results.append([r["loss"] for r in recorder.train])
                with self.subTest(kind=kind, checkpoint=checkpoint):
                    np.testing.assert_allclose(*results, rtol=1e-6)

    def test_adapters_that_add_nothing_do_not_run(self):
        batch = collate_pairs(random_pairs(3))
        for kind in ("lora", "experts"):
            model = tiny_model("lora")
            if kind == "experts":
                model = model_zoo.build("mixtral")
                model.freeze()
                linear_to_lora_layers(model, 1, LORA)
            expected = sequence_logps(model.eval(), batch)
            adapters = [m for m in model.modules() if "lora_b" in m]
            used = adapters[-1]
            used.lora_b = used.lora_b + 0.3
            moved = sequence_logps(model, batch)
            for adapter in adapters[:-1]:
                # It would show.
                adapter.lora_a = adapter.lora_a * mx.nan
            one_idles = FrozenStart(model)
            used.lora_b = used.lora_b * 0
            all_idle = FrozenStart(model)
            for adapter in adapters:
                adapter.lora_b = adapter.lora_b + 1
            with self.subTest(kind=kind):
                self.assertGreater(mx.abs(moved - expected).max().item(), 1e-3)
                for start, logps in ((one_idles, moved), (all_idle, expected)):
                    found = sequence_logps(start, batch)
                    # A BLAS may round otherwise where arrays begin elsewhere.
                    np.testing.assert_allclose(found, logps, rtol=1e-6)
                self.assertTrue(mx.isnan(sequence_logps(model, batch)).all().item())

    def test_reference_never_sees_dropout(self):
        model = tiny_model("lora", dropout=0.5)
        for _, module in model.named_modules():
            if "lora_b" in module:
                module.lora_b = mx.random.normal(module.lora_b.shape)
        tokens = mx.array([[1, 2, 3, 4]])
        model.eval()
        expected = np.array(model(tokens))
        model.train()
        reference = FrozenStart(model)
        for _ in range(2):
            np.testing.assert_array_equal(np.array(reference(tokens)), expected)
        self.assertTrue(model.training)
        self.assertFalse(np.array_equal(np.array(model(tokens)), expected))

    def test_another_reference_in_training_mode_has_no_dropout_either(self):
        pairs, losses = Pairs(random_pairs(4)), []
        for training in (False, True):
            reference = tiny_model("lora", seed=3, dropout=0.5)
            for _, module in reference.named_modules():
                if "lora_b" in module:
                    module.lora_b = mx.ones(module.lora_b.shape)
            reference.train(training)
            losses.append(evaluate_dpo(tiny_model(), reference, pairs)["loss"])
            self.assertEqual(reference.training, training)
        self.assertEqual(*losses)

    def test_namespace_is_enough_for_loaders(self):
        # Python users may bring any object with the right attributes.
        self.assertIsNone(load_reference_model(None))

    def test_tokens_and_vocabulary_are_compared(self):
        class Vocabulary:
            def __init__(self, **ids):
                self.get_vocab = lambda: ids

        check_same_tokens(Vocabulary(a=0), Vocabulary(a=0))
        for other in (Vocabulary(a=1), Vocabulary(b=0), Vocabulary(a=0, b=1)):
            with self.assertRaisesRegex(ValueError, "differs from the policy's"):
                check_same_tokens(Vocabulary(a=0), other)
        model = tiny_model()
        check_token_ids(model, 63)
        with self.assertRaisesRegex(ValueError, "Token id 64 is outside"):
            check_token_ids(model, 64)


if __name__ == "__main__":
    unittest.main()
