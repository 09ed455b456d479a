"""Fits on a cluster of several hosts on this machine, one after another, with a random fault every 20 to 40 s.

    python benchmarks/soak.py [--minutes 30] [--seed 0] [--hosts 4] [--scale 1]     (root, Linux: see cluster/testbed.py)

First each fit once, undisturbed: its parameters and its time are what the others are held against. Then fits with faults, whose
kinds, times and victims the seed tells: a worker killed, a host killed (and started again after a while), a host cut off for
20 s, packets lost for 20 s, the driver killed and the same command given again. Printed are, of each kind of fit, how many
ended in the same bytes and the share of time that was useful work (undisturbed time / disturbed time); of each fault, how often
it struck and for how long the fit stood still; memory and open files of drivers and of the head over time; and what was
left behind.

Exit code 1 where a fit ended otherwise than it should, something was left behind, no fault struck, their thread failed, or the
head's processes have at last more than 1.5 times the memory and files that they had in the second quarter, and 100 MiB or 100
files more (in half an hour or more: before, it is only printed).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from tables import print_machine, print_table

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "cluster"))

from testbed import Host, Testbed, why_not

ROOT = Path(__file__).resolve().parents[1]

GROWTH_AFTER_S = 1700.0
BETWEEN_FAULTS_S = (20.0, 40.0)
LASTS_S = 20.0  # a cut, a loss, the time until a killed host is started again
GROWTH_LIMIT, GROWTH_AT_LEAST = 1.5, 100  # of the head's processes: MiB, or files
FIT_LIMIT_S = 1800.0  # a fit that takes longer hangs
WORKERS = (b"ray::_run_task", b"ray::_load_task", b"ray::_RayTrainWorker", b"ray::RayTrainWorker", b"ray::run_train_fn")
MIB = 2**20
SMALL = {"hidden_sizes": [32]}
NETWORKS = {
    "vae": {"latent_dim": 4, "likelihood": "gaussian", "encoder": SMALL, "decoder": SMALL},
    "gan": {"latent_dim": 4, "generator": SMALL, "discriminator": SMALL},
}


def specs(folder: Path, scale: int) -> dict[str, dict[str, Any]]:
    """Of a minute or two each, without faults."""
    rng = np.random.default_rng(0)
    centers = 2.0 * rng.normal(size=(8, 8))
    np.save(folder / "rows.npy", centers[rng.integers(0, 8, 40_000)] + rng.normal(size=(40_000, 8)))
    states = np.cumsum(rng.random((400, 60)) < 0.1, axis=1) % 4
    np.save(folder / "sequences.npy", rng.normal(size=(400, 60, 1)) + 2.0 * states[..., None])
    em = {"max_iterations": 400 // scale, "tolerance": 0.0, "checkpoint_every": 5}
    steps = {"num_steps": 4000 // scale, "global_batch_size": 64, "checkpoint_every": 50, "ema": 0.05}
    digits = {"source": "digits", "validation_fraction": 0.1}
    zero = {"engine": {"kind": "deepspeed", "zero_stage": 2}}
    found: dict[str, dict[str, Any]] = {
        "gmm": {"model": {"num_components": 8}, "data": {"path": str(folder / "rows.npy")}, "fit": {**em, "init": "random"}},
        "hmm": {"model": {"num_states": 4}, "data": {"path": str(folder / "sequences.npy")}, "fit": em},
        "vae": {"model": NETWORKS["vae"], "data": digits, "fit": steps},
        "gan": {"model": NETWORKS["gan"], "data": digits, "fit": {**steps, **zero}},
    }
    return {
        name: {"name": name, "family": name, **spec, "cluster": {"num_workers": 2}, "tracking": {"wandb": "disabled"}}
        for name, spec in found.items()
    }


@dataclass
class Fit:
    """A command on the head; it is given again where its driver is killed."""

    bed: Testbed
    spec: Path
    run: Path
    process: subprocess.Popen[Any] | None = None

    def start(self) -> None:
        arguments = ["fit", str(self.spec), "--run-dir", str(self.run), "--address", self.bed.address]
        with self.run.with_suffix(".log").open("ab") as log:
            self.process = self.bed.hosts[0].popen(sys.executable, str(ROOT / "launch.py"), *arguments, stdout=log, stderr=log)

    def kill_driver(self) -> None:
        assert self.process is not None
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    @property
    def is_running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def progress(self) -> int:
        """The last iteration or step that is recorded."""
        metrics = self.run / "metrics.jsonl"
        lines = metrics.read_text().rpartition("\n")[0].splitlines() if metrics.exists() else []
        last = json.loads(lines[-1]) if lines else {}
        return int(last.get("iteration", last.get("step", 0)))

    def parameters(self) -> bytes | None:
        file = self.run / "artifact" / "model.safetensors"
        return file.read_bytes() if file.exists() else None


@dataclass
class Faults:
    """What happens to a bed, from a thread of its own, while a fit runs."""

    bed: Testbed
    rng: random.Random
    fit: Fit | None = None
    standstill_s: dict[str, list[float]] = field(default_factory=dict)
    _next_at: float = field(default_factory=lambda: time.monotonic() + BETWEEN_FAULTS_S[0])

    def strike(self) -> None:
        """When it is time, and a fit is under way: one fault, and then wait until the fit gets on or ends."""
        fit = self.fit
        if fit is None or not fit.is_running or time.monotonic() < self._next_at or fit.progress() == 0:
            return
        kind = self.rng.choice(["worker killed", "host killed", "host cut off", "packets lost", "driver killed"])
        host = self.rng.choice(self.bed.hosts[1:])
        if kind == "worker killed" and not self._kill_a_worker(fit):
            return
        undo = self._happen(kind, host, fit)
        standstill_s = self._longest_standstill(fit, partial(undo, host) if undo else None)
        self.standstill_s.setdefault(kind, []).append(standstill_s)
        print(f"  {kind:14s} {host.address if undo else '':12s} a standstill of {standstill_s:.0f} s", flush=True)
        self._next_at = time.monotonic() + self.rng.uniform(*BETWEEN_FAULTS_S)

    def _longest_standstill(self, fit: Fit, undo: Callable[[], None] | None) -> float:
        """Of a fit, until what lasts is undone and the fit has got on, or has ended."""
        undo_at = time.monotonic() + LASTS_S
        longest_s, last, since = 0.0, fit.progress(), time.monotonic()
        begun_at = last
        while undo is not None or (fit.is_running and time.monotonic() < since + FIT_LIMIT_S):
            now, progress = time.monotonic(), fit.progress()
            if fit.is_running:
                longest_s = max(longest_s, now - since)
            if progress != last:
                last, since = progress, now
            if undo is not None and now >= undo_at:
                undo()
                undo, begun_at = None, progress
            elif undo is None and progress > begun_at + 1:
                break
            time.sleep(0.1)
        return longest_s

    def _happen(self, kind: str, host: Host, fit: Fit) -> Any:
        """What undoes it after a while, where it lasts."""
        if kind == "host killed":
            self.bed.kill(host)
            return self.bed.restart
        if kind == "host cut off":
            self.bed.cut(host)
            return self.bed.mend
        if kind == "packets lost":
            self.bed.lossy(host, loss=0.03)
            return self.bed.mend
        if kind == "driver killed":
            fit.kill_driver()
            fit.start()
        return None

    def _kill_a_worker(self, fit: Fit) -> bool:
        """One that is at work, held meanwhile so that it stays so; False where none was found while the fit ran."""
        while fit.is_running:
            for pid in [pid for each in self.bed.hosts[1:] for pid in each.pids() if _is_worker(pid)]:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGSTOP)
                    at_work = _is_worker(pid)
                    os.kill(pid, signal.SIGKILL if at_work else signal.SIGCONT)
                    if at_work:
                        return True
        return False


def _is_worker(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().startswith(WORKERS)
    except OSError:
        return False


@dataclass
class Gauge:
    """Memory and open files over time: of drivers, and of Ray's own processes on the head."""

    bed: Testbed
    samples: list[tuple[float, float, int, float, int]] = field(default_factory=list)

    def look(self, driver: int | None) -> None:
        head = [pid for pid in self.bed.hosts[0].pids() if _name(pid) in ("gcs_server", "raylet")]
        drivers = [driver] if driver is not None else []
        self.samples.append(
            (time.monotonic(), sum(map(_pss, drivers)), sum(map(_fds, drivers)), sum(map(_pss, head)), sum(map(_fds, head)))
        )

    def quarters(self) -> dict[int, tuple[float, ...]]:
        """The largest of each quarter of the time: MiB and files of the driver, and of the head's processes."""
        if not self.samples:
            return {}
        begin, end = self.samples[0][0], self.samples[-1][0] + 1e-9
        found = {}
        for quarter in range(4):
            inside = [sample for sample in self.samples if quarter <= 4 * (sample[0] - begin) / (end - begin) < quarter + 1]
            if inside:
                driver, files, head, head_files = (max(sample[i] for sample in inside) for i in range(1, 5))
                found[quarter + 1] = (driver / MIB, files, head / MIB, head_files)
        return found

    def rows(self) -> list[list[str]]:
        return [[f"{quarter}", *(f"{value:.0f}" for value in values)] for quarter, values in self.quarters().items()]

    def growth(self) -> list[str]:
        """What of the head's has grown beyond bounds."""
        quarters = self.quarters()
        if len(quarters) < 4 or self.samples[-1][0] - self.samples[0][0] < GROWTH_AFTER_S:
            return []
        pairs = zip(("MiB", "files"), quarters[2][2:], quarters[4][2:], strict=True)
        return [
            f"the head grew from {before:.0f} to {now:.0f} {what}"
            for what, before, now in pairs
            if now > GROWTH_LIMIT * before and now > before + GROWTH_AT_LEAST
        ]


def _name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


def _pss(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:")), 0)


def _fds(pid: int) -> int:
    try:
        return len(os.listdir(f"/proc/{pid}/fd"))
    except OSError:
        return 0


@contextmanager
def _thread(work: Any, every_s: float) -> Iterator[list[BaseException]]:
    """Does it again and again; yields what it raised, with which it ends."""
    ended = threading.Event()
    errors: list[BaseException] = []

    def loop() -> None:
        while not ended.wait(every_s):
            try:
                work()
            except BaseException as error:
                errors.append(error)
                return

    thread = threading.Thread(target=loop, daemon=True)
    thread.start()
    try:
        yield errors
    finally:
        ended.set()
        thread.join()


def _left_behind(bed: Testbed) -> list[str]:
    """Workers on the hosts a while after the last fit."""
    until = time.monotonic() + 90.0
    while True:
        left = [_name(pid) for host in bed.hosts for pid in host.pids() if _is_worker(pid)]
        if not left or time.monotonic() > until:
            return left
        time.sleep(1.0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0, help="of fits with faults")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--hosts", type=int, default=4, help="the head among them")
    parser.add_argument("--scale", type=int, default=1, help="divide the length of the fits by this")
    parser.add_argument("--only", help="families, such as gmm,vae")
    given = parser.parse_args()
    known = {"gmm", "hmm", *NETWORKS}
    if unknown := sorted(set((given.only or "gmm").split(",")) - known):
        print(
            f"error: --only {given.only}: there is no {', '.join(unknown)}; choose of {', '.join(sorted(known))}",
            file=sys.stderr,
        )
        return 2
    if reason := why_not():
        print(f"error: {reason}", file=sys.stderr)
        return 2
    print_machine(1)
    # Killed by whoever has had enough of it, it still takes its bed down.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix="soak-") as name, Testbed(given.hosts, num_cpus=1, head_cpus=0) as bed:
        return soak(given, Path(name), bed)


def soak(given: argparse.Namespace, folder: Path, bed: Testbed) -> int:
    bed.start_ray()
    rng = random.Random(given.seed)
    chosen = {name: spec for name, spec in specs(folder, given.scale).items() if name in (given.only or name).split(",")}
    undisturbed: dict[str, tuple[bytes, float]] = {}
    faults, gauge = Faults(bed, rng), Gauge(bed)
    wrong: list[str] = []
    times: dict[str, list[float]] = {name: [] for name in chosen}

    def run(name: str, run_name: str) -> tuple[Fit, float]:
        fit = Fit(bed, folder / f"{name}.yaml", folder / run_name)
        began = time.monotonic()
        fit.start()
        faults.fit = fit if "undisturbed" not in run_name else None
        while time.monotonic() - began < FIT_LIMIT_S:
            process = fit.process
            gauge.look(process.pid if process and process.poll() is None else None)
            if process is not None and process.poll() not in (None, -signal.SIGKILL):
                break
            time.sleep(1.0)
        else:
            fit.kill_driver()
        faults.fit = None
        return fit, time.monotonic() - began

    for name, spec in chosen.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(spec))
        fit, seconds = run(name, f"{name}-undisturbed")
        parameters = fit.parameters()
        if parameters is None:
            print(fit.run.with_suffix(".log").read_text()[-3000:], file=sys.stderr)
            return 1
        undisturbed[name] = (parameters, seconds)
        print(f"{name}: {seconds:.0f} s undisturbed", flush=True)
    until, number = time.monotonic() + 60.0 * given.minutes, 0
    with _thread(faults.strike, 0.2) as errors:
        while time.monotonic() < until and not errors:
            name = list(chosen)[number % len(chosen)]
            number += 1
            print(f"fit {number}: {name}", flush=True)
            fit, seconds = run(name, f"{name}-{number}")
            times[name].append(seconds)
            if fit.parameters() != undisturbed[name][0]:
                end = fit.process.poll() if fit.process else None
                wrong.append(f"{name}-{number} (exit code {end})")
                print(f"  NOT as undisturbed: {fit.run.with_suffix('.log').read_text()[-2000:]}", flush=True)
    left = _left_behind(bed)
    report(undisturbed, times, wrong, faults, gauge, left)
    failures = [f"the thread of the faults failed ({error!r})" for error in errors] + gauge.growth()
    failures += [] if faults.standstill_s else ["no fault struck"]
    for failure in failures:
        print(f"error: {failure}", file=sys.stderr)
    return 1 if wrong or left or failures else 0


def report(
    undisturbed: dict[str, tuple[bytes, float]],
    times: dict[str, list[float]],
    wrong: list[str],
    faults: Faults,
    gauge: Gauge,
    left: list[str],
) -> None:
    rows = []
    for name, seconds in times.items():
        alone, count = undisturbed[name][1], len(seconds)
        num_wrong = sum(line.startswith(f"{name}-") for line in wrong)
        useful = f"{100 * alone * count / sum(seconds):.0f} %" if seconds else ""
        rows.append([name, f"{count}", f"{count - num_wrong}", f"{alone:.0f}", f"{sum(seconds) / max(count, 1):.0f}", useful])
    print_table(["fit", "runs", "same bytes", "undisturbed, s", "with faults, s", "useful work"], rows)
    print_table(
        ["fault", "times", "median of the longest standstills, s", "longest, s"],
        [[kind, f"{len(s)}", f"{np.median(s):.0f}", f"{max(s):.0f}"] for kind, s in sorted(faults.standstill_s.items())],
    )
    print_table(
        ["quarter", "driver, MiB", "driver, files", "head's gcs_server and raylet, MiB", "and files"],
        gauge.rows(),
    )
    print(f"wrong: {', '.join(wrong) or 'none'}; left behind: {', '.join(left) or 'nothing'}")


if __name__ == "__main__":
    sys.exit(main())
