"""``dpojax judge``: two files of completions, a judge, verdicts in a file, and the win rate that they amount to."""

import contextlib
import dataclasses
import itertools
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dpojax.configs import JudgeConfig, ScoreConfig
from dpojax.data import parse_filter
from dpojax.data.dialogue import hash_of_text
from dpojax.data.prepare import Reading
from dpojax.errors import UserError
from dpojax.evaluate.judges.agreement import Agreement, agreement
from dpojax.evaluate.judges.ask import Cost, Question, asked, estimated_cost, judgements, questions_about
from dpojax.evaluate.judges.endpoint import Endpoint, check_url
from dpojax.evaluate.judges.files import (
    Line,
    Pair,
    by_comparison,
    candidates_of,
    mended,
    paired,
    read_verdicts,
    scores_by,
    scores_of_row,
    verdict_line,
)
from dpojax.evaluate.judges.prompts import template_of, transcript
from dpojax.evaluate.judges.verdicts import Verdict, WinRate, joint, verdict_of_scores, win_rate_of
from dpojax.evaluate.rewards import dialogues, model_rewards, scorer_rewards
from dpojax.paths import write_text
from dpojax.progress import Stage, console

SHOWN = 20  # rows that are named


def judge_files(config: JudgeConfig) -> list[str]:
    """The lines that the command prints at its end; verdicts, and figures where they are asked for, are written.

    Raises:
      UserError: a file, a row, an option or the endpoint cannot be used.
    """
    check_files(config)
    others = {name: read_verdicts(name) for name in config.agreement}
    pairs = pairs_of_files(config)
    chosen = pairs[: config.limit]
    name = name_of_judge(config)
    output = Path(config.output)
    kept = read_verdicts(config.output) if mended(output) else []
    check_kept(kept, name, pairs, asks=config.endpoint is not None)
    if config.endpoint is None:
        write_text(output, "".join(scored_line(pair, name) for pair in chosen))
    elif not ask(config, chosen, pairs, kept):
        return []
    lines = read_verdicts(config.output) if mended(output) else []  # all completions may be equal
    verdicts = verdicts_of(lines, chosen)
    wins = win_rate_of(verdicts, [pair.a.prompt for pair in chosen])
    if not wins.rate.n:
        how = "the answers are there; ask in --template for a last line 'Answer: 1', 'Answer: 2' or 'Answer: tie'"
        raise UserError(f"{config.output}: none of the {len(verdicts)} answers says a verdict; {how}")
    judges = {name: verdicts} | {other: verdicts_of(found, chosen, other) for other, found in others.items()}
    agreements = {both: agreement(*map(judges.__getitem__, both)) for both in itertools.combinations(judges, 2)}
    of_answers = figures_of_answers(config, lines, chosen)
    if config.json is not None:
        figures = figures_of(config, name, wins, agreements) | of_answers
        write_text(Path(config.json), json.dumps(figures, indent=2) + "\n")
    return report(config, name, chosen, wins, agreements, of_answers)


def check_files(config: JudgeConfig) -> None:
    """Refuse to write over what is read."""
    for name in filter(None, (config.a, config.b, config.template, *config.agreement)):
        for flag, written in (("--output", config.output), ("--json", config.json)):
            if written is not None and Path(name).resolve() == Path(written).resolve():
                raise UserError(f"{flag} {written}: is read; name another file")
    if config.json is not None and Path(config.json).resolve() == Path(config.output).resolve():
        raise UserError(f"--json {config.json}: is --output; name another file")


def pairs_of_files(config: JudgeConfig) -> list[Pair]:
    """All pairs of completions of the two files, with their scores where a reward judges."""
    reading = Reading("candidates", config.format, tuple(map(parse_filter, config.filter)))
    rows = [list(dialogues([file], reading, config.as_chat, empty=True)) for file in (config.a, config.b)]
    for file, found in zip((config.a, config.b), rows, strict=True):
        if not found:
            raise UserError(f"{file}: no row is left by --filter; give another one")
    both = [row for found in rows for row in found]
    if config.scored:
        scores = [scores_of_row(*row) for row in both]
    elif config.endpoint is not None:
        scores = [[None] * len(dialogue.completions) for _, dialogue in both]
    elif config.scorer is not None:
        scores = scores_by(scorer_rewards(config.scorer), both)
    else:
        shared = {field.name for field in dataclasses.fields(ScoreConfig)} - {"data", "output"}
        options = {field: getattr(config, field) for field in shared}
        scores = scores_by(
            model_rewards(ScoreConfig(data=(config.a, config.b), output="", **options), config.model or ""), both
        )
    n = len(rows[0])
    sides = candidates_of(both[:n], scores[:n]), candidates_of(both[n:], scores[n:])
    return paired(*sides, config.a, config.b)


def name_of_judge(config: JudgeConfig) -> str:
    """What the judge is called in files and tables."""
    return config.judge_model or config.scorer or config.model or "scores of the rows"


def scored_line(pair: Pair, name: str) -> str:
    """A line of verdicts, of a judge that compares scores."""
    a, b = pair.a.score, pair.b.score
    assert a is not None and b is not None
    return verdict_line(pair.comparison, verdict_of_scores(a, b), name, scores=[a, b])


def check_kept(kept: Sequence[Line], name: str, pairs: Sequence[Pair], *, asks: bool) -> None:
    """Refuse a file that holds the verdicts of another judge, or, where they are kept, about other completions."""
    known = {pair.comparison.key() for pair in pairs}
    for line in kept:
        if line.fields.get("judge") != name:
            raise UserError(f"{line.place}: is a verdict of another judge than {name}; name another --output")
        if asks and line.comparison.key() not in known:
            raise UserError(f"{line.place}: is a verdict about other completions; name another --output")


def endpoint_of(config: JudgeConfig) -> Endpoint:
    """The endpoint that the options name, with its key.

    Raises:
      UserError: it is no URL, or the variable that was named holds no key.
    """
    assert config.endpoint is not None and config.judge_model is not None
    check_url(config.endpoint)
    key = os.environ.get(config.api_key_env, "").strip()
    if not key and config.api_key_env != JudgeConfig.api_key_env:
        raise UserError(f"--api-key-env {config.api_key_env}: no such variable is set; export it, with the key")
    if any(not "!" <= letter <= "~" for letter in key):
        raise UserError(f"--api-key-env {config.api_key_env}: holds what is no key; export it again")
    return Endpoint(
        url=config.endpoint,
        model=config.judge_model,
        key=key or None,
        max_answer_tokens=config.max_answer_tokens,
        options=json.loads(config.request_options),
        concurrency=config.concurrency,
        retries=config.retries,
        timeout=config.timeout,
    )


def ask(config: JudgeConfig, chosen: Sequence[Pair], pairs: Sequence[Pair], kept: Sequence[Line]) -> bool:
    """Ask the endpoint what has no answer yet; False where this was a dry run.

    Every answer is appended to ``--output`` as it comes.
    """
    endpoint = endpoint_of(config)
    template = template_of(config.task, config.template)
    for side in itertools.chain.from_iterable((pair.a, pair.b) for pair in pairs):
        for text in (side.prompt, side.completion):
            with naming(side.place):
                transcript(text)
    order = {"seed": config.seed, "both_orders": config.both_orders}
    every = questions_about([pair.comparison for pair in pairs], template, **order)  # type: ignore[arg-type]
    wanted = {pair.comparison.key() for pair in chosen}
    known, answered = {asked(endpoint, question) for question in every}, {line.fields.get("asked") for line in kept}
    if strange := [line.place for line in kept if line.fields.get("asked") not in known]:
        options = "--task, --template, --seed, --both-orders, --max-answer-tokens or --request-options"
        raise UserError(f"{strange[0]}: was asked otherwise (other {options}); name another --output")
    missing = [q for q in every if q.comparison.key() in wanted and asked(endpoint, q) not in answered]
    console.print(cost_sentence(config, endpoint, missing, len(wanted)))
    if config.dry_run:
        for line in example_of(config, endpoint, (missing or every)[:1]):
            console.print(line)
        return False
    with Stage("Judging", len(missing)) as stage, Path(config.output).open("a", encoding="utf-8") as file:
        for question, answer, verdict in judgements(endpoint, missing):
            more: dict[str, Any] = {"first": question.first, "asked": asked(endpoint, question)}
            more |= {"answer": answer.text, "tokens_in": answer.tokens_in, "tokens_out": answer.tokens_out}
            file.write(verdict_line(question.comparison, verdict, endpoint.model, **more))
            file.flush()
            stage.advance()
    return True


@contextlib.contextmanager
def naming(place: object) -> Any:
    """A context in which what is wrong with a row is said with its place."""
    try:
        yield
    except ValueError as error:
        raise UserError(f"{place}: {error}") from None


def cost_sentence(config: JudgeConfig, endpoint: Endpoint, missing: Sequence[Question], n: int) -> str:
    """How much is asked, and what that would cost."""
    cost = estimated_cost(endpoint, missing, config.price_per_million_input, config.price_per_million_output)
    return f"{len(missing)} requests for {n} comparisons to {endpoint.model}: about and at most {cost}"


def example_of(config: JudgeConfig, endpoint: Endpoint, question: Sequence[Question]) -> list[str]:
    """What a dry run shows: how requests are sent, and the first."""
    key = f"with the key of {config.api_key_env}" if endpoint.key else "without a key"
    tries = f"each up to {1 + config.retries} times, for up to {config.timeout:g} seconds"
    how = f"POST {endpoint.place()}, {key}, {config.concurrency} at a time, {tries}:"
    return [how, *[json.dumps(endpoint.body(q.text), indent=2, ensure_ascii=False) for q in question]]


def verdicts_of(lines: Sequence[Line], pairs: Sequence[Pair], name: str | None = None) -> list[Verdict]:
    """Of every pair, the joint verdict of its lines; two equal completions without one are a tie.

    Args:
      lines: of a file of verdicts.
      pairs: the comparisons.
      name: of the file, where it is another judge's, which may leave comparisons out.

    Raises:
      UserError: another judge's file is about none of the pairs.
    """
    found = by_comparison(lines)
    said = [found.get(pair.comparison.key()) for pair in pairs]
    if name is not None and not any(said):
        raise UserError(f"--agreement {name}: is about none of the comparisons; give prompt, a and b as the files do")
    unknown: Verdict = "tie" if name is None else "unparsed"
    return [joint(verdicts) if verdicts else unknown for verdicts in said]


def figures_of_answers(config: JudgeConfig, lines: Sequence[Line], pairs: Sequence[Pair]) -> dict[str, Any]:
    """What a model's answers took, and how often it preferred what it was shown first, or changed its mind."""
    if config.endpoint is None:
        return {}
    wanted = {pair.comparison.key() for pair in pairs}
    mine = [line for line in lines if line.comparison.key() in wanted]
    decided = [line.verdict == line.fields.get("first") for line in mine if line.verdict in ("A", "B")]
    tokens_in, tokens_out = (sum(line.fields.get(name) or 0 for line in mine) for name in ("tokens_in", "tokens_out"))
    used = Cost(len(mine), tokens_in, tokens_out, config.price_per_million_input, config.price_per_million_output)
    figures: dict[str, Any] = {
        "answers": len(mine),
        "first_preferred": sum(decided) / len(decided) if decided else None,
        "tokens_in": used.tokens_in,
        "tokens_out": used.tokens_out,
        "cost": used.money,
        "equal_completions": sum(pair.comparison.a == pair.comparison.b for pair in pairs),
    }
    if config.both_orders:
        said: dict[str, set[Verdict]] = {}
        for line in mine:
            said.setdefault(line.comparison.key(), set()).add(line.verdict)
        figures["orders_disagree"] = sum(len(found) > 1 and "unparsed" not in found for found in said.values())
    return figures


def figures_of(
    config: JudgeConfig, name: str, wins: WinRate, agreements: dict[tuple[str, str], Agreement]
) -> dict[str, Any]:
    """The figures of ``--json``."""
    finite = lambda x: x if math.isfinite(x) else None  # noqa: E731
    judged = wins.wins + wins.losses + wins.ties
    return {
        "a": config.a,
        "b": config.b,
        "judge": name,
        "win_rate": wins.rate.mean,
        "standard_error": finite(wins.rate.error),
        "low": wins.low,
        "high": wins.high,
        "interval": wins.interval,
        "prompts": wins.rate.n,
        "comparisons": judged + len(wins.unparsed),
        "wins": wins.wins,
        "losses": wins.losses,
        "ties": wins.ties,
        "tie_rate": wins.ties / judged,
        "unparsed": len(wins.unparsed),
        "win_rate_with_unparsed": list(wins.bounds),
        "sign_test_p": wins.p_value,
        "agreement": [
            {
                "judges": list(both),
                "comparisons": found.n,
                "unparsed": found.unparsed,
                "alike": finite(found.share),
                "kappa": finite(found.kappa),
                "kappa_standard_error": finite(found.error),
            }
            for both, found in agreements.items()
        ],
    }


def report(
    config: JudgeConfig,
    name: str,
    pairs: Sequence[Pair],
    wins: WinRate,
    agreements: dict[tuple[str, str], Agreement],
    of_answers: dict[str, Any],
) -> list[str]:
    """The table of a judge's figures."""
    judged = wins.wins + wins.losses + wins.ties
    table = [
        ("win rate", f"{wins.rate} (95 %: {wins.low:.3f} to {wins.high:.3f}, {wins.interval})"),
        ("wins, losses, ties", f"{wins.wins}, {wins.losses}, {wins.ties} ({100 * wins.ties / judged:.1f} % ties)"),
        ("sign test over prompts", f"p = {wins.p_value:.3g}"),
    ]
    if wins.unparsed:
        numbers = [str(pairs[i].a.place.number) for i in wins.unparsed[:SHOWN]]
        more = ", ..." if len(wins.unparsed) > SHOWN else ""
        low, high = wins.bounds
        said = f"{len(wins.unparsed)}, not in the rate, which would be {low:.3f} to {high:.3f} with them"
        table.append(("unparsed", f"{said}; rows {', '.join(numbers)}{more} of {config.a}"))
    if of_answers.get("first_preferred") is not None:
        table.append(("first one preferred", f"{of_answers['first_preferred']:.3f} of answers that prefer one"))
    if "orders_disagree" in of_answers:
        table.append(("orders disagree", f"{of_answers['orders_disagree']} comparisons, counted as ties"))
    if of_answers.get("equal_completions"):
        table.append(("equal completions", f"{of_answers['equal_completions']}, counted as ties, not asked"))
    if of_answers:
        prices = config.price_per_million_input, config.price_per_million_output
        used = Cost(of_answers["answers"], of_answers["tokens_in"], of_answers["tokens_out"], *prices)
        table.append(("used by all answers", str(used)))
    for (one, other), found in agreements.items():
        left_out = f"; {found.unparsed} without a verdict of both" if found.unparsed else ""
        table.append(("agreement", f"{one} and {other}: {found}{left_out}"))
    prompts = len({hash_of_text(pair.a.prompt) for pair in pairs})
    title = f"{config.a} against {config.b}, judged by {name}: {len(pairs)} comparisons of {prompts} prompts"
    return [title, *[f"{label:24}{said}" for label, said in table], f"verdicts written to {config.output}"]
