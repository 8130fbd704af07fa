# Copyright © 2026 MLX Contributors

"""Every setting of ``mlx_lm.dpo_collect``."""

from typing import Any

from ..data.options import RowOptions
from ..setting import Setting

_COUNT: dict[str, Any] = {"kind": int, "least": 1}

GENERATE = [
    Setting("model", None, "Who answers: a local folder or a Hugging Face repo.", str),
    Setting(
        "adapter_path", None, "Folder of an adapter of the model.", str, metavar="DIR"
    ),
    Setting("trust_remote_code", False, "Let the repo's own code run at loading."),
    Setting(
        "prompts",
        None,
        "Prompts to answer: a text file with one a line, a .jsonl file with prompt or "
        "messages, or any preference data.",
        str,
        metavar="FILE",
    ),
    Setting(
        "max_bad_rows",
        RowOptions.max_bad_rows,
        "Largest share of prompts that can't be used.",
        least=0,
        most=1,
    ),
    Setting("samples", 4, "Answers to each prompt.", **_COUNT),
    Setting("temperature", 1.0, "Temperature of the samples.", least=0.0),
    Setting(
        "top_p",
        1.0,
        "Share of the probability to sample from, the likeliest tokens first.",
        above=0.0,
        most=1.0,
    ),
    Setting("max_tokens", 256, "Most tokens of an answer.", **_COUNT),
    Setting("batch_size", 32, "Answers that are generated at a time.", **_COUNT),
    Setting("seed", 0, "Seed of the samples.", least=0),
    Setting(
        "another_model",
        False,
        "Go on in a folder whose answers are another model's, or were sampled in "
        "another way.",
    ),
]
LABEL = [
    Setting(
        "label",
        None,
        "Who judges: human or human:NAME, function:FILE.py:NAME, model:PATH, "
        "endpoint:URL:MODEL, or reward, which is what the adapter in --adapter-path "
        "learned.",
        str,
        metavar="JUDGE",
    ),
    Setting(
        "judge_timeout",
        60.0,
        "Most seconds of a function for one prompt, or of an endpoint for one reply.",
        above=0,
    ),
]
PAIRS = [
    Setting(
        "pairs",
        "best",
        "Which pairs are made of a prompt's answers: the best with the worst, all, or "
        "rankings.",
        choices=("best", "all", "ranking"),
    ),
    Setting(
        "weights",
        None,
        "What a pair weighs: how far its judges agree. Default: all the same.",
        str,
        choices=("agreement",),
    ),
    Setting(
        "length_penalty",
        None,
        "What a token of an answer costs where the judge is reward, in nats. Default: as "
        "much as makes chosen answers as long as rejected ones.",
        float,
    ),
    Setting(
        "export",
        None,
        "Write plain JSONL with the columns of TRL.",
        str,
        metavar="FILE",
    ),
]
PAGE = [
    Setting(
        "host",
        "127.0.0.1",
        "Address of the page; 0.0.0.0 lets a phone in the same network vote.",
    ),
    Setting("port", 8421, "Port of the page; 0 takes a free one.", least=0, most=65535),
    Setting("no_browser", False, "Open no browser: print the address alone."),
    Setting(
        "review",
        None,
        "Folder with the pairs to look at once more, for --label human.",
        str,
        metavar="DIR",
    ),
]
COMMON = [
    Setting(
        "output",
        None,
        "Folder with the answers, the labels and the pairs.",
        str,
        metavar="DIR",
    ),
]
GROUPS = {
    "What is collected": COMMON,
    "Generate": GENERATE,
    "Label": LABEL,
    "Pairs": PAIRS,
    "The page": PAGE,
}
FLAGS = {one.name: one for group in GROUPS.values() for one in group}
