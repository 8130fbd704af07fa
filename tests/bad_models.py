# Copyright © 2026 MLX Contributors

"""What can be wrong with models and adapters, and what the command must say to it."""

import json

import mlx.core as mx
from mlx.utils import tree_flatten
from test_gpt2 import save_gpt2
from tiny import save_tiny_model

from mlx_lm.preference.policy.model import load_model, prepare_policy


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


def with_adapter_of(number):
    """A case that goes on from an adapter whose every number is this one."""
    return lambda d: [
        "--resume-adapter-file",
        with_all(saved_adapter(d), number, d.model),
    ]


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
    "only .bin weights": (
        lambda d: ["--model", renamed(d.copy_of_model(), "pytorch_model.bin")],
        "no .safetensors weights .* only .bin files",
    ),
    "a reference model that is none": (
        lambda d: ["--reference-model", d.folder / "nowhere"],
        "nowhere.* does not exist",
    ),
    "weights of a reference model": (
        lambda d: ["--reference-model", d.copy_of_model(weights=lambda raw: raw[:64])],
        "Can't read the weights of .*copy",
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
    "an end that is no token": (
        lambda d: ["--model", changed(d.copy_of_model(), eos_token_id=["x"])],
        "Can't load the model .*copy': eos_token_id is no token id: 'x'",
    ),
    "layers without an end": (
        lambda d: ["--model", changed(d.copy_of_model(), num_hidden_layers=10**8)],
        "Can't load the model .*copy': config.json has num_hidden_layers 100,000,000",
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
    **{
        f"adapter of {name}": (
            with_adapter_of(x),
            rf"before/adapters.safetensors can't be used: tensor .* has {what}",
        )
        for name, x, what in (
            ("NaN", mx.array(mx.nan), "numbers that are not finite"),
            ("infinite numbers", mx.array(mx.inf, mx.bfloat16), "numbers that are not"),
            ("whole numbers", mx.array(1), "mlx.core.int32"),
            ("truth values", mx.array(True), "mlx.core.bool"),
            ("complex numbers", mx.array(1j), "mlx.core.complex64"),
        )
    },
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


def with_all(folder, value, model):
    """An adapter of the model whose every number is one value."""
    policy, _ = load_model(str(model))
    prepare_policy(policy, "lora", 2, {"rank": 8, "scale": 20.0, "dropout": 0.0})
    shapes = tree_flatten(policy.trainable_parameters())
    tensors = {name: mx.full(x.shape, value, value.dtype) for name, x in shapes}
    mx.save_safetensors(str(folder / "adapters.safetensors"), tensors)
    return folder


def broken(folder, name):
    """Half of a file is gone."""
    file = folder / name
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    return folder


def changed(folder, **config):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **config}))
    return folder


def renamed(folder, name):
    (folder / "model.safetensors").rename(folder / name)
    return folder
