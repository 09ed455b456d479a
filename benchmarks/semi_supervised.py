"""Do rows without a label help? The accuracy on held-out rows of models fitted to few labelled rows alone, and to all rows.

    python benchmarks/semi_supervised.py [--cases digits-naive-bayes docstrings ...] [--seeds 10] [--picture FILE]

A third of the rows is held out; of the others 1, 2, 5 and 10 % keep their label, one a class at least, by seed. Of each model
three fits: `fit.unlabelled_weight` 0 (the labelled rows alone), 0.1 and 1. Printed are the mean accuracy with its standard
deviation over the seeds, and in how many of them all rows did better than the labelled ones alone.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gmm_cases import MNIST, principal_components
from tables import print_machine, print_table

SHARES = (0.01, 0.02, 0.05, 0.10)
UNLABELLED_WEIGHTS = (0.0, 0.1, 1.0)
MNIST_ROWS = 12_000


@dataclass(frozen=True)
class Case:
    """load gives x and the labels; spec is the family with its `model` block."""

    title: str
    load: Callable[[Path], tuple[Any, np.ndarray]]
    spec: Mapping[str, Any]


def digits(_: Path) -> tuple[Any, np.ndarray]:
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    return x / 16.0, y


def docstrings(_: Path) -> tuple[Any, np.ndarray]:
    from sklearn.feature_extraction.text import CountVectorizer

    from gendist.data.embedded import docstrings as embedded

    table = embedded().table
    counts = CountVectorizer(min_df=2).fit_transform(table.column("text").to_pylist()).astype(np.float64)
    return counts, np.array(table.column("package").to_pylist())


def mnist(folder: Path) -> tuple[Any, np.ndarray]:
    import pyarrow.parquet as pq

    y = np.concatenate(
        [pq.read_table(file, columns=["label"])["label"].to_numpy() for file in sorted(folder.rglob("train*.parquet"))]
    )
    return principal_components(folder, len(y) // MNIST_ROWS), y[:MNIST_ROWS]


CASES = {
    "digits-naive-bayes": Case(
        "digits, naive Bayes, gaussian",
        digits,
        {"family": "naive_bayes", "model": {"kind": "gaussian", "covariance_regularization": 0.01}},
    ),
    "digits-mixture": Case(
        "digits, a full Gaussian for each class",
        digits,
        {"family": "gmm", "model": {"num_components": 1, "labels": "classes", "covariance_regularization": 0.03}},
    ),
    "docstrings": Case(
        "docstrings, naive Bayes, multinomial",
        docstrings,
        {"family": "naive_bayes", "model": {"kind": "multinomial", "pseudocount": 0.1}},
    ),
    "mnist": Case(
        f"MNIST ({MNIST_ROWS:,} rows, 50 PCs), naive Bayes, gaussian",
        mnist,
        {"family": "naive_bayes", "model": {"kind": "gaussian", "covariance_regularization": 0.01}},
    ),
}


def accuracy(case: Case, x: Any, y: np.ndarray, share: float, unlabelled_weight: float, seed: int) -> float:
    import gendist

    rng = np.random.default_rng(seed)
    order = rng.permutation(len(y))
    held_out, training = order[: len(y) // 3], order[len(y) // 3 :]
    first = np.array([training[y[training] == label][0] for label in np.unique(y)])
    others = np.setdiff1d(training, first, assume_unique=True)
    rng.shuffle(others)
    labelled = np.concatenate([first, others[: max(0, round(share * len(training)) - len(first))]])
    shown = np.where(np.isin(training, labelled), y[training].astype(object), None)
    spec = {
        "name": "semi",
        **case.spec,
        "data": {"label": "y", "columns": ["x"]},
        "fit": {"unlabelled_weight": unlabelled_weight, "tolerance": 1e-3, "max_iterations": 100},
    }
    model = gendist.fit(spec, data={"x": x[training], "y": shown}).model
    predicted = model.classify(x[held_out]).argmax(1).numpy()
    return float((np.array(model.labels)[predicted] == y[held_out]).mean())


def measure(case: Case, x: Any, y: np.ndarray, num_seeds: int) -> dict[float, np.ndarray]:
    """(shares, seeds) accuracies by the weight of the unlabelled rows."""
    return {
        weight: np.array([[accuracy(case, x, y, share, weight, seed) for seed in range(num_seeds)] for share in SHARES])
        for weight in UNLABELLED_WEIGHTS
    }


def draw(found: Mapping[str, Mapping[float, np.ndarray]], path: Path) -> None:
    """A panel a case: the mean accuracy by the share of labels, with the standard deviation over seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * len(found), 3.8), layout="constrained")
    panels = figure.subplots(1, len(found), squeeze=False)[0]
    names = {0.0: "labelled rows alone", 0.1: "all rows, unlabelled ones count 0.1", 1.0: "all rows"}
    for panel, (title, accuracies) in zip(panels, found.items(), strict=True):
        for weight, values in accuracies.items():
            panel.errorbar(np.array(SHARES) * 100, values.mean(1), values.std(1), marker="o", capsize=3, label=names[weight])
        panel.set_xscale("log")
        panel.set_xticks([100 * share for share in SHARES], [f"{share:.0%}" for share in SHARES])
        panel.set_title(title, fontsize=9)
        panel.set_xlabel("rows with a label")
        panel.set_ylabel("accuracy on held-out rows")
    panels[0].legend(fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=[name for name in CASES if name != "mnist"])
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--mnist", type=Path, default=MNIST, help="folder of MNIST's Parquet files, as on the Hugging Face hub")
    parser.add_argument("--picture", type=Path, help="where to draw the accuracies")
    arguments = parser.parse_args()
    print_machine(1)
    found = {}
    for name in arguments.cases:
        case = CASES[name]
        x, y = case.load(arguments.mnist)
        found[case.title] = accuracies = measure(case, x, y, arguments.seeds)
        rows = []
        for i, share in enumerate(SHARES):
            each = [accuracies[weight][i] for weight in UNLABELLED_WEIGHTS]
            better = int((each[-1] > each[0]).sum())
            rows.append([f"{share:.0%}", *(f"{a.mean():.1%} +- {a.std():.1%}" for a in each), f"{better} of {arguments.seeds}"])
        header = [case.title, *(f"unlabelled_weight {weight:g}" for weight in UNLABELLED_WEIGHTS), "all rows better"]
        print_table(header, rows)
    if arguments.picture:
        draw(found, arguments.picture)


if __name__ == "__main__":
    main()
