# Copyright © 2026 MLX Contributors

import contextlib
import io
import os
import struct
import tempfile
import threading
import unittest
from pathlib import Path
from unittest import mock

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from tiny import LORA, random_pairs, tiny_model

from mlx_lm.models.switch_layers import SwitchLinear
from mlx_lm.tuner import fingerprint, reference_cache
from mlx_lm.tuner.dora import DoRAEmbedding, DoRALinear
from mlx_lm.tuner.fingerprint import model_fingerprint
from mlx_lm.tuner.grad_checkpoint import keyed_layers
from mlx_lm.tuner.lora import LoRAEmbedding, LoRALinear, LoRASwitchLinear
from mlx_lm.tuner.reference_cache import ReferenceCache, pair_key
from mlx_lm.tuner.utils import linear_to_lora_layers

NAME = "0" * 64


class Holder(nn.Module):
    """A module around one array, or one layer."""

    def __init__(self, value):
        super().__init__()
        self.value = value


def print_of(value):
    return model_fingerprint(Holder(value))


def adapted(layer=None, **settings):
    mx.random.seed(settings.pop("seed", 0))
    cls = settings.pop("cls", LoRALinear)
    return cls.from_base(layer or base_layer(), **settings)


def base_layer():
    mx.random.seed(5)
    return nn.Linear(8, 6)


def numbers(n, seed=0):
    rng = np.random.default_rng(seed)
    keys = [rng.bytes(16) for _ in range(n)]
    return keys, -rng.random((n, 2)).astype(np.float32)


class TestPairKey(unittest.TestCase):
    def test_follows_from_the_ids_and_where_they_are_parted(self):
        base = ([1, 2], [3, 4], [5])
        others = [
            ([1], [2, 3, 4], [5]),
            ([1, 2], [3], [4, 5]),
            ([1, 2], [5], [3, 4]),
            ([1, 2], [3, 4], [6]),
            ([1, 2], [3, 4], [5, 0]),
            ([0, 1, 2], [3, 4], [5]),
            ([2**16 + 1, 2], [3, 4], [5]),
        ]
        keys = {pair_key(*pair) for pair in [base, *others]}
        self.assertEqual(len(keys), 8)
        self.assertEqual({len(key) for key in keys}, {16})
        arrays = [np.array(ids, dtype=np.int64) for ids in base]
        self.assertEqual(pair_key(*arrays), pair_key(*base))

    def test_no_two_pairs_share_one(self):
        pairs = {tuple(map(tuple, p[:3])) for p in random_pairs(2000)}
        self.assertEqual(len({pair_key(*p) for p in pairs}), len(pairs))


class TestModelFingerprint(unittest.TestCase):
    def test_every_element_counts(self):
        # 8 * 2**16 words are one step of the device, 2**16 words one checksum.
        big = 2 * 8 * 2**16 * 8 + 3
        for dtype, size in [
            (mx.float32, 5),
            (mx.bfloat16, 7),
            (mx.uint8, 1),
            (mx.bool_, 3),
            (mx.int64, 4),
            (mx.complex64, 3),
            (mx.uint8, big),
            (mx.bfloat16, 2**18 + 1),
        ]:
            x = mx.zeros((size,), dtype=dtype)
            seen = {print_of(x)}
            places = sorted({0, size // 2, size - 1, min(size - 1, 2**19)})
            for i in places:
                y = mx.array(x)
                y[i] = mx.array(1, dtype=dtype)
                seen.add(print_of(y))
            with self.subTest(dtype=dtype, size=size):
                self.assertEqual(len(seen), 1 + len(places))

    def test_every_bit_counts(self):
        bits = np.uint32(1) << np.arange(32, dtype=np.uint32)
        words = np.random.default_rng(0).integers(0, 2**32, 3, dtype=np.uint32)
        seen = {print_of(mx.array(words))}
        for i in range(3):
            for bit in bits:
                changed = words.copy()
                changed[i] ^= bit
                seen.add(print_of(mx.array(changed)))
        self.assertEqual(len(seen), 1 + 3 * 32)

    def test_changes_that_sums_of_odd_multiples_would_miss(self):
        x = mx.random.normal((64, 32))
        flipped = mx.array(x)
        flipped[3] = -flipped[3]
        # Top bits of an even number of 64-bit words.
        tops = x * mx.array([1, -1] * 16)
        turned = [x[::-1], x[:, ::-1], x.T, x.reshape(32, 64)]
        changes = [x, -x, 2 * x, flipped, tops, *turned]
        self.assertEqual(len({print_of(v) for v in changes}), len(changes))

    def test_layout_in_memory_does_not_count(self):
        x = mx.arange(60).astype(mx.float16)
        for view in (x[1:], x[3:55], x.reshape(6, 10).T, x[::-1], x[::2]):
            copy = mx.array(np.array(view))
            self.assertEqual(print_of(view), print_of(copy))

    def test_name_type_and_shape_count(self):
        zeros = mx.zeros((4, 2))
        kinds = [
            zeros,
            mx.zeros((2, 4)),
            mx.zeros((8,)),
            zeros.astype(mx.float16),
            zeros.astype(mx.int32),
            mx.zeros((0, 4)),
            {"a": zeros},
            {"b": zeros},
            [zeros],
            [zeros, zeros],
        ]
        self.assertEqual(len({print_of(v) for v in kinds}), len(kinds))

    def test_steps_do_not_count(self):
        x = mx.random.normal((2**21 + 11,))
        sums = b"".join(fingerprint._checksums(x))
        with mock.patch.object(mx, "default_device", return_value=mx.gpu):
            self.assertEqual(b"".join(fingerprint._checksums(x)), sums)

    def test_memory_does_not_grow_with_the_tensor(self):
        x = mx.zeros((2**25,), dtype=mx.uint8)
        print_of(mx.zeros((2**22,), dtype=mx.uint8))
        mx.eval(x)
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        print_of(x)
        self.assertLess(mx.get_peak_memory() - before, 2**25)

    def test_settings_of_the_model_count(self):
        seen = [
            model_fingerprint(tiny_model(**config))
            for config in (
                {},
                {"rope_theta": 1e6},
                {"rms_norm_eps": 1e-6},
                {"rope_traditional": True},
                {"rope_scaling": {"type": "linear", "factor": 2.0}},
                {"seed": 1},
            )
        ]
        self.assertEqual(len(set(seen)), len(seen))

    def test_quantization_counts(self):
        seen = {model_fingerprint(tiny_model())}
        for settings in (
            {"bits": 4, "group_size": 32},
            {"bits": 8, "group_size": 32},
            {"bits": 4, "group_size": 16, "mode": "nvfp4"},
            {"bits": 4, "group_size": 32, "mode": "mxfp4"},
        ):
            model = tiny_model()
            nn.quantize(model, **settings)
            seen.add(model_fingerprint(model))
        self.assertEqual(len(seen), 5)
        # The same arrays, read in another way.
        layer = nn.QuantizedLinear(64, 8, bits=4, group_size=32)
        before = print_of(layer)
        layer.bits = 8
        self.assertNotEqual(print_of(layer), before)

    def test_where_it_runs_counts(self):
        x = mx.ones((3,))
        seen = {print_of(x)}
        with mock.patch.object(mx, "__version__", "0"):
            seen.add(print_of(x))
        with mock.patch.object(mx, "default_device", return_value=mx.gpu):
            seen.add(print_of(x))
            with mock.patch.object(mx.metal, "is_available", return_value=True):
                seen.add(print_of(x))
        self.assertEqual(len(seen), 4)

    def test_states_that_compute_the_same_are_one(self):
        model = tiny_model()
        expected = model_fingerprint(model)
        model(mx.array([[1, 2]]))
        self.assertEqual(model_fingerprint(model), expected)
        model.train()
        self.assertEqual(model_fingerprint(model), expected)
        model.unfreeze()
        self.assertEqual(model_fingerprint(model), expected)
        with keyed_layers(model, checkpoint=True):
            self.assertEqual(model_fingerprint(model), expected)

    def test_fresh_adapters_are_their_base(self):
        expected = model_fingerprint(tiny_model())
        for kind, layers, settings in [
            ("lora", 2, {"rank": 4}),
            ("lora", 3, {"rank": 8}),
            ("lora", 2, {"scale": 1.0}),
            ("lora", 2, {"dropout": 0.3}),
            ("lora", 2, {"keys": ["self_attn.q_proj", "model.embed_tokens"]}),
            ("dora", 1, {"rank": 4}),
            ("dora", 3, {"rank": 8, "dropout": 0.3}),
            ("dora", 2, {"keys": ["mlp.up_proj", "model.embed_tokens"]}),
        ]:
            for seed in (1, 2):
                model = tiny_model()
                mx.random.seed(seed)
                linear_to_lora_layers(
                    model, layers, LORA | settings, use_dora=kind == "dora"
                )
                with self.subTest(kind=kind, settings=settings, seed=seed):
                    self.assertEqual(model_fingerprint(model), expected)
                    with keyed_layers(model, checkpoint=False):
                        self.assertEqual(model_fingerprint(model), expected)

    def test_fresh_adapters_of_other_layers(self):
        quantized = nn.QuantizedLinear(64, 8, bits=4, group_size=32)
        embedding = nn.Embedding(7, 4)
        for cls, base in [
            (LoRALinear, quantized),
            (DoRALinear, quantized),
            (LoRAEmbedding, embedding),
            (DoRAEmbedding, embedding),
            (LoRASwitchLinear, SwitchLinear(8, 4, 3)),
        ]:
            with self.subTest(cls=cls.__name__):
                layer = adapted(base, cls=cls)
                self.assertEqual(print_of(layer), print_of(base))
                layer.lora_b = mx.array(layer.lora_b)
                layer.lora_b[(0,) * layer.lora_b.ndim] = 1e-30
                self.assertNotEqual(print_of(layer), print_of(base))

    def test_a_trained_adapter_counts_with_all_it_has(self):
        def trained(dropout=0.0, **changes):
            layer = adapted(r=2, scale=10.0, dropout=dropout)
            layer.lora_b = mx.ones_like(layer.lora_b)
            for name, value in changes.items():
                setattr(layer, name, value)
            return print_of(layer)

        a = adapted(r=2, scale=10.0).lora_a
        kinds = [
            print_of(base_layer()),
            trained(),
            trained(scale=11.0),
            trained(lora_a=a + 1),
            trained(lora_b=mx.ones((2, 6)) * 2),
            trained(linear=nn.Linear(8, 6)),
        ]
        self.assertEqual(len(set(kinds)), len(kinds))
        self.assertEqual(trained(dropout=0.5), trained())

    def test_a_magnitude_that_was_trained_counts(self):
        layer = adapted(cls=DoRALinear)
        layer.m = layer.m * 1.001
        self.assertNotEqual(print_of(layer), print_of(base_layer()))

    def test_a_magnitude_that_was_rounded_counts(self):
        # The layer divides by a norm in float32: it is not quite its base.
        mx.random.seed(0)
        embedding = nn.Embedding(7, 16)
        embedding.weight = embedding.weight.astype(mx.bfloat16)
        layer = adapted(embedding, cls=DoRAEmbedding)
        self.assertFalse(mx.array_equal(layer(mx.arange(7)), embedding.weight).item())
        self.assertNotEqual(print_of(layer), print_of(embedding))

    def test_settings_as_text(self):
        plain = fingerprint._plain
        self.assertEqual(
            plain({"b": 1, "a": (None, True)}), plain({"a": [None, True], "b": 1})
        )
        self.assertNotEqual(plain({"a": 1}), plain({"a": "1"}))
        self.assertEqual(plain({"x", "y"}), plain({"y", "x"}))
        self.assertEqual(plain(np.float32(0.5)), "0.5")
        self.assertNotEqual(plain(mx.float32), plain(mx.float16))
        self.assertEqual(plain(object()), plain(object()))
        self.assertNotEqual(plain(nn.silu), plain(nn.gelu))


class TestReferenceCache(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name) / "references"

    def open(self, name=NAME, folder=None):
        """A cache and what opening it printed."""
        screen = io.StringIO()
        with contextlib.redirect_stdout(screen):
            cache = ReferenceCache(folder or self.folder, name)
        return cache, screen.getvalue()

    def saved(self, keys, logps, name=NAME):
        cache, _ = self.open(name)
        cache.store(keys, logps)
        cache.save()
        return cache

    def files(self):
        return sorted(p.name for p in self.folder.glob("*.safetensors"))

    def test_remembers_in_memory(self):
        cache = ReferenceCache(None, NAME)
        keys, logps = numbers(5)
        self.assertEqual(cache.unknown(keys), 5)
        self.assertTrue(np.isnan(cache.lookup(keys)).all())
        self.assertEqual((len(cache), cache.hits, cache.computed), (0, 0, 0))
        cache.store(keys[:3], mx.array(logps[:3]))
        self.assertEqual(cache.unknown(keys), 2)
        found = cache.lookup(keys[::-1])
        self.assertEqual(found.dtype, np.float32)
        np.testing.assert_array_equal(found[2:], logps[:3][::-1])
        self.assertTrue(np.isnan(found[:2]).all())
        self.assertEqual((len(cache), cache.hits, cache.computed), (3, 3, 3))
        self.assertEqual(cache.lookup([]).shape, (0, 2))
        cache.save()

    def test_remembers_on_disk_bit_for_bit(self):
        keys, logps = numbers(100)
        first = self.saved(keys, logps)
        self.assertEqual((first.hits, first.computed), (0, 100))
        second, screen = self.open()
        np.testing.assert_array_equal(second.lookup(keys), logps)
        self.assertEqual((second.hits, second.computed, screen), (100, 0, ""))
        third, _ = self.open("1" * 64)
        self.assertEqual(third.unknown(keys), 100)
        arrays = mx.load(str(first.path))
        np.testing.assert_array_equal(arrays["logps"], logps)
        self.assertEqual(np.array(arrays["keys"]).tobytes(), b"".join(keys))

    def test_a_number_that_is_not_finite_is_not_remembered(self):
        cache = ReferenceCache(None, NAME)
        rows = [[-1, np.nan], [np.inf, -1], [-np.inf, -1], [1e39, -1], [-1, -2]]
        keys, _ = numbers(5)
        with np.errstate(over="ignore"):
            cache.store(keys, np.array(rows))
        self.assertEqual((len(cache), cache.computed), (1, 1))
        self.assertEqual(cache.lookup(keys)[4].tolist(), [-1, -2])

    def test_the_first_number_stays(self):
        keys, logps = numbers(3)
        self.saved(keys[:1], logps[:1])
        cache = self.saved(keys, logps - 1)
        cache.store(keys, logps - 2)
        expected = np.concatenate([logps[:1], logps[1:] - 1])
        np.testing.assert_array_equal(cache.lookup(keys), expected)
        self.assertEqual(cache.computed, 2)
        np.testing.assert_array_equal(self.open()[0].lookup(keys), expected)

    def test_a_wrong_shape_is_refused(self):
        for shape in ((2, 3), (1, 2), (4,)):
            with self.assertRaisesRegex(ValueError, "expected \\(2, 2\\)"):
                ReferenceCache(None, NAME).store([b"a", b"b"], np.zeros(shape))

    def test_saves_only_what_is_new(self):
        keys, logps = numbers(4)
        cache = self.saved(keys[:2], logps[:2])
        with mock.patch.object(reference_cache, "replace_file") as write:
            cache.save()
            cache.store(keys[:2], logps[:2] - 1)
            cache.save()
            self.open()[0].save()
        write.assert_not_called()
        cache.store(keys, logps)
        cache.save()
        self.assertEqual(len(self.open()[0]), 4)

    def test_two_runs_at_once_keep_both_numbers(self):
        keys, logps = numbers(30)
        one, two = self.open()[0], self.open()[0]
        one.store(keys[:20], logps[:20])
        two.store(keys[10:], logps[10:] - 1)
        one.save()
        two.save()
        merged = np.concatenate([logps[:20], logps[20:] - 1])
        np.testing.assert_array_equal(self.open()[0].lookup(keys), merged)
        # Neither run sees a number of its own change, or come from elsewhere.
        np.testing.assert_array_equal(two.lookup(keys[10:]), logps[10:] - 1)
        self.assertEqual((one.unknown(keys), two.unknown(keys)), (10, 10))

    def test_many_savers_at_once_lose_nothing(self):
        keys, logps = numbers(40)
        caches = [ReferenceCache(self.folder, NAME) for _ in range(8)]

        def work(i):
            for j in range(i, 40, 8):
                caches[i].store(keys[j : j + 1], logps[j : j + 1])
                caches[i].save()

        # Threads share a process id, and with it the name of the file to rename.
        ids = mock.patch.object(os, "getpid", threading.get_ident)
        with ids:
            threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
            for t in threads:
                t.start()
            for t in threads:
                t.join()
        np.testing.assert_array_equal(self.open()[0].lookup(keys), logps)
        self.assertEqual(self.files(), [f"{NAME}.safetensors"])

    def test_a_file_that_went_away_is_written_again(self):
        keys, logps = numbers(4)
        self.saved(keys[:2], logps[:2])
        cache, _ = self.open()
        cache.path.unlink()
        cache.store(keys, logps)
        cache.save()
        self.assertEqual(len(self.open()[0]), 4)

    def check_damaged(self, path, raw):
        path.write_bytes(raw)
        cache, screen = self.open()
        self.assertEqual(len(cache), 0)
        self.assertRegex(screen, r"^\[WARNING\] .*damaged: .* again\.\n$")
        return cache

    def test_one_changed_byte_is_found(self):
        keys, logps = numbers(6)
        path = self.saved(keys, logps).path
        good = path.read_bytes()
        for i in range(len(good)):
            bad = bytearray(good)
            bad[i] ^= 1 << (i % 8)
            with self.subTest(byte=i):
                self.check_damaged(path, bytes(bad))
        path.write_bytes(good)
        self.assertEqual(len(self.open()[0]), 6)

    def test_a_cut_file_is_found(self):
        keys, logps = numbers(6)
        path = self.saved(keys, logps).path
        good = path.read_bytes()
        for size in (*range(0, len(good), 7), len(good) - 1, len(good) - 24):
            with self.subTest(size=size):
                self.check_damaged(path, good[:size])
        self.check_damaged(path, good + b"\0" * 24)

    def test_a_foreign_file_is_found_and_replaced(self):
        keys, logps = numbers(6)
        path = self.saved(keys, logps).path
        other = self.saved(keys, logps - 1, "1" * 64).path.read_bytes()
        mx.save_safetensors(str(path), {"keys": mx.zeros((9, 9))})
        arrays = path.read_bytes()
        for raw in (other, arrays, b"hello" * 99, struct.pack("<Q", 2**63) * 9):
            cache = self.check_damaged(path, raw)
            cache.store(keys, logps)
            screen = io.StringIO()
            with contextlib.redirect_stdout(screen):
                cache.save()
            self.assertEqual(screen.getvalue(), "")
            np.testing.assert_array_equal(self.open()[0].lookup(keys), logps)

    def test_a_folder_that_cannot_be_written_costs_one_warning(self):
        keys, logps = numbers(4)
        self.folder.write_text("a file, not a folder")
        cache, screen = self.open(folder=self.folder / "references")
        self.assertEqual(screen, "")
        screen = io.StringIO()
        with contextlib.redirect_stdout(screen):
            cache.store(keys[:2], logps[:2])
            cache.save()
            cache.store(keys, logps)
            cache.save()
        self.assertRegex(screen.getvalue(), r"^\[WARNING\] Can't save .*\n$")
        np.testing.assert_array_equal(cache.lookup(keys), logps)
        # It is written as soon as that is possible.
        self.folder.unlink()
        cache.save()
        self.assertEqual(len(self.open(folder=cache.path.parent)[0]), 4)

    def test_a_file_that_cannot_be_read_costs_one_warning(self):
        (self.folder / f"{NAME}.safetensors").mkdir(parents=True)
        cache, screen = self.open()
        self.assertRegex(screen, r"^\[WARNING\] Can't read .*\n$")
        self.assertEqual(len(cache), 0)

    def test_files_unused_for_longest_make_room(self):
        keys, logps = numbers(50)
        names = [digit * 64 for digit in "abcd"]
        for age, name in zip((40, 30, 20, 10), names, strict=True):
            path = self.saved(keys, logps, name).path
            os.utime(path, (path.stat().st_mtime - age,) * 2)
        size = path.stat().st_size
        model = self.folder / "model.safetensors"
        model.write_bytes(b"\0" * 4 * size)
        os.utime(model, (0, 0))
        # Opened, so that it is in use.
        self.open(names[0])
        with mock.patch.object(reference_cache, "MAX_FOLDER_BYTES", 3 * size):
            self.saved(keys, logps, "e" * 64)
        left = [f"{d * 64}.safetensors" for d in "ade"] + ["model.safetensors"]
        self.assertEqual(self.files(), left)
        # A file alone may be larger than that.
        with mock.patch.object(reference_cache, "MAX_FOLDER_BYTES", 1):
            self.saved(keys, logps, "f" * 64)
        self.assertEqual(self.files(), [f"{'f' * 64}.safetensors", "model.safetensors"])


class Group:
    """Processes as threads: all_gather stacks what each of them brings."""

    def __init__(self, size):
        self._size, self._parts = size, [None] * size
        self._barrier = threading.Barrier(size)
        self.local = threading.local()

    def size(self):
        return self._size

    def all_gather(self, x, group):
        self._parts[self.local.rank] = np.array(x)
        self._barrier.wait(5)
        y = mx.array(np.concatenate(self._parts))
        self._barrier.wait(5)
        return y

    def run(self, work):
        def start(rank):
            self.local.rank = rank
            work(rank)

        with mock.patch.object(mx.distributed, "all_gather", self.all_gather):
            threads = [
                threading.Thread(target=start, args=(rank,))
                for rank in range(self._size)
            ]
            for t in threads:
                t.start()
            for t in threads:
                t.join()


class TestExchange(unittest.TestCase):
    def test_every_rank_gets_all_numbers(self):
        keys, logps = numbers(10)
        caches = [ReferenceCache(None, NAME) for _ in range(3)]
        parts = [range(0, 6), range(6, 6), range(4, 10)]
        group = Group(3)

        def work(rank):
            mine = parts[rank]
            mx.eval(logps_of := mx.array(logps - rank))
            caches[rank].store([keys[i] for i in mine], np.array(logps_of)[list(mine)])
            caches[rank].exchange(group)
            # Nothing is new, but all are called.
            caches[rank].exchange(group)

        group.run(work)
        expected = np.concatenate([logps[:6], logps[6:] - 2])
        for cache in caches:
            np.testing.assert_array_equal(cache.lookup(keys), expected)
        self.assertEqual([c.computed for c in caches], [6, 0, 6])

    def test_what_one_rank_read_reaches_the_others_and_the_disk(self):
        keys, logps = numbers(7)
        with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as two:
            for folder, part in ((one, slice(0, 3)), (two, slice(3, 7))):
                cache = ReferenceCache(Path(folder), NAME)
                cache.store(keys[part], logps[part])
                cache.save()
            caches = [ReferenceCache(Path(folder), NAME) for folder in (one, two)]
            group = Group(2)
            group.run(lambda rank: caches[rank].exchange(group))
            caches[0].save()
            for cache in (*caches, ReferenceCache(Path(one), NAME)):
                np.testing.assert_array_equal(cache.lookup(keys), logps)
            self.assertEqual(len(ReferenceCache(Path(two), NAME)), 4)

    def test_one_process_alone(self):
        keys, logps = numbers(3)
        cache = ReferenceCache(None, NAME)
        cache.store(keys, logps)
        cache.exchange(mx.distributed.init())
        np.testing.assert_array_equal(cache.lookup(keys), logps)


if __name__ == "__main__":
    unittest.main()
