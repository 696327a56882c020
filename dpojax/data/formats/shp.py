"""Stanford Human Preferences: a Reddit post and two comments.

Source: Ethayarajh et al. 2022 (ICML), the data set stanfordnlp/SHP.
"""

from typing import Any

from dpojax.data.formats.base import Format, Record, choice_of, has, reply_of, scores_where_present, text_of

COMMENTS = ("history", "human_ref_A", "human_ref_B", "labels")


def _matches(record: Record) -> bool:
    return has(record, *COMMENTS)


def shp(record: dict[str, Any]) -> dict[str, Any]:
    """The pair of two comments; label 1 says that A is preferred."""
    label = choice_of(record, "labels", (0, 1), "it must be 1 (A is preferred) or 0")
    better, worse = ("A", "B") if label == 1 else ("B", "A")
    return {
        "prompt": text_of(record, "history"),
        "chosen": reply_of(record, f"human_ref_{better}"),
        "rejected": reply_of(record, f"human_ref_{worse}"),
        **scores_where_present(record, f"score_{better}", f"score_{worse}"),
    }


SHP = Format("shp", "Stanford Human Preferences", (*COMMENTS, "score_A", "score_B"), _matches, shp)
