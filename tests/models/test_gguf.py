"""GGUF: a model in llama.cpp's form is the model, family by family, type by type and slice by slice."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFEndian, GGUFWriter, dequantize

from dpojax.configs import MeshConfig
from dpojax.errors import UserError
from dpojax.models import Model, config_from_hf, load_model, open_model
from dpojax.models.config import Rope
from dpojax.models.gguf_config import ARCHITECTURES
from dpojax.sharding import make_mesh
from tests.models.families import FAMILIES as TINY
from tests.models.families import TOKENS
from tests.models.gguf_files import ARCHITECTURES as NAMES
from tests.models.gguf_files import as_type, gguf_tensors, tensors_of, write_gguf
from tests.models.test_families import logits, random_model

UNTIED = {"tie_word_embeddings": False}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 8192, "rope_theta": 500_000.0}
# What the format does not hold is as llama.cpp takes it to be.
MODELS = {name: TINY[name] for name in ("llama", "llama linear", "mistral", "qwen2", "qwen3", "qwen3 tied", "olmo2")}
MODELS |= {name: TINY[name] for name in ("qwen3 biases", "gpt2", "gpt_neox", "phi3", "phi3 partial", "phi3 long")}
MODELS |= {name: TINY[name] for name in ("mixtral", "qwen3_moe")}
MODELS |= {
    "llama biases": TINY["llama biases"],
    "llama3": TINY["llama"] | UNTIED | {"rope_parameters": LLAMA3},
    "gemma2": TINY["gemma2"] | {"query_pre_attn_scalar": 16},
    "gemma3": TINY["gemma3"] | {"query_pre_attn_scalar": 16},
    "gpt_neox serial": TINY["gpt_neox"] | {"use_parallel_residual": False},
}


@pytest.fixture
def llama() -> Model:
    return random_model(TINY["llama"] | UNTIED)


def llama3_factors() -> np.ndarray:
    """1 where the wavelength is below 8192 / 4, 8 where it is above 8192, and between them what is in the paper's code
    (arXiv 2407.21783): of the wavelengths 6.3, 167, 4443 and 118,143, the third."""
    share = (8192 / (2 * np.pi * 500_000 ** (2 / 4)) - 1) / (4 - 1)
    return np.array([1, 1, 1 / ((1 - share) / 8 + share), 8], np.float32)


def written(path: Path, model: Model) -> str:
    tensors = gguf_tensors(model)
    if (model.hf_config.get("rope_parameters") or {}).get("rope_type") == "llama3":
        tensors["rope_freqs.weight"] = llama3_factors()
    return write_gguf(path, model, tensors)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_in_llama_cpps_form_is_the_model(name, tmp_path):
    model = random_model(MODELS[name])
    path = written(tmp_path / "m.gguf", model)
    back = load_model(path)
    assert back.config == model.config
    # w + 1 - 1 is rounded.
    close = {"rtol": 0, "atol": 2e-7 if name.startswith("gemma") else 0}
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **close), back.params, model.params)
    parts = load_model(path, mesh=make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)))
    jax.tree.map(np.testing.assert_array_equal, parts.params, back.params)


def test_every_architecture_is_tried():
    kinds = {raw["model_type"] for raw in MODELS.values()}
    assert {NAMES.get(kind, kind) for kind in kinds} == set(ARCHITECTURES)


DEFAULT_ROPES = {
    "full_attention": {"rope_type": "default", "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
GEMMA_SIZES = {"head_dim": 256, "query_pre_attn_scalar": 256}
# transformers passes over biases, scalings, Gemma's scale and caps, and sizes that are not its defaults.
READ_RIGHT = {name: TINY[name] | UNTIED for name in ("llama", "mistral", "qwen2", "phi3")}
READ_RIGHT |= {
    "qwen3_moe": TINY["qwen3_moe"] | {"moe_intermediate_size": 768},
    "qwen3": TINY["qwen3"] | {"head_dim": 128},
    "gpt2": TINY["gpt2"] | {"n_positions": 1024, "n_inner": 128},
    "gemma2": TINY["gemma2"] | GEMMA_SIZES | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    "gemma3": TINY["gemma3"]
    | GEMMA_SIZES
    | {"rope_parameters": DEFAULT_ROPES, "num_hidden_layers": 6}
    | {"layer_types": ["sliding_attention"] * 5 + ["full_attention"]},
}


@pytest.mark.parametrize("name", READ_RIGHT)
def test_transformers_reads_the_same_file_as_the_same_model(name, tmp_path):
    torch = pytest.importorskip("torch", reason="live parity needs torch, which CI installs")
    pytest.importorskip("accelerate", reason="transformers needs accelerate to read GGUF")
    from transformers import AutoModelForCausalLM

    model = random_model(READ_RIGHT[name])
    ids = {f"tokenizer.ggml.{role}_token_id": i for role, i in (("padding", 0), ("eos", 1), ("bos", 2))}
    ids |= {"tokenizer.ggml.tokens": [str(i) for i in range(384)]}  # transformers counts them
    path = write_gguf(tmp_path / "m.gguf", model, **ids)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    with torch.no_grad():
        expected = theirs.eval()(torch.tensor(TOKENS)).logits.numpy()
    got = logits(load_model(path), TOKENS)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


# ---- types ----------------------------------------------------------------------------------------------------------

KINDS = (
    "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "TQ1_0", "TQ2_0",
    "MXFP4", "NVFP4", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ1_S", "IQ1_M", "IQ4_NL", "IQ4_XS",
)  # fmt: skip
OTHER_FORMS = ("gpt2", "gpt_neox", "phi3", "mixtral", "qwen3_moe")
SLICES = (slice(None), slice(0, 256), slice(256, 512), slice(32, 40), slice(511, 512))


def blocks(shape: tuple[int, int], kind: GGMLQuantizationType) -> np.ndarray:
    """Random blocks; no byte is above 0x3B, so that no scale of theirs is infinite."""
    elements, size = GGML_QUANT_SIZES[kind]
    return np.random.default_rng(0).integers(0, 0x3C, (shape[0], shape[1] // elements * size)).astype(np.uint8)


def test_the_types_are_all_that_the_library_dequantizes():
    def dequantizes(kind: GGMLQuantizationType) -> bool:
        try:
            dequantize(blocks((1, 256), kind), kind)
        except NotImplementedError:
            return False
        return True

    assert {kind.name for kind in GGMLQuantizationType if dequantizes(kind)} <= {"F32", *KINDS}


@pytest.mark.parametrize("kind", [kind for kind in KINDS if hasattr(GGMLQuantizationType, kind)])
def test_every_type_is_read_slice_by_slice(kind, tmp_path):
    kind = GGMLQuantizationType[kind]
    sizes = {"hidden_size": 512, "intermediate_size": 512, "num_hidden_layers": 1, "head_dim": 128}
    model = random_model(TINY["llama"] | sizes)
    tensors, x = gguf_tensors(model), blocks((512, 512), kind)
    expected = dequantize(x, kind)
    tensors["blk.0.ffn_down.weight"] = tensors["blk.0.attn_q.weight"] = (x, kind)
    path = write_gguf(tmp_path / "m.gguf", model, tensors)
    source = open_model(path).source
    for rows in SLICES:
        for columns in SLICES:
            got = source.read("model.layers.0.mlp.down_proj.weight", (rows, columns))
            np.testing.assert_array_equal(got, expected[rows, columns])
    parts = load_model(path, mesh=make_mesh(MeshConfig(fsdp=2, tensor=2))).params["blocks"]
    np.testing.assert_array_equal(parts["down"][0], expected)
    halves = expected.reshape(4, 64, 2, 512).swapaxes(1, 2).reshape(4, 128, 512)  # Llama's q is interleaved
    np.testing.assert_array_equal(parts["q"][0], halves.transpose(2, 0, 1))


@pytest.mark.parametrize("name", OTHER_FORMS)
def test_matrices_in_another_form_are_quantised_too(name, tmp_path):
    """Transposed, by heads, one behind the other, or stacked."""
    sizes = {"hidden_size": 64, "n_embd": 64, "head_dim": 16, "intermediate_size": 64, "n_inner": 64}
    sizes |= {"moe_intermediate_size": 32}
    model = random_model(TINY[name] | {k: v for k, v in sizes.items() if k in TINY[name]})
    kind = GGMLQuantizationType.Q8_0
    tensors = {gguf: as_type(x, kind) if x.ndim > 1 else x for gguf, x in gguf_tensors(model).items()}
    back = load_model(write_gguf(tmp_path / "m.gguf", model, tensors))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=0.01), back.params, model.params)


def test_nvfp4_has_a_scale_beside_those_of_its_blocks(tmp_path):
    kind = GGMLQuantizationType.NVFP4 if hasattr(GGMLQuantizationType, "NVFP4") else pytest.skip("an older library")
    model = random_model(TINY["llama"] | {"hidden_size": 64, "intermediate_size": 64, "head_dim": 16})
    x = blocks((64, 64), kind)
    tensors = gguf_tensors(model) | {
        "blk.0.ffn_up.weight": (x, kind),
        "blk.0.ffn_up.scale": np.array([0.5], np.float32),
    }
    back = load_model(write_gguf(tmp_path / "m.gguf", model, tensors))
    np.testing.assert_array_equal(back.params["blocks"]["up"][0], 0.5 * dequantize(x, kind).T)


# ---- metadata -------------------------------------------------------------------------------------------------------


def test_numbers_are_those_of_config_json(tmp_path, llama):
    """GGUF holds 1e-05 as a float32, 9.99999975e-06."""
    path = write_gguf(tmp_path / "m.gguf", llama, **{"attention.layer_norm_rms_epsilon": 1e-5})
    assert open_model(path).hf_config["rms_norm_eps"] == 1e-5


def test_llama_3_scaling_is_read_from_its_factors(tmp_path):
    model = random_model(MODELS["llama3"])
    factors = gguf_tensors(model) | {"rope_freqs.weight": llama3_factors()}
    rope = open_model(write_gguf(tmp_path / "m.gguf", model, factors)).config.positions
    assert isinstance(rope, Rope) and rope == model.config.positions
    ones = gguf_tensors(model) | {"rope_freqs.weight": np.ones(4, np.float32)}
    plain = open_model(write_gguf(tmp_path / "ones.gguf", model, ones)).config.positions
    assert plain == dataclasses.replace(rope, scaling=None)
    other = gguf_tensors(model) | {"rope_freqs.weight": np.array([1, 2, 4, 8], np.float32)}
    with pytest.raises(UserError, match=r"rope_freqs.weight are no factors of Llama 3's scaling"):
        open_model(write_gguf(tmp_path / "other.gguf", model, other))


def test_gemmas_scale_of_scores_is_that_of_its_size(tmp_path):
    """It is not in the file: 27B models divide by the root of width / heads, others by that of a head's width."""
    for layers, scalar in ((3, 16), (46, 32 // 4)):
        raw = TINY["gemma2"] | {"query_pre_attn_scalar": scalar, "num_hidden_layers": layers}
        raw |= {"layer_types": None}
        model = random_model(raw)
        assert open_model(write_gguf(tmp_path / f"{layers}.gguf", model)).config == model.config


def test_gemma_3_has_windows_in_five_of_six_layers_where_the_file_does_not_say(tmp_path):
    raw = TINY["gemma3"] | {"num_hidden_layers": 7, "layer_types": None, "query_pre_attn_scalar": 16}
    types = (["sliding_attention"] * 5 + ["full_attention"]) * 2
    model = random_model(raw | {"layer_types": types[:7]})
    back = open_model(write_gguf(tmp_path / "m.gguf", model, **{"attention.sliding_window_pattern": None}))
    assert back.config == model.config == config_from_hf(raw, "test")
    whole = open_model(write_gguf(tmp_path / "w.gguf", model, **{"attention.sliding_window": None}))
    assert [kind.window for kind in whole.config.kinds] == [None]


def test_a_mistral_has_its_window_where_the_file_has_it(tmp_path):
    model = random_model(TINY["mistral window"])
    back = open_model(write_gguf(tmp_path / "m.gguf", model, **{"attention.sliding_window": 7}))
    assert (back.hf_config["model_type"], back.config) == ("mistral", model.config)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"attention.head_count": None}, "no metadata llama.attention.head_count; convert the model again"),
        ({"logit_scale": 2.0}, r"nothing is known of the metadata llama.logit_scale 2.0; use the model's safetensors"),
        ({"attention.head_count_kv": [2, 4]}, r"llama.attention.head_count_kv \[2, 4\] is not supported; every layer"),
        ({"attention.value_length": 4}, "llama.attention.value_length 4 is not supported; keys have 8"),
        ({"attention.causal": False}, "llama.attention.causal False is not supported"),
        ({"rope.dimension_count": 4}, "llama.rope.dimension_count 4 is not supported; its models have 8"),
        ({"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}, "rope type 'yarn' is not supported"),
        ({"general.type": "adapter"}, "it is of type 'adapter' and no model"),
        ({"split.count": 3}, "one of several files of a model; join them by llama-gguf-split --merge"),
        ({"tokenizer.ggml.tokens": ["x"] * 385}, "tokens are 385, but token_embd.weight has 384 rows"),
    ],
)
def test_metadata_that_make_another_model_are_refused(more, message, tmp_path, llama):
    with pytest.raises(UserError, match=message):
        open_model(write_gguf(tmp_path / "m.gguf", llama, **more))


def test_metadata_that_change_nothing_are_passed_over(tmp_path, llama):
    more = {"general.name": "x", "somebody.quantized_by": "x", "expert_count": 0, "attention.head_count_kv": [2, 2]}
    assert open_model(write_gguf(tmp_path / "m.gguf", llama, **more)).config == llama.config


def test_other_architectures_are_refused(tmp_path):
    writer = GGUFWriter(tmp_path / "m.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UserError, match="architecture 'mamba' is not supported in GGUF; use a model of gemma2, gemma3"):
        open_model(str(tmp_path / "m.gguf"))


def test_the_other_byte_order_is_refused(tmp_path):
    writer = GGUFWriter(tmp_path / "m.gguf", "llama", endianess=GGUFEndian.BIG)
    writer.add_tensor("token_embd.weight", np.zeros((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UserError, match="its numbers are in another byte order; convert it"):
        open_model(str(tmp_path / "m.gguf"))


# ---- tensors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "x", "message"),
    [
        ("blk.0.attn_k_norm.weight", np.ones(8, np.float32), "nothing reads 1 tensor .blk.0.attn_k_norm.weight."),
        ("blk.2.attn_norm.weight", np.ones(32, np.float32), "nothing reads 1 tensor .blk.2.attn_norm.weight."),
        ("blk.0.ffn_down.bias", np.ones(32, np.float32), "nothing reads 1 tensor .blk.0.ffn_down.bias."),
        ("output.weight", (np.zeros((384, 32), np.int8), None), "tensor output.weight is of type I8, which the gguf"),
        ("output.weight", np.zeros((300, 32), np.float32), "tensor lm_head.weight has shape .300, 32."),
        ("blk.0.ffn_norm.weight", None, "tensor model.layers.0.post_attention_layernorm.weight is missing"),
        ("token_embd.weight", None, "no tensor token_embd.weight, so it is no whole model"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(name, x, message, tmp_path, llama):
    tensors = {n: y for n, y in (gguf_tensors(llama) | {name: x}).items() if y is not None}
    with pytest.raises(UserError, match=message):
        open_model(write_gguf(tmp_path / "m.gguf", llama, tensors))


def test_rotary_frequencies_of_early_files_are_passed_over(tmp_path, llama):
    tensors = gguf_tensors(llama) | {"blk.0.attn_rot_embd.weight": np.ones(4, np.float32)}
    back = load_model(write_gguf(tmp_path / "m.gguf", llama, tensors))
    jax.tree.map(np.testing.assert_array_equal, back.params, llama.params)


def test_an_unembedding_that_repeats_the_embedding_is_read_as_it_is(tmp_path):
    """Early files hold GPT-2's tied unembedding twice."""
    model = random_model(TINY["gpt2"])
    tensors = gguf_tensors(model)
    tensors["output.weight"] = tensors["token_embd.weight"]
    assert load_model(write_gguf(tmp_path / "m.gguf", model, tensors)).config == model.config
    tensors["output.weight"] = tensors["output.weight"] + 1
    assert not open_model(write_gguf(tmp_path / "other.gguf", model, tensors)).config.tied


def test_logits_of_the_file_are_those_of_the_model(tmp_path, llama):
    np.testing.assert_array_equal(
        logits(load_model(written(tmp_path / "m.gguf", llama)), TOKENS), logits(llama, TOKENS)
    )
    assert sorted(tensors_of(llama)) == sorted(open_model(str(tmp_path / "m.gguf")).source.names)
    assert jnp.isfinite(logits(llama, TOKENS)).all()
