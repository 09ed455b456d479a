"""Parquet files: the row groups that overlap the rows asked for are decoded, those columns only."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

import pyarrow as pa
import pyarrow.parquet as pq

from gendist.data.files import Contents, Files


class ParquetFiles(Files[tuple[int, ...]]):
    """The index of a file holds the row numbers where its row groups begin, and the end of the last."""

    format = "Parquet"

    def _contents(self, file: pa.NativeFile) -> Contents[tuple[int, ...]]:
        with pq.ParquetFile(file) as parquet:
            metadata = parquet.metadata
            bounds = (0, *accumulate(metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)))
            return Contents(bounds[-1], parquet.schema_arrow.remove_metadata(), bounds)

    def _rows(self, file: pa.NativeFile, index: tuple[int, ...], start: int, stop: int, columns: Sequence[str]) -> pa.Table:
        first, end = bisect_right(index, start) - 1, bisect_right(index, stop - 1)
        with pq.ParquetFile(file) as parquet:
            table = parquet.read_row_groups(list(range(first, end)), columns=list(columns))
        return table.slice(start - index[first], stop - start)
