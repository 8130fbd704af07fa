# Copyright © 2026 MLX Contributors

import contextlib
import io
import json
import tempfile
import unittest
from pathlib import Path
from unittest import mock

import numpy as np
from byte_tokenizers import CHATML, make_tokenizer, pair, text_of
from test_dpo_command import CommandCase, metrics_of
from tiny import save_rows

from mlx_lm.preference.batch.buckets import check_batch_size
from mlx_lm.preference.batch.collate import iterate_preference_batches, value_arrays
from mlx_lm.preference.data import cache as token_cache
from mlx_lm.preference.data.content import RowFault
from mlx_lm.preference.data.options import check_criteria
from mlx_lm.preference.data.shapes import criteria_names, read_rows
from mlx_lm.preference.data.table import ColumnsBuilder, TokenColumns, choose_held_out
from mlx_lm.preference.data.tokenizer import TokenPair
from mlx_lm.preference.errors import InputError
from mlx_lm.preference.run.checkpoint import data_fingerprint
from mlx_lm.tuner.datasets import PreferenceDataset, load_preference_dataset

USER = [{"role": "user", "content": "Hi"}]


def label(prompt, completion, value):
    return {"prompt": prompt, "completion": completion, "label": value}


def texts(dataset):
    return [
        tuple(text_of(dataset.tokenizer, ids).removesuffix("</s>") for ids in item[:3])
        for item in dataset
    ]


def make(rows, tokenizer=None, max_length=64, **options):
    tokenizer = tokenizer or make_tokenizer()
    return PreferenceDataset(rows, tokenizer, max_length, **options)


class Faults(unittest.TestCase):
    def refuse(self, reason, row, **options):
        with self.assertRaises(RowFault) as caught:
            read_rows(row, **options)
        self.assertEqual(caught.exception.reason, reason)


class TestWeights(Faults):
    def test_weights_and_margins(self):
        rows = [
            {**pair(), "w": 2, "gap": -1.5},
            {**pair("R:"), "w": 0.25, "gap": 0},
            {**pair("S:"), "w": 0, "gap": 1},
        ]
        dataset = make(rows, weight_feature="w", margin_feature="gap", max_bad_rows=0)
        self.assertEqual(dataset.values["weights"].tolist(), [2.0, 0.25])
        self.assertEqual(dataset.values["margins"].tolist(), [-1.5, 0.0])
        self.assertEqual(dataset.values["margins"].dtype, np.float32)
        # Of weight 0 is left out by rule, like a tie.
        self.assertEqual(dataset.skipped, {"weight 0": 1})
        self.assertEqual(dataset.select([1]).values["weights"].tolist(), [0.25])
        plain = make([pair("T:")])
        both = PreferenceDataset.concatenate([plain, dataset])
        self.assertEqual(both.values["weights"].tolist(), [1, 2, 0.25])
        self.assertEqual(both.values["margins"].tolist(), [0, -1.5, 0])
        # Nobody asked for them.
        self.assertEqual(make(rows).values, {})

    def test_numbers_that_are_none(self):
        nan, inf = float("nan"), float("inf")
        for value in (nan, inf, 10**400, "1", True, [1]):
            for name in ("weight_feature", "margin_feature"):
                self.refuse("not a number", {**pair(), "w": value}, **{name: "w"})
        self.refuse("weight is negative", {**pair(), "w": -1}, weight_feature="w")
        self.refuse("value is None", {**pair(), "w": None}, weight_feature="w")
        self.refuse("missing column", pair(), weight_feature="w")
        self.refuse("weight 0", {**pair(), "w": 1e-50}, weight_feature="w")
        rows = [{**pair(), "w": 1}] * 8 + [{**pair(), "w": -1}] * 2
        with self.assertRaisesRegex(ValueError, "2 of 10 rows are bad.*negative"):
            make(rows, weight_feature="w")

    def test_strengths(self):
        row = {"prompt": "Hi", "response_1": "a", "response_2": "b"}
        for strength, chosen in ((-2, "a"), (3, "b")):
            signed = {**row, "preference_strength": strength}
            for name in ("weight", "margin"):
                options = {f"{name}_feature": "preference_strength"}
                (found,) = read_rows(signed, **options)
                self.assertEqual(found.chosen[0]["content"], chosen)
                self.assertEqual(found.values, {f"{name}s": abs(strength)})
            self.assertEqual(read_rows(signed)[0].values, {})
        turns = "Hi\n<extra_id_1>Assistant\nHo\n<extra_id_1>User\nHa"
        (found,) = read_rows({**row, "prompt": turns, "preference_strength": 1})
        said = [(message["role"], message["content"]) for message in found.prompt]
        self.assertEqual(said, [("user", "Hi"), ("assistant", "Ho"), ("user", "Ha")])
        self.refuse("tie", {**row, "preference_strength": 0})
        self.refuse("not a number", {**row, "preference_strength": "much"})

    def test_fingerprint_of_a_run(self):
        rows = [{**pair(f"{i}:"), "w": 1 + i, "gap": i} for i in range(3)]
        names = {"weight_feature": "w", "margin_feature": "gap"}
        start = data_fingerprint(make(rows, **names))
        self.assertEqual(start, data_fingerprint(make(rows, **names)))
        for name in ("w", "gap"):
            changed = [*rows[:2], {**rows[2], name: 9}]
            self.assertNotEqual(start, data_fingerprint(make(changed, **names)))
            self.assertEqual(
                data_fingerprint(make(rows)), data_fingerprint(make(changed))
            )

    def test_token_cache(self):
        rows = [{**pair(f"{i}:"), "w": 1 + i} for i in range(9)]
        rows[4] = {"prompt": "4:", "ranking": [" a", " b", " c"], "w": 3}
        patch = mock.patch.object(token_cache, "MIN_ROWS", 5)
        with tempfile.TemporaryDirectory() as folder, patch:
            files = lambda: len(list(Path(folder).iterdir()))
            for number, options in enumerate(
                [
                    {},
                    {"weight_feature": "w"},
                    {"margin_feature": "w"},
                    {"kind": "rankings"},
                    {"kind": "rankings", "weight_feature": "w"},
                ]
            ):
                first = make(rows, token_cache=folder, **options)
                self.assertEqual(files(), number + 1)
                name = "mlx_lm.preference.data.tokenize.tokenize_rows"
                with mock.patch(name, side_effect=AssertionError):
                    again = make(rows, token_cache=folder, **options)
                self.assertEqual(texts(again), texts(first))
                self.assertEqual(again.group_size, first.group_size)
                self.assertEqual(again.summary(), first.summary())
                self.assertEqual(again.values.keys(), first.values.keys())
                for key, values in first.values.items():
                    np.testing.assert_array_equal(values, again.values[key])
                self.assertEqual(data_fingerprint(again), data_fingerprint(first))
            rows = [r for r in rows if "chosen" in r]
            first = make(rows, token_cache=folder, kind="labels")
            with mock.patch(name, side_effect=AssertionError):
                again = make(rows, token_cache=folder, kind="labels")
            self.assertEqual(texts(again), texts(first))

    def test_settings_reach_the_data(self):
        rows = [{**pair(f"{i}:"), "w": 2} for i in range(4)]
        with tempfile.TemporaryDirectory() as folder:
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            Path(folder, "train.jsonl").write_text(lines)
            load = lambda **options: load_preference_dataset(
                folder, make_tokenizer(), token_cache=False, **options
            )
            with contextlib.redirect_stdout(io.StringIO()):
                train, valid, _ = load(weight_feature="w", margin_feature="w")
                self.assertEqual(valid.values["margins"].tolist(), [2])
                self.assertEqual(train.values["weights"].tolist(), [2] * 3)
                train, valid, _ = load(kind="labels", valid_fraction=0.25)
                self.assertEqual(train.values.keys(), {"labels"})
                self.assertEqual((len(train), len(valid)), (4, 4))
                with self.assertRaisesRegex(ValueError, "no row has the criterion"):
                    load(criteria={"x": 1})


class TestCriteria(Faults):
    WEIGHTS = {"helpful": 1.0, "honest": 0.5}

    def read(self, row, criteria=None, **options):
        found = read_rows(row, criteria=criteria or self.WEIGHTS, **options)
        return [(r.chosen, r.rejected, r.values["weights"]) for r in found]

    def test_pairs(self):
        row = {
            "prompt": "Q:",
            "criteria": {
                "helpful": {"chosen": " a", "rejected": " b"},
                "honest": {"chosen": " b", "rejected": " c"},
                "funny": {"chosen": " c", "rejected": " a"},
            },
            "w": 3,
        }
        self.assertEqual(self.read(row), [(" a", " b", 1.0), (" b", " c", 0.5)])
        weighted = self.read(row, weight_feature="w")
        self.assertEqual(weighted, [(" a", " b", 3.0), (" b", " c", 1.5)])
        dataset = make([row, pair("R:")], criteria=self.WEIGHTS)
        self.assertEqual(dataset.values["weights"].tolist(), [1, 0.5, 1])
        self.assertIn(": 3 pairs of 2 rows", dataset.summary()[0])
        self.assertEqual([dataset.source_row(i) for i in range(3)], [0, 0, 1])
        # A table has all columns in every row.
        row["criteria"]["helpful"] = None
        self.assertEqual(self.read(row), [(" b", " c", 0.5)])
        self.assertEqual(criteria_names(row), {"honest", "funny"})

    def test_scores(self):
        row = {"prompt": "Q:", "responses": [" a", " b", " c"]}
        row["criteria"] = {"helpful": [3, None, 1.5], "honest": [2, 2, 2]}
        # A tie is left out.
        self.assertEqual(self.read(row), [(" a", " c", 1.0)])
        two = {**row, "responses": [" a", " b"]}
        two["criteria"] = {"helpful": 1, "honest": [0, 0.5]}
        self.assertEqual(self.read(two), [(" b", " a", 1.0), (" b", " a", 0.5)])
        for reason, responses, value in (
            ("tie", [" a", " b"], [1, 1]),
            ("tie", [" a", " b"], [None, 1]),
            ("not one score for each response", [" a", " b"], [1]),
            ("score is not a number", [" a", " b"], [1, "2"]),
            ("score is not a number", [" a", " b"], [1, float("nan")]),
            ("criterion is no scores and no 0 or 1", [" a", " b", " c"], 1),
            ("criterion is no scores and no 0 or 1", [" a", " b"], 2),
            ("missing column", None, [1, 2]),
            ("wrong type", "[' a', ' b']", [1, 2]),
            ("criterion without chosen and rejected", None, {"chosen": " a"}),
        ):
            bad = {
                "prompt": "Q:",
                "responses": responses,
                "criteria": {"honest": value},
            }
            self.refuse(reason, bad, criteria=self.WEIGHTS)
        self.refuse("wrong type", {"prompt": "Q:", "criteria": [1]})

    def test_ultrafeedback(self):
        def answer(text, *ratings):
            names = ("helpfulness", "honesty")
            notes = {n: {"Rating": r} for n, r in zip(names, ratings)}
            return {"response": text, "annotations": notes, "model": "m"}

        row = {"instruction": "Hi", "models": ["m"], "source": "s"}
        row["completions"] = [answer("a", "4", "N/A"), answer("b", "2", "5")]
        row["completions"].append(answer("c", "1", "3"))
        weights = {"helpfulness": 2, "honesty": 0.5}
        yes = lambda text: [{"role": "assistant", "content": text}]
        self.assertEqual(
            self.read(row, weights),
            [(yes("a"), yes("c"), 2.0), (yes("b"), yes("c"), 0.5)],
        )
        dataset = make([row], make_tokenizer(CHATML), 128, criteria=weights)
        self.assertEqual((dataset.shape, dataset.format), ("UltraFeedback", "chat"))
        # Where the setting is missing, the row says so.
        self.refuse("criteria without weights", row)
        self.refuse("no known criterion", row, criteria=self.WEIGHTS)

    def test_published_criteria(self):
        answers = {"prompt": "Hi", "response_0": "a", "response_1": "b"}
        row = {**answers, "better_response_id": 0, "safer_response_id": 1}
        yes = lambda text: [{"role": "assistant", "content": text}]
        self.assertEqual([p.values for p in read_rows(row)], [{}])
        found = self.read(row, {"better": 1, "safer": 0.5})
        self.assertEqual(found, [(yes("a"), yes("b"), 1), (yes("b"), yes("a"), 0.5)])
        rated = {"prompt": "Hi", "response": "a", "helpfulness": 1, "coherence": 4}
        rows = [rated, {**rated, "response": "b", "helpfulness": 3, "coherence": 2}]
        rows += [{**rated, "prompt": "Ho"}, pair()]
        data = make(rows, make_tokenizer(CHATML), 128, max_bad_rows=0.4)
        self.assertEqual(data.num_rows, 3)
        self.assertEqual(data.skipped, {"one answer to its prompt": 1})
        self.assertEqual([p[1][:2] for p in texts(data)], ["b<", " y"])
        both = {"helpfulness": 1, "coherence": 2}
        names = ("response", "helpfulness", "coherence")
        lists = {name: [row[name] for row in rows[:2]] for name in names}
        for given in (rows[:2], [{"prompt": "Hi", **lists}]):
            data = make(given, make_tokenizer(CHATML), 128, criteria=both)
            self.assertEqual(data.values["weights"].tolist(), [1, 2])
            self.assertEqual([p[1][:2] for p in texts(data)], ["b<", "a<"])

    def test_unknown_names(self):
        rows = [{"prompt": "Q:", "responses": [" a", " b"], "criteria": {"funny": 1}}]
        with self.assertRaisesRegex(ValueError, "criterion 'helpful'.*are: 'funny'"):
            make(rows, criteria=self.WEIGHTS)
        check_criteria({"funny": 1})
        # What YAML reads as a number is a name.
        named = [{**rows[0], "criteria": {"1": [2, 3]}}]
        self.assertEqual(texts(make(named, criteria={1: 1})), [("Q:", " b", " a")])
        for wrong in ({}, {"funny": -1}, {"funny": None}, {"a": True}):
            with self.assertRaisesRegex(ValueError, "criteria needs a weight"):
                make(rows, criteria=wrong)
        with self.assertRaisesRegex(ValueError, "criteria must be a mapping"):
            make(rows, criteria=["funny"])
        with self.assertRaisesRegex(ValueError, "criteria belongs to pairs"):
            make(rows, criteria={"funny": 1}, kind="labels")
        with self.assertRaisesRegex(ValueError, "margin_feature belongs to pairs"):
            make(rows, margin_feature="m", kind="rankings")
        with self.assertRaisesRegex(ValueError, "kind must be one of"):
            make(rows, kind="unpaired")


class TestLabels(Faults):
    def test_rows_and_the_other_answer(self):
        rows = [
            label("A", "1", True),
            label("A", "2", 0),
            label("B", "3", 1),
            label("B", "4", False),
            label("A", "5", 1.0),
        ]
        dataset = make(rows, kind="labels", max_bad_rows=0)
        self.assertEqual(dataset.values["labels"].tolist(), [1, 0, 1, 0, 1])
        # Before the first come the last ones: 4 is the last answer to B.
        self.assertEqual(
            texts(dataset),
            [("A", "1", "4"), ("A", "2", "4"), ("B", "3", "2"), ("B", "4", "2")]
            + [("A", "5", "4")],
        )
        self.assertEqual(dataset.pair_lengths()[0].tolist(), [1, 3, 3])
        self.assertIn("5 answers of 5 rows", dataset.summary()[0])
        self.assertIn("desired  '1</s>'", dataset.preview())
        # Some of them alone get their other answers from among themselves.
        some = dataset.select([0, 1, 2])
        expected = [("A", "1", "3"), ("A", "2", "3"), ("B", "3", "2")]
        self.assertEqual(texts(some), expected)
        with self.assertRaisesRegex(ValueError, "All rows have the same prompt"):
            dataset.select([0, 4])

    def test_pairs_become_two_rows(self):
        rows = [pair("A", "1", "2"), pair("B", "3", "4"), label("C", "5", 0)]
        dataset = make(rows, kind="labels")
        # First the chosen answers of all rows, as TRL orders them.
        self.assertEqual(
            texts(dataset),
            [("A", "1", "4"), ("B", "3", "1"), ("C", "5", "3"), ("A", "2", "5")]
            + [("B", "4", "2")],
        )
        self.assertEqual(dataset.values["labels"].tolist(), [1, 1, 0, 0, 0])
        self.assertIn("5 answers of 3 rows", dataset.summary()[0])

    def test_equal_answers_are_fine(self):
        rows = [label("A", "yes", 1), label("B", "yes", 1)]
        self.assertEqual(
            texts(make(rows, kind="labels")), [("A", "yes", "yes"), ("B", "yes", "yes")]
        )

    def test_cut_for_each_prompt(self):
        rows = [label("123456", "abcdefgh", 1), label("1", "ABCDEFGHIJKLMN", 0)]
        dataset = make(rows, max_length=10, kind="labels")
        # Each answer anew, from its whole length.
        self.assertEqual(
            texts(dataset),
            [("123456", "abcd", "ABCD"), ("1", "ABCDEFGHI", "abcdefgh")],
        )
        self.assertEqual(dataset.pair_lengths().tolist(), [[6, 10, 10], [1, 10, 10]])
        self.assertIn("Cut to 10 tokens: 2 answers.", dataset.summary())

    def test_messages(self):
        tokenizer = make_tokenizer(CHATML)
        yes = [{"role": "assistant", "content": "yes"}]
        start = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
        other = [{"role": "user", "content": "Ho"}]
        for row in (
            label(USER, yes, True),
            label(USER, yes[0], True),
            label(USER, "yes", True),
            label(USER, USER + yes, True),
            label("Hi", USER + yes, True),
            {"completion": USER + yes, "label": True},
            {**label("Hi", "yes", True), "system": ""},
        ):
            with self.subTest(row=row):
                data = make([row, label(other, "-", 0)], tokenizer, kind="labels")
                self.assertEqual(
                    texts(data)[0], (start, "yes<|im_end|>\n", "-<|im_end|>\n")
                )
                self.assertEqual((data.shape, data.format), ("labelled", "chat"))
        wrapped = [label("Hi", "yes", 1), label("Ho", "-", 0)]
        data = make(wrapped, tokenizer, kind="labels", wrap_text=True)
        self.assertEqual(texts(data)[0][1], "yes<|im_end|>\n")

    def test_faults(self):
        self.refuse("value is None", label("A", "1", None), kind="labels")
        for value in ("yes", 2, -1, 0.5, float("nan"), [1]):
            self.refuse("label is not 0 or 1", label("A", "1", value), kind="labels")
        self.refuse("empty answer", label("A", " ", 1), kind="labels")
        self.refuse("no assistant answer", label("A", USER, 1), kind="labels")
        row = {"completion": "1", "label": 1}
        self.refuse("missing column", row, kind="labels")
        self.refuse(
            "labels need loss_type kto or apo_zero_unpaired", label("A", "1", 1)
        )
        row = {"prompt": "A", "ranking": ["1", "2"]}
        self.refuse("a ranking has no labels", row, kind="labels")
        rows = [label("A", "1", 1), label("B", "2", 1)]
        with self.assertRaisesRegex(ValueError, "loss_type kto"):
            make(rows)
        rows = [label("A", "1", 1), label("A", "2", 0)]
        with self.assertRaisesRegex(ValueError, "preference data: All rows have the"):
            make(rows, kind="labels")

    def test_hold_out(self):
        rows = [pair(f"{i // 2}:", f" yes{i}", f" no{i}") for i in range(12)]
        dataset = make(rows, kind="labels")
        train, valid = dataset.hold_out(0.05, seed=1)
        # Two prompts at least, each with all of its answers.
        self.assertEqual((len(train), len(valid)), (16, 8))
        self.assertEqual((train.num_rows, valid.num_rows), (8, 4))
        for part in (train, valid):
            prompts = {prompt for prompt, *_ in texts(part)}
            own = {answer: prompt for prompt, answer, _ in texts(part)}
            for prompt, _, other in texts(part):
                self.assertNotEqual(own[other], prompt)
            self.assertEqual(len(prompts), len(part) // 4)
        few = make(rows[:6], kind="labels")
        self.assertEqual(few.hold_out(0.1), (few, []))

    def test_choose_held_out(self):
        prompts, rows = [b"a", b"b", b"c", b"d"] * 2, [0, 1, 2, 3] * 2
        self.assertEqual(choose_held_out(prompts, rows, 7, two_prompts=True)[-1], 7)
        self.assertEqual(len(choose_held_out(prompts, rows, 7, two_prompts=True)), 4)
        # Rows stay whole even where one alone is too many.
        held = choose_held_out([b"a"] * 6, [0, 0, 0, 1, 1, 1], 2)
        self.assertIn(held, ([0, 1, 2], [3, 4, 5]))
        self.assertEqual(choose_held_out([b"a"] * 2, [0, 0], 1), [])


class TestAnswersAlone(CommandCase):
    """A loss that looks at each answer alone needs none to other prompts."""

    def test_of_one_prompt_in_every_layout(self):
        rows = [
            {"prompt": "Say it: ", "completion": word, "label": i % 3 > 0}
            for i, word in enumerate(
                "tea, pen and ink|hat|oak|a cup of it|sun".split("|")
            )
        ]
        save_rows(self.data, rows)
        found = {}
        for way in ("--share-prompt", "--no-share-prompt", "--pack"):
            self.succeed(
                *self.flags(
                    "--loss-type", "apo_zero_unpaired", "--steps-per-report", 1
                ),
                *("--batch-size", 1, "--iters", 5, "--learning-rate", 1e-2, way),
            )
            lines = metrics_of(self.adapters)
            self.assertEqual(lines[0]["val_loss"], 0.5)
            found[way] = [x["loss"] for x in lines if "loss" in x]
        first, *others = found.values()
        self.assertEqual(len(set(first)), 5)
        for losses in others:
            np.testing.assert_allclose(losses, first, rtol=1e-4)

    def test_only_where_nothing_is_compared(self):
        rows = [label("A", "x", 1), label("A", "y", 0)]
        with self.assertRaisesRegex(InputError, "All rows have the same prompt"):
            make(rows, kind="labels")
        alone = make(rows, kind="labels", mismatch=False)
        self.assertEqual([len(rejected) for _, _, rejected, _ in alone], [0, 0])


class TestColumns(unittest.TestCase):
    def test_mismatch_and_order(self):
        builder = ColumnsBuilder(4, keep_whole=True)
        for row, prompt, answer in ((0, 1, [5, 6, 7, 8, 9]), (0, 1, [3]), (1, 2, [4])):
            ids = [prompt], answer, [], [], "text", "text"
            builder.add(row, TokenPair(*ids), row, {"labels": row})
        columns = builder.finish()
        self.assertEqual(columns.kept.tolist(), [4, 1, 1])
        self.assertEqual(columns.lengths.tolist(), [[1, 4, 1], [1, 2, 1], [1, 2, 1]])
        ordered = columns.by_turns()
        self.assertEqual(ordered.rows.tolist(), [0, 1, 0])
        self.assertEqual(ordered.values["labels"].tolist(), [0, 1, 0])
        found = ordered.mismatch(3)
        self.assertEqual(
            [found.pair(i)[2].tolist() for i in range(3)], [[4], [5, 6], [4]]
        )
        self.assertEqual(found.lengths[:, 2].tolist(), [2, 3, 2])
        # Other columns, with ids of their own before them.
        builder = ColumnsBuilder(4)
        builder.add("x", TokenPair([9], [8], [7], [], "text", "text"))
        both = TokenColumns.concatenate([builder.finish(), found])
        others = [both.pair(i)[2].tolist() for i in range(4)]
        self.assertEqual(others, [[7], [4], [5, 6], [4]])
        self.assertEqual(both.rows.tolist(), [0, 1, 2, 1])
        self.assertEqual(both.values["labels"].tolist(), [1, 0, 1, 0])


class TestBatches(unittest.TestCase):
    def test_values_of_a_batch(self):
        rows = [{**pair(f"{i}:"), "w": 1 + i, "gap": i} for i in range(5)]
        dataset = make(rows, weight_feature="w", margin_feature="gap")
        found = list(iterate_preference_batches(dataset, 3))
        for (indices, batch), count in zip(found, (3, 2)):
            # Of the mean of the data set, which is 3.
            weights = [(1.0 + i) / 3 for i in indices[:count]] + [0.0] * (3 - count)
            np.testing.assert_allclose(batch["weights"], weights, rtol=1e-6)
            self.assertEqual(batch["margins"].tolist(), [float(i) for i in indices])
            self.assertNotIn("labels", batch)
        rows = [label("A", "1", 1), label("B", "2", 0), label("C", "3", 0)]
        ((indices, batch),) = iterate_preference_batches(make(rows, kind="labels"), 4)
        self.assertEqual(
            batch["labels"].tolist()[:3], [float(i == 0) for i in indices[:3]]
        )
        self.assertEqual(batch["weights"].tolist(), [1, 1, 1, 0])
        self.assertEqual(value_arrays(rows, [0], batch["weights"]), {})

    def test_batch_size(self):
        check_batch_size(12, 2, 3)
        for wrong in (0, 3, 8):
            with self.assertRaisesRegex(ValueError, "2 workers"):
                check_batch_size(wrong, 2, 3)


if __name__ == "__main__":
    unittest.main()
