# Copyright © 2026 MLX Contributors

"""Special tokens in the texts of rows: found, or written as text."""

import re
from collections.abc import Mapping
from typing import Any

from ...tokenizer_utils import TokenizerWrapper

# Around what is no token, though it reads like one. No text has these: they are no
# characters of Unicode.
_OPENS, _CLOSES = "\ufdd0", "\ufdd1"
_MARKED = re.compile(f"{_OPENS}(.*?){_CLOSES}", re.DOTALL)


class SpecialTokens:
    """The special tokens of a tokenizer, but those around a thought, which an answer
    may hold."""

    def __init__(self, tokenizer: Any, raw: Any):
        is_wrapper = isinstance(tokenizer, TokenizerWrapper)
        thought, ids = {"<think>", "</think>"}, ()
        if is_wrapper:
            thought |= {tokenizer.think_start, tokenizer.think_end}
            ids = tokenizer.eos_token_ids
        #: What ends an answer.
        ends = {raw.eos_token, *map(raw.convert_ids_to_tokens, ids)}
        self.ends = tuple(filter(None, ends))
        added = raw.added_tokens_decoder.values()
        found = {token.content for token in added if token.special}
        found = (found | set(raw.all_special_tokens)) - thought
        self.tokens = sorted(found, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, self.tokens)) or "(?!)")

    def first(self, value: Any) -> str:
        """The first special token in texts, or nothing."""
        if isinstance(value, str):
            found = self._pattern.search(value)
            return found[0] if found else ""
        if isinstance(value, Mapping):
            value = list(value.values())
        items = value if isinstance(value, (list, tuple)) else ()
        return next(filter(None, map(self.first, items)), "")

    def mark(self, value: Any) -> Any:
        """Put marks around all special tokens in texts."""
        if isinstance(value, str):
            value = value.replace(_OPENS, "").replace(_CLOSES, "")
            return self._pattern.sub(f"{_OPENS}\\g<0>{_CLOSES}", value)
        if isinstance(value, Mapping):
            return {key: self.mark(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.mark(item) for item in value]
        return value


def is_marked(text: str) -> bool:
    """Tell whether a text holds marks."""
    return _OPENS in text


def split_marked(text: str) -> list[str]:
    """Part a text at its marks: every second piece was between them."""
    return _MARKED.split(text)
