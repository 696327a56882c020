"""Which of two completions is better: judges, the win rates of their verdicts, and how far judges agree."""

from dpojax.evaluate.judges.agreement import Agreement, agreement
from dpojax.evaluate.judges.ask import endpoint_judge
from dpojax.evaluate.judges.endpoint import Endpoint
from dpojax.evaluate.judges.prompts import TASKS, template_of
from dpojax.evaluate.judges.verdicts import Judge, Verdict, WinRate, judge_completions, reward_judge, win_rate_of

__all__ = [
    "TASKS",
    "Agreement",
    "Endpoint",
    "Judge",
    "Verdict",
    "WinRate",
    "agreement",
    "endpoint_judge",
    "judge_completions",
    "reward_judge",
    "template_of",
    "win_rate_of",
]
