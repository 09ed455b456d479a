"""MNIST in earnest: held-out bounds in nats, and the error with 100 labels, beside the papers'.

    python benchmarks/mnist.py CASE ... --mnist FOLDER [--seeds 0 1 2 3 4] [--runs runs/mnist] [key=value ...]

FOLDER holds train*.parquet and test*.parquet as the hub has them (ylecun/mnist). A case is a spec of configs/, with changes of
its own and those of the command line; it is fitted by `gendist.fit` in RUNS/CASE-SEED, where an unfinished run goes on, and a
finished one is only measured. Nothing is chosen by the test images.

Bounds are importance-weighted, of `--importance-samples` samples a test image (the papers': 5,000), of images that are made
binary anew (dynamic binarization). The error is the share of test images whose most probable class is wrong, after 100 training
images, ten a class and others for each seed, have kept their label.
"""

from __future__ import annotations

import argparse
import io
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from tables import print_machine, print_table

import gendist
from gendist.config import load_spec
from gendist.latent_prior import LatentPrior

CONFIGS = Path(__file__).parents[1] / "configs"
LABELS_OF_A_CLASS = 10
TEST_IMAGES_AT_ONCE = 1_000
PRIOR = ("fit.max_iterations=40",)


@dataclass(frozen=True)
class Case:
    """config is the name of a spec, changed as in a command line. paper is what is to be compared with, and whose it is."""

    config: str
    measure: Literal["bound", "error"]
    paper: str
    changes: Sequence[str] = ()


CASES = {
    "vae": Case("vae_mnist", "bound", "86.76 (Burda et al. 2016)"),
    "iwae": Case(
        "vae_mnist",
        "bound",
        "84.78 (Burda et al. 2016, 50 samples)",
        ("model.objective=iwae", "model.num_importance_samples=50"),
    ),
    "convolutional": Case("vae_mnist_convolutional", "bound", "below 84 is wanted"),
    "m2": Case("vae_mnist_semi_supervised", "error", "11.97 % (Kingma et al. 2014, M2)"),
    "gan": Case("gan_mnist_semi_supervised", "error", "0.93 % (Salimans et al. 2016)"),
}


def images_of(table: pa.Table) -> np.ndarray:
    """(N, 784) float32 of 0 to 1."""
    pictures = (Image.open(io.BytesIO(image["bytes"])) for image in table["image"].to_pylist())
    return np.stack([np.asarray(picture, dtype=np.float32).ravel() / 255.0 for picture in pictures])


def read(mnist: Path, part: str) -> pa.Table:
    files = sorted(mnist.rglob(f"{part}*.parquet"))
    if not files:
        raise SystemExit(f"no {part}*.parquet in {mnist}")
    return pa.concat_tables([pq.read_table(file) for file in files])


def with_few_labels(train: pa.Table, seed: int, folder: Path) -> Path:
    """A folder like the hub's with the training images, in which ten of each class have a label."""
    labels = np.array(train["label"].to_pylist(), dtype=np.int64)
    rng = np.random.default_rng(seed)
    kept = np.concatenate(
        [rng.choice(np.flatnonzero(labels == y), LABELS_OF_A_CLASS, replace=False) for y in np.unique(labels)]
    )
    is_missing = np.ones(len(labels), dtype=bool)
    is_missing[kept] = False
    folder.mkdir(parents=True, exist_ok=True)
    place = train.schema.get_field_index("label")
    table = train.set_column(place, "label", pa.array(labels, mask=is_missing)).replace_schema_metadata(None)
    pq.write_table(table, folder / "train-00000-of-00001.parquet")
    return folder


def measured(case: Case, model: Any, test: pa.Table, num_importance_samples: int) -> float:
    x = images_of(test)
    if case.measure == "error":
        best = np.concatenate(
            [np.asarray(model.classify(part).argmax(1)) for part in np.split(x, len(x) // TEST_IMAGES_AT_ONCE)]
        )
        wrong = np.array(model.labels, dtype=np.int64)[best] != np.array(test["label"].to_pylist())
        return 100.0 * float(wrong.mean())
    bounds = [
        float(model.log_prob_bound(part, num_samples=num_importance_samples, offset=i * TEST_IMAGES_AT_ONCE).mean())
        for i, part in enumerate(np.split(x, len(x) // TEST_IMAGES_AT_ONCE))
    ]
    return -statistics.fmean(bounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="+", choices=CASES, metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--mnist", type=Path, required=True)
    parser.add_argument("--runs", type=Path, default=Path("runs") / "mnist")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--importance-samples", type=int, default=5_000)
    parser.add_argument("--prior", type=int, default=0, metavar="K", help="also over a mixture of K components as prior")
    parser.add_argument("--set", nargs="*", default=[], metavar="key=value", help="changes to the specs")
    options = parser.parse_args()
    print_machine(1)
    train, test = read(options.mnist, "train"), read(options.mnist, "test")
    rows = []
    for name in options.cases:
        case, found, seconds = CASES[name], [], []
        for seed in options.seeds:
            folder = options.runs / f"{name}-{seed}"
            few = case.measure == "error"
            data = with_few_labels(train, seed, options.runs / f"100-labels-{seed}") if few else options.mnist
            all_that_are_there = ["data.label_fraction=1.0"] if few else []
            changes = [*case.changes, f"data.path={data}", *all_that_are_there, f"seed={seed}", *options.set]
            spec = load_spec(CONFIGS / f"{case.config}.yaml", changes)
            began = time.monotonic()
            run = gendist.fit(spec, run_dir=folder)
            seconds.append(time.monotonic() - began)
            found.append(measured(case, run.model, test, options.importance_samples))
            print(f"{name}, seed {seed}: {found[-1]:.2f}, fitted in {seconds[-1]:.0f} s", flush=True)
            if options.prior and not few:
                prior = LatentPrior.of(folder, [f"model.num_components={options.prior}", *PRIOR])
                prior.encode()
                prior.fit()
                over_it = measured(case, gendist.load(prior.path), test, options.importance_samples)
                print(f"{name}, seed {seed}, over a mixture of {options.prior}: {over_it:.2f}", flush=True)
        spread = f" (sd {statistics.stdev(found):.2f})" if len(found) > 1 else ""
        unit = "%" if case.measure == "error" else "nats"
        middle = statistics.fmean(found)
        rows.append([name, f"{middle:.2f}{spread} {unit}", str(len(found)), f"{statistics.fmean(seconds):.0f}", case.paper])
    print_table(["case", "held out", "seeds", "s a fit", "in the paper"], rows)


if __name__ == "__main__":
    main()
