"""What Arrow IPC says of itself before it is read: whether its buffers are compressed, of which a few bytes may stand for any
number.

The layout of the flatbuffers is that of Arrow's format/Message.fbs.
"""

from __future__ import annotations

import struct
from itertools import count

import pyarrow as pa

MAGIC = b"ARROW1\0\0"
HEADER = 2  # field of Message
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


def _table(message: bytes, position: int, field: int) -> int | None:
    """Where the table begins that a field of the table at `position` refers to; None where the field is not there."""
    (to_vtable,) = struct.unpack_from("<i", message, position)
    vtable = position - to_vtable
    (vtable_bytes,) = struct.unpack_from("<H", message, vtable)
    entry = 4 + 2 * field
    if entry >= vtable_bytes:
        return None
    (offset,) = struct.unpack_from("<H", message, vtable + entry)
    if offset == 0:
        return None
    (to_table,) = struct.unpack_from("<I", message, position + offset)
    return position + offset + int(to_table)
