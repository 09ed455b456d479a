"""Rows at random access, for training: files of one machine that all of its processes map, made anew from the source.

    KEY/training/x.npy         (N, D) float32, behind the transforms
    KEY/training/rows.npy      (N,) int64: the row numbers in the whole data set
    KEY/training/weights.npy   (N,) float32, where there are weights
    KEY/training/evidence.npy  (N, L) float32, where there are labels

A folder appears whole or not at all. It may be larger than memory. The last process that needs it removes it; after a
crash it stays, and the run that goes on takes it as it is.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from gendist.atomic import new_folder
from gendist.blocks import Blocks, reduce
from gendist.data.dataset import Dataset, Part
from gendist.data.survey import Summary, summarize
from gendist.protocols import Block, LabelCounts, UserError, is_labelled

FORMAT = 2  # of the files; part of the key
ROWS_AT_ONCE = 1 << 16
LOOK_S = 0.05  # how often who waits for the files looks for them

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class RowSet:
    """Rows that are mapped into memory. Empty columns are None."""

    x: Array
    rows: Array
    weights: Array | None = None
    evidence: Array | None = None

    @property
    def num_rows(self) -> int:
        return len(self.rows)

    def take(self, indices: Tensor) -> Block:
        """The rows at these places, in this order, as a block of float32 whose tensors own their memory."""
        places = indices.numpy()
        x, rows, weights, evidence = (
            None if values is None else torch.from_numpy(np.take(values, places, axis=0))
            for values in (self.x, self.rows, self.weights, self.evidence)
        )
        assert x is not None
        assert rows is not None
        return Block(x, rows, weights, evidence)

    def label_counts(self) -> LabelCounts:
        """What the rows say of their classes; of rows with evidence alone."""
        evidence, weights = self.evidence, self.weights
        assert evidence is not None

        def of(start: int) -> LabelCounts:
            some = torch.from_numpy(evidence[start : start + ROWS_AT_ONCE].copy())
            ones = torch.ones(len(some), dtype=torch.float64)
            return LabelCounts.of(
                some, ones if weights is None else torch.from_numpy(weights[start : start + ROWS_AT_ONCE].copy()).double()
            )

        return functools.reduce(LabelCounts.merge, map(of, range(0, self.num_rows, ROWS_AT_ONCE)))

    def labelled(self) -> Tensor:
        """(L,) int64: the places of the rows of which something is known, in ascending order."""
        if self.evidence is None:
            return torch.empty(0, dtype=torch.int64)
        parts = [
            start + np.flatnonzero(is_labelled(self.evidence[start : start + ROWS_AT_ONCE]))
            for start in range(0, self.num_rows, ROWS_AT_ONCE)
        ]
        return torch.from_numpy(np.concatenate(parts).astype(np.int64))


@dataclass(frozen=True)
class RowsOnDisk:
    """What makes the files of one data set, the same on every machine.

    dataset       whose blocks are read in this process
    num_latents   the width of the evidence
    seed          which tells the parts apart
    fingerprints  of each part that is wanted, before the transforms, as `survey` has it
    """

    dataset: Dataset
    num_latents: int
    seed: int
    fingerprints: Mapping[Part, bytes]

    @property
    def key(self) -> str:
        """What the files depend on."""
        digest = hashlib.sha256(repr((FORMAT, self.num_latents, sorted(self.fingerprints.items()))).encode())
        transforms = self.dataset.transforms
        if transforms is not None:
            digest.update(repr(transforms.declared).encode())
            for name, values in sorted(transforms.tensors().items()):
                digest.update(name.encode() + values.contiguous().numpy().tobytes())
        return digest.hexdigest()[:32]

    @contextmanager
    def opened(self, alive: Callable[[], None] = lambda: None) -> Iterator[dict[Part, RowSet]]:
        """The rows of each part; whichever process of a machine comes first makes the files, and the others wait for it.

        alive  called now and then while they are made, by this process or another

        UserError where this machine reads other rows than those that the fingerprints are of.
        """
        folder = _cache() / self.key
        lock = _Lock(folder.with_name(f"{folder.name}.lock"), alive)
        with lock.shared(folder.exists, lambda: self._make(folder, alive)):
            yield {part: _mapped(folder / part) for part in self.fingerprints}
            if lock.is_last():
                shutil.rmtree(folder, ignore_errors=True)
                lock.path.unlink(missing_ok=True)

    def _make(self, folder: Path, alive: Callable[[], None]) -> None:
        with new_folder(folder) as inside:
            for part, fingerprint in self.fingerprints.items():
                self._write(part, fingerprint, inside / part, alive)

    def _write(self, part: Part, fingerprint: bytes, folder: Path, alive: Callable[[], None]) -> None:
        folder.mkdir()
        plain = replace(self.dataset, transforms=None)
        summary = _written(plain.blocks(self.num_latents, part, self.seed, keep=False), self._transformed, folder, alive)
        if summary.fingerprint != fingerprint:
            raise UserError(
                f"{self.dataset.source.name}: {os.uname().nodename} reads other rows than the machine that began this run; "
                "put the same data everywhere, and leave them alone while it runs"
            )

    def _transformed(self, block: Block) -> Block:
        return block if self.dataset.transforms is None else self.dataset.transforms.apply(block)


def _written(blocks: Blocks[Block], transformed: Callable[[Block], Block], folder: Path, alive: Callable[[], None]) -> Summary:
    """Write the rows of the blocks; returns their survey."""
    with ExitStack() as opened:
        files: dict[str, _NpyFile] = {}

        def write(_: None, block: Block) -> Summary:
            behind = transformed(block)
            columns = {"x": behind.x, "rows": behind.rows, "weights": behind.weights, "evidence": behind.evidence}
            for name, values in columns.items():
                if values is None:
                    continue
                array = _narrow(values.numpy(), behind) if values.is_floating_point() else values.numpy()
                if name not in files:
                    files[name] = opened.enter_context(_NpyFile(folder / f"{name}.npy", array))
                files[name].append(array)
            alive()
            return summarize(None, block)

        return reduce(write, blocks, None)  # in this process, leaf by leaf, so that rows come in order


def _narrow(values: Array, block: Block) -> Array:
    """float32; UserError where it does not hold a number."""
    with np.errstate(over="ignore"):
        narrow: Array = values.astype(np.float32)
    too_large = np.isinf(narrow) & np.isfinite(values)
    if too_large.any():
        where = tuple(np.argwhere(too_large)[0])
        what = f"feature {where[1]}" if values.ndim == 2 else "the weight"
        raise UserError(
            f"row {int(block.rows[where[0]])}: {what} is {values[where]:g}, which float32 does not hold; rescale it, such as "
            "with data.transforms: [standardize]"
        )
    return narrow


class _NpyFile:
    """A .npy file whose number of rows is known in the end. A full disk is an OSError, which a mapped file would not raise."""

    def __init__(self, path: Path, like: Array) -> None:
        self._file, self._path, self._like, self._num_rows = path.open("wb"), path, like[:0], 0
        self._write_header()

    def __enter__(self) -> _NpyFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Where all went well, the header is put right and the file is on disk."""
        with self._room(), self._file:
            if error is None:
                self._file.seek(0)
                self._write_header()
                self._file.flush()
                os.fsync(self._file.fileno())

    def _write_header(self) -> None:
        # As many bytes whatever the number of rows: NumPy leaves room for it to grow.
        header = {"descr": self._like.dtype.str, "fortran_order": False, "shape": (self._num_rows, *self._like.shape[1:])}
        np.lib.format.write_array_header_1_0(self._file, header)

    def append(self, values: Array) -> None:
        self._num_rows += len(values)
        with self._room():
            self._file.write(np.ascontiguousarray(values).data)

    @contextmanager
    def _room(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"{self._path.parent.parent}: no room for the rows to train on ({error.strerror}); make some, or let the "
                "environment variable TMPDIR name another folder"
            ) from error


def _mapped(folder: Path) -> RowSet:
    columns: dict[str, Array] = {}
    for name in ("x", "rows", "weights", "evidence"):
        path = folder / f"{name}.npy"
        if path.exists():
            # Not as a memmap, whose every slice costs more than that of an array.
            columns[name] = np.asarray(np.load(path, mmap_mode="r"))
    return RowSet(**columns)


def _cache() -> Path:
    folder = Path(tempfile.gettempdir()) / f"gendist-rows-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


@dataclass
class _Lock:
    """Held alone while the files are made or removed, and shared while they are read."""

    path: Path
    alive: Callable[[], None] = lambda: None  # called now and then while others hold it
    _file: IO[str] | None = None

    @contextmanager
    def shared(self, is_there: Callable[[], bool], make: Callable[[], None]) -> Iterator[None]:
        """Hold it together with others, with that there which `make` makes, alone."""
        try:
            while not (self._take(fcntl.LOCK_SH) and is_there()):
                if not self._take(fcntl.LOCK_EX):  # another makes them, or has it together with others to use what it made
                    self.alive()
                    time.sleep(LOOK_S)
                elif not is_there():
                    make()
                # What is there may be gone once the lock is no longer held alone: so look again.
            yield
        finally:
            self._release()

    def _take(self, how: int) -> bool:
        """Whether it is held now; it is not where others hold it another way, or somebody removed it meanwhile."""
        self._release()
        self._file = self.path.open("w")
        try:
            fcntl.flock(self._file, how | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(self._file.fileno()), self.path.stat()):
                return True
        except (BlockingIOError, FileNotFoundError):
            pass
        self._release()
        return False

    def _release(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def is_last(self) -> bool:
        """Whether nobody else has it; then it is held alone."""
        assert self._file is not None
        fcntl.flock(self._file, fcntl.LOCK_UN)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True
