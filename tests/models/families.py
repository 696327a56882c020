"""Tiny models of every family, in the form of ``config.json``: what tests and their goldens are made of."""

import numpy as np

from tests.conftest import HF_CONFIG

TOKEN_IDS = {"vocab_size": 384, "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
COMMON = {k: v for k, v in HF_CONFIG.items() if k not in ("mlp_bias", "rope_theta", "architectures", "model_type")}
UNTIED, TIED = {"tie_word_embeddings": False}, {"tie_word_embeddings": True}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 16, "rope_theta": 500_000.0}
SLIDING, FULL = "sliding_attention", "full_attention"


def _named(architecture: str, model_type: str, *fields: dict) -> dict:
    raw = {"architectures": [architecture], "model_type": model_type}
    for more in fields:
        raw |= more
    return raw


MISTRAL = _named("MistralForCausalLM", "mistral", COMMON, UNTIED, {"sliding_window": None})
QWEN2 = _named("Qwen2ForCausalLM", "qwen2", COMMON, TIED)
QWEN3 = _named("Qwen3ForCausalLM", "qwen3", COMMON, UNTIED, {"head_dim": 16, "rms_norm_eps": 1e-6})
WINDOW = {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1, "num_hidden_layers": 3}
GEMMA = {"hidden_activation": "gelu_pytorch_tanh", "head_dim": 16, "query_pre_attn_scalar": 24, "num_hidden_layers": 3}
GEMMA |= {
    "sliding_window": 7,
    **{k: v for k, v in COMMON.items() if k not in ("hidden_act", "head_dim", "num_hidden_layers")},
}
GEMMA2 = _named("Gemma2ForCausalLM", "gemma2", GEMMA, {"final_logit_softcapping": 3.0, "attn_logit_softcapping": 2.0})
ROPES = {
    FULL: {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    SLIDING: {"rope_type": "default", "rope_theta": 1e4},
}
GEMMA3 = _named(
    "Gemma3ForCausalLM", "gemma3_text", GEMMA, {"layer_types": [SLIDING, SLIDING, FULL], "rope_parameters": ROPES}
)
OLMO2 = _named("Olmo2ForCausalLM", "olmo2", COMMON, UNTIED)
PHI3 = _named("Phi3ForCausalLM", "phi3", {k: v for k, v in COMMON.items() if k != "head_dim"}, UNTIED)
PARTIAL = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0, 1.1, 1.5, 2.0],
    "long_factor": [1.0, 2.0, 4.0, 8.0],
}
LONG |= {"original_max_position_embeddings": 128}
GPT2 = _named("GPT2LMHeadModel", "gpt2", TOKEN_IDS, TIED, {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 48})
GPT2 |= {"n_positions": 512, "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5}
GPTJ = _named("GPTJForCausalLM", "gptj", GPT2, UNTIED, {"rotary_dim": 4})
GPTJ |= {"architectures": ["GPTJForCausalLM"], "model_type": "gptj"}
NEOX = _named("GPTNeoXForCausalLM", "gpt_neox", TOKEN_IDS, UNTIED, {"hidden_act": "gelu", "hidden_size": 32})
NEOX |= {"intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 512}
NEOX |= {"layer_norm_eps": 1e-5, "rope_parameters": PARTIAL}

MIXTRAL = _named("MixtralForCausalLM", "mixtral", COMMON, UNTIED, {"num_local_experts": 4, "num_experts_per_tok": 2})
MIXTRAL |= {"sliding_window": None}
QWEN3_MOE = _named("Qwen3MoeForCausalLM", "qwen3_moe", COMMON, UNTIED, {"num_experts": 4, "num_experts_per_tok": 2})
QWEN3_MOE |= {"moe_intermediate_size": 24, "norm_topk_prob": True, "num_hidden_layers": 3, "mlp_only_layers": []}

FAMILIES = {
    "llama": HF_CONFIG,
    "llama biases": HF_CONFIG | UNTIED | {"attention_bias": True, "mlp_bias": True, "head_dim": 12},
    "llama linear": HF_CONFIG | {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}},
    "llama3": HF_CONFIG | UNTIED | {"rope_parameters": LLAMA3, "hidden_act": "gelu"},
    "mistral": MISTRAL,
    "mistral window": MISTRAL | {"sliding_window": 7},
    "qwen2": QWEN2,
    "qwen2 window": QWEN2 | UNTIED | WINDOW,
    "qwen3": QWEN3,
    "qwen3 tied": QWEN3 | TIED,
    "qwen3 biases": QWEN3 | {"attention_bias": True},
    "qwen3 window": QWEN3 | WINDOW,
    "gemma2": GEMMA2,
    "gemma2 biases": GEMMA2 | UNTIED | {"attention_bias": True, "final_logit_softcapping": None, "sliding_window": 100},
    "gemma3": GEMMA3,
    "gemma3 capped": GEMMA3 | UNTIED | {"final_logit_softcapping": 3.0, "attention_bias": True},
    "olmo2": OLMO2,
    "olmo2 biases": OLMO2 | TIED | {"attention_bias": True},
    "phi3": PHI3,
    "phi3 partial": PHI3 | TIED | {"rope_parameters": PARTIAL, "sliding_window": 7},
    "phi3 long": PHI3 | {"rope_parameters": LONG, "original_max_position_embeddings": 128},
    "gpt2": GPT2,
    "gpt2 scaled": GPT2
    | UNTIED
    | {"scale_attn_by_inverse_layer_idx": True, "n_layer": 3, "activation_function": "relu"},
    "gpt2 unscaled": GPT2 | {"scale_attn_weights": False, "n_inner": None},
    "gpt_neox": NEOX,
    "gpt_neox serial": NEOX | TIED | {"use_parallel_residual": False, "attention_bias": False},
    "gptj": GPTJ,
    "mixtral": MIXTRAL,
    "mixtral window": MIXTRAL | TIED | {"sliding_window": 7, "num_experts_per_tok": 3},
    "qwen3_moe": QWEN3_MOE,
    "qwen3_moe raw": QWEN3_MOE | TIED | {"norm_topk_prob": False, "attention_bias": True, "head_dim": 16},
    "qwen3_moe dense between": QWEN3_MOE
    | {"mlp_only_layers": [1], "num_hidden_layers": 4, "use_sliding_window": True, "sliding_window": 7},
    "gptj whole": GPTJ | TIED | {"rotary_dim": 8},
}
TOKENS = np.random.default_rng(0).integers(0, 384, (2, 40)).tolist()


def random_tensor(i: int, shape: tuple[int, ...]) -> np.ndarray:
    """The i-th tensor of a model, far from what a fresh one would have."""
    spread = 0.2 if len(shape) > 1 else 0.1
    mean = 0.0 if len(shape) > 1 else 1.0
    return (mean + spread * np.random.default_rng(i).normal(size=shape)).astype(np.float32)


# ---- held back ------------------------------------------------------------------------------------------------------

OF_HUB = {"torch_dtype": "bfloat16", "transformers_version": "4.40.1", "use_cache": True, "initializer_range": 0.02}
OF_HUB |= {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": None, "vocab_size": 384}
SIZES = {"hidden_size": 48, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 6}
SIZES |= {"num_key_value_heads": 2, "rms_norm_eps": 1e-6, "max_position_embeddings": 131072, **OF_HUB}
LAYERS = {"num_hidden_layers": 3}
WIDE = {"head_dim": 12}
GPT_SIZES = {"n_embd": 36, "n_layer": 2, "n_head": 3, "n_ctx": 256, "n_positions": 256, "layer_norm_epsilon": 1e-5}
GPT_SIZES |= {**OF_HUB, "summary_type": "cls_index", "summary_use_proj": True, "summary_activation": None}
GPT_SIZES |= {"summary_first_dropout": 0.1, "resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1}
NEOX_SIZES = {"hidden_size": 48, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 3, **OF_HUB}
NEOX_SIZES |= {"max_position_embeddings": 2048, "layer_norm_eps": 1e-5, "rotary_emb_base": 10000}
FACTORS = {"long_factor": [1.0, 1.5, 2.0, 4.0], "short_factor": [1.0, 1.25, 1.5, 2.0]}
SCALED = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SCALED |= {"original_max_position_embeddings": 64}
GEMMA_HUB = {**SIZES, "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh", "head_dim": 16}
GEMMA_HUB |= {"query_pre_attn_scalar": 144, "sliding_window": 6, "cache_implementation": "hybrid"}
HELD_BACK: dict[str, list[dict]] = {
    "llama": [
        {**SIZES, "hidden_act": "silu", "pretraining_tp": 1, "rope_scaling": None, "tie_word_embeddings": False},
        {**SIZES, **WIDE, "rope_scaling": SCALED, "rope_theta": 500000.0, "attention_bias": False, "mlp_bias": False},
    ],
    "mistral": [
        {**SIZES, "sliding_window": 6, "rope_theta": 10000.0, "tie_word_embeddings": False},
        {**SIZES, **WIDE, "sliding_window": None, "rope_theta": 1000000.0},
    ],
    "qwen2": [
        {**SIZES, "sliding_window": 4, "use_sliding_window": False, "max_window_layers": 0, "rope_theta": 1000000.0},
        {**SIZES, **LAYERS, "sliding_window": 9, "use_sliding_window": True, "max_window_layers": 1},
    ],
    "qwen3": [
        {**SIZES, **WIDE, "attention_bias": False, "max_window_layers": 36, "rope_theta": 1e6, "sliding_window": None},
        {**SIZES, **WIDE, "attention_bias": True, "tie_word_embeddings": True, "rope_scaling": None},
    ],
    "gemma2": [
        {**GEMMA_HUB, "attn_logit_softcapping": 1.5, "final_logit_softcapping": 4.0},
        {**GEMMA_HUB, **LAYERS, "query_pre_attn_scalar": 20, "sliding_window": 4096, "tie_word_embeddings": False},
    ],
    "gemma3_text": [
        {**GEMMA_HUB, **LAYERS, "sliding_window_pattern": 3, "rope_theta": 1e6, "rope_local_base_freq": 5000.0},
        {
            **GEMMA_HUB,
            **LAYERS,
            "sliding_window_pattern": 2,
            "attn_logit_softcapping": None,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "final_logit_softcapping": 2.0,
        },
    ],
    "olmo2": [
        {**SIZES, "rope_theta": 500000, "attention_bias": False, "rope_scaling": None},
        {**SIZES, "num_key_value_heads": 6, "rms_norm_eps": 1e-3, "tie_word_embeddings": True},
    ],
    "phi3": [
        {**SIZES, "sliding_window": 5, "rope_scaling": None, "rope_theta": 1e4, "resid_pdrop": 0.0, "embd_pdrop": 0.0},
        {**SIZES, "rope_scaling": {"type": "longrope", **FACTORS}, "original_max_position_embeddings": 4096}
        | {"tie_word_embeddings": True},
    ],
    "gpt2": [
        GPT_SIZES | {"activation_function": "gelu_new"},
        GPT_SIZES | {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True, "n_inner": 50},
    ],
    "gpt_neox": [
        NEOX_SIZES | {"rotary_pct": 0.25, "hidden_act": "gelu", "tie_word_embeddings": False},
        NEOX_SIZES | {"rotary_pct": 1.0, "hidden_act": "gelu_fast", "use_parallel_residual": False},
    ],
    "gptj": [
        GPT_SIZES | {"rotary": True, "rotary_dim": 8, "n_inner": None, "tie_word_embeddings": False},
        GPT_SIZES | {"rotary_dim": 2, "activation_function": "relu", "scale_attn_weights": True, "n_inner": 31},
    ],
    "mixtral": [
        {**SIZES, "num_local_experts": 3, "num_experts_per_tok": 2, "sliding_window": None, "rope_theta": 1e6}
        | {"router_aux_loss_coef": 0.02, "output_router_logits": False, "tie_word_embeddings": False},
        {**SIZES, "num_local_experts": 5, "num_experts_per_tok": 1, "sliding_window": 6},
    ],
    "qwen3_moe": [
        {**SIZES, **WIDE, "num_experts": 5, "num_experts_per_tok": 3, "moe_intermediate_size": 16}
        | {"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [], "max_window_layers": 48},
        {**SIZES, **LAYERS, "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "decoder_sparse_step": 2}
        | {"norm_topk_prob": False, "moe_intermediate_size": 20, "attention_bias": True, "tie_word_embeddings": True},
    ],
}
"""Other configs, with the fields that files on the hub have, of which no golden is made."""
