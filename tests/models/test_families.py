"""Families: logits, sums and gradients against transformers, live; forms and configs both ways; the mesh."""

import dataclasses
import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpojax.configs import MeshConfig
from dpojax.errors import UserError
from dpojax.generate import make_sampler, sample_all
from dpojax.logprobs import completion_logps, logits_of
from dpojax.models import FAMILIES, Model, config_from_hf, init_params, load_model, make_apply, new_model, save_model
from dpojax.models.families import Tensor
from dpojax.models.families.base import join
from dpojax.models.params import nest, param_shardings, param_specs
from dpojax.models.weights import file_tensors, load_params
from dpojax.packing import ApplyFn, PairBatch
from dpojax.sharding import constrainer, make_mesh
from dpojax.types import PyTree
from tests.conftest import GOLDENS, plain_input, random_batch
from tests.models.families import FAMILIES as TINY
from tests.models.families import QWEN3, TOKENS, WINDOW, random_tensor


def random_model(raw: dict) -> Model:
    """Every tensor random, norms and biases too."""
    config, rng = config_from_hf(raw, "test"), np.random.default_rng(0)
    about = {path: float(spec.init == "ones") for path, spec in param_specs(config).items()}
    flat = {path: mean + 0.2 * rng.normal(size=param_specs(config)[path].shape) for path, mean in about.items()}
    return Model(config, nest({path: jnp.asarray(x, jnp.float32) for path, x in flat.items()}), raw)


def logits(model: Model, tokens) -> np.ndarray:
    apply_fn = make_apply(model.config)
    run = jax.jit(lambda params, tokens: logits_of(*apply_fn(params, plain_input(tokens))))
    return np.asarray(run(model.params, jnp.asarray(tokens)))


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


def pairs() -> PairBatch:
    """Eight pairs of unequal lengths, two in a packed sequence; some texts are longer than the windows of 7."""
    return random_batch(np.random.default_rng(0), B=8, P=9, C=11, sequences=4)


REFERENCE = jnp.asarray(np.random.default_rng(1).normal(-60, 1, (8, 2)), jnp.float32)


def loss_and_sums(apply_fn: ApplyFn, params: PyTree, batch: PairBatch) -> tuple[jax.Array, jax.Array]:
    """DPO's loss against a made-up reference, and the completions' sums."""
    sums = completion_logps(apply_fn, params, batch)
    margin = (sums - REFERENCE) @ jnp.array([1.0, -1.0])
    return -jax.nn.log_sigmoid(0.1 * margin).mean(), sums


def gradients_of(model: Model, **split) -> tuple[tuple[jax.Array, jax.Array], PyTree]:
    apply_fn = make_apply(model.config, **split)
    step = jax.jit(jax.value_and_grad(partial(loss_and_sums, apply_fn), has_aux=True))
    return step(model.params, pairs())


def same_gradients(got: PyTree, expected: PyTree) -> None:
    """To 1e-3 of the largest of each parameter's; biases of keys change nothing, and have but rounding."""
    least = 1e-3 * max(float(jnp.abs(b).max()) for b in jax.tree.leaves(expected))
    for (path, a), b in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(expected), strict=True):
        most = max(float(jnp.abs(b).max()), least)
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3 * most, err_msg=jax.tree_util.keystr(path))


def torch_loss_and_sums(theirs, batch: PairBatch):
    """The same of transformers, every text by itself, without padding."""
    import torch

    sums = []
    for b, n in np.ndindex(8, 2):
        prompt = np.asarray(batch.prompt[b, 9 - int(batch.prompt_len[b]) :])
        text = torch.tensor(np.concatenate([prompt, batch.completions[b, n, : int(batch.completion_len[b, n])]]))[None]
        logps = theirs(text.long()).logits.log_softmax(-1)[0, len(prompt) - 1 : -1]
        sums.append(logps.gather(-1, text[0, len(prompt) :, None].long()).sum())
    sums = torch.stack(sums).reshape(8, 2)
    ratios = sums - torch.tensor(np.asarray(REFERENCE))
    return -torch.nn.functional.logsigmoid(0.1 * (ratios[:, 0] - ratios[:, 1])).mean(), sums


def test_logits_sums_and_gradients_are_transformers(model, tmp_path):
    """Saved here and loaded there, and back; a gradient is saved there as the parameter, and read by our names."""
    torch = pytest.importorskip("torch", reason="live parity needs torch, which CI installs")
    from transformers import AutoModelForCausalLM

    save_model(model, tmp_path / "out", shard_bytes=20_000)
    eager = {"dtype": torch.float32, "attn_implementation": "eager"}
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", **eager).eval()
    with torch.no_grad():
        expected = theirs(torch.tensor(TOKENS)).logits.numpy()
    np.testing.assert_allclose(logits(model, TOKENS), expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
    theirs.save_pretrained(tmp_path / "theirs")
    back = load_model(str(tmp_path / "theirs"))
    assert back.config == model.config
    jax.tree.map(np.testing.assert_array_equal, back.params, model.params)

    (loss, sums), gradients = gradients_of(model)
    their_loss, their_sums = torch_loss_and_sums(theirs, pairs())
    np.testing.assert_allclose(sums, their_sums.detach().numpy(), rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(loss, their_loss.detach().numpy(), rtol=1e-4)
    their_loss.backward()
    for x in theirs.parameters():
        x.data = torch.zeros_like(x) if x.grad is None else x.grad
    theirs.save_pretrained(tmp_path / "gradients")
    same_gradients(gradients, load_model(str(tmp_path / "gradients")).params)


def test_padding_packing_and_batching_change_nothing(model):
    """The pairs above; and in other company, padded more, with other tokens in the padding, and not packed."""
    batch, apply_fn = pairs(), make_apply(model.config)
    rows = np.r_[7:-1:-1, 3, 5]
    wide = dataclasses.replace(
        jax.tree.map(lambda x: x[rows], dataclasses.replace(batch, packing=None)),
        prompt=jnp.pad(batch.prompt[rows], ((0, 0), (3, 0)), constant_values=77),
        completions=jnp.pad(batch.completions[rows], ((0, 0), (0, 0), (0, 5)), constant_values=99),
    )
    (_, packed), _ = gradients_of(model)
    padded = jax.jit(partial(completion_logps, apply_fn))(model.params, wide)
    np.testing.assert_allclose(padded, packed[rows], rtol=2e-5, atol=1e-4)


@pytest.mark.parametrize("name", [next(n for n, raw in TINY.items() if raw["model_type"] == f) for f in FAMILIES])
def test_eight_devices_are_one(name):
    model = random_model(TINY[name])
    (loss, sums), gradients = gradients_of(model)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    params = jax.device_put(model.params, param_shardings(mesh, model.config))
    assert "tensor" in params["blocks"]["q"].sharding.spec
    split = gradients_of(dataclasses.replace(model, params=params), mesh=mesh, constrain=constrainer(mesh))
    np.testing.assert_allclose(split[0][0], loss, rtol=1e-5)
    np.testing.assert_allclose(split[0][1], sums, rtol=1e-5)
    same_gradients(split[1], gradients)


def test_greedy_tokens_are_those_of_the_forward_pass(model):
    prompts = [[5, 6, 7, 8, 9, 10, 11, 12, 13], [10]]
    sampler = make_sampler(model.config, max_new_tokens=12, eos_ids=(), temperature=0.0)
    drawn = sample_all(sampler, model.params, prompts, batch_size=2, seed=0)
    texts = [prompt + completion for prompt, (completion,) in zip(prompts, drawn.lists(), strict=True)]
    whole = jax.nn.log_softmax(logits(model, [text + [0] * (21 - len(text)) for text in texts]))
    for i, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
        predicted = whole[i, len(prompt) - 1 : len(text) - 1]
        assert predicted.argmax(axis=-1).tolist() == text[len(prompt) :]
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
