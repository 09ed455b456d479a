"""Arrow files (.arrow, .feather) of both kinds: the file format, which has an index, and the stream format, of which one is
made. Local files are mapped into memory; the record batches that overlap the rows asked for are read."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import pyarrow as pa

from gendist.data.files import Contents, Files


@dataclass(frozen=True)
class _Batches:
    """The record batches of a file.

    bounds    row numbers where they begin, and the end of the last
    offsets   of a stream: where they begin in the file, and the end of the last; None of a file that has its own index
    head      of a stream: the bytes before the first batch, which hold the schema and the dictionaries
    """

    bounds: tuple[int, ...]
    offsets: tuple[int, ...] | None = None
    head: bytes = b""


class ArrowFiles(Files[_Batches]):
    """Arrow's format for inter-process communication, version 2 of Feather included."""

    format = "Arrow"
    mapped = True

    def _contents(self, file: pa.NativeFile) -> Contents[_Batches]:
        magic = file.read(6)
        file.seek(0)
        if magic[:4] == b"FEA1":
            raise ValueError("version 1 of Feather, which cannot be read in parts; write it again as version 2")
        return _look_into_file(file) if magic == b"ARROW1" else _look_into_stream(file)

    def _rows(self, file: pa.NativeFile, index: _Batches, start: int, stop: int, columns: Sequence[str]) -> pa.Table:
        first, end = bisect_right(index.bounds, start) - 1, bisect_right(index.bounds, stop - 1)
        if index.offsets is None:
            reader = pa.ipc.open_file(file)
            options = _only(reader.schema, columns)
            reader = pa.ipc.open_file(file, options=options)
            table = pa.Table.from_batches([reader.get_batch(batch) for batch in range(first, end)])
        else:
            # A shorter stream: the same head, and these batches alone.
            file.seek(index.offsets[first])
            batches = file.read_buffer(index.offsets[end] - index.offsets[first])
            stream = b"".join([index.head, batches])
            options = _only(pa.ipc.open_stream(stream).schema, columns)
            table = pa.ipc.open_stream(stream, options=options).read_all()
        # A damaged file may hold offsets that point anywhere, and nothing has looked at them so far.
        table.validate(full=True)
        return table.slice(start - index.bounds[first], stop - start)


def _only(schema: pa.Schema, columns: Sequence[str]) -> pa.ipc.IpcReadOptions:
    return pa.ipc.IpcReadOptions(included_fields=[schema.get_field_index(name) for name in columns])


def _cheapest(schema: pa.Schema) -> pa.ipc.IpcReadOptions:
    """Decode one column, to learn how many rows a batch has: a compressed image need not be unpacked for that."""
    fixed = [index for index, field in enumerate(schema) if pa.types.is_primitive(field.type)]
    return pa.ipc.IpcReadOptions(included_fields=fixed[:1] or ([0] if len(schema) else []))


def _look_into_file(file: pa.NativeFile) -> Contents[_Batches]:
    schema = pa.ipc.open_file(file).schema
    reader = pa.ipc.open_file(file, options=_cheapest(schema))
    bounds = tuple(accumulate((reader.get_batch(i).num_rows for i in range(reader.num_record_batches)), initial=0))
    return Contents(bounds[-1], schema.remove_metadata(), _Batches(bounds))


def _look_into_stream(file: pa.NativeFile) -> Contents[_Batches]:
    schema = pa.ipc.open_stream(file).schema
    head_bytes = file.tell()
    file.seek(0)
    while (message := _next_message(file)) is not None and message.type != "record batch":
        head_bytes = file.tell()
    file.seek(0)
    head = file.read(head_bytes)
    file.seek(0)
    reader = pa.ipc.open_stream(file, options=_cheapest(schema))
    bounds, offsets = [0], [head_bytes]
    for batch in reader:
        bounds.append(bounds[-1] + batch.num_rows)
        offsets.append(file.tell())
    if reader.stats.num_replaced_dictionaries or reader.stats.num_dictionary_deltas:
        raise ValueError("a stream whose dictionaries change, which cannot be read in parts; write it in the file format")
    return Contents(bounds[-1], schema.remove_metadata(), _Batches(tuple(bounds), tuple(offsets), head))


def _next_message(file: pa.NativeFile) -> pa.ipc.Message | None:
    try:
        return pa.ipc.read_message(file)
    except EOFError:
        return None
