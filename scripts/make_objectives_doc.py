"""Write docs/objectives.md from the objectives' docstrings, and its picture by the command under it.

    python scripts/make_objectives_doc.py

A test holds the file to what `document` gives.
"""

import inspect
import os
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

from dpojax.cli import main
from dpojax.losses import FAMILIES, LOSSES, WRAPPERS
from dpojax.losses.catalogue import entry
from dpojax.show import paper
from dpojax.show.listing import added

DOCS = Path(__file__).resolve().parent.parent / "docs"
PICTURE = (
    'dpojax losses sigmoid hinge "ipo(beta=0.5)" exo_pair apo_zero discopop --beta 1 --span 4 --output docs/losses.png'
)
FUNCTIONS: dict[str, Callable] = LOSSES | WRAPPERS

INTRODUCTION = f"""\
# Objectives

This file is made from the docstrings by `python scripts/make_objectives_doc.py`; a test keeps it current.

An objective is a pure function of log-probabilities, `objective(policy, ref, *, beta=..., ...) -> [B]`. `policy` and
`ref` are [`PairLogps`](../dpojax/types.py): for each of B pairs, the chosen and the rejected completion's sum of
log-probabilities (nats, the EOS among them) and its length in tokens, under the policy and under the reference, and
what else the objective declares that it reads. The result is one loss a pair, unreduced, float32; a step minimises its
mean. Objectives of single labelled completions take `LabelledLogps` instead and give one loss a completion.

In all equations the prompt is x, the chosen completion y_w, the rejected one y_l, and

```math
u = \\log \\frac{{\\pi(y|x)}}{{\\pi_\\mathrm{{ref}}(y|x)}}, \\qquad h = u_w - u_l
```

are a completion's log-ratio and the pair's log-ratio margin, in nats. With σ the logistic function, β u is the reward
that the policy implies.

## Spelling

`--loss` of `dpojax dpo` and the names that `dpojax losses` takes are spelled alike:

| spelling | objective |
|---|---|
| `sigmoid` | by name, with its own options |
| `"ipo(beta=0.3)"` | with options; `--beta` is for objectives that do not bind it so |
| `sigmoid+0.2*sft` | a weighted sum |
| `"length_normalized(hinge)"` | a [wrapper](#wrappers) around an objective |
| `"with_divergence(sigmoid, forward_kl)"` | a wrapper with options of its own |
| `mine.py:squared_hinge` | a function of your own |

`dpojax losses` lists them all; with names it plots them.

## Curves

![Loss and slope of six objectives against the log-ratio margin](losses.png)

```bash
{PICTURE}
```

The chosen log-ratio is h/2, the rejected one -h/2, of one pair of completions of one token; everything else is neutral
(margins and weights of 1, no divergence, running means as at a run's start). A curve whose range is more than
twice the median curve's is cut off, as IPO's parabola is here. The slope is JAX's gradient,
through which nothing flows that an objective stops. Objectives that read log-probabilities themselves, not log-ratios,
depend on the completions' log-probabilities; the command prints those that it takes. Those of labelled completions
have a curve for each label, against the log-ratio of one completion. IPO's minimum is at 1/(2 beta), so `beta=0.5`
aims at the margin of 1 nat at which hinge at beta 1 becomes 0.

## Composing

In Python, as on the command line, what is made of objectives is an objective:

```python
from functools import partial

from dpojax.losses import hinge, ipo, length_normalized, sft, sigmoid, spelled, weighted_sum

objective = weighted_sum((1.0, partial(sigmoid, beta=0.1)), (0.2, sft))
objective = length_normalized(partial(hinge, beta=2.0))
objective = spelled("sigmoid+0.2*ipo(beta=0.3)").objective
```

`at_beta(objective, policy, ref, beta)` gives the losses at a beta that is given later and may be traced. It reaches the
terms that bind none, here the sigmoid.

## Your own

A function of `policy` and `ref` is enough. The decorator declares what a run must provide beyond sums, and what
the objective allows; without it the function gets sums and lengths of policy and reference. The step gives `beta` to an
objective that has it as an option, as a traced array: compute with it by `jnp`, and do not branch on it.

```python
import jax.numpy as jnp

from dpojax.losses import log_ratios, traits


@traits(divergence=True)  # it reads differences of log-ratios alone, so with_divergence may go around it
def squared_hinge(policy, ref, *, beta=0.1):
    chosen, rejected = log_ratios(policy, ref)
    return jnp.square(jnp.maximum(0.0, 1 - beta * (chosen - rejected)))
```

```bash
dpojax losses mine.py:squared_hinge hinge --beta 1
```

`traits("tokens")` asks for every token's log-probability, `"squares"` and `"kl"` for sums over the vocabulary,
`"margin"` and `"weight"` for the data's columns, `"key"` for random keys; `lengths=True` declares that lengths are
read, `batch=True` that a pair's loss depends on the others', `on="labels"` that it takes labelled completions. See
[`dpojax/losses/traits.py`](../dpojax/losses/traits.py).
"""


def document() -> str:
    """The whole of docs/objectives.md."""
    parts = [INTRODUCTION, "## All of them\n", summary_table(LOSSES), ""]
    parts += ["Wrappers, and what they need in addition:\n", summary_table(WRAPPERS), ""]
    for title, family in FAMILIES.items():
        parts += [f"## {title}\n", *(section(function) for function in family)]
    parts += ["## Wrappers\n", "Each goes around an objective and gives one again.\n"]
    return "\n".join([*parts, *(section(function) for function in WRAPPERS.values())])


def summary_table(functions: dict[str, Callable]) -> str:
    lines = ["| name | what | paper | needs |", "|---|---|---|---|"]
    for name, function in functions.items():
        said = entry(function)
        cells = (f"[`{name}`](#{name})", markdown(said.summary), cited(paper(said.source)), needed(name))
        lines.append("| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |")
    return "\n".join(lines)


def needed(name: str) -> str:
    return ", ".join(entry(LOSSES[name]).needs if name in LOSSES else added(name))


def section(function: Callable) -> str:
    """Summary, equation, the docstring's prose on it, options and needs."""
    said, text = entry(function), inspect.getdoc(function) or ""
    math = re.search(r"\.\. math::(.*?)\n\n(?! )", text, re.DOTALL)
    assert math, f"{said.name}: its docstring has no equation"
    prose = re.split(r"\n\n(?=Args:|Returns:|Raises:|>>>)", text[math.end() :])[0]
    paragraphs = [markdown(" ".join(paragraph.split())) for paragraph in prose.split("\n\n")]
    equation = "\n".join(line.strip() for line in math[1].strip().splitlines())
    lines = [f"### {said.name}", markdown(said.summary), f"```math\n{equation}\n```", *filter(None, paragraphs)]
    if listed := options(function, text):
        lines.append("\n".join(listed))
    if needed(said.name):
        lines.append(f"Needs: {needed(said.name)}.")
    return "\n\n".join(lines) + "\n"


def options(function: Callable, text: str) -> list[str]:
    """The entries of the docstring's Args, but for what every objective takes, with their defaults."""
    parameters = inspect.signature(function).parameters
    args = re.search(r"\nArgs:\n(.*?)(?=\n\n|\Z)", text, re.DOTALL)
    found = []
    for item in re.split(r"\n(?=  \S)", args[1]) if args else []:
        names, _, meaning = " ".join(item.split()).partition(": ")
        if names.split(", ")[0] in ("policy", "ref", "objective"):
            continue
        shown = []
        for name in names.split(", "):
            default = parameters[name].default
            shown.append(f"`{name}`" + ("" if default is inspect.Parameter.empty else f" (default {default})"))
        found.append(f"- {', '.join(shown)}: {markdown(meaning)}")
    return found


def markdown(text: str) -> str:
    """The docstrings' reST as GitHub's Markdown: roles to links, code and formulas; arXiv numbers to links."""
    pieces = re.split(r"(:\w+:`[^`]*`|``[^`]*``)", text)
    return "".join(_marked(piece) if i % 2 else _plain(piece) for i, piece in enumerate(pieces))


def _marked(piece: str) -> str:
    role, content = re.fullmatch(r"(?::(\w+):)?`+([^`]*)`+", piece).groups()  # type: ignore[union-attr]
    if role == "math":
        return f"$`{content}`$"
    name = content.removeprefix("~").split(".")[-1] if role else content
    return f"[`{name}`](#{name})" if role and name in FUNCTIONS else f"`{name}`"


def _plain(piece: str) -> str:
    return cited(re.sub(r"([*_<\\])", r"\\\1", piece))


def cited(text: str) -> str:
    return re.sub(r"arXiv (\d{4}\.\d{5})", r"[arXiv \1](https://arxiv.org/abs/\1)", text)


if __name__ == "__main__":
    DOCS.mkdir(exist_ok=True)
    (DOCS / "objectives.md").write_text(document())
    os.chdir(DOCS.parent)
    sys.exit(main(shlex.split(PICTURE)[1:]))
