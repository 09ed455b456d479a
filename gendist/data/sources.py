"""Where rows come from. A source knows how many rows it has and returns any run of them as an Arrow table.

Sources are small and travel to the tasks, which do the reading; what is held in memory travels once. What the spec's `data:`
block can name stands in `formats.py` and `huggingface.py`, what Python can hand over in `memory.py`.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Annotated, Any, Literal, Protocol, Self

import fsspec
import pyarrow as pa
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from gendist.data.csv import CsvFiles
from gendist.data.embedded import EMBEDDED
from gendist.data.evidence import normal_label
from gendist.data.formats import check_readable, expand, is_quick_to_open, open_files
from gendist.data.huggingface import open_huggingface
from gendist.data.tokens import TextConfig
from gendist.data.transforms import Steps
from gendist.protocols import UserError


def _name_or_names(given: Any) -> Any:
    """Told here, since of a field that may be of two types pydantic would say why it is neither."""
    if given is None or isinstance(given, str):
        return given
    names = given if isinstance(given, list | tuple) else ()
    if len(names) < 2 or not all(isinstance(name, str) for name in names) or len(set(names)) < len(names):
        raise ValueError("the name of a column is needed, or a list of two and more different columns of probabilities")
    return tuple(names)


def _distinct_labels(given: Any) -> Any:
    if given is None:
        return given
    labels = [normal_label(label) for label in given] if isinstance(given, list | tuple) else []
    if not labels or None in labels or len(set(labels)) < len(labels):
        raise ValueError("a list of different labels is needed, such as [cat, dog]")
    return tuple(labels)


def _one_character(given: Any) -> Any:
    if given is None or (isinstance(given, str) and len(given) == 1 and given.isascii() and given not in '"\r\n'):
        return given
    raise ValueError('one character is needed, such as ";" or "\\t"')


Side = Annotated[int, Field(ge=1)]


class DataConfig(BaseModel):
    """The `data:` block of a spec.

    source               what kind of data; told by the suffix of the path where it is left out
    path                 a file, a folder, a pattern such as "data/*.parquet", or a list of these; of source huggingface the
                         name of a data set on the hub, or a folder in its layout
    split                of source huggingface: which part of the data set; "train" where left out
    subset               of source huggingface: which of its configurations
    streaming            of source huggingface: read the files where they lie, without a copy on this machine
    delimiter            of CSV: what separates columns; a comma, and in .tsv files a tab, where left out
    columns              the columns that are fitted; all but label and weight where left out, or the image column
    image_shape          [height, width] or [height, width, channels] of the images that rows are. Images that lie in the data
                         have theirs, and other data, of so many columns or lists of so many pixels, are taken for such; with it
                         `--dry-run` knows how large networks are, without the data
    label                a column that says which component (class) a row belongs to, and may have missing entries; or a list
                         of columns with the probabilities of the classes, which are called as they are
    labels               the classes that there are, in order; those that are found where left out
    text                 a column of texts, or of lists of tokens, whose tokens are counted: see `gendist.data.tokens`
    sequence             of families of sequences: a column of ids, where a row is a step in time. The rows of a sequence stand
                         together. Where left out, see `gendist.data.sequences`
    order                a column that ascends within each sequence: that the rows are in order is then checked
    weight               a column of weights; weight 2 counts a row twice
    transforms           what is done to the features, in this order, before a model sees them; fitted to the training rows
    label_fraction       the share of rows that keep their label, chosen by row number; held-out rows all do. Below 1 it shows
                         what few labels would do, where there are many
    validation_fraction  the share of rows held out, chosen by row number
    cache                "memory" holds on to what was read (a cluster spills what does not fit to its disks), "none" reads
                         again in every pass
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: (
        Literal["digits", "docstrings", "topics", "parquet", "csv", "json", "arrow", "npy", "npz", "pictures", "huggingface"]
        | None
    ) = None
    path: str | Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    split: str | None = None
    subset: str | None = None
    streaming: bool = False
    delimiter: Annotated[str | None, BeforeValidator(_one_character)] = None
    columns: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    image_shape: Annotated[tuple[Side, ...], Field(min_length=2, max_length=3)] | None = None
    label: Annotated[str | tuple[str, ...] | None, BeforeValidator(_name_or_names)] = None
    labels: Annotated[tuple[int | str, ...] | None, BeforeValidator(_distinct_labels)] = None
    text: TextConfig | None = None
    sequence: str | None = None
    order: str | None = None
    weight: str | None = None
    transforms: Steps = ()
    label_fraction: float = Field(default=1.0, gt=0.0, le=1.0)
    validation_fraction: float = Field(default=0.0, ge=0.0, lt=1.0)
    cache: Literal["memory", "none"] = "memory"

    @property
    def label_columns(self) -> tuple[str, ...]:
        if self.label is None:
            return ()
        return (self.label,) if isinstance(self.label, str) else self.label

    @model_validator(mode="after")
    def _labels_belong_to_a_column(self) -> Self:
        if self.labels is not None and not isinstance(self.label, str):
            raise ValueError(
                "labels: of one column of labels, which data.label names"
                + ("; of columns of probabilities they are the columns' names" if self.label else "")
            )
        return self

    @model_validator(mode="after")
    def _a_fraction_is_of_labels(self) -> Self:
        if self.label_fraction < 1.0 and self.label is None:
            raise ValueError("label_fraction: there are no labels to keep; name their column with data.label, or leave it out")
        return self

    @model_validator(mode="after")
    def _order_is_within_sequences(self) -> Self:
        if self.order is not None and self.sequence is None:
            raise ValueError(f"order: '{self.order}' is checked within sequences, whose column of ids data.sequence names")
        return self


class Source(Protocol):
    """Rows 0..num_rows of a data set.

    num_rows     how many there are
    schema       the names and types of the columns
    image_shape  (height, width[, channels]) where the first column is known to hold images, else None
    name         what error messages call it
    paths        the files it reads
    """

    num_rows: int
    paths: tuple[str, ...]
    schema: pa.Schema
    image_shape: tuple[int, ...] | None
    name: str

    def read(self, start: int, stop: int, columns: Sequence[str]) -> pa.Table:
        """These columns of the rows start <= row < stop."""
        ...


def open_source(config: DataConfig) -> Source:
    """The source that a spec's `data:` block names; UserError where there is none."""
    if config.source != "huggingface":
        for field in ("split", "subset", "streaming"):
            if getattr(config, field):
                raise UserError(f"data.{field}: of source huggingface alone; leave it out, or say data.source=huggingface")
    if config.delimiter is not None and config.source in (*EMBEDDED, "huggingface"):
        raise UserError("data.delimiter: of CSV files alone; leave it out")
    if config.source in EMBEDDED:
        if config.path is not None:
            raise UserError(f"data.path: the {config.source} are embedded and have no path; leave it out")
        return EMBEDDED[config.source]()
    if config.path is None:
        raise UserError("data.path is missing: give a file, a folder or a pattern, or `source: digits` for embedded data")
    if config.source == "huggingface":
        if not isinstance(config.path, str):
            raise UserError(f"data.path: {len(config.path)} paths; of source huggingface it is one name or folder")
        return open_huggingface(config.path, config.split, config.subset, config.streaming)
    named = [name for name in (*config.label_columns, config.weight, *(config.columns or ())) if name is not None]
    options: dict[str, dict[str, Any]] = {"csv": {"delimiter": config.delimiter}, "npz": {"named": named}}
    source = open_files([config.path] if isinstance(config.path, str) else config.path, config.source, options)
    if config.delimiter is not None and not isinstance(source, CsvFiles):
        raise UserError("data.delimiter: of CSV files alone; leave it out")
    return source


def missing_data(config: DataConfig) -> str:
    """What is wrong with the local files that the `data:` block names, so far as it is told without reading rows: one that is
    not there, or a column that the first of them lacks. Empty where nothing is."""
    if config.source in EMBEDDED or config.source == "huggingface":
        return ""
    paths = (config.path,) if isinstance(config.path, str) else config.path or ()
    try:
        files = [expand(path, config.source)[0] for path in paths if "://" not in path]
        for file in files:
            check_readable(file)
        if files and is_quick_to_open(files[0], config.source):
            source = open_source(config.model_copy(update={"path": files[0]}))
            if source.num_rows:
                check_columns(source, config)
    except UserError as error:
        return str(error)
    return ""


def check_columns(source: Source, config: DataConfig) -> None:
    """UserError where a column that the `data:` block names is not there, or two are called alike."""
    for what, given in (("columns", source.schema.names), ("data.columns", list(config.columns or ()))):
        twice = [name for name, count in Counter(given).items() if count > 1]
        if twice:
            raise UserError(f"{source.name}: {what} with the same name: {listing(twice)}; each may stand there once")
    for name in (*config.label_columns, config.weight, *(config.columns or ())):
        if name is not None:
            require_column(source, name)


def require_column(source: Source, name: str) -> None:
    if name not in source.schema.names:
        near = get_close_matches(name, source.schema.names, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"there are {listing(source.schema.names)}"
        raise UserError(f"{source.name}: no column '{name}'; {hint}")


def listing(names: Sequence[str], most: int = 12) -> str:
    shown = ", ".join(f"'{name}'" for name in names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def identity(source: Source, config: DataConfig) -> dict[str, Any]:
    """What tells these rows from others without reading them, as plain JSON.

    Of each file, in order: its name, size and time of change, or what its file system knows instead (an ETag, say). Not the
    folder, which another machine may have mounted elsewhere.
    """
    files: list[tuple[Any, ...]] = []
    for path in source.paths:
        if "://" in path:
            system, inside = fsspec.core.url_to_fs(path)
            files.append((path, system.ukey(inside)))
        else:
            status = os.stat(path)
            files.append((os.path.basename(path), status.st_size, status.st_mtime_ns))
    said = config.model_dump(mode="json", exclude={"path", "columns"} if files else {"columns"})
    return {**said, "num_rows": source.num_rows, "files": hashlib.sha256(repr(files).encode()).hexdigest()}
