"""What Arrow IPC says of itself before it is read: whether its buffers are compressed, of which a few bytes may stand for any
number, and where a message ends.

The layout of the flatbuffers is that of Arrow's format/Message.fbs.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from itertools import count

import pyarrow as pa

MAGIC = b"ARROW1\0\0"
HEADER, BODY_LENGTH = 2, 3  # fields of Message
PREFIX, CONTINUED = struct.Struct("<Ii"), 0xFFFFFFFF  # of each message: that, and the bytes of its metadata
DATA = 1  # field of DictionaryBatch, a RecordBatch
COMPRESSION = 3  # field of RecordBatch


def stream_of(body: bytes) -> pa.Buffer:
    """The stream that a body is, or that lies in the file that it is: what a file's footer says is not believed."""
    return pa.py_buffer(body)[len(MAGIC) if body.startswith(b"ARROW1") else 0 :]


def is_compressed(stream: pa.Buffer) -> bool:
    """Whether a record batch of an IPC stream is. ArrowException, OSError or ValueError where it is no stream."""
    reader = pa.ipc.MessageReader.open_stream(stream)
    for _ in count():
        try:
            message = reader.read_next_message()
        except StopIteration:
            return False
        if message.type in ("record batch", "dictionary"):
            try:
                if _has_compression(message.metadata.to_pybytes(), message.type == "dictionary"):
                    return True
            except struct.error as error:
                raise ValueError(f"a damaged message: {error}") from error
    raise AssertionError


def _has_compression(message: bytes, is_dictionary: bool) -> bool:
    (root,) = struct.unpack_from("<I", message)
    batch = _table(message, root, HEADER)
    if is_dictionary and batch is not None:
        batch = _table(message, batch, DATA)
    return batch is not None and _table(message, batch, COMPRESSION) is not None


class Messages:
    """A stream that comes in parts. ArrowException or OSError where it is none of record batches alone."""

    def __init__(self) -> None:
        self._left = bytearray()
        self._schema: pa.Schema | None = None

    def fed(self, part: bytes) -> Iterator[pa.RecordBatch]:
        """The record batches that are whole with this part."""
        self._left += part
        while num_bytes := self._whole():
            content = pa.py_buffer(bytes(self._left[:num_bytes]))
            del self._left[:num_bytes]
            message = pa.ipc.read_message(content)
            if self._schema is None:
                self._schema = pa.ipc.read_schema(message)
            elif message.type == "record batch":
                yield pa.ipc.read_record_batch(message, self._schema)
            else:
                raise pa.ArrowInvalid(f"a message of another type: {message.type}")

    def _whole(self) -> int:
        """Bytes of the first message, where it is whole; else 0, as after the last."""
        if len(self._left) < PREFIX.size:
            return 0
        continued, num_of_metadata = PREFIX.unpack_from(self._left)
        if continued != CONTINUED or num_of_metadata < 0:
            raise pa.ArrowInvalid("no Arrow IPC stream")
        begin = PREFIX.size + num_of_metadata
        if num_of_metadata == 0 or len(self._left) < begin:
            return 0
        try:
            num_bytes = begin + _num_bytes_of_body(bytes(self._left[PREFIX.size : begin]))
        except struct.error as error:
            raise pa.ArrowInvalid(f"a damaged message: {error}") from error
        return num_bytes if len(self._left) >= num_bytes else 0


def _num_bytes_of_body(message: bytes) -> int:
    (root,) = struct.unpack_from("<I", message)
    position = _entry(message, root, BODY_LENGTH)
    (num_bytes,) = (0,) if position is None else struct.unpack_from("<q", message, position)
    return int(num_bytes)


def _table(message: bytes, position: int, field: int) -> int | None:
    """Where the table begins that a field of the table at `position` refers to; None where the field is not there."""
    entry = _entry(message, position, field)
    if entry is None:
        return None
    (to_table,) = struct.unpack_from("<I", message, entry)
    return entry + int(to_table)


def _entry(message: bytes, position: int, field: int) -> int | None:
    """Where a field of the table at `position` is; None where it is not there."""
    (to_vtable,) = struct.unpack_from("<i", message, position)
    vtable = position - to_vtable
    (vtable_bytes,) = struct.unpack_from("<H", message, vtable)
    entry = 4 + 2 * field
    if entry >= vtable_bytes:
        return None
    (offset,) = struct.unpack_from("<H", message, vtable + entry)
    return position + int(offset) if offset else None
