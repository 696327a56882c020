"""Records of published formats -> rows of ours, the format found by the first record's columns."""

from collections.abc import Iterable, Iterator

from dpojax.data.formats import Format, detect
from dpojax.data.read import BadRow, Row
from dpojax.progress import console

NOT_READ = ("system", "tools", "chat_template_kwargs")
"""Fields that formats give and that rows have no meaning for yet."""


def rows_of_records(records: Iterable[Row | BadRow]) -> Iterator[Row | BadRow]:
    """The records as rows: converted where the first of them has a published format's columns, else as they are.

    Which format was found is printed.

    Raises:
      UserError: the first record has the columns of two formats.
    """
    format: Format | None = None
    looked = False
    held: list[Row] = []
    for record in records:
        if isinstance(record, BadRow):
            yield record
            continue
        if not looked:
            format, looked = detect(record.fields), True
            if format is not None:
                console.print(f"{record.file}: read as {format.title} ({format.name})")
        if format is None:
            yield record
        elif format.group is None:
            yield _converted(record, format)
        else:
            if held and held[0].fields.get(format.group) != record.fields.get(format.group):
                yield _converted(_group(held, format.group), format)
                held = []
            held.append(record)
    if held:
        assert format is not None and format.group is not None
        yield _converted(_group(held, format.group), format)


def _group(records: list[Row], column: str) -> Row:
    first = records[0]
    fields = {column: first.fields.get(column), "records": [record.fields for record in records]}
    return Row(first.file, first.number, fields)


def _converted(record: Row, format: Format) -> Row | BadRow:
    try:
        fields = format.row(record.fields)
    except ValueError as error:
        return BadRow(record.file, record.number, str(error))
    unread = [name for name in NOT_READ if fields.get(name)]
    if unread:
        why = f"the {format.name} record has {' and '.join(unread)}, which shape the prompt and are not read yet"
        return BadRow(record.file, record.number, f"{why}; leave the row out")
    return Row(record.file, record.number, fields)
