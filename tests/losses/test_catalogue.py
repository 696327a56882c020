"""What every objective has to prove, taken from the catalogue by name, so that a new one cannot miss it."""

import doctest
import functools
import inspect
import itertools
import math
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
from dpojax.types import LabelledLogps, PairLogps

ALL = pytest.mark.parametrize("name", LOSSES)
B, C = 6, 5
SIDES = ("chosen", "rejected")
LENGTHS = ("chosen_len", "rejected_len", "mean_chosen_len", "lengths")
# Fields by the word with which traits declare that they are read.
FIELDS = {word: [f"{side}_{word}" for side in SIDES] for word in ("tokens", "squares", "kl")}
FIELDS |= {word: [word] for word in ("margin", "weight", "key", "mismatched")}
SUMS = ("chosen", "rejected", "logps")


def pair_fields(rng: np.random.Generator, lengths: np.ndarray) -> dict:
    """Sums that are those of the tokens, 0.5 nats or more from probability 1; of policy or reference."""
    real = np.arange(C) < lengths[..., None]
    tokens = -(0.5 + rng.gamma(2.0, 1.0, (2, len(lengths[0]), C))) * real
    squares = (0.6 * tokens).sum(-1) - rng.gamma(1.0, 0.3, tokens.shape[:2])
    values = {"": tokens.sum(-1), "_tokens": tokens, "_squares": squares, "_kl": rng.gamma(1.0, 2.0, tokens.shape[:2])}
    return {f"{side}{name}": x[i] for name, x in values.items() for i, side in enumerate(SIDES)}


def batch(name: str, seed: int, rows: int = B, dtype=jnp.float32):
    """A policy's and a reference's log-probabilities for an objective, every optional field given."""
    rng = np.random.default_rng(seed)
    a = lambda x: jnp.asarray(x, dtype)  # noqa: E731
    if traits_of(LOSSES[name]).unpaired:
        lengths = jnp.asarray(rng.integers(1, C + 1, rows), jnp.int32)
        label = a(np.arange(rows) % 3 > 0)
        policy, ref = (LabelledLogps(a(x[0]), lengths, label, a(x[1])) for x in -rng.gamma(4.0, 2.0, (2, 2, rows)))
    else:
        lengths = rng.integers(1, C + 1, (2, rows))
        shared = {"chosen_len": jnp.asarray(lengths[0], jnp.int32), "rejected_len": jnp.asarray(lengths[1], jnp.int32)}
        shared |= {"mean_chosen_len": a(lengths[0].mean()), "margin": a(0.1 + rng.gamma(2.0, 1.0, rows))}
        shared |= {"weight": a(rng.gamma(2.0, 1.0, rows)), "key": jax.random.split(jax.random.key(seed), rows)}
        sides = ({name: a(x) for name, x in pair_fields(rng, lengths).items()} for _ in range(2))
        policy, ref = (PairLogps(**side, **shared) for side in sides)
    return moved_on(name, policy, ref), ref


def moved_on(name: str, policy, ref):
    """The policy's with what the objective keeps over the steps, after this first one."""
    kept = {key: update(policy, ref, None) for key, update in traits_of(LOSSES[name]).running.items()}
    return policy.replace(running=kept) if kept else policy


def floats(logps) -> dict:
    """The fields that a gradient could go to."""
    fields = {f.name: getattr(logps, f.name) for f in logps.__dataclass_fields__.values() if f.name not in LENGTHS}
    return {k: x for k, x in fields.items() if hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.floating)}


def other(x, seed: int = 5):
    """An array like this one with other values: keys stay keys, lengths stay within the tokens."""
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return jax.random.split(jax.random.key(99), len(x))
    if jnp.issubdtype(x.dtype, jnp.integer):
        return jnp.where(jnp.arange(len(x)) == 0, 0, C + 1 - x)
    rng = np.random.default_rng(seed)
    return x * jnp.asarray(rng.uniform(0.3, 3.0, x.shape), x.dtype)


def changed(logps, *fields: str):
    return logps.replace(**{name: other(getattr(logps, name)) for name in fields if hasattr(logps, name)})


def same(a, b) -> bool:
    return bool((np.asarray(a) == np.asarray(b)).all())


@ALL
def test_docstring_says_what_it_is_and_holds_a_hand_value(name):
    objective, said = LOSSES[name], entry(LOSSES[name])
    assert said.name == name == objective.__name__ and getattr(dpojax.losses, name) is objective
    assert said.summary.endswith(".") and len(said.equation) > 10
    assert re.search(r"arXiv \d{4}\.\d{5}|TRL 1\.16's|Mitchell 2023", said.source)
    # Found in its module, and so run by pytest; an expected output without a digit of its own proves nothing.
    found = {test.name: test for test in doctest.DocTestFinder().find(sys.modules[objective.__module__])}
    examples = found[f"{objective.__module__}.{name}"].examples
    assert any(name in e.source and re.search("[1-9]", e.want) for e in examples)
    _, _, *options = inspect.signature(objective).parameters.values()
    assert all(o.kind is o.KEYWORD_ONLY and isinstance(o.default, float | int) for o in options)
    assert set(said.options.split(", ")) == {f"{o.name}={o.default}" for o in options} or not options


@pytest.mark.parametrize("name", WRAPPERS)
def test_wrappers_say_what_they_are(name):
    said = entry(WRAPPERS[name])
    assert said.summary.endswith(".") and said.equation and ">>>" in (WRAPPERS[name].__doc__ or "")


@ALL
def test_declared_traits_are_true(name):
    objective, traits = LOSSES[name], traits_of(LOSSES[name])
    fields = FIELDS | {"lengths": list(LENGTHS)}
    declared = traits.reads | ({"lengths"} if traits.lengths else set())
    if traits.rewards:
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
        coupled |= not same(LOSSES[name](policy.replace(**fields), ref)[1:], losses[1:])
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


def extremes(name: str):
    """Rows of every sign combination of log-ratios of 1e4, reached by the policy and by the reference."""
    signs = [1e4 * np.array(s, np.float32) for s in itertools.product((1, -1), repeat=2)]
    policy, ref = batch(name, 0, 8)
    first, second = (np.array([s[i] for s in signs] + [0.0] * 4, np.float32) for i in (0, 1))
    by_ref = [np.roll(x, 4) for x in (first, second)]
    if isinstance(policy, LabelledLogps):
        label = jnp.asarray([1.0, 0.0] * 4)
        for mismatched in (second, np.full(8, 1e4, np.float32), np.full(8, -1e4, np.float32)):
            yield (
                policy.replace(logps=jnp.asarray(first), mismatched=jnp.asarray(mismatched), label=label, running=None),
                ref.replace(logps=jnp.asarray(by_ref[0]), mismatched=jnp.zeros(8)),
            )
        return
    for lengths, squares in ((policy.chosen_len, 0.0), (jnp.ones(8, jnp.int32), -1e4), (jnp.ones(8, jnp.int32), 1e4)):

        def fields(sums, n=lengths):
            tokens = [jnp.asarray(x / n)[:, None] * (jnp.arange(C)[None] < n[:, None]) for x in sums]
            return dict(zip((*SIDES, *FIELDS["tokens"]), (*map(jnp.asarray, sums), *tokens), strict=True))

        shared = {"chosen_len": lengths, "rejected_len": lengths, "running": None}
        extra = dict.fromkeys(FIELDS["squares"], jnp.full(8, squares))
        extra |= dict.fromkeys(FIELDS["kl"], jnp.full(8, abs(squares))) | {"margin": jnp.full(8, squares)}
        yield policy.replace(**fields((first, second)), **extra, **shared), ref.replace(**fields(by_ref), **shared)


@ALL
def test_extremes_are_finite(name):
    kinds = ["reverse_kl", *(k for k in DIVERGENCES if traits_of(LOSSES[name]).divergence and k != "reverse_kl")]
    for kind in kinds:
        objective = LOSSES[name] if kind == "reverse_kl" else with_divergence(LOSSES[name], kind)

        @jax.jit
        def value_and_gradient(x, policy, ref, objective=objective):
            return jax.vjp(lambda x: objective(policy.replace(**x), ref), x)

        for policy, ref in extremes(name):
            # One row alone too: what couples the rows looks at others of its kind.
            for rows in (slice(None), slice(0, 1), slice(5, 6)):
                p, r = (jax.tree.map(lambda x, s=rows: x[s] if x.ndim else x, x) for x in (policy, ref))
                p, r = moved_on(name, p, r), r
                losses, back = value_and_gradient(floats(p), p, r)
                assert np.isfinite(losses).all(), (kind, losses)
                for field, grad in back(jnp.ones_like(losses))[0].items():
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
                return LOSSES[name](p.replace(**mine), ref.replace(**theirs))

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

            slopes = lambda step: jax.vmap(held)(start[None] + step * jnp.eye(len(start)))  # noqa: E731
            differences = (slopes(1e-6) - slopes(-1e-6)) / 2e-6
            monkeypatch.setattr(jax.lax, "stop_gradient", stop)
            jacobian = jax.jacrev(f)(start).T
            np.testing.assert_allclose(jacobian, differences, rtol=1e-6, atol=2e-7)
            assert (jacobian != 0).any(axis=0).sum() > 1  # some rows are not flat there


@ALL
def test_jit_is_eager(name):
    for seed in range(3):
        policy, ref = batch(name, seed)
        eager = LOSSES[name](policy, ref)
        np.testing.assert_allclose(jax.jit(LOSSES[name])(policy, ref), eager, rtol=1e-6, atol=1e-7)


@ALL
def test_masked_rows_do_not_matter(name):
    """Rows without tokens, of any finite values, behind four real ones: nobody's loss or gradient moves."""
    real = slice(0, 4)
    cut = lambda logps: jax.tree.map(lambda x: x[real] if x.ndim else x, logps)  # noqa: E731
    policy, ref = batch(name, 3)
    small = moved_on(name, *map(cut, (policy, ref))), cut(ref)

    def run(p, r):
        return jax.vjp(lambda x: LOSSES[name](p.replace(**x), r)[real], floats(p))

    want, back = run(*small)
    grads = back(jnp.ones(4))[0]
    for value in (0.0, -3.0, 1e4, -1e4, 1e30, -1e30):

        def filled(p, value=value, sign=1.0):
            masked = {n: getattr(p, n).at[4:].set(0) for n in LENGTHS if hasattr(p, n) and n != "mean_chosen_len"}
            return p.replace(**{n: x.at[4:].set(sign * value) for n, x in floats(p).items()}, **masked, running=None)

        p, r = filled(policy), filled(ref, sign=-1.0)
        got, back = run(moved_on(name, p, r), r)
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-7)
        for field, grad in back(jnp.ones(4))[0].items():
            np.testing.assert_allclose(grad[real], grads[field], rtol=1e-5, atol=1e-7, err_msg=field)
            assert (grad[4:] == 0).all(), (field, value, grad)


@ALL
def test_a_batch_without_a_real_row_gives_no_nan(name):
    policy, ref = batch(name, 3)
    zeros = lambda p: jax.tree.map(jnp.zeros_like, p.replace(key=None, running=None) if hasattr(p, "key") else p)  # noqa: E731
    empty, ref = zeros(policy), zeros(ref)
    empty = moved_on(name, empty.replace(key=policy.key) if hasattr(policy, "key") else empty, ref)
    losses, back = jax.vjp(lambda x: LOSSES[name](empty.replace(**x), ref), floats(empty))
    assert np.isfinite(losses).all() and all(np.isfinite(g).all() for g in back(jnp.ones(B))[0].values())


@ALL
def test_nothing_broadcasts_silently(name):
    objective, traits = LOSSES[name], traits_of(LOSSES[name])
    for rows in (1, 5):
        losses = objective(*batch(name, 1, rows))
        assert losses.shape == (rows,) and losses.dtype == jnp.float32
    policy, ref = batch(name, 1, 5)
    if traits.reference:
        with pytest.raises((TypeError, ValueError)):
            objective(policy, batch(name, 1, 3)[1])
    losses = objective(policy, ref)
    for field, x in floats(policy).items():
        if same(objective(policy.replace(**{field: other(x)}), ref), losses) and field not in SUMS:
            continue  # it is not read
        with pytest.raises((TypeError, ValueError)):
            got = objective(policy.replace(**{field: x[:, None]}), ref)
            assert got.shape == (5,), got.shape
            if same(got, losses):
                raise TypeError("it is not read")
