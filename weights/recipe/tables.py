"""CSV tables as people and their spreadsheets write them, read line by line."""

import csv
from collections.abc import Sequence
from pathlib import Path

from db.errors import PermanentError

# A spreadsheet writes the one its country's decimal comma leaves free.
_DELIMITERS = ",;\t"

Line = tuple[int, dict[str, str]]  # its number in the file, and its values by column


def read_table(path: Path, needs: Sequence[str], error: type[PermanentError]) -> list[Line]:
    """The lines under the header; a value that is not there is empty.

    Columns are known by their names in lower case, whatever their order; more of them do no harm.
    Spaces round names and values do not count, nor do a byte order mark or the kind of line end.

    Raises
    ------
    error
        With file and line or column, if the file is not there or no CSV in UTF-8, if a column in
        `needs` is missing or there twice, or if there are no lines.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, delimiter=_delimiter(file.readline()), skipinitialspace=True)
            file.seek(0)
            rows = [(reader.line_num, row) for row in reader if any(map(str.strip, row))]
    except FileNotFoundError:
        raise error(f"{path}: no such file") from None
    except OSError as failure:
        raise error(f"{path}: cannot be read ({type(failure).__name__})") from None
    except (UnicodeDecodeError, csv.Error) as failure:
        reason = f"not a CSV in UTF-8 ({type(failure).__name__}); export it as such"
        raise error(f"{path}: {reason}") from None
    if len(rows) < 2:
        raise error(f"{path}: no lines; it needs a header and a line for each case")
    names = [name.strip().lower() for name in rows[0][1]]
    for wanted in needs:
        if names.count(wanted) != 1:
            found = f"no column {wanted!r}" if wanted not in names else f"two columns {wanted!r}"
            raise error(f"{path}: {found}; it needs {','.join(needs)}")
    return [(number, _values(names, row)) for number, row in rows[1:]]


def _delimiter(header: str) -> str:
    return max(_DELIMITERS, key=header.count)  # the first of them where none is there


def _values(names: Sequence[str], row: Sequence[str]) -> dict[str, str]:
    values = [value.strip() for value in row] + [""] * (len(names) - len(row))
    return dict(zip(names, values, strict=False))
