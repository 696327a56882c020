"""The families of models, a row each: how their ``config.json`` reads, and where their files keep each parameter.

A new family is a row of :data:`FAMILIES`: a reader and a writer of its config, and a table from our parameters to the
names and forms of its tensors. What none has computed before is a choice in ``config.py`` and a line of ``block.py``.
"""

from collections.abc import Mapping
from typing import Any

from dpojax.errors import UserError
from dpojax.models.config import DecoderConfig
from dpojax.models.families import gemma, gpt, llama, moe, olmo, phi
from dpojax.models.families.base import Family, Tensor

FAMILIES: dict[str, Family] = {
    **llama.FAMILIES,
    **gemma.FAMILIES,
    **olmo.FAMILIES,
    **phi.FAMILIES,
    **gpt.FAMILIES,
    **moe.FAMILIES,
}
"""``model_type`` -> family."""


def family_of(raw: Mapping[str, Any], source: str) -> Family:
    """The family of a Hugging Face ``config.json``.

    Args:
      raw: the parsed file.
      source: where it is from, for the error.

    Raises:
      UserError: no family of this ``model_type``.
    """
    name = raw.get("model_type")
    if name not in FAMILIES:
        raise UserError(f"{source}: model_type {name!r} is not supported; use one of {', '.join(sorted(FAMILIES))}")
    return FAMILIES[name]


def config_from_hf(raw: Mapping[str, Any], source: str) -> DecoderConfig:
    """The choices of a Hugging Face ``config.json``.

    Raises:
      UserError: an unsupported family, or a field that is missing, not known or not supported.
    """
    return family_of(raw, source).read(raw, source)


__all__ = ["FAMILIES", "Family", "Tensor", "config_from_hf", "family_of"]
