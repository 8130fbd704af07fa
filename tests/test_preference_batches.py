# Copyright © 2026 MLX Contributors

import unittest

import mlx.core as mx
import numpy as np
from tiny import Pairs, pair, random_pairs

from mlx_lm.preference.batch.buckets import plan_batches
from mlx_lm.preference.batch.collate import (
    PairBatch,
    collate_pairs,
    count_tokens,
    epoch_batches,
    iterate_preference_batches,
)
from mlx_lm.preference.batch.shape import BatchShape


class FakeGroup:
    def __init__(self, rank, size):
        self._rank, self._size = rank, size

    def rank(self):
        return self._rank

    def size(self):
        return self._size


def rows_of(batch):
    """The pairs in a batch that count, as (prompt, chosen, rejected) tuples.

    Put together again from the arrays alone: the shared prompt, what follows it,
    and the last token of an answer, which is only predicted.
    """
    arrays = {k: np.array(v) for k, v in batch.items()}
    inputs, positions, rows = (arrays[k] for k in ("inputs", "positions", "rows"))
    B = len(arrays["weights"])
    answers = []
    for row in range(2 * B):
        length, total = arrays["lengths"][row]
        shared = arrays.get("prompts", np.zeros((B, 0)))[row % B]
        if "prompt_lengths" in arrays:
            shared = shared[: arrays["prompt_lengths"][row % B]]
        whole = [*shared, *inputs[row][: total - 1 - len(shared)]]
        scored = rows == row
        if scored.any():
            # Each target is what follows the position that predicts it.
            last = arrays["targets"][scored][-1]
            at = positions[scored] - row * inputs.shape[1] + len(shared) + 1
            whole.append(last)
            np.testing.assert_array_equal(
                np.array(whole)[at], arrays["targets"][scored]
            )
            assert at.tolist() == list(range(max(length, 1), total))
        answers.append((tuple(whole[:length]), tuple(whole[length:total])))
    return [
        (*answers[i], answers[i + B][1])
        for i in range(B)
        if arrays["weights"][i] != 0 and answers[i][0] == answers[i + B][0]
    ]


def rows_of_pairs(pairs):
    return [(tuple(p), tuple(c), tuple(r)) for p, c, r, _ in pairs]


class TestPreferenceBatches(unittest.TestCase):
    def test_too_few_pairs_are_counted(self):
        for count, said in ((0, "0 usable pairs,"), (1, "1 usable pair,")):
            few = random_pairs(2)[:count]
            with self.assertRaisesRegex(
                ValueError, f"has {said} fewer than batch_size=4"
            ):
                next(iterate_preference_batches(few, 4, loop=True))

    def test_few_shapes_without_a_plan(self):
        widths = {}
        for n in range(1, 2048):
            widths[n] = collate_pairs([pair([1] * n, [2], [3])])["inputs"].shape[1]
        self.assertTrue(all(w >= n for n, w in widths.items()))
        self.assertLessEqual(len(set(widths.values())), 24)
        self.assertLessEqual(max(w / n for n, w in widths.items() if n > 63), 1.25)

    def test_chosen_rows_come_first_and_padding_is_on_the_right(self):
        pairs = [pair([1, 2], [3], [4, 5]), pair([6], [7, 8], [9])]
        batch = collate_pairs(pairs)
        tokens = batch["inputs"].tolist()
        # The last token of a row is predicted and never read.
        self.assertEqual(tokens[0][:4], [1, 2, 0, 0])
        self.assertEqual(tokens[1][:4], [6, 7, 0, 0])
        self.assertEqual(tokens[2][:5], [1, 2, 4, 0, 0])
        self.assertEqual(tokens[3][:4], [6, 0, 0, 0])
        self.assertEqual(batch["targets"].tolist()[:6], [3, 7, 8, 4, 5, 9])
        self.assertEqual(batch["rows"].tolist()[:7], [0, 1, 1, 2, 2, 3, 4])
        lengths = batch["lengths"].tolist()
        self.assertEqual(lengths, [[2, 3], [1, 3], [2, 4], [1, 2]])

    def test_every_layout_holds_the_same_pairs(self):
        pairs = [
            *(pair([1, 2, 3, 4], [5], [6, 7]), pair([8, 9, 10], [11, 12], [13])),
            pair([14, 15], [16, 17, 18], [19]),
        ]
        empty = pair([20], [21, 22], [23])
        for shape in (
            BatchShape(0, 8),
            BatchShape(1, 8),
            BatchShape(3, 8, True),
            BatchShape(3, 4, True, scored=40),
        ):
            for size in (None, 5):
                # A prompt of one token has nothing to share before its rows.
                kept = pairs + ([empty] if shape.ragged or not shape.prompt else [])
                with self.subTest(shape=shape, size=size):
                    batch = collate_pairs(kept, size, shape)
                    self.assertEqual(rows_of(batch), rows_of_pairs(kept))
                    if shape.scored:
                        self.assertEqual(batch["targets"].shape, (shape.scored,))
                    B = size or len(kept)
                    self.assertEqual(batch["inputs"].shape, (2 * B, shape.width))
                    filled = (batch["rows"] == 2 * B).sum().item()
                    answers = sum(len(c) + len(r) for _, c, r, _ in kept)
                    self.assertEqual(filled, batch["rows"].size - answers)

    def test_empty_prompts_score_from_the_second_token(self):
        for shape in (BatchShape(0, 8), BatchShape(4, 8, True)):
            batch = collate_pairs([pair([], [1, 2, 3], [4, 5])], shape=shape)
            self.assertEqual(batch["targets"].tolist()[:3], [2, 3, 5])
            self.assertEqual(batch["positions"].tolist()[:3], [0, 1, 8])

    def test_tokens_are_counted_as_they_are_computed(self):
        pairs = [pair([1, 2, 3], [4], [5, 6]), pair([1, 2, 3, 4], [5, 6], [7])]
        # Inputs of 3, 4, 5 and 4 tokens, of which 2 and 3 can be shared.
        for shape, real, padded in (
            (BatchShape(0, 5), 16, 3 * 2 * 5),
            (BatchShape(2, 3), 12, 3 * (2 + 2 * 3)),
            (BatchShape(3, 2, True), 11, 3 * (3 + 2 * 2)),
        ):
            self.assertEqual(
                count_tokens(collate_pairs(pairs, 3, shape)), (real, padded)
            )

    def test_an_epoch_has_every_pair_once_also_over_ranks(self):
        pairs = Pairs(random_pairs(11))
        expected = sorted(rows_of_pairs(pairs))
        for size in (1, 2, 4):
            for seed, grade in ((None, "plain"), (3, "plain"), (3, "ragged")):
                buckets = plan_batches(pairs, 4, grade, min_batches=1, ranks=size)
                seen, shapes = [], []
                for rank in range(size):
                    group = FakeGroup(rank, size)
                    batches = iterate_preference_batches(
                        pairs, 4, buckets, seed=seed, comm_group=group
                    )
                    shapes.append([])
                    for indices, batch in batches:
                        self.assertEqual(batch["inputs"].shape[0], 2 * 4 // size)
                        self.assertEqual(len(indices), 4 // size)
                        mine = zip(indices, batch["weights"].tolist())
                        mine = [pairs[i] for i, weight in mine if weight]
                        self.assertEqual(rows_of(batch), rows_of_pairs(mine))
                        seen += rows_of(batch)
                        shapes[-1].append(
                            sorted((k, np.shape(v)) for k, v in batch.items())
                        )
                with self.subTest(size=size, seed=seed, grade=grade):
                    self.assertEqual(sorted(seen), expected)
                    # Collectives need every rank to run every batch.
                    self.assertEqual(shapes, [shapes[0]] * size)

    def test_order_is_a_function_of_seed_and_epoch(self):
        buckets = plan_batches([pair([1], [2], [3])] * 20, 4)
        first = epoch_batches(buckets, 4, seed=1, epoch=0)
        self.assertEqual(first, epoch_batches(buckets, 4, seed=1, epoch=0))
        self.assertNotEqual(first, epoch_batches(buckets, 4, seed=1, epoch=1))
        self.assertNotEqual(first, epoch_batches(buckets, 4, seed=2, epoch=0))
        indices = sum((indices for _, indices in first), [])
        self.assertEqual(sorted(indices), list(range(20)))

    def test_neighbours_have_similar_lengths(self):
        rng = np.random.default_rng(0)
        pairs = [pair([1] * n, [2], [3]) for n in rng.integers(10, 1000, 400)]
        batches = iterate_preference_batches(pairs, 8, seed=0)
        counts = np.array([count_tokens(batch) for _, batch in batches])
        real, computed = counts.sum(axis=0)
        self.assertEqual(real, sum(2 * len(prompt) for prompt, *_ in pairs))
        self.assertLess((computed - real) / real, 0.2)

    def test_a_sample_is_fixed_and_spread_over_all_lengths(self):
        pairs = Pairs(pair([1], [2] * n, [3]) for n in range(1, 21))
        for wanted in (1, 3, 9, 10, 50):
            runs = [
                [
                    row
                    for _, batch in iterate_preference_batches(
                        pairs, 2, num_batches=wanted
                    )
                    for row in rows_of(batch)
                ]
                for _ in range(2)
            ]
            self.assertEqual(*runs)
            lengths = [len(chosen) for _, chosen, _ in runs[0]]
            # Distinct pairs, the shortest among them and, from two on, the longest.
            self.assertEqual(len(set(lengths)), 2 * min(wanted, 10))
            self.assertEqual(min(lengths), 1)
            self.assertEqual(max(lengths), 20 if wanted > 1 else 2)

    def test_loop_goes_on_with_the_next_epoch(self):
        pairs = Pairs(random_pairs(4))
        batches = iterate_preference_batches(pairs, 2, loop=True, seed=0)
        seen = [rows_of(next(batches).arrays) for _ in range(6)]
        self.assertEqual(sorted(sum(seen[:2], [])), sorted(sum(seen[2:4], [])))
        self.assertEqual(sorted(sum(seen[:2], [])), sorted(rows_of_pairs(pairs)))

    def test_a_start_behind_some_batches_skips_just_these(self):
        pairs = Pairs(random_pairs(7))
        order = lambda n, first: [
            batch.indices
            for _, batch in zip(
                range(n),
                iterate_preference_batches(
                    pairs, 2, loop=True, seed=5, first_batch=first
                ),
            )
        ]
        whole = order(14, 0)
        for first in (1, 3, 4, 5, 9):
            self.assertEqual(order(14 - first, first), whole[first:])

    def test_filling_repeats_a_pair_that_weighs_nothing(self):
        pairs = Pairs(random_pairs(3))
        (batch,) = iterate_preference_batches(pairs, 5)
        self.assertIsInstance(batch, PairBatch)
        self.assertEqual(batch.indices, [0, 1, 2, 0, 0])
        self.assertEqual(batch.arrays["weights"].tolist(), [1, 1, 1, 0, 0])
        # Fewer pairs than ranks: the last ones only fill.
        batch = next(
            iterate_preference_batches(pairs[:1], 2, comm_group=FakeGroup(1, 2))
        )
        self.assertEqual(batch.arrays["weights"].tolist(), [0])
        self.assertEqual(batch.arrays["weights"].dtype, mx.float32)

    def test_impossible_batches_are_refused(self):
        pairs = Pairs(random_pairs(3))
        with self.assertRaisesRegex(ValueError, "multiple of the 2 workers, got 3"):
            next(iterate_preference_batches(pairs, 3, comm_group=FakeGroup(0, 2)))
        with self.assertRaisesRegex(ValueError, "got 0"):
            next(iterate_preference_batches(pairs, 0))


if __name__ == "__main__":
    unittest.main()
