"""What is made of a run of rows, and the bytes that it becomes: both are the work of a task.

Encoded where it is made, a part crosses the network once and costs the process that writes it only the writing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from gendist.blocks import Leaves
from gendist.blocks.leaves import Bounds, pack
from gendist.column_names import SEQUENCE, STEP, label_name, state_name, step_names
from gendist.data import Schema
from gendist.data.sparse import sparse_rows
from gendist.protocols import UserError
from gendist.transformed import taken_apart

MAX_PART_BYTES = 32 * 2**20  # of values in memory; growing a buffer beyond doubles the encoding (docs/experiments.md)
MIN_PART_BYTES = 4 * 2**20
NUM_PARTS_OF_SMALL_WORK = 16  # so that less than 16 of the largest parts still spread over workers

Values = np.ndarray[Any, np.dtype[np.float64]]


def cut_into_parts(num_rows: int, row_bytes: int, first_row: int = 0, leaf_rows: int = 1) -> Leaves:
    """Parts of equal size, a power of two of rows that depends on these numbers alone, in whole leaves."""
    part_rows = max(1 << max(_most_rows(num_rows, row_bytes), 1).bit_length() - 1, leaf_rows)
    return Leaves((*range(first_row, first_row + num_rows, part_rows), first_row + num_rows))


def cut_between_sequences(bounds: Bounds, row_bytes: int) -> Leaves:
    """Parts of whole sequences, in their numbers. bounds (S + 1,): where each begins and ends, in rows."""
    return Leaves(tuple(pack(bounds, _most_rows(int(bounds[-1]), row_bytes)).tolist()))


def _most_rows(num_rows: int, row_bytes: int) -> int:
    return min(MAX_PART_BYTES // row_bytes, max(num_rows // NUM_PARTS_OF_SMALL_WORK, MIN_PART_BYTES // row_bytes))


@dataclass(frozen=True)
class Layout:
    """What the columns of a table are called.

    columns   one a column of values
    array     the name of the values where they are one array
    numbered  there is one value a row, and a table gives its row number as well, in the column of this name
    categories  of columns of text or labels: a table has what a value is the index of, and none for another value. An array
                has the values
    sparse    the column of sparse rows that a table of Parquet has instead of the features, where the model was fitted to such
    num_steps   of each sequence, where the values are of sequences: a table has a row for each step, with the numbers of the
                sequence and of the step in the two columns of `step_names`
    integers    columns that are whole numbers in a table
    """

    columns: tuple[str, ...]
    array: str
    numbered: str | None = None
    categories: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    sparse: str | None = None
    num_steps: int | None = None
    step_names: tuple[str, str] = (SEQUENCE, STEP)
    integers: tuple[str, ...] = ()

    def table(self, values: Values, first_row: int) -> pa.Table:
        """values (N, W), or (N,) where numbered, or (N, num_steps, W)."""
        numbers = np.arange(first_row, first_row + len(values))
        table: dict[str, Any] = {self.numbered: numbers} if self.numbered else {}
        if self.num_steps is not None:
            sequence, step = self.step_names
            table = {sequence: numbers.repeat(self.num_steps), step: np.tile(np.arange(self.num_steps), len(values))}
            values = values.reshape(-1, values.shape[2])
        if self.sparse is not None:
            table[self.sparse] = sparse_rows(values[:, [name not in self.categories for name in self.columns]])
        for name, column in zip(self.columns, [values] if self.numbered else values.T, strict=True):
            if name in self.categories:
                table[name] = _texts(column, self.categories[name])
            elif name in self.integers:
                table[name] = column.astype(np.int64)
            elif self.sparse is None:
                table[name] = column
        return pa.table(table)

    @property
    def dense(self) -> Layout:
        """The same with a column for each feature."""
        return replace(self, sparse=None)

    def shape(self, num_rows: int) -> tuple[int, ...]:
        if self.numbered:
            return (num_rows,)
        return (num_rows, *(() if self.num_steps is None else (self.num_steps,)), len(self.columns))

    @property
    def parquet_options(self) -> dict[str, Any]:
        """Plain doubles, which every reader knows. The digits of random numbers do not repeat: a dictionary costs four times
        the time and makes the file 13 % larger; what compresses best takes 1.4 times the time and saves 9 %
        (docs/experiments.md). Row numbers shrink to nothing, texts to the indices that they were."""
        numbers = (self.numbered,) if self.numbered else () if self.num_steps is None else (*self.step_names, *self.integers)
        encoding = dict.fromkeys(numbers, "DELTA_BINARY_PACKED") or None
        return {"compression": "none", "use_dictionary": list(self.categories) or False, "column_encoding": encoding}


def sample_layout(model: Any, schema: Schema, num_steps: int | None, with_beside: bool) -> tuple[Layout, dict[str, str]]:
    """Of the samples of a model, and the column that each verb of what stands beside them fills, such as the class of a row.

    num_steps  of each sequence, None where they are rows
    """
    columns, names, categories = schema.columns, schema.feature_names, schema.categories
    within, beside = taken_apart(model)[0], dict[str, str]()
    if with_beside:
        if num_steps is not None and hasattr(within, "sample_states"):
            beside["sample_states"] = state_name((*names, *columns))
        if model.labels and hasattr(within, "sample_classes"):
            label = beside["sample_classes"] = label_name((*names, *columns))
            categories = {**categories, label: model.labels}
        names = (*names, *beside.values())
    layout = Layout(
        names,
        array="x",
        categories=categories,
        sparse=columns[0] if schema.is_sparse else None,
        num_steps=num_steps,
        step_names=step_names(names),
        integers=tuple(column for verb, column in beside.items() if verb == "sample_states"),
    )
    return layout, beside


def _texts(values_N: Values, texts: Sequence[Any]) -> pa.Array:
    """The text or label of each index; none where it is no index of one."""
    is_one = (values_N >= 0) & (values_N < len(texts))
    indices = pa.array(np.where(is_one, values_N, 0.0).astype(np.int64), mask=~is_one)
    kind = pa.int64() if texts and all(isinstance(each, int) for each in texts) else pa.string()
    return pa.array([each if kind == pa.int64() else str(each) for each in texts], kind).take(indices)


@dataclass(frozen=True)
class Part:
    """content: a buffer of bytes or a table. sums: numbers that add up over the parts."""

    content: Any
    sums: Mapping[str, float] = field(default_factory=dict)


Encode = Callable[[Layout, Values, int, Mapping[str, float]], Any]


def as_parquet(layout: Layout, values: Values, first_row: int, sums: Mapping[str, float]) -> pa.Buffer:
    """A whole Parquet file; the sums stand in its metadata, so that a part that was written earlier still counts."""
    table = layout.table(values, first_row).replace_schema_metadata({name: repr(value) for name, value in sums.items()})
    stream = pa.BufferOutputStream()
    pq.write_table(table, stream, row_group_size=table.num_rows, **layout.parquet_options)
    return stream.getvalue()


def as_table(layout: Layout, values: Values, first_row: int, sums: Mapping[str, float]) -> pa.Table:
    """For one Parquet file, whose row groups only one process can write."""
    return layout.table(values, first_row)


def as_csv(layout: Layout, values: Values, first_row: int, sums: Mapping[str, float]) -> pa.Buffer:
    """Lines without a header; every entry of a sparse row."""
    stream = pa.BufferOutputStream()
    pa.csv.write_csv(layout.dense.table(values, first_row), stream, pa.csv.WriteOptions(include_header=False))
    return stream.getvalue()


def as_array(layout: Layout, values: Values, first_row: int, sums: Mapping[str, float]) -> pa.Buffer:
    """The numbers as they lie in an array, row by row."""
    return pa.py_buffer(np.ascontiguousarray(values))


ENCODERS: dict[str, Encode] = {".npy": as_array, ".npz": as_array, ".parquet": as_table, ".csv": as_csv}


def encoder_of(out: Path) -> Encode:
    """How the parts of a file of this name, or of a folder, are encoded. UserError where there can be no such file."""
    suffix = out.suffix.lower()
    if not suffix:
        return as_parquet
    if suffix not in ENCODERS:
        raise UserError(
            f"--out {out}: the suffix says how to write; allowed are {', '.join(ENCODERS)}, .png (of samples), or none at all: "
            "a folder of Parquet files"
        )
    if not out.absolute().parent.is_dir():
        raise UserError(f"--out {out}: no such folder; make it first")
    if out.is_dir():
        raise UserError(f"--out {out}: a folder; give a file, or a folder without a suffix")
    return ENCODERS[suffix]
