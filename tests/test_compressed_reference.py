# Copyright © 2026 MLX Contributors

import json
import re
import shutil
import unittest
from pathlib import Path

import mlx.core as mx
import numpy as np
from resuming import bits, lines_of, signals
from test_dpo_command import CommandCase, command, metrics_of
from tiny import float64_logps, random_pairs, save_tiny_model, tiny_model

from mlx_lm.preference.run.compressed import ask_first_pairs, describe_error


def rounded_copy(model, folder, bits):
    """A model whose weights are those of a quantized one, as full numbers."""
    shutil.copytree(model, folder)
    weights = mx.load(str(folder / "model.safetensors"))
    for name, w in weights.items():
        if w.ndim == 2:
            packed = mx.quantize(w, 32, bits)
            weights[name] = mx.dequantize(*packed, 32, bits)
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    return folder


class TestCommand(CommandCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        root = Path(cls.shared.name)
        cls.other = save_tiny_model(root / "other", rope_theta=50.0)

    def start(self, *more, folder=None):
        flags = self.flags(*more, "--steps-per-report", 1, "--save-every", 1)
        flags[flags.index("--adapter-path") + 1] = folder or self.adapters
        return self.succeed(*flags, "--no-token-cache")

    def test_a_separate_reference_is_its_rounded_weights(self):
        for bits_ in (4, 8):
            quantized, rounded = (self.folder / f"{x} {bits_}" for x in "qr")
            copied = rounded_copy(self.other, self.folder / f"copy {bits_}", bits_)
            references = ("--reference-model", self.other), (
                "--reference-model",
                copied,
            )
            out = self.start(
                *references[0], "--reference-bits", bits_, folder=quantized
            )
            self.start(*references[1], folder=rounded)
            self.assertRegex(
                " ".join(out.split()),
                rf"The reference in {bits_} bits: 0\.00 GB instead of 0\.00; answers of "
                r"the first 4 pairs are off by 0\.\d+ nats a token, at most 0\.\d+\.",
            )
            self.assertIn(f"{self.other.name} in {bits_} bits", out.replace("\n", ""))
            found, expected = map(metrics_of, (quantized, rounded))
            self.assertEqual(len(found), len(expected))
            for line, right in zip(found, expected):
                for key in ("val_loss", "val_rewards/margins", "loss"):
                    if key in right:
                        self.assertAlmostEqual(line[key], right[key], delta=2e-4)

    def test_what_is_remembered_is_not_that_of_the_whole_one(self):
        cache, found = self.folder / "cache", []
        for more in ((), ("--reference-bits", 8), ("--reference-bits", 4)):
            reference = ("--reference-model", self.other, "--reference-cache", cache)
            self.start(*reference, *more, folder=self.folder / f"run {len(found)}")
            found.append({path.name for path in cache.glob("*.sqlite")})
        self.assertEqual([len(names) for names in found], [1, 2, 3])

    def test_of_full_weights_it_is_a_copy_of_the_start(self):
        full = ("--fine-tune-type", "full", "--learning-rate", 1e-3, "--iters", 4)
        full += ("--reference-bits", 4, "--no-reference-cache")
        whole, broken = self.folder / "whole", self.folder / "broken"
        out = self.start(*full, "--test", folder=whole)
        self.assertIn("the frozen start in 4 bits", out)
        # The start is not its own reference any more, and the run says by how much.
        first = metrics_of(whole)[0]
        self.assertTrue(0 < abs(first["val_rewards/margins"]) < 0.3)
        config = json.loads((whole / "adapter_config.json").read_text())
        self.assertEqual(config["reference_bits"], 4)
        with signals("_take_step", 3):
            flags = self.flags(*full, "--steps-per-report", 1, "--save-every", 1)
            flags[flags.index("--adapter-path") + 1] = broken
            self.assertEqual(command(*flags, "--no-token-cache")[0], 143)
        out = self.succeed("--resume", broken, "--test")
        self.assertNotIn("nats a token", out.split("test ·")[0])
        self.assertTrue(lines_of(broken) == lines_of(whole))
        name = "adapters.safetensors"
        self.assertTrue(bits(broken / name) == bits(whole / name))
        tests = [
            json.loads((x / "test_metrics.json").read_text()) for x in (whole, broken)
        ]
        self.assertEqual(tests[0]["loss"], tests[1]["loss"])
        # A test alone takes the same reference.
        self.succeed("--adapter-path", whole, "--data", self.data, "--test")
        again = json.loads((whole / "test_metrics.json").read_text())
        self.assertAlmostEqual(again["loss"], tests[0]["loss"], places=5)

    def test_the_forecast_knows_its_size(self):
        weights = []
        for more in ((), ("--reference-bits", 4)):
            reference = ("--reference-model", self.other, "--dry-run")
            out = self.start(*reference, *more)
            weights.append(float(re.search(r"weights ([\d.]+)", out)[1]))
        self.assertLess(weights[1], 0.75 * weights[0])

    def test_refused(self):
        packed = save_tiny_model(self.folder / "packed", quantize=True)
        for message, flags in (
            ("takes no second model", ()),
            ("leave out reference_bits", ("--sync-reference",)),
            ("simpo has no reference", ("--loss-type", "simpo")),
            ("the reference is quantized already", ("--reference-model", packed)),
        ):
            code, _, err = command(*self.flags("--reference-bits", 4, *flags))
            self.assertEqual(code, 2, message)
            self.assertIn(message, err)


class TestError(unittest.TestCase):
    def test_against_float64(self):
        pairs = random_pairs(9)
        whole, other = tiny_model("lora"), tiny_model("lora", rope_theta=50.0)
        asked = [ask_first_pairs(model, pairs) for model in (whole, other)]
        errors = []
        for prompt, chosen, rejected, _ in pairs[:4]:
            for answer in (chosen, rejected):
                ids = mx.array([prompt + answer])
                mask = np.arange(ids.size - 1)[None] >= len(prompt) - 1
                one, two = (
                    float64_logps(model(ids)[:, :-1], ids[:, 1:], mask)[0]
                    for model in (whole, other)
                )
                errors.append(abs(one - two) / len(answer))
        text = describe_error(4, *asked)
        found = re.search(r"off by ([\d.]+) nats a token, at most ([\d.]+)\.", text)
        self.assertAlmostEqual(float(found[1]), np.mean(errors), places=3)
        self.assertAlmostEqual(float(found[2]), np.max(errors), places=3)
        self.assertIn("not measured", describe_error(4, None, asked[1]))


if __name__ == "__main__":
    unittest.main()
