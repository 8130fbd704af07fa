# Copyright © 2026 MLX Contributors

"""What can be wrong with a run's input, and what the command must say to it."""

import gzip
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import yaml
from test_dpo_command import command
from tiny import save_rows

WORDS = "tea hat pen cup sun ink map oak".split()
GOOD = [{"prompt": f"Say {w}: ", "chosen": w, "rejected": f"no {w}"} for w in WORDS]


def lines(*rows):
    """A .jsonl file; what is bytes already is taken as it is."""
    whole = (r if isinstance(r, bytes) else json.dumps(r).encode() for r in rows)
    return b"\n".join(whole) + b"\n"


def good_with(**columns):
    return {**GOOD[0], **columns}


class Desk:
    """A case's own folder, and the flags that put its fault into a good command."""

    model: Path

    def __init__(self, folder):
        self.folder = Path(folder)
        self.adapters = self.folder / "adapters"
        self.cache = self.folder / "cache"
        self.data = save_rows(self.folder / "data", GOOD)
        self.in_file: set = set()

    def flags(self, *more):
        base = {
            "train": True,
            **{"model": self.model, "data": self.data},
            **{"adapter_path": self.adapters, "num_layers": 2},
            **{"max_seq_length": 64, "iters": 2, "batch_size": 4},
        }
        words = []
        for name in base.keys() - self.in_file:
            words.append(f"--{name.replace('_', '-')}")
            words += [] if name == "train" else [str(base[name])]
        return [*words, *map(str, more)]

    def run(self, *more):
        with (
            mock.patch.dict(os.environ, XDG_CACHE_HOME=str(self.cache)),
            mock.patch("huggingface_hub.constants.HF_HUB_OFFLINE", True),
            mock.patch("datasets.config.HF_HUB_OFFLINE", True),
        ):
            os.environ.pop("MLX_LM_DEBUG", None)
            code, out, err = command(*self.flags(*more))
        return SimpleNamespace(returncode=code, stdout=out, stderr=err)

    def given(self, fault):
        """The flags of a fault: a list, a file of settings, or what makes them."""
        if isinstance(fault, list):
            return fault
        if isinstance(fault, dict):
            self.in_file = set(fault)
            fault = yaml.safe_dump(fault)
        return fault(self) if callable(fault) else self.config(fault)

    def file(self, content, name="train.jsonl"):
        path = self.folder / "other" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def train(self, content, name="train.jsonl"):
        return ["--data", self.file(content, name).parent]

    def bad_rows(self, row, good=GOOD):
        """Two such rows among the good ones: a fifth of all."""
        return self.train(lines(*good, row, row))

    def config(self, text):
        return ["-c", self.file(text, "dpo.yaml")]

    def copy_of_model(self, *without, weights=None):
        copy = self.folder / "copy"
        shutil.copytree(self.model, copy)
        for name in without:
            (copy / name).unlink()
        if weights is not None:
            file = copy / "model.safetensors"
            file.write_bytes(weights(file.read_bytes()))
        return copy

    def below_a_file(self):
        file = self.folder / "file"
        file.write_text("taken")
        return file / "adapters"


def without_template(d):
    copy = d.copy_of_model("chat_template.jinja")
    return ["--model", copy]


# What is wrong: the flags, and what the line must say.


DATA = {
    "no such folder": (
        lambda d: ["--data", d.folder / "nowhere"],
        "Found no data at {folder}/nowhere",
    ),
    "no such data set": (
        ["--data", "nobody/nothing"],
        "nobody/nothing",
    ),
    "empty file": (
        lambda d: d.train(""),
        "train.jsonl is empty: it should have a JSON object a line",
    ),
    "not JSON": (
        lambda d: d.train("prompt,chosen,rejected\na,b,c\n"),
        r"train.jsonl holds no JSON object .train.jsonl:1: unreadable JSON, Expecting value",
    ),
    "cut .gz": (
        lambda d: d.train(gzip.compress(lines(*GOOD))[:-9], "train.jsonl.gz"),
        "Can't read .*train.jsonl.gz",
    ),
    "not Parquet": (
        lambda d: d.train("no", "train.parquet"),
        "Can't read .*train.parquet",
    ),
    "some lines not JSON": (
        lambda d: d.bad_rows(b'{"prompt": "x",'),
        r"2 of 10 rows are bad, more than max_bad_rows \(0.1\) allows.*"
        "unreadable JSON .first: train.jsonl:9, ",
    ),
    "wrong columns": (
        lambda d: d.train(lines({"text": "a"}, {"text": "b"})),
        "no row of 2 can be used.*unknown columns .first: train.jsonl:1, text.*"
        "Known columns: prompt, chosen, rejected; ",
    ),
    "labels without kto": (
        lambda d: d.train(lines({"prompt": "a", "completion": "b", "label": True})),
        "labels need loss_type kto or apo_zero_unpaired .first: train.jsonl:1",
    ),
    "ranking for kto": (
        lambda d: [
            *d.train(lines({"prompt": "a", "ranking": ["b", "c"]})),
            *("--loss-type", "kto"),
        ],
        "a ranking has no labels .first: train.jsonl:1",
    ),
    "criterion that no row has": (
        lambda d: [*d.config("criteria: {helpful: 1}"), "--data", d.data],
        "no row has the criterion 'helpful'",
    ),
    "no column of margins": (
        ["--margin-feature", "gap"],
        "missing column .first: train.jsonl:1, gap",
    ),
    "no rejected": (
        lambda d: d.bad_rows({"prompt": "a", "chosen": "b"}),
        "missing column .first: train.jsonl:9, rejected",
    ),
    "wrong names of columns": (
        lambda d: [*d.config("prompt_feature: ask"), "--data", d.data],
        "missing column .first: train.jsonl:1, ask",
    ),
    "wrong types": (
        lambda d: d.bad_rows(good_with(chosen=5)),
        "wrong type .first: train.jsonl:9, chosen is int",
    ),
    "None": (
        lambda d: d.bad_rows(good_with(rejected=None)),
        "value is None .first: train.jsonl:9, rejected",
    ),
    "empty answers": (
        lambda d: d.bad_rows(good_with(chosen=" ")),
        "empty answer .first: train.jsonl:9",
    ),
    "equal answers": (
        lambda d: d.bad_rows(good_with(rejected=GOOD[0]["chosen"])),
        "equal answers .first: train.jsonl:9",
    ),
    "prompts that are too long": (
        lambda d: d.train(lines(good_with(prompt="say " * 99))),
        "no row of 1 can be used.*prompt fills max_length .first: train.jsonl:1.*"
        "Raise max_seq_length, which is 64",
    ),
    "invalid UTF-8": (
        lambda d: d.bad_rows(b'{"prompt": "\xff", "chosen": "a", "rejected": "b"}'),
        "invalid UTF-8 .first: train.jsonl:9",
    ),
    "half a surrogate pair": (
        lambda d: d.bad_rows(good_with(prompt="\ud800")),
        "invalid Unicode .first: train.jsonl:9, prompt",
    ),
    "lines of 10 MB": (
        lambda d: d.bad_rows(b'{"prompt": "' + b"a" * 10_000_000),
        "unreadable JSON .first: train.jsonl:9, .{10,150}[.]\n",
    ),
    "messages without a template": (
        lambda d: [
            *without_template(d),
            *d.train(
                lines(*[good_with(prompt=[{"role": "user", "content": "Hi"}])] * 8)
            ),
        ],
        "no row of 8 can be used.*chat template",
    ),
    "folder without train.jsonl": (
        lambda d: d.train(lines(*GOOD), "prefs.jsonl"),
        "Found no split in .*other: it needs train.jsonl",
    ),
    "no train set": (
        lambda d: d.train(lines(*GOOD), "valid.jsonl"),
        "Found no train set in .*other",
    ),
    "no test set": (
        lambda d: [*d.train(lines(*GOOD)), "--test"],
        "Found no test set in .*other.*test: true needs one",
    ),
    "fewer rows than batch_size": (
        ["--batch-size", 9],
        "8 usable pairs, fewer than batch_size=9. Lower batch_size or add pairs",
    ),
}
# What the line must say, and the setting that is to blame.
SETTINGS = {
    "beta must be above 0, got 0": ["--beta", 0],
    "beta must be above 0, got -0.1": {"beta": -0.1},
    "beta must be a finite number, got nan": ["--beta", "nan"],
    "--beta: invalid float .*'low'": ["--beta", "low"],
    "label_smoothing must be at least 0 and below 0.5, got -0.1": {
        "label_smoothing": -0.1
    },
    "label_smoothing must be at least 0 and below 0.5, got 0.5": {
        "label_smoothing": 0.5
    },
    "iters must be a whole number, got 'many'": {"iters": "many"},
    "batch_size must be a whole number, got 2.5": {"batch_size": 2.5},
    "batch_size must be at least 1": {"batch_size": 0},
    "learning_rate must be a number, got 'low'": {"learning_rate": "low"},
    "learning_rate must be a number, got '1e-6'.*quotes": 'learning_rate: "1e-6"',
    "learning_rate must be at least 0": {"learning_rate": -1e-6},
    "train must be true or false": {"train": "yes"},
    "valid_fraction": {"valid_fraction": 1.5},
    # Losses
    "--loss-type: invalid choice: 'dpo' .choose from 'sigmoid', 'hinge'": [
        *("--loss-type", "dpo")
    ],
    "Unknown loss_type 'sigmod'": {"loss_type": "sigmod"},
    "Unknown loss_type 'dpo', choose from sigmoid, hinge": {
        "loss_type": ["sigmoid", "dpo"]
    },
    "Unknown loss_type .'sigmoid'.": {"loss_type": [["sigmoid"]]},
    "loss_type must be a name or a list, got .]": {"loss_type": []},
    "loss_weights must be a list of 2, one for each loss_type, got .1]": {
        **{"loss_type": ["sigmoid", "sft"], "loss_weights": [1]}
    },
    "loss_weights must be positive numbers, got '1'": {
        **{"loss_type": ["sigmoid", "sft"], "loss_weights": ["1", 1]}
    },
    "sigmoid measures from a reference and simpo does not": {
        "loss_type": ["sigmoid", "simpo"]
    },
    "kto learns from labels and goes with no other": {"loss_type": ["sft", "kto"]},
    "reference_free does not go with dpop: it measures each answer": {
        **{"loss_type": "dpop", "reference_free": True}
    },
    "exo_pair needs label_smoothing above 0": {"loss_type": "exo_pair"},
    "hinge can't be smoothed: label_smoothing goes with sigmoid": {
        **{"loss_type": "hinge", "label_smoothing": 0.1}
    },
    "gamma is a setting of simpo and alphapo alone": ["--gamma", 1],
    "Unknown f_divergence 'js_divergence', choose from reverse_kl": {
        "f_divergence": "js_divergence"
    },
    "f_divergence does not go with sft": {"loss_type": "sft", "f_divergence": "js"},
    "f_divergence needs a reference": {"reference_free": True, "f_divergence": "js"},
    "f_alpha is a setting of f_divergence alpha": ["--f-alpha", 0.7],
    "ld_alpha does not go with kto: no two answers": {
        **{"loss_type": "kto", "ld_alpha": 0.5}
    },
    "use_weighting does not go with aot, which has no loss of one pair": {
        **{"loss_type": "aot", "use_weighting": True}
    },
    "kto compares the answers of a batch: batch_size must be at least 2, got 1": [
        *("--loss-type", "kto", "--batch-size", 1)
    ],
    "margin_feature does not go with kto": [
        *("--loss-type", "kto", "--margin-feature", "gap")
    ],
    "weight_feature does not go with aot, which compares whole batches": [
        *("--loss-type", "aot", "--weight-feature", "certainty")
    ],
    "criteria is for pairs of answers, and kto has labels: leave it out": {
        **{"loss_type": "kto", "criteria": {"helpful": 1}}
    },
    "criteria needs a weight above 0 for every name": {"criteria": {"helpful": 0}},
    # References
    "sync_reference lets the policy's own start follow it": {
        **{"sync_reference": True, "reference_model": "other"}
    },
    "simpo has no reference: leave out sync_reference": {
        **{"loss_type": "simpo", "sync_reference": True}
    },
    "orpo has no reference: leave out reference_model": {
        **{"loss_type": "orpo", "reference_model": "other"}
    },
    "sync_alpha and sync_steps need sync_reference": ["--sync-steps", 5],
    "sync_alpha must be above 0 and at most 1, got 1.5": {
        **{"sync_reference": True, "sync_alpha": 1.5}
    },
    # Optimizers and adapters
    "Unknown optimizer 'adamm', choose from adam, adamw": {"optimizer": "adamm"},
    "--optimizer: invalid choice: 'adamm' .choose from 'adam', 'adamw'": [
        *("--optimizer", "adamm")
    ],
    "optimizer_config.sgd .* is wrong": {
        **{"optimizer": "sgd", "optimizer_config": {"sgd": {"betas": [0.9, 0.9]}}}
    },
    "'adamv' in optimizer_config, did you mean 'adam": {
        "optimizer_config": {"adamv": {}}
    },
    "Unknown lr_schedule 'cosin' .*constant, linear, cosine": {"lr_schedule": "cosin"},
    "Unknown lr_schedule 'cosine_decoy'": {
        "lr_schedule": {"name": "cosine_decoy", "arguments": [1e-5, 10]}
    },
    "lr_schedule .* is wrong": {
        "lr_schedule": {"name": "cosine_decay", "arguments": [1e-5]}
    },
    "Unknown fine_tune_type 'qlora'": {"fine_tune_type": "qlora"},
    "num_layers is 4 but the model only has 3 layers": ["--num-layers", 4],
    "max_seq_length is 2049 .* only has 2048": ["--max-seq-length", 2049],
    "'ranks' in lora_parameters, did you mean 'rank'": {
        "lora_parameters": {"ranks": 4}
    },
    "lora_parameters.rank must be a whole number": {"lora_parameters": {"rank": "big"}},
    "rank of at least 1": {"lora_parameters": {"rank": 0}},
    "no layers named": {"lora_parameters": {"keys": ["attention.query"]}},
    "keys must be a list": {"lora_parameters": {"keys": "self_attn.q_proj"}},
    "lora_parameters must be a mapping": {"lora_parameters": 8},
    "lora_parameters.scale must be a finite number, got nan": (
        "lora_parameters: {scale: .nan}"
    ),
    "lora_parameters.rank must be at most 1,000,000,000,000,000, got 10+": (
        f"lora_parameters: {{rank: {10**20}}}"
    ),
    "rank of at least 1 and at most 1,048,576": {"lora_parameters": {"rank": 2**21}},
    "learning_rate must be a finite number, got inf": "learning_rate: .inf",
    "lr_schedule.arguments must be a finite number, got inf": (
        "lr_schedule: {name: cosine_decay, arguments: [.inf, 10]}"
    ),
    "optimizer_config.adam.betas must be a finite number, got nan": (
        "optimizer_config: {adam: {betas: [.nan, 0.9]}}"
    ),
    "optimizer_config.adam .*betas.* is wrong: .*beta1": (
        "optimizer_config: {adam: {betas: [2, 0.9]}}"
    ),
    "epochs must be a whole number, got 1e.20": {"epochs": 1e20, "iters": None},
    "epochs must be at most 1,000,000,000,000,000, got": ["--epochs", 10**20],
    "iters must be at most 1,000,000,000,000,000, got": ["--iters", 10**20],
    r"dpo.yaml:2:1: 'beta' is there twice. Leave one": "beta: 0.1\nbeta: 0.2",
    r"dpo.yaml:3:3: 'rank' is there twice": (
        "lora_parameters:\n  rank: 4\n  rank: 8\n"
    ),
    r"criteria needs a weight above 0 for every name, got \{'z': 1e-300\}": {
        "criteria": {"z": 1e-300}
    },
    r"Found no data at /nowhere/\\x1b\[31m\\u202e\.": [
        "--data",
        "/nowhere/\x1b[31m\u202e",
    ],
    r"Unknown optimizer '\\x1b\[2j'": {"optimizer": "\x1b[2j"},
    # Names, files and services
    "unrecognized arguments: --betta 1": ["--betta", 1],
    "Unknown key 'betta' in the config, did you mean 'beta'": {"betta": 1},
    "'chosen_featur' in hf_dataset, did you mean 'chosen_feature'": {
        "hf_dataset": {"path": "x", "chosen_featur": "y"}
    },
    "hf_dataset must be a mapping or a list": {"hf_dataset": "org/name"},
    "dpo.yaml:2:17: .*'@'.*quotes": "beta: 0.1\nprompt_feature: @prompt\n",
    r"dpo.yaml:2:1: .*'\\t'": "beta:\n\t0.1",
    "dpo.yaml.* UTF-8": b"data: \xff",
    "must hold keys and values": "- beta",
    "expected ',' or ']'": "beta: [0.1",
    "no.yaml.*No such file|No such file.*no.yaml": ["-c", "nowhere/no.yaml"],
    "Unknown report_to 'wandbe'": {"report_to": "wandbe"},
    "report_to needs swanlab: pip install swanlab": {"report_to": "swanlab"},
    "retain_data .*no.txt can't be read: No such file": ["--retain-data", "no.txt"],
    "Can't read x+: File name too long": ["--data", "x" * 300],
    "sample_prompts, prompt 1 is no prompt": {"sample_prompts": [{"text": "Hi"}]},
    "adapter_path is empty": ["--adapter-path", ""],
    # Such as a date: features that look first need a path.
    "adapter_path must be text, got 20261130": {"adapter_path": 20261130},
    "adapter_path must be text, got 5": {"adapter_path": [5]},
    "resume must be text, got 5": {"resume": 5},
    r"adapter_path is no text in this locale, got 'a.x00b'": {"adapter_path": "a\0b"},
    r"adapter_path is no text in this locale, got 'd.udcff'": (
        ["--adapter-path", "d\udcff"]
    ),
    r"data is no text in this locale, got 'a.x00b'": {"data": "a\0b"},
    r"model is no text in this locale, got '.udce4'": ["--model", "\udce4"],
    "adapter_path .*file/adapters can't be written: .*/file is no folder. Choose": (
        lambda d: ["--adapter-path", d.below_a_file()]
    ),
    "adapter_path .*/file can't be written: .*/file is no folder. Choose": (
        lambda d: ["--adapter-path", d.below_a_file().parent]
    ),
}
