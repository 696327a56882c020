"""Published formats of preference data: a record as published -> a row of ours.

A file here is one format, or a family of near-equal ones; docs/formats.md has the table.
"""

from dpojax.data.formats.base import Format, Record, is_ours
from dpojax.data.formats.factual import FACTUAL
from dpojax.data.formats.helpsteer import HELPSTEER, HELPSTEER2, HELPSTEER3, HELPSTEER_CHAT
from dpojax.data.formats.hh import HH, HH_CHAT
from dpojax.data.formats.instructions import ALPACA, DISTILABEL
from dpojax.data.formats.nectar import NECTAR, NECTAR_CHAT
from dpojax.data.formats.openai import MESSAGES, OPENAI
from dpojax.data.formats.orca import ORCA
from dpojax.data.formats.own import format_of_file
from dpojax.data.formats.piqa import PIQA
from dpojax.data.formats.pku import BETTER, SAFER
from dpojax.data.formats.sharegpt import SHAREGPT
from dpojax.data.formats.shp import SHP
from dpojax.data.formats.stack_exchange import PAIRED, SCORED
from dpojax.data.formats.summarize import SUMMARIZE
from dpojax.data.formats.ultrafeedback import BINARIZED, ULTRAFEEDBACK
from dpojax.errors import UserError

__all__ = ["FORMATS", "Format", "detect", "format_named"]

FORMATS: dict[str, Format] = {
    format.name: format
    for format in (
        *(HH, HH_CHAT, SHP, PAIRED, SCORED, SUMMARIZE, ULTRAFEEDBACK, BINARIZED, ORCA, DISTILABEL, ALPACA),
        *(NECTAR, NECTAR_CHAT, HELPSTEER, HELPSTEER_CHAT, HELPSTEER2, HELPSTEER3, BETTER, SAFER),
        *(OPENAI, MESSAGES, SHAREGPT, PIQA, FACTUAL),
    )
}
"""The formats by name."""


def detect(record: Record) -> Format | None:
    """The published format of a record, by its columns; None where it is a row of ours already, or is unknown.

    Raises:
      UserError: the record has the columns of two formats.
    """
    if is_ours(record):
        return None
    found = [format for format in FORMATS.values() if format.matches(record)]
    if len(found) > 1:
        names = " and of ".join(format.name for format in found)
        raise UserError(f"the first row has the columns of {names}; rename one of the columns")
    return found[0] if found else None


def format_named(spec: str) -> Format:
    """The format of a name, or of ``path/to/file.py:function`` of the user's own.

    Raises:
      UserError: no such format, file or function, or the file cannot be run.
    """
    if spec in FORMATS:
        return FORMATS[spec]
    path, colon, name = spec.rpartition(":")
    if colon and path.endswith(".py"):
        return format_of_file(path, name)
    raise UserError(f"no format {spec!r}; give path/to/file.py:function, or one of {', '.join(FORMATS)}")
