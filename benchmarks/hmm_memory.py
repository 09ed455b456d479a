"""Memory that fitting a hidden Markov model takes: gendist on Ray and hmmlearn, and data larger than memory.

    python benchmarks/hmm_memory.py [--workers 2] [--cap-mib 2048] [--scale 20]

Each fit is a process of its own, whose memory is added up with that of its children (see `memory.py`). One long sequence
(case b of `hmm_cases.py`): of gendist on Ray, the peak is printed less the peak of a fit of a few hundred steps on the same
kind of cluster; of hmmlearn, less what the process holds with its data loaded and before the fit. gendist reads a Parquet file
and holds no data beforehand: where it keeps them, they are in its peak. Then sets of many sequences, which nothing is kept of
between the passes: how the peak grows with them, and one ten times as large as what a process may hold.
"""

from __future__ import annotations

import math
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from hmm_cases import CASES, Case, spec, start
from memory import MIB, fit_gendist, main_or_measured, peak_mib, tell_ready, told_of_capped
from tables import print_machine, print_table, scale_option

NUM_ITERATIONS = 2
EMPTY = replace(CASES["b"], num_steps=400)
PART = replace(CASES["a"], num_sequences=600)
NUM_PARTS = 10


def fit_hmmlearn(file: str, case_name: str) -> None:
    x = np.load(file)
    estimator = start(CASES[case_name], x, NUM_ITERATIONS)
    tell_ready()
    estimator.fit(x[0])


class Files:
    """Data sets in one folder. Many parts are links to one file: they are read as if they were as many."""

    def __init__(self, folder: Path):
        self.folder = folder

    def one_sequence(self, case: Case, scale: int = 1) -> tuple[str, str]:
        """A Parquet file whose rows are the steps of one sequence, and an .npy file of (1, T, D)."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        x = case.data(scale)
        path = self.folder / f"{x.shape[1]}.parquet"
        pq.write_table(pa.table({f"x{column}": x[0, :, column] for column in range(x.shape[2])}), path)
        np.save(path.with_suffix(".npy"), x)
        return str(path), str(path.with_suffix(".npy"))

    def many_sequences(self, case: Case, num_parts: int, scale: int = 1) -> str:
        """A folder of Parquet files whose rows are sequences, a column of lists for each feature."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        x = case.data(scale)
        folder = self.folder / f"{len(x)}x{num_parts}"
        folder.mkdir()
        bounds = pa.array(np.arange(len(x) + 1, dtype=np.int32) * x.shape[1])
        lists = {
            f"x{column}": pa.ListArray.from_arrays(bounds, pa.array(x[:, :, column].reshape(-1)))
            for column in range(x.shape[2])
        }
        pq.write_table(pa.table(lists), folder / "00000.parquet")
        for part in range(1, num_parts):
            (folder / f"{part:05d}.parquet").symlink_to("00000.parquet")
        return str(folder)


def random_start(case: Case, num_workers: int, **data: Any) -> dict[str, Any]:
    wanted = spec(case, NUM_ITERATIONS, num_workers, **data)
    return wanted | {"fit": wanted["fit"] | {"init": "random"}}


def x_mib(case: Case, scale: int = 1, num_parts: int = 1) -> float:
    return 8 * case.num_sequences * case.num_steps * case.num_features * num_parts / scale / MIB


def main() -> None:
    parser = scale_option(__doc__)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--cap-mib", type=int, default=2048, help="of the process that fits ten times as much")
    arguments = parser.parse_args()
    print_machine(arguments.scale)
    scale, on_workers = arguments.scale, f"gendist, Ray, {arguments.workers} workers"
    with tempfile.TemporaryDirectory(prefix="gendist-memory-") as folder:
        files, case = Files(Path(folder)), CASES["b"]
        empty, _ = files.one_sequence(EMPTY)

        def on_ray(case: Case, path: str, cache: str) -> float:
            return peak_mib(fit_gendist, random_start(case, arguments.workers, path=path, cache=cache))[1]

        of_empty = on_ray(case, empty, "memory")
        path, array = files.one_sequence(case, scale)
        ready, peak = peak_mib(fit_hmmlearn, array, "b")
        contenders = {
            "hmmlearn, beside its data": peak - ready,
            f"{on_workers}, cache: memory": on_ray(case, path, "memory") - of_empty,
            f"{on_workers}, cache: none": on_ray(case, path, "none") - of_empty,
        }
        data_mib = x_mib(case, scale)
        title = f"peak MiB, one sequence of {case.num_steps // scale:,} x {case.num_features} ({data_mib:.0f} MiB)"
        rows = [[who, f"{mib:.0f}", f"{mib / data_mib:.1f}"] for who, mib in contenders.items()]
        print_table([title, "MiB", "times the data"], rows)
        print(f"Of gendist, above the peak of a fit of {EMPTY.num_steps} steps: {of_empty:.0f} MiB, Ray itself included.")

        rows = []
        for num_parts in (1, NUM_PARTS, 4 * NUM_PARTS):
            mib = on_ray(PART, files.many_sequences(PART, num_parts, scale), "none") - of_empty
            num_sequences = PART.num_sequences // scale * num_parts
            shape = f"{num_sequences:,} x {PART.num_steps} x {PART.num_features}"
            rows.append([shape, f"{x_mib(PART, scale, num_parts):.0f}", f"{mib:.0f}"])
        print_table([f"{on_workers}, cache: none", "data, MiB", "peak MiB above a small fit"], rows)
        print(beyond_memory(files, arguments.cap_mib, empty, scale))


def beyond_memory(files: Files, cap_mib: int, empty: str, scale: int) -> str:
    """What became of a fit in one process of ten times as much data as it may hold."""
    small = replace(CASES["a"], num_states=2)
    part_mib = x_mib(small)
    num_parts = math.ceil(10 * cap_mib / part_mib / scale)
    paths = (empty, files.many_sequences(small, num_parts))
    outcome = told_of_capped(cap_mib, *(random_start(small, 0, path=path, cache="none") for path in paths))
    times = num_parts * part_mib / cap_mib
    return (
        f"In this process with {cap_mib} MiB to write to, cache: none, 2 states: a set of {num_parts * part_mib:,.0f} MiB, "
        f"{times:.1f} times as much, {outcome}."
    )


if __name__ == "__main__":
    main_or_measured(main, fit_hmmlearn)
