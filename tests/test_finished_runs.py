# Copyright © 2026 MLX Contributors

import json
import shutil
import unittest
from pathlib import Path

from test_dpo_command import CommandCase, command
from tiny import HAS_MATPLOTLIB, ROWS, save_rows, save_tiny_model

from mlx_lm import dpo
from mlx_lm.preference.run.reading import read_json


def read(folder):
    return json.loads((Path(folder) / "test_metrics.json").read_text())


class TestComparison(CommandCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.runs = Path(cls.shared.name) / "runs"
        cls.other = save_tiny_model(cls.runs / "model", max_position_embeddings=512)
        cls.adapters = cls.runs / "none"
        for name, *more in (
            ("slow", "--learning-rate", 1e-3, "--test"),
            ("fast", "--learning-rate", 3e-2, "--beta", 0.3, "--test"),
            ("else", "--model", cls.other),
            ("longer", "--max-seq-length", 63),
            ("apart", "--reference-model", cls.model),
        ):
            code, _, err = command(
                *CommandCase.flags(cls, "--adapter-path", cls.runs / name, *more)
            )
            assert code == 0, err

    def compare(self, *folders):
        return ("--test", "--data", self.data, "--adapter-path", *folders)

    def test_side_by_side_and_alone_are_the_same(self):
        slow, fast = self.runs / "slow", self.runs / "fast"
        alone = [read(slow), read(fast)]
        for folder in (slow, fast):
            (folder / "test_metrics.json").unlink()
        out = self.succeed(*self.compare(slow, fast))
        together = [read(slow), read(fast)]
        for ours, expected in zip(together, alone):
            self.assertEqual(ours.keys(), expected.keys())
            for name, value in expected.items():
                if isinstance(value, float):
                    self.assertAlmostEqual(
                        ours[name], value, delta=1e-5 * abs(value) + 1e-6
                    )
        self.assertGreater(together[1]["kl"], together[0]["kl"])
        self.assertRegex(out, r"test · 11 pairs +start +slow +fast\n")
        cells = [f"{m['rewards/margins']:.3f}" for m in together]
        self.assertRegex(out, rf"reward margin \(nats\) +- +{cells[0]} +{cells[1]}")
        (one,) = [self.succeed(*self.compare(slow))]
        self.assertRegex(one, r"test · 11 pairs +start +policy\n")

    def test_a_moving_reference_is_measured_from_the_start(self):
        moving = ("--sync-reference", "--sync-steps", 1, "--learning-rate", 1e-2)
        self.succeed(*self.flags(*moving, "--test"))
        after_training = read(self.adapters)
        self.succeed(*self.compare(self.adapters))
        alone = read(self.adapters)
        self.assertGreater(alone["kl"], 1e-4)
        for name in ("kl", "rewards/margins", "perplexity/reference"):
            difference = abs(alone[name] - after_training[name])
            self.assertLess(difference, 1e-4 * abs(alone[name]) + 1e-6, name)

    def test_what_can_not_be_compared(self):
        one, two, longer = (self.runs / name for name in ("slow", "else", "longer"))
        for pattern, argv in (
            ("model is .* in .*slow and .* in .*else", self.compare(one, two)),
            ("max_seq_length is 64 in .* and 63 in", self.compare(one, longer)),
            ("names a folder twice", self.compare(one, one)),
            ("adapter_path is no text", self.compare(one, "\udcff")),
            ("has no adapter_config.json", self.compare(one, self.runs / "none")),
            ("only --test alone", [*self.compare(one, two), "--train"]),
            ("only --test alone", [*self.compare(one, two), "--inspect", 2]),
            ("only --test alone", self.compare(one, two)[1:]),
        ):
            with self.subTest(pattern=pattern):
                self.fail_in_one_line(pattern, *argv)
        kto = self.folder / "kto"
        self.succeed(*self.flags("--loss-type", "kto", "--adapter-path", kto))
        self.fail_in_one_line(
            "kind of data is 'pairs' in .* and 'labels' in .* agree in it",
            *self.compare(one, kto),
        )
        # A given setting overrides what the runs had.
        self.succeed(*self.compare(one, longer), "--max-seq-length", 40)

    def test_runs_with_other_starts_have_no_common_one(self):
        both = self.compare(self.runs / "slow", self.runs / "apart")
        out = self.succeed(*both)
        self.assertIn("have different references", out)
        self.assertRegex(out, r"test · 11 pairs +slow +apart\n")

    def test_ordinary_text_and_report_of_each(self):
        folders = [
            shutil.copytree(self.runs / name, self.folder / name)
            for name in ("slow", "fast")
        ]
        text = self.folder / "text.txt"
        text.write_text("The cat sat on the mat and looked at the moon. " * 30)
        more = ["--report"] if HAS_MATPLOTLIB else []
        out = self.succeed(*self.compare(*folders), "--retain-data", text, *more)
        found = [read(folder) for folder in folders]
        cells = [f"{m['retained_text/after']:.2f}" for m in found]
        start = f"{found[0]['retained_text/before']:.2f}"
        pattern = rf"perplexity of ordinary text +{start} +{cells[0]} +{cells[1]}"
        self.assertRegex(out, pattern)
        for folder in folders:
            self.assertEqual((folder / "report.html").exists(), bool(more))

    def test_pairs_are_those_of_the_last_test(self):
        if not HAS_MATPLOTLIB:
            self.skipTest("needs matplotlib")
        folder = shutil.copytree(self.runs / "fast", self.folder / "copy")
        one = (*self.compare(folder), "--batch-size", 2, "--test-batches", 1)
        self.succeed(*one, "--report")
        found = read_json(folder / "test_pairs.json")
        self.assertEqual(len(found["after"]), 2)
        self.succeed(*self.compare(folder), "--report")
        whole = read_json(folder / "test_pairs.json")
        self.assertEqual(len(whole["after"]), 11)
        texts = {pair["pair"]: pair["prompt"] for pair in whole["pairs"]}
        for pair in found["pairs"]:
            self.assertEqual(texts.get(pair["pair"], pair["prompt"]), pair["prompt"])
        self.assertNotEqual([p["pair"] for p in found["pairs"]], [0, 1])
        # Without a report no text stays of pairs that were not tested last.
        self.succeed(*one)
        kept = read_json(folder / "test_pairs.json")
        self.assertEqual((len(kept["after"]), kept["pairs"]), (2, []))

    def test_each_has_its_own_margins(self):
        rows = [row | {"ahead": 9.0, "sure": i % 2} for i, row in enumerate(ROWS)]
        data = save_rows(self.folder / "scored", rows)
        plain, ahead, sure = (self.folder / x for x in ("plain", "ahead", "sure"))
        for folder, *more in (
            (plain,),
            (ahead, "--margin-feature", "ahead"),
            (sure, "--weight-feature", "sure"),
        ):
            given = ("--adapter-path", folder, "--data", data, "--iters", 1)
            self.succeed(*self.flags(*given, *more, "--test"))
        alone = [read(folder)["loss"] for folder in (plain, ahead)]
        self.assertGreater(alone[1], alone[0] + 1)
        both = ("--test", "--data", data, "--adapter-path", ahead)
        self.succeed(*both, plain)
        for folder, loss in zip((plain, ahead), alone):
            self.assertAlmostEqual(read(folder)["loss"], loss, places=4)
        code, _, err = command(*both, sure)
        self.assertEqual(code, 2)
        self.assertRegex(err, "Error: .*sure has another .* leaves out other pairs")

    def test_one_folder_is_no_list(self):
        for words, expected in (
            ([], "adapters"),
            (["--adapter-path", "a"], "a"),
            (["--adapter-path", ""], ""),
            (["--adapter-path", "a", "b"], ["a", "b"]),
        ):
            self.assertEqual(dpo.resolve_args(words).adapter_path, expected)

    def test_an_adapter_in_a_folder_that_can_not_be_written(self):
        folder = self.runs / "longer"
        (folder / "test_metrics.json").mkdir()
        out = self.succeed(*self.compare(folder))
        self.assertIn("[WARNING] Can't write", out)
        self.assertIn("test · 11 pairs", out)


if __name__ == "__main__":
    unittest.main()
