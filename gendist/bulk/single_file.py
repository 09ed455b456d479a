"""One file whose suffix says how it is written: whole or not at all, and part by part, however large it is."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import IO

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from gendist.atomic import new_file
from gendist.bulk.parts import Layout, Part


def write_file(parts: Iterable[Part], out: Path, layout: Layout, num_rows: int) -> None:
    """Write the parts, encoded by `encoder_of(out)`, one below the other."""
    suffix = out.suffix.lower()
    with new_file(out) as file:
        if suffix == ".parquet":
            _write_parquet(parts, file, layout)
        elif suffix == ".csv":
            _concatenate(_csv_header(layout), parts, file)
        elif suffix == ".npy":
            _concatenate(_npy_header(layout, num_rows), parts, file)
        else:
            with zipfile.ZipFile(file, "w") as archive, archive.open(f"{layout.array}.npy", "w", force_zip64=True) as inside:
                _concatenate(_npy_header(layout, num_rows), parts, inside)


def _concatenate(header: bytes, parts: Iterable[Part], file: IO[bytes]) -> None:
    file.write(header)
    for part in parts:
        file.write(part.content)


def _write_parquet(parts: Iterable[Part], file: IO[bytes], layout: Layout) -> None:
    schema = _no_rows(layout).schema
    with pq.ParquetWriter(file, schema, **layout.parquet_options) as writer:
        for part in parts:
            writer.write_table(part.content, row_group_size=part.content.num_rows)


def _csv_header(layout: Layout) -> bytes:
    stream = io.BytesIO()
    pa.csv.write_csv(_no_rows(layout.dense), stream)
    return stream.getvalue()


def _npy_header(layout: Layout, num_rows: int) -> bytes:
    stream = io.BytesIO()
    description = {"descr": "<f8", "fortran_order": False, "shape": layout.shape(num_rows)}
    np.lib.format.write_array_header_1_0(stream, description)
    return stream.getvalue()


def _no_rows(layout: Layout) -> pa.Table:
    return layout.table(np.empty(layout.shape(0)), 0)
