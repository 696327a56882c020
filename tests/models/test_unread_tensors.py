"""No tensor and no field is passed over: what changes the model is refused, what does not is known."""

import copy
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from dpojax.errors import UserError
from dpojax.models import Model, config_from_hf, load_model, open_model, save_model
from dpojax.models.safetensors import read_json
from tests.conftest import HF_CONFIG
from tests.models.families import FAMILIES as TINY
from tests.models.families import QWEN3
from tests.models.test_families import random_model
from tests.models.test_quantized import saved, tensors_of

LAYER = "model.layers.0"
EMBED = "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def model() -> Model:
    return random_model(HF_CONFIG)


def with_tensors(model: Model, directory: Path, **config) -> str:
    """The model's directory, with these fields of config.json changed."""
    return saved(directory, tensors_of(model), **config)


def x(*shape: int) -> np.ndarray:
    return np.ones(shape, np.float32)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({f"{LAYER}.self_attn.q_proj.bias": x(32)}, "though they are not zero; set attention_bias or mlp_bias"),
        ({f"{LAYER}.self_attn.bias": x(32)}, r"1 tensor \(model.layers.0.self_attn.bias\)"),
        ({f"{LAYER}.self_attn.q_norm.weight": x(8)}, "nothing reads 1 tensor .*q_norm.weight.* another model"),
        ({"model.layers.2.mlp.up_proj.weight": x(64, 32)}, "model.layers.2.mlp.up_proj.weight"),
        ({f"{LAYER}.self_attn.q_proj.lora_A.weight": x(4, 32)}, "of an adapter; merge it into the model first"),
        ({"v_head.weight": x(1, 32)}, r"nothing reads 1 tensor \(v_head.weight\)"),
        ({f"extra.{i}": x(1) for i in range(5)}, r"5 tensors \(extra.0, extra.1, extra.2, ...\)"),
        ({f"{LAYER}.self_attn.q_proj.weight_scale": x(1)}, "nothing reads 1 tensor .*weight_scale"),
        ({"lm_head.weight": x(384, 32)}, "lm_head.weight differs from model.embed_tokens.weight, but .* set that to f"),
        ({"lm_head.weight": x(380, 32)}, "lm_head.weight differs from model.embed_tokens.weight"),
    ],
)
def test_a_tensor_that_changes_the_model_is_refused(more, says, model, tmp_path):
    with pytest.raises(UserError, match=says):
        open_model(saved(tmp_path / "m", tensors_of(model) | more))


def test_tensors_that_change_nothing_are_known(model, tmp_path):
    tensors = tensors_of(model)
    more = {
        "lm_head.weight": tensors[EMBED],
        f"{LAYER}.self_attn.rotary_emb.inv_freq": x(4),
        f"{LAYER}.self_attn.bias": x(1, 1, 8, 8),
        f"{LAYER}.self_attn.masked_bias": x(),
        f"{LAYER}.self_attn.q_proj.bias": 0 * x(32),
    }
    got = load_model(saved(tmp_path / "m", tensors | more))
    jax.tree.map(np.testing.assert_array_equal, got.params, model.params)


def test_a_head_that_differs_in_its_last_row_is_found_when_it_is_loaded(model, tmp_path):
    tensors = tensors_of(model)
    head = tensors[EMBED].copy()
    head[-1, -1] += 1
    files = open_model(saved(tmp_path / "m", tensors | {"lm_head.weight": head}))
    with pytest.raises(UserError, match=r"lm_head.weight differs from model.embed_tokens.weight"):
        files.load()


def test_both_ways_out_of_a_head_that_differs_are_ways_out(model, tmp_path):
    tensors = tensors_of(model)
    head = 1 + tensors[EMBED]
    untied = load_model(saved(tmp_path / "m", tensors | {"lm_head.weight": head}, tie_word_embeddings=False))
    np.testing.assert_array_equal(untied.params["head"], head)
    assert load_model(saved(tmp_path / "m", tensors)).config.tied


def test_tensors_that_the_index_does_not_name_are_seen_too(model, tmp_path):
    tensors = tensors_of(model)
    directory = saved(tmp_path / "m", tensors | {"extra": x(1)})
    index = {"weight_map": dict.fromkeys(tensors, "model.safetensors")}
    (tmp_path / "m" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"nothing reads 1 tensor \(extra\)"):
        open_model(directory)


def test_an_adapter_beside_a_model_is_refused(model, tmp_path):
    directory = with_tensors(model, tmp_path / "m")
    (tmp_path / "m" / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"adapter_config.json: an adapter beside a whole model, and only one"):
        open_model(directory)


def test_a_weight_of_integers_is_no_weight(model, tmp_path):
    tensors = tensors_of(model)
    name = f"{LAYER}.mlp.up_proj.weight"
    tensors[name] = tensors[name].astype(np.int8)
    with pytest.raises(UserError, match=f"tensor {name} is of dtype I8, and its config.json has no quantization_conf"):
        open_model(saved(tmp_path / "m", tensors))


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"attn_logit_softcapping": 50.0}, "nothing is known of attn_logit_softcapping 50.0 in a llama model; remove"),
        ({"sliding_window": 8, "use_mup": True}, "nothing is known of sliding_window 8, use_mup True in a llama model"),
        (
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
            "partial_rotary_factor 0.5 is not supported in this family; remove it",
        ),
        ({"rope_parameters": {"rope_type": "default", "speed": 2}}, "nothing is known of speed 2 in rotary positions"),
        ({"num_attention_heads": "four"}, "num_attention_heads 'four' is not supported; use a number"),
        ({"num_key_value_heads": 3}, "3 key-value heads do not divide 4 heads"),
        ({"num_hidden_layers": 0}, "a number of layers of 0 makes no model"),
        ({"architectures": ["LlamaForTokenClassification"]}, "architectures .* is not supported; use a ForCausalLM"),
    ],
)
def test_fields_are_read_or_refused_by_name_and_value(model, tmp_path, fields, says):
    directory = with_tensors(model, tmp_path / "m", **fields)
    with pytest.raises(UserError, match=f"config.json: {says}"):
        open_model(directory)


def test_fields_that_are_off_or_change_nothing_are_accepted(model, tmp_path):
    fields = {"final_logit_softcapping": None, "use_mup": False, "use_cache": True, "torch_dtype": "float16"}
    assert open_model(with_tensors(model, tmp_path / "m", **fields)).notes == ()


@pytest.mark.parametrize("raw", [HF_CONFIG, QWEN3, QWEN3 | {"use_sliding_window": False, "max_window_layers": 28}])
def test_a_common_config_has_no_unknown_field(raw, tmp_path):
    save_model(random_model(raw), tmp_path / "m")
    assert open_model(str(tmp_path / "m")).notes == ()


@pytest.mark.parametrize("name", TINY)
def test_a_config_that_transformers_wrote_has_no_unknown_field(name, tmp_path):
    from transformers import AutoConfig

    raw = TINY[name]
    AutoConfig.for_model(**{k: v for k, v in copy.deepcopy(raw).items() if k != "architectures"}).save_pretrained(
        tmp_path
    )
    assert config_from_hf(read_json(tmp_path / "config.json"), "test") == config_from_hf(raw, "test")


def test_a_share_of_all_is_no_share():
    assert config_from_hf(HF_CONFIG | {"partial_rotary_factor": 1.0}, "test") == config_from_hf(HF_CONFIG, "test")
    with pytest.raises(UserError, match=r"test: partial_rotary_factor 0.5 is not supported; this family turns whole"):
        config_from_hf(HF_CONFIG | {"partial_rotary_factor": 0.5}, "test")
