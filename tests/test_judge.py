"""Judges: files of completions, a stand-in for an OpenAI-compatible server, win rates, intervals and agreement."""

import dataclasses
import json
import re
import shlex
import time
from pathlib import Path

import numpy as np
import pytest
import tyro

from dpojax.cli import main
from dpojax.configs import JudgeConfig
from dpojax.errors import UserError
from dpojax.evaluate.judges import Endpoint, endpoint_judge, judge_completions, reward_judge
from dpojax.evaluate.judges import endpoint as endpoints
from dpojax.evaluate.judges.endpoint import seconds_of
from dpojax.evaluate.judges.prompts import TASKS, filled, template_of, verdict_of_answer
from dpojax.evaluate.judges.verdicts import wilson
from dpojax.options import check_options
from tests.conftest import write_rows
from tests.openai_server import KEY, StandIn
from tests.test_bad_input import say

N = 24
PROMPTS = [f"question {n}" for n in range(N)]
A = [{"prompt": p, "completion": f"the answer of A to {p}"} for p in PROMPTS]
B = [{"prompt": p, "completion": f"an answer of B to {p}"} for p in PROMPTS]
PLAIN = "P: {prompt} 1: {first} 2: {second} ends with Answer: 1, 2 or tie"


@pytest.fixture
def serve(monkeypatch):
    """Starts a stand-in; waits between tries are short."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr(endpoints, "FIRST_WAIT", 0.001)
    servers = []

    def start(reply) -> StandIn:
        servers.append(StandIn(reply))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


@dataclasses.dataclass
class Files:
    """Two files of completions, and the command on them."""

    root: Path
    a: str
    b: str
    output: Path
    json: Path

    def args(self, *flags) -> list[str]:
        return ["judge", self.a, self.b, "--output", str(self.output), *map(str, flags)]

    def judge(self, *flags) -> dict:
        assert main(self.args(*flags, "--json", self.json)) == 0
        return json.loads(self.json.read_text())

    def lines(self) -> list[dict]:
        return [json.loads(line) for line in self.output.read_text().splitlines()]


@pytest.fixture
def files(tmp_path) -> Files:
    names = [write_rows(tmp_path / f"{name}.jsonl", rows) for name, rows in (("a", A), ("b", B))]
    return Files(tmp_path, *names, tmp_path / "verdicts.jsonl", tmp_path / "figures.json")


def prefers(letter: str):
    """Answers for the completion of this one, wherever it stands."""
    return lambda text, tries: f"So.\nAnswer: {1 if text.index('of A to') < text.index('of B to') else 2}".translate(
        {} if letter == "A" else str.maketrans("12", "21")
    )


# --- an endpoint


def test_the_order_is_random_and_undone(serve, files, capsys):
    """A judge that always takes the first wins A exactly the comparisons in which A was first."""
    server = serve(lambda text, tries: "Both are short.\nAnswer: 1")
    flags = ("--endpoint", server.url, "--judge-model", "m")
    figures = files.judge(*flags)
    shown = [re.search(r"answer of ([AB])", body["messages"][0]["content"])[1] for _, _, body in server.seen]
    assert len(shown) == N and 6 <= shown.count("A") <= 18
    assert figures["wins"] == shown.count("A") == N - figures["losses"]
    assert figures["win_rate"] == pytest.approx(figures["wins"] / N) and figures["first_preferred"] == 1
    firsts = {line["prompt"]: line["first"] for line in files.lines()}
    files.output.unlink()
    assert files.judge(*flags) == figures  # the same order again
    files.output.unlink()
    files.judge(*flags, "--seed", 1)
    assert firsts != {line["prompt"]: line["first"] for line in files.lines()}
    files.output.unlink()
    both = files.judge(*flags, "--both-orders")
    assert (both["ties"], both["orders_disagree"], both["win_rate"]) == (N, N, 0.5)
    assert len(files.lines()) == 2 * N


def test_a_judge_that_sees_them_wins_all(serve, files, capsys):
    for letter, rate in (("A", 1.0), ("B", 0.0)):
        server = serve(prefers(letter))
        files.output.unlink(missing_ok=True)
        figures = files.judge("--endpoint", server.url, "--judge-model", "m", "--both-orders")
        assert figures["win_rate"] == rate and figures["orders_disagree"] == 0
    printed = capsys.readouterr().out
    assert "48 requests for 24 comparisons to m" in printed and "1.000 ± 0.000 (95 %: 0.862 to 1.000, W" in printed


def test_ties_and_what_cannot_be_parsed_are_counted(serve, files, capsys):
    def reply(text, tries):
        n = int(re.search(r"question (\d+)", text)[1])
        return "Answer: tie" if n < 6 else "I would rather not say." if n < 9 else prefers("A")(text, tries)

    figures = files.judge("--endpoint", serve(reply).url, "--judge-model", "m")
    assert [figures[name] for name in ("wins", "losses", "ties", "unparsed")] == [15, 0, 6, 3]
    assert figures["win_rate"] == pytest.approx(18 / 21) and figures["tie_rate"] == pytest.approx(6 / 21)
    assert figures["win_rate_with_unparsed"] == pytest.approx([18 / 24, 21 / 24])
    assert (figures["low"], figures["high"]) == pytest.approx(wilson(18 / 21, 21))
    assert "rows 7, 8, 9 of" in capsys.readouterr().out
    assert files.lines()[0].keys() >= {"prompt", "a", "b", "verdict", "judge", "first", "answer"}


def test_the_key_is_sent_and_not_written(serve, files, capsys):
    server = serve(prefers("A"))
    files.judge("--endpoint", server.url, "--judge-model", "m", "--request-options", '{"max_tokens": null, "top_p": 1}')
    assert {path for path, _, _ in server.seen} == {"/v1/chat/completions"}
    assert {headers["Authorization"] for _, headers, _ in server.seen} == {f"Bearer {KEY}"}
    assert server.seen[0][2].keys() == {"model", "messages", "temperature", "top_p"}
    refused = serve(lambda text, tries: (401, {}))
    files.output.unlink()
    said = say(capsys, *files.args("--endpoint", refused.url, "--judge-model", "m", "--concurrency", 1))
    assert "answers 401 (wrong key (the key)?)" in said and "--api-key-env" in said and len(refused.seen) == 1
    assert not any(KEY in path.read_text() for path in files.root.iterdir()) and KEY not in said
    assert KEY not in repr(Endpoint(url=server.url, model="m", key=KEY))


def test_a_redirection_is_not_followed(serve):
    other = serve(prefers("A"))
    first = serve(lambda text, tries: (302, {"Location": other.url + "/chat/completions"}))
    with pytest.raises(UserError, match="answers 302"):
        Endpoint(url=first.url, model="m", key=KEY).ask("x")
    assert not other.seen


def test_429_then_success(serve, files, monkeypatch):
    monkeypatch.setattr(endpoints, "FIRST_WAIT", 60.0)  # Retry-After goes first
    server = serve(lambda text, tries: (429, {"Retry-After": "0"}) if tries < 3 else prefers("A")(text, tries))
    assert files.judge("--endpoint", server.url, "--judge-model", "m")["wins"] == N
    assert set(server.tries.values()) == {3}


@pytest.mark.parametrize(
    ("reply", "retries", "tried", "said"),
    [
        ((503, {}), 2, 3, "answers 503 .*given up after 3 tries"),
        ((429, {"Retry-After": "3600"}), 5, 1, "answers 429 .*asks to wait 3600 s; given up at once"),
        ((400, {}), 5, 1, "answers 400 .*check --endpoint"),
        ((200, {}), 1, 2, "what is no chat completion"),
        (None, 1, 2, "gives no answer in 0.2 s"),
    ],
)
def test_when_a_request_is_given_up(serve, reply, retries, tried, said):
    server = serve(lambda text, tries: reply or time.sleep(0.5) or "late")
    with pytest.raises(UserError, match=said):
        Endpoint(url=server.url, model="m", retries=retries, timeout=0.2 if reply is None else 10).ask("x")
    assert len(server.seen) == tried


def test_what_was_answered_is_kept_and_not_asked_again(serve, files, capsys):
    """A server that breaks: one sentence; then only what is missing is asked, also after a line that was cut short."""

    def breaks(text, tries):
        n = int(re.search(r"question (\d+)", text)[1])
        return (500, {}) if n == 20 else prefers("A")(text, tries)

    server = serve(breaks)
    flags = ("--endpoint", server.url, "--judge-model", "m", "--concurrency", 2, "--retries", 2)
    said = say(capsys, *files.args(*flags))
    assert "answers 500" in said and "given up after 3 tries" in said
    kept = files.lines()
    assert 20 <= len(kept) < N and max(server.tries.values()) == 3
    with files.output.open("a") as file:
        file.write('{"prompt": "question 2')
    healed = serve(prefers("A"))
    flags = ("--endpoint", healed.url, "--judge-model", "m")
    assert files.judge(*flags, "--limit", 3)["comparisons"] == 3 and not healed.seen
    assert files.judge(*flags)["wins"] == N
    assert len(healed.seen) == N - len(kept) and files.lines()[: len(kept)] == kept
    assert files.judge(*flags)["wins"] == N and len(healed.seen) == N - len(kept)
    assert "was asked otherwise" in say(capsys, *files.args(*flags, "--task", "summary"))
    assert "another judge than x" in say(capsys, *files.args("--endpoint", healed.url, "--judge-model", "x"))
    write_rows(Path(files.a), [row | {"completion": "other"} for row in A])
    assert "about other completions" in say(capsys, *files.args(*flags))


def test_a_dry_run_shows_the_cost_and_sends_nothing(serve, files, capsys):
    server = serve(prefers("A"))
    (files.root / "t.txt").write_text(PLAIN)
    prices = ("--price-per-million-input", 2.5, "--price-per-million-output", 10, "--max-answer-tokens", 50)
    flags = ("--endpoint", server.url, "--judge-model", "m", "--template", files.root / "t.txt", *prices)
    assert main(files.args(*flags, "--dry-run")) == 0
    texts = [filled(PLAIN, a["prompt"], a["completion"], b["completion"]) for a, b in zip(A, B, strict=True)]
    tokens = sum(-(-len(text) // 4) for text in texts)
    cost = (2.5 * tokens + 10 * N * 50) / 1e6
    printed = capsys.readouterr().out
    assert f"{N} requests for {N} comparisons to m: about and at most {tokens:,} tokens in, 1,200 out, {cost:.4f}" in (
        printed
    )
    assert "P: question 0 1: " in printed and KEY not in printed
    assert not server.seen and not files.output.exists()
    assert files.judge(*flags)["cost"] == pytest.approx((2.5 * 100 * N + 10 * 10 * N) / 1e6)  # as the server counts


def test_equal_completions_and_equal_comparisons_are_not_asked(serve, files):
    write_rows(Path(files.a), [A[0], A[0], A[1]])
    write_rows(Path(files.b), [B[0], B[0], A[1]])
    server = serve(prefers("A"))
    figures = files.judge("--endpoint", server.url, "--judge-model", "m")
    assert len(server.seen) == 1 and (figures["wins"], figures["ties"], figures["prompts"]) == (2, 1, 2)
    assert figures["win_rate"] == 0.75  # every prompt weighs the same
    write_rows(Path(files.a), B[:2])
    write_rows(Path(files.b), B[:2])
    files.output.unlink()
    assert files.judge("--endpoint", server.url, "--judge-model", "m")["ties"] == 2 and len(server.seen) == 1


def test_chats_and_empty_completions_are_asked_as_text(serve, files):
    user = [{"role": "user", "content": "Hi {first}"}]
    turns = [*user, {"role": "assistant", "content": "Yes?"}, {"role": "user", "content": "Why?"}]
    write_rows(Path(files.a), [{"prompt": p, "completion": "one"} for p in (user, turns)])
    write_rows(Path(files.b), [{"prompt": p, "chosen": "", "rejected": "no"} for p in (turns, user)])
    (files.root / "t.txt").write_text("[{prompt}|{first}|{second}] {x}")
    server = serve(lambda text, tries: "Answer: 1" if "|one|" in text else "Answer: 2")
    assert files.judge("--endpoint", server.url, "--judge-model", "m", "--template", files.root / "t.txt")["wins"] == 2
    chats = {"Hi {first}", "user: Hi {first}\n\nassistant: Yes?\n\nuser: Why?"}
    shown = {
        re.fullmatch(r"\[(.*)\|(?:one\||\|one)\] {x}", b["messages"][0]["content"], re.S)[1] for *_, b in server.seen
    }
    assert shown == chats


def test_an_endpoint_judge_in_python(serve):
    server = serve(prefers("A"))
    judge = endpoint_judge(Endpoint(url=server.url, model="m"), template_of("dialogue", None), both_orders=True)
    wins = judge_completions(judge, PROMPTS, *([row["completion"] for row in rows] for rows in (A, B)))
    assert wins.wins == N and len(server.seen) == 2 * N


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [
        ("Answer: 1", "A"),
        ("They differ.\n\n**Answer:** 2.", "B"),
        ("answer: Response 2", "B"),
        ("Final answer: first", "A"),
        ("2", "B"),
        ("<think>Answer: 1</think>Answer: tie", "tie"),
        ("Answer: 1\nNo, I was wrong.\nAnswer: 2", "B"),
        ("Answer: 12", "unparsed"),
        ("Answer: 1 or 2", "unparsed"),
        ("The first is better.", "unparsed"),
        ("", "unparsed"),
    ],
)
def test_answers_are_read(answer, verdict):
    assert verdict_of_answer(answer, "A") == verdict
    assert verdict_of_answer(answer, "B") == {"A": "B", "B": "A"}.get(verdict, verdict)


def test_every_task_has_its_places_once():
    for task in TASKS:
        text = filled(template_of(task, None), "{second}", "<1>", "<2>")
        assert text.count("<1>") == text.count("<2>") == text.count("{second}") == 1  # no text is filled in again


def test_the_pages_commands_are_understood():
    page = (Path(__file__).parent.parent / "docs" / "judges.md").read_text().replace("\\\n", " ")
    commands = re.findall(r"^dpojax judge (.*)$", page, re.MULTILINE)
    for command in commands:
        check_options(tyro.cli(JudgeConfig, args=shlex.split(command, comments=True)))
    assert len(commands) == 4


def test_retry_after_is_seconds_or_a_date():
    assert seconds_of("7") == 7 and seconds_of(None) is None and seconds_of("soon") is None
    assert seconds_of("Wed, 21 Oct 2015 07:28:00 GMT") == 0 and seconds_of("Wed, 21 Oct 2075 07:28:00 GMT") > 1e9


# --- rewards


def test_rewards_judge_files(files, capsys):
    """A function, and the scores that it writes, give one result; matched by prompt, several completions too."""
    (files.root / "s.py").write_text("def length(prompts, completions): return list(map(len, completions))")
    write_rows(Path(files.a), [{"prompt": "p", "completions": ["aaa", "a", ""]}, {"prompt": "q", "completion": "aa"}])
    write_rows(Path(files.b), [{"prompt": "q", "completion": "b"}, {"prompt": "p", "completion": "bb"}])
    scorer = f"{files.root / 's.py'}:length"
    figures = files.judge("--scorer", scorer)
    assert (figures["wins"], figures["losses"], figures["prompts"]) == (2, 2, 2)
    assert figures["win_rate"] == pytest.approx((1 / 3 + 1) / 2) and "clustered" in figures["interval"]
    assert [line["scores"] for line in files.lines()] == [[3, 2], [1, 2], [0, 2], [2, 1]]
    write_rows(Path(files.a), [{"prompt": "p", "completions": ["aaa", "a"]}, {"prompt": "q", "completion": "aa"}])
    figures = files.judge("--scorer", scorer)
    scored = [str(files.root / f"{name}.scored.jsonl") for name in "ab"]
    for name, out in zip((files.a, files.b), scored, strict=True):
        assert main(["score", "--scorer", scorer, "--data", name, "--output", out]) == 0
    (files.a, files.b), files.output = scored, files.root / "other.jsonl"
    again = files.judge("--scored")
    assert {k: v for k, v in figures.items() if k not in "ab" and k != "judge"} == {
        k: v for k, v in again.items() if k not in "ab" and k != "judge"
    }


def test_a_reward_model_judges_as_it_scores(files, tiny_dir, tmp_path):
    from dpojax.models import load_tokenizer, save_model
    from tests.models.families import FAMILIES
    from tests.test_score import reward_model

    save_model(reward_model(FAMILIES["llama"]), tmp_path / "reward")
    load_tokenizer(tiny_dir).save_pretrained(tmp_path / "reward")
    model, out = str(tmp_path / "reward"), tmp_path / "scores.jsonl"
    figures = files.judge("--model", model)
    assert main(["score", "--model", model, "--data", files.a, files.b, "--output", str(out)]) == 0
    scores = np.array([json.loads(line)["score"] for line in out.read_text().splitlines()]).reshape(2, N)
    np.testing.assert_allclose([line["scores"] for line in files.lines()], scores.T, rtol=1e-6)
    assert figures["wins"] == (scores[0] > scores[1]).sum() == N - figures["losses"]


def test_a_reward_judge_in_python():
    wins = judge_completions(reward_judge(lambda p, c: list(map(len, c))), ["p", "q"], ["aa", "a"], ["a", "a"])
    assert (wins.wins, wins.ties, wins.rate.mean, wins.rate.error) == (1, 1, 0.75, 0.25)
    with pytest.raises(ValueError, match="a finite number for each of 1"):
        judge_completions(reward_judge(lambda p, c: [float("nan")]), ["p"], ["a"], ["b"])


def test_agreement_with_peoples_verdicts(files, capsys):
    """A file of anybody's verdicts, about some of the comparisons, some the other way round."""
    (files.root / "s.py").write_text("def first(prompts, completions): return [c[0] == 't' for c in completions]")
    texts = [{"prompt": a["prompt"], "a": a["completion"], "b": b["completion"]} for a, b in zip(A, B, strict=True)]
    people = [
        texts[0] | {"verdict": "A"},
        {"prompt": texts[1]["prompt"], "a": texts[1]["b"], "b": texts[1]["a"], "verdict": "B"},
        texts[2] | {"verdict": "tie"},
        texts[3] | {"verdict": "A"},
        texts[3] | {"verdict": "B"},  # two people
    ]
    human = write_rows(files.root / "human.jsonl", people)
    (found,) = files.judge("--scorer", f"{files.root / 's.py'}:first", "--agreement", human)["agreement"]
    assert (found["comparisons"], found["alike"], found["unparsed"], found["kappa"]) == (4, 0.5, N - 4, 0)
    assert "human.jsonl: 0.500 of 4 alike" in capsys.readouterr().out


# --- bad input

SERVER = ["--endpoint", "http://127.0.0.1:9/v1", "--judge-model", "m"]


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        ([], ["no judge is named", "--scored"]),
        ([*SERVER, "--scored"], ["--scored: --endpoint is a judge already"]),
        (["--scored", "--seed", "3"], ["--seed 3: is for --endpoint, not --scored"]),
        ([*SERVER, "--max-length", "9"], ["--max-length 9: is for --model, not --endpoint"]),
        (["--endpoint", "http://127.0.0.1:9/v1"], ["--judge-model: name the model"]),
        (["--endpoint", "localhost:9", "--judge-model", "m"], ["--endpoint localhost:9: is no URL"]),
        (["--endpoint", "http://me:pw@host", "--judge-model", "m"], ["--endpoint http://...@host", "--api-key-env"]),
        ([*SERVER, "--retries", "0"], ["127.0.0.1:9/v1/chat/completions: cannot be reached", "at once"]),
        ([*SERVER, "--api-key-env", "NO_SUCH_VARIABLE"], ["--api-key-env NO_SUCH_VARIABLE", "no such variable"]),
        ([*SERVER, "--request-options", "[]"], ["--request-options []", "JSON object"]),
        ([*SERVER, "--template", "ROOT/none.txt"], ["none.txt: cannot be read"]),
        ([*SERVER, "--template", "ROOT/bare.txt"], ["has no {first} and no {second}"]),
        ([*SERVER, "--template", "x", "--task", "summary"], ["--task summary: --template is asked"]),
        ([*SERVER, "--limit", "0"], ["--limit 0: must be at least 1"]),
        ([*SERVER, "--timeout", "0"], ["--timeout 0.0: must be above 0"]),
        ([*SERVER, "--price-per-million-input", "-1"], ["--price-per-million-input -1.0: must be at least 0"]),
        (["--scored"], ["a.jsonl, row 1: no field 'score'"]),
        (["--scored", "--agreement", "ROOT/a.jsonl"], ["a.jsonl, row 1: is no verdict", "prompt, a, b and verdict"]),
        (["--scored", "--json", "ROOT/verdicts.jsonl"], ["--json", "is --output"]),
        (["--scored", "--json", "ROOT/no/f.json"], ["--json", "name a file"]),
        (["--scored", "--filter", "x>1"], ["a.jsonl, row 1", "no field 'x'"]),
    ],
)
def test_bad_options(files, capsys, flags, parts):
    (files.root / "bare.txt").write_text("{prompt}")
    said = say(capsys, *files.args(*[flag.replace("ROOT", str(files.root)) for flag in flags]))
    assert all(part in said for part in parts), said
    assert not files.output.exists() or not files.output.read_text()


@pytest.mark.parametrize(
    ("a", "b", "parts"),
    [
        (A[:2], B[:1], ["a.jsonl, row 2: its prompt is the prompt of no row of", "b.jsonl"]),
        (A[:1], B[:3], ["b.jsonl, row 2: its prompt is the prompt of no row of", "(2 such prompts)"]),
        ([*A[:2], A[0]], [*B[:2], B[0], B[0]], ["a.jsonl, row 1: its prompt has 2 completions in", "and 3 in"]),
        ([{"prompt": "p"}], B[:1], ["a.jsonl, row 1", "no field 'completion'"]),
        ([{"prompt_ids": [1], "completion_ids": [2]}], None, ["a.jsonl, row 1: is token ids", "give prompt"]),
    ],
)
def test_bad_rows(files, capsys, a, b, parts):
    write_rows(Path(files.a), a)
    write_rows(Path(files.b), b or a)
    said = say(capsys, *files.args(*SERVER))
    assert all(part in said for part in parts), said


def test_answers_of_no_form_at_all(serve, files, capsys):
    server = serve(lambda text, tries: "Hm.")
    said = say(capsys, *files.args("--endpoint", server.url, "--judge-model", "m"))
    assert "none of the 24 answers says a verdict" in said and len(files.lines()) == N
