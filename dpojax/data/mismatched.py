"""Completions of other prompts, from which KTO estimates its KL divergence."""

import dataclasses
from collections.abc import Sequence

from dpojax.data.encode import Example
from dpojax.errors import UserError


def with_mismatched(examples: Sequence[Example], max_length: int) -> list[Example]:
    """Labelled examples, each with the completion of another prompt after its own.

    The other completion is that of the last example before it, counted round the end, whose prompt is different, as in
    TRL. It is cut to ``max_length`` together with this example's prompt.

    Raises:
      UserError: all prompts are equal.
    """
    prompts = [example.prompt.tobytes() for example in examples]
    if len(set(prompts)) == 1:
        raise UserError("the objective compares completions of different prompts, and the data has one; see --loss bco")
    out, other = [], next(i for i in range(len(examples) - 1, -1, -1) if prompts[i] != prompts[0])
    for i, example in enumerate(examples):
        if i and prompts[i - 1] != prompts[i]:
            other = i - 1
        room = max(1, max_length - len(example.prompt))
        mismatched = examples[other].completions[0][:room]
        out.append(dataclasses.replace(example, completions=(example.completions[0], mismatched)))
    return out
