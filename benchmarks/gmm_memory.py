"""Memory that fitting a Gaussian mixture takes: gendist on Ray and scikit-learn, and data larger than memory.

    python benchmarks/gmm_memory.py [--workers 2] [--cap-mib 2048] [--scale 10]

Each fit is a process of its own, whose memory is added up with that of its children (the raylet, the workers, the object
store's shared memory in proportion; see `memory.py`). Of gendist on Ray, the peak is printed less the peak of a fit of a few
hundred rows on the same kind of cluster; of scikit-learn, less what the process holds with its data loaded and before the fit.
gendist reads Parquet files and holds no data beforehand: where it keeps them, they are in its peak. All begin at random rows.
"""

from __future__ import annotations

import math
import tempfile
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from gmm_cases import CASES, Case, overlapping_clusters, spec
from memory import MIB, fit_gendist, main_or_measured, peak_mib, tell_ready, told_of_capped
from tables import print_machine, print_table, scale_option

NUM_ITERATIONS = 2
NUM_ROWS_OF_EMPTY = 400
NUM_ROWS_OF_PART = 300_000
NUM_PARTS = 10


def fit_sklearn(file: str, num_components: int, covariance_type: str) -> None:
    from sklearn.mixture import GaussianMixture

    x = np.load(file)
    tell_ready()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it did not converge
        GaussianMixture(num_components, covariance_type=covariance_type, init_params="random_from_data",
                        max_iter=NUM_ITERATIONS, tol=0.0, random_state=0).fit(x)  # fmt: skip


class Files:
    """Data sets in one folder. Many parts are links to one file: they are read as if they were as many."""

    def __init__(self, folder: Path, num_features: int, num_components: int):
        self.folder, self.num_features, self.num_components = folder, num_features, num_components

    def parquet(self, num_rows: int, num_parts: int = 1) -> str:
        import pyarrow as pa
        import pyarrow.parquet as pq

        folder = self.folder / f"{num_rows}x{num_parts}"
        folder.mkdir()
        x = overlapping_clusters(num_rows, self.num_features, self.num_components)
        pq.write_table(pa.table({f"x{column}": x[:, column] for column in range(self.num_features)}), folder / "00000.parquet")
        for part in range(1, num_parts):
            (folder / f"{part:05d}.parquet").symlink_to("00000.parquet")
        return str(folder)

    def npy(self, num_rows: int) -> str:
        np.save(self.folder / "x.npy", overlapping_clusters(num_rows, self.num_features, self.num_components))
        return str(self.folder / "x.npy")


def random_start(case: Case, num_workers: int, **data: Any) -> dict[str, Any]:
    wanted = spec(case, NUM_ITERATIONS, num_workers, **data)
    return wanted | {"fit": wanted["fit"] | {"init": "random"}}


def x_mib(num_rows: int, num_features: int) -> float:
    return 8 * num_rows * num_features / MIB


def main() -> None:
    parser = scale_option(__doc__)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--cap-mib", type=int, default=2048, help="of the process that fits ten times as much")
    arguments = parser.parse_args()
    print_machine(arguments.scale)
    case = CASES["a"]
    assert case.num_samples is not None
    with tempfile.TemporaryDirectory(prefix="gendist-memory-") as folder:
        files = Files(Path(folder), case.num_features, case.num_components)
        empty = files.parquet(NUM_ROWS_OF_EMPTY)

        def on_ray(path: str, cache: str) -> float:
            return peak_mib(fit_gendist, random_start(case, arguments.workers, path=path, cache=cache))[1]

        of_empty = on_ray(empty, "memory")
        num_rows = case.num_samples // arguments.scale
        data_mib, path = x_mib(num_rows, case.num_features), files.parquet(num_rows)
        ready, peak = peak_mib(fit_sklearn, files.npy(num_rows), case.num_components, case.covariance_type)
        contenders = {
            "scikit-learn, beside its data": peak - ready,
            f"gendist, Ray, {arguments.workers} workers, cache: memory": on_ray(path, "memory") - of_empty,
            f"gendist, Ray, {arguments.workers} workers, cache: none": on_ray(path, "none") - of_empty,
        }
        title = f"peak MiB, {num_rows:,} x {case.num_features} ({data_mib:.0f} MiB), {case.num_components} components"
        rows = [[who, f"{mib:.0f}", f"{mib / data_mib:.1f}"] for who, mib in contenders.items()]
        print_table([title, "MiB", "times the data"], rows)
        print(f"Of gendist, above the peak of a fit of {NUM_ROWS_OF_EMPTY} rows: {of_empty:.0f} MiB, Ray itself included.")

        num_rows, rows = NUM_ROWS_OF_PART // arguments.scale, []
        for num_parts in (1, NUM_PARTS, 4 * NUM_PARTS):
            total = num_rows * num_parts
            mib = on_ray(files.parquet(num_rows, num_parts), "none") - of_empty
            rows.append([f"{total:,} x {case.num_features}", f"{x_mib(total, case.num_features):.0f}", f"{mib:.0f}"])
        print_table(
            [f"gendist, Ray, {arguments.workers} workers, cache: none", "data, MiB", "peak MiB above a small fit"], rows
        )

        print(beyond_memory(files, case, arguments.cap_mib, empty, arguments.scale))


def beyond_memory(files: Files, case: Case, cap_mib: int, empty: str, scale: int) -> str:
    """What became of a fit in one process of ten times as much data as it may hold."""
    assert case.num_samples is not None
    part_mib = x_mib(case.num_samples, case.num_features)
    num_parts = math.ceil(10 * cap_mib / part_mib / scale)
    small = replace(case, num_components=2, covariance_type="diag")
    paths = (empty, files.parquet(case.num_samples, num_parts))
    outcome = told_of_capped(cap_mib, *(random_start(small, 0, path=path, cache="none") for path in paths))
    times = num_parts * part_mib / cap_mib
    return (
        f"In this process with {cap_mib} MiB to write to, cache: none, 2 components, diag: a set of "
        f"{num_parts * part_mib:,.0f} MiB, {times:.1f} times as much, {outcome}."
    )


if __name__ == "__main__":
    main_or_measured(main, fit_sklearn)
