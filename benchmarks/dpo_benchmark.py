# Copyright © 2026 MLX Contributors

"""Time and memory of DPO beside mlx-lm's own LoRA SFT over the same sequences.

(1) SFT as mlx-lm does it, (2) DPO the textbook way, with four forwards and full
logits, (3) ours with the reference of a first epoch, (4) ours with its log-probs
known. All run in one process and take turns: a round runs each of them once.

    python benchmarks/dpo_benchmark.py --model MODEL --data prefs.jsonl --batches 8
    python benchmarks/dpo_benchmark.py --shape qwen3-0.6b --prompt 768 256 128 \\
        --completion 128 --batch-size 8
"""

import argparse
import gc
import math
import sys
import time
from functools import partial
from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from dpo_baselines import Runner, mlx_lm_lora, sft, textbook
from dpo_report import (
    BETA,
    LEARNING_RATE,
    SHAPES,
    Way,
    add_options,
    command,
    machine,
    sizes,
    table,
)
from mlx.utils import tree_flatten
from shapes import DTYPES, own_dtype, random_model

from mlx_lm.preference.batch.buckets import LAYOUTS
from mlx_lm.preference.batch.collate import iterate_preference_batches
from mlx_lm.preference.device import (
    cache_limit,
    compiles,
    prepare_backend,
)
from mlx_lm.preference.files import user_cache_folder
from mlx_lm.preference.forward.frozen import FrozenStart
from mlx_lm.preference.forward.probe import check_sharing
from mlx_lm.preference.forward.recompute import keyed_layers
from mlx_lm.preference.memory.predict import predict_peak
from mlx_lm.preference.policy.masters import with_master_weights
from mlx_lm.preference.reference.remembered import RememberedReference
from mlx_lm.preference.run.forecast import plain
from mlx_lm.preference.run.layouts import possible_layouts
from mlx_lm.preference.run.notices import slow_blas_notice
from mlx_lm.preference.run.plan import training_plan
from mlx_lm.preference.run.setup import make_policy
from mlx_lm.preference.step import reference_pass
from mlx_lm.tuner.datasets import load_preference_dataset
from mlx_lm.tuner.trainer import DPOTrainingArgs, training_step
from mlx_lm.utils import load, load_tokenizer

NAMES = {
    "1": "(1) mlx-lm SFT",
    "2": "(2) textbook DPO",
    "3": "(3) ours, first epoch",
    "4": "(4) ours, reference known",
    "5": "(5) mlx-lm-lora",
}


class Pairs(list):
    """Token ids of pairs, as a ``PreferenceDataset`` gives them."""

    def itemlen(self, index):
        return max(self[index][3])


def our_layouts(model, pairs, size, args):
    """The trainer's buckets, in each layout that may be quickest."""
    settings = DPOTrainingArgs(
        batch_size=size,
        max_seq_length=args.max_length,
        sharing=args.sharing or check_sharing(model).grade,
        try_layouts=not args.sharing,
        compile=args.compile or None,
    )
    # As many batches a bucket as in a long run, which has more buckets.
    buckets = training_plan(pairs, settings, in_order=True)
    layouts = possible_layouts(pairs, settings, buckets)
    for name, shapes in layouts.items():
        yield name, [b._replace(shape=shapes[b.shape]) for b in buckets]


def our_batches(model, pairs, size, buckets, known):
    """The trainer's batches, each with its tokens; the reference's log-probs if known."""
    batches = []
    for _, arrays in iterate_preference_batches(pairs, size, buckets):
        tokens = sum(arrays[k].size for k in ("prompts", "inputs") if k in arrays)
        if known:
            logps = reference_pass(model, FrozenStart(model), arrays)[0]
            mx.eval(logps)
            arrays["reference_logps"] = logps
        batches.append((arrays, tokens))
    return batches


def our_step(model, args, known):
    """The trainer's step, and what it holds."""
    start = None if known else FrozenStart(model)
    settings = DPOTrainingArgs(
        beta=BETA, grad_checkpoint=args.grad_checkpoint, compile=args.compile or None
    )
    optimizer = optim.Adam(learning_rate=LEARNING_RATE)
    optimizer = with_master_weights(optimizer, model, compiles(args.compile or None))
    reference = RememberedReference(start)
    plain_step, state = training_step(model, optimizer, settings)
    step = reference.compiled(plain_step, state, state, compiles(settings.compile))

    def run(batch):
        values = step(batch, True)
        return values["losses"].mean(), (state, values)

    def predict(batch):
        model.train()
        with keyed_layers(model, args.grad_checkpoint):
            return predict_peak(
                plain(lambda batch: plain_step(start, batch, True)),
                (batch,),
                [*state, getattr(start, "state", {})],
                compiles(settings.compile),
            )

    return run, [optimizer.state, getattr(start, "state", {})], predict


def quickest(runners, model, name):
    """The layout whose steps take least, as a run measures it."""
    if len(runners) == 1:
        return next(iter(runners.values()))
    seconds = {}
    for layout, runner in runners.items():
        with runner.scope():
            model.train()
            # The first turn compiles.
            times = [turn(runner, 1, keep_cache=True)[0] for _ in range(4)]
        seconds[layout] = min(times[1:])
    best = min(seconds, key=lambda layout: seconds[layout])
    found = ", ".join(f"{k} {v:.4f} s" for k, v in seconds.items())
    print(f"{name}: {found}: {best}")
    return runners[best]


def ours(model, pairs, size, args, known):
    """Ways 3 and 4: this project's batches and step."""
    model.eval()
    name = NAMES["4" if known else "3"]
    step, held, predict = our_step(model, args, known)
    scope = partial(keyed_layers, model, args.grad_checkpoint)
    runners = {}
    for layout, buckets in our_layouts(model, pairs, size, args):
        batches = our_batches(model, pairs, size, buckets, known)
        runners[layout] = Runner(step, batches, held, scope, cache_limit(None))
    runner = quickest(runners, model, name)
    if args.predict:
        largest = max(runner.batches, key=lambda b: b[1])[0]
        print(f"predicted peak of {name}: {predict(largest).total / 1e9:.3f} GB")
    return runner


def peer(model, pairs, size, args):
    """Way 5: its reference is a second copy of the model."""
    reference = load_model(args)[0]
    reference.freeze()
    return mlx_lm_lora(model, reference, pairs, size, args)


MAKERS = {
    "1": sft,
    "2": textbook,
    "3": partial(ours, known=False),
    "4": partial(ours, known=True),
    "5": peer,
}


def turn(runner, times, keep_cache):
    """Seconds over all batches, and the last loss, as a trainer runs them."""
    start = time.perf_counter()
    for _ in range(times):
        for batch, _ in runner.batches:
            loss, rest = runner.step(batch)
            mx.eval(loss, rest)
            if mx.get_cache_memory() > runner.cache_limit and not keep_cache:
                mx.clear_cache()
    return (time.perf_counter() - start) / times, loss.item()


def bytes_of_others(key, runners, model):
    """Bytes that only the other ways hold: optimizers, frozen starts, batches."""
    keep = lambda r: [r.held, [batch for batch, _ in r.batches]]
    own = {id(a) for _, a in tree_flatten([keep(runners[key]), model.parameters()])}
    others = [keep(runner) for k, runner in runners.items() if k != key]
    arrays = {id(a): a for _, a in tree_flatten(others) if isinstance(a, mx.array)}
    return sum(a.nbytes for i, a in arrays.items() if i not in own)


def take_turn(key, ways, runners, model, args, steps, first=False):
    """One turn of one way: its time, its peak; a way that fails is left out."""
    way, runner = ways[key], runners[key]
    start = model.trainable_parameters()
    gc.collect()
    mx.clear_cache()
    mx.reset_peak_memory()
    model.train()
    try:
        with runner.scope():
            if not first and mx.default_device() == mx.gpu:
                # A run's step finds what the one before it left in the cache.
                turn(runner, 1, args.keep_cache)
            seconds, way.loss = turn(
                runner, 1 if first else args.steps, args.keep_cache
            )
    except RuntimeError as e:
        way.failure = f"failed: {str(e).splitlines()[0][:60]}"
        # The trace that failed is still in the model.
        model.update(start)
        del runners[key]
        return
    if not math.isfinite(way.loss):
        raise ValueError(f"{way.name} gives a loss of {way.loss}.")
    if first:
        way.first = seconds
        return
    # Ways may cut the same pairs into more batches, of which some are short.
    way.seconds.append(seconds / steps)
    peak = mx.get_peak_memory() - bytes_of_others(key, runners, model)
    way.peak = max(way.peak, peak)


def measure(model, pairs, size, args):
    """Warm every way up, then let them take turns."""
    ways, runners = {}, {}
    keys = args.ways.split(",") + ["5"] * args.peer
    for key in keys:
        runners[key] = MAKERS[key](model, pairs, size, args)
        tokens = sum(count for _, count in runners[key].batches)
        ways[key] = Way(NAMES[key], tokens)
    steps = len(pairs) // size
    for key in ways:
        take_turn(key, ways, runners, model, args, steps, first=True)
    for _ in range(args.rounds):
        for key in [key for key in ways if key in runners]:
            take_turn(key, ways, runners, model, args, steps)
    return ways


def load_model(args):
    """The model, its weights in memory, and the tokenizer if there is one."""
    dtype = args.dtype
    if args.shape:
        dtype = dtype or own_dtype()
        model = random_model(SHAPES[args.shape], args.seed)
        tokenizer = load_tokenizer(args.tokenizer) if args.tokenizer else None
    else:
        model, tokenizer = load(args.model, lazy=True)
    if dtype:
        model.set_dtype(DTYPES[dtype])
    if args.bits:
        nn.quantize(model, args.group_size, args.bits)
    # One at a time: a float32 copy of all weights may not fit.
    for _, weight in tree_flatten(model.parameters()):
        mx.eval(weight)
    return model, tokenizer


def add_trained_part(model, args):
    """Adapters, or unfrozen layers."""
    lora = {"rank": args.rank, "dropout": 0.0, "scale": 20.0}
    settings = SimpleNamespace(
        seed=args.seed,
        fine_tune_type=args.fine_tune_type,
        num_layers=args.num_layers,
        lora_parameters=lora,
        resume_adapter_file=None,
        train_head=False,
    )
    make_policy(settings, model)
    mx.eval(model.parameters())


def data_pairs(args, tokenizer, size):
    """A random choice of the data's pairs, enough for the batches."""
    if tokenizer is None:
        raise ValueError("--data with --shape needs a --tokenizer.")
    dataset = load_preference_dataset(
        args.data, tokenizer, valid_fraction=0, max_length=args.max_length
    )[0]
    count = min(args.batches or 8, len(dataset) // size) * size
    if count == 0:
        raise ValueError(f"{args.data} has {len(dataset)} pairs, batches need {size}.")
    chosen = np.random.default_rng(args.seed).permutation(len(dataset))[:count]
    return Pairs(dataset[int(i)] for i in chosen)


def synthetic_pairs(prompt, completion, count, vocab, seed):
    """Pairs of random tokens, all of the same lengths."""
    rng = np.random.default_rng(seed)
    row = lambda n: rng.integers(1, vocab, n)
    lengths = (prompt, prompt + completion, prompt + completion)
    return Pairs(
        (row(prompt), row(completion), row(completion), lengths) for _ in range(count)
    )


def build_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_options(parser)
    add = parser.add_argument
    add("--model", help="a folder or a Hugging Face repo, instead of --shape")
    add("--data", help="a file, folder or data set of pairs, instead of lengths")
    add("--tokenizer", help="where --shape is to read --data")
    add("--max-length", type=int, default=2048, help="longest sequence in tokens")
    add("--dtype", choices=list(DTYPES), help="of the weights (shape: by device)")
    add("--bits", type=int, help="quantize the weights to so many bits")
    add("--group-size", type=int, default=64, help="of the quantization")
    add("--sharing", choices=LAYOUTS, help="of prompts (what the model can do)")
    add("--keep-cache", action="store_true", help="don't clear it after each step")
    add("--compile", action="store_true", help="compile ours on a CPU too")
    add("--predict", action="store_true", help="predict the peak of ours first")
    add("--peer", action="store_true", help="measure mlx-lm-lora too, if installed")
    return parser


def run(arguments: list[str] | None = None) -> list[dict[str, Way]]:
    """Measure every size that was asked for; print a table for each."""
    args = build_parser().parse_args(arguments)
    prepare_backend(user_cache_folder("kernels"))
    if bool(args.model) == bool(args.shape):
        raise ValueError("Give either --model or --shape.")
    model, tokenizer = load_model(args)
    add_trained_part(model, args)
    device = mx.device_info().get("device_name", "unknown device")
    print(machine(f"{device} ({mx.default_device()})", "mlx", "mlx-lm"))
    print(f"`{command(__file__, arguments)}`")
    if notice := slow_blas_notice():
        print(notice)
    results = []
    for prompt, completion, size in sizes(args):
        if args.data:
            pairs, title = data_pairs(args, tokenizer, size), args.data
        else:
            count = (args.batches or 1) * size
            vocab = model.args.vocab_size
            pairs = synthetic_pairs(prompt, completion, count, vocab, args.seed)
            title = f"{prompt} + {completion} tokens"
        ways = measure(model, pairs, size, args)
        title = f"{args.shape or args.model}, {title}, {size} pairs a step"
        lines = table(title, ways, [p[3] for p in pairs])
        print("\n".join(lines), flush=True)
        results.append(ways)
    return results


if __name__ == "__main__":
    try:
        run()
    except ValueError as error:
        sys.exit(f"{error}")
