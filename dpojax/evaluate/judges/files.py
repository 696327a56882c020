"""Two files of completions -> comparisons; a file of verdicts, read, mended and written."""

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from dpojax.data import Dialogue, Row
from dpojax.data.dialogue import Text, hash_of_text
from dpojax.data.read import BadRow, Place, read_rows
from dpojax.errors import UserError
from dpojax.evaluate.judges.verdicts import VERDICTS, Verdict
from dpojax.evaluate.rewards import ROWS_AT_ONCE, Rewards, plain


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A completion, its prompt, its row, and its score where it has one."""

    place: Place
    prompt: Text
    completion: Text
    score: float | None = None


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Two completions of one prompt."""

    prompt: Text
    a: Text
    b: Text

    def key(self) -> str:
        """A hash of the texts: equal comparisons have equal ones."""
        said = json.dumps([self.prompt, self.a, self.b], sort_keys=True, default=str).encode()
        return hashlib.blake2b(said, digest_size=16).hexdigest()

    def exchanged(self) -> "Comparison":
        """The comparison of B with A."""
        return Comparison(self.prompt, self.b, self.a)

    def texts(self) -> dict[str, Text]:
        """Its fields of a line of verdicts."""
        return {"prompt": self.prompt, "a": self.a, "b": self.b}


@dataclasses.dataclass(frozen=True)
class Pair:
    """A completion of A's and one of B's for the same prompt."""

    a: Candidate
    b: Candidate

    @property
    def comparison(self) -> Comparison:
        """What a judge sees of it."""
        return Comparison(self.a.prompt, self.a.completion, self.b.completion)


Scores = list[list[float | None]]
"""Of every row, its completions' scores."""


def candidates_of(rows: Sequence[tuple[Row, Dialogue]], scores: Scores) -> list[Candidate]:
    """The completions of rows, in order: of a row with several all, of a pair the chosen one."""
    found = []
    for (row, dialogue), numbers in zip(rows, scores, strict=True):
        compared = dialogue.completions[:1] if score_field(row.fields) == "score_chosen" else dialogue.completions
        place = Place(row.file, row.number)
        found += [Candidate(place, dialogue.prompt, c, x) for c, x in zip(compared, numbers, strict=False)]
    return found


def score_field(fields: dict[str, Any]) -> str:
    """Where `dpojax score` writes the scores of the completions that are compared."""
    has = lambda name: fields.get(name) is not None or fields.get(f"{name}_ids") is not None  # noqa: E731
    if has("completion"):
        return "score"
    return "score_chosen" if has("chosen") else "scores"


def scores_of_row(row: Row, dialogue: Dialogue) -> list[float | None]:
    """The scores that a row has already, of the completions that are compared.

    Raises:
      UserError: it has none, or one that is no finite number.
    """
    name = score_field(row.fields)
    value, place = row.fields.get(name), Place(row.file, row.number)
    if value is None:
        raise UserError(f"{place}: no field {name!r}, which --scored reads; dpojax score writes it")
    values = value if isinstance(value, list) and name == "scores" else [value]
    numbers = [float(x) for x in values if isinstance(x, int | float) and not isinstance(x, bool)]
    n = len(dialogue.completions) if name == "scores" else 1
    if not len(values) == len(numbers) == n or not all(map(math.isfinite, numbers)):
        raise UserError(f"{place}: field {name!r} is not a finite number for each completion; score the row again")
    return list(numbers)


def scores_by(rewards: Rewards, rows: Sequence[tuple[Row, Dialogue]]) -> Scores:
    """The rewards of all completions of rows.

    Raises:
      UserError: one is not finite.
    """
    scores: Scores = []
    for start in range(0, len(rows), ROWS_AT_ONCE):
        scores += map(list, rewards(rows[start : start + ROWS_AT_ONCE]))
    for (row, _), numbers in zip(rows, scores, strict=True):
        if not all(math.isfinite(x) for x in numbers if x is not None):
            place = Place(row.file, row.number)
            raise UserError(f"{place}: a score is {numbers}, and must be finite; leave the row out")
    return scores


def paired(of_a: Sequence[Candidate], of_b: Sequence[Candidate], a: str, b: str) -> list[Pair]:
    """Every completion of A beside the one of B that it is compared with, in A's order.

    Rows are matched by their prompts, whatever their order. Of a prompt with as many completions in both files, the
    first is compared with the first and so on; where one file has a single one, all are compared with that.

    Raises:
      UserError: a prompt is missing from one of the files, or has another number of completions there.
    """
    groups: list[dict[int, list[Candidate]]] = [{}, {}]
    for side, found in zip(groups, (of_a, of_b), strict=True):
        for candidate in found:
            side.setdefault(hash_of_text(candidate.prompt), []).append(candidate)
    for mine, theirs, file in ((groups[0], groups[1], b), (groups[1], groups[0], a)):
        if strange := [found[0] for prompt, found in mine.items() if prompt not in theirs]:
            how = f"({len(strange)} such prompts); give both files completions of the same prompts"
            raise UserError(f"{strange[0].place}: its prompt is the prompt of no row of {file} {how}")
    pairs: list[Pair] = []
    seen = dict.fromkeys(groups[0], 0)
    for candidate in of_a:
        prompt = hash_of_text(candidate.prompt)
        n, others = len(groups[0][prompt]), groups[1][prompt]
        if n != len(others) and 1 not in (n, len(others)):
            numbers = f"its prompt has {n} completions in {a} and {len(others)} in {b}"
            raise UserError(f"{candidate.place}: {numbers}; give as many, or one in either")
        nth = others[seen[prompt] if len(others) > 1 else 0]
        pairs += [Pair(candidate, other) for other in (others if n == 1 else [nth])]
        seen[prompt] += 1
    return pairs


@dataclasses.dataclass(frozen=True)
class Line:
    """A line of a file of verdicts: the comparison, the verdict, and the fields as they stand there."""

    place: Place
    comparison: Comparison
    verdict: Verdict
    fields: dict[str, Any]


def read_verdicts(name: str) -> list[Line]:
    """The lines of a file of verdicts, `dpojax judge`'s or anybody's.

    Raises:
      UserError: it cannot be read, or a row has not prompt, a, b and verdict.
    """
    lines = []
    for row in read_rows([name]):
        if isinstance(row, BadRow):
            raise UserError(f"{row}; fix it")
        fields = row.fields
        texts = [fields.get(field) for field in ("prompt", "a", "b")]
        if any(not isinstance(text, str | list) for text in texts) or fields.get("verdict") not in VERDICTS:
            form = f"prompt, a, b and verdict, which is one of {', '.join(VERDICTS)}"
            raise UserError(f"{Place(row.file, row.number)}: is no verdict; a row of verdicts has {form}")
        comparison = Comparison(*[tuple(t) if _is_ids(t) else t for t in texts])  # type: ignore[arg-type]
        lines.append(Line(Place(row.file, row.number), comparison, fields["verdict"], fields))
    return lines


def _is_ids(text: Any) -> bool:
    return isinstance(text, list) and all(isinstance(item, int) for item in text)


def mended(path: Path) -> bool:
    """Whether a file of verdicts has any line; a last one that a kill has cut short is taken off."""
    if not path.is_file():
        return False
    raw = path.read_bytes()
    kept, tail = raw[: raw.rfind(b"\n") + 1], raw[raw.rfind(b"\n") + 1 :]
    if tail.strip():
        try:
            json.loads(tail)
            kept = raw + b"\n"
        except ValueError:
            pass
        path.write_bytes(kept)
    return bool(kept.strip())


def verdict_line(comparison: Comparison, verdict: Verdict, judge: str, **more: Any) -> str:
    """A line of a file of verdicts."""
    return json.dumps(comparison.texts() | {"verdict": verdict, "judge": judge} | more, default=plain) + "\n"


def by_comparison(lines: Iterable[Line]) -> dict[str, list[Verdict]]:
    """The verdicts of every comparison; one of B with A is turned round."""
    turned: dict[Verdict, Verdict] = {"A": "B", "B": "A", "tie": "tie", "unparsed": "unparsed"}
    found: dict[str, list[Verdict]] = {}
    for line in lines:
        found.setdefault(line.comparison.key(), []).append(line.verdict)
        found.setdefault(line.comparison.exchanged().key(), []).append(turned[line.verdict])
    return found
