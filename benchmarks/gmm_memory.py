"""Memory that fitting a Gaussian mixture takes: gendist on Ray and scikit-learn, and data larger than memory.

    python benchmarks/gmm_memory.py [--workers 2] [--cap-mib 2048] [--scale 10]

Each fit is a process of its own. Again and again, 20 ms between, its memory is added up with that of its children (the
raylet, the workers, the object store's shared memory in proportion): the PSS of /proc/PID/smaps_rollup. Of gendist on Ray,
the peak is printed less the peak of a fit of a few hundred rows on the same kind of cluster; of scikit-learn, less what the
process holds with its data loaded and before the fit. gendist reads Parquet files and holds no data beforehand: where it
keeps them, they are in its peak. All begin at random rows. Linux only.
"""

from __future__ import annotations

import json
import math
import os
import resource
import select
import subprocess
import sys
import tempfile
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from gmm_cases import CASES, Case, overlapping_clusters, spec
from tables import print_machine, print_table, scale_option

MIB = 2**20
SAMPLE_EVERY_S = 0.02
FIT_TIMEOUT_S = 3600
NUM_ITERATIONS = 2
NUM_ROWS_OF_EMPTY = 400
NUM_ROWS_OF_PART = 300_000
NUM_PARTS = 10


# The measured process: it says that it is ready, waits for the word, and does one of these.


def fit_gendist(wanted: dict[str, Any]) -> None:
    import gendist

    tell_ready()
    gendist.fit(wanted)


def fit_sklearn(file: str, num_components: int, covariance_type: str) -> None:
    from sklearn.mixture import GaussianMixture

    x = np.load(file)
    tell_ready()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it did not converge
        GaussianMixture(num_components, covariance_type=covariance_type, init_params="random_from_data",
                        max_iter=NUM_ITERATIONS, tol=0.0, random_state=0).fit(x)  # fmt: skip


def fit_capped(cap_mib: int, warm_up: dict[str, Any], wanted: dict[str, Any]) -> None:
    """With no more than the cap of writable memory beyond what the imports and a small fit left; a MemoryError otherwise."""
    import gendist

    gendist.fit(warm_up)
    status = Path("/proc/self/status").read_text().split()
    held_bytes = int(status[status.index("VmData:") + 1]) * 1024
    resource.setrlimit(resource.RLIMIT_DATA, (held_bytes + cap_mib * MIB,) * 2)
    tell_ready()
    gendist.fit(wanted)


def tell_ready() -> None:
    print("ready", flush=True)
    sys.stdin.readline()


MEASURED = {function.__name__: function for function in (fit_gendist, fit_sklearn, fit_capped)}


# The measuring process.


def memory_mib(root: int) -> float:
    """The PSS of a process and of all that descend from it."""
    children: dict[int, list[int]] = {}
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            try:
                # "PID (NAME) STATE PPID", and the name may hold anything.
                parent = int(Path(entry.path, "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:  # it has ended
                continue
            children.setdefault(parent, []).append(int(entry.name))
    total_kib, waiting = 0, [root]
    while waiting:
        process = waiting.pop()
        waiting += children.get(process, [])
        try:
            lines = Path(f"/proc/{process}/smaps_rollup").read_text().split()
            total_kib += int(lines[lines.index("Pss:") + 1])
        except (OSError, ValueError):  # it has ended
            continue
    return total_kib / 1024


def peak_mib(name: str, *arguments: Any) -> tuple[float, float]:
    """(when ready, at its peak) of a process of its own. CalledProcessError where it fails."""
    command = [sys.executable, __file__, name, json.dumps(arguments)]
    # Arrow's default allocator reserves a gigabyte at once, which a limit of writable memory counts as taken.
    environment = os.environ | {"ARROW_DEFAULT_MEMORY_POOL": "system"} if name == fit_capped.__name__ else None
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdin is not None
    assert process.stdout is not None
    with process:
        if process.stdout.readline() != "ready\n":
            raise subprocess.CalledProcessError(process.wait(FIT_TIMEOUT_S), command[:3])
        ready = peak = memory_mib(process.pid)
        process.stdin.write("go\n")
        process.stdin.flush()
        while not select.select([process.stdout], [], [], SAMPLE_EVERY_S)[0]:  # readable when it ends
            peak = max(peak, memory_mib(process.pid))
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command[:3])
    return ready, peak


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
            return peak_mib(fit_gendist.__name__, random_start(case, arguments.workers, path=path, cache=cache))[1]

        of_empty = on_ray(empty, "memory")
        num_rows = case.num_samples // arguments.scale
        data_mib, path = x_mib(num_rows, case.num_features), files.parquet(num_rows)
        ready, peak = peak_mib(fit_sklearn.__name__, files.npy(num_rows), case.num_components, case.covariance_type)
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

        print(told_of_capped(files, case, arguments.cap_mib, empty, arguments.scale))


def told_of_capped(files: Files, case: Case, cap_mib: int, empty: str, scale: int) -> str:
    """What became of a fit in one process of ten times as much data as it may hold."""
    assert case.num_samples is not None
    part_mib = x_mib(case.num_samples, case.num_features)
    num_parts = math.ceil(10 * cap_mib / part_mib / scale)
    small = replace(case, num_components=2, covariance_type="diag")
    paths = (empty, files.parquet(case.num_samples, num_parts))
    try:
        ready, peak = peak_mib(fit_capped.__name__, cap_mib, *(random_start(small, 0, path=p, cache="none") for p in paths))
        outcome = f"was fitted; its peak was {peak - ready:.0f} MiB"
    except subprocess.CalledProcessError as error:
        outcome = f"FAILED (exit code {error.returncode})"
    times = num_parts * part_mib / cap_mib
    return (
        f"In this process with {cap_mib} MiB to write to, cache: none, 2 components, diag: a set of "
        f"{num_parts * part_mib:,.0f} MiB, {times:.1f} times as much, {outcome}."
    )


if __name__ == "__main__":
    if len(sys.argv) == 3 and sys.argv[1] in MEASURED:
        MEASURED[sys.argv[1]](*json.loads(sys.argv[2]))
    else:
        main()
