"""`sample`, `score` and `encode` into files: which rows are made, in which parts, and where they go."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from math import fsum
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from gendist import noise
from gendist.artifact import Artifact, digest, load_artifact
from gendist.blocks import Blocks, Leaves, LocalBlocks
from gendist.bulk.part_folder import PartFolder
from gendist.bulk.parts import (
    Encode,
    Layout,
    Part,
    Values,
    cut_between_sequences,
    cut_into_parts,
    encoder_of,
    sample_layout,
)
from gendist.bulk.single_file import write_file
from gendist.column_names import LABEL, SEQUENCE
from gendist.config import ClusterConfig
from gendist.data import DataConfig, Dataset, Schema, as_rows, as_sequences, identity, open_source
from gendist.data.domains import MakeBlocks
from gendist.data.sequence_source import SequenceSource
from gendist.data.sequences import as_fitted
from gendist.data.sources import Source
from gendist.evaluate.score import density_of, rows_through, scores_of_rows, scores_of_sequences, sequences_through
from gendist.execution import execution
from gendist.protocols import Block, UserError
from gendist.storage import path_here
from gendist.transformed import taken_apart

SPARSE_ROW_BYTES = 1024  # about as much as a row of text comes to

HERE = ClusterConfig()  # in this process

logger = logging.getLogger("gendist")

Watch = Callable[[int, int], None]
Compute = Callable[[Any, Any], tuple[int, Values, Mapping[str, float]]]


@dataclass(frozen=True)
class Written:
    """num_rows: how many there are in `--out`. sums: what they add up to. was_finished: they stood there already. density: of
    what the log densities are, where not of the rows themselves. what: rows, or sequences."""

    num_rows: int
    sums: Mapping[str, float]
    was_finished: bool = False
    density: str = ""
    what: str = "rows"


def sample(
    artifact: str | Path,
    num_samples: int,
    out: str | Path,
    *,
    seed: int = 0,
    offset: int = 0,
    given: Any = None,
    length: int | None = None,
    cluster: ClusterConfig = HERE,
    address: str | None = None,
    watch: Watch = lambda done, num_rows: None,
) -> Written:
    """Write rows, or sequences, offset..offset + num_samples of the endless sample that belongs to the seed.

    A table of sequences has a row for each step, with the numbers of sequence and step, the hidden state and the features; an
    array is (num_samples, length, D).

    out      a file (.npy .npz .parquet .csv), or a folder of Parquet files: what a process that was stopped has left
             unfinished there, the same call goes on with, and it ends in the same bytes
    given    a label or component to draw from alone
    length   of each sequence, in steps; where left out, what the model says. Of models of sequences alone
    address  of a Ray cluster, for `cluster.num_workers` of 1 and more
    watch    called with the number of rows that are written, at first and each time there are more, and of all rows

    UserError where the artifact, the arguments or what stands at `out` do not allow it.
    """
    out = path_here(out, "--out")
    encode = encoder_of(out)
    if num_samples < 1:
        raise UserError(f"num_samples {num_samples}; ask for 1 or more")
    loaded = load_artifact(artifact)
    options = sample_options(loaded.model, length)
    # A mistake is told before anything is begun.
    first = loaded.model.sample(1, seed=seed, offset=offset, given=given, **options)
    num_steps = first.shape[1] if _takes_sequences(loaded.model) else None
    if num_steps is not None:
        options = {"length": num_steps}
    layout, beside = sample_layout(loaded.model, loaded.schema, num_steps, with_beside=not _is_array(out))
    work = _Work(
        request={
            "verb": "sample",
            "artifact": digest(artifact),
            "num_samples": num_samples,
            "seed": seed,
            "offset": offset,
            "given": None if given is None else str(given),
            "columns": list(layout.columns),
            "noise_version": noise.VERSION,
            **options,
        },
        layout=layout,
        parts=cut_into_parts(num_samples, 8 * len(layout.columns) * (num_steps or 1), first_row=offset),
        blocks=lambda make_blocks, parts: make_blocks(_row_ranges, parts, 1, False),
        compute=partial(_draw, seed, given, tuple(beside), options),
        model=loaded.model,
        encode=encode,
    )
    written = work.write(out, cluster, address, watch)
    return written if num_steps is None else replace(written, what="sequences")


def sample_table(
    model: Any,
    schema: Schema,
    num_samples: int,
    *,
    seed: int = 0,
    offset: int = 0,
    given: Any = None,
    length: int | None = None,
) -> pa.Table:
    """What `sample` writes into a table, in memory; of a model and the schema of its rows."""
    options = sample_options(model, length)
    if _takes_sequences(model):
        options = {"length": model.sample(0, **options).shape[1]}
    layout, beside = sample_layout(model, schema, options.get("length"), with_beside=True)
    _, values, _ = _draw(seed, given, tuple(beside), options, model, (offset, offset + num_samples))
    return layout.table(values, offset)


def score(
    artifact: str | Path,
    data: DataConfig,
    out: str | Path,
    *,
    cluster: ClusterConfig = HERE,
    address: str | None = None,
    watch: Watch = lambda done, num_rows: None,
) -> Written:
    """Write the log density of every row of the data, or of every sequence, in nats, in their order; `sums` has the
    log-likelihood, and of sequences how many steps they have.

    Where a family has no more than a bound of it, that is what is written, under its own name. The arguments are those of
    `sample`.
    """
    out = path_here(out, "--out")
    loaded = load_artifact(artifact)
    verb = density_of(loaded.model)
    is_sequence = _takes_sequences(loaded.model)
    layout = Layout((verb,), array=verb, numbered=SEQUENCE if is_sequence else "row")
    compute = _score_sequences if is_sequence else _score
    work = _of_data(artifact, loaded, data, out, layout, compute, {"verb": "score"})
    written = work.write(out, cluster, address, watch)
    described = [
        "" if verb == "log_prob" else f"{verb}: a lower bound of the log density",
        getattr(loaded.model, "density", None),
    ]
    return replace(written, density="; ".join(filter(None, described)), what="sequences" if is_sequence else "rows")


def encode(
    artifact: str | Path,
    data: DataConfig,
    out: str | Path,
    *,
    draw: int | None = None,
    cluster: ClusterConfig = HERE,
    address: str | None = None,
    watch: Watch = lambda done, num_rows: None,
) -> Written:
    """Write the representation of every row of the data, in their order, as columns latent_0, latent_1, ..., and beside it the
    row's weight where `data.weight` names one. A model that encodes rows of a known class alone is told it by `data.label`.

    draw  the seed of draws from p(latent | x), one a row, instead of its mean: of families that have `draw_latents` alone

    The other arguments are those of `score`.
    """
    out = path_here(out, "--out")
    loaded = load_artifact(artifact)
    model: Any = loaded.model
    _require(model, "encode")
    if _takes_sequences(model):
        raise UserError("encode: models of sequences encode each step, in Python: gendist.load(...).encode(sequences)")
    if draw is not None and not hasattr(_untransformed(model), "draw_latents"):
        raise UserError(f"draw: a {loaded.family} has no distribution of latents to draw from; leave it out")
    encodes_given = getattr(_untransformed(model), "encodes_given", False)
    if encodes_given and data.label is None:
        raise UserError("encode: it encodes rows of a class that is known; name the column of their labels with data.label")
    kept: dict[str, Any] = {"weight": data.weight}
    if encodes_given:
        kept["label"] = data.label
        kept["labels"] = model.labels if isinstance(data.label, str) else None
    encode_part = partial(_encode, draw, encodes_given)

    def layout(first_row: Sequence[Block]) -> Layout:
        num_latents = encode_part(model, first_row)[1].shape[1] - (data.weight is not None)
        latents = (f"latent_{i}" for i in range(num_latents))
        return Layout((*latents, *([data.weight] if data.weight is not None else [])), array="latents")

    request = {"verb": "encode", "draw": draw, "noise_version": noise.VERSION}
    work = _of_data(artifact, loaded, data, out, layout, encode_part, request, kept)
    return work.write(out, cluster, address, watch)


def classify(
    artifact: str | Path,
    data: DataConfig,
    out: str | Path,
    *,
    cluster: ClusterConfig = HERE,
    address: str | None = None,
    watch: Watch = lambda done, num_rows: None,
) -> Written:
    """Write the most probable label of every row of the data, or of every sequence, in their order, as a column `label`, and
    the probability of each label beside it, as `p_LABEL`. The arguments are those of `score`."""
    out = path_here(out, "--out")
    loaded = load_artifact(artifact)
    model = loaded.model
    _require(model, "classify")
    is_sequence = _takes_sequences(model)
    numbers = (SEQUENCE,) if is_sequence else ()
    layout = Layout(
        (*numbers, LABEL, *(f"p_{label}" for label in model.labels)),
        array="classes",
        categories={LABEL: model.labels},
        integers=numbers,
    )
    compute = _classify_sequences if is_sequence else _classify
    written = _of_data(artifact, loaded, data, out, layout, compute, {"verb": "classify"}).write(out, cluster, address, watch)
    return replace(written, what="sequences" if is_sequence else "rows")


def impute(
    artifact: str | Path,
    data: DataConfig,
    out: str | Path,
    *,
    draw: int | None = None,
    cluster: ClusterConfig = HERE,
    address: str | None = None,
    watch: Watch = lambda done, num_rows: None,
) -> Written:
    """Write every row of the data, in their order, its missing entries filled in: with what is expected of them given the
    others. Of texts that the fit has not seen none is known, and they are left out; `sums` has their number, as num_unknown.

    draw  the seed of draws from what they may be, instead

    The other arguments are those of `score`.
    """
    out = path_here(out, "--out")
    loaded = load_artifact(artifact)
    _require(loaded.model, "impute")
    if _takes_sequences(loaded.model):
        raise UserError("impute: models of sequences fill in steps, in Python: gendist.load(...).impute(sequences)")
    layout, _ = sample_layout(loaded.model, loaded.schema, None, with_beside=False)
    request = {"verb": "impute", "draw": draw, "noise_version": noise.VERSION}
    known = [len(layout.categories[name]) if name in layout.categories else None for name in layout.columns]
    work = _of_data(artifact, loaded, data, out, layout, partial(_impute, draw, known), request)
    return work.write(out, cluster, address, watch)


def _require(model: Any, verb: str) -> None:
    if verb in model.not_offered:
        raise UserError(f"{verb}: {model.not_offered[verb]}")


def _of_data(
    artifact: str | Path,
    loaded: Artifact,
    data: DataConfig,
    out: Path,
    layout: Layout | Callable[[Sequence[Block]], Layout],
    compute: Compute,
    request: Mapping[str, Any],
    kept: Mapping[str, Any] = MappingProxyType({}),
) -> _Work:
    """What is computed from every row of the data by a model that knows their columns.

    layout  or what tells it from the first row
    kept    what is said of labels and weights, which otherwise are not read
    """
    transforms = taken_apart(loaded.model)[1]
    if data.transforms not in ((), transforms.declared if transforms else ()):
        raise UserError(f"data.transforms: those of {artifact} are part of it and are applied; leave others out")
    opened = open_source(data)
    _check_beside_the_data(out, data, opened.paths)
    columns = data.columns or loaded.schema.columns_in(opened.schema.names)
    ignored = {"label": None, "labels": None, "weight": None, "label_fraction": 1.0, "validation_fraction": 0.0}
    config = data.model_copy(update={"columns": columns, **ignored, **kept})
    if unused := [f"data.{name}" for name, value in ignored.items() if name not in kept and getattr(data, name) != value]:
        logger.warning("every row counts once: %s %s no part in this", ", ".join(unused), "has" if len(unused) == 1 else "have")
    source: Source = opened
    if _takes_sequences(loaded.model):
        config = as_fitted(config, opened, loaded.schema)
        source = as_sequences(opened, config)
    else:
        as_rows(opened, config)
    schema = Schema.of(source, config, known=loaded.schema)
    if schema.num_features != loaded.model.num_features:
        raise UserError(
            f"{source.name}: {schema.num_features} features, but the model has {loaded.model.num_features} "
            f"({', '.join(loaded.schema.columns[:8])}); choose columns with data.columns=[...]"
        )
    row_bytes = SPARSE_ROW_BYTES if schema.is_sparse else 8 * schema.num_features
    is_sequence = isinstance(source, SequenceSource)
    if isinstance(source, SequenceSource):
        parts = cut_between_sequences(source.bounds, row_bytes)
    else:
        parts = cut_into_parts(source.num_rows, row_bytes, leaf_rows=schema.leaves(source.num_rows).bounds[1])

    def blocks(make_blocks: MakeBlocks, some: Leaves) -> Blocks[Any]:
        dataset = Dataset.open(source, config, schema, make_blocks)
        return dataset.sequence_parts(some) if is_sequence else dataset.parts(some)

    if not isinstance(layout, Layout):
        layout = layout(next(iter(blocks(LocalBlocks, Leaves((0, 1))).map_runs(_only_leaf, None))))
    return _Work(
        request={
            **request,
            "artifact": digest(artifact),
            "columns": list(schema.columns),
            "data": identity(source, config),
        },
        layout=layout,
        parts=parts,
        blocks=blocks,
        compute=compute,
        model=loaded.model,
        encode=encoder_of(out),
    )


def sample_options(model: Any, length: int | None) -> dict[str, Any]:
    """What `model.sample` is to be told beside number, seed and label; UserError where it makes no sequences."""
    if length is None:
        return {}
    if not _takes_sequences(model):
        raise UserError(f"length {length}: of models of sequences alone; leave it out")
    if length < 1:
        raise UserError(f"length {length}; ask for 1 step or more")
    return {"length": length}


@dataclass(frozen=True)
class _Work:
    """Rows that are made part by part.

    request  all that they depend on
    parts    part i is the rows bounds[i] to bounds[i + 1]
    blocks   of some of the parts, made by `execution`: what a part is computed from
    compute  (model, what a part is computed from) -> its first row, its values, and sums of them
    """

    request: dict[str, Any]
    layout: Layout
    parts: Leaves
    blocks: Callable[[MakeBlocks, Leaves], Blocks[Any]]
    compute: Compute
    model: Any
    encode: Encode

    @property
    def num_rows(self) -> int:
        return self.parts.bounds[-1] - self.parts.bounds[0]

    def write(self, out: Path, cluster: ClusterConfig, address: str | None, watch: Watch) -> Written:
        if out.suffix:
            sums: list[Mapping[str, float]] = []
            with execution(cluster, address) as make_blocks:
                write_file(self._make(make_blocks, sums, watch), out, self.layout, self.num_rows)
            return Written(self.num_rows, _total(sums))
        folder = PartFolder(out, {**self.request, "part_rows": self.parts.bounds[1] - self.parts.bounds[0]}, self.parts)
        result = folder.result()
        if result is not None:
            return Written(self.num_rows, result, was_finished=True)
        with folder.held() as sums:
            if len(sums) < self.parts.num_leaves:
                with execution(cluster, address) as make_blocks:
                    for part in self._make(make_blocks, sums, watch):
                        folder.add(len(sums), part)
            folder.finish(_total(sums))
        return Written(self.num_rows, _total(sums))

    def _make(self, make_blocks: MakeBlocks, sums: list[Mapping[str, float]], watch: Watch) -> Iterator[Part]:
        """The parts that lack sums, in order. Once whoever iterates has written a part, its sums are added to the others."""
        bounds = self.parts.bounds[len(sums) :]
        watch(bounds[0] - self.parts.bounds[0], self.num_rows)
        make_part = partial(_make_part, self.compute, self.encode, self.layout)
        parts = self.blocks(make_blocks, Leaves(bounds)).map_runs(make_part, self.model)
        for part, stop in zip(parts, bounds[1:], strict=True):
            yield part
            sums.append(part.sums)
            watch(stop - self.parts.bounds[0], self.num_rows)


def _make_part(compute: Compute, encode: Encode, layout: Layout, model: Any, leaves: Sequence[Any]) -> Part:
    (leaf,) = leaves  # a part is a leaf of its own, whatever the number of workers
    first_row, values, sums = compute(model, leaf)
    return Part(encode(layout, values, first_row, sums), sums)


def _row_ranges(bounds: Sequence[int]) -> list[tuple[int, int]]:
    return list(pairwise(bounds))


def _draw(
    seed: int, given: Any, beside: Sequence[str], options: Mapping[str, Any], model: Any, rows: tuple[int, int]
) -> tuple[int, Values, Mapping[str, float]]:
    """beside: the verbs whose values stand beside x, one a row, or one a step or sequence."""
    start, stop = rows
    which = {"seed": seed, "offset": start, "given": given}
    x = model.sample(stop - start, **which, **options)
    # Files hold float64, in whatever precision a family computes.
    columns = [_dense(x).double().numpy()]
    for verb in beside:
        own_options = options if verb == "sample_states" else {}
        values = getattr(_untransformed(model), verb)(stop - start, **which, **own_options).double().numpy()
        each_step = values if values.ndim == columns[0].ndim - 1 else values[:, None]
        columns.append(np.broadcast_to(each_step, columns[0].shape[:-1])[..., None])
    return start, np.concatenate(columns, axis=-1), {}


def _takes_sequences(model: Any) -> bool:
    return getattr(type(_untransformed(model)), "takes_sequences", False)


def _untransformed(model: Any) -> Any:
    return taken_apart(model)[0]


def _is_array(out: str | Path) -> bool:
    return Path(out).suffix.lower() in (".npy", ".npz")


def _score(model: Any, blocks: Sequence[Block]) -> tuple[int, Values, Mapping[str, float]]:
    scores_N = scores_of_rows(model, blocks).numpy()
    return int(blocks[0].rows[0]), scores_N, {"log_likelihood": float(scores_N.sum())}


def _score_sequences(model: Any, part: tuple[int, Sequence[Block]]) -> tuple[int, Values, Mapping[str, float]]:
    first, blocks = part
    scores_S = scores_of_sequences(model, blocks, first).numpy()
    return (
        first,
        scores_S,
        {"log_likelihood": float(scores_S.sum()), "num_steps": float(sum(block.num_rows for block in blocks))},
    )


def _encode(
    draw: int | None, encodes_given: bool, model: Any, blocks: Sequence[Block]
) -> tuple[int, Values, Mapping[str, float]]:
    parts = []
    for block in blocks:
        options = {"given": _labels_of(model, block)} if encodes_given else {}
        verb = model.encode if draw is None else partial(model.draw_latents, seed=draw)
        latents_NL = rows_through(partial(verb, **options), [block], addressed=draw is not None).double()
        parts.append(latents_NL if block.weights is None else torch.cat([latents_NL, block.weights[:, None]], 1))
    return int(blocks[0].rows[0]), torch.cat(parts).numpy(), {}


def _classify(model: Any, blocks: Sequence[Block]) -> tuple[int, Values, Mapping[str, float]]:
    return int(blocks[0].rows[0]), _label_and_probs(rows_through(model.classify, blocks)), {}


def _classify_sequences(model: Any, part: tuple[int, Sequence[Block]]) -> tuple[int, Values, Mapping[str, float]]:
    first, blocks = part
    classes = _label_and_probs(sequences_through(model.classify, blocks, first))
    return first, np.column_stack([np.arange(first, first + len(classes)), classes]), {}


def _label_and_probs(log_probs_NC: torch.Tensor) -> Values:
    """(N, 1 + C) the index of the most probable label, and the probability of each."""
    return torch.cat([log_probs_NC.argmax(1, keepdim=True), log_probs_NC.exp()], 1).numpy()


def _impute(
    draw: int | None, known: Sequence[int | None], model: Any, blocks: Sequence[Block]
) -> tuple[int, Values, Mapping[str, float]]:
    """known: of each column of texts, how many the fit has seen."""

    def filled(x_ND: torch.Tensor, offset: int) -> torch.Tensor:
        return _dense(model.impute(x_ND, seed=draw, offset=offset))

    x_ND = rows_through(filled, blocks, addressed=True).double().numpy()
    unknown = sum(int((x_ND[:, d] >= number).sum()) for d, number in enumerate(known) if number is not None)
    return int(blocks[0].rows[0]), x_ND, {"num_unknown": float(unknown)}


def _dense(x: torch.Tensor) -> torch.Tensor:
    return x.to_dense() if x.is_sparse_csr else x


def _labels_of(model: Any, block: Block) -> list[Any]:
    """UserError, with its number, where a row of any weight has none; of weight 0, for which any will do, it has the first."""
    known_N = block.has_one_latent | (block.weights_or_ones() == 0)
    if not bool(known_N.all()):
        raise UserError(f"row {int(block.rows[int((~known_N).nonzero()[0])])}: no label, which the encoder is to be given")
    assert block.evidence is not None
    return [model.labels[c] for c in block.evidence.argmax(1).tolist()]


def _only_leaf(_: None, leaves: Sequence[Any]) -> Any:
    (leaf,) = leaves
    return leaf


def _total(sums: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: fsum(each[name] for each in sums) for name in sums[0]}


def _check_beside_the_data(out: Path, data: DataConfig, files: Sequence[str]) -> None:
    """UserError where what is written would stand for the data, or among them."""
    there = out.resolve()
    if str(there) in map(os.path.realpath, files):
        raise UserError(f"--out {out}: the data themselves; choose another file")
    if out.suffix:
        return
    for path in [data.path] if isinstance(data.path, str) else data.path or ():
        if os.path.isdir(path) and there.is_relative_to(os.path.realpath(path)):
            raise UserError(f"--out {out}: lies inside the data ({path}), and would be read with them; choose another folder")
