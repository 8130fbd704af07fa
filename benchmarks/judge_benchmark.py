# Copyright © 2026 MLX Contributors

"""
How often does a model, as a judge, prefer what people chose, and what is shown first?

Every pair of a preference set is shown to it in both orders, as ``mlx_lm.dpo_collect
--label model:PATH`` does.

    python benchmarks/judge_benchmark.py --judge SmolLM2-135M-Instruct
"""

import argparse
import json
from pathlib import Path

import numpy as np

import mlx_lm
from mlx_lm.preference.collect.local import ModelJudge

PAIRS = Path(mlx_lm.__file__).parent / "examples/preferences/test.jsonl"


def both_orders(judge: ModelJudge, pairs: list[dict]) -> np.ndarray:
    """The probability of the answer shown first, chosen first and second. (n, 2)"""
    texts = lambda row: [row[x][0]["content"] for x in ("chosen", "rejected")]
    found = [judge(row["prompt"], texts(row), {}).orders for row in pairs]
    return np.array([orders[0][2:] for orders in found if orders])


def describe(shown: np.ndarray) -> list[str]:
    """The table of what a judge said."""
    count = len(shown)
    right = np.stack([shown[:, 0] > 0.5, shown[:, 1] < 0.5], axis=1)
    same = right[:, 0] == right[:, 1]
    first = (shown > 0.5).mean()
    mean = (shown[:, 0] + 1 - shown[:, 1]) / 2
    share = lambda x: f"{np.mean(x):.1%} ({int(np.sum(x))} of {np.size(x)})"
    lines = [
        f"| takes what is shown first | {first:.1%} of {2 * count} |",
        f"| agrees, the chosen one shown first | {share(right[:, 0])} |",
        f"| agrees, the chosen one shown second | {share(right[:, 1])} |",
        f"| says the same in both orders: these are labels | {share(same)} |",
        f"| agrees by the mean of both orders, without ties | {share(mean > 0.5)} |",
    ]
    if same.any():
        sure = np.maximum(mean, 1 - mean)[same].mean()
        lines.append(f"| of the labels agree | {share(right[same, 0])} |")
        lines.append(f"| their mean certainty | {sure:.3f} |")
    return lines


def main() -> None:
    """Ask the judge, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--judge", required=True, help="a model")
    parser.add_argument("--data", type=Path, default=PAIRS)
    args = parser.parse_args()
    lines = args.data.read_text("utf-8").splitlines()
    judge = ModelJudge(args.judge)
    shown = both_orders(judge, [json.loads(line) for line in lines])
    print("\n".join(["| judge | |", "|---|---|", *describe(shown)]))
    print("\n".join(judge.notes()))


if __name__ == "__main__":
    main()
