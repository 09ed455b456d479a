"""CSV files with a header line. A line is a row: line breaks inside quotes are not understood, and said so.

What is empty is missing. So are NA, NaN, null and the like in a column of numbers; among texts they are texts, as others are.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from gendist.data.lines import LineFiles, Lines, Split, integers_type, unlike
from gendist.protocols import UserError

OTHER_DELIMITERS = ";\t|"


class CsvFiles(LineFiles):
    """delimiter  what separates columns; a comma where left out, in .tsv files a tab"""

    format = "CSV"
    has_header = True

    def __init__(self, paths: Sequence[str], delimiter: str | None = None):
        usual = {"\t" if Path(path).suffix.lower() == ".tsv" else "," for path in paths}
        if delimiter is None and len(usual) > 1:
            raise UserError(f"{paths[0]}: files of .csv and .tsv together; say data.delimiter, which is then that of all")
        self._is_said, self._delimiter = delimiter is not None, delimiter or usual.pop()
        super().__init__(paths)

    def _guess(self, header: bytes, split: Split, sample: bytes) -> pa.Schema:
        names = _read(header, b"", self._delimiter, pa.schema([])).column_names
        other = next((each for each in OTHER_DELIMITERS if len(names) == 1 and each in names[0]), None)
        if other and not self._is_said:
            said = "\\t" if other == "\t" else other
            raise ValueError(f"""one column, {names[0]!r}; if {other!r} separates columns, say 'data.delimiter="{said}"'""")
        table = _read(header, sample, self._delimiter, pa.schema([]))  # which asks for no column, and so gets all of them
        return pa.schema([(name, _type_of(column)) for name, column in zip(table.column_names, table.columns, strict=True)])

    def _parse(self, lines: Lines, body: bytes, schema: pa.Schema) -> pa.Table:
        table = _read(lines.header, body, self._delimiter, schema)
        return pa.table({name: _without_empty_texts(table.column(name)) for name in schema.names})


def _type_of(column: pa.ChunkedArray) -> pa.DataType:
    if not pa.types.is_integer(column.type):
        return column.type
    bounds = pc.min_max(column).as_py()
    return integers_type(bounds["min"], bounds["max"])


def _without_empty_texts(column: pa.ChunkedArray) -> pa.ChunkedArray:
    if not pa.types.is_string(column.type):
        return column
    return pc.if_else(pc.equal(column, ""), pa.scalar(None, column.type), column)


def _read(header: bytes, body: bytes, delimiter: str, schema: pa.Schema) -> pa.Table:
    types = {field.name: field.type for field in schema}
    convert = pa.csv.ConvertOptions(include_columns=list(types), column_types=types)
    parse = pa.csv.ParseOptions(delimiter=delimiter)
    try:
        return pa.csv.read_csv(io.BytesIO(header + body), parse_options=parse, convert_options=convert)
    except pa.ArrowInvalid as error:
        told = re.match(r"In CSV column #(\d+): (?:CSV conversion error to (\w+): invalid value ('.*'))?(.*)", str(error))
        if told is None:
            raise
        name = pa.csv.read_csv(io.BytesIO(header), parse_options=parse).column_names[int(told[1])]
        raise unlike(name, told[3], told[2]) if told[2] else ValueError(f"column '{name}': {told[4]}") from error
