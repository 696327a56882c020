"""A look at data before a run: rows in tokens as the model would see them, and figures of all rows."""

import itertools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
from rich.text import Text

from dpojax.data.cache import SourceTokens
from dpojax.data.dialogue import RowKind
from dpojax.data.examples import Example, Examples
from dpojax.data.load import Report, judged, named, report_on
from dpojax.data.read import Place
from dpojax.errors import UserError
from dpojax.show.tokens import LEGEND, TokenTexts, lines_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROWS = 3  # that are shown unless others are named
LONG = 160  # tokens of a prompt or a completion; of a longer one the middle is left out
BAD = 5  # bad rows that are named; check-data names all
ROWS_AT_ONCE = 8192  # whose masks are in memory
BINS, BAR = 10, 40  # of a histogram: bins up to the 99th percentile, and the longest bar
PROMPT, TRAINED, UNTRAINED = "cyan", "green", "bright_black"


def look(
    read: Sequence[SourceTokens],
    tokenizer: "PreTrainedTokenizerBase",
    kind: RowKind,
    max_length: int,
    min_prompt_length: int,
    *,
    rows: int | None = None,
    numbers: Sequence[int] = (),
) -> list[Text]:
    """Some rows of sources in tokens, then figures of all of them, as lines.

    Args:
      read: the sources' tokens, from :func:`~dpojax.data.load.read_tokens`.
      tokenizer: theirs.
      kind: the form of the rows, and the annotations that they must have.
      max_length, min_prompt_length: as of :func:`~dpojax.data.load.load_examples`.
      rows: how many are shown, evenly spread (default: 3).
      numbers: of the rows that are shown in their place, whole.

    Raises:
      UserError: no row has one of the numbers.
    """
    every = [judged(source, kind, max_length, min_prompt_length) for source in read]
    tokens = [source.tokens.tokens for source in read]
    examples = Examples.of_tokens(tokens, [one.rows for one in every], [one.cut for one in every], kind)
    report, names = report_on(read, every), [source.name for source in read]
    texts, lines = TokenTexts(tokenizer), list[Text]()
    for i in _numbered(examples, report, names, numbers) if numbers else spread(len(examples), rows):
        lines += [*row_lines(examples, i, texts, names, whole=bool(numbers)), Text()]
    for bad in [bad for bad in report.dropped if bad.number in numbers]:
        lines += [Text(f"dropped: {bad}", "red"), Text()]
    legend = [Text(LEGEND, "dim"), Text()] if lines else []
    return [*legend, *lines, *figures(examples, report, names, max_length, list(texts.special))]


def spread(n: int, rows: int | None) -> list[int]:
    """This many indices below n, evenly spread, the first and the last among them; all if there are no more."""
    some = min(n, ROWS if rows is None else rows)
    return np.unique(np.linspace(0, n - 1, some).round().astype(int)).tolist() if some else []


def _numbered(examples: Examples, report: Report, names: Sequence[str], numbers: Sequence[int]) -> list[int]:
    """The indices of the rows of these numbers, of any source.

    Raises:
      UserError: there is none, nor a bad row, of one of them.
    """
    theirs = examples.gathered("numbers")
    known = {*theirs[np.isin(theirs, numbers)].tolist(), *(bad.number for bad in report.dropped)}
    for number in numbers:
        if number not in known:
            raise UserError(f"--row {number}: {named(names)}: no row of this number, or --filter leaves it out")
    return np.flatnonzero(np.isin(theirs, numbers)).tolist()


def place_of(examples: Examples, i: int, names: Sequence[str]) -> Place:
    """Where an example's row is, by the names of the sources."""
    source = int(examples.source[i])
    return Place(names[source], int(examples.sources[source].numbers[examples.row[i]]))


# ---- a row ----------------------------------------------------------------------------------------------------


def row_lines(
    examples: Examples, i: int, texts: TokenTexts, names: Sequence[str], *, whole: bool = False
) -> Iterator[Text]:
    """An example in tokens: its prompt, its completions, what of them is trained on, and where they were cut.

    Args:
      examples: of which it is one.
      i: its index.
      texts: of the tokens.
      names: of the sources.
      whole: show all tokens also of long parts.
    """
    example, tokens, row = examples[i], examples.sources[examples.source[i]], examples.row[i]
    lengths, limit = tokens.lengths[row].tolist(), None if whole else LONG
    notes = [f", {name.removesuffix('s')} {x:g}" for name, x in _numbers(example)]
    yield Text(f"{place_of(examples, i, names)}{''.join(notes)}", "bold")
    cut = lengths[0] - len(example.prompt)
    note = f", {cut} more cut off its start" if cut else ""
    yield _label("prompt", f"{_count(len(example.prompt))}, not trained on", note)
    yield from _tokens(example.prompt, texts, 4, PROMPT, limit)
    for k, (name, ids) in enumerate(zip(_names(example, examples.kind), example.completions, strict=True)):
        cut = lengths[1 + k] - len(ids)
        mask = example.masks[k] if example.masks else np.ones(len(ids), bool)
        some = "trained on" if mask.all() else f"{int(mask.sum())} of them trained on"
        note = f", {cut} more cut off its end" if cut else ""
        yield _label(name, f"{_count(len(ids))}, {some}, {_end(ids, texts)}", note)
        if mask.all():
            yield from _tokens(ids, texts, 4, TRAINED, limit)
            continue
        edges = [0, *(np.flatnonzero(np.diff(mask)) + 1).tolist(), len(ids)]
        for start, end in itertools.pairwise(edges):
            yield Text(f"    {'trained on' if mask[start] else 'not trained on'}")
            yield from _tokens(ids[start:end], texts, 6, TRAINED if mask[start] else UNTRAINED, limit)
    if (common := int(tokens.common[row])) > 0:
        who = "both" if len(example.completions) == 2 else "two of them"
        prefix = (
            "; one is the beginning of the other"
            if prefixes(examples.select(np.array([i])), list(texts.special))[0]
            else ""
        )
        yield Text(f"  {who} begin with the same {_count(common) if common > 1 else 'token'}{prefix}")


def _count(n: int) -> str:
    return f"{n:,} token{'s' * (n != 1)}"


def _label(name: str, said: str, cut: str) -> Text:
    return Text("  ").append(name, "bold").append(f": {said}").append(cut, "yellow")


def _numbers(example: Example) -> list[tuple[str, float]]:
    notes = example.annotations.present()
    return [(name, x) for name, x in notes.items() if isinstance(x, float)]


def _names(example: Example, kind: RowKind | None) -> list[str]:
    """What the completions of a row are called."""
    n, notes = len(example.completions), example.annotations
    if notes.scores:
        return [f"completion of score {score:g}" for score in notes.scores]
    if n == 2 and (kind is None or kind.form == "pairs"):
        return ["chosen", "rejected"]
    return ["completion"] * n


def _end(ids: np.ndarray, texts: TokenTexts) -> str:
    """How a completion ends."""
    last = int(ids[-1]) if len(ids) else -1
    if last not in texts.special:
        return "no EOS at its end"
    return f"ends in {texts.special[last]}" + (" (EOS)" if last == texts.tokenizer.eos_token_id else "")


def _tokens(ids: np.ndarray, texts: TokenTexts, indent: int, style: str, limit: int | None) -> Iterator[Text]:
    if limit is None or len(ids) <= limit:
        yield from lines_of(texts.pieces(ids.tolist()), indent, style)
        return
    half = limit // 2
    head, tail = texts.pieces(ids[:half].tolist()), texts.pieces(ids[len(ids) - half :].tolist())
    left_out = f"{len(ids) - 2 * half:,} tokens, which --row shows"
    yield from lines_of([*head, left_out, *tail], indent, style)


# ---- all rows -------------------------------------------------------------------------------------------------


def prefixes(examples: Examples, special: Sequence[int]) -> np.ndarray:
    """``[n]``, whether a row has two completions of which one is the beginning of the other, but for a special token
    (``special``) at its end; both before they are cut."""
    lengths, common = examples.gathered("lengths"), examples.gathered("common")
    if lengths.shape[1] < 3:
        return np.zeros(len(examples), bool)
    two = ((lengths[:, 1:] > 0).sum(axis=1) == 2) & (common > 0)
    shorter = lengths[:, 1:3].min(axis=1)
    found = two & (common == shorter)
    # All of the shorter one but its last token: the tokens of these rows alone are looked at.
    for i, source in enumerate(examples.sources):
        near = np.flatnonzero(two & (common == shorter - 1) & (examples.source == i))
        prompt, first, second = lengths[near, :3].T.astype(np.int64)
        ends = examples.starts[i][examples.row[near]] + prompt + np.where(first <= second, first, first + second)
        found[near] = np.isin(source.flat[ends - 1], special)
    return found


def figures(
    examples: Examples, report: Report, names: Sequence[str], max_length: int, special: Sequence[int]
) -> list[Text]:
    """What is to be said of all rows, as lines.

    Args:
      examples: the usable ones.
      report: what became of all.
      names: of the sources.
      max_length: to which they are cut.
      special: the special tokens.
    """
    lines = [report.sentence()]
    if len(examples):
        lines += [*_cut(report, max_length), *histogram(_lengths(examples)), _total(examples)]
        lines += [*_equal(examples, names), *_prefixes(examples, special)]
    out = [Text(line) for line in [*lines, *report.remarks]]
    out += [Text(f"dropped: {bad}", "red") for bad in report.dropped[:BAD]]
    if len(report.dropped) > BAD:
        out.append(Text(f"and {len(report.dropped) - BAD:,} more, which check-data names"))
    return out


def _lengths(examples: Examples) -> np.ndarray:
    """``[n]``, tokens of prompt and longest completion, before they are cut."""
    lengths = examples.gathered("lengths")
    return lengths[:, 0] + lengths[:, 1:].max(axis=1, initial=0)


def _share(part: int, whole: int, what: str = "row") -> str:
    return f"{part:,} {what}{'s' * (part != 1)} ({100 * part / whole:.1f} %)"


def _cut(report: Report, max_length: int) -> list[str]:
    if not report.prompts_cut and not report.completions_cut:
        return []
    prompts, completions = (_share(n, report.kept) for n in (report.prompts_cut, report.completions_cut))
    of_prompts = f"the start off the prompt of {prompts}"
    return [f"--max-length {max_length} cuts {of_prompts}, the end off completions of {completions}"]


def _total(examples: Examples) -> str:
    prompts, completions = (int(x.sum(dtype=np.int64)) for x in (examples.prompt_len, examples.completion_len))
    trained = f", {_trained(examples):,} of them trained on" if examples.masked else ""
    both = f"{prompts:,} of prompts, {completions:,} of completions"
    return f"a pass computes over {prompts + completions:,} tokens: {both}{trained}"


def _trained(examples: Examples) -> int:
    """How many tokens of completions are trained on."""
    total = 0
    for i, source in enumerate(examples.sources):
        those = np.flatnonzero(examples.source == i)
        for at in range(0, len(those), ROWS_AT_ONCE):
            some = those[at : at + ROWS_AT_ONCE]
            rows, kept = examples.row[some], examples.completion_len[some][:, : source.lengths.shape[1] - 1]
            if source.masks is None:
                total += int(kept.sum(dtype=np.int64))
                continue
            starts = examples.starts[i][rows][:, None] + np.cumsum(source.lengths[rows, :-1], axis=1, dtype=np.int64)
            first, end = int(starts.min()), int((starts + kept).max())
            so_far = np.append(0, np.cumsum(source.masks[first:end], dtype=np.int64))
            total += int((so_far[starts + kept - first] - so_far[starts - first]).sum())
    return total


def _equal(examples: Examples, names: Sequence[str]) -> Iterator[str]:
    """Rows that are equal in tokens, and prompts that several rows have."""
    _, first, inverse = np.unique(examples.gathered("keys"), return_index=True, return_inverse=True)
    again = np.flatnonzero(first[inverse] != np.arange(len(examples)))
    if len(again):
        here, there = (place_of(examples, int(i), names) for i in (again[0], first[inverse[again[0]]]))
        yield f"equal in tokens to an earlier row: {_share(len(again), len(examples))}; the first: {here}, to {there}"
    else:
        yield "no two rows are equal in tokens"
    _, counts = np.unique(examples.prompts, return_counts=True)
    several = int((counts > 1).sum())
    most = f", the commonest in {counts.max():,}" if several else ""
    yield f"{len(counts):,} different prompts, {several:,} of them in several rows{most}"


def _prefixes(examples: Examples, special: Sequence[int]) -> Iterator[str]:
    common = examples.gathered("common")
    if (common >= 0).any():  # else no row has two completions
        begin = int((common > 0).sum())
        prefix = int(prefixes(examples, special).sum())
        yield f"completions begin with the same tokens: {_share(begin, len(examples))}"
        yield f"one completion is the beginning of the other: {_share(prefix, len(examples))}"


def histogram(lengths: np.ndarray) -> list[str]:
    """Lengths of rows in tokens, a line a bin: its range, a bar, its rows and their share."""
    low, longest = int(lengths.min()), int(lengths.max())
    half, nine, usual = (int(x) for x in np.percentile(lengths, (50, 90, 99), method="higher"))
    width = _round_number((usual - low + 1) / BINS)
    starts = np.arange(low // width * width, usual + 1, width)
    ends = np.append(starts[1:] - 1, max(starts[-1] + width - 1, longest))  # the last bin has the few longer ones
    counts, _ = np.histogram(lengths, np.append(starts, ends[-1] + 1))
    labels = [f"{a:,}-{b:,}" if a < b else f"{a:,}" for a, b in zip(starts.tolist(), ends.tolist(), strict=True)]
    margin, most = max(map(len, labels)), int(counts.max())
    out = ["tokens of prompt and longest completion, before they are cut:"]
    for label, count in zip(labels, counts.tolist(), strict=True):
        bar = "█" * -(-BAR * count // most)
        out.append(f"  {label:>{margin}} {bar + ' ' * bool(bar)}{_share(count, len(lengths))}")
    return [
        *out,
        f"  half of the rows have at most {half:,}, nine of ten at most {nine:,}, the longest has {longest:,}",
    ]


def _round_number(x: float) -> int:
    """The least of 1, 2, 5, 10, 20, 50 and so on that is not below x."""
    scale = 10 ** int(np.floor(np.log10(max(x, 1))))
    return next(scale * n for n in (1, 2, 5, 10) if scale * n >= x)
