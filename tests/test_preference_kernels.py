# Copyright © 2026 MLX Contributors

import contextlib
import ctypes
import importlib.util
import itertools
import re
import subprocess
import sys
import unittest
from importlib import metadata
from pathlib import Path
from unittest import mock

import mlx.core as mx
import numpy as np
from kernel_emulator import (
    COMPILER,
    DTYPES,
    LAYOUTS,
    Deadlock,
    Emulator,
    emulator,
    loaded,
    stored,
)
from preference_oracle import CASES, check_gradient, check_scores, make_case, oracle

from mlx_lm.kernels import nvrtc
from mlx_lm.kernels import preference_logps as kernels
from mlx_lm.kernels.preference_logps import kernel_text, preference_backend
from mlx_lm.preference.forward import fused
from mlx_lm.tuner.losses import dpo_loss

# The series of patches brings CUDA's text later.
TEXTS = Path(kernels.__file__).parent.glob("preference_logps_[mc]*.h")
DIALECTS = sorted((path.stem.rpartition("_")[2] for path in TEXTS), reverse=True)
BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"
SMALL = [("forward", "float32", True, layout) for layout in LAYOUTS]


def run_case(dialect, case, dtype, layout, dual):
    """Run a case on the emulator; return what differs from the oracle."""
    x, y = stored(case.x, dtype), stored(case.y, dtype)
    exact = loaded(x), loaded(y)
    rest = (case.targets, case.mask)
    expected = oracle(*exact, *rest, case.cotangents, dual)
    cotangents = case.cotangents if dual else case.cotangents[:1].copy()
    arrays = (x, y if dual else None, *rest)
    kwargs = {"dtype": dtype, "layout": layout}
    scores, saved = emulator(dialect).forward(*arrays, **kwargs)
    gradient = emulator(dialect).backward(*arrays, saved, cotangents, **kwargs)
    found = check_scores(scores, expected)
    return found + check_gradient(loaded(gradient), expected, case.mask, dtype)


@unittest.skipUnless(COMPILER, "needs Linux and g++")
class TestEmulatedKernels(unittest.TestCase):
    def setUp(self):
        self.rng = np.random.default_rng(0)

    def test_cases_against_float64(self):
        for dialect, dtype in itertools.product(DIALECTS, DTYPES):
            for i, case in enumerate(CASES):
                layout = LAYOUTS[i % len(LAYOUTS)]
                with self.subTest(dialect=dialect, dtype=dtype, case=case.name):
                    for dual in (True, False):
                        found = run_case(dialect, case, dtype, layout, dual)
                        self.assertEqual(found, [])

    def test_random_shapes(self):
        for seed in range(60):
            rng = np.random.default_rng(seed)
            N, V = rng.integers(1, 8), int(np.exp(rng.uniform(0, np.log(5000))))
            scale, distance = np.exp(rng.uniform(-3, 6)), np.exp(rng.uniform(-6, 2))
            case = make_case(rng, "", N, V, scale, distance, rng.normal() * 100)
            dtype = list(DTYPES)[seed % 3]
            with self.subTest(seed=seed, shape=(N, V), dtype=dtype):
                dialect = DIALECTS[seed % len(DIALECTS)]
                layout = LAYOUTS[seed // 2 % 2]
                found = run_case(dialect, case, dtype, layout, seed % 5 > 0)
                self.assertEqual(found, [])

    def test_the_oracle_finds_a_wrong_formula(self):
        case = make_case(self.rng, "", 4, 300)
        arrays = (case.x, case.y, case.targets, case.mask)
        expected = oracle(*arrays, case.cotangents)
        for old, new in (
            ("block_gap_sum += e * (a - b)", "block_gap_sum += e * a"),
            ("x_sum = x_sum * scale + block_sum", "x_sum = x_sum + block_sum"),
            ("gap_sum + x_sum * shift", "gap_sum"),
        ):
            text = kernel_text("forward")
            self.assertIn(old, text)
            wrong = Emulator("metal", SMALL[:1], forward=text.replace(old, new))
            scores, _ = wrong.forward(*arrays, dtype="float32")
            self.assertTrue(check_scores(scores, expected))

    def test_the_order_of_the_lanes_changes_no_bit(self):
        case = make_case(self.rng, "", 2, 5000)
        arrays = (case.x, case.y, case.targets, case.mask)
        for dialect, layout in itertools.product(DIALECTS, LAYOUTS):
            orders = range(3 if layout[0] > 256 else 50 if layout[0] < 256 else 5)
            run = emulator(dialect).forward
            seen = {
                b"".join(a.tobytes() for a in run(*arrays, order=order, **kwargs))
                for order in orders
                for kwargs in [{"dtype": "float32", "layout": layout}]
            }
            self.assertEqual(len(seen), 1)

    def test_every_missing_barrier_is_found(self):
        case = make_case(self.rng, "", 4, 2000, keep=1.0)
        arrays = (case.x, case.y, case.targets, case.mask)
        expected = oracle(*arrays, case.cotangents)
        text = kernel_text("forward")
        self.assertNotIn("barrier", kernel_text("backward"))
        places = [m.start() for m in re.finditer(re.escape(BARRIER), text)]
        self.assertEqual(len(places), text.count("barrier"))
        for place in places:
            body = text[:place] + text[place + len(BARRIER) :]
            wrong = Emulator("metal", SMALL, forward=body)
            for layout in LAYOUTS:
                kwargs = {"dtype": "float32", "layout": layout}
                found = [
                    check_scores(wrong.forward(*arrays, order=i, **kwargs)[0], expected)
                    for i in range(3)
                ]
                self.assertTrue(any(found), (place, layout))

    def test_a_barrier_that_some_lanes_miss_is_found(self):
        case = make_case(self.rng, "", 1, 100, keep=1.0)
        body = kernel_text("forward").replace(BARRIER, f"if (lane < 7) {BARRIER}", 1)
        wrong = Emulator("metal", SMALL[:1], forward=body)
        with self.assertRaises(Deadlock):
            wrong.forward(case.x, case.y, case.targets, case.mask, dtype="float32")

    def test_rows_that_lie_anywhere_in_memory(self):
        for dtype, (i, j) in itertools.product(
            DTYPES, ((0, 0), (1, 1), (3, 2), (7, 0))
        ):
            case = make_case(self.rng, "", 3, 301)
            moved = []
            for a, shift in ((case.x, i), (case.y, j)):
                buffer = np.zeros(a.size + 16, stored(a[:1], dtype).dtype)
                start = -buffer.ctypes.data % 16 // buffer.itemsize + shift
                view = buffer[start : start + a.size].reshape(a.shape)
                view[:] = stored(a, dtype)
                moved.append(view)
            x, y = moved
            kwargs = {"dtype": dtype, "layout": (64, 4)}
            arrays = (x, y, case.targets, case.mask)
            scores, saved = emulator(DIALECTS[-1]).forward(*arrays, **kwargs)
            given = (saved, case.cotangents)
            gradient = emulator(DIALECTS[-1]).backward(*arrays, *given, **kwargs)
            arrays = (loaded(x), loaded(y), case.targets, case.mask)
            expected = oracle(*arrays, case.cotangents)
            found = check_scores(scores, expected)
            found += check_gradient(loaded(gradient), expected, case.mask, dtype)
            self.assertEqual(found, [], (dtype, i, j))

    def test_masked_rows_are_not_read_and_nan_is_not_hidden(self):
        case = make_case(self.rng, "", 4, 100)
        mask = np.array([True, False, True, False])
        x = case.x.copy()
        x[1], x[2, 5] = np.nan, np.nan
        for dialect in DIALECTS:
            arrays = (x, case.y, case.targets, mask)
            scores, saved = emulator(dialect).forward(*arrays, dtype="float32")
            self.assertTrue((scores[:, ~mask] == 0).all())
            self.assertTrue(np.isnan(scores[[0, 2], 2]).all())
            self.assertTrue(np.isfinite(scores[:, 0]).all())
            gradient = emulator(dialect).backward(
                *arrays, saved, case.cotangents, dtype="float32"
            )
            self.assertTrue((gradient[~mask] == 0).all())
            self.assertTrue(np.isnan(gradient[2]).all())

    def test_reference_is_read_only_where_the_kl_has_a_cotangent(self):
        case = make_case(self.rng, "", 2, 100, keep=1.0)
        arrays = (case.targets, case.mask)
        cotangents = case.cotangents.copy()
        cotangents[2] = 0.0, 1.0
        for dialect in DIALECTS:
            run = emulator(dialect)
            _, saved = run.forward(case.x, case.y, *arrays, dtype="float32")
            y = np.full_like(case.y, np.nan)
            given = (saved, cotangents)
            gradient = run.backward(case.x, y, *arrays, *given, dtype="float32")
            self.assertTrue(np.isfinite(gradient[0]).all())
            self.assertTrue(np.isnan(gradient[1]).any())


class TestKernelText(unittest.TestCase):
    # What the text may use beside its own names, and a file of MLX's Metal
    # kernels or of mlx_lm that uses the same.
    ALLOWED = {
        "bool*": "sdpa_vector.h",
        "const": "cross_entropy.h",
        "define": "defines.h",
        "else": "cross_entropy.h",
        "float": "cross_entropy.h",
        "for": "cross_entropy.h",
        "if": "cross_entropy.h",
        "int": "cross_entropy.h",
        "return": "unary_ops.h",
        "size_t": "cross_entropy.h",
        "true": "sdpa_vector.h",
        "Limits<float>::min": "Limits<AccT>::min in cross_entropy.h",
        "NAN": "reduction/ops.h",
        "metal::fast::exp": "mlx_lm/tuner/_upstream_losses.py",
        "metal::max": "steel/attn/kernels/steel_attention.h",
        "metal::precise::log": "unary_ops.h",
        "simd_max": "cross_entropy.h",
        "simd_sum": "cross_entropy.h",
        "threadgroup": "cross_entropy.h",
        "threadgroup_barrier": "cross_entropy.h",
        "mem_flags::mem_threadgroup": "cross_entropy.h",
        "simdgroup_index_in_threadgroup": "mlx_lm/models/kimi_k3.py",
        "thread_index_in_simdgroup": "mlx_lm/models/kimi_k3.py",
        "thread_position_in_threadgroup": "mlx_lm/models/kimi_k3.py",
        "threadgroup_position_in_grid": "mlx_lm/models/kimi_k3.py",
        "_shape[": "mlx_lm/models/bitlinear_layers.py",
    }
    PARAMETERS = {"T", "R", "DUAL", "THREADS", "BLOCK", "bool", "policy_logits_shape"}
    WORD = (
        r"(?:metal::\w+::\w+|metal::\w+|mem_flags::\w+|Limits<\w+>::\w+|\b[A-Za-z_]\w*)"
    )

    def setUp(self):
        parts = ("metal", "forward", "backward")
        self.text = "".join(map(kernel_text, parts))

    def test_metal_gets_only_what_its_own_kernels_use(self):
        words = set(re.findall(self.WORD, self.text))
        own = set(re.findall(r"\b(?:float|int|bool|size_t)\s+(\w+)", self.text))
        own |= set(re.findall(r",\s*(\w+)\s*(?:=|;|\[)", self.text))
        for name, parameters in re.findall(r"#define (\w+)\(([^)]*)\)", self.text):
            own |= {name, *(p.strip() for p in parameters.split(","))}
        own |= {*kernels.INPUTS, "scores", "statistics", "cotangents", "gradient"}
        self.assertEqual(words - own - self.PARAMETERS - set(self.ALLOWED), set())
        self.assertEqual(set(re.findall(r"#\s*(\w+)", self.text)), {"define"})

    def test_mlx_uses_what_is_allowed(self):
        places = importlib.util.find_spec("mlx").submodule_search_locations
        folders = [Path(p, "include/mlx/backend/metal/kernels") for p in places]
        folder = next(filter(Path.is_dir, folders), None)
        if folder is None:
            self.skipTest("MLX is installed without its Metal headers.")
        package = Path(kernels.__file__).parents[2]
        for word, where in self.ALLOWED.items():
            needle, _, name = where.rpartition(" in ")
            root = package if name.startswith("mlx_lm/") else folder
            with self.subTest(word=word):
                self.assertIn(needle or word, (root / name).read_text())

    def test_the_text_is_fit_for_mlx(self):
        for part in ("forward", "backward"):
            # MLX looks for attributes and shapes in the body, not in the header.
            self.assertIn("threadgroup_position_in_grid", kernel_text(part))
            self.assertIn("policy_logits_shape", kernel_text(part))
        self.assertNotRegex(
            self.text, r"_position_in_grid\b(?<!threadgroup_position_in_grid)"
        )
        self.assertNotIn("atomic", self.text + "".join(map(kernel_text, DIALECTS)))
        self.assertNotIn("//", self.text)

    def test_the_name_of_a_kernel_changes_with_its_text(self):
        names = set()
        for text in ("a", "b"):
            with mock.patch.object(kernels, "kernel_text", lambda part: part + text):
                with mock.patch.object(mx.fast, "metal_kernel") as factory:
                    kernels._build.cache_clear()
                    kernels._build("metal", "forward")
            names.add(factory.call_args.kwargs["name"])
        kernels._build.cache_clear()
        self.assertEqual(len(names), 2)


def cuda_compiler():
    """CUDA's compiler from its package, which needs no card."""
    with contextlib.suppress(metadata.PackageNotFoundError):
        for file in metadata.files("nvidia-cuda-nvrtc") or ():
            if re.fullmatch(r"libnvrtc\.so\.\d+", file.name):
                return ctypes.CDLL(str(file.locate()))
    return None


class TestBuiltKernels(unittest.TestCase):
    """CUDA's text as it is built without a header."""

    def setUp(self):
        self.addCleanup(kernels._built.cache_clear)
        kernels._built.cache_clear()

    def score(self, code):
        """Score two rows with a builder that returns some code."""
        x = mx.zeros((2, 9), dtype=mx.bfloat16)
        arrays = (x, None, mx.array([0, 1]), mx.array([True, False]))
        with (
            mock.patch.object(nvrtc, "card", lambda: 90),
            mock.patch.object(nvrtc, "build", return_value=code) as build,
            mock.patch.object(mx.fast, "precompiled_cuda_kernel") as run,
            mock.patch.object(kernels, "_build") as others,
        ):
            for kernel in (run, others.return_value):
                kernel.return_value = ["scores", "statistics"]
            for _ in range(2):
                out = kernels.preference_logps(*arrays, backend="cuda")
        self.assertEqual(out, ("scores", "statistics"))
        self.assertEqual(build.call_count, 1)
        return build.call_args.args[0], run, others

    def test_what_is_built_runs(self):
        text, run, others = self.score(b"code")
        given = run.call_args.kwargs
        self.assertIn(f"void {given['name']}(", text)
        self.assertEqual(given["compiled_source"], b"code")
        self.assertEqual(given["scalars"], [2, 9])
        self.assertEqual(given["grid"], (2 * 256, 1, 1))
        self.assertTrue(given["ensure_row_contiguous"])
        self.assertFalse(others.called)

    def test_without_a_compiler_mlx_builds(self):
        _, run, others = self.score(None)
        self.assertFalse(run.called)
        self.assertEqual(others.call_count, 2)

    @unittest.skipUnless(cuda_compiler(), "needs nvidia-cuda-nvrtc")
    def test_the_compiler_is_the_one_that_is_loaded(self):
        # Loaded above from its package, whose folder no loader knows.
        find = nvrtc._compiler.__wrapped__
        self.assertIsNotNone(find().nvrtcCreateProgram)
        with mock.patch.object(ctypes, "CDLL", side_effect=OSError):
            self.assertIsNone(find())
        code = "from mlx_lm.kernels import nvrtc; print(nvrtc._compiler())"
        result = subprocess.run([sys.executable, "-c", code], capture_output=True)
        self.assertEqual(result.stdout.strip() == b"None", not mx.cuda.is_available())

    def test_old_and_unknown_cards_build_nothing(self):
        for name, kind in (
            ("sm_90", 90),
            ("sm_121", 121),
            ("sm_75", None),
            ("x", None),
        ):
            with mock.patch.object(mx, "device_info", lambda _: {"architecture": name}):
                self.assertEqual(nvrtc.card(), kind)

    @unittest.skipUnless(cuda_compiler(), "needs nvidia-cuda-nvrtc")
    def test_every_text_is_accepted(self):
        names, types = set(), kernels.TYPES
        compiler = mock.patch.object(nvrtc, "_compiler", cuda_compiler)
        pairs = [*zip(types, types), (mx.bfloat16, mx.float32)]
        with compiler:
            for part, (T, R), dual in itertools.product(
                ("forward", "backward"), pairs, (True, False)
            ):
                chosen = {"T": T, "R": R, "DUAL": dual, "THREADS": 256, "BLOCK": 8}
                name, text = kernels.cuda_text(part, tuple(chosen.items()))
                for kind in (80, 90):
                    code = nvrtc.build(text, kind)
                    self.assertIn(name.encode(), code or b"", (part, T, R, dual))
                names.add(name)
            self.assertIsNone(nvrtc.build(text.replace("float", "flot"), 90))
        self.assertEqual(len(names), 16)


@unittest.skipIf(preference_backend() is None, "needs a GPU")
class TestDeviceKernels(unittest.TestCase):
    """The kernels themselves, on Metal or CUDA."""

    DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}

    def setUp(self):
        self.backend = preference_backend()

    def test_cases_against_float64(self):
        for (name, dtype), case in itertools.product(self.DTYPES.items(), CASES):
            with self.subTest(dtype=name, case=case.name):
                x, y = (mx.array(a).astype(dtype) for a in (case.x, case.y))
                exact = [np.array(a.astype(mx.float32)) for a in (x, y)]
                rest = mx.array(case.targets), mx.array(case.mask)
                given = mx.array(case.cotangents)
                for dual in (True, False):
                    arrays = (x, y if dual else None, *rest)
                    scores, saved = kernels.preference_logps(
                        *arrays, backend=self.backend
                    )
                    gradient = kernels.preference_logps_vjp(
                        *arrays, saved, given[: 3 if dual else 1], backend=self.backend
                    )
                    expected = oracle(*exact, *case[3:], dual)
                    found = check_scores(np.array(scores), expected)
                    gradient = np.array(gradient.astype(mx.float32))
                    found += check_gradient(gradient, expected, case.mask, name)
                    self.assertEqual(found, [])

    def test_fifty_runs_give_the_same_bits(self):
        case = make_case(np.random.default_rng(0), "", 16, 50257)
        x, y = (mx.array(a).astype(mx.bfloat16) for a in (case.x, case.y))
        arrays = (x, y, mx.array(case.targets), mx.array(case.mask))
        seen = set()
        for _ in range(50):
            out = kernels.preference_logps(*arrays, backend=self.backend)
            gradient = kernels.preference_logps_vjp(
                *arrays, out[1], mx.array(case.cotangents), backend=self.backend
            )
            bits = (*out, gradient.view(mx.uint16))
            seen.add(b"".join(np.array(a).tobytes() for a in bits))
        self.assertEqual(len(seen), 1)

    def test_training_calls_the_kernel(self):
        x = mx.random.normal((2, 3, 70))
        targets = mx.array([[1, 2, 3], [4, 5, 6]])
        pairs = {"chosen_targets": targets, "rejected_targets": targets}
        logps = mock.patch.object(
            fused, "preference_logps", wraps=kernels.preference_logps
        )
        with logps as forward:
            gradient = mx.grad(lambda p: dpo_loss(p, p * 2, x, x, **pairs))(x)
            mx.eval(gradient)
        self.assertEqual(forward.call_count, 2)
        with mx.stream(mx.cpu):
            expected = mx.grad(lambda p: dpo_loss(p, p * 2, x, x, **pairs))(x)
        np.testing.assert_allclose(gradient, expected, atol=1e-6)


if __name__ == "__main__":
    unittest.main()
