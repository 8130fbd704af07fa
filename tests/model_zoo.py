# Copyright © 2026 MLX Contributors

"""One tiny model with random weights for every model_type that can be trained."""

import importlib
import re
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

import mlx_lm.models

# ModelArgs.from_dict drops the keys that a family does not know, so one table serves
# all of them: each value with all the names that families have for it.
SIZES: list[tuple[Any, str]] = [
    (64, "vocab_size num_vocab vocab_size_per_layer_input"),
    (32, "hidden_size hidden_dim model_dim n_embd d_model"),
    (48, "intermediate_size ff_intermediate_size ffn_hidden_size n_inner"),
    (2, "num_hidden_layers num_layers n_layer n_layers"),
    (4, "num_attention_heads num_heads n_head n_heads"),
    (2, "num_key_value_heads num_kv_heads n_kv_heads"),
    (8, "head_dim hidden_size_per_layer_input"),
    (128, "max_position_embeddings n_positions n_ctx block_size model_max_length"),
    (1e-5, "rms_norm_eps layer_norm_eps layer_norm_epsilon layernorm_epsilon norm_eps"),
    (1e-5, "post_norm_eps"),
    (1000.0, "rope_theta"),
    (0.5, "partial_rotary_factor"),
    (4, "rotary_dim"),
    (6, "sliding_window sliding_window_size window_size attention_window_size"),
    (6, "loop_window_size attention_chunk_size"),
    (2, "sliding_window_pattern full_attention_interval no_rope_layer_interval"),
    (False, "tie_word_embeddings attention_bias mlp_bias use_bias"),
    (True, "use_qk_norm qk_norm use_conv_bias mamba_conv_bias"),
    # Experts
    (4, "num_experts num_local_experts n_routed_experts moe_num_experts"),
    (2, "num_experts_per_tok num_experts_per_token moe_topk moe_top_k moe_k"),
    (2, "top_k_experts zero_expert_num"),
    (1, "n_shared_experts num_shared_experts num_shared_expert"),
    (1, "moe_num_shared_experts"),
    (16, "moe_intermediate_size moe_hidden_size expert_ffn_hidden_size"),
    (16, "routed_expert_hidden_size"),
    (24, "shared_expert_intermediate_size shared_intermediate_size share_expert_dim"),
    (24, "moe_shared_expert_intermediate_size dense_intermediate_size"),
    (24, "intermediate_size_mlp"),
    (1, "first_k_dense_replace num_dense_layers moe_layer_start_index"),
    (1, "moe_layer_freq decoder_sparse_step n_group topk_group"),
    (True, "norm_topk_prob use_expert_bias"),
    (1.5, "routed_scaling_factor"),
    ("noaux_tc", "topk_method"),
    ("sigmoid", "scoring_func"),
    # Low-rank and sparse attention
    (12, "kv_lora_rank"),
    (20, "q_lora_rank"),
    (4, "qk_rope_head_dim index_topk"),
    (8, "qk_nope_head_dim v_head_dim index_head_dim"),
    (2, "index_n_heads index_block_size index_topk_blocks"),
    (1, "index_local_blocks"),
    # Recurrent layers
    (8, "state_size ssm_state_size mamba_d_state mamba_head_dim mamba_d_head"),
    (3, "conv_kernel mamba_d_conv conv_L_cache linear_conv_kernel_dim"),
    (3, "short_conv_kernel_size"),
    (2, "n_groups mamba_expand layer_group_size group_norm_size"),
    (1, "mamba_n_groups"),
    (4, "time_step_rank mamba_num_heads mamba_n_heads linear_num_value_heads"),
    (2, "linear_num_key_heads"),
    (8, "linear_key_head_dim linear_value_head_dim"),
    ((0.01, 10.0), "time_step_limit"),
    (False, "mamba_proj_bias conv_bias"),
    # Scales that are far from 1, so that a forgotten one shows
    (2.0, "logits_scaling scale_emb"),
    (0.3, "attention_multiplier"),
    (1.5, "embedding_multiplier scale_depth"),
    (0.5, "residual_multiplier logit_scale output_multiplier lm_head_multiplier"),
    (16, "dim_model_base"),
    (5.0, "attn_logit_softcapping"),
    (10.0, "final_logit_softcapping"),
    (8.0, "query_pre_attn_scalar"),
]
BASE: dict[str, Any] = {
    **{name: value for value, names in SIZES for name in names.split()},
    "mlp_only_layers": [],
    "rope_scaling": None,
}

LOCAL_GLOBAL = ["sliding_attention", "full_attention"]
LINEAR_FULL = ["linear_attention", "full_attention"]
ROPES = {
    "sliding_attention": {"rope_theta": 100.0},
    "full_attention": {"rope_theta": 1000.0},
}
YARN = {"type": "yarn", "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 1.0}
LLAMA4_SCALE = {
    "rope_type": "default",
    "rope_theta": 1000.0,
    "llama_4_scaling_beta": 0.1,
    "original_max_position_embeddings": 4,
}
KDA = {"num_heads": 2, "head_dim": 8, "short_conv_kernel_size": 3}


def text(model_type: str, **own: Any) -> dict[str, dict]:
    """The inner config of a family that wraps a text model."""
    return {"text_config": {**BASE, "model_type": model_type, **own}}


LFM2 = {
    "layer_types": ["conv", "full_attention"],
    "full_attn_idxs": [1],
    "block_dim": 32,
    "block_ff_dim": 48,
    "block_multiple_of": 8,
    "block_ffn_dim_multiplier": 1.0,
    "block_auto_adjust_ff_dim": False,
}
GEMMA3N = {
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "layer_types": LOCAL_GLOBAL * 2,
    "rope_local_base_freq": 100.0,
    "activation_sparsity_pattern": [0.5] * 4,
    "altup_num_inputs": 2,
    "altup_coef_clip": 1.0,
    "altup_correct_scale": True,
    "altup_active_idx": 0,
    "laurel_rank": 4,
}
GEMMA4 = {
    "num_hidden_layers": 4,
    "num_key_value_heads": 1,
    "num_kv_shared_layers": 2,
    "layer_types": LOCAL_GLOBAL * 2,
    "global_head_dim": 16,
    "tie_word_embeddings": True,
}
LLAMA4 = {
    "num_hidden_layers": 4,
    "interleave_moe_layer_step": 2,
    "no_rope_layers": [1, 0, 1, 0],
    "num_experts_per_tok": 1,
}
LONGCAT = {
    "attention_method": "MLA",
    "zero_expert_type": "identity",
    "mla_scale_q_lora": True,
    "mla_scale_kv_lora": True,
}
MINIMAX_M3 = {
    "mlp_layer_types": ["dense", "sparse"],
    "layer_types": ["full_attention", "minimax_m3_sparse"],
}
KIMI_K3 = {
    "num_hidden_layers": 4,
    "hidden_act": "situ",
    "activation_situ_beta": 4.0,
    "activation_situ_linear_beta": 25.0,
    "linear_attn_config": {
        **KDA,
        "kda_layers": [1, 2, 3],
        "full_attn_layers": [4],
        "gate_lower_bound": -5.0,
        "use_full_rank_gate": True,
    },
    "mla_use_nope": True,
    "mla_use_output_gate": True,
    "latent_moe_use_norm": True,
    "attn_res_block_size": 2,
}
PACKED = {
    "path": "model.layers.1.mlp.down_proj",
    "block": 0,
    "embedding": False,
    "dtype": "float16",
}
GROUPS = {"n_group": 2, "topk_group": 1}

# Families for which BASE is enough.
PLAIN = """
    Klear bailing_moe cohere cohere2 deepseek deepseek_v32 ernie4_5 ernie4_5_moe exaone gemma
    gemma2 gemma3_text glm glm4 glm4_moe_lite gpt2 gptj granitemoe helium
    hunyuan_v1_dense internlm2 internlm3 iquestloopcoder llama mamba mimo minicpm
    minimax mixtral nanochat olmo2 olmoe phimoe phixtral plamo3 qwen2_moe qwen3
    qwen3_moe qwen3_next seed_oss smollm3 solar_open talkie telechat3 youtu_llm
"""
OWN: dict[str, dict[str, Any]] = {
    "afm7": {"num_layers": 4, "num_kv_reuse_layers": 2},
    "afmoe": {"layer_types": LOCAL_GLOBAL},
    "apertus": {"post_norm": True},
    "baichuan_m1": {"sliding_window_layers": [0], "conv_window": 2},
    "bailing_hybrid": {"num_hidden_layers": 4},
    "bailing_moe_linear": {"num_hidden_layers": 4},
    "bailing_moe_v3": {"num_hidden_layers": 4},
    "deepseek_v2": {"topk_method": "greedy", "rope_scaling": YARN},
    "deepseek_v3": GROUPS,
    "dots1": {"scoring_func": "noaux_tc"},
    "exaone4": {"sliding_window_pattern": "LG"},
    "exaone_moe": {"layer_types": LOCAL_GLOBAL, "is_moe_layer": [False, True]},
    "falcon_h1": {"mamba_d_ssm": 32},
    "gear": {
        "num_hidden_layers": 3,
        "layer_types": ["conv_mixer", "full_attention", "sliding_attention"],
    },
    "gemma3": text("gemma3_text"),
    "gemma3n": text("gemma3n", **GEMMA3N),
    "gemma4": text("gemma4_text", **GEMMA4, enable_moe_block=True),
    "gemma4_text": GEMMA4,
    "glm4_moe": GROUPS,
    "glm_moe_dsa": {"rope_parameters": {"rope_theta": 1000.0, "rope_type": "default"}},
    "gpt_bigcode": {"num_key_value_heads": 1},
    "gpt_neox": {"rotary_emb_base": 1000, "rotary_pct": 0.5, "num_key_value_heads": 4},
    "gpt_oss": {"layer_types": LOCAL_GLOBAL},
    "granite": {"tie_word_embeddings": True},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "hunyuan": {
        "use_mixed_mlp_moe": True,
        "use_cla": True,
        "cla_share_factor": 2,
        "rope_scaling": {"type": "dynamic", "factor": 1.0, "alpha": 2.0},
    },
    "jamba": {
        "attn_layer_offset": 1,
        "attn_layer_period": 2,
        "expert_layer_offset": 1,
        "expert_layer_period": 2,
    },
    "kimi_k25": text("deepseek_v3"),
    "kimi_k3": text("kimi_linear", **KIMI_K3),
    "kimi_linear": {"linear_attn_config": {**KDA, "kda_layers": [1]}},
    "kimi_vl": text("deepseek_v3"),
    "laguna": {"layer_types": LOCAL_GLOBAL, "mlp_layer_types": ["dense", "sparse"]},
    "lfm2": LFM2,
    "lfm2-vl": text("lfm2", **LFM2),
    "lfm2_moe": LFM2,
    "lille-130m": {"n_embd": 64},
    "llama4": text("llama4_text", **LLAMA4),
    "llama4_text": LLAMA4,
    "longcat_flash": LONGCAT,
    "longcat_flash_ngram": {**LONGCAT, "ngram_vocab_size_ratio": 2},
    "mamba2": {"intermediate_size": 32},
    "mellum": {"layer_types": LOCAL_GLOBAL, "rope_parameters": ROPES},
    "mimo_v2_flash": {
        "hybrid_layer_pattern": [0, 1],
        "moe_layer_freq": [0, 1],
        "add_swa_attention_sink_bias": True,
        "add_full_attention_sink_bias": False,
        "swa_rope_theta": 100.0,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 2,
        "swa_head_dim": 8,
        "swa_v_head_dim": 8,
    },
    "minicpm3": {
        "rope_scaling": {
            "short_factor": [1.0, 1.2],
            "long_factor": [1.5, 2.0],
            "original_max_position_embeddings": 128,
        }
    },
    "minimax_m3_vl": text("minimax_m3_vl", **MINIMAX_M3),
    "ministral3": {"layer_types": LOCAL_GLOBAL, "rope_parameters": LLAMA4_SCALE},
    "mistral3": text(
        "ministral3", layer_types=LOCAL_GLOBAL, rope_parameters=LLAMA4_SCALE
    ),
    "mistral4": {"rope_parameters": LLAMA4_SCALE},
    "muse_glimmer": {"layer_types": LOCAL_GLOBAL},
    "nanbeige": {"num_loops": 2},
    "nemotron": {"hidden_act": "relu2"},
    "nemotron-nas": {
        "block_configs": [
            {"attention": {"n_heads_in_group": 2}, "ffn": {"ffn_mult": 1.5}},
        ]
        * 2
    },
    "nemotron_h": {
        "num_hidden_layers": 4,
        "hybrid_override_pattern": ["*", "M", "-", "E"],
    },
    "olmo3": {"layer_types": LOCAL_GLOBAL},
    "olmo_hybrid": {"layer_types": LINEAR_FULL, "linear_allow_neg_eigval": True},
    "openelm": {
        "num_transformer_layers": 2,
        "ffn_dim_divisor": 8,
        "ffn_multipliers": [1.0, 2.0],
        "num_query_heads": [4, 4],
        "num_kv_heads": [2, 4],
    },
    "phi": {"num_key_value_heads": 2},
    "phi3": {"partial_rotary_factor": 1.0},
    # The dummy tokens that this family masks have fixed ids.
    "phi3small": {
        "vocab_size": 100352,
        "dense_attention_every_n_layers": 2,
        "gegelu_limit": 20.0,
        "mup_width_multiplier": 2.0,
        "blocksparse_block_size": 32,
        "blocksparse_num_local_blocks": 1,
        "blocksparse_vert_stride": 2,
    },
    "pixtral": text("llama", layer_types=LOCAL_GLOBAL),
    "plamo": {"n_shared_head": 2},
    "plamo2": {"hidden_size_per_head": 8, "mamba_step": 2},
    "prism_hadamard_qwen35": {
        **text("qwen3_5", num_experts=0, intermediate_size=128),
        "schema_version": 1,
        "tensor_namespace": "mlx-lm-text",
        "quantization": {"bits": 2, "group_size": 128, "mode": "affine"},
        "modules": [PACKED],
    },
    "qwen": {"kv_channels": 8},
    "qwen2": {"tie_word_embeddings": True},
    "qwen2_vl": text("qwen2"),
    "qwen3_5": text("qwen3_5", num_experts=0),
    "qwen3_5_moe": text("qwen3_5_moe"),
    "qwen3_vl": text("qwen3"),
    "qwen3_vl_moe": text("qwen3_moe"),
    "rwkv7": {
        "a_low_rank_dim": 4,
        "v_low_rank_dim": 4,
        "gate_low_rank_dim": 4,
        "decay_low_rank_dim": 4,
    },
    "spark2_5": {"layer_types": LOCAL_GLOBAL, "rope_parameters": ROPES},
    "stablelm": {"use_qkv_bias": True},
    "starcoder2": {"tie_word_embeddings": True},
    "step3p5": {
        "num_attention_groups": 2,
        "rope_theta": [1000.0, 100.0],
        "layer_types": LOCAL_GLOBAL[::-1],
        "partial_rotary_factors": [0.5, 1.0],
        "attention_other_setting": {
            "num_attention_heads": 8,
            "num_attention_groups": 2,
        },
        "moe_layers_enum": "1",
    },
}

CONFIGS: dict[str, dict[str, Any]] = {
    name: {**BASE, "model_type": name, **own}
    for name, own in sorted({**dict.fromkeys(PLAIN.split(), {}), **OWN}.items())
}

NOT_BUILT: dict[str, str] = {
    "bitnet": "ternary weights are packed in uint8 and need a Metal kernel",
    "dbrx": "routes with numpy, which mx.compile refuses",
    "deepseek_v41": "has no gradient: gather_axis",
    "muse_spark": "its attention exists as a Metal kernel only",
    "olmo": "its module ends the process unless the package ai2-olmo is installed",
    "recurrent_gemma": "Model is no complete nn.Module: it skips super().__init__",
}


# What 0.32.1 calls by another name.
RENAMED = {"muse_spark_open": "muse_spark"}


def model_types() -> list[str]:
    """Names of the modules in mlx_lm.models that define a Model and its ModelArgs."""
    folder = Path(mlx_lm.models.__file__).parent
    return sorted(
        RENAMED.get(path.stem, path.stem)
        for path in folder.glob("[!_]*.py")
        if all(
            re.search(rf"\b{name}\b", path.read_text())
            for name in ("Model", "ModelArgs")
        )
    )


def build(model_type: str, seed: int = 0) -> nn.Module:
    """A float32 model of CONFIGS[model_type] with random weights and biases.

    All parameters are trainable but packed ones. Noise on top of the own start of each
    family keeps its ranges (decays, norms) and leaves no zero and no flat log-probs.
    """
    module = importlib.import_module(f"mlx_lm.models.{model_type}")
    mx.random.seed(seed)
    model = module.Model(module.ModelArgs.from_dict(CONFIGS[model_type]))
    model.set_dtype(mx.float32)

    def noisy(p: mx.array) -> mx.array:
        if mx.issubdtype(p.dtype, mx.floating):
            return p + 0.1 * mx.random.normal(p.shape)
        return mx.random.randint(0, 2**31 - 1, p.shape).astype(p.dtype)

    model.update(tree_map(noisy, model.parameters()))
    mx.eval(model.parameters())
    return model
