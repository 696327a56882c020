"""Instructions with replies: what distilabel writes, and Alpaca's form.

Source: distilabel's documentation (the columns of its UltraFeedback task); LLaMA-Factory's data/README.md for Alpaca's
form, where the prompt is "instruction\\ninput".
"""

from typing import Any

from dpojax.data.formats.base import (
    SCORE_NAMES,
    Format,
    Record,
    has,
    items_of,
    label_of,
    lacks,
    number_of,
    reply_of,
    scores_of,
    text_of,
)
from dpojax.data.formats.chat import system_of

PROMPTS = ("instruction", "input", "question")


def _is_pair(record: Record) -> bool:
    return isinstance(record.get("chosen"), str) and "rejected" in record


def _is_alpacas_pair(record: Record) -> bool:
    """Whether a pair has a column of Alpaca's form besides its instruction."""
    added = any(name in record for name in ("input", "system", "output"))
    return _is_pair(record) and "instruction" in record and added


def _is_distilabel(record: Record) -> bool:
    prompted = any(name in record for name in PROMPTS)
    if not prompted or not lacks(record, "prompt", "conversations", "output", "history"):
        return False
    if lacks(record, "chosen", "rejected"):
        return has(record, "generations", "ratings")
    return _is_pair(record) and not _is_alpacas_pair(record) and "system" not in record


def _is_alpaca(record: Record) -> bool:
    if "instruction" not in record or not lacks(record, "prompt", "conversations", "completions"):
        return False
    return _is_alpacas_pair(record) or ("output" in record and lacks(record, "chosen", "rejected"))


def _sides(record: Record) -> dict[str, Any]:
    """A pair's two replies, and its scores, if any."""
    sides = {name: reply_of(record, name) for name in ("chosen", "rejected")}
    return {**sides, **scores_of(record)}


def distilabel(record: dict[str, Any]) -> dict[str, Any]:
    """All generations with their ratings; or a pair."""
    name = next((name for name in PROMPTS if name in record), PROMPTS[0])
    row = {**system_of(record.get("system_prompt"), "system_prompt"), "prompt": text_of(record, name)}
    if not lacks(record, "chosen", "rejected"):
        return {**row, **_sides(record)}
    generations, ratings = items_of(record, "generations"), items_of(record, "ratings")
    if len(generations) != len(ratings):
        lengths = f"{len(generations)} generations and {len(ratings)} ratings"
        raise ValueError(f"columns 'generations' and 'ratings' have {lengths}; give one rating a generation")
    texts = {f"generations[{i}]": text for i, text in enumerate(generations)}
    rated = {f"ratings[{i}]": rating for i, rating in enumerate(ratings)}
    completions, scores = [reply_of(texts, name) for name in texts], [number_of(rated, name) for name in rated]
    return {**row, "completions": completions, "scores": scores}


def alpaca(record: dict[str, Any]) -> dict[str, Any]:
    """A completion, a completion with a label, or a pair; the prompt is the instruction and its input, if any."""
    if record.get("history"):
        raise ValueError("column 'history' holds earlier turns, which are not read; write the record as a chat")
    added = "" if lacks(record, "input") else text_of(record, "input")
    prompt = text_of(record, "instruction") + (f"\n{added}" if added else "")
    row = {**system_of(record.get("system"), "system"), "prompt": prompt}
    if not lacks(record, "chosen", "rejected"):
        return {**row, **_sides(record)}
    label = {} if lacks(record, "kto_tag") else {"label": label_of(record, "kto_tag")}
    return {**row, "completion": reply_of(record, "output"), **label}


DISTILABEL = Format(
    "distilabel",
    "distilabel",
    (*PROMPTS, "system_prompt", "generations", "ratings", "chosen", "rejected", *SCORE_NAMES),
    _is_distilabel,
    distilabel,
)
ALPACA = Format(
    "alpaca",
    "Alpaca (LLaMA-Factory)",
    ("instruction", "input", "output", "system", "history", "chosen", "rejected", "kto_tag", *SCORE_NAMES),
    _is_alpaca,
    alpaca,
)
