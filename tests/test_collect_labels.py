# Copyright © 2026 MLX Contributors

import json
import math
import unittest

import tiny  # noqa: F401
from collecting import answers
from folders import FolderCase

from mlx_lm.preference.collect.labels import (
    LABELS,
    Label,
    agreements,
    append_label,
    read_labels,
)


class TestLabels(FolderCase):
    def add(self, *labels):
        for label in labels:
            append_label(self.folder, label)

    def test_last_word_of_each_judge_counts(self):
        self.add(
            Label("p", "a", "scores", scores=[1.0, 0.0]),
            Label("p", "b", "tie"),
            Label("p", "a", "scores", scores=[0.0, 1.0]),
            Label("p", "a", "tie", round=1),
        )
        self.add(Label("p", "b", "withdrawn"))
        found = read_labels(self.folder)
        self.assertEqual(found[0, "p"]["a"].scores, [0.0, 1.0])
        self.assertEqual(found.keys(), {(0, "p"), (1, "p")})
        self.assertEqual(found[0, "p"].keys(), {"a"})

    def test_torn_line_goes_before_the_next_is_written(self):
        whole = Label("p", "a", "tie")
        self.add(whole)
        path = self.folder / LABELS
        text = path.read_bytes()
        for cut in range(len(text)):
            path.write_bytes(text + text[:cut])
            self.assertEqual(len(read_labels(self.folder)), 1)
            self.add(whole)
            kept = 2 + (cut == len(text) - 1)
            self.assertEqual(path.read_bytes(), text * kept, cut)

    def test_labels_that_fit_no_answers_are_left_out(self):
        rows = (
            {"verdict": "scores", "scores": [1.0]},
            {"verdict": "scores", "scores": [1.0, None]},
            {"verdict": "scores", "scores": [1, 10**400]},
            {"verdict": "tie", "certainty": 10**400},
            {"verdict": "ranking", "ranking": [[0], [2]]},
            {"verdict": "ranking", "ranking": [[0], [0]]},
            {"verdict": "ranking", "ranking": []},
            {"verdict": "best"},
            {"verdict": "tie", "certainty": 0.4},
            {"verdict": "tie", "orders": [[0, 1, 0.5]]},
            {"verdict": "tie", "orders": [[0, 1, "a", 0.5]]},
            {"verdict": "tie", "orders": 3},
            {"verdict": "tie", "edited": {"response": 2, "text": "x"}},
            {"verdict": "tie", "id": "other"},
            {"verdict": "tie", "round": 1},
        )
        with open(self.folder / LABELS, "w") as file:
            for i, row in enumerate(rows):
                row = {"id": "p", "judge": f"{i}"} | row
                file.write(json.dumps(row) + "\n")
        two = answers(0, "a", "b", id="p")
        self.assertEqual(read_labels(self.folder, [two]), {})

    def test_labels_of_other_answers_are_left_out(self):
        # The same prompts, answered anew, or by another model: the votes are of others.
        first, second = answers(1, "a", "b"), answers(1, "c", "d")
        for of, kept in ((first.mark, 0), (second.mark, 1), (None, 1), (3, 0)):
            (self.folder / LABELS).unlink(missing_ok=True)
            self.add(Label("p1", "a", "scores", scores=[1.0, 0.0], of=of))
            self.assertEqual(len(read_labels(self.folder, [second])), kept, of)

    def test_places_share_their_mean(self):
        for label, expected in (
            (Label("p", "a", "scores", scores=[1, 3, 1]), [1.5, 0, 1.5]),
            (Label("p", "a", "ranking", ranking=[[2], [0, 1]]), [1.5, 1.5, 0]),
            (Label("p", "a", "bad"), [1, 1, 1]),
        ):
            self.assertEqual(label.places(3), expected)
        some = Label("p", "a", "ranking", ranking=[[2], [0]]).places(3)
        self.assertTrue(some[0] == 1 and math.isnan(some[1]) and some[2] == 0)
        self.assertIsNone(Label("p", "a", "none").places(3))

    def test_kappa_by_hand(self):
        # Ten pairs: both say "first" 4 times, both "second" 2, a first and b second 3,
        # b ties where a says second 1.
        rows = [("first", "first")] * 4 + [("second", "second")] * 2
        rows += [("first", "second")] * 3 + [("second", "tie")]
        scores = {"first": [1, 0], "second": [0, 1], "tie": [1, 1]}
        labels = {
            (0, f"{i}"): {
                name: Label(f"{i}", name, "scores", scores=scores[said])
                for name, said in zip("ab", row)
            }
            for i, row in enumerate(rows)
        }
        labels[0, "x"] = {"a": Label("x", "a", "tie"), "b": Label("x", "b", "none")}
        (found,) = agreements(labels, dict.fromkeys(labels, 2))
        # By chance: 0.7 * 0.4 + 0.3 * 0.5 + 0 * 0.1 = 0.43.
        self.assertEqual((found.pairs, found.share), (10, 0.6))
        self.assertAlmostEqual(found.kappa, (0.6 - 0.43) / (1 - 0.43))

    def test_kappa_where_chance_agrees_always(self):
        labels = {(0, "p"): {name: Label("p", name, "tie") for name in "ab"}}
        (found,) = agreements(labels, {(0, "p"): 2})
        self.assertEqual((found.share, found.kappa), (1, None))


if __name__ == "__main__":
    unittest.main()
