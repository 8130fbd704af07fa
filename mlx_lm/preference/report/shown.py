# Copyright © 2026 MLX Contributors

"""How the table of a test and the charts of a report show each metric."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from ..measure.pair_metrics import LENGTH_GROUPS


class Metric(NamedTuple):
    """A metric's row in a test's table, and its chart."""

    # Several names, with spaces between them, share a row.
    name: str
    # What the row is called, its form, the start's metric, and how many it is of.
    row: str = ""
    form: str = "{:.3f}"
    start: str = ""
    total: str = ""
    # Title and unit; chosen and rejected answers share one.
    chart: tuple[str, str] = ("", "")


RATE = "{:.1%}"
LIKELIER = "logps/accuracies"
_REWARDS: dict[str, Any] = {"chart": ("Rewards", "nats")}
_LOGPS: dict[str, Any] = {"chart": ("Log-probs of the answers", "nats")}
_ENDS = "rewards/accuracies_low rewards/accuracies_high"
_CHOSEN, _TEXT = "perplexity of chosen", "perplexity of ordinary text"


def _rate(name: str, row: str) -> Metric:
    return Metric(name, row, RATE, f"reference_{name}")


def _by_length(name: str, start: str = "") -> Iterator[Metric]:
    for group, label in LENGTH_GROUPS.items():
        row, start_name = f"  {label} (n = {{}})", start and f"{start}/{group}"
        yield Metric(f"{name}/{group}", row, RATE, start_name, f"pairs/{group}")


def _calibration(name: str, row: str) -> Metric:
    return Metric(name, row, start=f"reference_{name}")


# In the order of the table's rows and of the charts.
METRICS = (
    Metric("loss", chart=("Loss", "nats")),
    Metric(
        "rewards/accuracies", "reward accuracy", RATE, chart=("Reward accuracy", "%")
    ),
    Metric(_ENDS, "  95 % interval", "{:.1%}-{:.1%}"),
    *_by_length("rewards/accuracies"),
    Metric("rewards/margins", "reward margin (nats)", chart=("Reward margin", "nats")),
    Metric("rewards/chosen", "reward of chosen (nats)", **_REWARDS),
    Metric("rewards/rejected", "reward of rejected (nats)", **_REWARDS),
    _rate(LIKELIER, "chosen likelier than rejected"),
    *_by_length(LIKELIER, f"reference_{LIKELIER}"),
    _rate(f"{LIKELIER}_per_token", "chosen likelier, per token"),
    Metric("logps/chosen", **_LOGPS),
    Metric("logps/rejected", **_LOGPS),
    Metric("perplexity/policy", _CHOSEN, "{:.2f}", "perplexity/reference"),
    Metric("retained_text/after", _TEXT, "{:.2f}", "retained_text/before"),
    Metric("kl", "KL from it, per token (nats)", "{:.4f}"),
    Metric("kl_per_answer/chosen", "  per chosen answer (nats)"),
    Metric("kl_per_answer/rejected", "  per rejected answer (nats)"),
    Metric("kl_estimate", chart=("KL from the reference, estimated", "nats")),
    _calibration("calibration/ece", "calibration error (ECE)"),
    _calibration("calibration/brier", "Brier score"),
    Metric("grad_norm", chart=("Gradient norm", "")),
    Metric("learning_rate", chart=("Learning rate", "")),
    Metric("tokens_per_second", chart=("Speed", "tokens/s")),
    Metric("peak_memory", chart=("Peak memory", "GB")),
)
