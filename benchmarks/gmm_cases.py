"""What the benchmarks of Gaussian mixtures share: the cases, and where every contender starts.

Legend: N samples, D features, K components.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

MNIST = Path(__file__).parents[2] / "shared" / "data" / "mnist"
NUM_PRINCIPAL = 50


@dataclass(frozen=True)
class Case:
    """num_samples is None where the data are MNIST's images, of which the principal components are taken."""

    num_samples: int | None
    num_features: int
    num_components: int
    covariance_type: str

    def data(self, scale: int = 1, mnist: Path = MNIST) -> np.ndarray:
        """(N / scale, D) float64. FileNotFoundError where MNIST is needed and not there."""
        if self.num_samples is None:
            return principal_components(mnist, scale)
        return overlapping_clusters(self.num_samples // scale, self.num_features, self.num_components)

    def title(self, x: np.ndarray) -> str:
        return f"{len(x):,} x {x.shape[1]}, {self.num_components} components, {self.covariance_type}"


CASES = {
    "a": Case(1_000_000, 16, 16, "full"),
    "b": Case(200_000, 64, 32, "full"),
    "b-diag": Case(200_000, 64, 32, "diag"),
    "c": Case(None, NUM_PRINCIPAL, 64, "full"),
}


def overlapping_clusters(num_samples: int, num_features: int, num_components: int) -> np.ndarray:
    """(N, D) rows of `random_clusters`, which have equal weights."""
    rng = np.random.default_rng(0)
    means, factors = random_clusters(rng, num_features, num_components)
    which = rng.integers(0, num_components, num_samples)
    x = rng.normal(size=(num_samples, num_features))
    for k in range(num_components):
        x[which == k] = means[k] + x[which == k] @ factors[k].T
    return x


def random_clusters(rng: np.random.Generator, num_features: int, num_components: int) -> tuple[np.ndarray, np.ndarray]:
    """(K, D) means, 3 times standard normal, and (K, D, D) factors Q diag(sd) of the covariances Q diag(sd^2) Q^T, where Q is
    random orthogonal and sd uniform in 0.5..2: well-conditioned shapes that overlap."""
    rotations, _ = np.linalg.qr(rng.normal(size=(num_components, num_features, num_features)))
    sds = rng.uniform(0.5, 2.0, (num_components, 1, num_features))
    return 3.0 * rng.normal(size=(num_components, num_features)), rotations * sds


def principal_components(mnist: Path, scale: int) -> np.ndarray:
    """MNIST's training images (a folder in the Hugging Face hub's Parquet layout), as their first principal components."""
    import pyarrow.parquet as pq
    from PIL import Image
    from sklearn.decomposition import PCA

    files = sorted(mnist.rglob("train*.parquet"))
    if not files:
        raise FileNotFoundError(f"no train*.parquet in {mnist}; name MNIST's folder with --mnist")
    images = [image["bytes"] for file in files for image in pq.read_table(file, columns=["image"])["image"].to_pylist()]
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(image))).reshape(-1) for image in images[: len(images) // scale]])
    return np.ascontiguousarray(PCA(NUM_PRINCIPAL, random_state=0).fit_transform(pixels / 255.0))


def start(case: Case, x: np.ndarray, num_iterations: int = 1) -> Any:
    """scikit-learn's estimator where all contenders begin: random rows, the covariance of the data, equal weights."""
    from sklearn.mixture import GaussianMixture

    rng = np.random.default_rng(1)
    precision = np.linalg.inv(np.cov(x.T)) if case.covariance_type == "full" else 1.0 / x.var(0)
    return GaussianMixture(
        case.num_components,
        covariance_type=case.covariance_type,
        weights_init=np.full(case.num_components, 1.0 / case.num_components),
        means_init=x[rng.choice(len(x), case.num_components, replace=False)],
        precisions_init=np.stack([precision] * case.num_components),
        max_iter=num_iterations,
        tol=0.0,
    )


def spec(case: Case, num_iterations: int, num_workers: int, precision: str = "float64", **data: Any) -> dict[str, Any]:
    """What gendist is to fit; `data` is the spec's data: block."""
    return {
        "name": "benchmark",
        "family": "gmm",
        "model": {"num_components": case.num_components, "covariance_type": case.covariance_type},
        "data": data,
        "fit": {"max_iterations": num_iterations, "tolerance": 0.0, "precision": precision},
        "cluster": {"num_workers": num_workers},
    }
