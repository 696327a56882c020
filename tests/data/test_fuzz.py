"""Any rows at all, through the whole of the pipeline: each is kept or named, and nothing else is raised."""

import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dpojax.data import RowKind
from dpojax.data.formats import FORMATS
from tests.data.fuzz import ALWAYS, KINDS, VALUES, WORDS, check, check_format, check_own, encoder_of

ROWS = int(os.environ.get("DPOJAX_FUZZ_ROWS", "300"))
"""Of every format and kind of row; ``python -m tests.data.fuzz`` does more."""
AT_ONCE = 50  # the rows of one tokenizer


@pytest.mark.parametrize("name", FORMATS)
def test_every_record_of_a_format_is_kept_or_named(name, tmp_path):
    reports = [
        check_format(name, AT_ONCE, seed, tmp_path / f"{seed}.jsonl" if seed % 6 == 0 else None)
        for seed in range(ROWS // AT_ONCE)
    ]
    assert sum(report.kept for report in reports) and sum(len(report.dropped) for report in reports)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_every_row_of_ours_is_kept_or_named(kind, tmp_path):
    reports = [
        check_own(kind, AT_ONCE, seed, tmp_path / f"{seed}.jsonl" if seed % 6 == 0 else None)
        for seed in range(ROWS // AT_ONCE)
    ]
    assert sum(report.kept for report in reports) and sum(len(report.dropped) for report in reports)


TEXT = st.lists(st.sampled_from(WORDS) | st.text(st.characters(), max_size=4), max_size=4).map("".join)
JSON = st.recursive(
    TEXT | st.sampled_from(VALUES[:15]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(TEXT, inner, max_size=2),
    max_leaves=4,
)
CONTENT = TEXT | st.none() | st.lists(TEXT.map(lambda text: {"type": "text", "text": text}), max_size=2) | JSON
CALLS = st.lists(
    st.fixed_dictionaries({"function": st.fixed_dictionaries({"name": TEXT, "arguments": st.dictionaries(TEXT, JSON)})})
)
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system", "tool", "judge"]), "content": CONTENT},
    optional={"tool_calls": CALLS, "reasoning_content": TEXT, "name": JSON, "extra": JSON},
)
SIDE = TEXT | st.lists(MESSAGE, max_size=4) | JSON
FIELDS = {
    **dict.fromkeys(("prompt", "chosen", "rejected", "completion", "completions"), SIDE),
    **dict.fromkeys(("prompt_ids", "chosen_ids", "rejected_ids"), st.lists(st.integers(-1, 300)) | JSON),
    **dict.fromkeys(("label", "truncated", "chosen_truncated", "rejected_truncated"), st.booleans() | JSON),
    **dict.fromkeys(("margin", "weight", "score_chosen", "score_rejected"), st.floats() | JSON),
    **dict.fromkeys(("scores", "system", "source"), JSON),
    "tools": st.lists(JSON, max_size=2) | JSON,
    "chat_template_kwargs": st.dictionaries(TEXT | st.sampled_from(["tokenize", "messages", "chat_template"]), JSON),
}
ROW = st.fixed_dictionaries({}, optional=FIELDS) | JSON
PAIR = st.fixed_dictionaries(
    {name: FIELDS[name] for name in ("prompt", "chosen", "rejected")}, optional={"tools": FIELDS["tools"]}
)


@settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.lists(ROW | PAIR, min_size=1, max_size=4), st.sampled_from(KINDS), st.integers(0, 23))
def test_anything_is_kept_or_named(rows, kind: RowKind, which):
    always = ALWAYS | {"prompt": "a", "completion": "b", "label": True, "margin": 1, "weight": 1}
    check([*rows, always], len(rows) + 1, encoder_of(which), kind, format="rows", max_length=40)
