# Copyright © 2026 MLX Contributors

"""Time a token of one set of pairs whose sequences are padded, packed or shared.

Lengths are lognormal: half of the mean is the prompt. Every layout plans one epoch
of all pairs, and a few of its batches, from short to long, are timed: a round runs
each layout once. The reference's log-probs are known.

    python benchmarks/packing_benchmark.py --model MODEL --mean 40 150 500
"""

import statistics
import sys
import time
from functools import partial
from unittest import mock

import mlx.core as mx
import numpy as np
from dpo_benchmark import (
    Pairs,
    Runner,
    add_trained_part,
    build_parser,
    command,
    keyed_layers,
    load_model,
    machine,
    our_step,
    take_turn,
)
from dpo_report import SHAPES, Way

from mlx_lm.preference.batch.collate import collate_pairs, count_tokens, epoch_batches
from mlx_lm.preference.batch.shape import pair_lengths
from mlx_lm.preference.forward.frozen import FrozenStart
from mlx_lm.preference.forward.probe import check_packing, check_sharing
from mlx_lm.preference.run.plan import training_plan
from mlx_lm.preference.step import reference_pass
from mlx_lm.tuner.trainer import DPOTrainingArgs

LAYOUTS = {"plain": "padded rows", "packed": "packed rows", "": "shared prompts"}


def lognormal_pairs(mean, spread, count, vocab, seed):
    """Pairs of random tokens; prompt and answers are half of the mean length each."""
    rng = np.random.default_rng(seed)
    # The mean of a lognormal number lies above its median.
    middle = np.log(mean / 2) - spread**2 / 2
    row = lambda n: rng.integers(1, vocab, n)
    pairs = Pairs()
    for lengths in rng.lognormal(middle, spread, (count, 3)):
        prompt, *answers = np.maximum(lengths.round().astype(int), 2).tolist()
        total = (prompt, *(prompt + n for n in answers))
        pairs.append((row(prompt), *map(row, answers), total))
    return pairs


def epoch(pairs, layout, size, args):
    """All batches of an epoch, short ones first, and the tokens that they compute."""
    settings = DPOTrainingArgs(
        batch_size=size, max_seq_length=args.max_length, sharing=layout
    )
    planned = epoch_batches(training_plan(pairs, settings), size, args.seed)
    batches = [
        collate_pairs([pairs[i] for i in indices], size, shape)
        for shape, indices in planned
    ]
    batches.sort(key=lambda batch: count_tokens(batch)[1])
    return batches, sum(count_tokens(batch)[1] for batch in batches)


def layout_runner(model, batches, args):
    """A few of the batches, and the trainer's step for them."""
    places = (np.arange(args.batches) + 0.5) / args.batches * len(batches)
    chosen = []
    model.eval()
    for batch in [batches[int(i)] for i in places]:
        logps = reference_pass(model, FrozenStart(model), batch)[0]
        mx.eval(logps)
        tokens = count_tokens(batch)[1]
        chosen.append((batch | {"reference_logps": logps}, tokens))
    step, held, *_ = our_step(model, args, True)
    scope = partial(keyed_layers, model, args.grad_checkpoint)
    return Runner(step, chosen, held, scope)


def measure(model, pairs, size, args):
    """For every layout its times, and the tokens that its epoch computes."""
    ways, runners, computed = {}, {}, {}
    for layout, name in LAYOUTS.items():
        grade = layout or check_sharing(model).grade
        batches, computed[layout] = epoch(pairs, grade, size, args)
        runners[layout] = layout_runner(model, batches, args)
        tokens = sum(count for _, count in runners[layout].batches)
        ways[layout] = Way(name, tokens)
    # Only what is compiled must be warmed up.
    warm = int(mx.default_device() == mx.gpu)
    for i in range(warm + args.rounds):
        for layout in LAYOUTS:
            take_turn(layout, ways, runners, model, args, 1, first=i < warm)
    return ways, computed


def table(title, ways, computed, lengths):
    """Lines of a Markdown table; a token is one of both whole sequences."""
    both = int((lengths[:, 1:] - 1).sum())
    lines = [
        f"\n{title}\n",
        "| layout | ms a token | min - max | to padded rows (min - max) | padding "
        "| computed to real tokens | peak GB |",
        "|---|---|---|---|---|---|---|",
    ]
    times = {}
    for layout, way in ways.items():
        # A few batches tell the time of a computed token, the epoch their number.
        scale = 1000 / way.tokens * computed[layout] / both
        times[layout] = [scale * seconds for seconds in way.seconds]
        shared = 0 if layout else int((lengths[:, 0] - 1).sum())
        padding = max(1 - (both - shared) / computed[layout], 0)
        low, middle, high = spread(times[layout])
        ratios = spread([a / b for a, b in zip(times[layout], times["plain"])])
        lines.append(
            f"| {way.name} | {middle:.3g} | {low:.3g} - {high:.3g} "
            f"| {ratios[1]:.3f} ({ratios[0]:.3f} - {ratios[2]:.3f}) | {padding:.0%} "
            f"| {computed[layout] / both:.2f} | {way.peak / 1e9:.2f} |"
        )
    return lines


def spread(values):
    """Smallest, median and largest."""
    return min(values), statistics.median(values), max(values)


def run(arguments: list[str] | None = None) -> list[dict[str, Way]]:
    """Measure every mean length that was asked for; print a table for each."""
    parser = build_parser()
    parser.description = __doc__.splitlines()[0]
    parser.add_argument(
        "--mean", type=int, nargs="+", default=[40, 150, 500], help="tokens a sequence"
    )
    parser.add_argument(
        "--spread", type=float, default=0.6, help="standard deviation of log(length)"
    )
    parser.add_argument("--pairs", type=int, default=800, help="pairs of an epoch")
    parser.add_argument(
        "--layers", type=int, help="of a --shape: so many, and hardly any head"
    )
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="count the processor's seconds, where others use it too; set "
        "OPENBLAS_NUM_THREADS=1, or waiting counts as well",
    )
    parser.set_defaults(rounds=5, batches=4)
    args = parser.parse_args(arguments)
    if bool(args.model) == bool(args.shape):
        raise ValueError("Give either --model or --shape.")
    clock = time.process_time if args.cpu_time else time.perf_counter
    few = {"num_hidden_layers": args.layers, "vocab_size": 512} if args.layers else {}
    with mock.patch.dict(SHAPES.get(args.shape, {}), few):
        model, _ = load_model(args)
    add_trained_part(model, args)
    check_packing(model, args.max_length)
    device = mx.device_info().get("device_name", "unknown device")
    print(machine(f"{device} ({mx.default_device()})", "mlx", "mlx-lm"))
    print(f"`{command(__file__, arguments)}`")
    results = []
    for mean in args.mean:
        for size in args.batch_size:
            vocab = model.args.vocab_size
            pairs = lognormal_pairs(mean, args.spread, args.pairs, vocab, args.seed)
            title = f"Mean length {mean}, {size} pairs a step"
            with mock.patch("dpo_benchmark.time.perf_counter", clock):
                ways, computed = measure(model, pairs, size, args)
            lines = table(title, ways, computed, pair_lengths(pairs))
            print("\n".join(lines), flush=True)
            results.append(ways)
    return results


if __name__ == "__main__":
    try:
        run()
    except ValueError as error:
        sys.exit(f"{error}")
