"""CSV files with a header line. A line is a row: line breaks inside quotes are not understood, and said so."""

from __future__ import annotations

import io
import re

import pyarrow as pa
import pyarrow.csv

from gendist.data.lines import LineFiles, Lines


class CsvFiles(LineFiles):
    format = "CSV"
    has_header = True

    def _guess(self, lines: Lines, head: bytes) -> pa.Schema:
        return self._parse(lines, head, pa.schema([])).schema  # which asks for no column, and so gets all of them

    def _parse(self, lines: Lines, body: bytes, schema: pa.Schema) -> pa.Table:
        types = {field.name: field.type for field in schema}
        convert = pa.csv.ConvertOptions(include_columns=list(types), column_types=types, strings_can_be_null=True)
        try:
            return pa.csv.read_csv(io.BytesIO(lines.header + body), convert_options=convert)
        except pa.ArrowInvalid as error:
            number = re.match(r"In CSV column #(\d+): (.*)", str(error))
            if number is None:
                raise
            names = pa.csv.read_csv(io.BytesIO(lines.header)).column_names
            raise ValueError(f"column '{names[int(number[1])]}': {number[2]}") from error
