"""README.md is true: its Python runs, its file tree is that of the project, its commands exist."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

import gendist
from gendist.config import families, family_class, is_trained, load_spec

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


# Short ones stand together; each of the others says all that there is.
SHORT = [spec for content in blocks("yaml") if "\n---\n" in content for spec in yaml.safe_load_all(content)]
WHOLE = [content for content in blocks("yaml") if "\n---\n" not in content]


def test_its_python_runs(blobs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    spec = {"name": "events", "family": "gmm", "model": {"num_components": 3}}
    gendist.fit(spec, data=blobs, run_dir="runs/events")
    names = {"x": blobs, "frame": pd.DataFrame(blobs, columns=["x_0", "x_1", "x_2"]), "spec": spec}
    for program in blocks("python"):
        exec(program, names)
    np.testing.assert_array_equal(names["run"].model.sample(60, seed=1, offset=40), names["run"].model.sample(100, seed=1)[40:])


@pytest.mark.parametrize("short", SHORT, ids=lambda short: short["name"])
def test_its_short_specs_can_be_fitted(short, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng, n = np.random.default_rng(0), 200
    people = {"income": rng.integers(10_000, 90_000, n), "age": rng.integers(18, 80, n), "city": rng.choice(["a", "b"], n)}
    pd.DataFrame({**people, "churned": rng.choice(["yes", "no"], n)}).to_parquet("people.parquet")
    sensors = {"machine": np.arange(n) // 50, "time": np.arange(n) % 50, "heat": rng.normal(size=n)}
    pd.DataFrame(sensors).to_parquet("sensors.parquet")
    fit = {"num_steps": 2} if is_trained(family_class(short["family"])) else {"max_iterations": 2}
    model = gendist.fit({**short, "fit": fit}).model
    assert len(model.sample(3)) == 3


def test_each_family_has_a_short_spec():
    assert sorted(short["family"] for short in SHORT) == sorted(families())


@pytest.mark.parametrize("content", WHOLE, ids=lambda content: yaml.safe_load(content)["name"])
def test_its_specs_are_specs_and_say_what_there_is(content, tmp_path):
    path = tmp_path / "spec.yaml"
    path.write_text(content)
    spec = load_spec(path)
    for name in set(yaml.safe_load(content)) - {"name", "family", "seed"}:
        block = getattr(spec, name)
        unsaid = set(type(block).model_fields) - block.model_fields_set - {"source"}
        assert not unsaid, f"README does not say what {name}.{unsaid} is"


@pytest.mark.parametrize("path", sorted((ROOT / "gendist").rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_its_file_tree_names_every_file(path):
    tree = README.split("## The house")[1]
    if path.name != "__init__.py":
        assert re.search(rf"\b{re.escape(path.name)}\b", tree), f"{path.name} is not in the file tree"
    for folder in path.relative_to(ROOT).parts[:-1]:
        assert f"{folder}/" in tree


def test_its_file_tree_names_no_file_that_is_gone():
    tree = README.split("## The house")[1].split("```")[1]
    there = {path.name for path in ROOT.rglob("*.py") if ".venv" not in path.parts}
    assert set(re.findall(r"\w+\.py", tree)) <= there
