"""What every objective has to prove, taken from the catalogue by name, so that a new one cannot miss it."""

import doctest
import functools
import inspect
import itertools
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import dpojax.losses
from dpojax.losses import DIVERGENCES, LOSSES, WRAPPERS, traits_of, with_divergence
from dpojax.losses.catalogue import entry
from dpojax.types import STATISTICS, LabelledLogps
from tests.losses.fields import flat, pair_logps, put

ALL = pytest.mark.parametrize("name", LOSSES)
B, C = 5, 5
SIDES = ("chosen", "rejected")
LENGTHS = ("chosen_len", "rejected_len", "mean_chosen_len", "lengths")
# Fields by the word with which traits declare that they are read.
FIELDS = {word: [f"{side}_{word}" for side in SIDES] for word in STATISTICS}
FIELDS |= {word: [word] for word in ("margin", "weight", "key", "mismatched")}
SUMS = ("chosen", "rejected", "logps")


def pair_fields(rng: np.random.Generator, lengths: np.ndarray) -> dict:
    """Sums that are those of the tokens, 0.5 nats or more from probability 1; of policy or reference."""
    real = np.arange(C) < lengths[..., None]
    tokens = -(0.5 + rng.gamma(2.0, 1.0, (2, len(lengths[0]), C))) * real
    squares = (0.6 * tokens).sum(-1) - rng.gamma(1.0, 0.3, tokens.shape[:2])
    values = {"": tokens.sum(-1), "_tokens": tokens, "_squares": squares}
    values |= {f"_{name}": rng.gamma(1.0, 2.0, tokens.shape[:2]) for name in STATISTICS if f"_{name}" not in values}
    return {f"{side}{name}": x[i] for name, x in values.items() for i, side in enumerate(SIDES)}


def batch(name: str, seed: int, rows: int = B, dtype=jnp.float32):
    """A policy's and a reference's log-probabilities for an objective, every optional field given."""
    rng = np.random.default_rng(seed)
    a = lambda x: jnp.asarray(x, dtype)  # noqa: E731
    if traits_of(LOSSES[name]).on == "labels":
        lengths = jnp.asarray(rng.integers(1, C + 1, rows), jnp.int32)
        label = a(np.arange(rows) % 3 > 0)
        policy, ref = (LabelledLogps(a(x[0]), lengths, label, a(x[1])) for x in -rng.gamma(4.0, 2.0, (2, 2, rows)))
    else:
        lengths = rng.integers(1, C + 1, (2, rows))
        shared = {"chosen_len": jnp.asarray(lengths[0], jnp.int32), "rejected_len": jnp.asarray(lengths[1], jnp.int32)}
        shared |= {"mean_chosen_len": a(lengths[0].mean()), "margin": a(0.1 + rng.gamma(2.0, 1.0, rows))}
        shared |= {"weight": a(rng.gamma(2.0, 1.0, rows)), "key": jax.random.split(jax.random.key(seed), rows)}
        sides = ({name: a(x) for name, x in pair_fields(rng, lengths).items()} for _ in range(2))
        policy, ref = (pair_logps(**side, **shared) for side in sides)
    return moved_on(name, policy, ref), ref


def moved_on(name: str, policy, ref, steps: int = 10):
    """The policy's with what the objective keeps over the steps, after some with this batch."""
    kept: dict = {}
    for key, update in traits_of(LOSSES[name]).running.items():
        for _ in range(steps):
            kept[key] = jax.jit(update)(policy, ref, kept.get(key))
    return policy.replace(running=kept) if kept else policy


def floats(logps) -> dict:
    """The fields that a gradient could go to."""
    fields = {name: x for name, x in flat(logps).items() if name not in LENGTHS}
    return {k: x for k, x in fields.items() if hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.floating)}


def lengths_of(logps) -> dict:
    """The fields of completions' lengths, one a row."""
    return {name: getattr(logps, name) for name in ("chosen_len", "rejected_len", "lengths") if hasattr(logps, name)}


def other(x, seed: int = 5):
    """An array like this one with other values: keys stay keys, lengths stay within the tokens."""
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return jax.random.split(jax.random.key(99), len(x))
    if jnp.issubdtype(x.dtype, jnp.integer):
        return jnp.where(jnp.arange(len(x)) == 0, 0, C + 1 - x)
    rng = np.random.default_rng(seed)
    return x * jnp.asarray(rng.uniform(0.3, 3.0, x.shape), x.dtype)


def changed(logps, *fields: str):
    return put(logps, **{name: other(x) for name, x in flat(logps).items() if name in fields})


def same(a, b) -> bool:
    return bool((np.asarray(a) == np.asarray(b)).all())


@ALL
def test_docstring_says_what_it_is_and_holds_a_hand_value(name):
    objective, said = LOSSES[name], entry(LOSSES[name])
    assert said.name == name == objective.__name__ and getattr(dpojax.losses, name) is objective
    assert said.summary[-1] in ".?" and len(said.equation) > 10
    assert re.search(r"arXiv \d{4}\.\d{5}|TRL 1\.16's|Mitchell 2023", said.source)
    # Found in its module, and so run by pytest; an expected output without a digit of its own proves nothing.
    found = {test.name: test for test in doctest.DocTestFinder().find(sys.modules[objective.__module__])}
    examples = found[f"{objective.__module__}.{name}"].examples
    assert any(name in e.source and re.search("[1-9]", e.want) for e in examples)
    _, _, *options = inspect.signature(objective).parameters.values()
    assert all(o.kind is o.KEYWORD_ONLY and isinstance(o.default, float | int) for o in options)
    assert set(said.options.split(", ")) == {f"{o.name}={o.default}" for o in options} or not options


def test_the_package_lists_every_name():
    listed = dpojax.losses.__all__
    assert len(set(listed)) == len(listed) and set(listed) >= {*LOSSES, *WRAPPERS}
    assert all(getattr(dpojax.losses, name) is function for name, function in (LOSSES | WRAPPERS).items())
    assert all(hasattr(dpojax.losses, name) for name in listed)


@pytest.mark.parametrize("name", WRAPPERS)
def test_wrappers_say_what_they_are(name):
    said = entry(WRAPPERS[name])
    assert said.summary.endswith(".") and said.equation and ">>>" in (WRAPPERS[name].__doc__ or "")


@ALL
def test_declared_traits_are_true(name):
    objective, traits = LOSSES[name], traits_of(LOSSES[name])
    fields = FIELDS | {"lengths": list(LENGTHS)}
    declared = traits.reads | ({"lengths"} if traits.lengths else set())
    if traits.on == "scores":
        declared |= {"margin"}  # which it reads where it is given, and does not need
    mattered = set()
    for seed in range(3):
        policy, ref = batch(name, seed)
        losses = objective(policy, ref)
        for word, names in fields.items():
            if not same(objective(changed(policy, *names), changed(ref, *names)), losses):
                mattered.add(word)
            # The reference is read for its log-probabilities alone.
            for_policy_alone = [n for n in names if not n.endswith(("_tokens", "mismatched"))]
            assert same(objective(policy, changed(ref, *for_policy_alone)), losses), word
        if not same(objective(policy, changed(ref, *SUMS, *FIELDS["tokens"], "mismatched")), losses):
            mattered.add("reference")
        if traits.running and not same(
            objective(policy.replace(running=jax.tree.map(other, policy.running)), ref), losses
        ):
            mattered.add("running")
        strange = policy.replace(running={"none": {"mean": jnp.float32(7.0)}} | (policy.running or {}))
        assert same(objective(strange, ref), losses)
    wanted = declared | ({"reference"} if traits.reference else set()) | ({"running"} if traits.running else set())
    assert mattered == wanted


@ALL
def test_pairs_are_coupled_where_declared_and_nowhere_else(name):
    coupled = False
    for seed in range(3):
        policy, ref = batch(name, seed)
        losses = LOSSES[name](policy, ref)
        first = lambda x, y: jnp.where((jnp.arange(B) == 0).reshape(-1, *[1] * (x.ndim - 1)), y, x)  # noqa: E731
        fields = {k: first(x, other(x)) for k, x in floats(policy).items() if k != "label"}
        moved = moved_on(name, put(policy, **fields), ref)  # as a run does before it computes the losses
        coupled |= not same(LOSSES[name](moved, ref)[1:], losses[1:])
    assert coupled == traits_of(LOSSES[name]).batch


@pytest.mark.parametrize("kind", DIVERGENCES)
@ALL
def test_divergences_are_for_those_that_declare_it(name, kind):
    policy, ref = batch(name, 0)
    if not traits_of(LOSSES[name]).divergence:
        with pytest.raises(ValueError, match="allows none"):
            with_divergence(LOSSES[name], kind)
        return
    under = with_divergence(LOSSES[name], kind, alpha=0.3)
    losses = under(policy, ref)
    assert losses.shape == (B,) and np.isfinite(losses).all()
    # Without a reference there is nothing to diverge from; with one only the reverse KL is what it was.
    unmoved = kind == "reverse_kl" or not traits_of(LOSSES[name]).reference
    assert same(losses, LOSSES[name](policy, ref)) == unmoved
    assert traits_of(under).reads == traits_of(LOSSES[name]).reads and not traits_of(under).divergence


@functools.cache
def compiled(name: str, kind: str = "reverse_kl"):
    """``(policy, ref, rows' weights) -> losses, gradients of their weighted sum by the policy's fields``."""
    objective = LOSSES[name] if kind == "reverse_kl" else with_divergence(LOSSES[name], kind)

    @jax.jit
    def run(policy, ref, weights):
        losses, back = jax.vjp(lambda x: objective(put(policy, **x), ref), floats(policy))
        return losses, back(weights)[0]

    return run


def extremes(name: str, kind: str):
    """Rows of every sign combination of log-ratios of 1e4, reached by the policy (4) and by the reference (4)."""
    signs = 1e4 * np.array([*itertools.product((1.0, -1.0), repeat=2)] + [(0.0, 0.0)] * 4, np.float32).T
    by_ref = np.roll(signs, 4, axis=1)
    policy, ref = batch(name, 0, 8)
    policy, f = policy.replace(running=None), lambda x: jnp.full(8, x)
    if isinstance(policy, LabelledLogps):
        policy = policy.replace(logps=jnp.asarray(signs[0]), label=jnp.asarray([1.0, 0.0] * 4))
        for mismatched in (jnp.asarray(signs[1]), f(1e4), f(-1e4)):
            yield policy.replace(mismatched=mismatched), ref.replace(logps=jnp.asarray(by_ref[0]), mismatched=f(0.0))
        return
    # Another divergence's scores and WPO's weights are each near a float32's bounds there, so not both at once.
    for rest in (0.0, 1e4, -1e4) if kind == "reverse_kl" else (None,):
        lengths = policy.chosen_len if rest == 0 else jnp.ones(8, jnp.int32)
        places = jnp.arange(C)[None] < lengths[:, None]

        def fields(sums, lengths=lengths, places=places):
            tokens = [(jnp.asarray(x) / lengths)[:, None] * places for x in sums]
            return dict(zip((*SIDES, *FIELDS["tokens"]), (*map(jnp.asarray, sums), *tokens), strict=True))

        shared = {"chosen_len": lengths, "rejected_len": lengths}
        squares = signs if rest is None else np.full((2, 8), rest, np.float32)
        extra = dict(zip(FIELDS["squares"], map(jnp.asarray, squares), strict=True)) | {"margin": f(rest or 1.0)}
        others = [n for word in STATISTICS if word not in ("tokens", "squares") for n in FIELDS[word]]
        extra |= dict.fromkeys(others, f(abs(rest or 0.0)))
        yield put(policy, **fields(signs), **extra, **shared), put(ref, **fields(by_ref), **shared)


@ALL
def test_extremes_are_finite(name):
    kinds = [kind for kind in DIVERGENCES if kind == "reverse_kl" or traits_of(LOSSES[name]).divergence]
    # What couples the rows looks at others of its kind, so it gets one row alone too.
    parts = [slice(None), slice(0, 1), slice(5, 6)] if traits_of(LOSSES[name]).batch else [slice(None)]
    for kind, rows in itertools.product(kinds, parts):
        for both in extremes(name, kind):
            policy, ref = (jax.tree.map(lambda x, s=rows: x[s] if x.ndim else x, p) for p in both)
            for p in (moved_on(name, policy, ref, 1), policy)[: 2 if kind == "reverse_kl" else 1]:
                losses, grads = compiled(name, kind)(p, ref, jnp.ones(8)[rows])
                assert np.isfinite(losses).all(), (kind, losses)
                for field, grad in grads.items():
                    assert np.isfinite(grad).all(), (kind, field, grad)


# No gradient is to flow through a part of these: the weights, the reward shift, the KL estimate, beta and the draw.
STOPPED = {"wpo", "tdpo2", "kto", "bco", "beta_dpo"}


@ALL
def test_gradient_against_finite_differences(name, monkeypatch):
    """The whole Jacobian, of every floating field of policy and reference, in float64.

    Where an objective stops gradients, what it stops is held at its value: the first evaluation records what goes
    through ``stop_gradient``, and the others, at moved inputs, get it back. That leaves a function whose derivatives
    shall be those that JAX gives, and an error in what is not stopped shows as ever. Which objectives stop anything is
    listed above, so that a stop that is lost, and with it the recording, shows too.
    """
    recorded, replay = [], []
    stop = jax.lax.stop_gradient
    with jax.enable_x64(True):
        policy, ref = batch(name, 7, dtype=jnp.float64)
        start, unravel = ravel_pytree((floats(policy), floats(ref)))
        for p in (policy, policy.replace(running=None)) if policy.running else (policy,):

            def f(x, p=p):
                mine, theirs = unravel(x)
                return LOSSES[name](put(p, **mine), put(ref, **theirs))

            def record(x):
                recorded.append(stop(x))
                return recorded[-1]

            recorded.clear()
            monkeypatch.setattr(jax.lax, "stop_gradient", record)
            assert f(start).dtype == jnp.float64
            assert bool(recorded) == (name in STOPPED)

            def held(x):
                replay[:] = recorded
                monkeypatch.setattr(jax.lax, "stop_gradient", lambda _: replay.pop(0))
                return f(x)

            slopes = jax.jit(lambda step: jax.vmap(held)(start[None] + step * jnp.eye(len(start))))
            differences = (slopes(1e-6) - slopes(-1e-6)) / 2e-6
            monkeypatch.setattr(jax.lax, "stop_gradient", stop)
            jacobian = jax.jit(jax.jacrev(f))(start).T
            np.testing.assert_allclose(jacobian, differences, rtol=1e-6, atol=2e-7)
            assert (jacobian != 0).any(axis=0).sum() > 1  # some rows are not flat there


@ALL
def test_jit_is_eager(name):
    for seed in range(3):
        policy, ref = batch(name, seed)
        eager = LOSSES[name](policy, ref)
        np.testing.assert_allclose(compiled(name)(policy, ref, jnp.ones(B))[0], eager, rtol=1e-6, atol=1e-7)


@ALL
def test_masked_rows_do_not_matter(name):
    """Rows without tokens, of any finite values, behind three real ones: nobody's loss or gradient moves."""
    real = (jnp.arange(B) < 3).astype(jnp.float32)
    policy, ref = batch(name, 3)
    small = [jax.tree.map(lambda x: x[:3] if x.ndim else x, p) for p in (policy, ref)]
    want, grads = LOSSES[name](moved_on(name, *small), small[1]), None
    for value in (0.0, -3.0, 1e4, -1e4, 1e30, -1e30):

        def filled(p, value):
            masked = {name: x.at[3:].set(0) for name, x in lengths_of(p).items()}
            return put(p, **{name: x.at[3:].set(value) for name, x in floats(p).items()}, **masked)

        p, r = filled(policy, value), filled(ref, -value)
        got, moved = compiled(name)(moved_on(name, p, r), r, real)
        np.testing.assert_allclose(got[:3], want, rtol=1e-6, atol=1e-7)
        grads = grads or moved  # of the first value; finite differences say that they are those of the losses
        for field, grad in moved.items():
            np.testing.assert_allclose(grad[:3], grads[field][:3], rtol=1e-5, atol=1e-7, err_msg=field)
            assert (grad[3:] == 0).all(), (field, value, grad)
    # A batch of such rows alone, all zeros as a run has them, is finite.
    p, r = (put(x, **{n: 0 * y for n, y in (floats(x) | lengths_of(x)).items()}) for x in (policy, ref))
    losses, grads = compiled(name)(moved_on(name, p, r), r, jnp.ones(B))
    assert np.isfinite(losses).all() and all(np.isfinite(g).all() for g in grads.values())


@ALL
def test_nothing_broadcasts_silently(name):
    objective, traits = LOSSES[name], traits_of(LOSSES[name])
    policy, ref = batch(name, 1)
    losses, alone = objective(policy, ref), jax.eval_shape(objective, *batch(name, 1, 1))
    for out, rows in ((losses, B), (alone, 1)):
        assert out.shape == (rows,) and out.dtype == jnp.float32
    if traits.reference:
        for rows in (1, 3):
            with pytest.raises((TypeError, ValueError)):
                jax.eval_shape(objective, policy, batch(name, 1, rows)[1])
    for field, x in floats(policy).items():
        if same(objective(put(policy, **{field: other(x)}), ref), losses):
            continue  # it is not read
        with pytest.raises((TypeError, ValueError)):
            jax.eval_shape(objective, put(policy, **{field: x[:, None]}), ref)
