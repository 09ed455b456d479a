"""The `fit:` block of a spec whose family is fitted by expectation-maximization."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

STARTS = ("auto", "kmeans||", "kmeans++", "random", "random_responsibilities", "labels")
WITHOUT_DISTANCES = ("random_responsibilities", "labels")  # the starts that look for no centers


class EMConfig(BaseModel):
    """
    max_iterations    EM iterations at most
    tolerance         stop when the mean log-likelihood of a row gains less than this; 0 runs all iterations
    time_budget_s     stop after the iteration in which this many seconds are used up; a resumed run counts on
    init              "auto" (what suits the family and the labels), "kmeans||" (k-means from a seeding of few passes, however
                      many centers), "kmeans++" (k-means from a seeding of a pass a center), "random" (rows drawn at random),
                      "random_responsibilities" (rows shared out at random: all latents begin almost alike), "labels" (from the
                      labelled rows alone), or an artifact or run directory to start from
    num_restarts      starts from as many seeds, fitted side by side in the same passes; the best is kept, hopeless ones are
                      given up early
    unlabelled_weight what a row whose label is not known counts for, beside one whose label is (Nigam et al. 2000, section
                      5.3.1); 0 leaves such rows out
    precision         of the products over the rows, "float64" or "float32"; sums over blocks are float64
    checkpoint_every  iterations between checkpoints
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    MAY_CHANGE: ClassVar[frozenset[str]] = frozenset()
    """What may be another when a run is resumed."""

    max_iterations: int = Field(default=100, ge=1)
    tolerance: float = Field(default=1e-3, ge=0.0, allow_inf_nan=False)
    time_budget_s: float | None = Field(default=None, gt=0.0)
    init: str = Field(default="auto", min_length=1)
    num_restarts: int = Field(default=1, ge=1)
    unlabelled_weight: float = Field(default=1.0, ge=0.0, allow_inf_nan=False)
    precision: Literal["float64", "float32"] = "float64"
    checkpoint_every: int = Field(default=10, ge=1)
