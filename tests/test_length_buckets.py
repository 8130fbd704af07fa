# Copyright © 2026 MLX Contributors

import unittest
from unittest import mock

import mlx.core as mx
import numpy as np
from tiny import Pairs, pair, random_pairs

from mlx_lm.preference.batch.buckets import LAYOUTS, length_buckets, plan_batches
from mlx_lm.preference.batch.collate import (
    collate_pairs,
    count_tokens,
    epoch_batches,
    iterate_preference_batches,
)
from mlx_lm.preference.batch.shape import (
    BatchShape,
    Bucket,
    batches_per_epoch,
    input_lengths,
    needed_tokens,
    padded_tokens,
    pair_lengths,
)
from mlx_lm.preference.run.plan import MOST_SHAPES, training_plan
from mlx_lm.tuner.trainer import DPOTrainingArgs


def random_lengths(n, seed=0, longest=500):
    """Prompts and answers whose lengths have nothing to do with each other."""
    rng = np.random.default_rng(seed)
    prompts = rng.integers(1, longest, n)
    answers = rng.integers(1, longest, (2, n))
    return np.stack([prompts, *(prompts + answers)], axis=1)


def pairs_of(lengths):
    return Pairs(
        pair(*([1] * n for n in (prompt, chosen - prompt, rejected - prompt)))
        for prompt, chosen, rejected in lengths.tolist()
    )


def one_dimensional(lengths, batch_size, number):
    """What sorting by the longer answer's length alone would compute."""
    inputs = input_lengths(lengths)
    order = np.argsort(inputs[:, 1:].max(axis=1), kind="stable")
    size = -(-len(order) // (number * batch_size)) * batch_size
    total = 0
    for i in range(0, len(order), size):
        part = inputs[order[i : i + size]]
        prompt, width = part[:, 0].max(), (part[:, 1:].max(1) - part[:, 0]).max()
        batches = -(-len(part) // batch_size)
        total += batches * batch_size * (prompt + 2 * width)
    return int(total)


class TestLengthBuckets(unittest.TestCase):
    def settings(self):
        for layout in LAYOUTS:
            for pad, prompt_pad, fused in (
                (1, 1, 1),
                (8, 1, 1),
                (8, 16, 1),
                (8, 1, 32),
            ):
                yield layout, {
                    "pad": pad,
                    "prompt_pad": prompt_pad,
                    "fused_pad": fused,
                }

    def test_each_pair_once_and_a_bounded_number_of_shapes(self):
        lengths = random_lengths(333)
        for layout, pads in self.settings():
            for most in (1, 5, 16):
                buckets = length_buckets(lengths, 4, layout, max_shapes=most, **pads)
                with self.subTest(layout=layout, most=most, pads=pads):
                    indices = np.concatenate([b.indices for b in buckets])
                    self.assertEqual(sorted(indices), list(range(333)))
                    self.assertLessEqual(len(buckets), most)
                    # All but one consist of whole batches, so few are short.
                    short = sum(len(b.indices) % 4 > 0 for b in buckets)
                    self.assertLessEqual(short, 1)
                    self.assertTrue(all(len(b.indices) >= 16 for b in buckets))

    def test_shapes_fit_every_pair(self):
        lengths = random_lengths(120, longest=60)
        pairs = pairs_of(lengths)
        for layout, pads in self.settings():
            for shape, indices in length_buckets(lengths, 4, layout, **pads):
                self.assertEqual(shape.ragged, layout == "ragged")
                self.assertEqual(
                    shape.prompt > 0, layout == "ragged" or shape.start > 0
                )
                for at in range(0, len(indices), 4):
                    chosen = [pairs[i] for i in indices[at : at + 4]]
                    # Arrays that are too small raise.
                    batch = collate_pairs(chosen, 4, shape)
                    self.assertEqual(batch["inputs"].shape, (8, shape.width))
                    self.assertEqual(batch["targets"].shape, (shape.scored,))
                    real, computed = count_tokens(batch)
                    self.assertLessEqual(real, computed)

    def test_a_function_of_its_arguments(self):
        lengths = random_lengths(100)
        for layout in LAYOUTS:
            first, again = (length_buckets(lengths, 4, layout) for _ in range(2))
            for a, b in zip(first, again, strict=True):
                self.assertEqual(a.shape, b.shape)
                np.testing.assert_array_equal(a.indices, b.indices)

    def test_less_padding_than_buckets_of_one_length(self):
        for seed in range(3):
            lengths = random_lengths(400, seed)
            for number in (4, 16):
                buckets = length_buckets(lengths, 4, "ragged", max_shapes=number)
                ours = padded_tokens(buckets, 4)
                self.assertLess(ours, 0.95 * one_dimensional(lengths, 4, number))

    def test_more_shapes_never_pad_more(self):
        lengths = random_lengths(300)
        for layout in LAYOUTS:
            plans = [
                length_buckets(lengths, 4, layout, max_shapes=n)
                for n in (1, 2, 4, 8, 16)
            ]
            tokens = [padded_tokens(plan, 4) for plan in plans]
            self.assertEqual(tokens, sorted(tokens, reverse=True))
            self.assertLess(tokens[-1], 0.75 * tokens[0])

    def test_sixteen_shapes_of_four_batches_unless_others_are_asked_for(self):
        lengths = random_lengths(1000)
        self.assertEqual(len(length_buckets(lengths, 4, "ragged")), 16)
        few = length_buckets(lengths[:80], 4, "ragged")
        self.assertEqual(min(len(b.indices) for b in few), 16)

    def test_rows_are_as_wide_as_a_fused_gradient_wants_them(self):
        # The longest is 511 tokens; attention's own cost is 1 + width / 2000.
        options = {"pad": 8, "fused_pad": 128, "max_shapes": 1}
        for longest, width in (
            (100, 104),  # 128 costs more than 104 * 1.052 = 109
            (118, 120),  # as 120 * 1.06 = 127.2
            (122, 128),
            (129, 136),
            (232, 256),
            (337, 384),
            (328, 328),
            (511, 512),
        ):
            lengths = np.full((40, 3), longest + 1)
            lengths[:, 0] = 1
            for limit in (None, 512):
                (bucket,) = length_buckets(lengths, 4, max_length=limit, **options)
                self.assertEqual(bucket.shape.width, width, (longest, limit))
            # No input may be longer than a model's positions.
            (bucket,) = length_buckets(lengths, 4, max_length=longest + 1, **options)
            most = max(longest, width if width == longest + 1 else 0)
            self.assertEqual(bucket.shape.width, most)

    def test_pairs_are_cut_where_gradients_are_fused(self):
        lengths = random_lengths(2000, longest=256)
        plans = [
            length_buckets(lengths, 4, pad=8, fused_pad=pad, max_shapes=8)
            for pad in (1, 128)
        ]

        def cost(plan):
            widths = [(b.shape.width, len(b.indices)) for b in plan]
            return sum(n * w * (1 + (w % 128 > 0) * w / 2000) for w, n in widths)

        self.assertLess(cost(plans[1]), 0.95 * cost(plans[0]))
        self.assertEqual(len({b.shape for b in plans[1]}), len(plans[1]))

    def test_rows_are_no_longer_than_allowed(self):
        lengths = np.minimum(random_lengths(200), [200, 250, 250])
        for layout in ("plain", "equal"):
            for pad in (1, 8, 64):
                for max_length in (250, 2000):
                    buckets = length_buckets(
                        lengths, 4, layout, pad=pad, max_length=max_length
                    )
                    longest = max(b.shape.start + b.shape.width for b in buckets)
                    self.assertLessEqual(longest, max_length - 1)
                    self.assertGreaterEqual(longest, 249)

    def test_scored_tokens_suffice_for_any_share_of_a_rank(self):
        lengths = random_lengths(64, longest=40)
        answers = (lengths[:, 1:] - lengths[:, :1]).sum(axis=1)
        for ranks in (1, 2, 4):
            for shape, indices in length_buckets(lengths, 8, "ragged", ranks=ranks):
                worst = np.sort(answers[indices])[::-1][: 8 // ranks].sum()
                self.assertGreaterEqual(shape.scored, worst)
                self.assertLess(shape.scored, worst + 8)

    def test_numbers_of_packed_rows_are_few_for_each_width(self):
        lengths = random_lengths(64)
        for size, ranks, shapes, step in ((8, 1, 16, 4), (8, 2, 16, 2), (8, 1, 2, 8)):
            options = {"max_shapes": shapes, "ranks": ranks, "max_length": 999}
            for bucket in length_buckets(lengths, size, "packed", **options):
                self.assertEqual(bucket.shape.packed, step)

    def test_few_and_odd_pairs(self):
        for layout in LAYOUTS:
            # Without a prompt nothing of one token is scored.
            (bucket,) = length_buckets(np.array([[0, 1, 1]]), 4, layout)
            self.assertEqual(bucket.shape.scored, 1)
            (bucket,) = length_buckets(np.array([[0, 1, 2]]), 4, layout)
            self.assertEqual(bucket.indices.tolist(), [0])
            self.assertGreaterEqual(bucket.shape.width, 1)
            same = np.array([[7, 9, 9]] * 50)
            self.assertEqual(len(length_buckets(same, 4, layout)), 1)

    def test_inputs_are_what_the_model_reads(self):
        # Of a prompt all but its last token can be shared.
        lengths = np.array([[5, 7, 9], [1, 3, 2], [0, 2, 3]])
        expected = [[4, 6, 8], [0, 2, 1], [0, 1, 2]]
        self.assertEqual(input_lengths(lengths).tolist(), expected)


class TestPlans(unittest.TestCase):
    def test_long_prompts_are_shared_where_the_model_can(self):
        lengths = random_lengths(100, longest=20)
        lengths += np.random.default_rng(1).integers(50, 300, (100, 1))
        pairs = pairs_of(lengths)
        np.testing.assert_array_equal(pair_lengths(pairs), lengths)
        for grade in LAYOUTS:
            plan = plan_batches(pairs, 4, grade)
            cheapest = min(
                padded_tokens(length_buckets(pair_lengths(pairs), 4, layout), 4)
                for layout in LAYOUTS[LAYOUTS.index(grade) :]
            )
            # Ragged prompts are taken where they save 5 % or more.
            self.assertLessEqual(padded_tokens(plan, 4), 1.05 * cheapest)
            ragged = {b.shape.ragged for b in plan}
            self.assertEqual(ragged, {grade == "ragged"})
            shared = any(b.shape.prompt for b in plan)
            self.assertEqual(shared, grade == "ragged" or plan[0].shape.start > 0)

    def test_short_prompts_are_not(self):
        lengths = np.array([[1, 41, 41], [2, 42, 42], [1, 43, 43]] * 20)
        plan = plan_batches(pairs_of(lengths), 4, "ragged")
        self.assertFalse(any(b.shape.ragged for b in plan))

    def test_prompts_of_one_length_need_no_masks(self):
        lengths = np.array([[30, 35, 36]] * 40)
        (bucket,) = plan_batches(pairs_of(lengths), 4, "ragged")
        self.assertEqual((bucket.shape.start, bucket.shape.ragged), (29, False))

    def test_only_the_best_grade_bears_tokens_behind_a_prompt(self):
        lengths = np.array([[60, 65, 66]] * 40)
        for grade, prompt in (("ragged", 64), ("equal", 59)):
            (bucket,) = plan_batches(pairs_of(lengths), 4, grade, prompt_pad=64)
            self.assertEqual((bucket.shape.prompt, bucket.shape.start), (prompt, 59))

    def test_wide_padding_of_prompts_must_be_cheap(self):
        for prompt, width in ((41, 40), (121, 128)):
            lengths = np.array([[prompt, prompt + 10, prompt + 10]] * 40)
            (bucket,) = plan_batches(
                pairs_of(lengths), 4, "ragged", pad=8, prompt_pad=128
            )
            self.assertEqual(bucket.shape.prompt, width)

    def test_counts_are_those_of_the_batches(self):
        pairs = pairs_of(random_lengths(77, longest=30))
        for grade in LAYOUTS:
            for prompt_pad in (1, 16):
                plan = plan_batches(
                    pairs, 4, grade, min_batches=1, prompt_pad=prompt_pad
                )
                batches = list(iterate_preference_batches(pairs, 4, plan))
                self.assertEqual(len(batches), batches_per_epoch(plan, 4))
                counts = [count_tokens(batch.arrays) for batch in batches]
                real, computed = np.sum(counts, axis=0)
                self.assertEqual(real, needed_tokens(plan, pair_lengths(pairs)))
                self.assertEqual(computed, padded_tokens(plan, 4))

    def test_a_run_counts_its_shapes(self):
        pairs = pairs_of(random_lengths(2000, longest=200))
        for accumulation, most in ((1, MOST_SHAPES), (4, MOST_SHAPES // 2)):
            args = DPOTrainingArgs(
                batch_size=4, grad_accumulation_steps=accumulation, compile=True
            )
            plan = training_plan(pairs, args)
            self.assertLessEqual(len(plan), most)
            self.assertTrue(all(b.shape.width % 8 == 0 for b in plan))
        free = training_plan(pairs, DPOTrainingArgs(batch_size=4, compile=False))
        self.assertGreater(len(free), len(plan))
        self.assertLess(padded_tokens(free, 4), padded_tokens(plan, 4))

    def test_only_one_batch_of_an_epoch_is_short(self):
        for n in (4, 77, 200):
            pairs = pairs_of(random_lengths(n, longest=200))
            for layout in (*LAYOUTS, "packed"):
                for ranks in (1, 2, 4):
                    for compiled, in_order in ((True, False), (False, True)):
                        args = DPOTrainingArgs(
                            batch_size=4, sharing=layout, compile=compiled
                        )
                        world = mock.Mock(size=lambda ranks=ranks: ranks)
                        with mock.patch.object(
                            mx.distributed, "init", return_value=world
                        ):
                            plan = training_plan(pairs, args, in_order)
                        self.assertEqual(batches_per_epoch(plan, 4), -(-n // 4))
                        short = [b for b in plan if len(b.indices) % 4]
                        self.assertLessEqual(len(short), 1)


class TestEpochs(unittest.TestCase):
    def test_the_same_batches_on_any_number_of_ranks(self):
        pairs = random_pairs(90, seed=2, longest=60)
        for layout in ("ragged", "equal", "plain", "packed"):
            orders = []
            for ranks in (1, 2, 4, 8):
                plan = plan_batches(
                    pairs, 8, layout, ranks=ranks, max_shapes=32, min_batches=1
                )
                batches = epoch_batches(plan, 8, seed=1, epoch=1)
                orders.append([indices for _, indices in batches])
            with self.subTest(layout=layout):
                self.assertGreater(len(plan), 1)
                self.assertEqual(orders, orders[:1] * 4)

    def test_pairs_meet_others_in_each_epoch(self):
        buckets = length_buckets(random_lengths(96), 4, "ragged")
        seen: list[set] = []
        for epoch in range(3):
            batches = epoch_batches(buckets, 4, seed=0, epoch=epoch)
            indices = sum((batch for _, batch in batches), [])
            self.assertEqual(sorted(indices), list(range(96)))
            for shape, batch in batches:
                (home,) = {b.shape for b in buckets if batch[0] in b.indices}
                self.assertEqual(shape, home)
            seen.append({frozenset(batch) for _, batch in batches})
        self.assertLess(len(seen[0] & seen[1]), 3)
        self.assertLess(len(seen[1] & seen[2]), 3)

    def test_in_order_without_a_seed(self):
        buckets = [
            Bucket(BatchShape(0, 8), np.array([5, 2])),
            Bucket(BatchShape(0, 16), np.array([1, 3, 4])),
        ]
        batches = [batch for _, batch in epoch_batches(buckets, 2)]
        self.assertEqual(batches, [[5, 2], [1, 3], [4]])


if __name__ == "__main__":
    unittest.main()
