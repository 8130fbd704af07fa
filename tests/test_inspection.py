# Copyright © 2026 MLX Contributors

import unittest

import numpy as np
from rich.cells import cell_len
from test_dpo_command import CommandCase, write_yaml
from tiny import save_rows

from mlx_lm.preference.measure.pair_scores import ScoredPairs
from mlx_lm.preference.report.inspect import (
    inspection_lines,
    inspection_order,
    uncut_pairs,
)


def scored(margins):
    n = len(margins)
    policy = np.array([[-2.5, -1.25]] * n)
    rewards = np.stack([np.array(margins), np.zeros(n)], axis=1)
    tokens = np.array([[5, 1]] * n)
    return ScoredPairs(np.arange(n), policy, 2 * policy, policy, rewards, tokens)


class Pairs(list):
    """Pairs whose tokens are characters, one row of a file each."""

    max_length = 4
    place = "test.jsonl:7"

    class tokenizer:
        decode = staticmethod(lambda ids: "".join(map(chr, ids)))

    def source_row(self, index):
        return self.place


def texts(prompt="<|im_start|>user\nWhy?<|im_end|>\n", answers=("Because.", "No.")):
    """The token ids of a pair."""
    ids = [list(map(ord, text)) for text in (prompt, *answers)]
    return (*ids, tuple(map(len, ids)))


class TestInspection(unittest.TestCase):
    def test_surest_mistakes_then_least_sure_rest(self):
        margins = np.array([0.3, -0.1, 2.0, -4.0, 0.0, np.nan])
        self.assertEqual(inspection_order(margins, 9), [5, 3, 1, 4, 0, 2])
        self.assertEqual(inspection_order(margins, 2), [5, 3])

    def test_what_is_shown(self):
        whole = {1: texts(answers=("Because.", "No. Never."))}
        pairs = Pairs([texts(), texts()])
        lines = inspection_lines(pairs, scored([-1.0, 0.5]), whole)
        text = "\n".join(lines)
        head = "1 of 2 · WRONG · margin -1.000 · P(chosen) 26.9% · test.jsonl:7"
        self.assertEqual(lines[0], head)
        self.assertIn("2 of 2 · right · margin +0.500 · P(chosen) 62.2%", text)
        self.assertRegex(text, r"chosen +-2.50 +-5.00 +-1.000 +5 +-0.500")
        self.assertRegex(text, r"rejected +-1.25 +-2.50 +\+0.000 +1 +-1.250")
        self.assertIn("prompt, 32 tokens, not scored", text)
        self.assertIn("    <|im_start|>user↵\n    Why?<|im_end|>↵", text)
        self.assertIn("  rejected, scored\n    No.\n  cut off: 7 tokens\n", text)
        self.assertEqual(text.count("cut off"), 1)
        self.assertIn("Never.", text)
        pairs.place = 3
        self.assertIn("% · row 3", inspection_lines(pairs, scored([1.0]), {})[0])

    def test_lines_fit_and_nothing_reaches_the_terminal(self):
        long = "words and words " * 200
        odd = "red \x1b[31m bell \x07 tab\t back\b right\u202eleft \r\n[bold]x[/bold]"
        wide = "漢字" * 90
        for width in (66, 80):
            pairs = Pairs([texts(long, (odd, wide))])
            pairs.place = "d/" * 60 + "7"
            lines = inspection_lines(pairs, scored([-1.0]), {}, width)
            with self.subTest(width=width):
                self.assertLessEqual(max(map(cell_len, lines)), width)
                self.assertTrue(all(c.isprintable() for line in lines for c in line))
                self.assertIn("\\x1b", "".join(lines))
                self.assertLess(len(lines), 40)
        # Of a prompt the end is shown, of an answer both ends.
        pairs = Pairs([texts("a " * 999 + "END")])
        self.assertIn("END", "".join(inspection_lines(pairs, scored([1.0]), {})))

    def test_several_pairs_of_one_row(self):
        pairs = Pairs([([1], [3, 4], [5], (1, 3, 2)), ([1], [6, 7], [5], (1, 3, 2))])
        pairs.max_length = 3
        whole = [([1], [3, 4, 9], [5], (1, 4, 2)), ([1], [6, 7, 8], [5], (1, 4, 2))]
        found = uncut_pairs(pairs, [1, 0], lambda: [[], Pairs(whole)])
        self.assertEqual(found, {1: whole[1], 0: whole[0]})


class TestInspectCommand(CommandCase):
    def test_after_training_and_of_a_finished_run(self):
        args = self.flags("--inspect", 2, "--max-seq-length", 32)
        out = self.succeed(*args)
        self.assertIn("1 of 2", out)
        self.assertEqual(out.count("  chosen, scored"), 2)
        self.assertNotIn("test ·", out)
        # Rows are longer than 32 tokens: what was cut is found in the data.
        self.assertRegex(out, r"cut off: \d+ tokens\n    \S")
        again = self.succeed(
            *("--adapter-path", self.adapters, "--data", self.data),
            *("--inspect", 2, "--test"),
        )
        shown = out[out.index("1 of 2") :]
        self.assertEqual(again[again.index("1 of 2") :], shown)
        self.assertIn("test · 11 pairs", again)
        only = save_rows(self.folder / "valid", names=("valid",))
        valid = self.succeed(
            "--adapter-path", self.adapters, "--data", only, "--inspect", 1
        )
        self.assertIn("1 of 1", valid)

    def test_data_without_held_out_pairs(self):
        self.succeed(*self.flags())
        only = save_rows(self.folder / "train", names=("train",))
        adapters, self.adapters = self.adapters, self.folder / "none"
        self.fail_in_one_line(
            "Found no test or validation set in .*inspect needs one",
            *("--adapter-path", adapters, "--data", only, "--inspect", 1),
        )
        config = write_yaml(self.folder / "none.yaml", valid_fraction=0.0)
        self.fail_in_one_line(
            "inspect shows held-out pairs, and there are none",
            *self.flags("--data", only, "--inspect", 1, "--config", config),
        )
        self.fail_in_one_line("inspect must be at least 1", *self.flags("--inspect", 0))
        for name in ("kto", "plackett_luce"):
            self.fail_in_one_line(
                f"inspect is for pairs of answers, and {name} has .*: leave it out",
                *self.flags("--inspect", 1, "--loss-type", name),
            )

    def test_uncut_pairs_reads_no_data_without_need(self):
        pairs = Pairs([([1], [2], [3], (1, 2, 2))])
        self.assertEqual(uncut_pairs(pairs, [0], self.fail), {})


if __name__ == "__main__":
    unittest.main()
