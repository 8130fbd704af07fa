# Copyright © 2026 MLX Contributors

"""What can be wrong with a run's input, and what the command must say to it."""

import gzip
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
from test_gpt2 import save_gpt2
from tiny import save_rows, save_tiny_model

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
        self.environment = {"XDG_CACHE_HOME": self.cache, "HF_HUB_OFFLINE": "1"}

    def flags(self, *more):
        base = {
            "--model": self.model,
            "--data": self.data,
            "--adapter-path": self.adapters,
            "--num-layers": 2,
            "--max-seq-length": 64,
            "--iters": 2,
            "--batch-size": 4,
        }
        pairs = (word for pair in base.items() for word in pair)
        return [str(word) for word in ("--train", *pairs, *more)]

    def run(self, *more, **environment):
        environment = os.environ | self.environment | environment
        environment.pop("MLX_LM_DEBUG", None)
        return subprocess.run(
            [sys.executable, "-m", "mlx_lm", "dpo", *self.flags(*more)],
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            env={k: str(v) for k, v in environment.items()},
            timeout=600,
        )

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


def saved_adapter(d, **shape):
    """An adapter as a run of another model, or of another rank, leaves it."""
    folder = d.folder / "before"
    folder.mkdir()
    tensor = {"model.layers.2.self_attn.q_proj.lora_a": mx.zeros((48, 8)), **shape}
    mx.save_safetensors(str(folder / "adapters.safetensors"), tensor)
    config = {"fine_tune_type": "lora", "num_layers": 2}
    config["lora_parameters"] = {"rank": 8, "scale": 20.0, "dropout": 0.0}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def other_vocabulary(d):
    return ["--reference-model", save_gpt2(d.folder / "gpt2")]


def other_token_ids(d):
    """The same tokens, of which two have changed places."""
    copy = d.copy_of_model()
    file = copy / "tokenizer.json"
    content = json.loads(file.read_text())
    vocab = content["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    file.write_text(json.dumps(content))
    return ["--reference-model", copy]


def smaller_vocabulary(d):
    """Weights that end before the tokenizer's ids."""
    return ["--model", save_tiny_model(d.folder / "small", vocab_size=99)]


def without_wandb(d):
    (d.folder / "wandb.py").write_text("raise ImportError")
    d.environment["PYTHONPATH"] = str(d.folder)
    return ["--report-to", "wandb"]


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
        lambda d: ["--data", "nobody/nothing"],
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
        "Known shapes: prompt . chosen . rejected; ",
    ),
    "labels without kto": (
        lambda d: d.train(lines({"prompt": "a", "completion": "b", "label": True})),
        "labels need loss_type kto .first: train.jsonl:1",
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
        lambda d: ["--margin-feature", "gap"],
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
        lambda d: ["--batch-size", 9],
        "8 usable pairs, fewer than batch_size=9. Lower batch_size or add pairs",
    ),
}
SETTINGS = {
    "beta 0": (lambda d: ["--beta", 0], "beta must be above 0, got 0"),
    "beta NaN": (lambda d: ["--beta", "nan"], "beta must be above 0, got nan"),
    "beta is text": (lambda d: ["--beta", "low"], "--beta: invalid float .*'low'"),
    "negative label_smoothing": (
        lambda d: ["--label-smoothing", -0.1],
        "label_smoothing must be at least 0 and below 0.5, got -0.1",
    ),
    "label_smoothing 0.5": (
        lambda d: ["--label-smoothing", 0.5],
        "label_smoothing must be at least 0 and below 0.5, got 0.5",
    ),
    "unknown loss": (
        lambda d: ["--loss-type", "dpo"],
        "--loss-type: invalid choice: 'dpo' .choose from 'sigmoid', 'hinge'",
    ),
    "unknown loss in a list": (
        lambda d: d.config("loss_type: [sigmoid, dpo]"),
        "Unknown loss_type 'dpo', choose from sigmoid, hinge",
    ),
    "list in a list of losses": (
        lambda d: d.config("loss_type: [[sigmoid]]"),
        "Unknown loss_type .'sigmoid'.",
    ),
    "empty list of losses": (
        lambda d: d.config("loss_type: []"),
        "loss_type must be a name or a list, got .]",
    ),
    "a weight for one of two losses": (
        lambda d: d.config("loss_type: [sigmoid, sft]\nloss_weights: [1]"),
        "loss_weights must be a list of 2, one for each loss_type, got .1]",
    ),
    "weights as text": (
        lambda d: d.config("loss_type: [sigmoid, sft]\nloss_weights: ['1', 1]"),
        "loss_weights must be positive numbers, got '1'",
    ),
    "losses with and without reference": (
        lambda d: d.config("loss_type: [sigmoid, simpo]"),
        "sigmoid measures from a reference and simpo does not",
    ),
    "labels beside pairs": (
        lambda d: d.config("loss_type: [sft, kto]"),
        "kto learns from labels and goes with no other",
    ),
    "dpop without a reference": (
        lambda d: ["--loss-type", "dpop", "--reference-free"],
        "reference_free does not go with dpop: it measures each answer",
    ),
    "exo_pair without smoothing": (
        lambda d: ["--loss-type", "exo_pair"],
        "exo_pair needs label_smoothing above 0",
    ),
    "smoothing that a loss has not": (
        lambda d: ["--loss-type", "hinge", "--label-smoothing", 0.1],
        "hinge can't be smoothed: label_smoothing goes with sigmoid",
    ),
    "a setting of another loss": (
        lambda d: ["--gamma", 1],
        "gamma is a setting of simpo alone",
    ),
    "TRL's name of a divergence": (
        lambda d: d.config("f_divergence: js_divergence"),
        "Unknown f_divergence 'js_divergence', choose from reverse_kl",
    ),
    "divergence of a likelihood": (
        lambda d: ["--loss-type", "sft", "--f-divergence", "js"],
        "f_divergence does not go with sft",
    ),
    "divergence without a reference": (
        lambda d: ["--reference-free", "--f-divergence", "js"],
        "f_divergence needs a reference",
    ),
    "alpha without its divergence": (
        lambda d: ["--f-alpha", 0.7],
        "f_alpha is a setting of f_divergence alpha",
    ),
    "LD-DPO of one answer": (
        lambda d: ["--loss-type", "kto", "--ld-alpha", 0.5],
        "ld_alpha does not go with kto: no two answers",
    ),
    "WPO of whole batches": (
        lambda d: ["--loss-type", "aot", "--use-weighting"],
        "use_weighting does not go with aot, which has no loss of one pair",
    ),
    "kto with one answer": (
        lambda d: ["--loss-type", "kto", "--batch-size", 1],
        "kto compares the answers of a batch: batch_size must be at least 2, got 1",
    ),
    "margins of labels": (
        lambda d: ["--loss-type", "kto", "--margin-feature", "gap"],
        "margin_feature does not go with kto",
    ),
    "weights of whole batches": (
        lambda d: ["--loss-type", "aot", "--weight-feature", "certainty"],
        "weight_feature does not go with aot, which compares whole batches",
    ),
    "criteria of labels": (
        lambda d: d.config("loss_type: kto\ncriteria: {helpful: 1}"),
        "criteria is for pairs of answers, and kto has labels: leave it out",
    ),
    "criteria without weight": (
        lambda d: d.config("criteria: {helpful: 0}"),
        "criteria needs a weight above 0 for every name",
    ),
    "moving reference that is another model": (
        lambda d: ["--sync-reference", "--reference-model", d.model],
        "sync_reference lets the policy's own start follow it",
    ),
    "moving reference that is none": (
        lambda d: ["--loss-type", "simpo", "--sync-reference"],
        "simpo has no reference: leave out sync_reference",
    ),
    "reference model without need": (
        lambda d: ["--loss-type", "orpo", "--reference-model", d.model],
        "orpo has no reference: leave out reference_model",
    ),
    "moving without a moving reference": (
        lambda d: ["--sync-steps", 5],
        "sync_alpha and sync_steps need sync_reference",
    ),
    "a mixing beyond 1": (
        lambda d: ["--sync-reference", "--sync-alpha", 1.5],
        "sync_alpha must be above 0 and at most 1, got 1.5",
    ),
    "unknown optimizer": (
        lambda d: d.config("optimizer: adamm"),
        "Unknown optimizer 'adamm', choose from adam, adamw",
    ),
    "unknown optimizer as flag": (
        lambda d: ["--optimizer", "adamm"],
        "--optimizer: invalid choice: 'adamm' .choose from 'adam', 'adamw'",
    ),
    "unknown schedule": (
        lambda d: d.config("lr_schedule: cosin"),
        "Unknown lr_schedule 'cosin' .*constant, linear, cosine",
    ),
    "num_layers too large": (
        lambda d: ["--num-layers", 4],
        "num_layers is 4 but the model only has 3 layers",
    ),
    "unknown flag": (lambda d: ["--betta", 1], "unrecognized arguments: --betta 1"),
    "unknown key": (
        lambda d: d.config("betta: 1"),
        "Unknown key 'betta' in the config, did you mean 'beta'",
    ),
    "1e-6 as text": (
        lambda d: d.config('learning_rate: "1e-6"'),
        "learning_rate must be a number, got '1e-6'.*quotes",
    ),
    "reserved character": (
        lambda d: d.config("beta: 0.1\nprompt_feature: @prompt\n"),
        "dpo.yaml:2:17: .*'@'.*quotes",
    ),
    "tab in YAML": (lambda d: d.config("beta:\n\t0.1"), r"dpo.yaml:2:1: .*'\\t'"),
    "configuration that is no UTF-8": (
        lambda d: d.config(b"data: \xff"),
        "dpo.yaml.* UTF-8",
    ),
    "no configuration": (
        lambda d: ["-c", d.folder / "no.yaml"],
        "no.yaml.*No such file|No such file.*no.yaml",
    ),
    "service that is not installed": (
        without_wandb,
        "report_to needs wandb: pip install wandb",
    ),
    "no text to retain": (
        lambda d: ["--retain-data", d.folder / "no.txt"],
        "retain_data .*no.txt can't be read: No such file",
    ),
    "prompts that are none": (
        lambda d: d.config("sample_prompts: [{text: Hi}]"),
        "sample_prompts, prompt 1 is no prompt",
    ),
    "adapter_path below a file": (
        lambda d: ["--adapter-path", d.below_a_file()],
        "adapter_path .*file/adapters can't be written: .*/file is no folder. Choose",
    ),
    "adapter_path is a file": (
        lambda d: ["--adapter-path", d.below_a_file().parent],
        "adapter_path .*/file can't be written: .*/file is no folder. Choose",
    ),
}
MODELS = {
    "no such model": (
        lambda d: ["--model", d.folder / "nowhere"],
        "model folder .*nowhere does not exist",
    ),
    "reference model with another vocabulary": (
        other_vocabulary,
        "tokenizer differs from the policy's: token .*same tokenizer",
    ),
    "reference model with other token ids": (
        other_token_ids,
        "tokenizer differs from the policy's: token 'a' has id .* instead of",
    ),
    "vocabulary that is too small": (
        smaller_vocabulary,
        "Token id .* is outside of the model's vocabulary of 99",
    ),
    "truncated weights": (
        lambda d: ["--model", d.copy_of_model(weights=lambda raw: raw[:-4096])],
        "Can't read the weights of .*copy",
    ),
    "empty weights": (
        lambda d: ["--model", d.copy_of_model(weights=lambda raw: b"")],
        "Can't read the weights of .*copy",
    ),
    "no weights": (
        lambda d: ["--model", d.copy_of_model("model.safetensors")],
        "copy has no .safetensors weights",
    ),
    "no tokenizer": (
        lambda d: [
            "--model",
            d.copy_of_model("tokenizer.json", "tokenizer_config.json"),
        ],
        "Can't load the model .*copy': it has no tokenizer",
    ),
    "damaged tokenizer": (
        lambda d: ["--model", broken(d.copy_of_model(), "tokenizer.json")],
        "Can't load the model .*copy': tokenizer.json is damaged",
    ),
    "no config.json": (
        lambda d: ["--model", d.copy_of_model("config.json")],
        "Can't load the model .*copy': it has no config.json",
    ),
    "damaged config.json": (
        lambda d: ["--model", broken(d.copy_of_model(), "config.json")],
        "Can't load the model .*copy': config.json is damaged",
    ),
    "unknown model_type": (
        lambda d: ["--model", changed(d.copy_of_model(), model_type="llamma")],
        "Can't load the model .*copy': Model type llamma",
    ),
    "weights of another size": (
        lambda d: ["--model", changed(d.copy_of_model(), hidden_size=64)],
        "Can't load the model .*copy': Expected shape .*embed_tokens",
    ),
    "adapter of another shape": (
        lambda d: ["--resume-adapter-file", saved_adapter(d)],
        "adapters.safetensors does not fit: tensor .*lora_a.* shape",
    ),
    "adapter with other tensors": (
        lambda d: ["--resume-adapter-file", saved_adapter(d, other=mx.zeros((1,)))],
        "does not fit: tensor 'other' is not trained here",
    ),
    "damaged adapter": (
        lambda d: [
            "--resume-adapter-file",
            broken(saved_adapter(d), "adapters.safetensors"),
        ],
        "Can't read the adapter file .*before/adapters.safetensors",
    ),
    "damaged configuration of an adapter": (
        lambda d: [
            "--resume-adapter-file",
            broken(saved_adapter(d), "adapter_config.json"),
        ],
        "before/adapter_config.json is damaged",
    ),
    "nothing to resume": (
        lambda d: ["--resume", d.folder],
        "Nothing to resume in {folder}",
    ),
}


def broken(folder, name):
    """Half of a file is gone."""
    file = folder / name
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    return folder


def changed(folder, **config):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **config}))
    return folder
