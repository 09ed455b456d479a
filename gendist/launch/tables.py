"""Writing columns to a file whose suffix says how: .npy, .npz, .parquet or .csv; whole or not at all.

Parquet and CSV are written part by part; arrays are collected in memory first.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from gendist.protocols import UserError

SUFFIXES = (".npy", ".npz", ".parquet", ".csv")

Columns = Mapping[str, np.ndarray[Any, Any]]


def check_out(out: Path, suffixes: tuple[str, ...]) -> None:
    """UserError where a file of this name cannot be written."""
    if out.suffix.lower() not in suffixes:
        raise UserError(f"--out {out}: the suffix says how to write; allowed are {', '.join(suffixes)}")
    if not out.absolute().parent.is_dir():
        raise UserError(f"--out {out}: no such folder; make it first")
    if out.is_dir():
        raise UserError(f"--out {out}: a folder; give a file")


def is_array(out: Path) -> bool:
    """Whether a file of this name holds arrays instead of named columns."""
    return out.suffix.lower() in (".npy", ".npz")


def write_table(parts: Iterable[Columns], out: Path) -> int:
    """Write parts of a table, one below the other; returns the number of rows.

    .npy holds the only column, .npz one array a name.
    """
    unfinished = out.with_name(f".{out.name}.unfinished")
    try:
        num_rows = (_write_arrays if is_array(out) else _write_arrow)(parts, unfinished, out.suffix.lower())
        unfinished.replace(out)
        return num_rows
    finally:
        unfinished.unlink(missing_ok=True)


def _write_arrow(parts: Iterable[Columns], path: Path, suffix: str) -> int:
    writer, num_rows = None, 0
    try:
        for part in parts:
            table = pa.table(dict(part))
            if writer is None:
                writer = (pq.ParquetWriter if suffix == ".parquet" else pa.csv.CSVWriter)(str(path), table.schema)
            writer.write_table(table)
            num_rows += table.num_rows
    finally:
        if writer is not None:
            writer.close()
    return num_rows


def _write_arrays(parts: Iterable[Columns], path: Path, suffix: str) -> int:
    collected: dict[str, list[np.ndarray[Any, Any]]] = {}
    for part in parts:
        for name, values in part.items():
            collected.setdefault(name, []).append(values)
    columns = {name: np.concatenate(values) for name, values in collected.items()}
    with path.open("wb") as file:
        if suffix == ".npz":
            np.savez(file, allow_pickle=False, **columns)
        else:
            (values,) = columns.values()
            np.save(file, values)
    return len(next(iter(columns.values())))
