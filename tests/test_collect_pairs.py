# Copyright © 2026 MLX Contributors

import json
import re
import tempfile
import unittest
from dataclasses import asdict
from pathlib import Path

import numpy as np
from collecting import answers, collect, read_lines, save_answers
from folders import FolderCase
from test_dpo_command import command
from test_folder_lock import content
from tiny import save_rows, save_tiny_model

from mlx_lm import load
from mlx_lm.preference.collect.answers import read_answers
from mlx_lm.preference.collect.labels import Label, append_label
from mlx_lm.tuner.datasets import PreferenceDataset


def text(row, name):
    return row[name][0]["content"]


class PairsCase(FolderCase):
    def pairs(self, rows, labels, *options):
        """The pairs of some answers and labels, (chosen, rejected), and the output."""
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        save_answers(folder, *rows)
        for label in labels:
            append_label(folder, label)
        options = options or ("--pairs", "best")
        code, out, err = collect("--output", folder, *options)
        self.assertEqual(code, 0, err)
        self.rows = read_lines(folder / "train.jsonl")
        self.rows += read_lines(folder / "valid.jsonl")
        return [(text(r, "chosen"), text(r, "rejected")) for r in self.rows], out


def scored(number, *scores, judge="a", **more):
    return Label(f"p{number}", judge, "scores", scores=list(scores), **more)


class TestPairs(PairsCase):
    def test_best_against_worst(self):
        rows = [answers(1, "mid", "best", "worst")]
        found, out = self.pairs(rows, [scored(1, 2, 3, 1)])
        self.assertEqual(found, [("best", "worst")])
        (row,) = self.rows
        self.assertEqual(row["chosen_tokens"], rows[0].responses[1].tokens)
        self.assertEqual(row["rejected_tokens"], rows[0].responses[2].tokens)
        self.assertEqual(row["prompt"], rows[0].prompt)
        self.assertIn("1 pair of 1 prompt", out)

    def test_what_is_left_out_is_counted(self):
        rows = [answers(i, "a", "b") for i in range(4)]
        rows += [answers(4, "a"), answers(5, "", "b"), answers(6, "a", "b", cut=[0])]
        rows += [answers(7, "a", "b"), answers(8, "a", " a".strip(), cut=[0])]
        labels = [
            Label("p0", "a", "tie"),
            Label("p1", "a", "bad"),
            Label("p2", "a", "none", why="it hung"),
            *(scored(i, 2, 1) for i in (5, 6, 7)),
            scored(8, 1, 2),
        ]
        found, out = self.pairs(rows, labels)
        self.assertEqual(found, [("a", "b")])
        for reason in (
            "1 tied",
            "1 all bad",
            "1 without a verdict",
            "1 not labelled",
            "1 with one answer",
            "1 with an empty answer",
            "1 won by a cut answer",
            "1 with equal answers",
        ):
            self.assertIn(reason, out)

    def test_a_cut_answer_wins_over_no_finished_one(self):
        rows = [answers(1, "cut", "whole", "short", "late", cut=[0, 3])]
        labels = [scored(1, 4, 3, 2, 1)]
        # The widest pair that may be is cut over cut.
        self.assertEqual(self.pairs(rows, labels)[0], [("cut", "late")])
        found, _ = self.pairs(rows, labels, "--pairs", "all")
        self.assertNotIn(("cut", "whole"), found)
        self.assertNotIn(("cut", "short"), found)
        self.assertEqual(len(found), 4)

    def test_people_before_programs(self):
        rows = [answers(1, "a", "b")]
        labels = [
            scored(1, 0, 1, judge="function:x.py:y"),
            scored(1, 0, 1, judge="model:m"),
            Label("p1", "human:anna", "ranking", ranking=[[0], [1]]),
        ]
        self.assertEqual(self.pairs(rows, labels)[0], [("a", "b")])
        # A person who skipped it says nothing.
        skipped = Label("p1", "human:anna", "none", why="skipped")
        self.assertEqual(self.pairs(rows, labels + [skipped])[0], [("b", "a")])

    def test_a_reward_does_not_overrule_what_it_learned_from(self):
        rows, reward = [answers(1, "a", "b")], scored(1, 0, 9, judge="reward")
        self.assertEqual(self.pairs(rows, [reward])[0], [("b", "a")])
        labels = [reward, scored(1, 1, 0, judge="function:x.py:y")]
        self.assertEqual(self.pairs(rows, labels)[0], [("a", "b")])

    def test_a_reward_is_not_for_length(self):
        rng = np.random.default_rng(0)
        rows, labels = [], []
        for i in range(40):
            lengths = rng.choice(12, 3, replace=False) + 1
            texts = ["a " * (n - 1) + f"b{k}" for k, n in enumerate(lengths)]
            rows.append(answers(i, *texts))
            tokens = np.array([len(one.tokens) for one in rows[-1].responses])
            scores = (rng.normal(size=3) + 0.8 * tokens).round(6).tolist()
            labels.append(scored(i, *scores, judge="reward"))
        found, out = self.pairs(rows, labels, "--pairs", "best")
        longer = lambda: np.mean(
            [len(x["chosen_tokens"]) - len(x["rejected_tokens"]) for x in self.rows]
        )
        self.assertLess(abs(longer()), 0.5)
        penalty = float(re.search(r"costs (\S+) nats", out)[1])
        self.assertAlmostEqual(penalty, 0.8, delta=0.2)
        # The answers that are best without what their length brought.
        gaps = []
        for cost in np.linspace(0, 2, 2001):
            gap = 0
            for row, label in zip(rows, labels):
                n = np.array([len(one.tokens) for one in row.responses])
                left = np.array(label.scores) - cost * n
                gap += n[left.argmax()] - n[left.argmin()]
            gaps.append(abs(gap) / len(rows))
        self.assertAlmostEqual(abs(longer()), min(gaps))
        # As asked for, and as the judge has it.
        _, out = self.pairs(rows, labels, "--length-penalty", "0.3")
        self.assertIn("costs 0.3000 nats.", out)
        self.pairs(rows, labels, "--length-penalty", "0")
        self.assertGreater(longer(), 5)
        # Where others have judged, it counts nothing.
        others = [scored(i, 1, 0, 0) for i in range(40)]
        self.assertNotIn("costs", self.pairs(rows, labels + others)[1])

    def test_scores_that_are_missing(self):
        rows = [answers(1, "a", "", "c"), answers(2, "a", "")]
        labels = [scored(1, 1, None, 2), scored(2, 1, None)]
        self.assertEqual(self.pairs(rows, labels)[0], [("c", "a")])

    def test_mean_of_ranks(self):
        rows = [answers(1, "a", "b", "c")]
        labels = [
            scored(1, 9, 8, 0, judge="x"),
            scored(1, 1, 5, 3, judge="y"),
            # Of two only: it moves these two alone.
            Label("p1", "z", "ranking", ranking=[[1], [0]]),
        ]
        # Places around 0: a -1 1 .5, b 0 -1 -.5, c 1 0.
        self.assertEqual(self.pairs(rows, labels)[0], [("b", "c")])
        self.assertEqual(self.rows[0]["agreement"], 1)

    def test_weight_is_how_sure_the_label_is(self):
        for said, expected in (
            # 2 p - 1; p is the mean of 1, 1, 0.
            ([(1, 0), (1, 0), (0, 1)], 1 / 3),
            # A tie is half.
            ([(1, 0), (1, 1)], 0.5),
            ([(1, 0)], 1),
        ):
            labels = [scored(1, *pair, judge=f"{i}") for i, pair in enumerate(said)]
            found, _ = self.pairs(
                [answers(1, "a", "b")], labels, "--weights", "agreement"
            )
            self.assertEqual(found, [("a", "b")])
            self.assertAlmostEqual(self.rows[0]["weight"], expected, places=5)
        sure = [scored(1, 1, 0, certainty=0.8), scored(1, 0, 1, judge="b")]
        found, out = self.pairs([answers(1, "a", "b")], sure, "--weights", "agreement")
        self.assertEqual((found, "1 tied" in out), ([], True))
        sure = [scored(1, 1, 0, certainty=0.8)]
        self.pairs([answers(1, "a", "b")], sure, "--weights", "agreement")
        self.assertAlmostEqual(self.rows[0]["weight"], 2 * 0.8 - 1)

    def test_an_edited_answer_is_chosen(self):
        edited = {"response": 0, "text": "better a"}
        rows = [answers(1, "a", "b")]
        for verdict, rejected in (
            (scored(1, 1, 0, judge="human:x", edited=edited), "b"),
            (scored(1, 0, 1, judge="human:x", edited=edited), "a"),
            (Label("p1", "human:x", "bad", edited=edited), "a"),
        ):
            found, _ = self.pairs(rows, [verdict], "--weights", "agreement")
            self.assertEqual(found, [("better a", rejected)])
            self.assertNotIn("chosen_tokens", self.rows[0])
            self.assertIn("rejected_tokens", self.rows[0])
        same = {"response": 0, "text": "a"}
        label = scored(1, 0, 1, judge="human:x", edited=same)
        self.assertEqual(self.pairs(rows, [label])[0], [("b", "a")])

    def test_prompts_are_on_one_side(self):
        rows, labels = [], []
        for number in range(60):
            for round_ in (0, 1):
                rows.append(answers(number, "a", "b", round=round_))
                labels.append(scored(number, 1, 0, round=round_))
        self.pairs(rows, labels)
        sides = {"train": set(), "valid": set()}
        (folder,) = self.folder.iterdir()
        for name, prompts in sides.items():
            for row in read_lines(folder / f"{name}.jsonl"):
                prompts.add(json.dumps(row["prompt"]))
        self.assertEqual(len(sides["train"]) + len(sides["valid"]), 60)
        self.assertTrue(0 < len(sides["valid"]) < 20)
        # More answers move no prompt to the other side.
        before = {name: set(prompts) for name, prompts in sides.items()}
        save_answers(folder, *(answers(i, "a", "b") for i in range(60, 90)))
        for i in range(60, 90):
            append_label(folder, scored(i, 1, 0))
        collect("--output", folder, "--pairs", "best")
        for name in sides:
            now = {
                json.dumps(r["prompt"]) for r in read_lines(folder / f"{name}.jsonl")
            }
            self.assertLessEqual(before[name], now)

    def test_export(self):
        save_answers(self.folder, *(answers(i, "a", "b") for i in range(30)))
        file = self.folder / "pairs.json"
        code, _, err = collect("--output", self.folder, "--export", file)
        self.assertEqual(code, 2)
        self.assertIn("label its answers first", err)
        for i in range(30):
            append_label(self.folder, scored(i, 1, 0))
        collect("--output", self.folder, "--export", file)
        rows = read_lines(file)
        self.assertEqual(len(rows), 30)
        self.assertEqual({*rows[0]}, {"prompt", "chosen", "rejected"})
        self.assertEqual(rows[0]["prompt"][0]["role"], "user")

    def refused(self, pattern, *options):
        """One line, and not a byte has changed."""
        before = content(self.folder)
        code, _, err = collect("--output", self.folder, *options)
        self.assertEqual(code, 2, err)
        self.assertRegex(err, rf"\AError: .*{pattern}.*\n\Z")
        self.assertEqual(content(self.folder), before)

    def test_nothing_but_pairs_is_overwritten(self):
        save_answers(self.folder, answers(1, "a", "b"))
        append_label(self.folder, scored(1, 1, 0))
        own = ("answers.jsonl", "labels.jsonl", "train.jsonl", "valid.jsonl")
        for name in own:
            self.refused("used by this command", "--export", self.folder / name)
        # Neither what is read nor what somebody else wrote.
        prompts, judge = self.folder / "prompts.jsonl", self.folder / "judge.py"
        prompts.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
        judge.write_text("def score(prompt, responses, row):\n    return [1, 0]\n")
        options = "--label", f"function:{judge}:score", "--prompts", prompts
        for path in (prompts, judge):
            before = path.read_bytes()
            self.refused("used by this command", *options, "--export", path)
            if path == judge:
                self.refused("something else than pairs", "--export", path)
            self.assertEqual(path.read_bytes(), before)
        file = self.folder / "export.jsonl"
        for text in ("", '{"chosen": "a", "rejected": "b"}\n'):
            file.write_text(text)
            self.assertEqual(
                collect("--output", self.folder, "--export", file)[0], 0, text
            )
        for name in ("train.jsonl", "valid.jsonl"):
            save_rows(self.folder, names=[name.partition(".")[0]])
            for options in (["--pairs", "all"], ["--label", "human"]):
                self.refused("holds no pairs of this command", *options)
            (self.folder / name).unlink()
        for _ in range(2):
            self.assertEqual(collect("--output", self.folder, "--pairs", "all")[0], 0)

    def test_things_in_the_way_get_one_line(self):
        prompts, data = self.folder / "prompts.txt", self.folder / "data"
        prompts.write_text("Say tea.\n")
        (data / "answers.jsonl").mkdir(parents=True)
        save_tiny_model(self.folder / "model")
        given = "--prompts", prompts, "--model", self.folder / "model"
        for output, said in (
            (data, "Can't read .*answers.jsonl: Is a directory"),
            (prompts, ".*prompts.txt is no folder: name another one with --output"),
        ):
            code, _, err = collect("--output", output, *given)
            self.assertEqual(code, 2)
            self.assertRegex(err, rf"\AError: {said}.*\n\Z")
        self.assertEqual(prompts.read_text(), "Say tea.\n")

    def test_lines_that_are_no_answers(self):
        whole = asdict(answers(1, "a", "b"))
        response = whole["responses"][0]
        for fault in (
            {"row": 5},
            {"prompt": 5},
            {"prompt": [5]},
            {"prompt": []},
            {"responses": 5},
            {"responses": [{"text": "a"}]},
            {"responses": [response | {"tokens": None}]},
            {"responses": [response | {"tokens": ["a"]}]},
            {"responses": [response | {"logps": "a"}]},
            {"sampled": None},
            {"sampling": 5},
            {"more": 1},
        ):
            with self.subTest(fault):
                line = json.dumps(whole | fault)
                (self.folder / "answers.jsonl").write_text(line + "\n")
                self.refused("answers.jsonl:1 is no line of answers", "--pairs", "all")


class TestFolderIsData(PairsCase):
    """What is collected trains, is tested and inspected as it is."""

    def test_trains_on_the_tokens_that_were_generated(self):
        model = save_tiny_model(self.folder / "model", max_position_embeddings=2048)
        data = self.folder / "data"
        save_answers(
            data,
            *(answers(i, f"the answer {i}", "in", "no", cut=[1]) for i in range(40)),
        )
        for i in range(40):
            append_label(data, scored(i, 3, 1, 2))
        for kind, loss in (("ranking", "plackett_luce"), ("best", "sigmoid")):
            if kind == "ranking":
                code, _, err = command("--model", model, "--data", data, "--train")
                self.assertEqual(code, 2)
                self.assertIn("no pairs of them yet: label them", err)
            code, _, err = collect("--output", data, "--pairs", kind)
            self.assertEqual(code, 0, err)
            own = ["--model", model, "--data", data, "--adapter-path"]
            own.append(self.folder / kind)
            options = ["--iters", "2", "--num-layers", "1", "--batch-size", "2"]
            code, out, err = command(*own, *options, "--train", "--loss-type", loss)
            self.assertEqual(code, 0, err)
            # What is said of a slow BLAS is the machine's.
            out = "".join(x for x in out.splitlines(True) if "BLAS" not in x)
            for sign in ("[WARNING]", "Skipped", "not read"):
                self.assertNotIn(sign, out)
        code, out, err = command(*own, "--inspect", "1", "--test")
        self.assertEqual(code, 0, err)
        self.assertIn("reward accuracy", out)
        # A cut answer has no end, and is trained on without.
        chosen, _, rejected = out.partition("rejected, scored")
        self.assertIn("</s>", chosen.split("chosen, scored")[1])
        self.assertIn("in", rejected)
        self.assertNotIn("</s>", rejected)

    def test_ids_are_those_of_generation(self):
        model = save_tiny_model(self.folder / "model", max_position_embeddings=2048)
        data, prompts = self.folder / "data", self.folder / "prompts.txt"
        prompts.write_text("".join(f"What is {i}?\n" for i in range(6)))
        code, _, err = collect(
            *("--model", model, "--prompts", prompts, "--output", data),
            *("--samples", 3, "--max-tokens", 12),
        )
        self.assertEqual(code, 0, err)
        judge = self.folder / "judge.py"
        judge.write_text("def f(p, responses, row): return [len(r) for r in responses]")
        code, _, err = collect("--label", f"function:{judge}:f", "--output", data)
        self.assertEqual(code, 0, err)
        sampled = {tuple(one.tokens) for x in read_answers(data) for one in x.responses}
        _, tokenizer = load(str(model))
        rows = read_lines(data / "train.jsonl") + read_lines(data / "valid.jsonl")
        pairs = PreferenceDataset(rows, tokenizer)
        self.assertGreater(len(pairs), 3)
        for row, (prompt, chosen, rejected, _) in zip(rows, pairs, strict=True):
            self.assertEqual(
                prompt.tolist(),
                tokenizer.apply_chat_template(
                    row["prompt"], add_generation_prompt=True
                ),
            )
            self.assertIn(tuple(chosen.tolist()), sampled)
            self.assertIn(tuple(rejected.tolist()), sampled)

    def test_labels_that_may_be_wrong_are_listed(self):
        model = save_tiny_model(self.folder / "model", max_position_embeddings=2048)
        data = self.folder / "data"
        save_answers(data, *(answers(i, "tea", "oh, the tea") for i in range(60)))
        for i in range(60):
            append_label(data, scored(i, 1, 0))
        run = self.folder / "a run"
        own = ["--model", model, "--data", data, "--adapter-path", run]
        collect("--output", data, "--pairs", "best")
        options = ["--train", "--iters", "20", "--learning-rate", "3e-2"]
        code, out, err = command(*own, *options, "--beta", "1", "--test")
        self.assertEqual(code, 0, err)
        review = run / "review.jsonl"
        self.assertFalse(review.exists(), out)
        # One label of those held out is turned round, another is in doubt.
        held = [row["id"] for row in read_lines(data / "valid.jsonl")]
        wrong, doubted = (int(name[1:]) for name in held[:2])
        append_label(data, scored(wrong, 0, 1))
        labels = [scored(doubted, 1, 0, judge=x) for x in "bc"]
        for label in [*labels, scored(doubted, 0, 1, judge="d")]:
            append_label(data, label)
        collect("--output", data, "--pairs", "best")
        code, out, err = command(*own, "--inspect", "1")
        self.assertEqual(code, 0, err)
        found = {row["id"]: row["why"] for row in read_lines(review)}
        self.assertEqual({*found}, set(held[:2]))
        self.assertIn("the policy gives the label", found[held[0]])
        self.assertEqual(found[held[1]], "75% of the judges agree with the label")
        self.assertIn(f"--output {data} --review '{run}'", out)
        self.assertIn(f"2 labels may be wrong:\n  {held[0]}: the policy gives", out)


if __name__ == "__main__":
    unittest.main()
