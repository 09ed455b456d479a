"""`fit`: from a spec to a fitted model. The only branch between the two ways of fitting."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gendist.config import Spec, is_trained, load_spec, model_class
from gendist.run import Run, Watch
from gendist.run_directory import RunDirectory

__all__ = ["Run", "Watch", "fit"]


def fit(
    spec: str | Path | Mapping[str, Any] | Spec,
    *,
    data: Any = None,
    init: Any = None,
    run_dir: str | Path | None = None,
    address: str | None = None,
    watch: Watch | None = None,
) -> Run:
    """Fit the model that a spec describes.

    spec      a path to a YAML file, or a dict
    data      an array or a sparse matrix, a mapping of these, a DataFrame, an Arrow table or a datasets.Dataset, instead of
              the spec's. An array (N, H, W[, C]) holds images: of uint8 they are 0 to 255, and scaled to 0 to 1 as those of
              files are (counts and categories are of another type); the model's own verbs take 0 to 1
    init      a model to start from, or an estimator that the family's `from_sklearn` understands
    run_dir   a path or a URL, where the run is kept, and resumed from where it is unfinished; None keeps it in cluster.storage,
              by the name of the spec, or nowhere without that
    address   of a Ray cluster, for `cluster.num_workers` of 1 and more
    watch     called with each record as it is written

    UserError (a ValueError) where the spec, the data or the run directory do not allow it.
    """
    spec = load_spec(spec)
    family = model_class(spec.family, spec.model)
    run_dir = run_dir or spec.place_in_storage
    directory = RunDirectory(run_dir, spec) if run_dir is not None else None
    watch = watch or (lambda record: None)
    # Only what is needed is imported.
    if is_trained(family):
        from gendist.training import train

        return train(spec, family, data, init, directory, address, watch)
    from gendist.em_fitting import estimate

    return estimate(spec, family, data, init, directory, address, watch)
