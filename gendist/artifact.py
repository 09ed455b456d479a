"""A fitted model on disk: `model.json`, `model.safetensors` and, behind transforms, `transforms.safetensors` in a folder;
in its folder `prior/` another one, where the model's latents come from that.

Nothing in it is executed when it is read. A model with networks of the user's own names their classes, and only what is
importable here and derived from torch.nn.Module is called.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

import gendist
from gendist import noise
from gendist.atomic import write
from gendist.config import families, family_class, model_class, validated
from gendist.data.schema import Schema
from gendist.data.transforms import Step, Transforms
from gendist.protocols import GenerativeModel, NotImportable, UserError
from gendist.storage import Storage, place_of
from gendist.storage.working_copy import working_copy
from gendist.transformed import taken_apart, transformed

# 2 has transforms, 3 a schema of texts or sparse rows, 4 one of sequences or of tokens by a pattern, 5 a prior. What has
# none of these is written as 1, which any gendist reads.
FORMAT_VERSION = 5


class NotThisGendist(UserError):
    """The artifact is whole, but another gendist is needed to read it."""


@dataclass(frozen=True)
class Artifact:
    """A model, behind transforms or not, its family's name, what the columns of its data were called, and where its latents
    come from another model, that one."""

    family: str
    model: GenerativeModel
    schema: Schema
    prior: Artifact | None = None


def save(artifact: Artifact, folder: Path) -> None:
    """Write the folder's files; the same model gives the same bytes. To be atomic, write into `new_folder`."""
    model, transforms = taken_apart(artifact.model)
    schema = artifact.schema.model_dump(mode="json", exclude_defaults=True)
    has_prior = artifact.prior is not None
    description = {
        "format_version": FORMAT_VERSION if has_prior else _format_version(schema, transforms is not None),
        "gendist_version": gendist.__version__,
        "noise_version": noise.VERSION,
        "family": artifact.family,
        "config": model.config.model_dump(mode="json"),
        "labels": list(model.labels),
        "schema": schema,
    }
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / "model.safetensors", _in_bytes(model.tensors()))
    if transforms is not None:
        description["transforms"] = [step.model_dump(mode="json") for step in transforms.declared]
        write(folder / "transforms.safetensors", _in_bytes(transforms.tensors()))
    if artifact.prior is not None:
        description["has_prior"] = True
        save(artifact.prior, folder / "prior")
    write(folder / "model.json", (json.dumps(description, indent=2) + "\n").encode())


def _format_version(schema: Mapping[str, Any], has_transforms: bool) -> int:
    """The lowest that can say all this."""
    if "is_sequence" in schema or "pattern" in (schema.get("text") or {}):
        return 4
    if schema.keys() & {"categories", "is_sparse"}:
        return 3
    return 2 if has_transforms else 1


def _in_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    return safetensors.torch.save({name: tensor.contiguous().clone() for name, tensor in sorted(tensors.items())})


def digest(path: str | Path) -> str:
    """SHA-256 of all bytes of the artifact in a run directory or at `path` itself, with the names of its files."""
    with _folder(path) as folder:
        return _digest(folder)


def _digest(folder: Path) -> str:
    sha256 = hashlib.sha256()
    for file in sorted(folder.rglob("*")):
        if file.is_file() and not file.name.startswith("."):
            content = file.read_bytes()
            sha256.update(f"{file.relative_to(folder).as_posix()} {len(content)} ".encode() + content)
    return sha256.hexdigest()


@contextmanager
def _folder(path: str | Path) -> Iterator[Path]:
    """The folder of the artifact; of a URL a copy of it."""
    place = place_of(path)
    if isinstance(place, Path):
        inside = place / "artifact"
        yield inside if inside.is_dir() else place
        return
    with working_copy() as copy:
        is_run = Storage(place, is_patient=False).read("artifact/model.json") is not None  # a mistake is told at once
        storage = Storage(f"{place}/artifact" if is_run else place)
        names = storage.names() if storage.read("model.json") is not None else []
        if not names and storage.read("spec.yaml") is not None:
            names = ["spec.yaml"]
        for name in names:
            storage.download(name, copy / name)
        yield copy


def load_artifact(path: str | Path) -> Artifact:
    """The model in a run directory or an artifact, at a path or a URL, and what came with it."""
    with _folder(path) as folder:
        return _load(path, folder)


def load_with_digest(path: str | Path, wanted: str | None = None) -> tuple[Artifact, str]:
    """The same, and the digest of the very bytes that it was made of. UserError where they change meanwhile, as those of a run
    that is fitted anew do, or where their digest is not the one that is wanted."""
    with _folder(path) as folder:
        found = _digest(folder)
        artifact = _load(path, folder)
        if _digest(folder) != found:
            raise UserError(f"{path}: the artifact changes while it is read; try again when its fit is finished")
    if wanted not in (None, found):
        raise UserError(
            f"{path}: another model lies there now (digest {found[:12]}...) than the one that is served ({wanted[:12]}...); "
            "start the server anew to serve it, or put the other back"
        )
    return artifact, found


def _load(path: str | Path, folder: Path) -> Artifact:
    if not (folder / "model.json").is_file():
        hint = "its fit is not finished; run it again" if (folder / "spec.yaml").exists() else "no model.json there"
        raise UserError(f"{path}: no such artifact ({'no such folder' if not folder.exists() else hint})")
    try:
        description = json.loads((folder / "model.json").read_text(encoding="utf-8"))
        for key, known in (("format_version", FORMAT_VERSION), ("noise_version", noise.VERSION)):
            if description[key] > known:
                raise NotThisGendist(
                    f"{path}: written by a newer gendist ({key} {description[key]}; this one, {gendist.__version__}, reads up "
                    f"to {known}); upgrade gendist to read it"
                )
        family = description["family"]
        if family not in families():
            raise NotThisGendist(f"{path}: of family '{family}', which this gendist does not know ({', '.join(families())})")
        tensors = {name: value.clone() for name, value in safetensors.torch.load_file(folder / "model.safetensors").items()}
        config = validated(family_class(family).Config, description["config"], "config")
        schema = validated(Schema, description["schema"], "schema")
        if not isinstance(description["labels"], list):
            raise ValueError("labels are no list")
        model = model_class(family, config).from_tensors(config, tensors, tuple(description["labels"]))
        if model.config != config:
            raise ValueError(f"config {config} does not fit the tensors, which are of {model.config}")
        if "transforms" in description:
            declared = tuple(validated(Step, step, "transforms") for step in description["transforms"])
            fitted = safetensors.torch.load_file(folder / "transforms.safetensors")
            model = transformed(model, Transforms.from_tensors(schema.feature_names, declared, fitted))
        if schema.num_features != model.num_features:
            raise ValueError(f"a schema of {schema.num_features} features, a model of {model.num_features}")
        artifact = Artifact(family, model, schema)
    except NotThisGendist:
        raise
    except NotImportable as error:
        raise NotThisGendist(f"{path}: {error}") from error
    except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        raise UserError(
            f"{path}: the artifact is damaged ({type(error).__name__}: {reason}); fit the model again or restore the files"
        ) from error
    if not description.get("has_prior"):
        return artifact
    prior = load_artifact(folder / "prior")
    within, transforms = taken_apart(artifact.model)
    return replace(artifact, model=transformed(within.with_prior(prior.model), transforms), prior=prior)
