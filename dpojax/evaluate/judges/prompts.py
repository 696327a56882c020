"""What a language model is asked when it judges, and how its answer is read."""

import hashlib
import json
import re
from pathlib import Path
from typing import Literal

from dpojax.data.dialogue import Text
from dpojax.errors import UserError
from dpojax.evaluate.judges.verdicts import Verdict

Side = Literal["A", "B"]

ENDING = """
First write one sentence that compares the two. Then write a last line that is exactly "Answer: 1" or "Answer: 2", or
"Answer: tie" if neither is better."""

SUMMARIES = """\

[post]
{prompt}
[summary 1]
{first}
[summary 2]
{second}
[end]
"""

TASKS = {
    "summary": """\
Below are a post from a forum and two summaries of it. Judge which summary tells a reader more of what matters in the
post.
"""
    + SUMMARIES,
    "summary-concise": """\
Below are a post from a forum and two summaries of it. Judge which summary tells a reader more of what matters in the
post and leaves out what does not. Between two that tell the same, the more exact and shorter one is better.
"""
    + SUMMARIES,
    "dialogue": """\
Below are what a person wrote to an assistant and two replies of the assistant. Judge which reply is of more help to
that person.

[conversation]
{prompt}
[reply 1]
{first}
[reply 2]
{second}
[end]
""",
}
"""The win rates of the DPO paper (arXiv 2305.18290, sections 6.2 and 6.3, appendix C.2) in words of our own: its simple
and its concise question about summaries, and its question about dialogue."""
PLACES = ("{prompt}", "{first}", "{second}")

ANSWER = re.compile(
    r"\W*(?:final |my )?(?:answer|verdict|preferred)\W+"
    r"(?:(?:response|reply|summary|completion|option|number)\W+)?(1|2|a|b|first|second|tie)\W*",
    re.IGNORECASE,
)
ALONE = re.compile(r"\W*(1|2|a|b|first|second|tie)\W*", re.IGNORECASE)
MEANINGS = {"1": 0, "a": 0, "first": 0, "2": 1, "b": 1, "second": 1, "tie": None}


def template_of(task: str, path: str | None) -> str:
    """The text of a task, or of a file of one's own.

    Raises:
      UserError: the file cannot be read, or lacks the place of the prompt or of a completion.
    """
    if path is None:
        return TASKS[task] + ENDING
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or "it is not UTF-8"
        raise UserError(f"--template {path}: cannot be read ({why}); name a text file") from None
    if missing := [place for place in PLACES if place not in text]:
        raise UserError(f"--template {path}: has no {' and no '.join(missing)}; put in where it shall stand")
    return text


def filled(template: str, prompt: str, first: str, second: str) -> str:
    """The template with the texts in their places; what looks like a place within a text stays as it is."""
    texts = dict(zip(PLACES, (prompt, first, second), strict=True))
    return re.sub(r"\{(?:prompt|first|second)\}", lambda found: texts[found[0]], template)


def transcript(text: Text) -> str:
    """A text as a judge reads it: a single message as its content, of several each after its role.

    Raises:
      ValueError: it is token ids.
    """
    if isinstance(text, str):
        return text
    if isinstance(text, tuple):
        raise ValueError("is token ids, and a judge reads text; give prompt and completion as text or chat messages")
    said = [
        "\n".join([message["content"], *(json.dumps(call["function"]) for call in message.get("tool_calls", ()))])
        for message in text
    ]
    if len(said) == 1:
        return said[0]
    return "\n\n".join(f"{message['role']}: {words}" for message, words in zip(text, said, strict=True))


def first_of(prompt: Text, a: Text, b: Text, seed: int) -> Side:
    """Which completion is shown first: by a hash of the texts and the seed, whatever the order of the rows."""
    said = json.dumps([seed, prompt, a, b], sort_keys=True, default=str).encode()
    return "A" if hashlib.blake2b(said, digest_size=1).digest()[0] % 2 else "B"


def verdict_of_answer(answer: str, first: Side) -> Verdict:
    """The verdict of a judge's answer, to which this completion was shown first.

    It is the last line of the form "Answer: 1", or an answer that says nothing else; of a model that thinks aloud, what
    it says after ``</think>`` counts.

    >>> verdict_of_answer("Both are short.\\n**Answer: 2**", "A"), verdict_of_answer("I cannot say.", "A")
    ('B', 'unparsed')
    """
    said = answer.rpartition("</think>")[2].strip()
    found = [match[1] for line in said.splitlines() if (match := ANSWER.fullmatch(line))]
    if not found and (alone := ALONE.fullmatch(said)):
        found = [alone[1]]
    if not found:
        return "unparsed"
    which = MEANINGS[found[-1].lower()]
    if which is None:
        return "tie"
    return first if which == 0 else other(first)


def other(side: Side) -> Side:
    """The other one."""
    return "B" if side == "A" else "A"
