# Copyright © 2026 MLX Contributors

"""Rounds of generating, labelling and training, whole, killed, and with a person."""

import json
import re
import shutil
import signal
import tempfile
import unittest
from pathlib import Path
from unittest import mock

import mlx.core as mx
import numpy as np
import yaml
from collecting import check_counts, collect
from killing import Killer
from page_server import stopped
from resuming import MEASURED, bits, signals
from test_dpo_command import command
from tiny import save_tiny_model

from mlx_lm.preference.collect import generate
from mlx_lm.preference.collect.answers import Answers, Response, read_answers
from mlx_lm.preference.collect.labels import Label, append_label
from mlx_lm.preference.collect.round_log import (
    compare_with_start,
    describe_round,
    length_facts,
    side_by_side,
    warnings_of,
)
from mlx_lm.preference.run.loop import PreferenceRun

WORDS = "tea hat pen cup sun ink map oak bee jam".split()
TURNS = [{"role": "user", "content": "Say tea."}]
JUDGE = """\
def score(prompt, responses, row):
    return [sum(map(ord, text)) % 97 for text in responses]
"""


class Rounds(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        folder = tempfile.TemporaryDirectory()
        cls.addClassCleanup(folder.cleanup)
        cls.root = Path(folder.name)
        save_tiny_model(cls.root / "model")
        (cls.root / "judge.py").write_text(JUDGE)
        for name, words in (("prompts", WORDS[:6]), ("held_out", WORDS[6:])):
            lines = "".join(f"Say {word}.\n" for word in words)
            (cls.root / f"{name}.txt").write_text(lines)

    def config(self, name="run", **more):
        """A file of settings for a folder of its own."""
        settings = {
            **{"model": str(self.root / "model"), "rounds": 2, "samples": 3},
            **{"prompts": str(self.root / "prompts.txt"), "max_tokens": 6},
            **{"held_out_prompts": str(self.root / "held_out.txt")},
            **{"judge": f"function:{self.root / 'judge.py'}:score"},
            **{"generate_batch_size": 6, "batch_size": 2, "iters_per_round": 3},
            **{"learning_rate": 1e-2, "num_layers": 2, "replay": 0.5},
            **{"save_every": 2, "max_seq_length": 128, "valid_fraction": 0.2},
            **{"adapter_path": str(self.root / name), "steps_per_report": 1},
            **{"reference_cache": False, "token_cache": False, **more},
        }
        path = self.root / f"{name}.yaml"
        kept = {k: v for k, v in settings.items() if v is not None}
        path.write_text(yaml.safe_dump(kept))
        return str(path)

    def dpo(self, *argv):
        code, printed, errors = command(*argv)
        check_counts(printed)
        return printed + errors, code

    def run_rounds(self, name, **more):
        shutil.rmtree(self.root / name, ignore_errors=True)
        printed, code = self.dpo("-c", self.config(name, **more))
        self.assertEqual(code, 0, printed)
        return self.root / name, printed

    def log(self, folder):
        lines = (folder / "rounds.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    def validation(self, folder, number):
        """The first validation of a round's run."""
        lines = (folder / f"round-{number}" / "metrics.jsonl").read_text().splitlines()
        return next(x for x in map(json.loads, lines) if "val_loss" in x)


class TestKilled(Rounds):
    """Killed in every phase, rounds end as if nothing had been."""

    def content(self, folder):
        """Every file of the folder, without what depends on time and place."""
        found = {}
        for path in sorted(folder.rglob("*")):
            name = path.relative_to(folder).as_posix()
            if not path.is_file() or name.endswith((".lock", "adapter_config.json")):
                continue
            if path.suffix == ".safetensors" and "state" not in path.name:
                found[name] = bits(path)
            elif path.name == "metrics.jsonl":
                lines = map(json.loads, path.read_text().splitlines())
                found[name] = [
                    {k: x for k, x in line.items() if k not in MEASURED}
                    for line in lines
                ]
            elif path.suffix in (".json", ".jsonl"):
                found[name] = path.read_bytes()
            else:
                found[name] = None
        return found

    def test_in_every_phase(self):
        killer = Killer(self.root)
        self.addCleanup(killer.close)
        log = lambda: (self.root / "log.txt").read_text()[-3000:]
        self.assertEqual(killer.run("-c", self.config("whole")), 0, log())
        counts = json.loads((self.root / "counts.json").read_text())
        expected = self.content(self.root / "whole")
        chains = [
            # Generating, labelling, between the phases, in the run, while it saves.
            [("answer", 2), ("label", 3), ("phase", 3), ("step", 2), ("half", 1)],
            # Before measuring, while held-out prompts are answered and labelled, and
            # between the rounds.
            [("phase", 5), ("answer", 2), ("label", 2), ("phase", 3)],
            # While pairs are written, in the second run, and at the end.
            [("phase", 8), ("written", 1), ("renamed", 2), ("step", 2), ("phase", 3)],
        ]
        for i, moments in enumerate(chains):
            folder = self.root / f"killed {i}"
            config = self.config(f"killed {i}")
            for event, at in (*moments, (None, 0)):
                argv = ["--resume", folder]
                if not (folder / "adapter_config.json").exists():
                    argv = ["-c", config]
                code = killer.run(*argv, event=event, at=at)
                what = f"{event} {at} of {counts.get(event)}: {log()}"
                self.assertEqual(code, -signal.SIGKILL if event else 0, what)
            found = self.content(folder)
            self.assertEqual(found.keys(), expected.keys())
            for name, content in expected.items():
                self.assertTrue(found[name] == content, f"chain {i}: {name}")


class TestRounds(Rounds):
    def test_what_is_trained_on_what(self):
        folder, printed = self.run_rounds("run")
        first, second = self.log(folder)
        self.assertEqual([first["round"], second["round"]], [1, 2])
        self.assertEqual(first["held_out/compared"], 4)
        answers = read_answers(folder / "collected")
        self.assertEqual([one.round for one in answers], [0] * 6 + [1] * 6)
        # The second round's answers are the trained policy's.
        self.assertEqual(len({one.model for one in answers}), 2)
        rows = [
            json.loads(line)
            for path in (folder / "pairs/round-2").glob("*.jsonl")
            for line in path.read_text().splitlines()
        ]
        rounds = [row["round"] for row in rows]
        self.assertEqual(rounds.count(0), round(first["pairs"] / 2))
        self.assertEqual(rounds.count(1), second["pairs"])
        weights = [
            mx.load(str(folder / x / "adapters.safetensors")) for x in ("", "round-2")
        ]
        for name, w in weights[0].items():
            self.assertTrue(mx.array_equal(w, weights[1][name]).item())
        self.assertIn("wins against the start", printed)
        self.assertRegex(printed, r"\n  round  pairs .* ended\n      1 .*\n      2 ")
        self.assertIn("Held-out prompts, answered by round 2.", printed)
        self.assertRegex(printed, r", KL -?[\d.]+ ± [\d.]+ nats an answer, ")
        # It is an adapter as any other.
        config = json.loads((folder / "adapter_config.json").read_text())
        self.assertEqual(config["num_layers"], 2)
        # And there is nothing more to do.
        printed, code = self.dpo("--resume", str(folder))
        self.assertEqual(code, 0, printed)
        self.assertNotIn("answers", printed)

    def test_reference_of_the_start_and_of_the_round(self):
        # From the round's own start no answer is ahead; from the first one's they are.
        folder, _ = self.run_rounds("start", held_out_prompts=None)
        self.assertEqual(self.validation(folder, 1)["val_rewards/margins"], 0)
        self.assertNotEqual(self.validation(folder, 2)["val_rewards/margins"], 0)
        folder, _ = self.run_rounds("round", reference="round", held_out_prompts=None)
        self.assertEqual(self.validation(folder, 2)["val_rewards/margins"], 0)

    def test_prompts_take_turns(self):
        folder, _ = self.run_rounds(
            "turns",
            prompts_per_round=4,
            held_out_prompts=None,
            epochs_per_round=1,
            iters_per_round=None,
        )
        answers = read_answers(folder / "collected")
        asked = [one.prompt[0]["content"].split()[1][:-1] for one in answers]
        self.assertEqual(asked, [*WORDS[:4], *WORDS[4:6], *WORDS[:2]])

    def test_edited_prompts_are_told_and_nothing_is_lost(self):
        files = {"prompts": WORDS[:6], "held_out_prompts": WORDS[6:]}
        own = {name: str(self.root / f"edited_{name}.jsonl") for name in files}

        def write(name, words):
            # A text, or the same as a turn.
            rows = [f"Say {word}." for word in words]
            if name != "prompts":
                rows = [[{**TURNS[0], "content": row}] for row in rows]
            lines = [json.dumps({"prompt": row}) + "\n" for row in rows]
            Path(own[name]).write_text("".join(lines))

        for name, words in files.items():
            write(name, words)
        folder, printed = self.run_rounds("edited", rounds=1, **own)
        self.assertNotIn("was edited", printed)
        collected = folder / "collected"
        before = (collected / "answers.jsonl").read_bytes()
        # One asked before is gone, two are new; one is no longer held out.
        write("prompts", [*WORDS[1:6], "fig", "rye"])
        write("held_out_prompts", WORDS[7:])
        argv = "--resume", str(folder), "--rounds"
        printed, code = self.dpo(*argv, "2")
        self.assertEqual(code, 0, printed)
        self.assertIn("edited_prompts.jsonl was edited: 2 new, 1 gone. What", printed)
        self.assertIn(
            "edited_held_out_prompts.jsonl was edited: 0 new, 1 gone.", printed
        )
        self.assertTrue((collected / "answers.jsonl").read_bytes().startswith(before))
        rounds = [one.round for one in read_answers(collected)]
        self.assertEqual(rounds, [0] * 6 + [1] * 7)
        self.assertEqual([x["held_out/compared"] for x in self.log(folder)], [4, 3])
        write("prompts", ["rye", "fig", *WORDS[1:6]])
        printed, code = self.dpo(*argv, "2")
        self.assertIn("edited_prompts.jsonl was edited: another order.", printed)
        self.assertNotIn("was edited", self.dpo(*argv, "2")[0])
        # What was trained on is not held out, in whatever form.
        write("held_out_prompts", WORDS[:1])
        printed, code = self.dpo(*argv, "3")
        self.assertEqual(code, 2, printed)
        self.assertIn(
            "shares 1 prompt with those that are trained on, or were", printed
        )

    def test_bad_prompts_are_a_share_of_the_whole_file(self):
        # All bad ones are in one round; the file has few of them.
        path = self.root / "bad.jsonl"
        rows = [{"prompt": f"Say {w} {i}."} for i in range(2) for w in WORDS]
        rows[1] = {"prompt": [{"role": "critic", "content": "x"}, *TURNS]}
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        given = {"prompts": str(path), "prompts_per_round": 4, "rounds": 1}
        folder, printed = self.run_rounds("bad rows", held_out_prompts=None, **given)
        self.assertIn("Skipped 1 row: unknown role (first: bad.jsonl:2, ", printed)
        self.assertEqual(len(read_answers(folder / "collected")), 3)
        config = self.config("no bad rows", max_bad_rows=0, **given)
        printed, code = self.dpo("-c", config)
        self.assertEqual(code, 2, printed)
        self.assertIn("1 of 20 rows are bad, more than max_bad_rows (0)", printed)

    def test_a_round_of_one_pair_trains_on_it(self):
        # It would be for validation.
        (self.root / "one.txt").write_text("Say tea.\n")
        own = {"prompts": str(self.root / "one.txt"), "held_out_prompts": None}
        own |= {"valid_fraction": 0.99, "batch_size": 1, "rounds": 1}
        folder, _ = self.run_rounds("one", **own)
        self.assertEqual(self.log(folder)[0]["pairs"], 1)

    def test_rounds_in_the_way_are_neither_mixed_nor_lost(self):
        folder, _ = self.run_rounds("first", rounds=1, held_out_prompts=None)
        before = {x: x.read_bytes() for x in folder.rglob("*") if x.is_file()}
        data = str(folder / "pairs" / "round-1")
        given = "--train", "--model", str(self.root / "model"), "--iters", "1"
        for argv in (
            ("-c", self.config("first", rounds=1, learning_rate=1e-3)),
            (*given, "--data", data, "--adapter-path", str(folder)),
        ):
            printed, code = self.dpo(*argv)
            self.assertEqual(code, 2, printed)
            self.assertIn(f"first holds rounds: go on with --resume {folder}", printed)
            self.assertEqual(
                {x: x.read_bytes() for x in folder.rglob("*") if x.is_file()}, before
            )
        # Nothing is guessed from a damaged state either.
        for state in ({"round": -1}, {"round": True}, {"round": 0, "phase": ["x"]}):
            (folder / "rounds.json").write_text(json.dumps(state))
            printed, code = self.dpo("--resume", str(folder))
            self.assertEqual(code, 2, printed)
            self.assertIn("rounds.json is damaged: remove it", printed)

    def test_a_judge_that_can_not_be_is_told_before_answers(self):
        for judge, said in (
            ("function:nowhere.py:score", "nowhere.py does not exist"),
            (f"function:{self.root / 'judge.py'}:odd", "has no function 'odd'"),
            ("model:/nowhere", "The model folder /nowhere does not exist"),
            ("endpoint:http://localhost:8080/v1", "endpoint:URL:MODEL"),
            ("odd", "A judge is one of human, function"),
        ):
            printed, code = self.dpo("-c", self.config("none", judge=judge))
            self.assertEqual(code, 2, printed)
            self.assertIn(said, printed)
            self.assertNotIn("answers", printed)
            self.assertFalse((self.root / "none" / "collected").exists())

    def test_a_person_is_waited_for(self):
        config = self.config("human", judge="human:a", rounds=1)
        folder = self.root / "human"
        printed, code = self.dpo("-c", config)
        self.assertEqual(code, 0, printed)
        self.assertIn(f"--label human:a --output {folder / 'collected'}", printed)
        self.assertIn(f"mlx_lm.dpo --resume {folder}", printed)
        self.assertFalse((folder / "adapters.safetensors").exists())
        answers = read_answers(folder / "collected")
        for one in answers[:5]:
            label = Label(one.id, "human:a", "ranking", ranking=[[1], [0]])
            append_label(folder / "collected", label)
        printed, code = self.dpo("--resume", str(folder))
        self.assertIn("For you to judge, 1 prompt: mlx_lm.dpo_collect", printed)
        append_label(folder / "collected", Label(answers[5].id, "human:a", "bad"))
        # The page names what goes on, not a run beside the rounds.
        page = "--label", "human:a", "--output", folder / "collected", "--port", "0"
        with stopped():
            _, printed, _ = collect(*page)
        self.assertIn(f"Train with\n  mlx_lm.dpo --resume {folder}\n", printed)
        printed, code = self.dpo("--resume", str(folder))
        self.assertEqual(code, 0, printed)
        self.assertTrue((folder / "adapters.safetensors").exists())
        self.assertEqual(self.log(folder)[0]["pairs"], 5)

    def test_stopped_it_names_the_rounds(self):
        config = self.config("stopped", held_out_prompts=None)
        folder, line = self.root / "stopped", "Go on with: --resume"
        appended = mock.patch.object(
            generate, "append_answers", side_effect=KeyboardInterrupt
        )
        for moment, argv in (
            (appended, ["-c", config]),
            (signals("_take_step", 2, number=signal.SIGINT), ["--resume", str(folder)]),
        ):
            with moment:
                printed, code = self.dpo(*argv)
            self.assertEqual(code, 130, printed)
            advice = [x for x in printed.splitlines() if "--resume" in x]
            self.assertEqual(len(advice), 1, printed)
            self.assertTrue(advice[0].endswith(f"{line} {folder}"), printed)
        printed, code = self.dpo("--resume", str(folder))
        self.assertEqual(code, 0, printed)

    def test_a_run_that_fails_names_what_is_there(self):
        config = self.config("failed", held_out_prompts=None)
        folder, take = self.root / "failed", PreferenceRun._take_step

        def take_two(run, it, batch):
            if it > 2:
                raise run._failure(RuntimeError("out of memory"), "a step")
            take(run, it, batch)

        with mock.patch.object(PreferenceRun, "_take_step", take_two):
            printed, code = self.dpo("-c", config)
        self.assertEqual(code, 1, printed)
        (named,) = re.findall(r"\S+_adapters.safetensors", printed.splitlines()[-1])
        self.assertTrue(Path(named).exists(), named)
        self.assertIn(f"Go on with: --resume {folder}", printed)

    def test_a_slow_judge_gets_the_time_that_is_given(self):
        (self.root / "slow.py").write_text(
            "import time\ndef score(prompt, responses, row):\n    time.sleep(60)\n"
        )
        judge = f"function:{self.root / 'slow.py'}:score"
        config = self.config("slow", judge=judge, judge_timeout=0.05)
        printed, code = self.dpo("-c", config)
        self.assertEqual(code, 2)
        self.assertIn("longer than 0.05 s 3 times in a row", printed)
        self.assertIn("allow more with judge_timeout", printed)
        # Of another length when it goes on.
        printed, code = self.dpo(
            "--resume", str(self.root / "slow"), "--judge-timeout", "0.06"
        )
        self.assertIn("longer than 0.06 s 3 times in a row", printed)

    def test_more_rounds_than_before(self):
        folder, _ = self.run_rounds("more", rounds=1, held_out_prompts=None)
        before = (folder / "round-1/adapters.safetensors").read_bytes()
        printed, code = self.dpo("--resume", str(folder), "--rounds", "2")
        self.assertEqual(code, 0, printed)
        self.assertEqual(len(self.log(folder)), 2)
        self.assertEqual((folder / "round-1/adapters.safetensors").read_bytes(), before)

    def test_what_does_not_go_together(self):
        for more, said in (
            ({"prompts": None}, "rounds need prompts"),
            ({"judge": None}, "rounds need judge"),
            ({"judge": "reward"}, "can't be judged by reward"),
            ({"data": "x"}, "data does not go with rounds"),
            ({"iters": 3}, "iters_per_round"),
            ({"epochs_per_round": 1}, "both say how long"),
            ({"rounds": None, "train": True, "data": "x"}, "needs rounds"),
            ({"loss_type": "kto"}, "loss of pairs"),
            ({"replay": 1.5}, "replay must be"),
            (
                {"held_out_prompts": str(self.root / "prompts.txt")},
                "those that are trained on",
            ),
            ({"prompts": str(self.root / "none.txt")}, "none.txt"),
        ):
            with self.subTest(said):
                printed, code = self.dpo("-c", self.config("bad", **more))
                self.assertEqual(code, 2, printed)
                self.assertIn(said, printed.splitlines()[-1])
                self.assertFalse((self.root / "bad").exists())


def answers(name, *responses, sampled=0):
    made = [Response("x", [1] * n, finish, 0.0) for n, finish in responses]
    return Answers(name, "p", made, sampled=sampled or len(made))


class TestLog(unittest.TestCase):
    def test_a_round_by_hand(self):
        lines = [
            answers("a", (2, "stop"), (4, "length")),
            answers("b", (6, "stop"), sampled=2),
            answers("c", (1, "stop"), (3, "stop")),
        ]
        labels = {
            (0, "a"): {"j": Label("a", "j", "scores", scores=[1.0, 0.0])},
            (0, "c"): {"j": Label("c", "j", "none", why="?")},
        }
        facts = describe_round(lines, labels)
        self.assertEqual((facts["score"], facts["score_gap"]), (0.5, 1.0))
        self.assertAlmostEqual(facts["eos_share"], 4 / 5)
        self.assertAlmostEqual(facts["tokens"], 16 / 5)
        self.assertAlmostEqual(facts["equal_share"], 1 / 6)
        self.assertEqual(facts["failed_share"], 0.5)
        self.assertAlmostEqual(facts["all_equal_share"], 1 / 3)
        row = {"chosen_tokens": [1] * 6, "rejected_tokens": [1] * 4}
        line = facts | length_facts([row])
        self.assertEqual((line["chosen_tokens"], line["rejected_tokens"]), (6, 4))
        said = "\n".join(warnings_of(line))
        self.assertIn("longer than the rejected ones by 50%", said)
        self.assertIn("no verdict for 50%", said)
        self.assertNotIn("all answers are equal", said)
        self.assertIn(
            "raise temperature", "".join(warnings_of({**line, "all_equal_share": 0.6}))
        )

    def test_side_by_side(self):
        first = {"round": 1, "pairs": 1200, "score": 0.5, "tokens": 63.0}
        held_out = {"score": 0.25, "win_rate": 0.75, "kl": -0.1, "tokens": 40.4}
        held_out = {f"held_out/{name}": x for name, x in held_out.items()}
        nothing = {"round": 2, "pairs": 7, "score": float("nan"), "tokens": None}
        self.assertEqual(
            side_by_side([first | held_out, nothing]),
            [
                "  round  pairs   score    wins      KL  tokens",
                "      1  1,200    0.25   75.0%   -0.10      40",
                "      2      7",
            ],
        )
        self.assertEqual(
            side_by_side([first]),
            ["  round  pairs   score  tokens", "      1  1,200     0.5      63"],
        )

    def test_wins_over_the_start(self):
        both = (2, "stop"), (3, "stop")
        lines = [answers(name, *both) for name in "abcd"] + [answers("e", both[0])]
        labels = {
            (0, "a"): {"j": Label("a", "j", "scores", scores=[0.0, 1.0])},
            (0, "b"): {"j": Label("b", "j", "scores", scores=[3.0, 2.0])},
            (0, "c"): {"j": Label("c", "j", "tie", scores=[1.0, 1.0])},
            (0, "d"): {"j": Label("d", "j", "none")},
        }
        found = compare_with_start(lines, labels)
        # A win, a loss and a tie; the judge of "d" failed, the answers of "e" are equal.
        self.assertEqual(found["held_out/win_rate"], 0.5)
        self.assertEqual(found["held_out/compared"], 4)
        self.assertAlmostEqual(found["held_out/start_score"], 4 / 3)
        self.assertAlmostEqual(found["held_out/score"], 4 / 3)
        error = np.std([1, 2, 1], ddof=1) / np.sqrt(3)
        self.assertAlmostEqual(found["held_out/score_error"], error)


if __name__ == "__main__":
    unittest.main()
