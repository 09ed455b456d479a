"""JSON files: an object a line (.jsonl, .ndjson), or one array of objects. A key that an object lacks is a missing entry."""

from __future__ import annotations

import io
import json
import re
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.json

from gendist.data.lines import LineFiles, Lines, Offsets, Split, integers_type, split_lines, unlike

_STEP = np.zeros(256, dtype=np.int8)
_STEP[[ord("{"), ord("[")]] = 1
_STEP[[ord("}"), ord("]")]] = -1
_BETWEEN_OBJECTS = np.isin(np.arange(256), np.frombuffer(b" \t\r\n,", dtype=np.uint8))


class JsonFiles(LineFiles):
    format = "JSON"
    columns_may_lack = True

    def _split_of(self, file: pa.NativeFile) -> Split:
        beginning = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
        file.seek(0)
        return split_array if beginning.startswith(b"[") else split_lines

    def _guess(self, header: bytes, split: Split, sample: bytes) -> pa.Schema:
        text = sample.decode("utf-8-sig").rstrip(", \t\r\n")
        objects = [text] if split is split_array else [line for line in text.split("\n") if line.strip()]
        rows = json.loads("[" + ",\n".join(objects) + "]", parse_int=_integer)
        if not all(isinstance(row, dict) for row in rows):
            raise ValueError("rows that are no objects")
        names = dict.fromkeys(name for row in rows for name in row)
        return pa.schema([(name, _type_of([row.get(name) for row in rows])) for name in names])

    def _parse(self, lines: Lines, body: bytes, schema: pa.Schema) -> pa.Table:
        if lines.split is split_array:
            codes = np.frombuffer(body, dtype=np.uint8).copy()
            codes[(codes == ord(",")) & (_nesting(codes)[1] == 0)] = ord("\n")
            body = codes.tobytes()
        try:
            return pa.json.read_json(
                io.BytesIO(body),
                # In one piece, since the objects of an array may hold line breaks.
                read_options=pa.json.ReadOptions(block_size=len(body) + 1),
                parse_options=pa.json.ParseOptions(
                    explicit_schema=schema,
                    newlines_in_values=lines.split is split_array,
                    unexpected_field_behavior="ignore",
                ),
            )
        except pa.ArrowInvalid as error:
            told = re.search(r"Column\(/(.*?)(/\[\])*\) changed from (\w+) to (\w+)", str(error))
            decimal = re.search(r"JSON to int64, couldn't parse: ?(.*)", str(error))
            if decimal:
                names = [field.name for field in schema if pa.types.is_integer(field.type)]
                raise unlike("' or '".join(names), decimal[1], "int64") from error
            if told is None:
                raise
            raise unlike(told[1], told[4], told[3]) from error


def _integer(digits: str) -> float:
    number = float(digits)
    return int(digits) if abs(number) < 2**63 else number


def _type_of(values: list[Any]) -> pa.DataType:
    try:
        type_ = pa.infer_type(values)
    except pa.ArrowException:
        return pa.string()  # things of several kinds; they are no numbers, and nobody may ask for them
    if not pa.types.is_integer(type_):
        return type_
    integers = [value for value in values if isinstance(value, int)]
    return integers_type(min(integers), max(integers))


def split_array(content: bytes, is_end: bool) -> tuple[Offsets, bytes]:
    """The objects of one array are the rows. `content` begins at the array's bracket, or behind one of its objects."""
    codes = np.frombuffer(content, dtype=np.uint8).copy()
    blank = len(content) - len(content.removeprefix(b"\xef\xbb\xbf").lstrip())
    codes[:blank] = ord(" ")
    if codes[blank : blank + 1] == ord("["):
        codes[blank] = ord(" ")
    step, depth = _nesting(codes)
    starts = np.flatnonzero((step == 1) & (depth == 1))
    ends = np.flatnonzero((step == -1) & (depth == 0)) + 1
    closing = np.flatnonzero(depth < 0)
    inside = slice(0, closing[0] if len(closing) else len(codes))
    strange = (depth[inside] == 0) & (step[inside] == 0) & ~_BETWEEN_OBJECTS[codes[inside]]
    if strange.any() or (codes[starts] != ord("{")).any():
        raise ValueError("an array that holds something else than objects")
    if is_end and not len(closing):
        raise ValueError("the array does not end; the file is cut short")
    if is_end and content[closing[0] + 1 :].strip():
        raise ValueError("more than one array")
    return starts[: len(ends)], content[: ends[-1]] if len(ends) else b""


def _nesting(codes: np.ndarray[Any, np.dtype[np.uint8]]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Of every byte, whether it opens (1) or closes (-1) an object or array, and how many are open behind it."""
    quotes = codes == ord('"')
    backslashes = codes == ord("\\")
    if backslashes.any():
        # A quote behind an odd number of backslashes is part of the text.
        index = np.arange(len(codes), dtype=np.int32)
        run = index - np.maximum.accumulate(np.where(backslashes, -1, index))
        quotes[1:] &= run[:-1] % 2 == 0
    in_text = np.cumsum(quotes, dtype=np.int32) % 2 == 1
    step = np.where(in_text, 0, _STEP[codes])
    return step, np.cumsum(step, dtype=np.int32)
