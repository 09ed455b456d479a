"""A distribution of a fitted model's latents, from which it samples instead of from the one that it was trained with.

What the encoder makes of the data is rarely the standard normal distribution that the decoder is sampled with, and what lies
between is the decoder's guess. A Gaussian mixture of the latents of all rows closes the gap ("ex-post density estimation",
Ghosh et al. 2020, section 4), and its components are clusters of the data.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gendist import bulk
from gendist.artifact import load_artifact, save
from gendist.atomic import new_folder
from gendist.config import Spec, load_spec
from gendist.fitting import fit
from gendist.protocols import UserError
from gendist.run import Run
from gendist.spec_yaml import read
from gendist.storage import Storage, path_here, place_of
from gendist.transformed import taken_apart, transformed

PRIOR = "prior"  # in the run directory, where nothing else is said


@dataclass(frozen=True)
class LatentPrior:
    """A mixture that is to be fitted to the latents of a run; an unfinished one goes on.

    run_dir  of the model
    path     the folder of what is made: latents/, the mixture's run in fit/, and the model that samples from it in artifact/
    spec     of the run
    mixture  the spec of the mixture
    """

    run_dir: str | Path
    path: Path
    spec: Spec
    mixture: Spec

    @classmethod
    def of(cls, run_dir: str | Path, overrides: Iterable[str] = (), out: str | Path | None = None) -> LatentPrior:
        """
        overrides  of the mixture's spec: model.num_components=50, cluster.num_workers=4; where nothing is said, what the
                   family says, the run's seed and the run's workers
        out        the folder; RUN/prior where left out

        UserError where there is no such run, or its family has no latents to draw.
        """
        folder = None if out is None else path_here(out, "--out")
        loaded = load_artifact(run_dir)
        model = taken_apart(loaded.model)[0]
        if not hasattr(model, "with_prior"):
            raise UserError(
                f"{run_dir}: of a {loaded.family}, which draws no latents of rows, so a prior has nothing to be fitted to"
            )
        place = place_of(run_dir)
        if folder is None and isinstance(place, str):
            raise UserError(f"{run_dir}: the latents and the mixture need a folder; choose one with --out")
        path = folder or Path(place) / PRIOR
        if (path / "spec.yaml").exists() or (path / "model.json").exists():
            raise UserError(f"--out {path}: holds a run or an artifact; choose another folder")
        spec = _spec_of(place)
        return cls(place, path, spec, load_spec(_mixture(model.prior_spec, spec, path), overrides))

    def encode(self, address: str | None = None, watch: Callable[[int, int], None] = lambda done, num_rows: None) -> None:
        """Draw one latent of q(z | x) a row, in the order of the rows; watch is called with how many are, and with all."""
        bulk.encode(
            self.run_dir,
            self.spec.data,
            self.path / "latents",
            draw=self.spec.seed,
            cluster=self.mixture.cluster,
            address=address,
            watch=watch,
        )

    def fit(self, address: str | None = None, watch: Callable[[dict[str, Any]], None] = lambda record: None) -> Run:
        """Fit the mixture to those rows that the run was trained on, and keep the model with it."""
        run = fit(self.mixture, run_dir=self.path / "fit", address=address, watch=watch)
        loaded, prior = load_artifact(self.run_dir), load_artifact(self.path / "fit")
        model, transforms = taken_apart(loaded.model)
        with_prior = transformed(model.with_prior(prior.model), transforms)
        shutil.rmtree(self.path / "artifact", ignore_errors=True)
        with new_folder(self.path / "artifact") as inside:
            save(replace(loaded, model=with_prior, prior=prior), inside)
        return run


def _spec_of(place: Path | str) -> Spec:
    if isinstance(place, str):
        content = Storage(place).read("spec.yaml")
        if content is not None:
            return load_spec(read(content.decode()))
    elif (path := place / "spec.yaml").exists():
        return load_spec(path)
    raise UserError(f"{place}: no run directory (no spec.yaml there), so nothing says what data it was trained on")


def _mixture(prior_spec: Mapping[str, Any], spec: Spec, folder: Path) -> dict[str, Any]:
    """The spec of the mixture of a run's latents."""
    workers = spec.cluster.num_workers
    return {
        "name": f"{spec.name}-prior",
        "seed": spec.seed,
        **prior_spec,
        "data": {
            "source": "parquet",
            "path": str(folder / "latents"),
            "weight": spec.data.weight,
            "validation_fraction": spec.data.validation_fraction,
        },
        "cluster": {"num_workers": workers if isinstance(workers, int) else workers[1], "use_gpu": spec.cluster.use_gpu},
    }
