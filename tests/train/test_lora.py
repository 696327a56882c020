"""An adapter beside a frozen base: what is trained, kept, read by the reference, continued and exported."""

import dataclasses
import importlib.util
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpojax.cli import main
from dpojax.configs import MeshConfig
from dpojax.data import Batches, Example, IndexedBatch
from dpojax.losses import sigmoid
from dpojax.models import fingerprint, load_model, make_apply, merge, new_lora, with_adapter, without_adapter
from dpojax.models.fewbits import quantized
from dpojax.models.lora import with_dropout
from dpojax.models.params import flatten, nest, of_adapter, param_specs, partition
from dpojax.sharding import batch_sharding, make_mesh, put_global
from dpojax.train import fit, initial_state, live_reference, make_program
from dpojax.train.by_name import load_policy, load_run
from dpojax.train.rundir import options_of_run
from tests.conftest import plain_input, random_batch
from tests.train.test_resume import curve, finish, options, start, wait_for_step

ALL = ("q", "k", "v", "o", "gate", "up", "down")


def lora(rank=4, **more):
    return new_lora(ALL, rank, 8.0, **more)


def noisy(params, scale=0.3):
    """The parameters with adapters that are not zero."""
    flat = flatten(params)
    rng = np.random.default_rng(3)
    noise = {p: x + scale * rng.normal(size=x.shape).astype(np.float32) for p, x in flat.items() if of_adapter(p)}
    return nest({**flat, **noise})


def examples(n=24):
    rng = np.random.default_rng(0)
    side = lambda: rng.integers(0, 384, rng.integers(2, 7)).astype(np.int32)  # noqa: E731
    return [Example(side(), (side(), side())) for _ in range(n)]


def hidden(config, params, **kwargs):
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, 384, (2, 12)))
    return make_apply(config, **kwargs)(params, plain_input(tokens))[0]


def test_a_new_adapter_changes_nothing(config, params):
    for zero in ("a", "b"):
        adapted = dataclasses.replace(config, lora=lora(zero=zero))
        np.testing.assert_array_equal(hidden(adapted, with_adapter(adapted, params, seed=1)), hidden(config, params))


@pytest.mark.parametrize("rslora", [False, True])
def test_merged_is_beside(config, params, rslora):
    adapted = dataclasses.replace(config, lora=lora(rslora=rslora))
    beside = noisy(with_adapter(adapted, params))
    off = hidden(config, params)
    on = hidden(adapted, beside)
    assert np.abs(on - off).max() > 0.1
    np.testing.assert_allclose(hidden(config, merge(adapted, beside)), on, atol=2e-4)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_backward_pass_by_hand_is_jaxs(config, params, dropout):
    """That of the MLP keeps less than JAX would; remat makes it draw the same again."""
    adapted = dataclasses.replace(config, lora=lora(dropout=dropout))
    trained, frozen = partition(noisy(with_adapter(adapted, params), 0.05), of_adapter)

    def value(trained, remat):
        policy = with_dropout({**frozen, "blocks": {**frozen["blocks"], **trained["blocks"]}}, jax.random.key(5))
        return jnp.sum(jnp.sin(hidden(adapted, policy, remat=remat)))

    grads = jax.grad(value)(trained, "none")
    for path, g in flatten(jax.grad(value)(trained, "block")).items():
        np.testing.assert_allclose(g, flatten(grads)[path], rtol=2e-4, atol=2e-4)
    rng = np.random.default_rng(0)
    for path, x in flatten(trained).items():
        direction = rng.normal(size=x.shape).astype(np.float32)
        direction /= np.linalg.norm(direction)
        moved = lambda t, path=path, d=direction: jax.tree_util.tree_map_with_path(  # noqa: E731
            lambda keys, y: y + t * d if "/".join(k.key for k in keys) == path else y, trained
        )
        slope = (value(moved(1e-2), "none") - value(moved(-1e-2), "none")) / 2e-2
        assert slope == pytest.approx(float(np.sum(direction * flatten(grads)[path])), rel=0.02, abs=0.02)


def small_program(config, adapter, **more):
    return make_program(config, sigmoid, lora=adapter, mesh=make_mesh(MeshConfig(data=1), jax.devices()[:1]), **more)


def test_the_reference_reads_the_base_itself(config, params):
    """No second copy: its arrays are the state's frozen ones, before and after steps that take over the rest."""
    program = small_program(config, lora(), learning_rate=1e-2)
    policy = with_adapter(program.layout.config, params)
    reference = live_reference(program, without_adapter(policy))
    state = initial_state(program, policy, donate=True)
    own = {path: x.unsafe_buffer_pointer() for path, x in flatten(state.frozen).items()}
    assert own == {path: x.unsafe_buffer_pointer() for path, x in flatten(reference.params).items()}
    before = fingerprint(reference.params)
    state = fit(program, state, Batches(examples(), 4, sequences=1, epochs=3), reference, steps=5)
    assert own == {path: x.unsafe_buffer_pointer() for path, x in flatten(state.frozen).items()}
    assert fingerprint(reference.params) == before == fingerprint(params)
    assert all(of_adapter(path) for path in flatten(state.params))
    shapes = {x.shape for path, x in flatten(state.params).items()}
    assert {x.shape for x in jax.tree.leaves(state.opt_state) if x.ndim} == shapes


def test_eight_devices_train_the_same_adapter(config, params):
    """Dropout among it: what is drawn depends on no mesh."""
    after = []
    for axes, devices in ((MeshConfig(data=1), 1), (MeshConfig(data=2, fsdp=2, tensor=2), 8)):
        mesh = make_mesh(axes, jax.devices()[:devices])
        program = make_program(config, sigmoid, lora=lora(dropout=0.2), mesh=mesh, learning_rate=1e-3)
        policy = with_adapter(program.layout.config, params, mesh=mesh)
        reference = live_reference(program, without_adapter(policy))
        batch = random_batch(np.random.default_rng(0), B=8, P=5, C=6, sequences=4)
        item = IndexedBatch(index=np.arange(8), batch=batch, held=np.arange(8), tokens=0, computed=0)
        state, on_mesh = initial_state(program, policy), put_global(batch, batch_sharding(mesh))
        for _ in range(2):
            state, metrics = program.step(state, on_mesh, reference.of(item))
        after.append((flatten(jax.tree.map(np.asarray, state.params)), metrics["loss"].mean))
    assert after[0][1] == pytest.approx(after[1][1], abs=1e-5) and after[0][1] < 0.693
    for path, x in after[0][0].items():
        np.testing.assert_allclose(after[1][0][path], x, atol=2e-4, err_msg=path)


def test_dropout_draws_anew_in_every_step_and_never_in_an_evaluation(config, params):
    adapted = dataclasses.replace(config, lora=lora(dropout=0.5))
    beside = noisy(with_adapter(adapted, params))
    once, again, other = (hidden(adapted, with_dropout(beside, jax.random.key(k))) for k in (1, 1, 2))
    np.testing.assert_array_equal(once, again)
    assert np.abs(once - other).max() > 0.1
    undropped = dataclasses.replace(config, lora=lora())
    np.testing.assert_array_equal(hidden(adapted, beside), hidden(undropped, beside))


def flags(tiny_dir, pairs_file, run, **more):
    """A run with an adapter; options that are None are left out."""
    small = {"lora_rank": 4, "steps": 12, "save_steps": 4, "eval_steps": 6, "warmup_steps": 0, "learning_rate": 1e-2}
    given = {name: value for name, value in (small | more).items() if value is not None}
    return options(tiny_dir, pairs_file, run, **given)


def losses(run) -> list[float]:
    return [line["loss"] for line in curve(run) if "loss" in line]


def saved_names(run, step: int) -> list[str]:
    """The names of the parameters in a checkpoint."""
    names = json.loads((run / "checkpoints" / str(step) / "params" / "_METADATA").read_text())["tree_metadata"]
    assert names
    return list(names)


@pytest.fixture(scope="module")
def run(tiny_dir, pairs_file, tmp_path_factory):
    run = tmp_path_factory.mktemp("lora") / "run"
    assert main(flags(tiny_dir, pairs_file, run)) == 0
    return run


def test_a_run_keeps_its_adapter_alone_and_is_read_as_a_model(tiny_dir, pairs_file, run, tmp_path):
    lines = curve(run)
    assert lines[0]["eval_loss"] == pytest.approx(0.69314718, abs=1e-8)
    assert lines[-1]["eval_loss"] < 0.6
    assert all("_lora_" in name for name in saved_names(run, 12))
    policy, step = load_run(run)
    assert step == 12 and not any(of_adapter(path) for path in flatten(policy.params))
    assert fingerprint(policy.params) != fingerprint(load_model(tiny_dir).params)
    assert main(["logps", "--model", str(run), "--data", pairs_file, "--output", str(tmp_path / "l.jsonl")]) == 0
    chosen = [json.loads(line)["chosen_logps"] for line in (tmp_path / "l.jsonl").read_text().splitlines()]
    assert np.mean(chosen) == pytest.approx(lines[-1]["eval_logps/chosen"], rel=1e-5)
    assert main(["sample", "--model", str(run), "--prompt", "the film", "--max-new-tokens", "4"]) == 0


def test_killed_and_continued_is_never_killed(tiny_dir, pairs_file, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    flags_of = lambda run: flags(  # noqa: E731
        tiny_dir, pairs_file, run, lora_dropout=0.2, steps=200, save_steps=10, eval_steps=100, learning_rate=1e-3
    )
    finish(start(flags_of(whole)))
    process = start(flags_of(broken))
    wait_for_step(process, broken, 10)
    process.kill()
    process.communicate()
    assert "continuing from step" in finish(start(flags_of(broken)))
    assert curve(broken) == curve(whole)
    assert fingerprint(load_run(broken)[0].params) == fingerprint(load_run(whole)[0].params)


def test_cached_and_live_references_are_the_adapter_off(tiny_dir, pairs_file, tmp_path):
    for kind in ("cached", "live"):
        assert main(flags(tiny_dir, pairs_file, tmp_path / kind, reference=kind, learning_rate=1e-3)) == 0
    more = {"ref_model": tiny_dir, "reference": "live", "learning_rate": 1e-3}
    named = flags(tiny_dir, pairs_file, tmp_path / "named", **more)
    assert main(named) == 0
    for cached, live, base in zip(*(curve(tmp_path / kind) for kind in ("cached", "live", "named")), strict=True):
        assert cached == pytest.approx(live, rel=1e-5, abs=1e-5)
        assert base == live
    hashes = [options_of_run(tmp_path / kind) for kind in ("cached", "live", "named")]
    assert len({h["reference_hash"] for h in hashes} | {h["base_hash"] for h in hashes}) == 1


def test_an_exported_adapter_is_a_starting_point(tiny_dir, pairs_file, run, tmp_path):
    """The reference is the base plus that adapter, and off means off."""
    adapter, merged = tmp_path / "adapter", tmp_path / "merged"
    assert main(["export", "--run", str(run), "--output", str(adapter), "--adapter"]) == 0
    assert main(["export", "--run", str(run), "--output", str(merged)]) == 0
    expected = flatten(load_model(str(merged)).params)
    for path, x in flatten(load_policy(str(adapter)).params).items():
        np.testing.assert_array_equal(x, expected[path])
    for name, model, more in (
        ("by-model", adapter, {}),
        ("by-adapter", tiny_dir, {"adapter": adapter}),
        ("on-merged", adapter, {"lora_rank": 4}),
        ("against-base", adapter, {"ref_model": tiny_dir, "reference": "live"}),
    ):
        one = {"lora_rank": None, "steps": 2, "eval_steps": 2, **more}
        assert main(flags(tiny_dir, pairs_file, tmp_path / name, model=model, **one)) == 0
    assert curve(tmp_path / "by-model") == curve(tmp_path / "by-adapter")
    for name in ("by-model", "on-merged"):
        zero = curve(tmp_path / name)[0]
        assert (zero["eval_loss"], zero["eval_rewards/margins"]) == (pytest.approx(0.69314718, abs=1e-6), 0.0)
    zero = curve(tmp_path / "against-base")[0]
    assert zero["eval_loss"] == pytest.approx(curve(run)[-1]["eval_loss"], abs=1e-5)


def test_sft_trains_an_adapter_and_layers_train_on_the_merged_model(tiny_dir, pairs_file, run, tmp_path):
    args = flags(tiny_dir, pairs_file, tmp_path / "sft", steps=4)
    assert main(["sft", *args[1:]]) == 0
    assert all("_lora_" in name for name in saved_names(tmp_path / "sft", 4))
    assert losses(tmp_path / "sft")[-1] < losses(tmp_path / "sft")[0]
    assert main(["export", "--run", str(run), "--output", str(tmp_path / "adapter"), "--adapter"]) == 0
    more = {"model": tmp_path / "adapter", "lora_rank": None, "train_top_layers": 1, "steps": 2}
    assert main(flags(tiny_dir, pairs_file, tmp_path / "top", **more)) == 0
    assert curve(tmp_path / "top")[0]["eval_loss"] == pytest.approx(0.69314718, abs=1e-8)


def test_another_base_is_refused(tiny_dir, pairs_file, tmp_path, capsys):
    base = tmp_path / "base"
    shutil.copytree(tiny_dir, base)
    run = tmp_path / "run"
    args = flags(tiny_dir, pairs_file, run, model=base, steps=2)
    assert main(args) == 0
    weights = (base / "model.safetensors").read_bytes()
    (base / "model.safetensors").write_bytes(weights[:-4] + b"\0\0\0\0")
    capsys.readouterr()
    for command in (["sample", "--model", str(run), "--prompt", "a"], args):
        assert main(command) == 2
    said = capsys.readouterr().err
    assert "is not the base that its adapter was trained on" in said and "another base_hash" in said
    shutil.rmtree(base)
    assert main(["export", "--run", str(run), "--output", str(tmp_path / "m")]) == 2
    assert "the base of its adapter cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"lora_targets": "c_attn"}, "no linear module of llama layers; use all-linear, or some of q_proj"),
        ({"lora_rank": 0}, "--lora-rank 0: must be at least 1"),
        ({"lora_dropout": 1.0}, "--lora-dropout 1.0: must be from 0 to below 1"),
        ({"train_top_layers": 1}, "--train-top-layers trains layers themselves"),
    ],
)
def test_options_that_do_not_go_together(tiny_dir, pairs_file, tmp_path, capsys, changed, said):
    assert main(flags(tiny_dir, pairs_file, tmp_path / "run", **changed)) == 2
    assert said in capsys.readouterr().err


def test_options_without_an_adapter(tiny_dir, pairs_file, tmp_path, capsys):
    assert main(options(tiny_dir, pairs_file, tmp_path / "run", lora_alpha=3.0)) == 2
    assert "--lora-alpha 3.0: there is no adapter; add --lora-rank" in capsys.readouterr().err


def test_a_loss_that_stands_still_is_said_once(tiny_dir, pairs_file, tmp_path, capsys):
    args = flags(tiny_dir, pairs_file, tmp_path / "run", steps=24, learning_rate=1e-12)
    assert main(args) == 0
    assert capsys.readouterr().out.count("the loss is ln 2 still") == 1
    assert [line["step"] for line in curve(tmp_path / "run") if "loss_stands_still" in line] == [20]


def test_from_a_at_zero_the_loss_leaves_ln_2(tiny_dir, pairs_file, tmp_path):
    args = flags(tiny_dir, pairs_file, tmp_path / "run", lora_init="a-zero", lora_targets="q_proj")
    assert main([*args, "--use-rslora"]) == 0
    assert losses(tmp_path / "run")[-1] < 0.68
    trained = json.loads((tmp_path / "run" / "adapter.json").read_text())["lora"]
    assert [low["name"] for low in trained["weights"]] == ["q"] and trained["rslora"] and trained["zero"] == "a"


def test_a_reward_model_trains_its_head_whole(tiny_dir, pairs_file, tmp_path):
    run = tmp_path / "run"
    assert main(flags(tiny_dir, pairs_file, run, loss="reward_model")) == 0
    policy, _ = load_run(run)
    assert policy.config.reward and np.abs(policy.params["score"]).max() > 0
    assert losses(run)[-1] < 0.6


def test_parameters_of_the_table(config):
    specs = param_specs(dataclasses.replace(config, lora=lora(rank=3)))
    assert specs["blocks/q_lora_a"].shape == (2, 32, 3) and specs["blocks/q_lora_b"].shape == (2, 3, 4, 8)
    assert specs["blocks/o_lora_a"].shape == (2, 3, 4, 8) and specs["blocks/o_lora_b"].shape == (2, 32, 3)
    assert specs["blocks/down_lora_a"].shape == (2, 3, 64) and specs["blocks/down_lora_b"].shape == (2, 32, 3)


needs_qwix = pytest.mark.skipif(importlib.util.find_spec("qwix") is None, reason="needs qwix, which CI installs")


def copied(params):
    return jax.tree.map(jnp.copy, params)


@needs_qwix
@pytest.mark.parametrize(("kind", "error"), [("int8", 1 / 127 / 2), ("nf4", 0.16)])
def test_a_quantised_weight_is_near_its_own(config, params, kind, error):
    """Within half a step of the scale, which is the largest of an output, or of 64 numbers (here 32, the width)."""
    few = dataclasses.replace(config, quantized=kind)
    kept = quantized(few, copied(params))
    assert {path: (x.shape, x.dtype) for path, x in flatten(kept).items()} == {
        path: (spec.shape, spec.dtype) for path, spec in param_specs(few).items()
    }
    whole = flatten(merge(few, kept))
    for path, x in flatten(params).items():
        axes = (1,) if (path[-1] != "o" and not path.endswith("down")) or kind == "nf4" else tuple(range(2, x.ndim))
        largest = np.abs(x).max(axis=axes, keepdims=True) if path.startswith("blocks/") and x.ndim > 2 else 0 * x
        assert (np.abs(whole[path] - x) <= largest * error + 1e-6).all(), path
    np.testing.assert_allclose(hidden(few, kept), hidden(config, nest(whole)), atol=1e-4)


@needs_qwix
@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_run_on_a_quantised_base(tiny_dir, pairs_file, tmp_path, kind):
    """The reference reads the quantised base; the policy that is read from the run has it too."""
    for name in ("live", "cached"):
        more = {
            "quantize_base": kind,
            "reference": name,
            "learning_rate": 1e-3,
            "steps": 6,
        }  # high rates amplify rounding
        assert main(flags(tiny_dir, pairs_file, tmp_path / name, **more)) == 0
    for live, cached in zip(*(curve(tmp_path / name) for name in ("live", "cached")), strict=True):
        assert live == pytest.approx(cached, rel=1e-4, abs=1e-4)
    lines = curve(tmp_path / "live")
    assert lines[0]["eval_loss"] == pytest.approx(0.69314718, abs=1e-8) and lines[-1]["eval_loss"] < 0.69
    args = ["logps", "--model", str(tmp_path / "live"), "--data", pairs_file, "--output", str(tmp_path / "l.jsonl")]
    assert main(args) == 0
    chosen = [json.loads(line)["chosen_logps"] for line in (tmp_path / "l.jsonl").read_text().splitlines()]
    assert np.mean(chosen) == pytest.approx(lines[-1]["eval_logps/chosen"], rel=1e-5)
