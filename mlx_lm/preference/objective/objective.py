# Copyright © 2026 MLX Contributors

"""What a preference run minimises: its losses, their settings, and what they need."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import mlx.core as mx

from ..errors import InputError
from ..setting import check_type, declared, setting
from .losses import LOSSES, PreferenceLoss
from .pairs import DIVERGENCES, PairLogps

# A test of a finished run takes them from the run.
_own = partial(setting, tested=True)
# There where a loss reads it.
_of_a_loss = partial(_own, brought=True)


@dataclass(frozen=True)
class Objective:
    """
    One or several preference losses with their settings, checked.

    Each field is a setting of ``mlx_lm.dpo`` of the same name; its metadata has
    the flag's help.

    Raises:
        ValueError: If a setting is out of range or makes no sense with the others.

    Example:
        >>> objective = Objective(loss_type=["sigmoid", "sft"], loss_weights=[1, 0.5])
        >>> objective.losses, objective.needs_reference, objective.couples
        ({'sigmoid': 1.0, 'sft': 0.5}, True, True)
        >>> objective.rewards_are, objective.data, objective.noun, objective.least_batch
        ('log-ratios', 'pairs', 'pairs', 1)
        >>> objective.takes_margins, Objective(loss_type="bco_pair").takes_margins
        (True, False)
        >>> Objective(loss_type="kto").compares_prompts
        True
    """

    beta: float = _own(
        0.1, "How strongly the reference holds, and the scale of rewards.", above=0
    )
    loss_type: str | Sequence[str] = _own(
        "sigmoid",
        "The preference loss; sigmoid is DPO's. YAML takes a list, which adds up.",
        choices=[*LOSSES],
        several=True,
    )
    loss_weights: Sequence[float] | None = _own(
        None, "Weights of a list's losses. Default: 1 each.", flag=False
    )
    label_smoothing: float = _own(
        0.0, "Probability that a label is wrong.", least=0, below=0.5
    )
    f_divergence: str = _own(
        "reverse_kl", "Divergence from the reference.", choices=[*DIVERGENCES]
    )
    f_alpha: float = _own(
        0.5,
        "For f_divergence alpha: 1 - the alpha of its paper; 1 is reverse_kl.",
        above=0,
    )
    ld_alpha: float = _own(
        1.0,
        "What tokens beyond the shorter answer's length count, 0 to 1.",
        least=0,
        most=1,
    )
    use_weighting: bool = _own(
        False, "Weigh pairs by how likely the policy would write them (WPO)."
    )
    reference_free: bool = _own(
        False, "Compare log-probs instead of log-ratios to a reference."
    )
    gamma: float = _of_a_loss(
        0.5, "Target margin of simpo and alphapo, in nats.", least=0
    )
    alphapo_alpha: float = _of_a_loss(
        0.25,
        "Shape of alphapo's reward; 0 is simpo's, above it unlikely tokens cost more.",
    )
    cpo_alpha: float = _of_a_loss(1.0, "What sft counts in cpo.", least=0)
    dpop_lambda: float = _of_a_loss(50.0, "Weight of dpop's penalty.", least=0)
    discopop_tau: float = _of_a_loss(0.05, "Temperature of discopop.", above=0)
    desirable_weight: float = _of_a_loss(1.0, "What desirable answers count.", above=0)
    undesirable_weight: float = _of_a_loss(
        1.0, "What undesirable answers count.", above=0
    )

    def __post_init__(self) -> None:
        _check_losses(self)
        for one in declared(Objective):
            if one.name not in ("loss_type", "loss_weights"):
                check_type(one.name, getattr(self, one.name), one.type)
                one.check(getattr(self, one.name))
        _check_modifiers(self)

    @property
    def losses(self) -> dict[str, float]:
        """The losses' weights by name."""
        names = [self.loss_type] if isinstance(self.loss_type, str) else self.loss_type
        weights = self.loss_weights or [1.0] * len(names)
        return dict(zip(names, map(float, weights)))

    @property
    def _specs(self) -> list[PreferenceLoss]:
        return [LOSSES[name] for name in self.losses]

    @property
    def needs_reference(self) -> bool:
        """Whether the reference's log-probs are read."""
        return not self.reference_free and any(s.reference for s in self._specs)

    @property
    def couples(self) -> bool:
        """Whether a pair's loss depends on the rest of its batch."""
        return any(s.couples for s in self._specs)

    @property
    def least_batch(self) -> int:
        """The fewest pairs of a batch."""
        return max(s.least_batch for s in self._specs)

    @property
    def takes_margins(self) -> bool:
        """Whether pairs may bring margins."""
        scored = [s for name, s in zip(self.losses, self._specs) if name != "sft"]
        return bool(scored) and all(s.by_difference or s.margins for s in scored)

    @property
    def data(self) -> str:
        """What the rows are: ``"pairs"``, ``"labels"`` or ``"rankings"``."""
        return self._specs[0].data

    @property
    def noun(self) -> str:
        """What is counted: ``"pairs"``, or ``"answers"`` of labelled data."""
        return "answers" if self.data == "labels" else "pairs"

    @property
    def rewards_are(self) -> str:
        """``"log-ratios"``, ``"log-probs"``, or ``"mean log-probs"`` a token."""
        if self.needs_reference:
            return "log-ratios"
        return "mean log-probs" if self._rewarding.mean_rewards else "log-probs"

    @property
    def _rewarding(self) -> PreferenceLoss:
        """The loss that says what rewards are, the first that is no likelihood."""
        return LOSSES[next((n for n in self.losses if n != "sft"), "sft")]

    @property
    def compares_prompts(self) -> bool:
        """Whether labelled answers need those to other prompts beside them."""
        return self.data == "labels" and self.couples


def _check_losses(o):
    if not (isinstance(o.loss_type, str) or (o.loss_type and _is_list(o.loss_type))):
        raise InputError(f"loss_type must be a name or a list, got {o.loss_type!r}.")
    names = [o.loss_type] if isinstance(o.loss_type, str) else list(o.loss_type)
    for name in names:
        if not isinstance(name, str) or name not in LOSSES:
            known = ", ".join(LOSSES)
            raise InputError(f"Unknown loss_type {name!r}, choose from {known}.")
    if len(set(names)) < len(names):
        raise InputError(f"loss_type names a loss twice: {', '.join(names)}.")
    weights = o.loss_weights
    if weights is not None and not (_is_list(weights) and len(weights) == len(names)):
        raise InputError(
            f"loss_weights must be a list of {len(names)}, one for each loss_type, "
            f"got {weights!r}."
        )
    for weight in weights or []:
        is_number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
        if not is_number or not 0 < weight < math.inf:
            raise InputError(f"loss_weights must be positive numbers, got {weight!r}.")
    for name in names:
        data = LOSSES[name].data
        if len(names) > 1 and data != "pairs":
            raise InputError(f"{name} learns from {data} and goes with no other.")
    with_reference = [n for n in names if LOSSES[n].reference]
    without = [n for n in names if not LOSSES[n].reference and n != "sft"]
    if with_reference and without:
        raise InputError(
            f"{with_reference[0]} measures from a reference and {without[0]} does "
            "not: their rewards would mean two things. Leave one out."
        )


def _is_list(x):
    return isinstance(x, Sequence) and not isinstance(x, str)


def _check_modifiers(o):
    """Refuse what would have no effect, or no meaning."""
    specs = dict(zip(o.losses, o._specs))
    own = {name for spec in specs.values() for name in spec.options}
    for f in fields(o):
        owners = [n for n, s in LOSSES.items() if f.name in s.options]
        if owners and f.name not in own and getattr(o, f.name) != f.default:
            raise InputError(
                f"{f.name} is a setting of {' and '.join(owners)} alone: leave it out."
            )
    if o.f_alpha != Objective.f_alpha and o.f_divergence != "alpha":
        raise InputError("f_alpha is a setting of f_divergence alpha: leave it out.")
    if o.label_smoothing and all(s.smoothing == "no" for s in specs.values()):
        takes = [n for n, s in LOSSES.items() if s.smoothing != "no"]
        raise InputError(
            f"{' and '.join(specs)} can't be smoothed: label_smoothing goes with "
            f"{', '.join(takes)}."
        )
    for name, spec in specs.items():
        if spec.smoothing == "must" and not o.label_smoothing:
            raise InputError(
                f"{name} needs label_smoothing above 0: it takes the log of it."
            )
        # Beside another loss sft has nothing to do with it; alone nothing else has.
        is_likelihood = name == "sft" and len(specs) > 1
        if o.f_divergence != "reverse_kl" and not (spec.by_difference or is_likelihood):
            raise InputError(
                f"f_divergence does not go with {name}, whose formula has no "
                "difference of scores."
            )
        if o.reference_free and spec.reference and not spec.by_difference:
            raise InputError(
                f"reference_free does not go with {name}: it measures each answer "
                "from the reference, not only one from the other."
            )
        if o.use_weighting and (spec.couples or spec.data != "pairs"):
            raise InputError(
                f"use_weighting does not go with {name}, which has no loss of one pair."
            )
        counts_tokens = spec.per_token and not spec.by_difference
        if o.ld_alpha < 1 and (counts_tokens or spec.data != "pairs"):
            why = "it weighs lengths itself" if counts_tokens else "no two answers"
            raise InputError(f"ld_alpha does not go with {name}: {why}.")
    if o.reference_free and o.f_divergence != "reverse_kl":
        raise InputError("f_divergence needs a reference: leave out reference_free.")


def pair_losses(
    pairs: PairLogps, objective: Objective, confidences: mx.array | None = None
) -> mx.array:
    """The weighted sum of an objective's losses for each pair."""
    terms = [
        weight * LOSSES[name].function(pairs, objective)
        for name, weight in objective.losses.items()
    ]
    losses = sum(terms[1:], terms[0])
    return losses if confidences is None else losses * confidences


def pair_rewards(pairs: PairLogps, objective: Objective) -> tuple[mx.array, mx.array]:
    """The implicit rewards of both answers, without gradient."""
    chosen, rejected = pairs.logratios
    if objective.rewards_are == "mean log-probs":
        chosen = chosen / pairs.chosen_lengths
        rejected = rejected / pairs.rejected_lengths
    if shape := objective._rewarding.reward:
        chosen, rejected = shape(chosen, objective), shape(rejected, objective)
    chosen, rejected = mx.stop_gradient(chosen), mx.stop_gradient(rejected)
    return objective.beta * chosen, objective.beta * rejected


def check_has_reference(settings: Any, name: str) -> None:
    """Refuse a setting of the reference where the losses read none."""
    objective = objective_of(settings)
    if getattr(settings, name) and not objective.needs_reference:
        losses = " and ".join(objective.losses)
        raise InputError(f"{losses} has no reference: leave out {name}.")


def objective_of(settings: Any) -> Objective:
    """Take an objective's settings out of others."""
    names = [f.name for f in fields(Objective)]
    return Objective(**{k: getattr(settings, k) for k in names if hasattr(settings, k)})
