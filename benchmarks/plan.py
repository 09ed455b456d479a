"""`gendist plan` beside what then happens: seconds an iteration or step, and memory, on 0, 1 and 2 workers of this machine.

    python benchmarks/plan.py [CASE ...] [--workers 0 1 2] [--scale 10] [--rounds 3]
                              [--address HOST:PORT --workers-per-node N] [--no-memory]

Plans and fits alternate, so that both meet the machine as it is. Planned is the median of the rounds; measured the quickest
quarter of all iterations, or records of steps, after the second, without workers as CPU time; memory is the peak of a fit in
one process less that of a fit of few rows (`memory.py`), beside the plan's rows, or states and activations.
With --address the fits run on a cluster that is there, whose hosts all see TMPDIR: inside a host of cluster/testbed.py, say.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from memory import MIB, fit_gendist, main_or_measured, peak_mib
from tables import print_machine, print_table, scale_option

from gendist.config import load_spec
from gendist.fitting import fit
from gendist.planning import plan_of
from gendist.planning.machines import quickest_quarter

NUM_ITERATIONS, NUM_STEPS, RECORD_EVERY = 10, 60, 10
EM = {"max_iterations": NUM_ITERATIONS, "tolerance": 0.0, "init": "random_responsibilities"}
DEEP = {"num_steps": NUM_STEPS, "record_every": RECORD_EVERY, "checkpoint_every": 100_000, "global_batch_size": 128}
CONVOLUTIONAL = {"channels": [32, 64], "normalization": "layer"}


def cases(folder: Path, scale: int) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """By name, a spec and the same of few rows."""
    rng = np.random.default_rng(0)

    def data(rows: int, columns: int, kind: str = "normal") -> tuple[dict[str, Any], ...]:
        x = rng.normal(size=(rows, columns)) if kind == "normal" else rng.integers(0, 2, (rows, columns)).astype(float)
        found = []
        for name, part in (("all", x), ("few", x[:512])):
            path = folder / f"{kind}-{rows}x{columns}-{name}.npy"
            np.save(path, part)
            found.append({"path": str(path)})
        return tuple(found)

    images = {"image_shape": [28, 28]}
    wide, narrow = data(200_000 // scale, 16), data(400_000 // scale, 8)
    columns, pixels = data(500_000 // scale, 50), data(4096, 784, "binary")
    hidden = {"hidden_sizes": [256]}
    return {
        "gmm": _both({"family": "gmm", "model": {"num_components": 16}, "fit": EM}, wide),
        "hmm": _both({"family": "hmm", "model": {"num_states": 16}, "fit": EM}, narrow),
        "naive_bayes": _both({"family": "naive_bayes", "model": {"num_classes": 10, "kind": "gaussian"}, "fit": EM}, columns),
        "vae": _both(
            {
                "family": "vae",
                "model": {"latent_dim": 16, "encoder": CONVOLUTIONAL, "decoder": {**CONVOLUTIONAL, "channels": [64, 32]},
                          "likelihood": "bernoulli"},
                "fit": DEEP,
            },
            tuple(each | images for each in pixels),
        ),
        "gan": _both(
            {"family": "gan", "model": {"latent_dim": 16, "generator": hidden, "discriminator": hidden}, "fit": DEEP}, pixels
        ),
    }  # fmt: skip


def _both(content: dict[str, Any], data: tuple[dict[str, Any], ...]) -> tuple[dict[str, Any], dict[str, Any]]:
    whole, few = ({"name": "x", **content, "data": each} for each in data)
    return whole, few


def measured_s(content: dict[str, Any], workers: int, address: str | None) -> list[float]:
    """Of the records after the second, a step or an iteration: in one process its CPU time, which others at work change less;
    on Ray the record's own seconds, as records come in heaps. Nothing is kept, nothing tracked: neither is part of an
    iteration."""
    clocks, seconds = [], []

    def watch(record: dict[str, Any]) -> None:
        clocks.append(time.process_time())
        seconds.append(record["seconds"])

    spec = load_spec({**content, "cluster": {"num_workers": workers}})
    fit(spec, address=address if workers else None, watch=watch)
    each = seconds[2:] if workers else [after - before for before, after in pairwise(clocks)][1:]
    return [seconds / (RECORD_EVERY if "global_batch_size" in content["fit"] else 1) for seconds in each]


def main() -> None:
    parser = scale_option(__doc__)
    parser.add_argument("case", nargs="*")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--address")
    parser.add_argument("--workers-per-node", type=int, default=0)
    parser.add_argument("--no-memory", action="store_true")
    options = parser.parse_args()
    print_machine(options.scale)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, (content, few) in cases(Path(folder), options.scale).items():
            if options.case and name not in options.case:
                continue
            for workers in options.workers:
                planned: list[float] = []
                measured: list[float] = []
                took: list[float] = []
                for _ in range(options.rounds):
                    began = time.monotonic()
                    spec = load_spec({**content, "cluster": {"num_workers": workers}})
                    chosen = plan_of(spec, workers, workers_per_node=options.workers_per_node).chosen
                    took.append(time.monotonic() - began)
                    planned.append(chosen.seconds)
                    measured += measured_s(content, workers, options.address)
                memory = ""
                if workers == 0 and not options.no_memory:
                    peak, least = (peak_mib(fit_gendist, {**each, "cluster": {"num_workers": 0}})[1] for each in (content, few))
                    memory = f"{chosen.memory_bytes / MIB:.0f}, {peak - least:.0f}"
                planned_s, measured_quarter_s = statistics.median(planned), quickest_quarter(measured)
                error = f"{planned_s / measured_quarter_s - 1:+.0%}"
                of = "CPU" if workers == 0 else "wall"
                rows.append((name, str(workers), of, f"{1e3 * planned_s:.1f}", f"{1e3 * measured_quarter_s:.1f}", error, memory,
                             f"{statistics.median(took):.1f}"))  # fmt: skip
                print(*rows[-1], flush=True)
    print_table(("case", "workers", "time", "planned ms", "measured ms", "error", "MiB planned, measured", "s to plan"), rows)


if __name__ == "__main__":
    main_or_measured(main, fit_gendist)
