"""The fields of log-probabilities by flat names (``chosen_tokens`` for ``tokens.chosen``), so that tests walk them."""

from typing import Any

from dpojax.types import STATISTICS, PairLogps, Sides


def flat(logps: Any) -> dict[str, Any]:
    """The fields that are there, both sides of a statistic by names of their own."""
    fields = {name: getattr(logps, name) for name in logps.__dataclass_fields__}
    apart = {f"{side}_{k}": getattr(x, side) for k, x in fields.items() if isinstance(x, Sides) for side in x._fields}
    return {k: x for k, x in fields.items() if x is not None and not isinstance(x, Sides)} | apart


def put(logps: Any, /, **fields: Any) -> Any:
    """The log-probabilities with other values of these fields, named as :func:`flat` names them."""
    whole: dict[str, Any] = {}
    for name, x in fields.items():
        side, _, word = name.partition("_")
        if word in STATISTICS:
            sides = whole.get(word) or getattr(logps, word) or Sides(None, None)
            whole[word] = sides._replace(**{side: x})
        else:
            whole[name] = x
    return logps.replace(**whole)


def pair_logps(**fields: Any) -> PairLogps:
    """Log-probabilities of pairs, of fields named as :func:`flat` names them."""
    own = {name: fields.pop(name) for name in ("chosen", "rejected", "chosen_len", "rejected_len")}
    return put(PairLogps(**own), **fields)
