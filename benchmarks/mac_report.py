# Copyright © 2026 MLX Contributors

"""What one machine says about this tree, as Markdown to paste into an issue.

The loss and its kernels against float64, how prompts may be shared in every precision,
a whole run through the command, and a step beside mlx-lm's own SFT, for a shape of
random weights that the memory holds. It needs no network, and ten minutes on a Mac:

    python benchmarks/mac_report.py | tee report.md
"""

import argparse
import gc
import platform
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

import dpo_benchmark
import kernel_benchmark
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import run_benchmark
from dpo_report import SHAPES, machine
from preference_oracle import make_case, oracle  # kernel_benchmark knows where
from shapes import DTYPES, random_model

from mlx_lm.kernels.preference_logps import LAYOUTS, preference_backend
from mlx_lm.preference.device import device_memory
from mlx_lm.preference.forward.probe import check_sharing
from mlx_lm.preference.run.notices import slow_blas_notice
from mlx_lm.tuner.losses import dpo_loss

say = partial(print, flush=True)

# From so many usable GB on: a shape, and the pairs of a batch.
FITTING = [(48, "qwen3-4b", 4), (20, "qwen3-0.6b", 4), (10, "qwen3-0.6b", 2)]
SMALLEST = "smollm2-135m", 2
PRECISIONS = {
    "float32": ("float32", None),
    "bfloat16": ("bfloat16", None),
    "float16": ("float16", None),
    "8-bit": ("bfloat16", 8),
    "4-bit": ("bfloat16", 4),
}
BETA = 0.1
# Of the gradient's largest value: what its own type rounds to, a few times.
GRADIENT_TOL = {"float32": 1e-4, "bfloat16": 2**-7, "float16": 2**-9}
LOSS_TOL = 1e-4


def describe_machine(args: argparse.Namespace) -> None:
    """Chip, memory, versions, commit."""
    info = mx.device_info()
    chip = info.get("device_name", info.get("architecture", "unknown chip"))
    say(machine(f"{chip} ({mx.default_device()})", "mlx", "mlx-lm", "transformers"))
    size = device_memory()
    memory = f"{size / 1e9:.1f} GB" if size else "unknown"
    system = f"macOS {mac}" if (mac := platform.mac_ver()[0]) else platform.release()
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    found = subprocess.run(git, capture_output=True, text=True)
    commit = found.stdout.strip() or "unknown"
    say(f"\n{system}; usable memory {memory}; commit {commit}")
    if notice := slow_blas_notice():
        say(f"\n{notice}")


def exact_loss(cases: list, arrays: list[np.ndarray]) -> tuple[float, list]:
    """The loss of one pair and its gradients, in float64."""
    sides = list(zip(cases, arrays[:2], arrays[2:]))
    logps = []
    for case, x, y in sides:
        scores = oracle(x, y, case.targets, case.mask, case.cotangents).scores
        logps.append(scores[0].sum() - scores[1].sum())
    margin = BETA * (logps[0] - logps[1])
    slope = -BETA / (1 + np.exp(margin))
    gradients = []
    for sign, (case, x, y) in zip((1, -1), sides):
        given = np.zeros_like(case.cotangents)
        given[0] = sign * slope
        gradients.append(oracle(x, y, case.targets, case.mask, given).gradient)
    return np.log1p(np.exp(-margin)), gradients


def loss_errors(dtype: str, tokens: int, vocabulary: int) -> tuple[float, float]:
    """How far ``dpo_loss`` and its gradient are from float64, relative."""
    rng = np.random.default_rng(0)
    cases = [make_case(rng, side, tokens, vocabulary) for side in "cr"]
    given = [a for which in ("x", "y") for a in (getattr(c, which) for c in cases)]
    logits = [mx.array(a)[None].astype(DTYPES[dtype]) for a in given]
    names = ("chosen", "rejected")
    rest = {f"{n}_targets": mx.array(c.targets)[None] for n, c in zip(names, cases)}
    rest |= {f"{n}_mask": mx.array(c.mask)[None] for n, c in zip(names, cases)}
    score = mx.value_and_grad(
        lambda x, y: dpo_loss(x, y, logits[2], logits[3], BETA, **rest), (0, 1)
    )
    loss, gradients = score(*logits[:2])
    exact = [np.array(a[0].astype(mx.float32)) for a in logits]
    expected, wanted = exact_loss(cases, exact)
    found = [np.array(g[0].astype(mx.float32)) for g in gradients]
    pairs = list(zip(found, wanted))
    largest = max(np.abs(right).max() for _, right in pairs)
    off = max(np.abs(ours - right).max() for ours, right in pairs)
    return abs(loss.item() / expected - 1), off / largest


def check_loss(args: argparse.Namespace) -> None:
    """``dpo_loss`` as a user calls it, then the kernels, where there are any."""
    backend = preference_backend()
    say(f"`dpo_loss` on {backend or 'plain operations'}, errors against float64:\n")
    say("| logits | tokens x vocabulary | loss | gradient | |\n|---|---|---|---|---|")
    for dtype in GRADIENT_TOL:
        for tokens, vocabulary in ((33, 1000), (5, 151936)):
            loss, gradient = loss_errors(dtype, tokens, vocabulary)
            good = loss <= LOSS_TOL and gradient <= GRADIENT_TOL[dtype]
            cells = [dtype, f"{tokens} x {vocabulary}", f"{loss:.1e}"]
            cells += [f"{gradient:.1e}", "ok" if good else "**off**"]
            say(f"| {' | '.join(cells)} |")
    if backend:
        say("")
        kernel_benchmark.check([LAYOUTS[backend]], backend)
        size = kernel_benchmark.SIZES[0]
        kernel_benchmark.time_kernels(*size, [LAYOUTS[backend]], backend, 5)


def check_prompts(args: argparse.Namespace) -> None:
    """What the check before a run finds in every precision."""
    seeds = range(args.seeds)
    titles = [f"seed {seed}" for seed in seeds]
    say(f"How prompts may be shared, {args.probe}, random weights:\n")
    say(f"| weights | {' | '.join(titles)} | s a check |")
    say("|---" * (len(titles) + 2) + "|")
    for name, (dtype, bits) in PRECISIONS.items():
        grades, seconds = [], []
        for seed in seeds:
            model = random_model(SHAPES[args.probe], seed)
            model.set_dtype(DTYPES[dtype])
            if bits:
                nn.quantize(model, 32, bits)
            mx.eval(model.parameters())
            start = time.perf_counter()
            grades.append(check_sharing(model).grade)
            seconds.append(time.perf_counter() - start)
        say(f"| {name} | {' | '.join(grades)} | {min(seconds):.2f} |")


def whole_run(args: argparse.Namespace) -> None:
    """The command itself: a first epoch, and one with the reference known."""
    words = ["--shape", args.shape, "--lengths", *args.lengths, "--frameworks", "mlx"]
    words += ["--pairs", str(args.pairs), "--batch-size", str(args.batch_size)]
    run_benchmark.main(words)


def single_step(args: argparse.Namespace) -> None:
    """A step beside mlx-lm's own SFT and textbook DPO."""
    prompt, completion, _ = run_benchmark.parse_lengths(args.lengths)[0]
    words = ["--shape", args.shape, "--batch-size", str(args.batch_size)]
    words += ["--prompt", str(prompt), "--completion", str(completion)]
    dpo_benchmark.run([*words, "--rounds", str(args.rounds), "--predict"])


SECTIONS: dict[str, Callable[[argparse.Namespace], None]] = {
    "mlx_lm.dpo on one machine": describe_machine,
    "The loss": check_loss,
    "Shared prompts": check_prompts,
    "A whole run": whole_run,
    "A step": single_step,
}


def write_section(
    title: str, write: Callable[[argparse.Namespace], None], args: argparse.Namespace
) -> bool:
    """Print a section; one that fails says so, and the others follow all the same."""
    say(f"\n## {title}\n")
    try:
        write(args)
    # A report is made once, on a machine that nobody else has.
    except Exception as error:
        traceback.print_exc()
        say(f"\n**failed**: {type(error).__name__}: {error}")
        return False
    finally:
        gc.collect()
        mx.clear_cache()
    return True


def fitting_shape() -> tuple[str, int]:
    """A shape and a batch that this machine's memory holds, four ways at once."""
    size = (device_memory() or 0) / 1e9
    found = ((shape, pairs) for least, shape, pairs in FITTING if size >= least)
    # On a CPU a step of a larger shape takes minutes.
    on_gpu = mx.default_device() == mx.gpu
    return next(found, SMALLEST) if on_gpu else SMALLEST


def main(argv: list[str] | None = None) -> bool:
    """Print the report; tell whether all of it could be made."""
    shape, pairs = fitting_shape()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--shape", choices=list(SHAPES), default=shape, help="by default by memory")
    add("--probe", choices=list(SHAPES), default=SMALLEST[0], help="to share prompts")
    add("--batch-size", type=int, default=pairs, help="pairs a step, by memory")
    add("--lengths", nargs="+", default=["256+128", "128+64+96", "64+128"])
    add("--pairs", type=int, default=64, help="of the whole run")
    add("--rounds", type=int, default=3, help="turns of the step")
    add("--seeds", type=int, default=3, help="models of each precision")
    args = parser.parse_args(argv)
    start = time.perf_counter()
    done = [write_section(*section, args) for section in SECTIONS.items()]
    say(f"\nMade in {(time.perf_counter() - start) / 60:.1f} minutes.")
    return all(done)


if __name__ == "__main__":
    sys.exit(not main())
