"""Every config is a spec, and the schema beside them is the one that editors should see."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest
import yaml

from gendist.config import families, json_schema, load_spec

FOLDER = Path(__file__).parents[1] / "configs"
CONFIGS = sorted(FOLDER.glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_is_a_spec(path):
    assert path.stem.startswith(load_spec(path).family)
    assert path.read_text().startswith("# yaml-language-server: $schema=spec.schema.json")


@pytest.mark.parametrize("family", families())
def test_every_family_has_a_config_on_embedded_digits(family):
    spec = load_spec(FOLDER / f"{family}_digits.yaml")
    assert spec.family == family
    assert spec.data.source == "digits"


def test_the_schema_for_editors_is_up_to_date():
    """Where this fails, `make schema` writes it anew."""
    assert json.loads((FOLDER / "spec.schema.json").read_text()) == json_schema()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_schema_accepts_every_config(path):
    jsonschema.validate(yaml.safe_load(path.read_text()), json_schema())
