# Copyright © 2026 MLX Contributors

"""Rows as people have them, and what is right for them."""

from dataclasses import dataclass

WORDS = ("tea", "hat", "pen", "cup")


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


def system(text):
    return {"role": "system", "content": text}


def tool(text):
    return {"role": "tool", "content": text}


def each(make):
    """A row, or what is right for it, of every word."""
    return [make(word) for word in WORDS]


@dataclass
class Case:
    """Rows as people have them, and what the command makes of them."""

    number: int
    name: str
    rows: list | str | bytes
    # Prompt, chosen and rejected of every pair, as messages or as text; with labels
    # the third is the label.
    pairs: list | None = None
    says: str = "."
    refused: str = ""
    flags: tuple = ()
    template: str | None = None
    suffix: str = ".jsonl"


TWO = {"chosen": "A small thing.", "rejected": "I can't, dull."}
GOOD, BAD = [assistant("A small thing.")], [assistant("I can't, dull.")]


def asks(**columns):
    """Rows whose answers are texts: the columns that hold words, with each word."""
    fill = lambda x, w: x.replace("*", w) if isinstance(x, str) else x
    return each(lambda w: {**TWO, **{k: fill(v, w) for k, v in columns.items()}})


def answered(*turns):
    """What is right for them: the turns before two answers."""
    word = lambda turn, w: {**turn, "content": turn["content"].replace("*", w)}
    return each(lambda w: ([word(turn, w) for turn in turns], GOOD, BAD))
