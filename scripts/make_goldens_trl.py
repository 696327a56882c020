#!/usr/bin/env python3
"""Objective values and gradients by TRL's own code, on random inputs of unequal lengths.

Runs `DPOTrainer._compute_loss` of TRL 1.16.0 on a stand-in model that hands out given log-probabilities of tokens, so
that every line of TRL between log-probabilities and loss is its own. Needs torch and trl==1.16.0:

    python scripts/make_goldens_trl.py          writes tests/goldens/trl_losses.json
"""

import collections
import contextlib
import json
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from trl import DPOTrainer

LOSSES, BETAS, SEEDS, PAIRS, LONGEST = ("sigmoid", "hinge", "ipo", "sft"), (0.1, 0.5), (0, 1), 6, 9
OUT = Path(__file__).resolve().parent.parent / "tests" / "goldens" / "trl_losses.json"


class GivenLogps(torch.nn.Module):
    """Answers with the log-probabilities it was made with."""

    def __init__(self, logps: torch.Tensor):
        super().__init__()
        self.logps = logps

    def forward(self, **_: object) -> SimpleNamespace:
        nothing = torch.zeros_like(self.logps)
        return SimpleNamespace(log_probs=self.logps, entropy=nothing, mean_logits=nothing, is_top1=nothing.bool())


def trainer(model: torch.nn.Module, loss: str, beta: float) -> SimpleNamespace:
    """What `_compute_loss` reads of its trainer."""
    same = lambda x: x  # noqa: E731
    return SimpleNamespace(
        model=model,
        accelerator=SimpleNamespace(device="cpu", gather=same, gather_for_metrics=same),
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=[loss],
        loss_weights=[1.0],
        beta=beta,
        use_weighting=False,
        _metrics=collections.defaultdict(lambda: collections.defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
    )


def case(loss: str, beta: float, seed: int) -> dict:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, LONGEST + 1, (2, PAIRS))  # chosen, rejected
    mask = torch.tensor(np.arange(LONGEST) < lengths.reshape(-1, 1)).long()
    mask = torch.cat([torch.zeros(2 * PAIRS, 1).long(), mask], dim=1)  # one token of prompt
    logps = torch.tensor(-rng.gamma(2.0, 1.5, (2 * PAIRS, LONGEST)), dtype=torch.float64) * mask[:, 1:]
    logps.requires_grad_(True)
    sums = logps.detach().sum(dim=1).numpy().reshape(2, PAIRS)
    ref = sums + rng.normal(0, 4.0, (2, PAIRS))
    inputs = {
        "input_ids": torch.ones_like(mask),
        "attention_mask": torch.ones_like(mask),
        "completion_mask": mask,
        "ref_chosen_logps": torch.tensor(ref[0]),
        "ref_rejected_logps": torch.tensor(ref[1]),
    }
    model = GivenLogps(logps)
    with contextlib.redirect_stderr(None):
        value = DPOTrainer._compute_loss(trainer(model, loss, beta), model, inputs, return_outputs=False)
    value.backward()
    # Every token of a completion has the same gradient, which is that of the sum; the first is always real.
    grads = logps.grad[:, 0].numpy().reshape(2, PAIRS)
    return {
        "loss_type": loss,
        "beta": beta,
        "chosen": sums[0].tolist(),
        "rejected": sums[1].tolist(),
        "ref_chosen": ref[0].tolist(),
        "ref_rejected": ref[1].tolist(),
        "chosen_len": lengths[0].tolist(),
        "rejected_len": lengths[1].tolist(),
        "loss": value.item(),
        "grad_chosen": grads[0].tolist(),
        "grad_rejected": grads[1].tolist(),
    }


def main() -> None:
    cases = [case(loss, beta, seed) for loss in LOSSES for beta in BETAS for seed in SEEDS]
    goldens = {"made_by": f"TRL {version('trl')}, torch {version('torch')}", "cases": cases}
    OUT.write_text(json.dumps(goldens, indent=1) + "\n")
    print(f"{len(cases)} cases written to {OUT}")


if __name__ == "__main__":
    main()
