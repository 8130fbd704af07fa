# Copyright © 2026 MLX Contributors

"""
Learning rate and beta, chosen on pairs that are neither trained on nor tested.

Every setting is trained on the first pairs of a file and scored on those that follow,
with ``quality_benchmark.py``; the rest of the file is not read. The choice: of the
settings that stay near the start, the one that is right most often. What is there is
not trained again, so that several processes may share a sweep, and a last one prints it.

    python benchmarks/quality_sweep.py --model MODEL --data pairs.jsonl.gz \\
        --learning-rates 5e-5 1e-4 --betas 0.1 0.3 --seeds 0 1
"""

import argparse
import statistics
from itertools import product
from pathlib import Path

import quality_benchmark
from quality_benchmark import COLUMNS, read_lines, write_lines

ACCURACY, KL, TEXT = (
    COLUMNS[title][0]
    for title in ("reward accuracy", "KL a chosen answer", "ordinary text")
)
Setting = tuple[float, float]  # learning rate, beta


def means(results: dict[int, dict[str, float]]) -> dict[str, float]:
    """The mean over seeds of every column that all of them have."""
    keys = [
        key for key, _ in COLUMNS.values() if all(key in r for r in results.values())
    ]
    return {key: statistics.mean(r[key] for r in results.values()) for key in keys}


def choose(
    found: dict[Setting, dict[str, float]], most_kl: float, most_text: float
) -> Setting | None:
    """The setting that is right most often within the bounds; of equals, the nearest."""
    near = [
        setting
        for setting, row in found.items()
        if row[KL] < most_kl and abs(row.get(TEXT, 0)) < most_text
    ]
    order = lambda setting: (found[setting][ACCURACY], -found[setting][KL])
    return max(near, key=order, default=None)


def table(found: dict[Setting, dict[str, float]], chosen: Setting | None) -> str:
    """A row for each setting, the chosen one in bold."""
    known = {t: v for t, v in COLUMNS.items() if all(v[0] in r for r in found.values())}
    lines = [f"| learning rate | beta | {' | '.join(known)} |"]
    lines.append("|---" * (len(known) + 2) + "|")
    for setting, row in found.items():
        cells = [f"{x:g}" for x in setting]
        cells += [form.format(row[key]) for key, form in known.values()]
        if setting == chosen:
            cells = [f"**{cell}**" for cell in cells]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def build_parser() -> argparse.ArgumentParser:
    """The command line; other flags go to ``quality_benchmark.py``."""
    parser = argparse.ArgumentParser(
        description="A sweep.", epilog="Other flags: those of quality_benchmark.py."
    )
    add = parser.add_argument
    add("--data", type=Path, required=True, help="A file of pairs.")
    add("--output", type=Path, default=Path("sweep"))
    add("--train", type=int, default=1200, help="The first pairs.")
    add("--valid", type=int, default=300, help="Those that follow, scored.")
    add("--learning-rates", type=float, nargs="+", default=[2e-5, 5e-5, 1e-4, 2e-4])
    add("--betas", type=float, nargs="+", default=[0.1, 0.3, 1.0])
    add("--most-kl", type=float, default=2.0, help="Nats a chosen answer.")
    add("--most-text", type=float, default=0.05, help="Change of ordinary text.")
    return parser


def main(argv: list[str] | None = None) -> Setting | None:
    """Train and score every setting, print the table, return the choice."""
    args, others = build_parser().parse_known_args(argv)
    rows = read_lines(args.data)[: args.train + args.valid]
    args.output.mkdir(parents=True, exist_ok=True)
    first = args.output / "first.jsonl"
    write_lines(first, rows)
    found = {}
    for rate, beta in product(args.learning_rates, args.betas):
        given = ["--data", first, "--output", args.output / f"{rate:g}-{beta:g}"]
        given += ["--train", args.train, "--test", args.valid]
        given += ["--learning-rate", rate, "--beta", beta]
        found[rate, beta] = means(quality_benchmark.main([*map(str, given), *others]))
    chosen = choose(found, args.most_kl, args.most_text)
    print(table(found, chosen))
    if chosen is None:
        print("No setting stays within the bounds.")
    else:
        print(f"--learning-rate {chosen[0]:g} --beta {chosen[1]:g}")
    return chosen


if __name__ == "__main__":
    main()
