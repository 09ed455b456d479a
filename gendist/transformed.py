"""A model behind the transforms that its rows went through: what a fit with `data.transforms` returns and an artifact loads.

Legend: N rows, D original features, E features after the transforms.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import BaseModel
from torch import Tensor

from gendist.data.transforms import Transforms
from gendist.figures import Figure, ToData
from gendist.models.ops.offered import Offered
from gendist.protocols import sequences_of

# What families have beside the verbs of all, of rows or of sequences as the data hold them.
FURTHER = (
    "active_units",
    "cluster",
    "draw_latents",
    "filtered_probs",
    "forecast",
    "forecast_states",
    "interpolate",
    "most_likely_states",
    "prior",
    "sample_classes",
    "sample_posterior_states",
    "sample_states",
    "sample_together",
    "traverse",
    "with_prior",
)


@dataclass(frozen=True, eq=False)
class Transformed:
    """A `GenerativeModel` of rows x as the data hold them: z = transforms.forward(x) is what `model` was fitted to.

    log_prob, elbo and log_prob_bound are densities of x, by the change of variables log p(x) = log p(z) + log |det dz/dx|.
    Where a pca drops directions x has none, and they are the densities of the principal coordinates that it keeps (see
    `Transforms.log_abs_det`); a sample then is an x in the space that these directions span.
    """

    model: Any
    transforms: Transforms

    def __post_init__(self) -> None:
        if self.model.num_features != len(self.transforms.feature_names):
            raise ValueError(
                f"transforms that make {len(self.transforms.feature_names)} features, a model of {self.model.num_features}"
            )

    @property
    def Config(self) -> type[BaseModel]:
        return type(self.model).Config

    @property
    def not_offered(self) -> Mapping[str, str]:
        return self.model.not_offered

    @property
    def config(self) -> BaseModel:
        return self.model.config

    @property
    def labels(self) -> tuple[Any, ...]:
        return self.model.labels

    @property
    def conditions(self) -> tuple[Any, ...]:
        """What `sample` may be given, where that is not any of the labels."""
        return getattr(self.model, "conditions", self.model.labels)

    @property
    def num_features(self) -> int:
        """D."""
        return len(self.transforms.source_names)

    @property
    def density(self) -> str:
        """What log_prob, or a bound of it, is the density of, in words; empty where it is that of x."""
        kept = self.transforms.num_kept
        of_pca = "" if kept is None else f"density of the {kept} principal coordinates that pca keeps: x itself has none"
        return "; ".join(filter(None, [of_pca, getattr(self.model, "density", "")]))

    def __repr__(self) -> str:
        return f"Transformed({self.model!r}, num_features={self.num_features})"

    def tensors(self) -> dict[str, Tensor]:
        """The model's and the transforms'."""
        parts = {"model": self.model.tensors(), "transforms": self.transforms.tensors()}
        return {f"{part}.{name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()}

    def from_tensors(self, config: Any, tensors: Mapping[str, Tensor], labels: tuple[Any, ...]) -> Transformed:
        """The inverse of `tensors`, of a model and transforms declared as these are."""
        parts: dict[str, dict[str, Tensor]] = {"model": {}, "transforms": {}}
        for key, tensor in tensors.items():
            part, _, name = key.partition(".")
            if part not in parts:
                raise ValueError(f"tensor {key}; those of model and transforms are needed")
            parts[part][name] = tensor
        model = type(self.model).from_tensors(config, parts["model"], labels)
        transforms = self.transforms
        fitted = Transforms.from_tensors(transforms.source_names, transforms.declared, parts["transforms"])
        return Transformed(model, fitted)

    def sample(self, num_samples: int, *, seed: int = 0, offset: int = 0, given: Any = None, **options: Any) -> Any:
        """(num_samples, D) rows offset.. of the endless sample that belongs to the seed, as the data would hold them."""
        z = self.model.sample(num_samples, seed=seed, offset=offset, given=given, **options)
        return self._inverse(z)

    @Offered
    def log_prob(self, x_ND: Any) -> Tensor:
        """(N,) log p(x) in nats, in the units of x; of the principal coordinates where a pca drops directions."""
        return self._density(self.model.log_prob, x_ND)

    @Offered
    def elbo(self, x_ND: Any, *rest: Any, **options: Any) -> Tensor:
        """(N,) a lower bound of log_prob."""
        return self._density(self.model.elbo, x_ND, *rest, **options)

    @Offered
    def log_prob_bound(self, x_ND: Any, *rest: Any, **options: Any) -> Tensor:
        """(N,) a tighter bound of log_prob."""
        return self._density(self.model.log_prob_bound, x_ND, *rest, **options)

    @Offered
    def encode(self, x_ND: Any, *rest: Any, **options: Any) -> Tensor:
        """The model's representation of the transformed rows."""
        return self.model.encode(self._forward(x_ND), *rest, **options)

    @Offered
    def decode(self, latents: Any, *rest: Any, **options: Any) -> Tensor:
        """(N, D) the image in x of the model's mean of z: the mean of x where the transforms are linear, without log1p."""
        return self.transforms.inverse(self.model.decode(latents, *rest, **options))

    @Offered
    def classify(self, x_ND: Any) -> Tensor:
        """(N, C) log p(label | x), which no change of variables changes."""
        return self.model.classify(self._forward(x_ND))

    @Offered
    def impute(self, x_ND: Any, *rest: Any, **options: Any) -> Any:
        """(N, D) x with the missing entries filled in, as the image of what the model fills in."""
        filled = self.model.impute(self._forward(x_ND), *rest, **options)
        return [self.transforms.inverse(z) for z in filled] if isinstance(filled, list) else self.transforms.inverse(filled)

    @Offered
    def reconstruct(self, x_ND: Any, *rest: Any, **options: Any) -> Any:
        """(N, D) the image of the model's reconstruction."""
        return self.transforms.inverse(self.model.reconstruct(self.transforms.forward(x_ND), *rest, **options))

    def check_rows(self, x: Any) -> None:
        """UserError where x cannot be transformed, or cannot be of the model then."""
        z = self._forward(x)
        if hasattr(self.model, "check_rows"):
            self.model.check_rows(z)

    def figures(self, seed: int) -> dict[str, Figure]:
        """What the family would have people look at, of x; nothing where it has nothing."""
        figures = self.model.figures(seed) if hasattr(self.model, "figures") else {}
        to_data = ToData(self.transforms.inverse, self.transforms.matrix)
        return {name: figure.to_data(to_data) for name, figure in figures.items()}

    def __getattr__(self, name: str) -> Any:
        """One of `FURTHER`, where the model within has it."""
        model = self.__dict__.get("model")  # not there yet while it is unpickled
        if reason := getattr(model, "not_offered", {}).get(name):
            raise AttributeError(f"{name} is not offered: {reason}")
        if name not in FURTHER or not hasattr(model, name):
            raise AttributeError(f"a {type(model).__name__} behind transforms has no {name}; `model.model` is the one within")
        verb = getattr(model, name)
        if name in ("prior", "sample_classes", "sample_states"):
            return verb
        if name == "sample_together":
            return lambda addresses: [self._inverse(z) for z in verb(addresses)]
        if name == "with_prior":
            return lambda prior: Transformed(verb(prior), self.transforms)
        if name == "forecast":
            return lambda x, *rest, **options: self._inverse(verb(self._forward(x), *rest, **options))
        if name == "interpolate":
            return lambda x_a, x_b, *rest, **options: self._inverse(
                verb(self._forward(x_a), self._forward(x_b), *rest, **options)
            )
        if name == "traverse":
            return lambda x=None, **options: self._inverse(verb(None if x is None else self._forward(x), **options))
        return lambda x, *rest, **options: verb(self._forward(x), *rest, **options)

    def _inverse(self, z: Tensor) -> Tensor:
        """Of rows (N, E), or of sequences (S, T, E)."""
        return self.transforms.inverse(z) if z.ndim == 2 else self.transforms.inverse(z.flatten(0, 1)).unflatten(0, z.shape[:2])

    def _forward(self, x: Any) -> Any:
        """The transformed rows; of a model of sequences the transformed sequences."""
        if not getattr(self.model, "takes_sequences", False):
            return self.transforms.forward(x)
        return [self.transforms.forward(x_TD) for x_TD in sequences_of(x)]

    def _density(self, of_z: Callable[..., Tensor], x_ND: Any, *rest: Any, **options: Any) -> Tensor:
        if getattr(self.model, "takes_sequences", False):
            mapped = [self.transforms.map(x_TD) for x_TD in sequences_of(x_ND)]
            if not mapped:
                return torch.zeros(0, dtype=torch.float64)
            log_abs_det_S = torch.stack([log_abs_det_T.sum() for _, log_abs_det_T in mapped])
            return of_z([z_TE for z_TE, _ in mapped], *rest, **options) + log_abs_det_S
        z_NE, log_abs_det_N = self.transforms.map(x_ND)
        return of_z(z_NE, *rest, **options) + log_abs_det_N


def transformed(model: Any, transforms: Transforms | None) -> Any:
    """The model behind the transforms; the model itself where there are none."""
    return Transformed(model, transforms) if transforms is not None and transforms.steps else model


def taken_apart(model: Any) -> tuple[Any, Transforms | None]:
    """The inverse: the family's model, and the transforms that it stands behind, or None."""
    return (model.model, model.transforms) if isinstance(model, Transformed) else (model, None)
