# Copyright © 2026 MLX Contributors

"""How the rows of one dataset are read."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from datetime import date
from functools import partial
from typing import Any

from ..errors import InputError
from ..setting import check_type, declared, setting
from .content import is_number
from .row import KINDS, RANKING_PAIRS
from .tokenizer import PairTokenizer

# What an entry of hf_dataset may have, and what decides the tokens of a test set.
_own = partial(setting, per_dataset=True)
_tokens = partial(_own, tested=True, compared=True)
_hidden = partial(_tokens, flag=False)
_number = partial(_own, None, tested=True, kind=str, metavar="COLUMN")


@dataclass(frozen=True)
class RowOptions:
    """
    How the rows of a preference dataset are read, checked.

    Each field is a setting of ``mlx_lm.dpo`` of the same name, which an entry of
    ``hf_dataset`` may set as well; its metadata has its help.

    Raises:
        mlx_lm.preference.errors.InputError: If an option is of the wrong type, out
            of range, or makes no sense with the others.

    Example:
        >>> options = RowOptions(prompt_feature="question", max_bad_rows=0)
        >>> options.prompt_feature, options.chosen_feature, options.transcripts
        ('question', 'chosen', 'turns')
        >>> options.updated({"path": "prefs", "wrap_text": True}).wrap_text
        True
    """

    prompt_feature: str = _hidden("prompt", "Column of the prompt.")
    chosen_feature: str = _hidden("chosen", "Column of the chosen answer.")
    rejected_feature: str = _hidden("rejected", "Column of the rejected answer.")
    weight_feature: str | None = _number(
        "Column of the pairs' weights. Default: there is none."
    )
    margin_feature: str | None = _number(
        "Column of the pairs' margins in nats. Default: there is none."
    )
    criteria: Mapping[str, float] | None = _hidden(
        None,
        "Weights of the criteria to compare answers by, such as {helpful: 1.0}.",
        kind=dict,
        brought=True,
    )
    ranking_pairs: str = _hidden(
        "all",
        "Which answers of a ranking are compared: all, neighbours, or best and worst.",
        choices=list(RANKING_PAIRS),
        brought=True,
    )
    wrap_text: bool = _tokens(False, "Put text rows into the chat template.")
    escape_special_tokens: bool = _tokens(
        False, "Write special tokens in the texts of rows as text."
    )
    template_date: str | None = _own(
        None,
        "The date that the chat template writes, such as 2026-01-31. Default: the day "
        "on which the run was started.",
        tested=True,
        kind=str,
        flag=False,
    )
    transcripts: str = _hidden(
        "turns",
        "What becomes of Human/Assistant transcripts: turns, or text as it is (raw).",
        choices=["turns", "raw"],
    )
    max_bad_rows: float = _own(
        0.1, "Largest share of bad rows.", least=0, most=1, flag=False
    )

    def __post_init__(self) -> None:
        for one in declared(RowOptions):
            value = getattr(self, one.name)
            if one.default is not None:
                check_type(one.name, value, one.type)
            one.check(value)
        check_criteria(self.criteria)
        check_date(self.template_date)
        if self.wrap_text and self.transcripts == "raw":
            raise InputError("wrap_text: true and transcripts: raw exclude each other.")

    def updated(self, settings: Mapping[str, Any]) -> "RowOptions":
        """
        Take those of some settings that are options and are set.

        Args:
            settings (Mapping): Settings by name, others among them.

        Returns:
            RowOptions: The options.
        """
        known = {one.name for one in fields(self)}
        found = {k: v for k, v in settings.items() if k in known and v is not None}
        return replace(self, **found)


def check_criteria(criteria: Any) -> None:
    """Refuse criteria whose weights are no positive numbers."""
    if criteria is None:
        return
    if not criteria or not all(
        # A smaller one is 0 in float32.
        is_number(w) and w >= 1e-30
        for w in criteria.values()
    ):
        raise InputError(
            f"criteria needs a weight above 0 for every name, got {criteria!r}."
        )


def check_date(value: str | None) -> None:
    """Refuse what is no date."""
    try:
        date.fromisoformat(value or "2026-01-31")
    except ValueError as e:
        raise InputError(
            f"template_date must be a date such as 2026-01-31, got {value!r}."
        ) from e


def pair_tokenizer(options: RowOptions, tokenizer: Any) -> PairTokenizer:
    """What tokenizes pairs as the options say."""
    special, day = options.escape_special_tokens, options.template_date
    return PairTokenizer(tokenizer, special, day)


def row_arguments(options: RowOptions, encode: PairTokenizer, kind: str) -> dict:
    """What ``read_rows`` takes, checked against the tokenizer and the kind of data."""
    if options.wrap_text and not encode.has_chat_template:
        raise InputError("wrap_text needs a tokenizer with a chat template.")
    if kind not in KINDS:
        raise InputError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}.")
    for name in ("margin_feature", "criteria"):
        if getattr(options, name) and kind != "pairs":
            raise InputError(f"{name} belongs to pairs, not to {kind}.")
    # The others decide whether rows are used, and what their tokens are.
    others = ("max_bad_rows", "escape_special_tokens", "template_date")
    found = {k: v for k, v in vars(options).items() if k not in others}
    is_raw = found.pop("transcripts") == "raw" or not encode.has_chat_template
    # YAML reads some names as numbers.
    criteria = {str(k): w for k, w in (options.criteria or {}).items()} or None
    return {**found, "turns": not is_raw, "criteria": criteria, "kind": kind}
