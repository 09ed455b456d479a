"""Which rows a fit learns from and which it holds out: checked, and what the manifest says of them."""

from __future__ import annotations

import secrets
from datetime import UTC, datetime
from functools import partial
from typing import Any

from gendist.blocks import Blocks
from gendist.config import Spec
from gendist.data import Dataset
from gendist.data.survey import Summary, survey
from gendist.machine import machine_type, versions
from gendist.protocols import Block, UserError


def parts_of(
    spec: Spec, dataset: Dataset, num_latents: int, unlabelled_weight: float = 1.0
) -> tuple[Blocks[Block], Blocks[Block] | None]:
    """The blocks to fit, and those held out, where the spec holds any out.

    num_latents        the width of the evidence
    unlabelled_weight  what multiplies the weight of a row whose label is not known
    """
    make = partial(dataset.blocks, num_latents, seed=spec.seed, unlabelled_weight=unlabelled_weight)
    if spec.data.validation_fraction == 0.0:
        return make(part="all"), None
    return make(part="training"), make(part="validation")


def survey_parts(
    spec: Spec, dataset: Dataset, training: Blocks[Block], validation: Blocks[Block] | None
) -> tuple[Summary, Summary | None]:
    """A first look at both parts; UserError where one has no row that counts."""
    summary, held_out = survey(training), survey(validation) if validation else None
    name, fraction = dataset.source.name, spec.data.validation_fraction
    for part, purpose in ((summary, "to fit"), (held_out, "to validate on")):
        if part is not None and part.num_rows == 0:
            whole = summary.num_sequences + (held_out.num_sequences if held_out else 0)
            what = f"{whole} sequences" if whole else f"{dataset.source.num_rows} rows"
            raise UserError(f"{name}: data.validation_fraction {fraction} of {what} leaves none {purpose}")
        if part is not None and part.total_weight <= 0.0:
            raise UserError(f"{name}: all {part.num_rows} rows {purpose} have weight 0")
    return summary, held_out


def manifest_of(spec: Spec, labels: tuple[Any, ...], summary: Summary, held_out: Summary | None, init: str) -> dict[str, Any]:
    """What tells a run from another beside its spec, and where it began. init: what it sets out from, in words or a digest."""
    data: dict[str, Any] = {"num_rows": summary.num_rows, "fingerprint": summary.fingerprint.hex()}
    if summary.num_sequences:
        data |= {"num_sequences": summary.num_sequences}
    if held_out is not None:
        data |= {"num_validation_rows": held_out.num_rows, "validation_fingerprint": held_out.fingerprint.hex()}
    if labels:
        data |= {"labels": list(labels)}
    return {
        "name": spec.name,
        "run_id": secrets.token_hex(8),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "seed": spec.seed,
        "data": data,
        "init": init,
        "machine": machine_type(),
        "versions": versions(),
    }
