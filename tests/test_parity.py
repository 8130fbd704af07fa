# Copyright © 2026 MLX Contributors

"""Every number that a run reports, against the same run in float64, TRL and plain paths.

The policy is a table of next-token logits, so that its log-probs, their gradient and
Adam's updates are a few lines of NumPy. ``python tests/test_parity.py --write`` measures
how far off each number is and renews the table in benchmarks/README.md.
"""

import io
import re
import sys
import tempfile
import unittest
from contextlib import redirect_stdout
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import test_objective_parity as objectives
from resuming import MEASURED
from tiny import Recorder, pair, random_pairs, tiny_model, train

from mlx_lm.preference.forward.frozen import FrozenStart
from mlx_lm.preference.measure.pair_metrics import LENGTH_GROUPS
from mlx_lm.preference.report.evaluate import score_pairs
from mlx_lm.tuner.trainer import DPOTrainingArgs, train_dpo

README = Path(__file__).parents[1] / "benchmarks/README.md"
MARKS = ("<!-- parity -->\n", "<!-- end of parity -->\n")
VOCAB, BETA, RATE, LIMIT = 12, 0.3, 0.05, 0.2
# Equal lengths, either one longer, one without a prompt, one token.
TRAINED = [
    pair([1, 2, 3], [4, 5], [6, 7]),
    pair([8], [9, 10, 1, 2, 3], [4]),
    pair([5, 6], [7], [8, 9, 10, 11]),
    pair([], [1, 4, 9], [2, 3]),
]
HELD_OUT = [
    pair([3, 1], [2, 9], [4, 4, 8]),
    pair([7], [5, 5, 5], [1]),
    pair([2, 2], [9, 10], [10, 9]),
]
TESTS = ("`test_parity`", "`test_objective_parity`", "`test_shared_prompt`")
# What is counted or measured, what it is compared with, and where.
COUNTED = {
    "padding": ("12 of 30 tokens, by hand", "test_preference_metrics"),
    "pairs_per_second": ("pairs and seconds, by hand", "test_preference_metrics"),
    "tokens_per_second": ("tokens and seconds, by hand", "test_preference_metrics"),
    "compile_seconds": ("0 where nothing compiles", "test_preference_metrics"),
    "val_time": ("nothing: the clock's", "test_dpo_command"),
    "peak_memory": ("nothing: the allocator's", "test_dpo_command"),
}
# Beside the reports.
SHOWN = {
    "the peak memory of the header": (
        "the allocator's, within 15 %; [more](#predicted-and-measured)",
        "test_memory_plan",
    ),
    "retained_text/before, after": ("float64, within 5e-6 nats", "test_retained_text"),
    "gradients of modules": ("norms by hand", "test_preference_metrics"),
    "lines on the screen": ("these numbers, rounded", "test_cli_ui"),
    "the table of a test": ("these numbers, rounded", "test_pair_metrics"),
    "log-probs of single pairs": ("float64, within 2e-5 nats", "test_pair_scores"),
}
STEPS, WINDOW = 6, 2  # batches, of two an update
BOUND = 1e-5  # relative above 1, absolute below


def log_softmax(x):
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def steps_of(item, answer):
    """The scored tokens of an answer, and the token before each."""
    prompt, tokens = item[0], [*item[0], *item[answer]]
    start = max(len(prompt), 1)
    return tokens[start - 1 : -1], tokens[start:]


def over_answers(pairs, value):
    """A number of each answer: chosen answers first."""
    return np.array([[value(*steps_of(p, a)) for p in pairs] for a in (1, 2)])


class Scores:
    """What two tables of logits say of some pairs: arrays of (2, pairs)."""

    def __init__(self, policy, reference, pairs):
        p, r = log_softmax(policy), log_softmax(reference)
        self.p = over_answers(pairs, lambda before, token: p[before, token].sum())
        self.r = over_answers(pairs, lambda before, token: r[before, token].sum())
        kl = (np.exp(p) * (p - r)).sum(axis=-1)
        self.kl = over_answers(pairs, lambda before, token: kl[before].sum())
        self.n = over_answers(pairs, lambda before, token: len(token))
        self.rewards = BETA * (self.p - self.r)
        self.margins = self.rewards[0] - self.rewards[1]
        self.losses = np.logaddexp(0, -self.margins)

    def metrics(self):
        """What training and validation report, as DPO_REFERENCE.md defines it."""
        more = lambda x: (x[0] > x[1]).mean()
        return {
            "loss": self.losses.mean(),
            "rewards/chosen": self.rewards[0].mean(),
            "rewards/rejected": self.rewards[1].mean(),
            "rewards/margins": self.margins.mean(),
            "rewards/accuracies": more(self.rewards),
            "logps/chosen": self.p[0].mean(),
            "logps/rejected": self.p[1].mean(),
            "logps/accuracies": more(self.p),
            "logps/accuracies_per_token": more(self.p / self.n),
            "reference_logps/accuracies": more(self.r),
            "reference_logps/accuracies_per_token": more(self.r / self.n),
            "kl_estimate": ((self.p - self.r) ** 2 / 2).sum() / self.n.sum(),
            "perplexity/policy": np.exp(-self.p[0].sum() / self.n[0].sum()),
            "perplexity/reference": np.exp(-self.r[0].sum() / self.n[0].sum()),
        }

    def tested(self):
        """What a test reports beside, without the reliability curve."""
        found = self.metrics()
        del found["kl_estimate"]
        found["pairs"] = count = self.n.shape[1]
        found["kl"] = self.kl.sum() / self.n.sum()
        for i, name in enumerate(("chosen", "rejected")):
            found[f"kl/{name}"] = self.kl[i].sum() / self.n[i].sum()
            found[f"kl_per_answer/{name}"] = self.kl[i].mean()
        # Wilson's interval: where the share is 1.96 standard errors away.
        share, z = found["rewards/accuracies"], 1.959963984540054
        roots = np.roots([1 + z**2 / count, -(2 * share + z**2 / count), share**2]).real
        found["rewards/accuracies_low"] = min(roots)
        found["rewards/accuracies_high"] = max(roots)
        shorter = self.n[0] < self.n[1]
        groups = {"chosen_shorter": shorter, "equal_length": self.n[0] == self.n[1]}
        groups["chosen_longer"] = self.n[0] > self.n[1]
        arrays = {"rewards": self.rewards, "logps": self.p, "reference_logps": self.r}
        for group, mask in groups.items():
            found[f"pairs/{group}"] = mask.sum()
            for name, x in arrays.items():
                right = (x[0] > x[1])[mask].mean()
                found[f"{name}/accuracies/{group}"] = right
        sure = 1 / (1 + np.exp(-self.margins))
        for prefix, p in (("", sure), ("reference_", np.full(count, 0.5))):
            curve = list(reliability(p))
            gaps = [n * abs(right - said) for said, right, n in curve if n]
            found[f"{prefix}calibration/brier"] = ((1 - p) ** 2).mean()
            found[f"{prefix}calibration/ece"] = sum(gaps) / count
            for name, column in zip(("confidence", "accuracy", "pairs"), zip(*curve)):
                found[f"{prefix}calibration/{name}"] = list(column)
        return found


def reliability(p):
    """Ten bins of the confidence: its mean, how many are right, and of how many."""
    confidence = np.maximum(p, 1 - p)
    for i in range(10):
        low, high = 0.5 + i / 20, 0.55 + i / 20
        inside = (confidence >= low) & ((confidence < high) | (i == 9))
        # Who is not sure is right half of the time.
        right = np.where(p == 0.5, 0.5, p > 0.5)[inside]
        said, n = confidence[inside], inside.sum()
        yield (said.mean(), right.mean(), n) if n else (None, None, 0)


def gradient(table, scores, pairs):
    """Of the summed loss, for the table of logits."""
    found, p = np.zeros_like(table), np.exp(log_softmax(table))
    # d/dm of -log sigmoid(m)
    slopes = -1 / (1 + np.exp(scores.margins))
    for item, slope in zip(pairs, slopes):
        for answer, sign in ((1, BETA), (2, -BETA)):
            for before, token in zip(*steps_of(item, answer)):
                found[before] -= slope * sign * p[before]
                found[before, token] += slope * sign
    return found


def float64_run(start):
    """Training lines, validation lines, and the table at the end."""
    table, lines, val = start.copy(), [], []
    m, v, total = np.zeros_like(table), np.zeros_like(table), np.zeros_like(table)
    validate = lambda: val.append(Scores(table, start, HELD_OUT).metrics())
    validate()
    norm, updates = 0.0, STEPS // WINDOW
    tokens = sum(sum(item[3][1:]) for item in TRAINED)
    for it in range(1, STEPS + 1):
        scores = Scores(table, start, TRAINED)
        total = total + gradient(table, scores, TRAINED)
        rate = RATE
        if it % WINDOW == 0:
            mean, total = total / (WINDOW * len(TRAINED)), np.zeros_like(table)
            norm = np.sqrt((mean**2).sum())
            mean = mean * min(1, LIMIT / norm)
            rate = RATE * (1 - (it // WINDOW - 1) / updates)
            m, v = 0.9 * m + 0.1 * mean, 0.999 * v + 0.001 * mean**2
            table = table - rate * m / (np.sqrt(v) + 1e-8)
        elif lines:
            rate = lines[-1]["learning_rate"]
        lines.append(
            {
                **scores.metrics(),
                **{"train_loss": scores.losses.mean()},
                **{"grad_norm": norm, "learning_rate": rate, "skipped_steps": 0},
                **{"trained_pairs": it * len(TRAINED), "trained_tokens": it * tokens},
            }
        )
    validate()
    return lines, val, table


def our_run(start):
    """The same from ``train_dpo`` and a test, with the number of steps in between."""
    model = nn.Sequential(nn.Embedding(VOCAB, VOCAB))
    model.layers[0].weight = mx.array(start.astype(np.float32))
    reference, recorder = FrozenStart(model), Recorder()
    rate = optim.linear_schedule(RATE, 0.0, STEPS // WINDOW)
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):
        args = DPOTrainingArgs(
            **{"beta": BETA, "batch_size": len(TRAINED), "iters": STEPS},
            **{"grad_accumulation_steps": WINDOW, "max_grad_norm": LIMIT},
            **{"steps_per_report": 1, "steps_per_eval": STEPS, "val_batches": -1},
            adapter_file=f"{folder}/adapters.safetensors",
        )
        train_dpo(
            *(model, optim.Adam(rate), TRAINED, HELD_OUT, args),
            training_callback=recorder,
        )
        tested, _ = score_pairs(model, reference, HELD_OUT, args)
    return recorder.train, recorder.val, tested


def distance(value, exact):
    """Relative above 1, absolute below; of a list the largest."""
    if isinstance(exact, list):
        return max(map(distance, value, exact))
    if exact is None:
        return 0.0 if value is None else np.inf
    return abs(value - exact) / max(1, abs(exact))


def keep(found, name, more):
    """The largest distance by name, those of groups together."""
    group = name.rpartition("/")[2]
    if group in LENGTH_GROUPS:
        name = name.replace(group, "GROUP")
    found[name] = max(found.get(name, 0.0), more)


def from_float64():
    """How far each number of a run is from float64, and what the run reported."""
    start = np.random.default_rng(3).normal(size=(VOCAB, VOCAB)).astype(np.float32)
    start = start.astype(np.float64)
    lines, val, table = float64_run(start)
    ours = our_lines, our_val, our_test = our_run(start)
    found: dict[str, float] = {}
    for measured, exact in ((our_lines, lines), (our_val, val)):
        for one, other in zip(measured, exact, strict=True):
            for name, x in other.items():
                value = one[name if name in one else f"val_{name}"]
                keep(found, name, distance(value, x))
    for name, x in Scores(table, start, HELD_OUT).tested().items():
        keep(found, name, distance(our_test[name], x))
    return found, ours


def from_trl():
    """How far numbers are from TRL's, over ten steps of each of its runs."""
    found: dict[str, float] = {}
    for name, run in objectives.RUNS.items():
        if name in (*objectives.NOT_OFFERED, *objectives.OTHER_FORM):
            continue
        training = objectives.Training(run)
        batches = objectives.batches_of(run)
        for k in range(len(run["loss"])):
            values = training.step(batches[k % len(batches)], k)
            for key in ("loss", *objectives.metrics_of(run)):
                keep(found, key, distance(values[key], run[key][k]))
    return found


def from_plain():
    """How far numbers with shared prompts or packed rows are from whole rows'."""
    runs, found = [], {}
    pairs = random_pairs(6, longest=20)
    for sharing in ("plain", "ragged", "equal", "packed"):
        recorder, model = Recorder(), tiny_model("lora")
        settings = {"iters": 6, "steps_per_report": 1, "sharing": sharing}
        train(model, pairs, pairs, optim.SGD(0.05), recorder, **settings)
        runs.append(recorder.train + recorder.val)
    for run in runs[1:]:
        for one, other in zip(run, runs[0], strict=True):
            for name in other.keys() - {*MEASURED, *COUNTED, "iteration"}:
                more = distance(one[name], other[name])
                keep(found, name.removeprefix("val_"), more)
    return found


def parity_table():
    """Each number, how far it is from what it is compared with, and the tests."""
    columns = [from_float64()[0], from_trl(), from_plain()]
    lines = ["| number | float64 | TRL 1.16 | plain path | tests |", "|---" * 5 + "|"]
    for name in columns[0]:
        figures = [f"{c[name]:.0e}" if name in c else "" for c in columns]
        figures = [x.replace("e-0", "e-").replace("0e+00", "0") for x in figures]
        tests = [t for t, figure in zip(TESTS, figures) if figure]
        lines.append(f"| `{name}` | {' | '.join(figures)} | {', '.join(tests)} |")
    lines += ["", "| number | compared with | test |", "|---|---|---|"]
    for name, (what, test) in (COUNTED | SHOWN).items():
        name = f"`{name}`" if name in COUNTED else name
        lines.append(f"| {name} | {what} | `{test}` |")
    return "\n".join(lines) + "\n"


class TestParity(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.found, (lines, val, tested) = from_float64()
        cls.reported = {*lines[-1], *tested}
        cls.reported |= {
            name.removeprefix("val_") for name in val[-1].keys() - {*COUNTED}
        }

    def test_every_number_is_that_of_float64(self):
        for name, more in self.found.items():
            self.assertLess(more, BOUND, name)

    def test_no_number_is_left_out(self):
        known: dict[str, float] = {}
        for name in self.reported - {"iteration", *COUNTED}:
            keep(known, name, 0.0)
        self.assertEqual(sorted(known), sorted(self.found))

    def test_the_page_has_them_all(self):
        text = README.read_text("utf-8").split(MARKS[0])[1].split(MARKS[1])[0]
        rows = [x.split("`")[1] for x in text.splitlines() if x.startswith("| `")]
        self.assertEqual(sorted(rows), sorted([*self.found, *COUNTED]))
        for test in re.findall(r"`(test_\w+)`", text):
            self.assertTrue(Path(__file__).with_name(f"{test}.py").exists(), test)


if __name__ == "__main__":
    if "--write" in sys.argv:
        before, rest = README.read_text("utf-8").split(MARKS[0])
        after = rest.split(MARKS[1])[1]
        text = before + MARKS[0] + parity_table() + MARKS[1] + after
        README.write_text(text, "utf-8")
    else:
        unittest.main()
