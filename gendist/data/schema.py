"""What the columns of a source mean: which make x, what the features are called, whether they are the pixels of an image."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from gendist.blocks import Leaves
from gendist.data.column_types import as_texts, is_image, is_list, is_numeric, is_sparse, is_text, type_of_entries
from gendist.data.domains import Domains
from gendist.data.matrix import entry_shape
from gendist.data.memory import array_shape_of
from gendist.data.npz import NpzFiles
from gendist.data.sequence_source import NestedSequences, SequenceSource
from gendist.data.sources import DataConfig, Source, check_columns, listing, require_column
from gendist.data.sparse import width_of
from gendist.data.tokens import TextConfig, holds_tokens, vocabulary
from gendist.protocols import Feature, UserError


@dataclass(frozen=True)
class Takes:
    """What a family takes beside columns of numbers.

    categories  columns of text, as the index of each entry's value
    sparse      sparse rows
    """

    categories: bool = False
    sparse: bool = False

    @classmethod
    def of(cls, family: Any) -> Takes:
        """What the class of a family says of itself."""
        return cls(getattr(family, "takes_categories", False), getattr(family, "takes_sparse", False))


NUMBERS_ALONE = Takes()
ROWS_TO_LOOK_AT = 1000  # of texts that might have been numbers
MAX_OTHERS = 3  # different texts among these that stand for what is missing


class Schema(BaseModel):
    """What makes a row of x; kept in the artifact, so that `score` reads the same columns and `sample` names them.

    columns        columns of the source, in order; a column may hold a list or an image
    feature_names  one a feature
    image_shape    (height, width[, channels]) where x is the pixels of one image, or, of sequences, of one of its rows
    categories     of each column of text the values that the data have, in order: x is the index of one of them, or their
                   number for any other text
    is_sparse      whether rows are sparse, of one column
    text           how that column's texts become counts of the features, which are tokens; or, of sequences, how they become
                   sequences of them
    is_sequence    whether a row is a step of a sequence. An image is then the sequence of its rows of pixels
    sequence, order   the columns of ids, and of what ascends, where the data have them
    types, widths  of each column, what it holds and how many features it makes, where that is not one number of type "real".
                   Not kept: the same rows have other types in files of another format
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    columns: tuple[str, ...]
    feature_names: tuple[str, ...]
    image_shape: tuple[int, ...] | None = None
    categories: dict[str, tuple[str, ...]] = {}
    is_sparse: bool = False
    text: TextConfig | None = None
    is_sequence: bool = False
    sequence: str | None = None
    order: str | None = None
    types: dict[str, Literal["real", "integer", "boolean", "category"]] = Field(default={}, exclude=True)
    widths: dict[str, int] = Field(default={}, exclude=True)

    @model_validator(mode="after")
    def _image_has_the_features(self) -> Self:
        if self.image_shape is not None:
            pixels = self.image_shape[1:] if self.is_sequence else self.image_shape
            if prod(pixels) != self.num_features:
                raise ValueError(f"an image of shape {self.image_shape} does not have {self.num_features} pixels")
        if not set(self.categories) <= set(self.columns):
            raise ValueError(f"categories of {', '.join(self.categories)}, columns {', '.join(self.columns)}")
        return self

    @property
    def num_features(self) -> int:
        return len(self.feature_names)

    @property
    def features(self) -> tuple[Feature, ...]:
        """What each column of x is."""
        types = self.types | dict.fromkeys(self.categories, "category")
        if len(self.columns) == 1:
            columns = [self.columns[0]] * self.num_features
        else:
            columns = [name for name in self.columns for _ in range(self.widths.get(name, 1))]
            if len(columns) != self.num_features:  # read from an artifact
                columns = list(self.feature_names)
        return tuple(
            Feature(name, column, types.get(column, "real"), len(self.categories.get(column, ())))
            for name, column in zip(self.feature_names, columns, strict=True)
        )

    @property
    def columns_to_survey(self) -> tuple[str, ...]:
        """Those of text whose values are not known yet."""
        if self.is_sparse:
            return ()
        return tuple(name for name, type_ in self.types.items() if type_ == "category" and name not in self.categories)

    @property
    def needs_features(self) -> bool:
        """Whether all rows must be looked at to know how many features there are."""
        return not self.feature_names

    def columns_in(self, there: Sequence[str]) -> tuple[str, ...] | None:
        """Those to read of the columns of other data: the ones that were fitted. An array has no names and is taken by position
        (None: see `of`); of a model that was fitted to one, `sample` has written a column for each feature."""
        if len(there) == 1:
            return None
        are_features = not set(self.columns) <= set(there) and set(self.feature_names) <= set(there)
        return self.feature_names if are_features else self.columns

    def leaves(self, num_rows: int) -> Leaves:
        """Where so many rows are cut."""
        return Leaves.of_sparse_rows(num_rows) if self.is_sparse else Leaves.of_shape(num_rows, self.num_features)

    @classmethod
    def of(cls, source: Source, config: DataConfig, takes: Takes = NUMBERS_ALONE, known: Schema | None = None) -> Schema:
        """The schema that the source's columns, its first row and the `data:` block make.

        known   of a model that is to read these rows as those that it was fitted to; as many columns, in the same order
        """
        if source.num_rows == 0:
            raise UserError(f"{source.name}: the data set is empty")
        check_columns(source, config)
        if known is not None:
            takes = Takes(categories=bool(known.categories), sparse=known.is_sparse)
        is_sequence = isinstance(source, SequenceSource)
        if is_sequence:
            text = None  # its tokens are steps, which the source has made of it
        else:
            text = _text_of(source, config, known)
        columns = config.columns or ((text.column,) if text else _default_columns(source, config, takes))
        if known is not None and config.columns is None:
            _check_name(source, known)
        sparse = [name for name in columns if is_sparse(source.schema.field(name).type)]
        if sparse and is_sequence:
            raise UserError(f"{source.name}: column '{sparse[0]}' holds sparse rows; the steps of sequences are dense: choose "
                            "columns of numbers with data.columns")  # fmt: skip
        if text or (known and known.is_sparse) or sparse:
            return cls._of_sparse_rows(source, config, takes, known, columns, text)
        categories = _renamed(known.categories, known.columns, columns) if known else {}
        for name in columns:
            takes_text = name in categories or (takes.categories and known is None)
            if is_text(source.schema.field(name).type) and not takes_text:
                raise UserError(_not_numeric(source, name, columns))
            if is_text(source.schema.field(name).type):
                for obstacle in filter(None, (step.obstacle_to_texts(name) for step in config.transforms)):
                    raise UserError(f"{source.name}: data.transforms: column '{name}' holds texts, which {obstacle}")
        first_row = source.read(0, 1, columns)
        names: list[str] = []
        shapes = [entry_shape(first_row, name, source.name) for name in columns]
        for name, shape in zip(columns, shapes, strict=True):
            names += [name] if shape == () else [f"{name}_{i}" for i in range(prod(shape))]
        twice = [name for name, count in Counter(names).items() if count > 1]
        if twice:
            raise UserError(f"{source.name}: two features would be called {listing(twice)}; rename a column")
        if not names:
            raise UserError(f"{source.name}: column '{columns[0]}' holds empty lists; there is nothing to fit")
        image_shape = None
        if len(columns) == 1:
            field = source.schema.field(columns[0])
            image_shape = shapes[0] if is_image(field.type) else source.image_shape
            array_shape = array_shape_of(field)
            if image_shape is None and not is_sequence and array_shape is not None and len(array_shape) in (2, 3):
                image_shape = array_shape
            if image_shape is not None and prod(image_shape[1:] if is_sequence else image_shape) != len(names):
                image_shape = None
        if config.image_shape is not None:
            image_shape = _said_image_shape(source, config.image_shape, image_shape, len(names), is_sequence)
        types = {name: type_of_entries(source.schema.field(name).type) for name in columns}
        return cls(
            columns=tuple(columns),
            feature_names=tuple(names),
            image_shape=image_shape,
            categories=categories,
            text=config.text if is_sequence else None,
            is_sequence=is_sequence,
            sequence=config.sequence,
            order=config.order,
            types={name: type_ for name, type_ in types.items() if type_ != "real"},
            widths={name: prod(shape) for name, shape in zip(columns, shapes, strict=True) if shape != ()},
        )

    @classmethod
    def _of_sparse_rows(
        cls,
        source: Source,
        config: DataConfig,
        takes: Takes,
        known: Schema | None,
        columns: Sequence[str],
        text: TextConfig | None,
    ) -> Schema:
        """The features are those that are known or that the column says; else none, until all rows have been looked at."""
        sparse = [name for name in columns if is_sparse(source.schema.field(name).type)]
        name = sparse[0] if sparse else columns[0]
        where = f"{source.name}: column '{name}'"
        holds = "holds texts, whose counts are sparse" if text else "holds sparse rows"
        if len(columns) > 1:
            others = [other for other in columns if other != name]
            raise UserError(f"{where} {holds}; such a column is fitted alone: leave out {listing(others)} (data.columns)")
        if not takes.sparse:
            which = "this family takes dense rows alone" if known is None else "the model was fitted to dense ones"
            raise UserError(f"{where} {holds}, but {which}; choose columns of numbers with data.columns")
        if config.transforms:
            raise UserError(f"{where} {holds}, which data.transforms cannot transform; leave one of both out")
        names: tuple[str, ...] = ()
        if known is not None:
            names = known.feature_names
        elif text is not None:
            names = _numbered("hash", text.hash_buckets)
        else:
            names = _numbered(name, width_of(source.schema.field(name)) or 0)
        return cls(columns=(name,), feature_names=names, is_sparse=True, text=text)

    def completed(self, found: Domains, where: str) -> Schema:
        """The schema with what was found in all rows: the values of columns of text, and the features of sparse rows."""
        categories = {name: tuple(sorted(values)) for name, values in found.categories.items()}
        names = self.feature_names
        if self.needs_features:
            names = vocabulary(found.tokens, self.text, where) if self.text else _numbered(self.columns[0], found.width)
            if not names:
                raise UserError(f"{where} holds sparse rows without entries; there is nothing to fit")
        return self.model_copy(update={"categories": self.categories | categories, "feature_names": names})


def _text_of(source: Source, config: DataConfig, known: Schema | None) -> TextConfig | None:
    """How texts are to be counted, if they are: as the model does that is to read them, or as the spec says."""
    text = config.text
    if known is not None and known.text is not None:
        names = config.columns or ((text.column,) if text else source.schema.names)
        name = names[0] if len(names) == 1 else known.columns[0]
        require_column(source, name)
        if is_sparse(source.schema.field(name).type):
            return None  # counts already, as a sample of the model has them
        as_known = known.text.model_copy(update={"column": name})
        if text not in (None, as_known):
            raise UserError(f"data.text: the model has counted tokens otherwise ({as_known}); leave it out")
        text = as_known
    if text is None:
        return None
    require_column(source, text.column)
    if config.columns not in (None, (text.column,)):
        raise UserError(f"data.columns: {listing(config.columns)}; with data.text its column '{text.column}' is fitted alone")
    type_ = source.schema.field(text.column).type
    if not holds_tokens(type_):
        raise UserError(
            f"{source.name}: column '{text.column}' holds {type_}; data.text counts tokens, of texts or lists of them"
        )
    return text


def _numbered(name: str, number: int) -> tuple[str, ...]:
    return tuple(f"{name}_{i}" for i in range(number))


def _renamed(
    categories: Mapping[str, tuple[str, ...]], columns: Sequence[str], here: Sequence[str]
) -> dict[str, tuple[str, ...]]:
    """By the names that the columns have here, where there are as many of them."""
    names = dict(zip(columns, here, strict=True)) if len(columns) == len(here) else {}
    return {names[name]: values for name, values in categories.items() if name in names}


def _check_name(source: Source, known: Schema) -> None:
    """UserError where a column of numbers or categories stands alone and is called otherwise than the one that was fitted.

    What Python or a .npy file has no name for is called x, as the model's own column may be. Lists, images, sparse rows and
    texts that are taken apart are told from others by what they are.
    """
    name, *others = source.schema.names
    has_no_name = "x" in (name, *known.columns)
    if others or has_no_name or name in (*known.columns, *known.feature_names) or isinstance(source, NestedSequences):
        return
    type_ = source.schema.field(name).type
    if (is_numeric(type_) and not is_list(type_)) or (is_text(type_) and known.categories):
        raise UserError(
            f"{source.name}: no column {listing(known.columns)}, to which the model was fitted, but '{name}'; rename it, or "
            f"say data.columns=[{name}] where it holds the same"
        )


def _default_columns(source: Source, config: DataConfig, takes: Takes) -> tuple[str, ...]:
    """Every column but label and weight; the column of images, of sparse rows, or of a .npz file's one array of more than one
    axis, alone where there is one."""
    names = [name for name in source.schema.names if name not in (*config.label_columns, config.weight)]
    images = [name for name in names if is_image(source.schema.field(name).type)]
    if source.image_shape is not None:
        images = names[:1]
    opened = source.source if isinstance(source, SequenceSource) else source
    if isinstance(opened, NpzFiles) and opened.matrix is not None and opened.matrix in names:
        return (opened.matrix,)
    images = images or [name for name in names if is_sparse(source.schema.field(name).type)]
    if len(images) == 1:
        return (images[0],)
    if not names:
        raise UserError(f"{source.name}: no column is left to fit")
    for name in names:
        type_ = source.schema.field(name).type
        if not is_numeric(type_) and not (takes.categories and is_text(type_)):
            raise UserError(_not_numeric(source, name, names))
    return tuple(names)


def _said_image_shape(
    source: Source, said: tuple[int, ...], found: tuple[int, ...] | None, num_features: int, is_sequence: bool
) -> tuple[int, ...]:
    """What data.image_shape says, where rows can be such images."""
    has = f"images of {list(found)}" if found else f"{num_features} features a row"
    if is_sequence or prod(said) != num_features or (found is not None and found != said):
        raise UserError(
            f"data.image_shape: {list(said)}, but {source.name} has {'sequences' if is_sequence else has}; leave it out, or "
            "resize the images"
        )
    return said


def _not_numeric(source: Source, name: str, names: Sequence[str]) -> str:
    numeric = [name for name in names if is_numeric(source.schema.field(name).type)]
    hint = f"such as data.columns=[{','.join(numeric[:12])}]" if numeric else "but none is"
    type_ = source.schema.field(name).type
    almost = _almost_numbers(source, name) if is_text(type_) else ""
    return f"{source.name}: column '{name}' is not numeric ({type_}{almost}); choose columns that are, {hint}"


def _almost_numbers(source: Source, name: str) -> str:
    """What keeps the first texts of a column from being numbers, where that is little."""
    first = source.read(0, min(source.num_rows, ROWS_TO_LOOK_AT), [name]).column(name)
    texts = [text for text in as_texts(first).unique().to_pylist() if text is not None]
    others = [text for text in texts if not _is_number(text)]
    if 0 < len(others) <= MAX_OTHERS and 2 * len(others) < len(texts):
        return f": numbers but for {listing(others)}; what is missing is left empty"
    if any("," in text for text in others) and all(_is_number(text.replace(",", ".")) for text in texts):
        return f": numbers with a comma, such as {others[0]}; decimals begin with a point"
    return ""


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
