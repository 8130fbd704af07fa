# Copyright © 2026 MLX Contributors

"""Check the preference kernels on this machine's GPU, then time them.

The check compares with float64 NumPy; a finding makes the exit status 1. The
timing is interleaved: every round runs each contestant once, in turn.

    python benchmarks/kernel_benchmark.py                      # check and time
    python benchmarks/kernel_benchmark.py --check-only
    python benchmarks/kernel_benchmark.py --layouts 256,8 512,8 1024,4
"""

import argparse
import math
import statistics
import sys
import time
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_lm.kernels.preference_logps import (
    LAYOUTS,
    preference_backend,
    preference_logps,
    preference_logps_vjp,
)
from mlx_lm.preference.forward import tokens as token_scores

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from preference_oracle import CASES, check_gradient, check_scores, oracle  # noqa: E402

SIZES = [(2048, 49152), (4096, 151936), (8192, 151936)]
DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}


def check_case(case, dtype, layout, backend):
    """Compare one case with the oracle, with and without a reference."""
    x, y = (mx.array(a).astype(DTYPES[dtype]) for a in (case.x, case.y))
    targets, mask = mx.array(case.targets), mx.array(case.mask)
    cotangents = mx.array(case.cotangents)
    exact = [np.array(a.astype(mx.float32)) for a in (x, y)]
    found = []
    for dual in (True, False):
        other, rows = (y, 3) if dual else (None, 1)
        arrays = (x, other, targets, mask)
        kwargs = {"backend": backend, "layout": layout}
        scores, saved = preference_logps(*arrays, **kwargs)
        gradient = preference_logps_vjp(*arrays, saved, cotangents[:rows], **kwargs)
        expected = oracle(*exact, case.targets, case.mask, case.cotangents, dual)
        found += check_scores(np.array(scores), expected)
        gradient = np.array(gradient.astype(mx.float32))
        found += check_gradient(gradient, expected, case.mask, dtype)
    return found


def check_determinism(layout, backend, runs=50):
    """Return a finding if two runs differ in a bit."""
    rng = np.random.default_rng(3)
    x, y = (mx.array(rng.normal(size=(64, 50257)) * 3, mx.bfloat16) for _ in range(2))
    targets = mx.array(rng.integers(0, 50257, 64), mx.int32)
    mask = mx.array(rng.random(64) < 0.8)
    cotangents = mx.array(rng.normal(size=(3, 64)), mx.float32)
    seen = set()
    for _ in range(runs):
        out = preference_logps(x, y, targets, mask, backend=backend, layout=layout)
        arrays = (x, y, targets, mask, out[1], cotangents)
        gradient = preference_logps_vjp(*arrays, backend=backend, layout=layout)
        bits = (*out, gradient.view(mx.uint16))
        seen.add(b"".join(np.array(a).tobytes() for a in bits))
    return [] if len(seen) == 1 else [f"{len(seen)} results in {runs} runs"]


def check(layouts, backend):
    """Check every layout, case and dtype; print findings, return their count."""
    count = checks = 0
    for layout in layouts:
        for dtype in DTYPES:
            for case in CASES:
                for finding in check_case(case, dtype, layout, backend):
                    print(f"FINDING {layout} {dtype} {case.name}: {finding}")
                    count += 1
                checks += 1
        for finding in check_determinism(layout, backend):
            print(f"FINDING {layout}: {finding}")
            count += 1
    print(
        f"{checks} cases and {50 * len(layouts)} equal runs checked: {count} findings"
    )
    return count


def measure(run, arrays, calls):
    """Seconds of one call: ``calls`` in a row, none waited for but the last."""
    start = time.perf_counter()
    for _ in range(calls):
        mx.async_eval(run(*arrays))
    mx.synchronize()
    return (time.perf_counter() - start) / calls


def cross_entropies(x, y, targets, mask):
    """Two fused cross-entropies: what exact KL should cost no more than."""
    return -mx.fast.cross_entropy(x, targets), -mx.fast.cross_entropy(y, targets)


@mx.compile
def cross_entropies_and_kl(x, y, targets, mask):
    """Two fused cross-entropies, and the KL in MLX operations."""
    policy_logps, reference_logps = cross_entropies(x, y, targets, mask)
    a, b = x.astype(mx.float32), y.astype(mx.float32)
    a = a - mx.logsumexp(a, axis=-1, keepdims=True)
    b = b - mx.logsumexp(b, axis=-1, keepdims=True)
    kl = (mx.exp(a) * (a - b)).sum(axis=-1)
    return policy_logps, reference_logps, kl


def with_gradient(scores, kl_weight=1.0):
    """Turn scores into the gradient of a weighted sum of log-probs and KL."""

    def loss(x, y, targets, mask):
        out = scores(x, y, targets, mask)
        total = (out[0] * WEIGHTS["logp"]).sum()
        return total + (out[2] * WEIGHTS["kl"]).sum() if kl_weight else total

    return mx.grad(loss)


WEIGHTS: dict[str, mx.array] = {}


def forward_contestants(layouts, backend):
    """Name to (function, bytes that must move as a multiple of one tensor's)."""

    def plain(*arrays):
        return token_scores._plain_score_tokens(*arrays)

    def single(layout):
        return lambda x, y, t, m: preference_logps(
            x, None, t, m, backend=backend, layout=layout
        )

    def kernel(layout):
        return lambda x, y, t, m: preference_logps(
            x, y, t, m, backend=backend, layout=layout
        )

    ours = {f"kernel {n} x {b}": (kernel((n, b)), 2) for n, b in layouts}
    ours |= {f"kernel, policy only, {n} x {b}": (single((n, b)), 1) for n, b in layouts}
    return ours | {
        "(a) plain operations, compiled": (mx.compile(plain), 2),
        "(b) two cross_entropy + KL, compiled": (cross_entropies_and_kl, 2),
        "(b') two cross_entropy alone": (cross_entropies, 2),
        "one cross_entropy": (lambda x, y, t, m: mx.fast.cross_entropy(x, t), 1),
    }


def backward_contestants(layouts, backend):
    """Backward alone for the kernels; forward and backward for all."""

    def alone(layout, dual):
        def run(x, y, t, m):
            other, saved, given = (
                (y, WEIGHTS["saved"], WEIGHTS["cotangents"])
                if dual
                else (None, WEIGHTS["saved"][:2], WEIGHTS["cotangents"][:1])
            )
            arrays = (x, other, t, m, saved, given)
            return preference_logps_vjp(*arrays, backend=backend, layout=layout)

        return run

    def fused(x, y, targets, mask):
        return token_scores.score_tokens(x, y, targets, mask, kl_gradient=True)

    def plain(*arrays):
        return token_scores._plain_score_tokens(*arrays)

    ours = {f"backward {n} x {b}": (alone((n, b), True), 3) for n, b in layouts}
    ours |= {
        f"backward, log-prob only, {n} x {b}": (alone((n, b), False), 2)
        for n, b in layouts
    }
    return ours | {
        "forward + backward, kernel": (with_gradient(fused), 5),
        "forward + backward, kernel, no KL gradient": (
            with_gradient(token_scores.score_tokens, 0.0),
            4,
        ),
        "forward + backward, (a) plain operations": (
            mx.compile(with_gradient(plain)),
            5,
        ),
        "forward + backward, (b) two cross_entropy + KL": (
            mx.compile(with_gradient(cross_entropies_and_kl)),
            5,
        ),
        "forward + backward, two cross_entropy alone": (
            with_gradient(lambda *a: (*cross_entropies(*a), 0.0), 0.0),
            4,
        ),
    }


def peak_memory(run, arrays):
    """GiB above what is allocated already, the result included."""
    mx.synchronize()
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    result = run(*arrays)
    mx.eval(result)
    del result
    return (mx.get_peak_memory() - before) / 2**30


def time_size(N, V, contestants, arrays, rounds):
    """Print a table of medians, spread, bandwidth and peak memory."""
    tensor = 2 * N * V
    results, memory = {}, {}
    for name, (run, _) in contestants.items():
        try:
            memory[name] = peak_memory(run, arrays)
            guess = measure(run, arrays, 1)
            results[name] = (max(1, min(8, math.ceil(0.03 / guess))), [])
        except RuntimeError as e:
            print(f"{name} failed at {N} x {V}: {str(e)[:90]}", file=sys.stderr)
            mx.clear_cache()
    for _ in range(rounds):
        for name, (calls, times) in results.items():
            times.append(measure(contestants[name][0], arrays, calls))
    print(f"\n{N} x {V}, bfloat16, {rounds} rounds\n")
    print("| | ms | min - max | TB/s | of copy | peak GiB |")
    print("|---|---|---|---|---|---|")
    copy = None
    for name, (_, times) in results.items():
        median = statistics.median(times)
        rate = contestants[name][1] * tensor / median / 1e12
        copy = copy or rate  # the first contestant
        low, high = min(times) * 1e3, max(times) * 1e3
        print(
            f"| {name} | {median * 1e3:.3f} | {low:.3f} - {high:.3f} | {rate:.2f} "
            f"| {rate / copy:.0%} | {memory[name]:.2f} |",
            flush=True,
        )


def time_kernels(N, V, layouts, backend, rounds):
    """Time forward and backward of one size."""
    x = (mx.random.normal((N, V)) * 3).astype(mx.bfloat16)
    mx.eval(x)
    y = x + (mx.random.normal((N, V)) * 0.3).astype(mx.bfloat16)
    targets = mx.random.randint(0, V, (N,)).astype(mx.int32)
    mask = mx.ones((N,), dtype=mx.bool_)
    WEIGHTS["logp"], WEIGHTS["kl"] = (mx.random.normal((N,)) for _ in range(2))
    WEIGHTS["cotangents"] = mx.stack([WEIGHTS["logp"], mx.zeros((N,)), WEIGHTS["kl"]])
    arrays = (x, y, targets, mask)
    WEIGHTS["saved"] = preference_logps(*arrays, backend=backend)[1]
    mx.eval(arrays, WEIGHTS)
    copy = {"(c) copy": (lambda x, *_: mx.negative(x), 2)}
    for contestants in (forward_contestants, backward_contestants):
        time_size(N, V, copy | contestants(layouts, backend), arrays, rounds)


def main():
    """Check, then time."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check-only", action="store_true")
    parser.add_argument("--time-only", action="store_true")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument(
        "--layouts",
        nargs="+",
        help="threads of a threadgroup and logits a read, as 256,8",
        type=lambda text: tuple(map(int, text.split(","))),
    )
    args = parser.parse_args()
    backend = preference_backend()
    if backend is None:
        sys.exit("This machine has no GPU that MLX can use.")
    layouts = args.layouts or [LAYOUTS[backend]]
    info = mx.device_info()
    print(f"{info.get('device_name', info)}, MLX {mx.__version__}, {backend}")
    findings = 0 if args.time_only else check(layouts, backend)
    for N, V in [] if args.check_only else SIZES:
        time_kernels(N, V, layouts, backend, args.rounds)
    sys.exit(findings > 0)


if __name__ == "__main__":
    main()
