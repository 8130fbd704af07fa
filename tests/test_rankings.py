# Copyright © 2026 MLX Contributors

import contextlib
import io
import json
import tempfile
import unittest
from pathlib import Path

import mlx.optimizers as optim
import numpy as np
from byte_tokenizers import CHATML, make_tokenizer, pair
from mlx.utils import tree_flatten, tree_map
from test_labelled_rows import Faults, make, texts
from test_preference_batches import FakeGroup
from tiny import tiny_model

from mlx_lm.preference.batch.buckets import length_buckets, plan_batches
from mlx_lm.preference.batch.collate import epoch_batches, iterate_preference_batches
from mlx_lm.preference.batch.shape import padded_tokens
from mlx_lm.preference.data.shapes import read_rows
from mlx_lm.preference.forward.frozen import FrozenStart
from mlx_lm.preference.objective.objective import Objective
from mlx_lm.preference.run.forecast import _Unread
from mlx_lm.tuner.datasets import PreferenceDataset, load_preference_dataset
from mlx_lm.tuner.trainer import dpo_step


def ranking(prompt, *answers):
    return {"prompt": prompt, "ranking": list(answers)}


def random_rankings(n, seed=0, most=5):
    """Rows of 2 to 5 answers; each answer names its row and its place."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(n):
        count = rng.integers(2, most + 1) if i else most
        answers = [f"{i}.{k}" + "x" * rng.integers(0, 9) for k in range(count)]
        rows.append(ranking(f"{'Q' * rng.integers(1, 9)}{i}:", *answers))
    return rows


class TestPairs(Faults):
    def test_all_pairs(self):
        rows = [ranking("Q:", "a", "b", "c"), pair("R:", "d", "e")]
        dataset = make(rows + [ranking("S:", "f", "g")], max_bad_rows=0)
        expected = [("Q:", "a", "b"), ("Q:", "a", "c"), ("Q:", "b", "c")]
        expected += [("R:", "d", "e"), ("S:", "f", "g")]
        self.assertEqual(texts(dataset), expected)
        # 2 / (3 * 2) each: every row counts once.
        thirds = [np.float32(1 / 3)] * 3
        self.assertEqual(dataset.values["weights"].tolist(), [*thirds, 1, 1])
        self.assertEqual(dataset.group_size, 1)
        self.assertEqual([dataset.source_row(i) for i in range(5)], [0, 0, 0, 1, 2])
        counts = "5 pairs of 3 rows (4 of ranking, text; 1 of text, text)."
        self.assertIn(counts, dataset.summary()[0])
        row = {**rows[0], "w": 6}
        found = read_rows(row, weight_feature="w")
        self.assertEqual([p.values["weights"] for p in found], [2, 2, 2])

    def test_prompts_of_all_forms(self):
        tokenizer = make_tokenizer(CHATML)
        user = [{"role": "user", "content": "Hi"}]
        say = lambda text: [{"role": "assistant", "content": text}]
        expected = [
            ("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",)
            + ("a<|im_end|>\n", "b<|im_end|>\n")
        ]
        for row in (
            ranking(user, "a", "b"),
            ranking(user, say("a"), say("b")),
            ranking(user, user + say("a"), user + say("b")),
            {"question": "Hi", "ranking": ["a", "b"]},
            {"messages": user, "ranking": ["a", "b"]},
            {"conversations": user, "ranking": ["a", "b"], "chosen": 2},
        ):
            with self.subTest(row=row):
                self.assertEqual(texts(make([row], tokenizer, 128)), expected)
        row = {"ask": user, "ranking": ["a", "b"], "chosen": 2}
        found = make([row], tokenizer, prompt_feature="ask", rejected_feature="worse")
        self.assertEqual(texts(found), expected)

    def test_which_pairs(self):
        row = {"prompt": "Q:", "ranking": ["a", "b", "c"]}
        graded = {
            "question": "Q:",
            "answers": [
                {"text": text, "pm_score": score}
                for text, score in (("b", 2), ("x", 0), ("a", 5), ("b", 1), ("y", 0))
            ],
        }
        for name, plain, with_ties in (
            ("all", ["ab", "ac", "bc"], ["ab", "ax", "ay", "bx", "by"]),
            ("neighbours", ["ab", "bc"], ["ab", "bx", "by"]),
            ("best_and_worst", ["ac"], ["ay"]),
        ):
            for known, expected in ((row, plain), (graded, with_ties)):
                found = read_rows(known, ranking_pairs=name, turns=False)
                pairs = [p.chosen + p.rejected for p in found]
                self.assertEqual(pairs, expected)
                shares = [p.values["weights"] for p in found]
                self.assertAlmostEqual(sum(shares), 1)
        whole = read_rows(graded, kind="rankings", turns=False)
        self.assertEqual([p.chosen + p.rejected for p in whole], ["ab", "ax"])
        self.assertEqual([p.values["places"] for p in whole], [(0.0, 1.0), (-1.0, 2.0)])
        self.refuse("tie", {**graded, "answers": graded["answers"][1::3]})

    def test_faults(self):
        reason = "ranking is no list of two or more answers"
        for wrong in ("ab", [], ["a"], {"a": 1}):
            self.refuse(reason, {"prompt": "Q:", "ranking": wrong})
        for kind in ("pairs", "rankings"):
            # Also where the two are in different pairs.
            row = ranking("Q:", "a", "b", "a", "c")
            self.refuse("equal answers", row, kind=kind)
            self.refuse("empty answer", ranking("Q:", "a", "b", " "), kind=kind)
            self.refuse("value is None", ranking("Q:", "a", "b", None), kind=kind)
        self.refuse("missing column", {"ranking": ["a", "b"]})
        # A pair's other columns are its own matter.
        self.assertEqual(len(read_rows({**pair(), "ranking": 3})), 1)
        # One answer that can't be used: none of the row is.
        rows = [ranking("Q:", "a", "b", "c</s>", "c"), pair("R:")]
        for kind, count in (("pairs", 1), ("rankings", 1)):
            dataset = make(rows, kind=kind, max_bad_rows=1)
            self.assertEqual((len(dataset), dataset.num_rows), (count, 2))
            self.assertEqual(dataset.skipped, {"equal answers": 1})

    def test_rows_are_held_out_whole(self):
        for kind in ("pairs", "rankings"):
            dataset = make(random_rankings(12), kind=kind)
            for fraction in (0.01, 0.2, 0.5):
                train, valid = dataset.hold_out(fraction, seed=2)
                self.assertEqual(train.num_rows + valid.num_rows, 12)
                rows = lambda part: {part.source_row(i) for i in range(len(part))}
                self.assertFalse(rows(train) & rows(valid))
                self.assertEqual(len(rows(train) | rows(valid)), 12)
        # One prompt for all: rows stay whole nevertheless.
        rows = [ranking("Q:", f"{i}a", f"{i}b", f"{i}c") for i in range(4)]
        train, valid = make(rows).hold_out(0.1)
        self.assertEqual((len(train), len(valid)), (9, 3))
        one = make(rows[:1])
        self.assertEqual(one.hold_out(0.5), (one, []))


class TestRankings(unittest.TestCase):
    def test_places(self):
        rows = [ranking("Q:", *"abcde"), ranking("R:", *"fg"), pair("S:", "h", "i")]
        dataset = make([*rows, ranking("T:", *"jklm")], kind="rankings")
        self.assertEqual(dataset.group_size, 3)
        expected = [("Q:", "a", "b"), ("Q:", "c", "d"), ("Q:", "a", "e")]
        expected += [("R:", "f", "g")] * 3 + [("S:", "h", "i")] * 3
        expected += [("T:", "j", "k"), ("T:", "l", "m"), ("T:", "j", "k")]
        self.assertEqual(texts(dataset), expected)
        self.assertEqual(
            dataset.values["places"].tolist(),
            [[0, 1], [2, 3], [-1, 4]]
            + [[0, 1], [-1, -1], [-1, -1]] * 2
            + [[0, 1], [2, 3], [-1, -1]],
        )
        # Each ranking counts the same, whatever its length.
        third = np.float32(1 / 3)
        weights = [third, third, third, 1, 0, 0, 1, 0, 0, 0.5, 0.5, 0]
        self.assertEqual(dataset.values["weights"].tolist(), weights)
        # Pairs alone are rankings of two.
        pairs = make([pair(), pair("R:")], kind="rankings")
        self.assertEqual(pairs.group_size, 1)
        self.assertEqual(pairs.values["places"].tolist(), [[0, 1]] * 2)

    def test_copies_are_not_counted(self):
        rows = [ranking("Q:", *"abcdef"), ranking("R:", "x" * 99, "y")]
        summary = make(rows, max_length=20, kind="rankings").summary()
        self.assertIn("Cut to 20 tokens: 1 pair.", summary)

    def test_select_and_concatenate(self):
        long = make([ranking("Q:", *"abcd"), ranking("R:", *"ef")], kind="rankings")
        short = make([pair("S:", "g", "h")], kind="rankings")
        self.assertEqual(texts(long.select([2, 3])), [("R:", "e", "f")] * 2)
        for wrong in ([0], [1, 2], [0, 2], [1, 0]):
            with self.assertRaisesRegex(ValueError, "^Select"):
                long.select(wrong)
        both = PreferenceDataset.concatenate([short, long, short])
        self.assertEqual(both.group_size, 2)
        self.assertEqual(
            [prompt[0] for prompt, *_ in texts(both)], ["S", "S", *"QQRR", "S", "S"]
        )
        expected = [[0, 1], [-1, -1], [0, 1], [2, 3], [0, 1], [-1, -1]]
        expected += [[0, 1], [-1, -1]]
        self.assertEqual(both.values["places"].tolist(), expected)
        self.assertEqual(len(set(both._columns.rows.tolist())), 4)
        wide = short.concatenate([short])
        wide._columns = short._columns.regroup(3)
        self.assertEqual(texts(wide), texts(short) * 3)
        self.assertEqual(wide.values["places"].tolist(), [[0, 1], [-1, -1], [-1, -1]])
        self.assertIs(wide._columns.regroup(3), wide._columns)
        self.assertEqual(short.values["places"].tolist(), [[0, 1]])

    def test_all_sets_have_the_longest(self):
        with tempfile.TemporaryDirectory() as folder:
            for name, answers in (("train", "abc"), ("valid", "ab"), ("test", "abcde")):
                text = json.dumps(ranking("Q:", *answers))
                Path(folder, f"{name}.jsonl").write_text(text)
            options = {"test": True, "kind": "rankings", "token_cache": False}
            with contextlib.redirect_stdout(io.StringIO()):
                sets = load_preference_dataset(folder, make_tokenizer(), **options)
        self.assertEqual([s.group_size for s in sets], [3, 3, 3])
        self.assertEqual([len(s) for s in sets], [3, 3, 3])


class TestBatches(unittest.TestCase):
    def setUp(self):
        self.dataset = make(random_rankings(30), kind="rankings")
        self.assertEqual(self.dataset.group_size, 3)

    def test_plan_keeps_groups(self):
        for grade in ("ragged", "equal", "plain", "packed"):
            plan = plan_batches(self.dataset, 6, grade, min_batches=1)
            with self.subTest(grade=grade):
                self.assertGreater(len(plan), 1)
                found = np.concatenate([b.indices for b in plan])
                self.assertEqual(sorted(found), list(range(90)))
                for _, indices in plan:
                    groups = indices.reshape(-1, 3)
                    self.assertTrue((groups[:, 0] % 3 == 0).all())
                    self.assertTrue((np.diff(groups) == 1).all())
        lengths = self.dataset.pair_lengths()
        unread = _Unread(lengths, self.dataset)
        self.assertEqual(
            str(plan_batches(unread, 6)), str(plan_batches(self.dataset, 6))
        )
        with self.assertRaisesRegex(ValueError, "multiple of 3: the longest ranking"):
            plan_batches(self.dataset, 4)
        # Less padding than one shape for all.
        one = plan_batches(self.dataset, 6, max_shapes=1)
        more = plan_batches(self.dataset, 6, min_batches=1)
        self.assertLess(padded_tokens(more, 6), padded_tokens(one, 6))

    def test_groups_are_as_long_as_their_longest_pair(self):
        short, long = [3, 5, 5], [3, 60, 50]
        lengths = np.array([short, short, short, long] * 4)
        plan = length_buckets(lengths, 2, min_batches=1, group=2)
        found = [(shape.width, indices.tolist()) for shape, indices in plan]
        even, odd = [0, 1, 4, 5, 8, 9, 12, 13], [2, 3, 6, 7, 10, 11, 14, 15]
        self.assertEqual(found, [(4, even), (59, odd)])

    def test_a_ranking_is_on_one_rank(self):
        plan = plan_batches(self.dataset, 12, "ragged", min_batches=1, ranks=2)
        seen = []
        for rank in range(2):
            group = FakeGroup(rank, 2)
            for indices, batch in iterate_preference_batches(
                self.dataset, 12, plan, seed=3, comm_group=group
            ):
                self.assertEqual(len(indices), 6)
                weights = np.array(batch["weights"])
                places = np.array(batch["places"]).reshape(2, -1).T
                real = np.array(indices)[weights > 0]
                np.testing.assert_array_equal(
                    places[weights > 0], self.dataset.values["places"][real]
                )
                # Filling counts nowhere.
                self.assertTrue((places[weights == 0] == -1).all())
                whole = weights.reshape(-1, 3)[:, 0] > 0
                groups = np.array(indices).reshape(-1, 3)[whole]
                self.assertTrue((groups == groups[:, :1] + range(3)).all())
                self.assertTrue((groups[:, 0] % 3 == 0).all())
                seen += real.tolist()
        counted = np.flatnonzero(self.dataset.values["weights"])
        self.assertEqual(sorted(seen), counted.tolist())

    def test_nothing_left_for_a_rank(self):
        few = self.dataset.select(range(3))
        plan = plan_batches(few, 6, min_batches=1, ranks=2)
        (found,) = iterate_preference_batches(few, 6, plan, comm_group=FakeGroup(1, 2))
        self.assertEqual(found.arrays["weights"].tolist(), [0] * 3)
        self.assertEqual(found.arrays["places"].tolist(), [-1] * 6)
        self.assertEqual(found.indices, [0, 1, 2])

    def test_order(self):
        plan = plan_batches(self.dataset, 6, min_batches=1)
        first = epoch_batches(plan, 6, seed=1, epoch=0, group=3)
        self.assertNotEqual(first, epoch_batches(plan, 6, seed=1, epoch=1, group=3))
        found = [i for _, indices in first for i in indices]
        self.assertEqual(sorted(found), list(range(90)))
        self.assertTrue((np.diff(np.reshape(found, (-1, 3))) == 1).all())
        with self.assertRaisesRegex(ValueError, "multiple of 3: the longest ranking"):
            next(iterate_preference_batches(self.dataset, 4))
        default = list(iterate_preference_batches(self.dataset, 6))
        counted = sum(int((b["weights"] > 0).sum()) for _, b in default)
        self.assertEqual(counted, np.count_nonzero(self.dataset.values["weights"]))


class TestShortRankings(unittest.TestCase):
    def test_a_short_ranking_counts_as_much_as_a_long_one(self):
        rows = [{"prompt": "A", "ranking": [" 1", " 2", " 3", " 4"]}]
        rows += [{"prompt": "B", "ranking": [" 5", " 6"]}]
        dataset = make(rows, kind="rankings")
        self.assertEqual(dataset.group_size, 2)
        self.assertEqual(dataset.values["weights"].tolist(), [0.5, 0.5, 1, 0])
        ((indices, batch),) = iterate_preference_batches(dataset, 4)
        weights = np.array(batch["weights"])[np.argsort(indices)]
        np.testing.assert_allclose(weights, [0.5, 0.5, 1, 0], rtol=1e-6)

    def test_whatever_else_is_in_its_batch(self):
        objective = Objective(0.3, "plackett_luce")
        for weigh in (None, "w"):
            rows = [{**row, "w": 1 + i % 3} for i, row in enumerate(random_rankings(7))]
            dataset = make(rows, kind="rankings", weight_feature=weigh)
            model = tiny_model(vocab_size=len(dataset.tokenizer))
            reference = FrozenStart(model)
            model.update(tree_map(lambda x: 1.1 * x, model.trainable_parameters()))
            start = model.trainable_parameters()

            def step(batch):
                model.update(start)
                loss, metrics = dpo_step(
                    *(model, reference, batch, optim.SGD(1.0)), objective=objective
                )
                ends = zip(*map(tree_flatten, (start, model.trainable_parameters())))
                moves = [np.array(now - then) for (_, then), (_, now) in ends]
                return metrics["loss"].item(), loss.item(), *moves

            batches = lambda part, n: iterate_preference_batches(part, 3 * n)
            parts = [dataset.select(range(i, i + 3)) for i in range(0, 21, 3)]
            alone = [step(next(batches(part, 1)).arrays) for part in parts]
            weights = np.array([1 + i % 3 for i in range(7)]) if weigh else np.ones(7)
            for indices, batch in batches(dataset, 2):
                counted = np.array(batch["weights"]) > 0
                rows = {i // 3 for i in np.array(indices)[counted]}
                for i, found in enumerate(step(batch)):
                    shares = weights / weights.mean() / len(rows)
                    expected = sum(shares[row] * alone[row][i] for row in rows)
                    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


class TestTies(unittest.TestCase):
    def test_ties_are_not_bad(self):
        row = {"question": "q", "answer_0": "a", "answer_1": "b", "score_0": 1}
        rows = [{**row, "score_1": i % 2} for i in range(8)]
        dataset = PreferenceDataset(rows, make_tokenizer(), max_bad_rows=0)
        self.assertEqual((len(dataset), dataset.skipped["tie"]), (4, 4))


if __name__ == "__main__":
    unittest.main()
