#!/usr/bin/env python3
"""Values and gradients of the unpaired objectives and of the reward model's, by TRL's own code.

Runs `KTOTrainer._compute_loss` and `RewardTrainer.compute_loss` of TRL 1.16.0 on stand-in models that hand out given
log-probabilities of tokens, or scores, so that every line of TRL between those and the loss is its own. Needs torch
and trl==1.16.0:

    python scripts/make_goldens_trl_kto.py          writes tests/goldens/trl_kto.json
"""

import collections
import json
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from trl import KTOTrainer
from trl.trainer.reward_trainer import RewardTrainer

LABELS = {"both": [1, 0, 0, 1, 1, 0], "desirable": [1] * 6, "undesirable": [0] * 6}
WEIGHTS, LONGEST = ((1.0, 1.0), (1.5, 0.75)), 9
# Beta, and the mean of log pi / pi_ref on other prompts' completions, which is clamped where it is negative.
SETTINGS = ((0.1, 4.0), (0.5, 1.0), (0.1, -4.0), (0.5, -4.0))
OUT = Path(__file__).resolve().parent.parent / "tests" / "goldens" / "trl_kto.json"


class GivenLogps(torch.nn.Module):
    """Answers with the log-probabilities it was made with, those of mismatched completions where asked for them."""

    def __init__(self, logps: torch.Tensor, mismatched: torch.Tensor):
        super().__init__()
        self.logps, self.mismatched = logps, mismatched

    def forward(self, input_ids: torch.Tensor, **_: object) -> SimpleNamespace:
        # The tokens of a mismatched batch are twos (see `completions`).
        logps = self.mismatched if (input_ids == 2).all() else self.logps
        nothing = torch.zeros_like(logps)
        return SimpleNamespace(log_probs=logps, entropy=nothing, mean_logits=nothing)


class GivenScores(torch.nn.Module):
    def __init__(self, scores: torch.Tensor):
        super().__init__()
        self.scores = scores

    def forward(self, **_: object) -> SimpleNamespace:
        return SimpleNamespace(logits=self.scores[:, None])


def trainer(model: torch.nn.Module, **options: object) -> SimpleNamespace:
    """What the loss methods read of their trainer."""
    same = lambda x: x  # noqa: E731
    made = SimpleNamespace(
        model=model,
        accelerator=SimpleNamespace(device="cpu", gather=same, gather_for_metrics=same),
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        _metrics=collections.defaultdict(lambda: collections.defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
        **options,
    )
    made._compute_kl_logps = lambda *args: KTOTrainer._compute_kl_logps(made, *args)
    return made


def completions(rng: np.random.Generator, rows: int) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
    """Log-probabilities of tokens, their mask behind one token of prompt, and the lengths."""
    lengths = rng.integers(1, LONGEST + 1, rows)
    mask = torch.tensor(np.arange(LONGEST) < lengths[:, None]).long()
    logps = torch.tensor(-rng.gamma(2.0, 1.5, (rows, LONGEST)), dtype=torch.float64) * mask
    return logps, torch.cat([torch.zeros(rows, 1).long(), mask], dim=1), lengths


def unpaired(loss: str, labels: str, weights: tuple[float, float], beta: float, kl: float, seed: int) -> dict:
    rng = np.random.default_rng(seed)
    rows = len(LABELS[labels])
    logps, mask, lengths = completions(rng, rows)
    other, other_mask, _ = completions(rng, rows)
    logps.requires_grad_(True)
    sums, mismatched = logps.detach().sum(dim=1), other.sum(dim=1)
    ref = sums + torch.tensor(rng.normal(0, 4.0, rows))
    ref_mismatched = mismatched - torch.tensor(rng.normal(kl, 3.0, rows))
    inputs = {
        "input_ids": torch.ones_like(mask),
        "attention_mask": torch.ones_like(mask),
        "completion_mask": mask,
        "KL_input_ids": torch.full_like(other_mask, 2),
        "KL_attention_mask": torch.ones_like(other_mask),
        "KL_completion_mask": other_mask,
        "label": torch.tensor(LABELS[labels]).bool(),
        "ref_logps": ref,
        "ref_KL_logps": ref_mismatched,
    }
    model = GivenLogps(logps, other)
    options = {"beta": beta, "desirable_weight": weights[0], "undesirable_weight": weights[1]}
    standin = trainer(model, loss_type=loss, calculate_KL=loss == "kto", **options)
    value = KTOTrainer._compute_loss(standin, model, inputs, return_outputs=False)
    value.backward()
    return {
        "loss_type": loss,
        **options,
        "logps": sums.tolist(),
        "lengths": lengths.tolist(),
        "label": LABELS[labels],
        "mismatched": mismatched.tolist(),
        "ref_logps": ref.tolist(),
        "ref_mismatched": ref_mismatched.tolist(),
        "kl": standin._metrics["train"]["kl"][0],
        "loss": value.item(),
        # Every token of a completion has the same gradient, which is that of the sum; the first is always real.
        "grad": logps.grad[:, 0].tolist(),
    }


def reward(coefficient: float | None, with_margin: bool, seed: int) -> dict:
    rng = np.random.default_rng(seed)
    pairs = 6
    scores = torch.tensor(rng.normal(0, 2.0, 2 * pairs), requires_grad=True)
    margin = rng.uniform(0, 3.0, pairs).tolist() if with_margin else None
    model = GivenScores(scores)
    inputs = {"attention_mask": torch.ones(2 * pairs, 3).long()}
    inputs |= {"margin": torch.tensor(margin, dtype=torch.float64)} if with_margin else {}
    standin = trainer(model, args=SimpleNamespace(center_rewards_coefficient=coefficient))
    value = RewardTrainer.compute_loss(standin, model, inputs)
    value.backward()
    return {
        "center_rewards_coefficient": coefficient or 0.0,
        "chosen": scores[:pairs].tolist(),
        "rejected": scores[pairs:].tolist(),
        "margin": margin,
        "loss": value.item(),
        "grad_chosen": scores.grad[:pairs].tolist(),
        "grad_rejected": scores.grad[pairs:].tolist(),
    }


def main() -> None:
    settings = [(labels, weights, beta, kl) for labels in LABELS for weights in WEIGHTS for beta, kl in SETTINGS]
    cases = [unpaired("kto", *s, seed) for seed, s in enumerate(settings)]
    # The other loss has no KL term, so half of the settings are the same to it.
    cases += [unpaired("apo_zero_unpaired", *s, seed) for seed, s in enumerate(settings) if s[-1] > 0]
    rewards = [reward(c, margin, seed) for seed, c in enumerate((None, 0.01, 0.5)) for margin in (False, True)]
    goldens = {"made_by": f"TRL {version('trl')}, torch {version('torch')}", "cases": cases, "rewards": rewards}
    OUT.write_text(json.dumps(goldens, indent=1) + "\n")
    print(f"{len(cases) + len(rewards)} cases written to {OUT}")


if __name__ == "__main__":
    main()
