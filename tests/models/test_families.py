"""Families: every row's logits against transformers, live; forms and configs both ways; windows."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpojax.errors import UserError
from dpojax.generate import make_sampler, sample_all
from dpojax.logprobs import completion_logps, logits_of
from dpojax.models import FAMILIES, Model, config_from_hf, init_params, load_model, make_apply, new_model, save_model
from dpojax.models.families import Tensor
from dpojax.models.families.base import join
from dpojax.models.weights import file_tensors, load_params
from tests.conftest import GOLDENS, plain_input, random_batch
from tests.models.families import FAMILIES as TINY
from tests.models.families import QWEN3, TOKENS, WINDOW, random_tensor
from tests.test_logprobs import two_row_logps


def random_model(raw: dict) -> Model:
    """Every tensor random, norms and biases too."""
    config = config_from_hf(raw, "test")
    leaves, tree = jax.tree.flatten(init_params(config, seed=3))
    keys = jax.random.split(jax.random.key(0), len(leaves))
    noise = [x + 0.2 * jax.random.normal(key, x.shape) for key, x in zip(keys, leaves, strict=True)]
    return Model(config, jax.tree.unflatten(tree, noise), raw)


def logits(model: Model, tokens) -> np.ndarray:
    h, head = make_apply(model.config)(model.params, plain_input(jnp.asarray(tokens)))
    return np.asarray(logits_of(h, head))


@pytest.fixture(params=TINY)
def model(request) -> Model:
    return random_model(TINY[request.param])


class Named:
    """Tensors by name, as the goldens' script makes them."""

    path = "goldens"

    def __init__(self, shapes: dict[str, tuple[int, ...]]):
        self.tensors = {name: random_tensor(i, shapes[name]) for i, name in enumerate(sorted(shapes))}

    def shape(self, name: str) -> tuple[int, ...] | None:
        return self.tensors[name].shape if name in self.tensors else None

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        return self.tensors[name][index]


@pytest.mark.parametrize("name", TINY)
def test_logits_are_the_goldens(name):
    family, config = FAMILIES[TINY[name]["model_type"]], config_from_hf(TINY[name], "test")
    shapes = {t.name: t.shape for t in file_tensors(init_params(config, seed=0), family, config)}
    model = Model(config, load_params(Named(shapes), family, config), TINY[name])
    expected = np.array(json.loads((GOLDENS / "families.json").read_text())[name])
    got = logits(model, TOKENS)[:, ::8, ::32]
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def test_saved_logits_are_transformers(model, tmp_path):
    torch = pytest.importorskip("torch", reason="live parity needs torch, which CI installs")
    from transformers import AutoModelForCausalLM

    save_model(model, tmp_path / "out", shard_bytes=20_000)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32, attn_implementation="eager")
    tokens = np.random.default_rng(0).integers(0, 384, (2, 40))
    with torch.no_grad():
        expected = theirs.eval()(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(logits(model, tokens), expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
    theirs.save_pretrained(tmp_path / "theirs")
    back = load_model(str(tmp_path / "theirs"))
    assert back.config == model.config
    jax.tree.map(np.testing.assert_array_equal, back.params, model.params)


def test_shared_prompts_and_padding_change_nothing(model):
    batch = random_batch(np.random.default_rng(0), B=3, P=9, C=11)
    apply_fn = make_apply(model.config)
    slow = two_row_logps(apply_fn, model.params, batch)
    np.testing.assert_allclose(completion_logps(apply_fn, model.params, batch), slow, rtol=2e-5, atol=1e-4)


def test_greedy_tokens_are_those_of_the_forward_pass(model):
    prompts = [[5, 6, 7, 8, 9, 10, 11, 12, 13], [10]]
    sampler = make_sampler(model.config, max_new_tokens=12, eos_ids=(), temperature=0.0)
    drawn = sample_all(sampler, model.params, prompts, batch_size=2, seed=0)
    for i, (prompt, (completion,)) in enumerate(zip(prompts, drawn.lists(), strict=True)):
        all_logits = jax.nn.log_softmax(logits(model, [prompt + completion])[0])
        predicted = all_logits[len(prompt) - 1 : -1]
        assert predicted.argmax(axis=-1).tolist() == completion
        np.testing.assert_allclose(drawn.logps[i, 0], np.asarray(predicted).max(axis=-1), atol=1e-4)


def test_config_reads_what_it_writes(model):
    family = FAMILIES[model.hf_config["model_type"]]
    raw = json.loads(json.dumps(family.hf_config(model.config)))
    assert family.read(raw, "test") == model.config


def test_a_new_model_is_saved_and_loaded(tmp_path):
    made = new_model(config_from_hf(QWEN3, "test"), "qwen3", seed=5)
    save_model(made, tmp_path / "new")
    back = load_model(str(tmp_path / "new"))
    assert back.config == made.config
    jax.tree.map(np.testing.assert_array_equal, back.params, made.params)
    with pytest.raises(UserError, match="llama: the family has no models of these choices"):
        new_model(made.config, "llama")
    with pytest.raises(UserError, match=r"no family 'bert'; use one of gemma2, .*, qwen3"):
        new_model(made.config, "bert")


def test_layer_types_must_name_every_layer():
    with pytest.raises(UserError, match="layer_types must name full_attention or sliding_attention for every layer"):
        config_from_hf(QWEN3 | WINDOW | {"layer_types": ["sliding_attention"]}, "test")


@pytest.mark.parametrize("outputs_first", [True, False])
@pytest.mark.parametrize("by_head", [True, False])
def test_forms_go_both_ways_and_slices_are_found(outputs_first, by_head):
    """Fused projections, one behind the other or head by head: a slice of ours is to be found in theirs."""
    rng = np.random.default_rng(0)
    ours = {"q": rng.normal(size=(6, 4, 2)), "k": rng.normal(size=(6, 4, 2))}
    fused = {name: Tensor("qkv", outputs_first=outputs_first, of_head=(i, 2)) for i, name in enumerate(ours)}
    if not by_head:
        fused = {name: dataclasses.replace(t, of_head=None, after=("q",) * (name == "k")) for name, t in fused.items()}
    theirs = join([*fused.values()], [fused[n].to_theirs(ours[n]) for n in ours], heads=4)
    assert theirs.shape == ((16, 6) if outputs_first else (6, 16))
    columns = theirs.T if outputs_first else theirs
    second = ours["k"][:, 0] if by_head else ours["q"][:, 1]
    np.testing.assert_array_equal(columns[:, :4], np.concatenate([ours["q"][:, 0], second], axis=1))
    whole = slice(None)
    for name, start in (("q", 0), ("k", 0 if by_head else 8)):
        for index in ((whole, whole, whole), (slice(2, 4), slice(1, 3), whole)):
            found = theirs[fused[name].index(ours[name].shape, index, start)]
            np.testing.assert_array_equal(fused[name].to_ours(found, ours[name][index].shape), ours[name][index])
