# Copyright © 2026 MLX Contributors

import json
import re
import unittest
from pathlib import Path

import mlx_lm

FOLDER = Path(mlx_lm.__file__).parent / "examples" / "preferences"
ROLES = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}

TEST_TOPICS = {
    "astronomy and space": "planets? stars? moon meteors? telescopes? space",
    "cars and driving": "cars? driving highways? tires? windshields? curbs? jumper.cables?",
    "birds": "birds? owls? goldfinch(es)? penguins? woodpeckers?",
    "chess and board games": "chess chessboards? stalemate scrabble checkers",
    "coffee and tea": "coffee teas? espresso decaf caffeine",
    "photography": "photos? photographers? cameras? shutter flash jpeg portraits?",
    "swimming": "swim swimming swimmers? backstroke front.crawl goggles bathers?",
    "trains": "trains? rails? railways? shinkansen",
    "bees and honey": "bees? honey honeybees? hives?",
    "knitting and sewing": "knit knitting sewing stitch(es)? seams? crochet",
}


def _rows(name):
    lines = (FOLDER / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [(f"{name}.jsonl:{i}", json.loads(line)) for i, line in enumerate(lines, 1)]


def _text(row, key):
    return row[key][0]["content"]


def _is_pair(row):
    if not isinstance(row, dict) or set(row) != set(ROLES):
        return False
    return all(
        isinstance(row[key], list)
        and len(row[key]) == 1
        and set(row[key][0]) == {"role", "content"}
        and row[key][0]["role"] == role
        and isinstance(row[key][0]["content"], str)
        and row[key][0]["content"].strip()
        for key, role in ROLES.items()
    )


def _topics(prompt):
    return [
        topic
        for topic, words in TEST_TOPICS.items()
        if re.search(rf"\b({words.replace(' ', '|')})\b", prompt, re.IGNORECASE)
    ]


def _runs(prompt, size=5):
    words = re.findall(r"[^\W_]+", prompt.lower().replace("'", ""))
    return {" ".join(words[i : i + size]) for i in range(len(words) - size + 1)}


class TestExamplePreferences(unittest.TestCase):

    @classmethod
    def setUpClass(cls):
        cls.splits = {name: _rows(name) for name in ("train", "valid", "test")}
        cls.rows = [row for rows in cls.splits.values() for row in rows]

    def test_at_least_200_pairs_of_one_shape(self):
        self.assertGreaterEqual(len(self.rows), 200)
        self.assertEqual([at for at, row in self.rows if not _is_pair(row)], [])

    def test_answers_differ_and_chosen_is_calm(self):
        same = [
            at
            for at, row in self.rows
            if _text(row, "chosen") == _text(row, "rejected")
        ]
        self.assertEqual(same, [])
        loud = [at for at, row in self.rows if "!" in _text(row, "chosen")]
        self.assertEqual(loud, [])

    def test_length_alone_does_not_tell_the_chosen_answer(self):
        for name in ("train", "test"):
            with self.subTest(split=name):
                longer = [
                    at
                    for at, row in self.splits[name]
                    if len(_text(row, "chosen").split())
                    > len(_text(row, "rejected").split())
                ]
                share = len(longer) / len(self.splits[name])
                note = f"chosen is longer in {share:.1%}: {longer}"
                self.assertGreaterEqual(share, 0.3, note)
                self.assertLessEqual(share, 0.5, note)

    def test_no_prompt_occurs_twice(self):
        seen, twice = {}, []
        for at, row in self.rows:
            prompt = " ".join(_text(row, "prompt").lower().split())
            if prompt in seen:
                twice.append((seen[prompt], at))
            seen.setdefault(prompt, at)
        self.assertEqual(twice, [])

    def test_no_two_prompts_share_a_run_of_five_words(self):
        seen, shared = {}, []
        for at, row in self.rows:
            for run in sorted(_runs(_text(row, "prompt"))):
                if run in seen:
                    shared.append((seen[run], at, run))
                seen.setdefault(run, at)
        self.assertEqual(shared, [])

    def test_test_topics_are_absent_from_train(self):
        # The word lists count only while they recognise every test prompt.
        missed = [
            at for at, row in self.splits["test"] if not _topics(_text(row, "prompt"))
        ]
        self.assertEqual(missed, [])
        leaks = [
            (at, topics)
            for at, row in self.splits["train"]
            if (topics := _topics(_text(row, "prompt")))
        ]
        self.assertEqual(leaks, [])


if __name__ == "__main__":
    unittest.main()
