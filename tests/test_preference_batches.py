# Copyright © 2026 MLX Contributors

import unittest

import numpy as np
from tiny import Pairs, pair, random_pairs

from mlx_lm.tuner.preference_batches import (
    batch_indices,
    collate_pairs,
    iterate_preference_batches,
    padded_length,
)


class FakeGroup:
    def __init__(self, rank, size):
        self._rank, self._size = rank, size

    def rank(self):
        return self._rank

    def size(self):
        return self._size


def rows_of(batch):
    """The pairs in a batch that count, as (prompt, chosen, rejected) tuples."""
    tokens, lengths = np.array(batch["tokens"]), np.array(batch["lengths"])
    B = len(batch["weights"])
    rows = []
    for i in range(B):
        if batch["weights"][i].item() == 0:
            continue
        (p, c), (_, r) = lengths[i], lengths[i + B]
        chosen, rejected = tokens[i, :c], tokens[i + B, :r]
        rows.append((tuple(chosen[:p]), tuple(chosen[p:]), tuple(rejected[p:])))
    return rows


class TestPreferenceBatches(unittest.TestCase):
    def test_few_shapes_and_little_padding(self):
        padded = [padded_length(n) for n in range(1, 4097)]
        self.assertTrue(all(p >= n for n, p in enumerate(padded, 1)))
        self.assertLessEqual(len(set(padded[:2048])), 24)
        self.assertLessEqual(
            max(p / n for n, p in enumerate(padded, 1) if n > 63), 1.25
        )
        self.assertEqual(padded_length(700, max_length=720), 720)
        self.assertEqual(padded_length(800, max_length=720), 800)

    def test_chosen_rows_come_first_and_padding_is_on_the_right(self):
        batch = collate_pairs([pair([1, 2], [3], [4, 5]), pair([6], [7, 8], [9])])
        tokens = batch["tokens"].tolist()
        self.assertEqual(tokens[0][:4], [1, 2, 3, 0])
        self.assertEqual(tokens[1][:4], [6, 7, 8, 0])
        self.assertEqual(tokens[2][:5], [1, 2, 4, 5, 0])
        self.assertEqual(tokens[3][:4], [6, 9, 0, 0])
        lengths = batch["lengths"].tolist()
        self.assertEqual(lengths, [[2, 3], [1, 3], [2, 4], [1, 2]])

    def test_an_epoch_has_every_pair_once_also_over_ranks(self):
        pairs = Pairs(random_pairs(11))
        expected = sorted((tuple(p), tuple(c), tuple(r)) for p, c, r, _ in pairs)
        for size in (1, 2, 4):
            for seed in (None, 3):
                seen = []
                for rank in range(size):
                    group = FakeGroup(rank, size)
                    batches = iterate_preference_batches(
                        pairs, 4, seed=seed, comm_group=group
                    )
                    shapes = set()
                    for batch in batches:
                        shapes.add(batch["tokens"].shape[0])
                        seen += rows_of(batch)
                    # Collectives need every rank to run every batch.
                    self.assertEqual(shapes, {2 * 4 // size})
                with self.subTest(size=size, seed=seed):
                    self.assertEqual(sorted(seen), expected)

    def test_order_is_a_function_of_seed_and_epoch(self):
        lengths = [5] * 20
        first = batch_indices(lengths, 4, seed=1, epoch=0)
        self.assertEqual(first, batch_indices(lengths, 4, seed=1, epoch=0))
        self.assertNotEqual(first, batch_indices(lengths, 4, seed=1, epoch=1))
        self.assertNotEqual(first, batch_indices(lengths, 4, seed=2, epoch=0))
        self.assertEqual(sorted(sum(first, [])), list(range(20)))

    def test_neighbours_have_similar_lengths(self):
        rng = np.random.default_rng(0)
        lengths = rng.integers(10, 1000, 400).tolist()
        waste = 0
        for batch in batch_indices(lengths, 8, seed=0):
            longest = padded_length(max(lengths[i] for i in batch))
            waste += sum(longest - lengths[i] for i in batch)
        self.assertLess(waste / sum(lengths), 0.2)

    def test_a_sample_is_fixed_and_spread_over_all_lengths(self):
        pairs = Pairs(pair([1], [2] * n, [3]) for n in range(1, 21))
        for wanted in (1, 3, 9, 10, 50):
            runs = [
                [
                    row
                    for batch in iterate_preference_batches(
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
        seen = [rows_of(next(batches)) for _ in range(6)]
        self.assertEqual(sorted(sum(seen[:2], [])), sorted(sum(seen[2:4], [])))

    def test_impossible_batches_are_refused(self):
        pairs = Pairs(random_pairs(3))
        with self.assertRaisesRegex(ValueError, "fewer than batch_size=4"):
            next(iterate_preference_batches(pairs, 4, loop=True))
        with self.assertRaisesRegex(ValueError, "multiple of the 2 workers, got 3"):
            next(iterate_preference_batches(pairs, 3, comm_group=FakeGroup(0, 2)))
        with self.assertRaisesRegex(ValueError, "got 0"):
            next(iterate_preference_batches(pairs, 0))


if __name__ == "__main__":
    unittest.main()
