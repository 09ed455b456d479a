"""Rows at random access are those of the blocks, on whichever machine they are asked for."""

from __future__ import annotations

import multiprocessing
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from gendist.blocks import LocalBlocks
from gendist.data import DataConfig, Dataset, Schema, source_of
from gendist.data.rows import RowsOnDisk
from gendist.data.survey import survey
from gendist.data.transforms import Transforms
from gendist.protocols import UserError

SEED = 5
PARTS = ("training", "validation")


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path) -> Path:
    """The folder where the files lie."""
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    return tmp_path


def dataset_of(data, **config) -> Dataset:
    config = DataConfig(validation_fraction=0.25, **config)
    source = source_of(data)
    return Dataset.open(source, config, Schema.of(source, config), LocalBlocks)


def on_disk(dataset: Dataset, transforms: Transforms | None = None) -> RowsOnDisk:
    num_latents = len(dataset.labels)
    fingerprints = {part: survey(dataset.blocks(num_latents, part, SEED)).fingerprint for part in PARTS}
    if transforms is not None:
        dataset = Dataset(**{**vars(dataset), "transforms": transforms})
    return RowsOnDisk(dataset, num_latents, SEED, fingerprints)


def everything(dataset: Dataset, part: str):
    """The blocks of a part, one after the other."""
    blocks = [
        b for run in dataset.blocks(len(dataset.labels), part, SEED).map_runs(lambda _, run: list(run), None) for b in run
    ]
    columns = ("x", "rows", "weights", "evidence")
    return {name: torch.cat([getattr(b, name) for b in blocks]) for name in columns if getattr(blocks[0], name) is not None}


def data(num_rows: int = 1000) -> dict:
    rng = np.random.default_rng(0)
    labels = rng.choice(["a", "b", None], num_rows)
    return {"x": rng.normal(size=(num_rows, 3)), "w": rng.uniform(0, 2, num_rows), "y": labels}


def test_they_are_the_rows_of_the_blocks_in_any_order():
    dataset = dataset_of(data(), weight="w", label="y")
    with on_disk(dataset).opened() as rows:
        assert rows["training"].num_rows + rows["validation"].num_rows == 1000
        for part in PARTS:
            expected = everything(dataset, part)
            places = torch.randperm(rows[part].num_rows, generator=torch.Generator().manual_seed(0))
            block = rows[part].take(places)
            assert torch.equal(block.rows, expected["rows"][places])
            for name in ("x", "weights", "evidence"):
                values = getattr(block, name)
                assert values.dtype == torch.float32
                assert torch.equal(values, expected[name][places].float()), name
            assert len(rows[part].take(places[:0]).rows) == 0


def test_behind_transforms():
    dataset = dataset_of(data(), weight="w", label="y", columns=("x",))
    blocks = dataset.blocks(2, "training", SEED)
    config = DataConfig(transforms=["standardize"])
    transforms = Transforms.fit(config.transforms, dataset.schema.feature_names, blocks, survey(blocks))
    plain = on_disk(dataset)
    behind = on_disk(dataset, transforms)
    assert plain.key != behind.key
    with plain.opened() as rows, behind.opened() as transformed:
        places = torch.arange(rows["training"].num_rows)
        z = transforms.forward(rows["training"].take(places).x.double())
        torch.testing.assert_close(transformed["training"].take(places).x.double(), z, atol=1e-5, rtol=1e-5)


def test_the_last_one_that_needs_them_removes_them(cache):
    rows = on_disk(dataset_of(data(), weight="w", label="y"))
    with rows.opened():
        (folder,) = cache.glob("gendist-rows-*")
        assert (folder / rows.key).is_dir()
        made = (folder / rows.key / "training" / "x.npy").stat().st_mtime_ns
        with rows.opened() as again:
            assert (folder / rows.key / "training" / "x.npy").stat().st_mtime_ns == made
        assert again["training"].num_rows > 0
        assert (folder / rows.key).is_dir(), "somebody else needs them"
    assert list(folder.iterdir()) == []


def test_after_a_crash_they_stay_for_whoever_goes_on(cache):
    rows = on_disk(dataset_of(data(), weight="w", label="y"))
    with pytest.raises(RuntimeError), rows.opened():
        raise RuntimeError
    (folder,) = cache.glob("gendist-rows-*")
    file = folder / rows.key / "training" / "x.npy"
    made = file.stat().st_mtime_ns
    with rows.opened():
        assert file.stat().st_mtime_ns == made
    assert list(folder.iterdir()) == []


def _num_rows(rows, queue, barrier) -> None:
    barrier.wait(60)
    with rows.opened() as opened:
        barrier.wait(60)  # until all have them
        queue.put(opened["training"].num_rows)


def test_several_processes_make_them_once_and_leave_nothing(cache):
    rows = on_disk(dataset_of(data(), weight="w", label="y"))
    context = multiprocessing.get_context("fork")
    queue, barrier = context.Queue(), context.Barrier(4)
    processes = [context.Process(target=_num_rows, args=(rows, queue, barrier)) for _ in range(4)]
    for process in processes:
        process.start()
    found = {queue.get(timeout=60) for _ in processes}
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert len(found) == 1
    (folder,) = cache.glob("gendist-rows-*")
    assert list(folder.iterdir()) == []


def test_all_have_them_at_once_however_they_come_together(cache):
    rows, together = on_disk(dataset_of(data(100), label="y")), threading.Barrier(3)

    def use() -> None:
        together.wait(60)
        with rows.opened():
            together.wait(60)

    with ThreadPoolExecutor(3) as threads:
        for _ in range(30):
            for done in [threads.submit(use) for _ in range(3)]:
                done.result(60)


def test_who_waits_for_another_to_make_them_is_alive_meanwhile(cache):
    """Else it is taken for a process that hangs, where they take long to make."""
    rows, making, waited = on_disk(dataset_of(data(), label="y")), threading.Event(), threading.Event()

    def slowly() -> None:
        making.set()
        assert waited.wait(60)

    def use(alive: Callable[[], None]) -> int:
        with rows.opened(alive) as opened:
            return opened["training"].num_rows

    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(use, slowly)
        assert making.wait(60)
        second = threads.submit(use, waited.set)
        assert first.result(60) == second.result(60)


def test_a_machine_that_reads_other_rows_is_told(cache):
    rows = on_disk(dataset_of(data(), weight="w", label="y"))
    changed = data()
    changed["x"][999, 2] += 1e-12
    other = RowsOnDisk(dataset_of(changed, weight="w", label="y"), 2, SEED, rows.fingerprints)
    with pytest.raises(UserError, match="reads other rows than the machine that began this run"), other.opened():
        pass
    (folder,) = cache.glob("gendist-rows-*")
    assert [path for path in folder.iterdir() if path.is_dir()] == [], "nothing half-made stays"


def test_label_counts_are_those_of_the_labels():
    dataset = dataset_of(given := data(), weight="w", label="y")
    with on_disk(dataset).opened() as opened:
        counts = [opened[part].label_counts() for part in PARTS]
    whole = counts[0].merge(counts[1])
    labels, weights = given["y"], given["w"]
    assert (whole.num_rows, whole.num_unlabelled) == (len(labels), sum(label is None for label in labels))
    expected = [weights[labels == label].sum() for label in dataset.labels]
    np.testing.assert_allclose(whole.weights.numpy(), expected, rtol=1e-6)
