"""PEFT's adapter directories, in and out: those that peft writes have its logits here, ours have our logits there."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dpojax.errors import UserError
from dpojax.logprobs import logits_of
from dpojax.models import Model, init_params, make_apply, merge, new_lora, save_model, with_adapter
from dpojax.models.lora import targeted
from dpojax.models.params import flatten, nest, of_adapter
from dpojax.models.peft import load_adapter, lora_of, open_adapter, save_adapter
from dpojax.train.by_name import load_policy
from tests.conftest import HF_CONFIG, decoder_config, plain_input
from tests.models.test_choices import model as gpt2  # noqa: F401  # a fixture

TOKENS = np.random.default_rng(0).integers(0, 384, (2, 30))
UNTIED = HF_CONFIG | {"tie_word_embeddings": False}


def logits(config, params) -> np.ndarray:
    return np.asarray(logits_of(*make_apply(config)(params, plain_input(jnp.asarray(TOKENS)))))


def base_model(raw=HF_CONFIG) -> Model:
    config = decoder_config(raw)
    return Model(config, jax.tree.map(lambda x: x if (x == 1).all() else 10 * x, init_params(config, 0)), raw)


def adapted(model: Model, lora) -> Model:
    """The model with an adapter of random numbers."""
    config, rng = dataclasses.replace(model.config, lora=lora), np.random.default_rng(1)
    flat = flatten(with_adapter(config, model.params))
    noisy = {p: x + 0.1 * rng.normal(size=x.shape).astype(np.float32) if of_adapter(p) else x for p, x in flat.items()}
    return dataclasses.replace(model, config=config, params=nest(noisy))


def read_back(path, model: Model) -> Model:
    files = open_adapter(path)
    config = dataclasses.replace(model.config, lora=lora_of(files, model.family, model.config))
    return dataclasses.replace(
        model, config=config, params=nest({**flatten(model.params), **load_adapter(files, model.family, config)})
    )


def close(got, expected):
    np.testing.assert_allclose(got, expected, atol=2e-5 * np.abs(expected).max())


def grown(theirs):
    theirs.resize_token_embeddings(390, mean_resizing=False)
    return theirs


ADAPTERS = {
    "all-linear": (HF_CONFIG, {"target_modules": "all-linear"}, None),
    "patterns": (
        UNTIED,
        {
            "target_modules": ["q_proj", "down_proj"],
            "use_rslora": True,
            "rank_pattern": {"down_proj": 6},
            "alpha_pattern": {"q_proj": 3},
            "modules_to_save": ["lm_head", "embed_tokens"],
        },
        None,
    ),
    "some layers, and a tied embedding saved alone": (
        HF_CONFIG,
        {"target_modules": ["v_proj"], "layers_to_transform": [1], "modules_to_save": ["embed_tokens"]},
        None,
    ),
    "a norm saved": (HF_CONFIG, {"target_modules": ["v_proj"], "modules_to_save": ["input_layernorm"]}, None),
    "resized": (HF_CONFIG, {"target_modules": ["o_proj"]}, grown),
    "resized, untied": (UNTIED, {"target_modules": ["o_proj"]}, grown),
}


@pytest.mark.filterwarnings("ignore")  # peft's and transformers' own
@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_of_peft_has_its_logits_here_and_back(name, tmp_path):
    peft = pytest.importorskip("peft", reason="live parity needs peft, which CI installs")
    import torch
    from transformers import AutoModelForCausalLM

    raw, options, change = ADAPTERS[name]
    model = base_model(raw)
    save_model(model, tmp_path / "base")
    load = lambda: AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)  # noqa: E731
    base = load() if change is None else change(load())
    theirs = peft.get_peft_model(base, peft.LoraConfig(r=4, task_type="CAUSAL_LM", **options))
    torch.manual_seed(0)
    for parameter in (p for p in theirs.parameters() if p.requires_grad):
        parameter.data += 0.1 * torch.randn_like(parameter)
    theirs.save_pretrained(tmp_path / "theirs")
    with torch.no_grad():
        expected = theirs.eval()(torch.tensor(TOKENS)).logits.numpy()
    ours = read_back(tmp_path / "theirs", model)
    close(logits(ours.config, ours.params), expected)
    close(logits(ours.config.merged, merge(ours.config, ours.params)), expected)
    save_adapter(ours.params, ours.config, model.family, tmp_path / "ours", base=str(tmp_path / "base"))
    again = peft.PeftModel.from_pretrained(load() if change is None else change(load()), tmp_path / "ours").eval()
    with torch.no_grad():
        close(again(torch.tensor(TOKENS)).logits.numpy(), expected)


@pytest.mark.filterwarnings("ignore")
def test_a_fused_module_is_exact_with_the_ranks_of_its_parts(gpt2, tmp_path):  # noqa: F811
    """GPT-2's c_attn holds queries, keys and values, each of which has an adapter of its own."""
    lora = new_lora(targeted(["c_attn", "mlp.c_proj"], gpt2.family, gpt2.config), 3, 6.0)
    assert [low.name for low in lora.weights] == ["q", "k", "v", "down"]
    ours = adapted(gpt2, lora)
    save_adapter(ours.params, ours.config, gpt2.family, tmp_path / "ours", base=str(tmp_path / "base"))
    raw = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert raw["target_modules"] == ["c_attn", "mlp.c_proj"]  # attn.c_proj is another
    assert raw["fan_in_fan_out"] and {raw["r"], *raw["rank_pattern"].values()} == {9, 3}
    stored = load_file(tmp_path / "ours" / "adapter_model.safetensors")
    prefix = "base_model.model.transformer.h.1.attn.c_attn"
    assert stored[f"{prefix}.lora_A.weight"].shape == (9, 32) and stored[f"{prefix}.lora_B.weight"].shape == (96, 9)
    expected = logits(ours.config, ours.params)
    back = read_back(tmp_path / "ours", gpt2)
    assert [low.rank for low in back.config.lora.weights] == [9, 9, 9, 3]
    close(logits(back.config, back.params), expected)
    peft = pytest.importorskip("peft", reason="live parity needs peft, which CI installs")
    import torch
    from transformers import AutoModelForCausalLM

    save_model(gpt2, tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "ours").eval()
    with torch.no_grad():
        close(theirs(torch.tensor(TOKENS)).logits.numpy(), expected)


def test_an_adapter_is_a_models_name(tiny_dir, tmp_path):
    from dpojax.models import load_model

    model = load_model(tiny_dir)
    ours = adapted(model, new_lora(("q", "down"), 2, 4.0))
    save_adapter(ours.params, ours.config, model.family, tmp_path, base=tiny_dir)
    merged = load_policy(str(tmp_path))
    close(logits(merged.config, merged.params), logits(ours.config, ours.params))


@pytest.fixture
def written(tmp_path):
    model = base_model()
    ours = adapted(model, new_lora(("q", "v"), 2, 4.0))
    save_adapter(ours.params, ours.config, model.family, tmp_path / "a", base="nowhere/at-all/here")
    return model, tmp_path / "a"


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"peft_type": "IA3"}, "peft_type 'IA3' is not supported; use LORA"),
        ({"use_dora": True}, "DoRA is not supported; merge the adapter with peft"),
        ({"bias": "all"}, "bias 'all' trains the base's biases"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa' may have changed the base"),
        ({"target_parameters": ["mlp.experts"]}, "adapters of parameters, as of experts"),
        ({"task_type": "SEQ_2_SEQ_LM"}, "task_type 'SEQ_2_SEQ_LM' is not supported"),
        (
            {"alpha_pattern": {"layers.0.self_attn.q_proj": 9}},
            "q_proj has another rank or alpha in some layers",
        ),
    ],
)
def test_what_is_not_supported_is_refused_by_name(written, changed, said):
    model, path = written
    raw = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps(raw | changed))
    with pytest.raises(UserError, match=said):
        read_back(path, model)


def change(tensors, name, x):
    return {key: value for key, value in tensors.items() if key != name} | ({} if x is None else {name: x})


Q = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("name", "x", "said"),
    [
        (f"{Q}.lora_B.weight", None, "q_proj.lora_B.weight is missing"),
        (f"{Q}.lora_A.weight", np.zeros((3, 32), np.float32), "factors of rank 3 and 2"),
        (f"{Q}.lora_A.weight", np.zeros((2, 48), np.float32), "another rank or alpha in some layers|48 inputs"),
        ("base_model.model.model.layers.0.mlp.lora_A.weight", np.zeros((2, 2), np.float32), "nothing reads 1 of its"),
        ("base_model.model.model.embed_tokens.weight", np.zeros((9, 31), np.float32), "has shape"),
        ("model.norm.weight", np.zeros(32, np.float32), "is none of a LoRA"),
    ],
)
def test_tensors_that_do_not_fit_are_named(written, name, x, said):
    model, path = written
    tensors = change(load_file(path / "adapter_model.safetensors"), name, x)
    save_file(tensors, path / "adapter_model.safetensors")
    with pytest.raises(UserError, match=said):
        read_back(path, model)


def test_a_base_that_is_not_there_is_named_with_the_way_out(written):
    with pytest.raises(UserError, match="its base nowhere/at-all/here is not there; give the base as --model"):
        load_policy(str(written[1]))
