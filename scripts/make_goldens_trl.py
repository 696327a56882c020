#!/usr/bin/env python3
"""Objective values and gradients by TRL's own code, on random inputs of unequal lengths.

Runs `DPOTrainer._compute_loss` of TRL 1.16.0 on stand-in models that hand out given log-probabilities of tokens, so
that every line of TRL between log-probabilities and loss is its own. Needs torch and trl==1.16.0:

    python scripts/make_goldens_trl.py          writes tests/goldens/trl_losses.json
"""

import ast
import collections
import contextlib
import inspect
import itertools
import json
import re
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
from trl import DPOTrainer

BETAS, SEEDS, PAIRS, LONGEST = (0.1, 0.5), (0, 1), 5, 7
SMOOTHING = {"robust": (0.1,), "exo_pair": (1e-3,), "aot": (0.0, 0.2), "aot_unpaired": (0.0, 0.2)}
DIVERGENCES: tuple[dict[str, Any], ...] = (
    {"f_divergence_type": "forward_kl"},
    {"f_divergence_type": "js_divergence"},
    {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.5},
    {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 1.4},
)
OUT = Path(__file__).resolve().parent.parent / "tests" / "goldens" / "trl_losses.json"


class GivenLogps(torch.nn.Module):
    """Answers with the log-probabilities it was made with, and with the log sums of squared probabilities."""

    is_gradient_checkpointing = False

    def __init__(self, logps: torch.Tensor, squares: torch.Tensor):
        super().__init__()
        self.logps, self.squares = logps, squares

    def forward(self, **_: object) -> SimpleNamespace:
        nothing = torch.zeros_like(self.logps)
        return SimpleNamespace(
            log_probs=self.logps,
            log_sum_sq_probs=self.squares,
            entropy=nothing,
            mean_logits=nothing,
            is_top1=nothing.bool(),
        )


def trainer(model: torch.nn.Module, ref_model: torch.nn.Module, loss_type: str, **settings: Any) -> SimpleNamespace:
    """What `_compute_loss` reads of its trainer; the settings have TRL's names."""
    same = lambda x: x  # noqa: E731
    given = {"ld_alpha": None, "f_divergence_type": "reverse_kl", "use_weighting": False, **settings}
    tau = given.pop("discopop_tau", None)
    return SimpleNamespace(
        model=model,
        ref_model=ref_model,
        args=SimpleNamespace(gradient_checkpointing_kwargs=None, discopop_tau=tau),
        accelerator=SimpleNamespace(device="cpu", gather=same, gather_for_metrics=same),
        aux_loss_enabled=False,
        precompute_ref_logps=False,
        loss_types=[loss_type],
        loss_weights=[1.0],
        _metrics=collections.defaultdict(lambda: collections.defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
        **given,
    )


def draw(seed: int, pairs: int = PAIRS, longest: int = LONGEST, scale: float = 4.0) -> dict[str, np.ndarray]:
    """Log-probabilities of the tokens of `pairs` chosen completions and, below them, of the rejected ones.

    Log-ratios are within `scale` nats. All numbers are multiples of 2^-8, so that float32 holds them, their sums and
    their differences exactly, and what is compared is an objective's own arithmetic.
    """
    rng = np.random.default_rng(seed)
    exact = lambda x: np.round(x * 256) / 256 + 0.0  # noqa: E731
    lengths = rng.integers(1, longest + 1, 2 * pairs)
    mask = np.arange(longest) < lengths[:, None]
    tokens = exact(-rng.gamma(2.0, 1.5, mask.shape) * mask)
    ref = np.array([[*rng.permutation(row[:n]), *row[n:]] for row, n in zip(tokens, lengths, strict=True)])
    # Sums are equal up to here. The lesser side of the log-ratio pays with its first token, which is always real.
    log_ratios = exact(rng.uniform(-scale, scale, 2 * pairs))
    tokens[:, 0] += np.minimum(log_ratios, 0)
    ref[:, 0] -= np.maximum(log_ratios, 0)
    squares = exact(tokens * rng.uniform(0.2, 1.2, tokens.shape))  # sum_v p_v^2 is at least p^2
    return {"lengths": lengths, "tokens": tokens, "ref_tokens": ref, "squares": squares}


def trl_loss(given: dict[str, np.ndarray], loss_type: str, **settings: Any) -> tuple[float, np.ndarray]:
    """TRL's mean loss and its gradient by every token's log-probability, `[2B, T]`."""
    # TRL knows no float64 in its alpha divergence.
    narrow = settings.get("f_divergence_type") == "alpha_divergence"
    dtype = torch.float32 if narrow else torch.float64
    tokens, ref, squares = (torch.tensor(given[x], dtype=dtype) for x in ("tokens", "ref_tokens", "squares"))
    tokens.requires_grad_(True)
    mask = torch.tensor(np.arange(tokens.shape[1]) < given["lengths"][:, None]).long()
    mask = torch.cat([torch.zeros(len(mask), 1).long(), mask], dim=1)  # one token of prompt
    inputs = {"input_ids": torch.ones_like(mask), "attention_mask": torch.ones_like(mask), "completion_mask": mask}
    model, ref_model = GivenLogps(tokens, squares), GivenLogps(ref, squares)
    # TRL's weighting changes the losses in place, which autograd refuses of relu's output itself (hinge).
    relu = torch.relu
    with contextlib.redirect_stderr(None), mock.patch("torch.relu", lambda x: relu(x).clone()):
        stand_in = trainer(model, ref_model, loss_type, **settings)
        value = DPOTrainer._compute_loss(stand_in, model, inputs, return_outputs=False)
    value.backward()
    return value.item(), tokens.grad.double().numpy()


def loss_types() -> list[str]:
    """TRL's names of its objectives, as it lists them itself."""
    try:
        trl_loss(draw(0), "")
    except ValueError as error:
        return ast.literal_eval(re.search(r"\[.*\]", str(error))[0])
    raise AssertionError("TRL takes a loss type without a name")


def divergent_loss_types() -> set[str]:
    """Those that TRL allows under other divergences."""
    return ast.literal_eval(re.search(r"f_divergence_loss_types = (\{.*?\})", inspect.getsource(DPOTrainer))[1])


def settings_of(loss_type: str, beta: float) -> list[dict[str, Any]]:
    """What TRL reads for an objective, in every variant under the reverse KL."""
    smoothings = [{"label_smoothing": x} for x in SMOOTHING.get(loss_type, ())] or [{}]
    taus = [{"discopop_tau": x} for x in (0.05, 0.3)] if loss_type == "discopop" else [{}]
    return [{"beta": beta, **smoothing, **tau} for smoothing in smoothings for tau in taus]


def variants() -> list[tuple[str, dict[str, Any]]]:
    """Every `(loss_type, settings)` of the goldens."""
    plain = [(name, settings) for name in loss_types() for beta in BETAS for settings in settings_of(name, beta)]
    divergent = [
        (name, settings_of(name, beta)[0] | divergence)
        for name, divergence, beta in itertools.product(sorted(divergent_loss_types()), DIVERGENCES, BETAS)
    ]
    desensitized = [(name, {"beta": beta, "ld_alpha": 0.5}) for name in ("sigmoid", "ipo") for beta in BETAS]
    weighted = [(name, {"beta": beta, "use_weighting": True}) for name in ("sigmoid", "hinge") for beta in BETAS]
    return plain + divergent + desensitized + weighted


def case(inputs: list[dict[str, np.ndarray]], seed: int, loss_type: str, settings: dict[str, Any]) -> dict[str, Any]:
    loss, grad = trl_loss(inputs[seed], loss_type, **settings)
    assert np.isfinite(loss) and np.isfinite(grad).all(), (loss_type, settings)
    if "ld_alpha" not in settings:
        # Every token of a completion has the same gradient, which is that of the sum.
        real = np.arange(grad.shape[1]) < inputs[seed]["lengths"][:, None]
        assert (grad == grad[:, :1])[real].all()
        grad = grad[:, 0]
    grad = np.vectorize(lambda x: float(f"{x:.12g}"))(grad)
    return {"loss_type": loss_type, "settings": settings, "input": seed, "loss": loss, "grad": grad.tolist()}


def main() -> None:
    inputs = [draw(seed) for seed in SEEDS]
    cases = [case(inputs, seed, *variant) for variant in variants() for seed in SEEDS]
    listed = [{name: x.tolist() for name, x in given.items()} for given in inputs]
    goldens = {"made_by": f"TRL {version('trl')}, torch {version('torch')}", "inputs": listed, "cases": cases}
    # One case a line.
    lines = ",\n".join(json.dumps(x) for x in cases)
    text = json.dumps(goldens | {"cases": []}).removesuffix("[]}")
    OUT.write_text(f"{text}[\n{lines}\n]}}\n")
    print(f"{len(cases)} cases written to {OUT}")


if __name__ == "__main__":
    main()
