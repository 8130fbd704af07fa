# Copyright © 2026 MLX Contributors

"""What the DPO benchmarks share: model shapes, lengths, options and the table."""

import argparse
import platform
import shlex
import statistics
import sys
from dataclasses import dataclass, field
from pathlib import Path

_QWEN3 = {
    "model_type": "qwen3",
    "vocab_size": 151936,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": True,
}
# The public configurations of these models; their weights are random here.
SHAPES = {
    # No model has this one: it is for trying a benchmark out.
    "tiny": {
        "model_type": "llama",
        "vocab_size": 256,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "rms_norm_eps": 1e-5,
        "rope_theta": 100000.0,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
    },
    "smollm2-135m": {
        "model_type": "llama",
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "rms_norm_eps": 1e-5,
        "rope_theta": 100000.0,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
    "qwen3-0.6b": {
        **_QWEN3,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
    },
    "qwen3-1.7b": {
        **_QWEN3,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
    },
    "qwen3-4b": {
        **_QWEN3,
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
    },
    "qwen3-8b": {
        **_QWEN3,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "tie_word_embeddings": False,
    },
    "qwen3-14b": {
        **_QWEN3,
        "hidden_size": 5120,
        "intermediate_size": 17408,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "tie_word_embeddings": False,
    },
    "qwen3-32b": {
        **_QWEN3,
        "hidden_size": 5120,
        "intermediate_size": 25600,
        "num_hidden_layers": 64,
        "num_attention_heads": 64,
        "tie_word_embeddings": False,
    },
    "llama2-7b": {
        "model_type": "llama",
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
    },
}
LEARNING_RATE = 1e-5
BETA = 0.1


@dataclass
class Way:
    """One contestant's numbers: a turn is one value of ``seconds`` (a step)."""

    name: str
    tokens: int = 0
    first: float = 0.0
    loss: float = 0.0
    peak: float = 0.0
    seconds: list[float] = field(default_factory=list)
    failure: str = ""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that both benchmarks have."""
    add = parser.add_argument
    add("--shape", choices=list(SHAPES), help="random weights of this shape")
    add("--prompt", type=int, nargs="+", default=[256], help="tokens of a prompt")
    add("--completion", type=int, nargs="+", default=[128], help="tokens of an answer")
    add("--batch-size", type=int, nargs="+", default=[4], help="pairs a step")
    add("--batches", type=int, help="batches of a turn (data: 8, else 1)")
    add("--steps", type=int, default=1, help="times that a turn runs its batches")
    add("--rounds", type=int, default=7, help="turns of every way")
    add("--ways", default="1,2,3,4", help="which ways to measure")
    add("--num-layers", type=int, default=16, help="trained layers, -1 for all")
    add("--rank", type=int, default=8, help="rank of the adapters")
    add("--fine-tune-type", choices=["lora", "dora", "full"], default="lora")
    add("--grad-checkpoint", action="store_true", help="recompute layers")
    add("--seed", type=int, default=0)


def sizes(args: argparse.Namespace) -> list[tuple[int, int, int]]:
    """(prompt, completion, batch size) of every run; single values are repeated."""
    columns = [args.prompt, args.completion, args.batch_size]
    count = max(map(len, columns))
    if any(len(column) not in (1, count) for column in columns):
        raise ValueError(
            "Give --prompt, --completion and --batch-size one value or equally many."
        )
    columns = [c * count if len(c) == 1 else c for c in columns]
    return list(zip(*columns))


def machine(device: str, *packages: str) -> str:
    """One line: device, system, versions."""
    from importlib.metadata import PackageNotFoundError, version

    versions = []
    for name in packages:
        try:
            versions.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            versions.append(name)
    python = f"Python {platform.python_version()}"
    return ", ".join(
        [device, f"{platform.system()} {platform.machine()}", python, *versions]
    )


def command(script: str, arguments: list[str] | None = None) -> str:
    """A script's command, as a shell would take it; else as it was given."""
    given = sys.argv[1:] if arguments is None else arguments
    return shlex.join(["python", f"benchmarks/{Path(script).name}", *given])


def token_floor(lengths: list[tuple[int, int, int]]) -> float:
    """Tokens when every prompt runs once, over the tokens of both sequences."""
    shared = sum(c + r - p for p, c, r in lengths)
    return shared / sum(c + r for _, c, r in lengths)


def median_ratio(a: Way | None, b: Way | None) -> float | None:
    """The median over the rounds of a's time by b's, None where one is missing."""
    if not (a and b and a.seconds and b.seconds):
        return None
    return statistics.median(x / y for x, y in zip(a.seconds, b.seconds))


def _quartiles(seconds: list[float]) -> tuple[float, float, float]:
    if len(seconds) == 1:
        return seconds[0], seconds[0], seconds[0]
    low, middle, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return low, middle, high


def _row(way: Way, first: Way | None, real_tokens: int) -> str:
    if way.failure:
        return f"| {way.name} | {way.failure} | | | | | | |"
    low, middle, high = _quartiles(way.seconds)
    time, memory = median_ratio(way, first), "-"
    if first and first.seconds and first.peak:
        memory = f"{way.peak / first.peak:.2f}"
    cells = [
        way.name,
        f"{middle:.4g}",
        f"{low:.4g} - {high:.4g}",
        f"{way.peak / 1e9:.3f}",
        "-" if time is None else f"{time:.2f}",
        memory,
        f"{way.tokens / real_tokens:.2f}",
        f"{way.first:.1f}",
    ]
    return f"| {' | '.join(cells)} |"


def table(
    title: str, ways: dict[str, Way], lengths: list[tuple[int, int, int]]
) -> list[str]:
    """
    Lines of a Markdown table, and of the ratios that matter below it.

    ``lengths`` are those of a ``PreferenceDataset``: prompt, prompt + chosen and
    prompt + rejected tokens of every pair.
    """
    real = sum(c + r for _, c, r in lengths)
    lines = [
        f"\n{title}\n",
        "| way | s a step | quartiles | peak GB | time to (1) | memory to (1) "
        "| padded to real tokens | first pass s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [_row(way, ways.get("1"), real) for way in ways.values()]
    floor = token_floor(lengths)
    lines.append(
        f"\n{len(lengths)} pairs, {real:,} tokens in both sequences; token floor "
        f"(P + 2C) / (2P + 2C) = {floor:.3f}."
    )
    ratios = []
    for a, b in (("4", "1"), ("3", "1"), ("2", "4")):
        ratio = median_ratio(ways.get(a), ways.get(b))
        if ratio is not None:
            ratios.append(f"time ({a})/({b}) = {ratio:.3f}")
            if (a, b) == ("4", "1"):
                ratios.append(f"{ratio / floor:.2f} of the floor")
    for a, b in (("4", "1"), ("4", "2")):
        x, y = ways.get(a), ways.get(b)
        if x and y and x.peak and y.peak:
            ratios.append(f"memory ({a})/({b}) = {x.peak / y.peak:.3f}")
    if ratios:
        lines.append("; ".join(ratios) + ".")
    return lines
