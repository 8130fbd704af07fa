# Copyright © 2026 MLX Contributors

"""Files with all the columns that SHP and WebGPT have on the Hub, end to end."""

import json
import re
import unittest

from test_dpo_command import CommandCase, command, metrics_of

WORDS = "tea hat pen cup sun ink map oak".split()


def shp_row(i, word):
    """Reddit answers A and B, of which the label names the better: 1 is A."""
    answers = [f"Say {word}.", f"Never {word}."]
    return {
        "post_id": f"p{i}",
        "domain": "askbaking_train",
        "upvote_ratio": 0.98,
        "history": f"Which word, {word}?",
        "c_root_id_A": f"a{i}",
        "c_root_id_B": f"b{i}",
        "created_at_utc_A": 1637826297,
        "created_at_utc_B": 1637828320,
        "score_A": 52 if i % 2 else 13,
        "score_B": 13 if i % 2 else 52,
        "human_ref_A": answers[1 - i % 2],
        "human_ref_B": answers[i % 2],
        "labels": i % 2,
        "seconds_difference": 2023.0,
        "score_ratio": 4.0,
    }


def webgpt_row(i, word):
    """Answers 0 and 1 with the sources that they quote, and scores of -1 to 1."""
    answers = [f"Say {word} [1].", f"Never {word} [1]."]
    better = 1.0 if i % 2 else -1.0
    quotes = {"title": ["Words (example.org)"], "extract": [f"About {word}."]}
    tokens = {"prefix": [1, 2, 3], "completion": [4, 5]}
    return {
        "question": {"dataset": "triviaqa", "id": f"q{i}", "full_text": f"Why {word}?"},
        "quotes_0": quotes,
        "answer_0": answers[1 - i % 2],
        "tokens_0": tokens,
        "score_0": better,
        "quotes_1": quotes,
        "answer_1": answers[i % 2],
        "tokens_1": tokens,
        "score_1": -better,
    }


class TestHubLayouts(CommandCase):
    def check(self, make_row, shape):
        data = self.folder / "data"
        data.mkdir()
        rows = [make_row(i, word) for i, word in enumerate(WORDS)]
        for name, part in (("train", rows), ("test", rows[:4])):
            lines = "".join(json.dumps(row) + "\n" for row in part)
            (data / f"{name}.jsonl").write_text(lines)
        code, out, err = command(*self.flags("--data", data, "--test", "--inspect", 4))
        self.assertEqual(code, 0, err)
        # One of the eight is held out.
        self.assertIn(f"(train): 7 pairs of 7 rows ({shape}, chat).", out)
        trained = [line.get("trained_pairs", 0) for line in metrics_of(self.adapters)]
        self.assertEqual(max(trained), 10)
        tested = json.loads((self.adapters / "test_metrics.json").read_text())
        self.assertEqual((tested["pairs"], tested["test/data"]), (4, str(data)))
        # Whichever column it is in, the better answer is the chosen one.
        shown = re.findall(r"(chosen|rejected), scored\n +(\w+) ", out)
        self.assertEqual(shown, [("chosen", "Say"), ("rejected", "Never")] * 4)

    def test_shp(self):
        self.check(shp_row, "SHP")

    def test_webgpt(self):
        self.check(webgpt_row, "WebGPT comparisons")


if __name__ == "__main__":
    unittest.main()
