"""Instructions with replies: what distilabel writes, and Alpaca's form.

Source: distilabel's documentation (the columns of its UltraFeedback task); LLaMA-Factory's data/README.md for Alpaca's
form with pairs, where the prompt is "instruction\\ninput". Taori et al. 2023 made the form.
"""

from typing import Any

from dpojax.data.formats.base import Format, Record, choice_of, has, items_of, lacks, number_of, reply_of, text_of
from dpojax.data.formats.chat import system_of

PROMPTS = ("instruction", "input", "question")


def _is_distilabel(record: Record) -> bool:
    if not any(has(record, name) for name in PROMPTS) or not lacks(record, "prompt", "system", "conversations"):
        return False
    ranked = has(record, "generations", "ratings") and lacks(record, "chosen", "rejected", "output")
    both = has(record, "instruction", "input")
    return ranked or (has(record, "chosen", "rejected") and not both and lacks(record, "output"))


def distilabel(record: dict[str, Any]) -> dict[str, Any]:
    """All generations with their ratings; or a pair."""
    name = next((name for name in PROMPTS if name in record), PROMPTS[0])
    row = {**system_of(record.get("system_prompt"), "column 'system_prompt'"), "prompt": text_of(record, name)}
    if not lacks(record, "chosen", "rejected"):
        return {**row, "chosen": reply_of(record, "chosen"), "rejected": reply_of(record, "rejected")}
    generations, ratings = items_of(record, "generations"), items_of(record, "ratings")
    if len(generations) != len(ratings):
        raise ValueError(
            f"columns 'generations' ({len(generations)}) and 'ratings' ({len(ratings)}) must be of one length"
        )
    named = {f"generations[{i}]": text for i, text in enumerate(generations)}
    rated = {f"ratings[{i}]": rating for i, rating in enumerate(ratings)}
    completions, scores = [reply_of(named, name) for name in named], [number_of(rated, name) for name in rated]
    return {**row, "completions": completions, "scores": scores}


def _is_alpaca(record: Record) -> bool:
    if not has(record, "instruction") or not lacks(record, "prompt", "conversations", "generations", "completions"):
        return False
    return has(record, "output") or has(record, "input", "chosen", "rejected")


def alpaca(record: dict[str, Any]) -> dict[str, Any]:
    """A completion, a completion with a label, or a pair; the prompt is the instruction and its input, if any."""
    if record.get("history"):
        raise ValueError("column 'history' holds earlier turns, which this format has no place for; write a chat")
    added = "" if lacks(record, "input") else text_of(record, "input")
    prompt = text_of(record, "instruction") + (f"\n{added}" if added else "")
    row = {**system_of(record.get("system"), "column 'system'"), "prompt": prompt}
    if not lacks(record, "chosen", "rejected"):
        return {**row, "chosen": reply_of(record, "chosen"), "rejected": reply_of(record, "rejected")}
    row["completion"] = reply_of(record, "output")
    if not lacks(record, "kto_tag"):
        tag = record["kto_tag"]
        named = {"kto_tag": int(tag) if isinstance(tag, bool) else tag}
        row["label"] = bool(choice_of(named, "kto_tag", (0, 1), "it must be true (desirable) or false"))
    return row


DISTILABEL = Format(
    "distilabel",
    "distilabel",
    (*PROMPTS, "system_prompt", "generations", "ratings", "chosen", "rejected"),
    _is_distilabel,
    distilabel,
)
ALPACA = Format(
    "alpaca",
    "Alpaca (LLaMA-Factory)",
    ("instruction", "input", "output", "system", "history", "chosen", "rejected", "kto_tag"),
    _is_alpaca,
    alpaca,
)
