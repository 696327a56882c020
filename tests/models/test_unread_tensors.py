"""No tensor and no field is passed over: what changes the model is refused, what does not is known, the rest named."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from dpojax.errors import UserError
from dpojax.models import Model, load_model, open_model, save_model
from tests.conftest import HF_CONFIG
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


def test_fields_that_nobody_understands_are_named_once(model, tmp_path, capsys):
    fields = {"attn_logit_softcapping": 50.0, "sliding_window": 8, "final_logit_softcapping": None, "use_mup": False}
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    load_model(
        with_tensors(model, tmp_path / "m", **fields, rope_parameters=rope, use_cache=True, torch_dtype="float16")
    )
    lines = [line for line in capsys.readouterr().out.splitlines() if "config.json" in line]
    assert [line.split(": ", 1)[1] for line in lines] == [
        "fields of config.json that are not understood and not used: attn_logit_softcapping, "
        "rope_parameters.partial_rotary_factor, sliding_window"
    ]


@pytest.mark.parametrize("raw", [HF_CONFIG, QWEN3, QWEN3 | {"use_sliding_window": False, "max_window_layers": 28}])
def test_a_common_config_has_no_unknown_field(raw, tmp_path):
    save_model(random_model(raw), tmp_path / "m")
    assert open_model(str(tmp_path / "m")).notes == ()


def test_a_config_that_transformers_wrote_has_no_unknown_field(tmp_path):
    from transformers import LlamaConfig, Qwen3Config

    for kind, raw in ((LlamaConfig, HF_CONFIG), (Qwen3Config, QWEN3)):
        save_model(random_model(raw), tmp_path / "m")
        config = kind(**{name: value for name, value in raw.items() if name not in ("model_type", "architectures")})
        config.save_pretrained(tmp_path / "m")
        assert open_model(str(tmp_path / "m")).notes == ()
