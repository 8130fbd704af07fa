# Copyright © 2026 MLX Contributors

"""Pairs as other trainers and published data sets have them."""

from functools import partial

from .shapes import CHOSEN_REJECTED, SHAPES, Shape, read_pair

_OPENAI = partial(
    read_pair, names=("preferred_output", "non_preferred_output"), shape="OpenAI"
)
_SWIFT = partial(read_pair, names=("response", "rejected_response"), shape="ms-swift")
_PAIRED = partial(
    read_pair, names=("response_j", "response_k"), shape="Stack Exchange pairs"
)
_RESPONSES = partial(read_pair, names=("chosen_response", "rejected_response"))

SHAPES += [
    Shape(
        "ShareGPT ranking",
        CHOSEN_REJECTED,
        read_pair,
        "conversations, chosen, rejected (from and value)",
        "LLaMA-Factory",
    ),
    Shape(
        "Alpaca",
        CHOSEN_REJECTED,
        read_pair,
        "instruction, input, history, chosen, rejected",
        "LLaMA-Factory",
    ),
    Shape(
        "Orca pairs",
        CHOSEN_REJECTED,
        read_pair,
        "system and prompt, question or input, chosen, rejected",
    ),
    Shape("UltraInteract", CHOSEN_REJECTED, read_pair, "trajectory, chosen, rejected"),
    Shape("context", CHOSEN_REJECTED, read_pair, "context, chosen, rejected"),
    Shape(
        "OpenAI",
        "preferred_output + non_preferred_output",
        _OPENAI,
        "input with messages and tools, preferred_output, non_preferred_output",
    ),
    Shape(
        "ms-swift",
        "response + rejected_response",
        _SWIFT,
        "query, response, rejected_response",
    ),
    Shape(
        "text",
        "chosen_response + rejected_response",
        _RESPONSES,
        "prompt, chosen_response, rejected_response (text)",
    ),
    Shape(
        "Stack Exchange pairs",
        "response_j + response_k",
        _PAIRED,
        "question, response_j, response_k",
    ),
]
