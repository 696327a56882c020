"""PKU-SafeRLHF: two responses, one more helpful, one safer.

Source: Ji et al. 2024 (arXiv:2406.15513), the data set PKU-Alignment/PKU-SafeRLHF.
"""

from typing import Any

from dpojax.data.formats.base import Format, Record, choice_of, has, never, reply_of, text_of

RESPONSES = ("prompt", "response_0", "response_1")


def _matches(record: Record) -> bool:
    return has(record, *RESPONSES, "better_response_id")


def _pair(record: Record, column: str) -> dict[str, Any]:
    best = choice_of(record, column, (0, 1), "it must be 0 or 1, the number of the response")
    chosen, rejected = reply_of(record, f"response_{best}"), reply_of(record, f"response_{1 - best}")
    return {"prompt": text_of(record, "prompt"), "chosen": chosen, "rejected": rejected}


def pku_saferlhf(record: dict[str, Any]) -> dict[str, Any]:
    """The pair by helpfulness."""
    return _pair(record, "better_response_id")


def pku_saferlhf_safer(record: dict[str, Any]) -> dict[str, Any]:
    """The pair by safety."""
    return _pair(record, "safer_response_id")


BETTER = Format(
    "pku_saferlhf", "PKU-SafeRLHF, by helpfulness", (*RESPONSES, "better_response_id"), _matches, pku_saferlhf
)
SAFER = Format(
    "pku_saferlhf_safer", "PKU-SafeRLHF, by safety", (*RESPONSES, "safer_response_id"), never, pku_saferlhf_safer
)
