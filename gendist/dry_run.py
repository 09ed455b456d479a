"""What a spec will take, told before anything is read, started or written."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

import torch

from gendist.config import Spec, family_class
from gendist.data.sources import missing_data
from gendist.protocols import UserError
from gendist.train.config import DeepConfig
from gendist.train.memory import bytes_per_parameter


def sizes(spec: Spec) -> Iterator[str]:
    """A line for each network of a family that is trained by gradient, where the spec says what a sample is; and one about data
    that are not here.

    UserError where networks do not suit such samples, or the data are not here and nothing says that they are elsewhere, as
    data.image_shape does, with which networks are told without them.
    """
    yield from _sizes_of_networks(spec)
    missing = missing_data(spec.data)
    if missing and spec.data.image_shape is None:
        raise UserError(missing)
    if missing:
        yield f"a fit would fail here: {missing}"


def _sizes_of_networks(spec: Spec) -> Iterator[str]:
    """Networks are made as shapes alone, which take no memory."""
    shape = spec.data.image_shape
    if not isinstance(spec.fit, DeepConfig) or shape is None:
        return
    if spec.data.label is not None and spec.data.labels is None and isinstance(spec.data.label, str):
        yield "how large networks are depends on the number of classes: say data.labels to be told"
        return
    if any(step.pca is not None for step in spec.data.transforms):
        yield "how large networks are depends on how many columns data.transforms leave"
        return
    x_shape = (prod(shape),) if spec.data.transforms else shape
    labels = spec.data.labels or (spec.data.label if isinstance(spec.data.label, tuple) else ())
    with torch.device("meta"):
        model = family_class(spec.family).create(spec.model, x_shape, labels, spec.seed)
    workers = spec.cluster.num_workers
    num_processes = max(1, workers if isinstance(workers, int) else workers[0])
    for name, network in model.networks().items():
        num_parameters = sum(parameter.numel() for parameter in network.parameters())
        size_bytes = num_parameters * bytes_per_parameter(spec.fit, name, num_processes)
        yield (
            f"{name}: {num_parameters:,} parameters, with gradients and moments {size_bytes / 1e9:.3g} GB on each of "
            f"{num_processes} processes, beside activations"
        )
