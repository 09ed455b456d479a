"""What labels say of each row's latent: log-evidence, 0 where nothing is known and -inf where a latent is excluded.

Legend: N rows, L latents, C labels, which the first latents stand for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from gendist.data.column_types import check_exact
from gendist.data.matrix import to_matrix
from gendist.protocols import UserError

SUM_TOLERANCE = 1e-6  # by how much the probabilities of a row's classes may miss 1: float32 leaves no more

Array = np.ndarray[Any, np.dtype[np.float64]]


def known_evidence(column: pa.ChunkedArray, labels: Sequence[Any], num_latents: int, first_row: int, where: str) -> Array:
    """(N, L) of a column of labels: a row excludes every latent but its label's; a row without one excludes none.

    UserError, with the row's number, where a label is none of these.
    """
    index = {label: i for i, label in enumerate(labels)}
    distinct, which_N = _encoded(column, where)
    latent_of = np.array([-1 if label is None else index.get(label, len(labels)) for label in distinct], dtype=np.int64)
    latent_N = latent_of[which_N]
    outside = np.flatnonzero(latent_N == len(labels))
    if len(outside):
        row = int(outside[0])
        allowed = ", ".join(map(repr, labels[:12])) + (", ..." if len(labels) > 12 else "")
        raise UserError(
            f"{where} holds {distinct[which_N[row]]!r} in row {first_row + row}: labels out of range; data.labels are {allowed}"
        )
    evidence_NL = np.where(latent_N[:, None] < 0, 0.0, np.full((1, num_latents), -np.inf))
    labelled = np.flatnonzero(latent_N >= 0)
    evidence_NL[labelled, latent_N[labelled]] = 0.0
    return evidence_NL


def soft_evidence(table: pa.Table, columns: Sequence[str], num_latents: int, first_row: int, source_name: str) -> Array:
    """(N, L) log p of columns of class probabilities; a row without any excludes no latent.

    UserError, with the row's number, where some are missing, one is negative or they do not sum to 1.
    """
    probs_NC = to_matrix(table, columns, first_row, source_name)
    missing_NC = np.isnan(probs_NC)
    unknown_N = missing_NC.all(1)
    sums_N = probs_NC.sum(1)
    some_missing_N: Any = missing_NC.any(1) & ~unknown_N
    negative_N: Any = (probs_NC < 0).any(1)
    wrong_N = some_missing_N | negative_N | (np.abs(sums_N - 1.0) > SUM_TOLERANCE)
    if wrong_N.any():
        row = int(np.argmax(wrong_N))
        names = ", ".join(columns[:4]) + (", ..." if len(columns) > 4 else "")
        if some_missing_N[row]:
            what = f"'{columns[int(np.argmax(missing_NC[row]))]}' is missing, others are not"
        elif negative_N[row]:
            column = int(np.argmax(probs_NC[row] < 0))
            what = f"'{columns[column]}' is {probs_NC[row, column]:g}"
        else:
            what = f"they sum to {sums_N[row]:.9g}"
        raise UserError(
            f"{source_name}: data.label ({names}) are no probabilities in row {first_row + row}: {what}; "
            "they must be 0 or more and sum to 1, or all be missing"
        )
    evidence_NL = np.full((len(probs_NC), num_latents), -np.inf)
    with np.errstate(divide="ignore"):
        evidence_NL[:, : len(columns)] = np.log(probs_NC)
    evidence_NL[unknown_N] = 0.0
    return evidence_NL


def normalised(column: Any, where: str) -> list[Any]:
    """Labels as str, int or None where missing; 3.0 (an integer column with missing entries, in pandas) is 3."""
    check_exact(column, where)
    return [normal_label(label) for label in column.to_pylist()]


def _encoded(column: pa.ChunkedArray, where: str) -> tuple[list[Any], np.ndarray[Any, Any]]:
    """The distinct labels, normalised, and (N,) which of them each row has."""
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    chunk = pc.dictionary_encode(column, null_encoding="encode").combine_chunks()
    encoded = chunk if isinstance(chunk, pa.DictionaryArray) else pa.concat_arrays(chunk.chunks)
    return normalised(encoded.dictionary, where), encoded.indices.to_numpy(zero_copy_only=False)


def normal_label(label: Any) -> Any:
    if isinstance(label, float):
        if np.isnan(label):
            return None
        return int(label) if label.is_integer() else str(label)
    if isinstance(label, bool):
        return int(label)
    if label is None or isinstance(label, (int, str)):
        return label
    return str(label)
