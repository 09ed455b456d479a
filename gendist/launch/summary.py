"""What is said of a fit that came to its end: here, or by the driver of a job on a cluster."""

from __future__ import annotations

import shlex
from typing import Any

from gendist.config import Spec
from gendist.run import Run
from gendist.transformed import taken_apart


def summary(spec: Spec, run: Run) -> list[str]:
    results = run.results
    how_many = f"{results['num_iterations']} iterations" if "num_iterations" in results else f"{results['num_steps']} steps"
    lines = [
        f"{spec.name}: {results['stopped']} after {how_many}, in {run.path}",
        "  " + "  ".join(f"{key} {value:.6g}" for key, value in results.items() if isinstance(value, float)),
    ]
    if "log_likelihood" in results:
        one = "step" if getattr(taken_apart(run.model)[0], "takes_sequences", False) else "row"
        known = "with its label, " if spec.data.label else ""
        lines.append(f"  (of the fitted model; a log-likelihood is the mean a {one}, {known}in nats)")
    lines += [f"  {line}" for line in results.get("description", ())]
    if density := getattr(run.model, "density", None):
        lines.append(f"  ({density})")
    if results.get("artifact_step", results.get("num_steps")) != results.get("num_steps"):
        lines.append(f"  the artifact is that of step {results['artifact_step']}, the best in validation")
    if len(results.get("restarts", ())) > 1:
        lines.append(f"  the best of {len(results['restarts'])} restarts; manifest.json says how each of them ended")
    if repairs := results.get("repairs"):
        lines.append(f"  {len(repairs)} repairs, the last: {repairs[-1]} (all in metrics.jsonl)")
    if fell := results.get("iterations_that_fell"):
        lines.append(f"  the log-likelihood fell in iterations {fell}; see metrics.jsonl")
    return lines


def verbs(model: Any) -> list[str]:
    """The commands that suit a fitted model, with a place for the name of its run and of the program."""
    scored = [] if "log_prob" in model.not_offered else ["{program} score {run} DATA --out scores.parquet"]
    return ["{program} sample {run} -n 64 --out samples.png", *scored]


def next_steps(commands: list[str], program: str, run: Any) -> list[str]:
    """The same, as a person would type them."""
    lines = [line.format(program=program, run=shlex.quote(str(run))) for line in commands]
    return [f"next:  {lines[0]}", *(f"       {line}" for line in lines[1:])]
