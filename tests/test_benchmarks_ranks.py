# Copyright © 2026 MLX Contributors

import json
import sys
import tempfile
import unittest
from pathlib import Path

from test_ranks import HAS_RING
from tiny import ROWS, save_rows, save_tiny_model

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
import ranks_benchmark  # noqa: E402
import ranks_check  # noqa: E402
import tensor_parallel  # noqa: E402


@unittest.skipUnless(HAS_RING, "mlx.launch or its ring backend is not there")
class TestRanks(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)

    def check(self, *flags):
        args = ranks_check.build_parser().parse_args(["--backend", "ring", *flags])
        return ranks_check.Check(self.folder, args)

    def test_pairs_a_second_of_two_ranks(self):
        data = save_rows(self.folder / "data", ROWS * 4) / "train.jsonl"
        model = save_tiny_model(self.folder / "model")
        flags = ["--backend", "ring", "--batch-per-rank", "1", "--epochs", "1"]
        flags += ["--model", str(model), "--data", str(data)]
        more = ["--", "--num-layers", "2", "--val-batches", "1"]
        args = ranks_benchmark.build_parser().parse_args([*flags, *more])
        speed, messages = ranks_benchmark.measure(args, 2, self.folder)
        self.assertGreater(speed, 0)
        self.assertGreater(messages, 0)

    def test_sums_over_two_ranks(self):
        self.assertIn("4 floats", ranks_check.sums(self.check()))

    def test_a_rank_that_hangs_says_where(self):
        check = self.check("--wait", "12")
        with self.assertRaisesRegex(AssertionError, '(?s)no end in 12 s.*"<string>"'):
            check.run(["-c", "import time; time.sleep(60)"], 2)

    def test_gradients_of_sharded_layers(self):
        out = ranks_benchmark.run([sys.executable, tensor_parallel.__file__])
        words = out.split()[-8:]
        found = dict(zip(words[::2], map(float, words[1::2])))
        self.assertEqual([*found], ["loss", "cut", "alone", "summed"])
        # A matrix that every rank has gets a part of its gradient on each.
        self.assertGreater(found.pop("alone"), 0.01)
        self.assertLess(max(found.values()), 1e-5)

    def test_other_losses_are_noticed(self):
        check = self.check()
        for name, loss in (("one", 0.5), ("ranks0", 0.6)):
            (check.folder / name).mkdir()
            row = {"iteration": 1, "train_loss": loss}
            lines = "".join(json.dumps(row) + "\n" for _ in range(8))
            (check.folder / name / "metrics.jsonl").write_text(lines)
        check.weights = lambda name: {"a": ranks_check.np.zeros(2)}
        with self.assertRaisesRegex(AssertionError, "losses off by 1.0e-01"):
            ranks_check._equal(check, "ranks0", "one", 8)


if __name__ == "__main__":
    unittest.main()
