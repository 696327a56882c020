"""Objectives against TRL's own code: its stored values and gradients, and live where TRL is installed."""

import functools
import importlib.util
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpojax.losses import LOSSES, traits_of, with_divergence
from dpojax.losses.tokenwise import length_desensitized
from dpojax.losses.wpo import wpo_weighted
from dpojax.types import PairLogps
from tests.conftest import GOLDENS
from tests.losses.fields import pair_logps

STORED = json.loads((GOLDENS / "trl_losses.json").read_text())
TRL = {
    *("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired"),
    *("apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm"),
}
DIVERGENT = {name for name in TRL if traits_of(LOSSES[name]).divergence}
SCRIPT = Path(__file__).parents[2] / "scripts" / "make_goldens_trl.py"


def objective_of(loss_type: str, settings: dict[str, Any]):
    """Our objective of TRL's settings."""
    composed = ("f_divergence_type", "f_alpha_divergence_coef", "ld_alpha", "use_weighting")
    options = {k: v for k, v in settings.items() if k not in composed}
    if loss_type == "sft":  # TRL does not read it either
        del options["beta"]
    objective = functools.partial(LOSSES[loss_type], **options)
    if "f_divergence_type" in settings:
        alpha = settings.get("f_alpha_divergence_coef", 0.5)
        objective = with_divergence(objective, settings["f_divergence_type"], alpha=alpha)
    if "ld_alpha" in settings:
        objective = length_desensitized(objective, settings["ld_alpha"])
    return wpo_weighted(objective) if settings.get("use_weighting") else objective


def pairs(tokens, given: dict[str, np.ndarray]) -> PairLogps:
    """Sums, tokens, lengths; the chosen completions are the upper half of each array."""
    fields = {"": tokens.sum(axis=1), "_len": jnp.asarray(given["lengths"], jnp.int32), "_tokens": tokens}
    fields["_squares"] = jnp.asarray(given["squares"], tokens.dtype).sum(axis=1)
    half = len(given["lengths"]) // 2
    sides = {"chosen": slice(None, half), "rejected": slice(half, None)}
    return pair_logps(**{side + name: x[part] for side, part in sides.items() for name, x in fields.items()})


def ours(given: dict[str, np.ndarray], loss_type: str, settings: dict[str, Any], dtype=jnp.float32):
    """Mean loss and its gradient by every token, ``[2B, T]``, 0 beyond a completion's end."""
    objective = objective_of(loss_type, settings)
    ref = pairs(jnp.asarray(given["ref_tokens"], dtype), given)
    loss = lambda tokens: objective(pairs(tokens, given), ref).mean()  # noqa: E731
    value, grad = jax.value_and_grad(loss)(jnp.asarray(given["tokens"], dtype))
    assert value.dtype == grad.dtype == dtype
    return value, np.where(real(given), grad, 0)


def real(given: dict[str, np.ndarray]) -> np.ndarray:
    return np.arange(np.shape(given["tokens"])[1]) < np.asarray(given["lengths"])[:, None]


def name_of(case: dict[str, Any]) -> str:
    return "-".join([case["loss_type"], *(f"{v}" for v in case["settings"].values()), str(case["input"])])


@pytest.mark.parametrize("case", STORED["cases"], ids=name_of)
def test_value_and_gradient_are_trls(case):
    given = {k: np.asarray(v) for k, v in STORED["inputs"][case["input"]].items()}
    value, grad = ours(given, case["loss_type"], case["settings"])
    expected = np.asarray(case["grad"])
    if expected.ndim == 1:  # of the sums, which is every token's
        expected = expected[:, None]
    np.testing.assert_allclose(value, case["loss"], rtol=1e-5)
    np.testing.assert_allclose(grad, np.where(real(given), expected, 0), rtol=1e-5, atol=1e-7)


def test_goldens_are_of_trls_fifteen_and_all_are_here():
    assert len(TRL) == 15 and set(LOSSES) >= TRL
    assert {case["loss_type"] for case in STORED["cases"]} == TRL
    divergent = {case["loss_type"] for case in STORED["cases"] if "f_divergence_type" in case["settings"]}
    assert divergent == DIVERGENT


@pytest.fixture(scope="module")
def trl():
    """The goldens' script as a module, with TRL's code behind it."""
    for name in ("torch", "trl"):
        pytest.importorskip(name)
    spec = importlib.util.spec_from_file_location("make_goldens_trl", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_trls_own_lists_are_ours(trl):
    assert set(trl.loss_types()) == TRL
    assert trl.divergent_loss_types() == DIVERGENT


def agree(trl, loss_type: str, scales: tuple[float, ...], **settings: Any) -> None:
    """TRL and we on fresh inputs, with log-ratios up to each scale, in nats."""
    divergence = settings.get("f_divergence_type")
    # Scores of another divergence are rounded in float32, and some losses are steep in them (TRL's are off likewise).
    precisions = {jnp.float32: 1e-4 if divergence else 1e-5}
    if divergence != "alpha_divergence":  # which TRL knows in float32 only
        # In float32 still are TRL's logarithms of exo_pair's label_smoothing, and our mean length of sft.
        precisions[jnp.float64] = 1e-7 if loss_type in ("exo_pair", "sft") else 1e-12
    for seed, scale in enumerate(scales, start=100):
        for B in (1, 7):
            given = trl.draw(seed, B, 40, scale)
            value, grad = trl.trl_loss(given, loss_type, **settings)
            assert np.isfinite(value) and np.isfinite(grad).all()
            grad = np.where(real(given), grad, 0)
            for dtype, rtol in precisions.items():
                with jax.enable_x64(dtype == jnp.float64):
                    mine, slope = ours(given, loss_type, settings, dtype)
                np.testing.assert_allclose(mine, value, rtol=rtol, atol=rtol / 100)
                np.testing.assert_allclose(slope, grad, rtol=rtol, atol=rtol / 100 * max(1, np.abs(grad).max()))


@pytest.mark.parametrize("loss_type", sorted(TRL))
def test_live_value_and_gradient_are_trls(trl, loss_type):
    for beta in (0.05, 0.5):
        for settings in trl.settings_of(loss_type, beta):
            agree(trl, loss_type, (1.0, 10.0, 80.0, 300.0), **settings)


@pytest.mark.parametrize("divergence", ["forward_kl", "js_divergence", "alpha_divergence"])
@pytest.mark.parametrize("loss_type", sorted(DIVERGENT))
def test_live_divergences_are_trls(trl, loss_type, divergence):
    # Two of them are exponential: ours end at e^43, and TRL's discopop is NaN in float64 from a logit of -709 on.
    scales = (1.0, 30.0, 300.0) if divergence == "js_divergence" else (1.0, 6.0)
    for coef in (0.3, 1.0, 1.5) if divergence == "alpha_divergence" else (0.5,):
        settings = trl.settings_of(loss_type, 0.2)[0]
        agree(trl, loss_type, scales, f_divergence_type=divergence, f_alpha_divergence_coef=coef, **settings)


@pytest.mark.parametrize("loss_type", sorted(TRL - {"sft", "aot", "aot_unpaired"}))  # which TRL does not weight
def test_live_wpo_weights_are_trls(trl, loss_type):
    agree(trl, loss_type, (1.0, 10.0, 300.0), use_weighting=True, **trl.settings_of(loss_type, 0.2)[0])


@pytest.mark.parametrize("ld_alpha", [0.0, 0.25, 1.0])  # which keep the sums exact in float32
@pytest.mark.parametrize("loss_type", sorted(TRL - {"sft"}))  # which TRL leaves as it is
def test_live_length_desensitization_is_trls(trl, loss_type, ld_alpha):
    agree(trl, loss_type, (1.0, 10.0, 300.0), ld_alpha=ld_alpha, **trl.settings_of(loss_type, 0.2)[0])
