# Copyright © 2026 MLX Contributors

"""Raw preference rows, tokenized, and notes on those that can't be used."""

from collections.abc import Iterator, Sequence
from typing import Any

from .labelled_rows import KINDS, criteria_names, read_rows
from .preference_messages import RowFault
from .preference_rows import PreferenceRow
from .preference_tokens import PairTokenizer, TokenPair
from .token_columns import ColumnsBuilder, TokenColumns

TOO_LONG = "prompt fills max_length"
_CHUNK = 512


def check_row_options(
    encode: PairTokenizer,
    max_length: int,
    options: dict[str, Any],
    transcripts: str = "turns",
    max_bad_rows: float = 0.1,
) -> None:
    """
    Refuse options that don't go with each other or with the tokenizer.

    Args:
        encode (PairTokenizer): Makes ids of pairs.
        max_length (int): The most tokens of prompt and answer.
        options (dict): Arguments for :func:`.labelled_rows.read_rows`.
        transcripts (str): ``"turns"`` or ``"raw"``. Default: ``"turns"``.
        max_bad_rows (float): The largest share of bad rows. Default: ``0.1``.

    Raises:
        ValueError: If one is wrong.

    Example:
        >>> check_row_options(None, 8, {"kind": "labels", "margin_feature": "m"})
        Traceback (most recent call last):
        ...
        ValueError: margin_feature belongs to pairs, not to labels.
    """
    if max_length < 2:
        raise ValueError(f"max_length must be at least 2, got {max_length}.")
    if transcripts not in ("turns", "raw"):
        raise ValueError(f"transcripts must be 'turns' or 'raw', got {transcripts!r}.")
    if not 0 <= max_bad_rows <= 1:
        raise ValueError(f"max_bad_rows must be between 0 and 1, got {max_bad_rows}.")
    if options.get("wrap_text") and not encode.has_chat_template:
        raise ValueError("wrap_text needs a tokenizer with a chat template.")
    if options.get("wrap_text") and transcripts == "raw":
        raise ValueError("wrap_text: true and transcripts: raw exclude each other.")
    kind = options.get("kind", "pairs")
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}.")
    for name in ("margin_feature", "criteria"):
        if options.get(name) and kind != "pairs":
            raise ValueError(f"{name} belongs to pairs, not to {kind}.")


def tokenize_rows(
    data: Sequence[Any],
    encode: PairTokenizer,
    max_length: int,
    options: dict[str, Any],
) -> tuple[TokenColumns, dict[str, Any]]:
    """
    Tokenize raw rows of any known shape.

    Args:
        data (Sequence): The rows. A ``location`` method, if there is one, names
            the place of a row.
        encode (PairTokenizer): Makes ids of pairs.
        max_length (int): The most tokens of prompt and answer.
        options (dict): Arguments for :func:`.labelled_rows.read_rows`.

    Returns:
        tuple: The pairs, and notes on the rows as JSON values: ``num_rows``,
        ``skipped`` (rows by reason), ``first_skipped`` and ``details`` (of the
        first row by reason), ``dropped_tail`` (the first ids that a prompt alone
        has and a prompt with an answer has not) and ``criteria`` (names of all
        that rows compare by, where weights of some are asked for).

    Example:
        >>> from tokenizers import Tokenizer, models, pre_tokenizers
        >>> from transformers import PreTrainedTokenizerFast
        >>> words = Tokenizer(models.WordLevel({"a": 0, "b": 1, "</s>": 2}))
        >>> words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        >>> encode = PairTokenizer(PreTrainedTokenizerFast(tokenizer_object=words))
        >>> rows = [{"prompt": "a", "chosen": " b", "rejected": " a"}, {"prompt": ""}]
        >>> columns, notes = tokenize_rows(rows, encode, 2048, {})
        >>> len(columns), notes["num_rows"], notes["skipped"]
        (1, 2, {'unknown columns': 1})
    """
    kind = options.get("kind", "pairs")
    builder = ColumnsBuilder(max_length, keep_whole=kind == "labels")
    locate = getattr(data, "location", int)
    skipped: dict[str, int] = {}
    first_skipped: dict[str, str | int] = {}
    details: dict[str, str] = {}
    dropped_tail: list[int] = []
    criteria: set[str] = set()
    counts = []
    for index, found, values in _tokenize(data, encode, options):
        pairs = [pair for pair in found if isinstance(pair, TokenPair)]
        fault = next((f for f in found if isinstance(f, RowFault)), None)
        if fault is None and any(len(pair.prompt) >= max_length for pair in pairs):
            fault = RowFault(TOO_LONG)
        if fault is not None:
            skipped[fault.reason] = skipped.get(fault.reason, 0) + 1
            first_skipped.setdefault(fault.reason, locate(index))
            details.setdefault(fault.reason, fault.detail)
        else:
            counts.append(len(pairs))
            for pair, numbers in zip(pairs, values, strict=True):
                dropped_tail = dropped_tail or pair.dropped
                builder.add(locate(index), pair, index, numbers)
        if options.get("criteria"):
            criteria |= criteria_names(data[index])
    columns = builder.finish()
    if kind == "rankings" and counts:
        columns = columns.regroup(max(counts), counts)
    if kind == "labels" and counts:
        columns = columns.by_turns()
    notes = {
        "num_rows": len(data),
        "skipped": skipped,
        "first_skipped": first_skipped,
        "details": details,
        "dropped_tail": dropped_tail,
        "criteria": sorted(criteria),
    }
    return columns, notes


def _tokenize(
    data: Sequence[Any], encode: PairTokenizer, options: dict[str, Any]
) -> Iterator[tuple[int, list[TokenPair | RowFault], list[dict[str, Any]]]]:
    """Each row's index, its pairs' ids or faults, and their values, by chunks."""
    for start in range(0, len(data), _CHUNK):
        rows: list[list[PreferenceRow] | RowFault] = []
        for index in range(start, min(start + _CHUNK, len(data))):
            try:
                rows.append(read_rows(data[index], **options))
            except RowFault as fault:
                rows.append(fault)
            except RecursionError:
                rows.append(RowFault("nested too deeply"))
        found = iter(encode([p for row in rows if isinstance(row, list) for p in row]))
        for index, row in enumerate(rows, start):
            if isinstance(row, RowFault):
                yield index, [row], []
            else:
                yield index, [next(found) for _ in row], [p.values for p in row]
