"""OpenAI's comparisons of summaries, of Reddit posts and of news.

Source: Stiennon et al. 2020 (arXiv:2009.01325), the data set openai/summarize_from_feedback, its comparisons. The
prompts are those of the paper's code: "SUBREDDIT: r/...\\n\\nTITLE: ...\\n\\nPOST: ...\\n\\nTL;DR:" of a post and
"Article:\\n\\n...\\n\\nTL;DR:" of an article; a summary follows after a blank.
"""

from typing import Any

from dpojax.data.formats.base import (
    Format,
    Record,
    choice_of,
    fields_of,
    has,
    items_of,
    lacks,
    object_of,
    reply_of,
    text_of,
    value_of,
)

COLUMNS = ("info", "summaries", "choice")


def _matches(record: Record) -> bool:
    return has(record, *COLUMNS) and isinstance(record["info"], dict)


def _prompt(record: Record) -> str:
    info = object_of(value_of(record, "info"), "info")
    named = {f"info.{name}": value for name, value in info.items()}
    if not lacks(named, "info.post"):
        subreddit, title, post = (text_of(named, f"info.{name}") for name in ("subreddit", "title", "post"))
        return f"SUBREDDIT: r/{subreddit}\n\nTITLE: {title}\n\nPOST: {post}\n\nTL;DR:"
    if not lacks(named, "info.article"):
        return f"Article:\n\n{text_of(named, 'info.article')}\n\nTL;DR:"
    raise ValueError("column 'info' has neither a post nor an article; leave the record out")


def summarize(record: dict[str, Any]) -> dict[str, Any]:
    """The pair of two summaries; choice is the index of the better one."""
    if len(items_of(record, "summaries")) != 2:
        raise ValueError("column 'summaries' must be a list of two summaries; leave the record out")
    texts = [f" {text.strip()}" for text in fields_of(record, "summaries", "text", reply_of)]
    choice = choice_of(record, "choice", (0, 1), "it must be 0 or 1, the index of the better summary")
    return {"prompt": _prompt(record), "chosen": texts[choice], "rejected": texts[1 - choice]}


SUMMARIZE = Format("summarize", "OpenAI summarize from feedback", COLUMNS, _matches, summarize)
