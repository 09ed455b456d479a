"""What metrics.jsonl is to know of the steps: means over a window of them, equal on every process."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gendist.protocols import Loss, Phase
from gendist.train.engine import Engine


class Sums:
    """Of one phase at one step: what this process adds to the means over the global batch, by name."""

    def __init__(self, counts: Mapping[str, float], total_weight: float) -> None:
        """counts: of each term, over the whole global batch. total_weight: of its rows."""
        self._counts, self._total_weight = counts, total_weight
        self.shares: defaultdict[str, list[Tensor]] = defaultdict(list)

    def add(self, loss: Loss) -> Tensor:
        """This micro-batch's part of what is minimised: () float32. A term without a single sample counts for nothing.

        Where it is not finite its gradient is made NaN in every parameter that it reaches, so that all processes learn of it
        from the norm of the gradient, with no exchange of its own.
        """
        assert loss.terms.keys() == self._counts.keys(), f"terms {list(loss.terms)}, counts of {list(self._counts)}"
        terms = {name: term.float() / (self._counts[name] or math.inf) for name, term in loss.terms.items()}
        total = torch.stack(list(terms.values())).sum()
        for name, share in (*terms.items(), ("loss", total)):
            self.shares[name].append(share.detach())
        for name, value in loss.watched.items():
            self.shares[name].append(value.detach().float() / (self._total_weight or math.inf))
        return total * torch.where(torch.isfinite(total.detach()), 1.0, torch.nan)

    def not_finite(self, engine: Engine) -> dict[str, float]:
        """The means that are not finite; every process must ask."""
        means = engine.sum(_added(list(self.shares.values()))).tolist()
        return {name: mean for name, mean in zip(self.shares, means, strict=True) if not math.isfinite(mean)}


class Window:
    """The steps since the last record. It holds tensors of the device, which are waited for when the record is made."""

    def __init__(self) -> None:
        self._shares: defaultdict[str, list[Tensor]] = defaultdict(list)
        self._num_times: defaultdict[str, int] = defaultdict(int)
        self._norms: defaultdict[str, list[float]] = defaultdict(list)
        self._rates: dict[str, float] = {}
        self._skipped: list[dict[str, Any]] = []
        self._num_samples = 0
        self.num_steps = 0
        self._began = time.monotonic()

    def add_phase(self, phase: Phase, sums: Sums, norm: float, learning_rate: float) -> None:
        for name, shares in sums.shares.items():
            self._shares[f"{phase.name}/{name}"].extend(shares)
            self._num_times[f"{phase.name}/{name}"] += 1
        self._norms[phase.name].append(norm)
        self._rates[phase.name] = learning_rate

    def skip_phase(self, step: int, phase: Phase) -> None:
        self._skipped.append({"step": step, "phase": phase.name})

    def add_step(self, num_samples: int) -> None:
        self._num_samples += num_samples
        self.num_steps += 1

    def record(self, step: int, engine: Engine) -> dict[str, Any]:
        """What is known after this many steps; every process must ask."""
        record: dict[str, Any] = {"step": step}
        if self._shares:
            means = engine.sum(_added(list(self._shares.values()))).tolist()
            record |= {
                name: mean / self._num_times[name] if math.isfinite(mean) else None
                for name, mean in zip(self._shares, means, strict=True)
            }
        for phase, norms in self._norms.items():
            record[f"{phase}/gradient_norm"] = sum(norms) / len(norms)
            record[f"{phase}/learning_rate"] = self._rates[phase]
        if self._skipped:
            record["skipped"] = self._skipped
        record["seconds"] = time.monotonic() - self._began
        record["samples_per_s"] = self._num_samples / record["seconds"]
        return record


def _added(shares: list[list[Tensor]]) -> Tensor:
    """(n,) float64 on the CPU: the sum of each list."""
    values = torch.stack([share for each in shares for share in each]).cpu().double()
    return torch.stack([part.sum() for part in values.split([len(each) for each in shares])])
