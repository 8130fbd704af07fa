# Copyright © 2026 MLX Contributors

"""Ten steps of each objective against trajectories that TRL 1.16 computed."""

import json
import unittest
from pathlib import Path

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten

from mlx_lm.models import llama
from mlx_lm.preference.batch.collate import collate_pairs
from mlx_lm.preference.forward.frozen import FrozenStart
from mlx_lm.preference.objective.objective import Objective
from mlx_lm.tuner.trainer import dpo_step, gradient_accumulator

FIXTURE = json.loads(
    (Path(__file__).parent / "fixtures/trl_objectives.json").read_text()
)
RUNS = FIXTURE["runs"]
METRICS = (
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
)
# TRL's settings under other names here.
NAMES = {
    "f_divergence_type": "f_divergence",
    "f_alpha_divergence_coef": "f_alpha",
    "simpo_gamma": "gamma",
    "alpha": "alphapo_alpha",
}
VALUES = {"js_divergence": "js", "alpha_divergence": "alpha"}
NOT_OF_THE_OBJECTIVE = (
    "data",
    "batch_size",
    "gradient_accumulation_steps",
    "max_grad_norm",
    "sync_ref_model",
    "ref_model_mixup_alpha",
    "ref_model_sync_steps",
)
# Its likelihood covers the prompt, see test_orpo_scores_the_answer_alone.
OTHER_FORM = ("orpo",)


def build_model():
    model = llama.Model(llama.ModelArgs(model_type="llama", **FIXTURE["model"]))
    rng, weights = np.random.default_rng(0), []
    for name, array in sorted(tree_flatten(model.parameters())):
        numbers = rng.standard_normal(array.shape)
        scaled = 1 + 0.1 * numbers if "norm" in name else 0.3 * numbers
        weights.append((name, mx.array(scaled.astype(np.float32))))
    model.load_weights(weights)
    return model


def objective_of(run):
    settings = {"loss_type": run["trainer"], "beta": FIXTURE["training"]["beta"]}
    if run["trainer"] == "dpo":
        settings["loss_type"] = "sigmoid"
    for name, value in run["settings"].items():
        if name not in NOT_OF_THE_OBJECTIVE:
            value = VALUES.get(value, value) if isinstance(value, str) else value
            settings[NAMES.get(name, name)] = value
    if settings["loss_type"] == "simpo":
        # Of cpo's trainer, where it turns cpo's likelihood off.
        settings.pop("cpo_alpha")
    return Objective(**settings)


def as_pair(row, answers):
    prompt, (first, second) = row["prompt_ids"], (row[name] for name in answers)
    counts = (len(prompt), len(prompt + first), len(prompt + second))
    return prompt, first, second, counts


def pair_batches(name, size=6):
    answers = ("chosen_ids", "rejected_ids")
    pairs = [as_pair(row, answers) for row in FIXTURE[name]]
    return [collate_pairs(pairs[i : i + size]) for i in range(0, len(pairs), size)]


def unpaired_batches(size, alone=False):
    """Labelled rows, each with the completion of the row before it in its batch."""
    batches, rows = [], FIXTURE["unpaired"]
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        mismatched = [row["completion_ids"] for row in part[-1:] + part[:-1]]
        mismatched = [[] for _ in part] if alone else mismatched
        part = [row | {"other": other} for row, other in zip(part, mismatched)]
        batch = collate_pairs([as_pair(x, ("completion_ids", "other")) for x in part])
        batches.append(batch | {"labels": mx.array([1.0 * x["label"] for x in part])})
    return batches


def batches_of(run):
    settings = FIXTURE["training"] | run["settings"]
    if run["trainer"] == "kto":
        alone = settings.get("loss_type") == "apo_zero_unpaired"
        return unpaired_batches(settings["batch_size"], alone)
    return pair_batches(settings.get("data", "pairs"), settings["batch_size"])


def metrics_of(run):
    """The metrics that TRL defines as mlx_lm does."""
    loss_type = run["settings"].get("loss_type")
    if loss_type == "sft":
        # Alone it has no reference here, so that its rewards are log-probs.
        return [key for key in METRICS if key.startswith("logps")]
    if loss_type in ("simpo", "alphapo") or run["trainer"] == "orpo":
        # TRL reports means over tokens as logps.
        return [key for key in METRICS if key.startswith("rewards")]
    return METRICS


class Training:
    """The tiny model, its start as reference, and TRL's optimizer."""

    def __init__(self, run):
        settings = FIXTURE["training"] | run["settings"]
        self.model = build_model()
        self.reference = FrozenStart(self.model)
        self.objective = objective_of(run)
        self.max_grad_norm = settings["max_grad_norm"] or None
        self.optimizer = optim.AdamW(
            settings["learning_rate"],
            betas=settings["adam_betas"],
            eps=settings["adam_eps"],
            weight_decay=settings["weight_decay"],
            bias_correction=True,
        )
        self.batches = settings.get("gradient_accumulation_steps", 1)
        self.accumulator = (
            gradient_accumulator(self.model) if self.batches > 1 else None
        )
        self.sync_steps = settings.get("ref_model_sync_steps")
        self.mixing = settings.get("ref_model_mixup_alpha")

    def step(self, batch, k):
        """Loss and metrics of the k-th batch, before its update."""
        reference = self.reference
        if not self.objective.needs_reference:
            # As a run does it: no reference, and no number of one.
            reference, rows = None, 2 * len(batch["weights"])
            batch = batch | {"reference_logps": mx.zeros((rows,))}
        loss, metrics = dpo_step(
            self.model,
            reference,
            batch,
            self.optimizer,
            objective=self.objective,
            max_grad_norm=self.max_grad_norm,
            accumulator=self.accumulator,
            do_update=(k + 1) % self.batches == 0,
        )
        if self.sync_steps and (k + 1) % self.sync_steps == 0:
            self.reference.sync(self.mixing)
        mx.eval(self.model.state, self.optimizer.state, self.accumulator)
        return {k: v.item() for k, v in (metrics | {"loss": loss}).items()}


class TestObjectiveParity(unittest.TestCase):
    def assert_close(self, value, expected, message):
        # Absolute below 1, relative above.
        delta = 1e-4 * max(1, abs(expected))
        self.assertAlmostEqual(value, expected, delta=delta, msg=message)

    def check(self, name):
        run = RUNS[name]
        training, batches = Training(run), batches_of(run)
        for k, expected in enumerate(run["loss"]):
            values = training.step(batches[k % len(batches)], k)
            self.assert_close(values["loss"], expected, f"{name}: loss, step {k}")
            for key in metrics_of(run):
                value, message = values[key], f"{name}: {key}, step {k}"
                self.assert_close(value, run[key][k], message)

    def test_ten_steps(self):
        for name in RUNS:
            if name not in OTHER_FORM:
                with self.subTest(run=name):
                    self.check(name)

    def test_mismatched_completions_are_those_of_trl(self):
        rows = FIXTURE["unpaired"]
        (batch,) = unpaired_batches(len(rows))
        ids = np.concatenate([row["kl_completion_ids"] for row in rows])
        own = sum(len(row["completion_ids"]) for row in rows)
        np.testing.assert_array_equal(
            np.array(batch["targets"])[own : own + len(ids)], ids
        )

    def test_orpo_scores_the_answer_alone(self):
        run, (batch,) = RUNS["orpo"], pair_batches("pairs")
        values = Training(run).step(batch, 0)
        sft = {"trainer": "dpo", "settings": {"loss_type": "sft"}}
        answers = Training(sft).step(batch, 0)
        rows = []
        for row in FIXTURE["pairs"]:
            first, *rest = row["prompt_ids"]
            rows.append({"prompt_ids": [first], "whole": rest + row["chosen_ids"]})
        whole = collate_pairs([as_pair(row, ("whole", "whole")) for row in rows])
        with_prompt = Training(sft).step(whole, 0)
        self.assert_close(
            values["loss"] - answers["loss"] + with_prompt["loss"],
            run["loss"][0],
            "orpo with the prompt's likelihood",
        )
        self.assertGreater(abs(values["loss"] - run["loss"][0]), 0.01)


if __name__ == "__main__":
    unittest.main()
