# Copyright © 2026 MLX Contributors

import unittest

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from test_dpo_command import CommandCase, metrics_of, write_yaml
from tiny import save_rows, save_tiny_model, tiny_model

from mlx_lm import load
from mlx_lm.preference.policy.head import unfreeze_head


class TestTrainHead(CommandCase):
    """``train_head`` from the command to a loaded model."""

    FULL = ("--fine-tune-type", "full")

    def test_adapters_hold_the_head_and_load(self):
        untied = save_tiny_model(self.folder / "untied", tie_word_embeddings=False)
        config = write_yaml(
            self.folder / "head.yaml", train_head=True, fine_tune_type="full"
        )
        for model, name in (
            (self.model, "model.embed_tokens.weight"),
            (untied, "lm_head.weight"),
        ):
            with self.subTest(name=name):
                rate = ["--learning-rate", 1e-2]
                out = self.succeed(
                    *self.flags("--model", model, "-c", config, "--test", *rate)
                )
                self.assertIn("test · 11 pairs", out)
                weights = mx.load(str(self.adapters / "adapters.safetensors"))
                self.assertIn(name, weights)
                start = dict(tree_flatten(load(str(model))[0].parameters()))
                self.assertFalse(mx.array_equal(weights[name], start[name]))
                trained, _ = load(str(model), adapter_path=str(self.adapters))
                loaded = dict(tree_flatten(trained.parameters()))
                for key, value in weights.items():
                    self.assertTrue(mx.array_equal(loaded[key], value), key)
                # A test alone knows that the head is part of the adapter.
                again = self.succeed(
                    *("--model", model, "--data", self.data, "--test"),
                    *("--adapter-path", self.adapters),
                )
                table = lambda text: text[text.index("test · 11 pairs") :]
                self.assertEqual(table(again), table(out))

    def test_a_head_beside_adapters_is_refused_in_one_line(self):
        for kind in ("lora", "dora"):
            self.fail_in_one_line(
                "train_head needs fine_tune_type full.*lora_parameters.keys",
                *self.flags("--train-head", "--fine-tune-type", kind),
            )

    def test_a_head_may_be_adapted_instead(self):
        model = save_tiny_model(self.folder / "untied", tie_word_embeddings=False)
        parameters = {"keys": ["lm_head", "self_attn.q_proj"]}
        config = write_yaml(self.folder / "dpo.yaml", lora_parameters=parameters)
        flags = ["--model", model, "-c", config, "--learning-rate", 1e-2]
        self.succeed(*self.flags(*flags))
        weights = mx.load(str(self.adapters / "adapters.safetensors"))
        self.assertTrue(weights["lm_head.lora_b"].any().item())
        trained, _ = load(str(model), adapter_path=str(self.adapters))
        self.assertTrue(
            mx.array_equal(trained.lm_head.lora_b, weights["lm_head.lora_b"])
        )

    def test_a_quantized_head_is_refused_in_one_line(self):
        model = save_tiny_model(self.folder / "packed", quantize=True)
        self.fail_in_one_line(
            "full can't train quantized layers",
            *self.flags("--model", model, "--train-head", *self.FULL),
        )
        for tied, name in ((True, "model.embed_tokens"), (False, "lm_head")):
            model = tiny_model(tie_word_embeddings=tied)
            head = lambda path, module, name=name: path == name
            nn.quantize(model, group_size=32, bits=4, class_predicate=head)
            with self.assertRaisesRegex(ValueError, f"can't train {name}, which is"):
                unfreeze_head(model)
        with self.assertRaisesRegex(ValueError, "no module named lm_head"):
            unfreeze_head(nn.Sequential(nn.Linear(1, 1)))

    def test_sharing_changes_no_number(self):
        other = self.folder / "plain"
        more = ["--iters", 20, "--steps-per-report", 5, "--train-head", *self.FULL]
        # Adam would make a step out of the noise of a gradient of 0.
        more += ["--optimizer", "sgd", "--learning-rate", 0.1]
        # Where both models are the same, an accuracy is made of the last digit.
        data = save_rows(self.folder / "data", names=("train",))
        config = write_yaml(self.folder / "dpo.yaml", valid_fraction=0)
        more += ["--data", data, "-c", config]
        self.succeed(*self.flags(*more))
        flags = self.flags(*more, "--no-share-prompt", "--no-reference-cache")
        flags[flags.index("--adapter-path") + 1] = other
        out = self.succeed(*flags)
        self.assertRegex(out, r"prompts +not shared")
        lines = metrics_of(self.adapters), metrics_of(other)
        skipped = ["second", "padding", "memory", "time", "iteration", "accuracies"]
        for shared, plain in zip(*lines, strict=True):
            for key in plain:
                if not any(word in key for word in skipped):
                    delta = 1e-4 * max(1, abs(plain[key]))
                    self.assertAlmostEqual(
                        shared[key], plain[key], delta=delta, msg=key
                    )
            # Only the first step compares equal models.
            skipped[5:] = []
        files = [
            mx.load(str(f / "adapters.safetensors")) for f in (self.adapters, other)
        ]
        self.assertEqual(files[0].keys(), files[1].keys())
        for key, value in files[1].items():
            np.testing.assert_allclose(files[0][key], value, atol=2e-5, err_msg=key)


if __name__ == "__main__":
    unittest.main()
