"""Rows whose columns have names, in a form that a model takes: of a data frame, an Arrow table or a mapping of columns.

Legend: N rows, D features, T steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import pyarrow as pa

from gendist.column_names import step_names
from gendist.data.matrix import to_matrix
from gendist.data.memory import source_of
from gendist.data.schema import Schema
from gendist.data.sequence_source import SequenceSource
from gendist.data.sequences import as_fitted, as_rows, as_sequences
from gendist.data.sources import DataConfig, Source
from gendist.data.sparse import to_csr
from gendist.data.tokens import to_counts
from gendist.protocols import UserError


def has_names(x: Any) -> bool:
    """Whether the columns of x have names, so that nobody need know their order."""
    return isinstance(x, pa.Table | Mapping) or hasattr(x, "columns") or hasattr(x, "column_names")


def names_read(schema: Schema) -> frozenset[str]:
    """The columns of a table that are looked at: others may hold anything."""
    of_sequences = (schema.sequence, schema.order, *step_names(schema.feature_names)) if schema.is_sequence else ()
    return frozenset(filter(None, (*schema.columns, *schema.feature_names, *of_sequences)))


def _only_what_is_read(x: Any, schema: Schema) -> Any:
    names = list(x) if isinstance(x, Mapping) else list(x.column_names if hasattr(x, "column_names") else x.columns)
    wanted = [name for name in names if name in names_read(schema)]
    is_whole = set(schema.columns) <= set(names) or set(schema.feature_names) <= set(names)
    if not is_whole or len(wanted) == len(names):  # what is missing is told beside all that there is
        return x
    if isinstance(x, Mapping):
        return {name: x[name] for name in wanted}
    return (
        x.select_columns(wanted) if hasattr(x, "select_columns") else x.select(wanted) if isinstance(x, pa.Table) else x[wanted]
    )


def rows_by_name(x: Any, schema: Schema) -> Any:
    """(N, D) float64, NaN where an entry is missing, of the columns that the schema was made of; others are not looked at. Of
    sparse rows and texts a sparse matrix, of sequences a list of (T, D).

    UserError where a column is not there, or holds something else than it did in the fit.
    """
    source: Source = source_of(_only_what_is_read(x, schema))
    config = DataConfig(columns=schema.columns_in(source.schema.names))
    if schema.is_sequence:
        config = as_fitted(config, source, schema)
        source = as_sequences(source, config)
    else:
        as_rows(source, config)
    here = Schema.of(source, config, known=schema)
    if here.num_features != schema.num_features:
        raise UserError(
            f"{source.name}: {here.num_features} features, but the model has {schema.num_features}, of the columns "
            f"{', '.join(schema.columns[:8])}"
        )
    table = source.read(0, source.num_rows, here.columns)
    if here.is_sparse and here.text is not None:
        return to_counts(table.column(here.columns[0]), here.text, here.feature_names)
    if here.is_sparse:
        return to_csr(table, here.columns[0], here.num_features, 0, source.name)
    image_shape = None if here.is_sequence else here.image_shape
    x_ND = to_matrix(table, here.columns, 0, source.name, here.categories, image_shape)
    if isinstance(source, SequenceSource):
        return [x_ND[start:stop] for start, stop in pairwise(source.bounds.tolist())]
    return x_ND
