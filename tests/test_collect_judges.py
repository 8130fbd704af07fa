# Copyright © 2026 MLX Contributors

import contextlib
import io
import re
import sys
import tempfile
import textwrap
import threading
import unittest
from pathlib import Path
from unittest import mock

import mlx.core as mx
import numpy as np
from collecting import TOKENIZER, answers, collect, read_lines, save_answers
from folders import FolderCase
from test_dpo_command import command
from tiny import ROWS, save_rows, save_tiny_model

import mlx_lm
from mlx_lm import load
from mlx_lm.preference.collect import progress
from mlx_lm.preference.collect.compare import compare, question
from mlx_lm.preference.collect.function import careful
from mlx_lm.preference.collect.labels import LABELS
from mlx_lm.preference.collect.local import ModelJudge
from mlx_lm.preference.errors import InputError

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
import judge_benchmark  # noqa: E402


class JudgesCase(FolderCase):
    def judged(self, text, *options, rows=None, name="judge"):
        """What a function says of answers: labels by prompt, code, out, err."""
        path = self.folder / "own.py"
        path.write_text(textwrap.dedent(text))
        data = Path(tempfile.mkdtemp(dir=self.folder))
        save_answers(data, *(rows or [answers(1, "long answer", "short")]))
        spec = f"function:{path}:{name}"
        result = collect("--label", spec, "--output", data, *options)
        labels = {line["id"]: line for line in read_lines(data / LABELS)}
        return labels, *result


class TestFunctions(JudgesCase):
    def test_what_it_is_given(self):
        rows = [answers(1, "a", "b", row={"key": "b"}), answers(2, "a", "b")]
        text = """
            def judge(prompt, responses, row):
                assert prompt[0]["content"].startswith("Question")
                prompt.clear(), row.setdefault("own", 1)
                if "key" not in row:
                    return None
                return [float(r == row["key"]) for r in responses]
        """
        labels, code, out, err = self.judged(text, rows=rows)
        self.assertEqual(code, 0, err)
        self.assertEqual(labels["p1"]["scores"], [0, 1])
        self.assertEqual(labels["p2"]["verdict"], "none")
        self.assertIn("1 prompt with a best answer, 1 without a verdict", out)

    def test_what_is_no_verdict_is_none_with_a_reason(self):
        for said, verdict, why in (
            ("[2, 1]", "scores", None),
            ("(True, False)", "scores", None),
            ("__import__('numpy').array([2.0, 1.0])", "scores", None),
            ("[[1], [0]]", "ranking", None),
            ("[[0, 1]]", "tie", None),
            ("[1, 1]", "tie", None),
            ("'tie'", "tie", None),
            ("'bad'", "bad", None),
            ("None", "none", "can't tell"),
            ("[float('nan'), 1]", "none", "not finite"),
            ("[1.0]", "none", "1 score for 2 responses"),
            ("[1, 2, 3]", "none", "3 scores for 2"),
            ("[[0], [2]]", "none", "no verdict"),
            ("[[0], [0]]", "none", "no verdict"),
            ("[[0], []]", "none", "no verdict"),
            ("'A'", "none", "no verdict"),
            ("[None, 1]", "none", "no verdict"),
            ("1", "none", "no verdict"),
            ("[10**400, 1]", "none", "not finite"),
            ("[__import__('numpy').ones(2)] * 2", "none", "ValueError"),
            ("{}", "none", "no verdict"),
            ("1 / 0", "none", r"ZeroDivisionError: .* \(line 2\)"),
            ("[row['word']]", "none", r"KeyError: 'word' \(line 2\); .* columns: none"),
            ("exit()", "none", "SystemExit"),
            ("(_ for _ in ()).throw(BaseException('odd'))", "none", "odd"),
        ):
            text = f"def judge(prompt, responses, row):\n    return {said}\n"
            labels, code, out, err = self.judged(text)
            self.assertEqual(code, 0, err)
            label = labels["p1"]
            self.assertEqual(label["verdict"], verdict, said)
            self.assertRegex(label.get("why", ""), why or r"\A\Z", said)
            if verdict == "none":
                self.assertRegex(out, "1 prompt without a verdict: ")
                self.assertIn("0 pairs of 1 prompt", out)

    def test_one_that_hangs(self):
        text = """
            import time
            def judge(prompt, responses, row):
                while row.get("slow"):
                    try:
                        time.sleep(60)
                    except Exception:
                        pass
                return [1, 0]
        """
        rows = [answers(i, "a", "b", row={"slow": i in (1, 3)}) for i in range(5)]
        labels, code, out, err = self.judged(text, "--judge-timeout", "0.1", rows=rows)
        self.assertEqual(code, 0, err)
        self.assertEqual(
            [labels[f"p{i}"]["verdict"] for i in range(5)],
            ["scores", "none", "scores", "none", "scores"],
        )
        self.assertIn("2 prompts without a verdict: no answer in 0.1 s", out)
        rows = [answers(i, "a", "b", row={"slow": i > 1}) for i in range(9)]
        labels, code, out, err = self.judged(text, "--judge-timeout", "0.1", rows=rows)
        self.assertEqual(code, 2)
        self.assertIn("longer than 0.1 s 3 times in a row", err)
        self.assertEqual(len(labels), 4)

    def test_answers_given_anew_are_judged_anew(self):
        data = save_answers(self.folder / "data", answers(1, "a", "longer"))
        path = self.folder / "own.py"
        path.write_text(
            "def judge(prompt, responses, row):\n    return [*map(len, responses)]\n"
        )
        spec = f"function:{path}:judge"
        collect("--label", spec, "--output", data)
        self.assertIn("longer", (data / "train.jsonl").read_text())
        (data / "answers.jsonl").unlink()
        save_answers(data, answers(1, "the longest", "b"))
        code, out, _ = collect("--pairs", "best", "--output", data)
        self.assertIn("left out 1 label, of other answers than this folder's", out)
        self.assertIn("0 pairs of 1 prompt", out)
        code, out, _ = collect("--label", spec, "--output", data)
        row = read_lines(data / "train.jsonl")[0]
        self.assertEqual(row["chosen"][0]["content"], "the longest")

    def test_how_far_it_is_without_a_terminal(self):
        text = "def judge(prompt, responses, row):\n    return [1, 0]\n"
        rows = [answers(i, "a", "b") for i in range(3)]
        with mock.patch.object(progress, "QUIET_SECONDS", 0):
            _, _, out, _ = self.judged(text, rows=rows)
        self.assertEqual(
            re.findall(r"^.*judged.*$", out, re.MULTILINE),
            ["1/3 prompts judged · 0s left", "2/3 prompts judged · 0s left"]
            + ["3/3 prompts judged · 0s"],
        )
        # A terminal's colours are of no use in a file.
        self.assertNotIn("\x1b", out)

    def test_in_another_thread_as_well(self):
        # Where no signal comes, one that hangs is left behind.
        gate = threading.Event()
        self.addCleanup(gate.set)
        hangs = careful(lambda *given: gate.wait(60), longest=0.05)
        fails, works = careful(lambda *given: 1 / 0), careful(lambda *given: [1, 0])
        found = []

        def ask():
            found.extend(judge("?", ["a", "b"], {}) for judge in (hangs, fails, works))

        thread = threading.Thread(target=ask)
        thread.start()
        thread.join()
        self.assertEqual([x.verdict for x in found], ["none", "none", "scores"])
        self.assertRegex(found[0].why + found[1].why, "no answer in .*ZeroDivision")

    def test_files_that_hold_no_judge(self):
        for text, name, expected in (
            ("def judge(:", "judge", "SyntaxError"),
            ("import no_such_module", "judge", "ModuleNotFoundError"),
            ("import os\nexit(3)", "judge", r"SystemExit: 3 \(line 2\)"),
            ("def score(p, r, row): pass", "judge", "It has: score"),
            ("judge = 3", "judge", "no function 'judge'"),
            ("judge = 3", "not a name", "function:FILE.py:NAME"),
        ):
            labels, code, _, err = self.judged(text, name=name)
            self.assertEqual((code, labels), (2, {}))
            self.assertRegex(err, expected)
        data = save_answers(self.folder / "x", answers(1, "a", "b"))
        for spec, expected in (
            ("function:none.py:judge", "none.py does not exist"),
            ("function:judge.py", "function:FILE.py:NAME"),
            ("model:", "A judge is one of"),
            ("jury", "A judge is one of"),
            ("reward", "needs --model and the --adapter-path"),
            ("endpoint:localhost:m", "endpoint:URL:MODEL"),
        ):
            code, _, err = collect("--label", spec, "--output", data)
            self.assertEqual(code, 2, spec)
            self.assertIn(expected, err)

    def test_goes_on_and_asks_again_where_it_failed(self):
        rows = [answers(i, "a", "b", row={"n": i}) for i in range(4)]
        data = save_answers(self.folder / "data", *rows)
        path = self.folder / "own.py"
        spec = f"function:{path}:judge"
        path.write_text(
            "def judge(p, r, row): return [1, 0] if row['n'] != 2 else None"
        )
        collect("--label", spec, "--output", data)
        path.write_text("def judge(p, r, row): return [0, 1]")
        _, out, _ = collect("--label", spec, "--output", data)
        self.assertIn("3 prompts labelled before", out)
        last = {line["id"]: line["scores"] for line in read_lines(data / LABELS)[4:]}
        self.assertEqual(last, {"p2": [0, 1]})
        path.unlink()
        # Nothing to ask: the file is not needed.
        code, out, _ = collect("--label", spec, "--output", data)
        self.assertEqual((code, "4 prompts with a best answer" in out), (0, True))

    def test_a_kill_leaves_no_trace(self):
        rows = [answers(i, "a", "b", row={"n": i}) for i in range(40)]
        path = self.folder / "own.py"
        spec = f"function:{path}:judge"
        text = """
            def judge(prompt, responses, row):
                if row["n"] == {}:
                    raise KeyboardInterrupt
                return [row["n"] % 3, 1]
        """
        folders = []
        for stops in ([], [3], [3, 3, 27]):
            folders.append(save_answers(self.folder / f"{len(folders)}", *rows))
            for stop in [*stops, -1]:
                path.write_text(textwrap.dedent(text.format(stop)))
                code, _, err = collect("--label", spec, "--output", folders[-1])
                self.assertEqual(code, 130 if stop >= 0 else 0, err)
                if stop >= 0:
                    # As if it had been killed while it wrote.
                    with open(folders[-1] / LABELS, "a") as file:
                        file.write('{"id": "p')
        for name in (LABELS, "train.jsonl", "valid.jsonl"):
            found = {(folder / name).read_bytes() for folder in folders}
            self.assertEqual(len(found), 1, name)

    def test_the_one_of_the_guide(self):
        guide = Path(mlx_lm.__file__).with_name("DPO_COLLECT.md").read_text("utf-8")
        (text,) = re.findall(r"^```python\n(.*?)^```", guide, re.M | re.S)
        texts = ("Water boils.", "Tea is a drink. " * 20, "Tea, of course.", "")
        rows = [answers(1, *texts, row={"keyword": "tea"})]
        labels, code, _, err = self.judged(text, rows=rows, name="score")
        self.assertEqual((code, labels["p1"]["scores"]), (0, [0, 1, 2, 0]), err)

    def test_several_judges_agree(self):
        rows = [answers(i, "a", "b", row={"n": i}) for i in range(4)]
        data = save_answers(self.folder / "data", *rows)
        path = self.folder / "own.py"
        path.write_text(
            "def first(p, r, row): return [1, 0] if row['n'] < 2 else [0, 1]\n"
            "def second(p, r, row): return [1, 0] if row['n'] < 1 else [0, 1]\n"
        )
        for name in ("first", "second"):
            spec = f"function:{path}:{name}"
            _, out, _ = collect("--label", spec, "--output", data)
        # 3 of 4 alike; by chance 0.5 * 0.25 + 0.5 * 0.75.
        self.assertIn("agree on 75% of 4 pairs of answers, kappa 0.50", out)


class TestOrders(unittest.TestCase):
    def test_swapping_the_sides_leaves_the_label(self):
        # Prefers the longer one, and what is shown first.
        def prefer(text):
            first, second = text.split("=== Reply A ===")[1].split("=== Reply B ===")
            return 1 / (1 + np.exp(-0.1 * (len(first) - len(second) + 16) - 0.3))

        words = ["a" * n for n in (40, 10, 25)]
        whole = compare("?", words, prefer)
        self.assertEqual(whole.verdict, "scores")
        self.assertEqual(np.argsort(whole.scores).tolist(), [1, 2, 0])
        for order in ([1, 0, 2], [2, 1, 0]):
            other = compare("?", [words[i] for i in order], prefer)
            np.testing.assert_allclose(
                other.scores, np.take(whole.scores, order), atol=1e-5
            )
            self.assertAlmostEqual(other.certainty, whole.certainty, places=5)

    def test_calls_of_tools_are_shown(self):
        call = {"type": "function", "function": {"name": "look_up", "arguments": {}}}
        turns = [
            {"role": "user", "content": "Tea?"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "no", "name": ""},
        ]
        shown = question(turns, "a", "b")
        self.assertIn("user: Tea?\n\nassistant: {", shown)
        self.assertIn('"name": "look_up"', shown)
        self.assertIn("\n\ntool: no\n\n===", shown)
        self.assertNotIn("None", shown)

    def test_orders_that_disagree_are_a_tie(self):
        self.assertEqual(compare("?", ["a", "b"], lambda text: 0.9).verdict, "tie")
        self.assertEqual(compare("?", ["a", "b"], lambda text: 0.5).verdict, "tie")
        found = compare("?", ["a", "b"], lambda text: "broken")
        self.assertEqual((found.verdict, found.why), ("none", "broken"))

    def test_mean_probability_is_the_certainty(self):
        said = iter([0.9, 0.3])
        found = compare("?", ["a", "b"], lambda text: next(said))
        self.assertAlmostEqual(found.certainty, (0.9 + 0.7) / 2)
        self.assertEqual(found.orders, [[0, 1, 0.9, 0.3]])


class TestModels(JudgesCase):
    @classmethod
    def setUpClass(cls):
        shared = tempfile.TemporaryDirectory()
        cls.addClassCleanup(shared.cleanup)
        cls.model = save_tiny_model(
            Path(shared.name) / "model", max_position_embeddings=2048
        )

    def test_probabilities_of_two_letters(self):
        judge = ModelJudge(str(self.model))
        model, tokenizer = load(str(self.model))
        prompt = [{"role": "user", "content": "Tea?"}]
        found = judge(prompt, ["yes", "no, never"], {})
        expected = []
        for pair in (("yes", "no, never"), ("no, never", "yes")):
            text = question(prompt, *pair) + "\nReply with one letter, A or B.\n"
            ids = tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], add_generation_prompt=True
            )
            logits = np.array(model(mx.array([ids]))[0, -1], np.float64)
            odds = np.exp(logits - logits.max())
            # A letter, or a space and a letter: here the space is a token.
            a, b = (odds[tokenizer.convert_tokens_to_ids(x)] for x in "AB")
            expected.append(a / (a + b))
        np.testing.assert_allclose(found.orders[0][2:], expected, atol=1e-5)

    def test_through_the_command(self):
        data = save_answers(
            self.folder / "data",
            *(answers(i, "a", f"another {i}", "third") for i in range(3)),
            answers(4, "a", "b " * 3000),
        )
        spec = f"model:{self.model}"
        code, out, err = collect("--label", spec, "--output", data)
        self.assertEqual(code, 0, err)
        labels = read_lines(data / LABELS)
        self.assertEqual(len(labels[0]["orders"]), 3)
        self.assertIn("longer than the 2,048 tokens", labels[3]["why"])
        self.assertIn("takes the answer that is shown first in", out)
        self.assertIn("of the probability of what it would write", out)

    def test_reward_of_a_policy_against_its_start(self):
        data = save_rows(self.folder / "pairs")
        adapters = self.folder / "adapters"
        code, _, err = command(
            *("--model", self.model, "--data", data, "--train", "--iters", "8"),
            *("--adapter-path", adapters, "--learning-rate", "1e-2", "--beta", "0.3"),
        )
        self.assertEqual(code, 0, err)
        row = ROWS[0]
        texts = [row[name][0]["content"] for name in ("rejected", "chosen")]
        rows = [answers(1, *texts, "tea", "", cut=[2], prompt=row["prompt"])]
        rows.append(answers(2, "tea", " "))
        folder = save_answers(self.folder / "data", *rows)
        own = ["--label", "reward", "--output", folder, "--model", self.model]
        code, out, err = collect(*own, "--adapter-path", adapters)
        self.assertEqual(code, 0, err)
        label, none = read_lines(folder / LABELS)
        self.assertEqual(none["why"], "fewer than two answers say anything")
        # Nothing is as little likely as its end, which says nothing of an answer.
        self.assertIsNone(label["scores"].pop())
        tokenizer = TOKENIZER
        prompt = tokenizer.apply_chat_template(
            row["prompt"], add_generation_prompt=True, return_dict=False
        )
        rewards = []
        for response in rows[0].responses[:3]:
            ids = prompt + response.tokens
            sums = []
            for path in (adapters, None):
                model, _ = load(str(self.model), adapter_path=path and str(path))
                logits = np.array(model(mx.array([ids[:-1]]))[0], np.float64)
                top = logits.max(-1, keepdims=True)
                logps = logits - top - np.log(np.exp(logits - top).sum(-1))[:, None]
                at = np.arange(len(prompt) - 1, len(ids) - 1)
                sums.append(logps[at, ids[len(prompt) :]].sum())
            rewards.append(0.3 * (sums[0] - sums[1]))
        np.testing.assert_allclose(label["scores"], rewards, atol=2e-4)
        margin = max(rewards) - min(rewards)
        self.assertAlmostEqual(label["certainty"], 1 / (1 + np.exp(-margin)), places=4)

    def test_a_model_that_has_no_letters(self):
        judge = ModelJudge(str(self.model))
        with mock.patch.object(judge, "_encode", lambda text: [*text.encode(), 1]):
            with self.assertRaisesRegex(InputError, "no token of its own"):
                judge("?", ["a", "b"], {})


class TestJudgeBenchmark(unittest.TestCase):
    def test_both_orders_by_hand(self):
        # Right in both orders, in the first, in none, in both.
        shown = np.array([[0.9, 0.2], [0.7, 0.8], [0.3, 0.9], [0.6, 0.4]])
        found = [line.split(" | ")[1] for line in judge_benchmark.describe(shown)]
        self.assertEqual(
            found,
            [
                "62.5% of 8 |",
                "75.0% (3 of 4) |",
                "50.0% (2 of 4) |",
                "75.0% (3 of 4) |",
                "50.0% (2 of 4) |",
                "66.7% (2 of 3) |",
                "0.750 |",
            ],
        )

    def test_a_judge_is_asked(self):
        with tempfile.TemporaryDirectory() as folder:
            model = save_tiny_model(Path(folder) / "m", max_position_embeddings=2048)
            words = ["judge_benchmark", "--judge", str(model), "--data"]
            data = save_rows(Path(folder) / "pairs") / "test.jsonl"
            screen = io.StringIO()
            with mock.patch.object(sys, "argv", [*words, str(data)]):
                with contextlib.redirect_stdout(screen):
                    judge_benchmark.main()
        self.assertIn(f"of {2 * len(ROWS)} |", screen.getvalue())


if __name__ == "__main__":
    unittest.main()
