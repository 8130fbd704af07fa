# Copyright © 2026 MLX Contributors

"""Shared prompts against whole rows, for every family that can be trained.

``python tests/test_shared_prompt.py --write`` renews the table in
``benchmarks/README.md``.
"""

import sys
import unittest
from functools import cache, partial
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import model_zoo as zoo
import numpy as np
from mlx.utils import tree_flatten, tree_map
from tiny import LORA, Pairs, pair, random_pairs, tiny_model, train, weights_of

from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.preference.batch.collate import collate_pairs
from mlx_lm.preference.batch.shape import BatchShape
from mlx_lm.preference.forward.answers import sequence_logps
from mlx_lm.preference.forward.caches import PromptState, leaves, prompt_caches
from mlx_lm.preference.forward.common import FrozenLayers, frozen_layers
from mlx_lm.preference.forward.frozen import FrozenStart
from mlx_lm.preference.forward.parts import calls_replaced
from mlx_lm.preference.forward.probe import check_sharing
from mlx_lm.preference.forward.recompute import NOT_RECOMPUTABLE, keyed_layers
from mlx_lm.tuner.trainer import dpo_step
from mlx_lm.tuner.utils import linear_to_lora_layers

README = Path(__file__).parents[1] / "benchmarks" / "README.md"
MARKS = ("<!-- sharing table -->\n", "<!-- end of sharing table -->\n")

MUST_SHARE = """
    llama qwen2 qwen3 qwen3_moe gemma2 gemma3_text phi3 mixtral olmo2 cohere gpt2
    gpt_neox starcoder2 deepseek_v2 mamba qwen3_next
""".split()
# Whose gradient moves nearly as much when whole rows only get more padding.
NOISE = {"kimi_k3": 1e-4, "bailing_moe_v3": 5e-5, "gemma4_text": 4e-5, "plamo2": 2e-5}
PLAIN_REASONS = {"phi3small": "its blocks of attention begin anew with each call"}
ONE_FOR_ALL = "takes one position or mask for all rows"
STATE = "its recurrent state takes in padding"
ATTENTION = "its attention takes in padding"

RNG = np.random.default_rng(0)
TOKENS = lambda n: RNG.integers(1, 60, n).tolist()
# Prompts longer than every window of the zoo, and one of a single token.
LENGTHS = ((17, 4, 6), (5, 7, 2), (12, 3, 5), (1, 4, 4))
PAIRS = [pair(*map(TOKENS, lengths)) for lengths in LENGTHS]
WEIGHTS = mx.array(RNG.normal(size=(2, len(PAIRS))), mx.float32)
RAGGED = BatchShape(16, 8, ragged=True)
# The same with tokens behind the shared part, as compiled steps have it.
EQUAL, PADDED = BatchShape(4, 20), BatchShape(8, 20, shared=4)


def whole_logps(model, batch):
    """Log-probs from the logits of the model as a whole, with its own caches."""
    logits = model(batch["inputs"], cache=make_prompt_cache(model))
    logits = logits.astype(mx.float32)
    logits = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    scored = logits.reshape(-1, logits.shape[-1])[batch["positions"]]
    scored = mx.take_along_axis(scored, batch["targets"][:, None], axis=1)[:, 0]
    rows = batch["rows"][None] == mx.arange(batch["inputs"].shape[0])[:, None]
    return (scored * rows).sum(axis=1)


def gradients(model, batch, score, checkpoint=False, compiled=False):
    """Log-probs and, for a weighted sum of them, the gradient of all parameters."""
    weights = WEIGHTS[:, : batch["lengths"].shape[0] // 2].reshape(-1)
    parameters = model.trainable_parameters()
    model.train()

    def run(batch):
        def loss(batch):
            logps = score(model, batch)
            return (logps * weights).sum(), logps

        (_, logps), gradient = nn.value_and_grad(model, loss)(batch)
        model.update(parameters)
        return logps, gradient

    with keyed_layers(model, checkpoint):
        logps, gradient = (mx.compile(run) if compiled else run)(batch)
    mx.eval(logps, gradient)
    return np.array(logps), dict(tree_flatten(gradient))


shared_gradients = partial(gradients, score=partial(sequence_logps, gradient=True))


def distance(ours, plain):
    """The norm of a difference over all parameters, by that of the gradient."""
    square = lambda x: mx.square(x.astype(mx.float32)).sum()
    apart = sum(square(ours[k] - x) for k, x in plain.items())
    return mx.sqrt(apart / sum(square(x) for x in plain.values())).item()


def why(name, model, grade):
    """Why a family shares no better than it does."""
    if grade == "ragged":
        return ""
    if grade == "plain":
        return PLAIN_REASONS.get(name, "unknown")
    try:
        mx.eval(sequence_logps(model, collate_pairs(PAIRS, shape=RAGGED)))
    except (TypeError, ValueError):
        return ONE_FOR_ALL
    has_state = any(isinstance(c, PromptState) for c in leaves(prompt_caches(model)))
    return STATE if has_state else ATTENTION


@cache
def sharing_rows():
    """What the check finds out about each family: (type, grade, why)."""
    rows = [(name, "not built", reason) for name, reason in zoo.NOT_BUILT.items()]
    for name in zoo.CONFIGS:
        model = zoo.build(name)
        grade = check_sharing(model).grade
        rows.append((name, grade, why(name, model, grade)))
    return sorted(rows)


def sharing_table():
    """The same as Markdown, one line for each grade and reason."""
    order = ["ragged", "equal", "plain", "not built"]
    groups: dict[tuple, list] = {}
    for name, grade, reason in sharing_rows():
        groups.setdefault((order.index(grade), reason), []).append(f"`{name}`")
    lines = ["| prompts | why not better | types | `model_type` |", "|---|---|---|---|"]
    lines += [
        f"| {order[i]} | {reason} | {len(names)} | {' '.join(names)} |"
        for (i, reason), names in sorted(groups.items())
    ]
    return "\n".join(lines) + "\n"


def written_table(text):
    start, end = (text.index(mark) for mark in MARKS)
    return text[start + len(MARKS[0]) : end]


def write_table():
    """Put the table between its marks in the README."""
    text = README.read_text("utf-8")
    before, rest = text.split(MARKS[0])
    after = rest.split(MARKS[1])[1]
    text = before + MARKS[0] + sharing_table() + MARKS[1] + after
    README.write_text(text, "utf-8")


class TestEveryFamily(unittest.TestCase):
    def test_types_are_built_or_listed(self):
        built = set(zoo.CONFIGS)
        self.assertEqual(sorted(built | set(zoo.NOT_BUILT)), zoo.model_types())
        self.assertFalse(built & set(zoo.NOT_BUILT))
        self.assertGreaterEqual(len(built), 0.8 * len(zoo.model_types()))

    def test_grades_and_their_table(self):
        rows = {name: (grade, reason) for name, grade, reason in sharing_rows()}
        for name in MUST_SHARE:
            self.assertIn(rows[name][0], ("ragged", "equal"), name)
        plain = {name for name, (grade, _) in rows.items() if grade == "plain"}
        self.assertEqual(plain, set(PLAIN_REASONS))
        known = {"", ONE_FOR_ALL, STATE, ATTENTION, *PLAIN_REASONS.values()}
        for name in zoo.CONFIGS:
            self.assertIn(rows[name][1], known, name)
        if "-v" in sys.argv or "--verbose" in sys.argv:
            print(sharing_table())
        # The series of patches brings the table later.
        if README.is_file():
            text = README.read_text("utf-8")
            self.assertEqual(written_table(text), sharing_table())

    def test_log_probs_and_gradients(self):
        grades = {name: grade for name, grade, _ in sharing_rows()}
        for name in zoo.CONFIGS:
            with self.subTest(model_type=name):
                model = zoo.build(name)
                if name in PLAIN_REASONS:
                    check_sharing(model)
                if grades[name] == "ragged":
                    self.compare(model, name, PAIRS, [RAGGED])
                if grades[name] != "plain":
                    shapes = [PADDED] if grades[name] == "ragged" else [EQUAL]
                    self.compare(model, name, PAIRS[:3], shapes)
                else:
                    self.compare(model, name, PAIRS, [BatchShape(0, 24)])
                loops = zoo.CONFIGS[name].get("num_loops", 1)
                self.compare_frozen_layers(model, grades[name], loops)

    def compare(self, model, name, pairs, shapes):
        batch = collate_pairs(pairs, shape=BatchShape(0, 24))
        logps, plain = gradients(model, batch, whole_logps)
        for shape in shapes:
            batch = collate_pairs(pairs, shape=shape)
            for checkpoint in (False, True)[: 1 if shape is PADDED else 2]:
                if checkpoint and name in NOT_RECOMPUTABLE:
                    with self.assertRaisesRegex(ValueError, name):
                        shared_gradients(model, batch, checkpoint=True)
                    continue
                ours, gradient = shared_gradients(model, batch, checkpoint=checkpoint)
                np.testing.assert_allclose(ours, logps, rtol=2e-5, atol=2e-5)
                bound = NOISE.get(name, 1e-5)
                self.assertLess(distance(gradient, plain), bound, (shape, checkpoint))

    def compare_frozen_layers(self, model, grade, loops):
        shape = {"ragged": RAGGED, "equal": EQUAL}.get(grade, BatchShape(0, 24))
        batch = collate_pairs(PAIRS if grade == "ragged" else PAIRS[:3], shape=shape)
        model.freeze()
        model.layers[-1].unfreeze()
        model.eval()
        frozen = FrozenLayers(model, FrozenStart(model))
        expected = sequence_logps(model, batch)
        with frozen.recording():
            first = sequence_logps(model, batch)
        np.testing.assert_array_equal(first, expected)
        # What was recorded is used for another policy.
        move = lambda x: 1.1 * x if mx.issubdtype(x.dtype, mx.floating) else x
        model.update(tree_map(move, model.trainable_parameters()))
        expected = sequence_logps(model, batch)
        runs, count = [], lambda call, *a, **k: runs.append(1) or call(*a, **k)
        layers = frozen_layers(model)
        with calls_replaced([(layer, count) for layer in layers]), frozen.replaying():
            second = sequence_logps(model, batch)
        np.testing.assert_array_equal(second, expected)
        # Layers that run once more, behind trained ones, run each time.
        passes = 2 if "prompts" in batch else 1
        self.assertEqual(len(runs), (loops - 1) * len(layers) * passes)


class TestLoops(unittest.TestCase):
    def test_a_step_that_trains_the_last_layer_alone(self):
        batch = collate_pairs(PAIRS, shape=RAGGED)
        moves = []
        for asked in (True, False):
            model = zoo.build("nanbeige")
            model.freeze()
            model.layers[-1].unfreeze()
            reference = FrozenStart(model)
            if not asked:
                # Its numbers are known: nothing is replayed.
                known = sequence_logps(reference.policy, batch)
            model.update(tree_map(lambda x: 1.1 * x, model.trainable_parameters()))
            start = weights_of(model)
            more = {} if asked else {"reference_logps": known}
            loss, metrics = dpo_step(
                *(model, reference if asked else None, batch | more, optim.SGD(1.0)),
                beta=0.5,
            )
            move = {k: mx.array(x - start[k]) for k, x in weights_of(model).items()}
            moves.append((metrics["logps/chosen"].item(), loss.item(), move))
        for ours, theirs in zip(*(x[:2] for x in moves), strict=True):
            self.assertAlmostEqual(ours, theirs, delta=1e-4 * abs(theirs))
        self.assertLess(distance(moves[0][2], moves[1][2]), 1e-4)


class TestCompiled(unittest.TestCase):
    def test_log_probs_and_gradients(self):
        for name, pairs, shape in (
            ("llama", PAIRS, RAGGED),
            ("llama", PAIRS[:3], PADDED),
            ("qwen3_next", PAIRS, RAGGED),
            ("gemma2", PAIRS[:3], EQUAL),
        ):
            for checkpoint in (False, True):
                with self.subTest(name=name, shape=shape, checkpoint=checkpoint):
                    model = zoo.build(name)
                    batch = collate_pairs(pairs, shape=shape)
                    plain = collate_pairs(pairs, shape=BatchShape(0, 24))
                    logps, expected = gradients(model, plain, whole_logps)
                    ours, gradient = shared_gradients(
                        model, batch, checkpoint=checkpoint, compiled=True
                    )
                    np.testing.assert_allclose(ours, logps, rtol=2e-5)
                    self.assertLess(distance(gradient, expected), 1e-5)


class TestWhatIsTrained(unittest.TestCase):
    def check(self, model, pairs=PAIRS, shape=RAGGED):
        batch = collate_pairs(pairs, shape=BatchShape(0, 24))
        logps, plain = gradients(model, batch, whole_logps)
        batch = collate_pairs(pairs, shape=shape)
        for checkpoint in (False, True):
            ours, gradient = shared_gradients(model, batch, checkpoint=checkpoint)
            np.testing.assert_allclose(ours, logps, rtol=2e-5)
            self.assertEqual(gradient.keys(), plain.keys())
            self.assertLess(distance(gradient, plain), 1e-5)

    def moved(self, model):
        """The model with adapters that do something."""
        move = lambda x: x + 0.05 * mx.random.normal(x.shape)
        model.update(tree_map(move, model.trainable_parameters()))
        return model

    def test_kinds_of_tuning(self):
        for kind in ("lora", "dora", "full"):
            with self.subTest(kind=kind):
                self.check(self.moved(tiny_model(kind)))

    def test_quantized_base(self):
        for use_dora in (False, True):
            model = tiny_model(None)
            nn.quantize(model, group_size=32, bits=4)
            linear_to_lora_layers(model, 2, LORA, use_dora=use_dora)
            self.check(self.moved(model))

    def test_experts(self):
        for name in ("mixtral", "qwen3_moe"):
            model = zoo.build(name)
            model.freeze()
            linear_to_lora_layers(model, 2, LORA)
            self.check(self.moved(model))

    def test_windows_of_all_sizes(self):
        # Shorter than the prompt, than the row, and longer than both.
        for window in (3, 10, 18, 40):
            model = zoo.build("gemma3_text")
            model.args.sliding_window = model.model.window_size = window
            with self.subTest(window=window):
                self.check(model)
                self.check(model, PAIRS[:3], PADDED)

    def test_dropout_is_drawn_again_in_the_recompute(self):
        batch, runs = collate_pairs(PAIRS, shape=RAGGED), []
        for seed, checkpoint in ((1, False), (1, True), (2, False)):
            model = self.moved(tiny_model("lora", dropout=0.3))
            mx.random.seed(seed)
            runs.append(shared_gradients(model, batch, checkpoint=checkpoint)[1])
        self.assertLess(distance(runs[1], runs[0]), 1e-5)
        self.assertGreater(distance(runs[2], runs[0]), 1e-2)

    def test_20_steps_end_where_plain_ones_do(self):
        # Prompts long enough to be worth sharing.
        pairs = Pairs(
            pair(TOKENS(n), *p[1:3])
            for n, p in zip((9, 14, 20, 25) * 2, random_pairs(8))
        )
        for kind in ("lora", "dora", "full"):
            results = []
            for sharing in ("plain", "ragged", "equal"):
                model = tiny_model(kind)
                # Adam would make a step out of the noise of a gradient of 0.
                optimizer = optim.SGD(0.05)
                metrics = train(model, pairs, pairs, optimizer, sharing=sharing)
                results.append((metrics, weights_of(model)))
            plain, weights = results[0]
            timed = ("second", "padding", "memory")
            for metrics, ours in results[1:]:
                with self.subTest(kind=kind):
                    for k, v in plain.items():
                        if not any(word in k for word in timed):
                            delta = 2e-4 * max(1, abs(v))
                            self.assertAlmostEqual(metrics[k], v, delta=delta, msg=k)
                    for k, v in weights.items():
                        np.testing.assert_allclose(ours[k], v, atol=2e-4, err_msg=k)


if __name__ == "__main__":
    if "--write" in sys.argv:
        write_table()
    else:
        unittest.main()
