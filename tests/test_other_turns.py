# Copyright © 2026 MLX Contributors

"""Turns of users and tools within an answer are read, and never scored."""

import unittest

import mlx.core as mx
import numpy as np
from byte_tokenizers import CHATML, make_tokenizer
from tiny import float64_logps, tiny_model

from mlx_lm.preference.batch.collate import collate_pairs
from mlx_lm.preference.batch.shape import BatchShape
from mlx_lm.preference.data.tokenizer import plain_ids
from mlx_lm.preference.forward.answers import sequence_logps
from mlx_lm.preference.measure.pair_scores import PairCollector
from mlx_lm.preference.objective.objective import Objective
from mlx_lm.preference.objective.pairs import pair_logps
from mlx_lm.tuner.datasets import PreferenceDataset


def say(role, content, **more):
    return {"role": role, "content": content, **more}


CALL = say("assistant", "", tool_calls=[{"function": {"name": "f", "arguments": {}}}])
CHOSEN = [say("assistant", "Yes."), say("user", "So?"), say("assistant", "Tea.")]
REJECTED = [say("assistant", "No."), say("user", "Hm?"), say("assistant", "Fog.")]
TOOLED = [CALL, say("tool", "7"), say("tool", "8"), say("assistant", "It is 7.")]
ROW = {"prompt": [say("user", "Hi")], "chosen": CHOSEN, "rejected": REJECTED}

CALLS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and {condition} %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content }}{% for c in m.tool_calls or [] %}"
    "{% if m.content or not loop.first %}\n{% endif %}[{{ c.function.name }}]"
    "{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEMPLATES = {
    "chatml": CHATML,
    "calls": CALLS.replace("{condition}", "false"),
    # Of earlier turns the thoughts are left out, as Qwen 3 does.
    "thoughts": CALLS.replace("{condition}", "loop.last"),
    "mistral": (
        "{% for m in messages %}{% if m.role == 'assistant' %} {{ m.content }}"
        "{% for c in m.tool_calls or [] %}[{{ c.function.name }}]{% endfor %}</s>"
        "{% else %}[INST] {{ m.content }} [/INST]{% endif %}{% endfor %}"
    ),
    "gemma": (
        "{% for m in messages %}<start_of_turn>"
        "{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}"
        "{% for c in m.tool_calls or [] %}[{{ c.function.name }}]{% endfor %}"
        "<end_of_turn>\n{% endfor %}"
        "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
    ),
}


def scored_text(dataset, ids):
    """The pieces of an answer that are scored."""
    pieces, last = [], False
    for token in ids.tolist():
        if token >= 0:
            pieces = pieces if last else [*pieces, []]
            pieces[-1].append(token)
        last = token >= 0
    return [dataset.tokenizer.decode(piece) for piece in pieces]


class TestTemplates(unittest.TestCase):
    def pieces(self, template, chosen):
        row = {**ROW, "chosen": chosen}
        data = PreferenceDataset([row], make_tokenizer(template), 512, max_bad_rows=0)
        _, ids, other, _ = data[0]
        whole = data.tokenizer.decode(plain_ids(ids))
        return whole, scored_text(data, ids), scored_text(data, other)

    def test_scored_turns(self):
        for name, template in TEMPLATES.items():
            with self.subTest(template=name):
                whole, chosen, rejected = self.pieces(template, CHOSEN)
                self.assertIn("So?", whole)
                for found, texts in ((chosen, "Yes. Tea."), (rejected, "No. Fog.")):
                    self.assertEqual(len(found), 2)
                    for piece, text in zip(found, texts.split()):
                        self.assertIn(text, piece)
                        # What ends a turn is part of it, what begins the next is not.
                        self.assertRegex(piece, r"</s>|<\|im_end\|>|<end_of_turn>")
                        self.assertNotRegex(piece, r"INST|user|<\|im_start|<start")
                # A single turn is scored whole.
                _, (alone,), _ = self.pieces(template, CHOSEN[:1])
                self.assertTrue(alone.endswith(chosen[0]) or "</think>" in alone)

    def test_tools(self):
        for name in ("calls", "thoughts", "mistral", "gemma"):
            with self.subTest(template=name):
                whole, chosen, _ = self.pieces(TEMPLATES[name], TOOLED)
                self.assertEqual(len(chosen), 2)
                self.assertIn("8", whole)
                self.assertIn("[f]", chosen[0])
                self.assertNotRegex(chosen[0] + chosen[1], "8|tool|INST")
                self.assertIn("It is 7.", chosen[1])

    def test_a_template_that_hides_turns(self):
        part = "{% for m in messages if m.role {} 'user' %}{{ m.content }};{% endfor %}"
        template = part.replace("{}", "==") + part.replace("{}", "!=")
        with self.assertRaisesRegex(ValueError, "hides where the answer begins"):
            self.pieces(template, CHOSEN)


class TestScores(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        rows = [ROW, {**ROW, "chosen": CHOSEN[2:]}, {**ROW, "rejected": TOOLED}]
        tokenizer = make_tokenizer(TEMPLATES["calls"])
        cls.data = PreferenceDataset(rows, tokenizer, 512, max_bad_rows=0)
        cls.model = tiny_model(vocab_size=len(tokenizer), max_position_embeddings=512)

    def right(self):
        """Counts and summed log-probs, each row by itself, in float64."""
        found = []
        for answer in (1, 2):
            for pair in self.data:
                ids = np.concatenate([pair[0], pair[answer]])
                inputs = mx.array(plain_ids(ids))[None]
                mask = (ids >= 0) & (np.arange(len(ids)) >= len(pair[0]))
                logits = self.model(inputs[:, :-1])
                logps = float64_logps(logits, inputs[:, 1:], mask[None, 1:])
                found.append((int(mask.sum()), float(logps[0])))
        return map(np.array, zip(*found))

    def test_log_probs_and_counts(self):
        counts, logps = self.right()
        pairs = list(self.data)
        width = max(max(n) for *_, n in pairs)
        prompt = len(pairs[0][0]) - 1
        shapes = {
            "plain": None,
            "shared": BatchShape(prompt, width),
            "packed": BatchShape(0, 2 * width, packed=1),
        }
        for name, shape in shapes.items():
            with self.subTest(layout=name):
                batch = collate_pairs(pairs, shape=shape)
                self.assertEqual(batch["counts"].tolist(), counts.tolist())
                found = sequence_logps(self.model, batch)
                np.testing.assert_allclose(np.array(found), logps, rtol=1e-5)
                objective = Objective(loss_type="ipo")
                read = pair_logps(found, mx.zeros_like(found), batch, objective)
                lengths = mx.concatenate([read.chosen_lengths, read.rejected_lengths])
                self.assertEqual(lengths.tolist(), counts.tolist())
        others = [[int((x < 0).sum()) for x in pair[1:3]] for pair in pairs]
        self.assertEqual(self.data.unscored.tolist(), others)
        collected = PairCollector(self.data)._tokens
        np.testing.assert_array_equal(collected.T.reshape(-1), counts)

    def test_largest_token_and_preview(self):
        tokens = np.concatenate([np.concatenate(pair[:3]) for pair in self.data])
        self.assertEqual(self.data.largest_token(), plain_ids(tokens).max())
        self.assertIn("So?", self.data.preview().replace("\\n", " "))


if __name__ == "__main__":
    unittest.main()
