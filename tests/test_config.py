"""A spec says what it means; a mistake in it is told in one line with the nearest thing that is allowed."""

from __future__ import annotations

import numpy as np
import pytest
import yaml

from gendist.config import families, load_data_spec, load_spec, overrides_it_knows
from gendist.execution import execution
from gendist.protocols import UserError
from gendist.spec_yaml import read

GOOD = {"name": "a", "family": "gmm", "model": {"num_components": 3}, "data": {"source": "digits"}}


def test_defaults_are_resolved_and_read_back():
    spec = load_spec(GOOD)
    assert spec.fit.init == "auto"
    assert spec.model.covariance_type == "full"
    assert load_spec(yaml.safe_load(spec.to_yaml())) == spec


def test_overrides():
    changes = ["model.num_components=7", "fit.tolerance=1e-5", "data.columns=[a, b]", "cluster.num_workers=4", "seed=9"]
    spec = load_spec(GOOD, changes)
    assert (spec.model.num_components, spec.fit.tolerance, spec.data.columns) == (7, 1e-5, ("a", "b"))
    assert (spec.cluster.num_workers, spec.seed) == (4, 9)
    assert GOOD["model"] == {"num_components": 3}


@pytest.mark.parametrize(
    "text",
    [
        "d/run #3/a.npy",
        "#x.parquet",
        "a.npy # b",
        "*.npy",
        "2024-13-45",
        "2024-01-02",
        "1:30",
        "0x_",
        "010",
        "1_000",
        "!!int foo",
    ],
)
def test_a_value_is_what_it_looks_like(text):
    """What YAML would lose a part of, or take for something else, is the text that was given."""
    assert load_spec(GOOD, ["data.source=null", f"data.path={text}"]).data.path == text


def test_integers_are_decimal(tmp_path):
    path = tmp_path / "spec.yaml"
    for given, meant in (("010", 10), ("7", 7), ("+3", 3), ("0", 0)):
        path.write_text(yaml.safe_dump({**GOOD, "seed": "?"}).replace("'?'", given))
        assert load_spec(path).seed == load_spec(GOOD, [f"seed={given}"]).seed == meant
    for given in ("1:30", "0x1f", "0b11"):
        path.write_text(yaml.safe_dump({**GOOD, "seed": "?"}).replace("'?'", given))
        for spec, overrides in ((path, []), (GOOD, [f"seed={given}"])):
            with pytest.raises(UserError, match="seed: input should be a valid integer"):
                load_spec(spec, overrides)


@pytest.mark.parametrize(
    "text", ["09", "010", "1:30", "1:30.5", "0x1f", "1_000", "2024-01-02", "a #b", "#", "no", "1.5", "~", ""]
)
def test_a_resolved_spec_is_read_as_it_was_written(text):
    spec = load_spec({**GOOD, "data": {"source": "digits", "label": "y", "labels": [text, "x"]}})
    assert spec.data.labels == (text, "x")
    assert load_spec(read(spec.to_yaml())) == spec


@pytest.mark.parametrize("text", ["!!int foo", "!!float ''", "!!bool foo", "!!timestamp foo"])
def test_a_value_that_its_tag_does_not_suit_is_told(text, tmp_path):
    path = tmp_path / "spec.yaml"
    path.write_text(f"name: a\nfamily: gmm\nseed: {text}\n")
    with pytest.raises(UserError, match="not YAML"):
        load_spec(path)
    with pytest.raises(UserError, match="seed: input should be a valid integer"):
        load_spec(GOOD, [f"seed={text}"])


@pytest.mark.parametrize(
    ("storage", "place"),
    [
        ("runs", "runs/a"),
        ("/shared/runs/", "/shared/runs/a"),
        ("file:///shared/runs", "/shared/runs/a"),
        ("file:///", "/a"),
        ("/", "/a"),
        ("s3://bucket/runs/", "s3://bucket/runs/a"),
        ("s3://bucket", "s3://bucket/a"),
        ("memory://", "memory://a"),
    ],
)
def test_runs_are_kept_by_their_name_in_a_storage(storage, place):
    assert load_spec(GOOD, [f"cluster.storage={storage}"]).place_in_storage == place


def test_the_number_of_workers_is_no_part_of_the_identity():
    assert load_spec(GOOD, ["cluster.num_workers=4"]).identity() == load_spec(GOOD).identity()
    assert load_spec(GOOD, ["seed=4"]).identity() != load_spec(GOOD).identity()


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("famly=gmm", "unknown key 'famly'; did you mean 'family'?"),
        ("model.num_component=3", "unknown key 'num_component' in model; did you mean 'num_components'?"),
        ("data.pth=x", "unknown key 'pth' in data; did you mean 'path'?"),
        ("fit.tol=1", "unknown key 'tol' in fit; did you mean 'tolerance'?"),
        ("fit.zzz=1", "unknown key 'zzz' in fit; allowed are max_iterations"),
        ("cluster.workers=1", "unknown key 'workers' in cluster; did you mean 'num_workers'?"),
        ("family=gmn", "family 'gmn'; did you mean 'gmm'?"),
        ("model.num_components=0", "model.num_components: input should be greater than or equal to 1, not 0"),
        ("model.num_components=two", "model.num_components: input should be a valid integer"),
        ("model.covariance_type=round", "model.covariance_type: input should be 'full', 'tied', 'diag' or 'spherical'"),
        ("data.validation_fraction=1", "less than 1"),
        ("seed=-1", "seed: input should be greater than or equal to 0"),
        ("name=a/b", "name: string should match pattern"),
        ("num_components", "is not an override; write key=value"),
        ("name.x=1", "name is a value, not a block"),
        ("seed=[", "seed: input should be a valid integer"),
    ],
)
def test_mistakes_are_told_with_the_nearest_key(override, expected, tmp_path):
    path = tmp_path / "spec.yaml"
    path.write_text(yaml.safe_dump(GOOD))
    with pytest.raises(UserError) as caught:
        load_spec(path, [override])
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", "a mapping of keys and values is needed"),
        ("- 1", "a mapping of keys and values is needed"),
        ("a: [", "not YAML"),
        ("name: a", f"family is missing; allowed are {', '.join(families())}"),
        ("family: gmm\nname: a", "model is missing"),
        ("family: gmm\nname: a\nmodel: 3", "model: input should be"),
    ],
)
def test_a_file_that_is_no_spec_is_named(content, expected, tmp_path):
    path = tmp_path / "spec.yaml"
    path.write_text(content)
    with pytest.raises(UserError) as caught:
        load_spec(path)
    assert str(caught.value).startswith(str(path))
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_data_for_scoring_is_a_path_or_a_yaml_file(tmp_path):
    assert load_data_spec("x.parquet").data.path == "x.parquet"
    assert load_data_spec("digits").data.source == "digits"
    path = tmp_path / "d.yaml"
    path.write_text(yaml.safe_dump({**GOOD, "cluster": {"num_workers": 3}}))
    spec = load_data_spec(str(path), ["data.weight=w"])
    assert (spec.data.source, spec.data.weight, spec.cluster.num_workers) == ("digits", "w", 3)
    with pytest.raises(UserError, match="did you mean 'path'"):
        load_data_spec(str(path), ["data.pth=w"])


TOY = {"name": "a", "family": "toy", "model": {}, "data": {"source": "digits"}}


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("fit.max_iterations=3", "unknown key 'max_iterations' in fit; allowed are num_steps"),
        ("fit.num_step=3", "unknown key 'num_step' in fit; did you mean 'num_steps'?"),
        ("fit.engine.kind=dpp", "fit.engine.kind: input should be 'ddp' or 'deepspeed', not 'dpp'"),
        ("fit.engine.zero=1", "unknown key 'zero' in fit.engine; did you mean 'zero_stage'?"),
        (
            "fit.optimizers={discriminator: {learnig_rate: 1e-3}}",
            "unknown key 'learnig_rate' in fit.optimizers.discriminator; did you mean 'learning_rate'?",
        ),
        ("fit.micro_batch_size=48", "fit: micro_batch_size 48 does not divide global_batch_size 128"),
        ("fit.optimizer.lr=1", "unknown key 'lr' in fit.optimizer; allowed are kind, learning_rate"),
        ("cluster.num_workers=[4,1]", "cluster.num_workers: a whole number from 0 on is needed, or [least, most], such as "),
        ("cluster.num_workers=[0,2]", "such as [1, 4], not [0, 2]"),
        ("cluster.num_workers=many", "such as [1, 4], not 'many'"),
        ("cluster.num_workers=-1", "such as [1, 4], not -1"),
        ("cluster.num_workers=true", "such as [1, 4], not True"),
        ("tracking.wandb=of", "tracking.wandb: input should be 'offline', 'online' or 'disabled', not 'of'"),
    ],
)
def test_mistakes_in_the_spec_of_a_family_that_is_trained(toy, override, expected):
    with pytest.raises(UserError) as caught:
        load_spec(TOY, [override])
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_how_a_family_is_fitted_tells_what_fit_may_say(toy):
    spec = load_spec(TOY, ["cluster.num_workers=[1,4]", "fit.num_steps=7"])
    assert spec.fit.num_steps == 7
    assert spec.cluster.num_workers == (1, 4)
    assert load_spec(yaml.safe_load(spec.to_yaml())) == spec
    with pytest.raises(UserError, match=r"cluster.num_workers \[1, 4\]: the family gmm is fitted in passes over the data"):
        load_spec(GOOD, ["cluster.num_workers=[1,4]"])


def test_only_training_is_elastic():
    spec = load_data_spec("digits", ["cluster.num_workers=[1,4]"])
    with pytest.raises(UserError, match="only training by gradient is elastic"), execution(spec.cluster):
        pass


def test_where_training_computes_is_no_part_of_the_identity(toy):
    plain = load_spec(TOY).identity()
    for override in ("fit.engine.kind=deepspeed", "fit.micro_batch_size=4", "fit.keep_last=9", "tracking.wandb=disabled"):
        assert load_spec(TOY, [override]).identity() == plain
    for override in ("fit.num_steps=4", "fit.global_batch_size=4", "fit.ema=0.1", "fit.optimizer.learning_rate=1"):
        assert load_spec(TOY, [override]).identity() != plain


def test_overrides_for_several_families_reach_those_that_know_them(toy, tmp_path):
    paths = [tmp_path / "gmm.yaml", tmp_path / "toy.yaml"]
    for path, content in zip(paths, (GOOD, TOY), strict=True):
        path.write_text(yaml.safe_dump(content))
    overrides = ["fit.max_iterations=3", "fit.num_steps=3", "seed=4"]
    assert dict(overrides_it_knows(paths, overrides)) == {
        paths[0]: ["fit.max_iterations=3", "seed=4"],
        paths[1]: ["fit.num_steps=3", "seed=4"],
    }
    with pytest.raises(UserError, match="unknown key 'nonsense' in fit"):
        overrides_it_knows(paths, ["fit.nonsense=3"])
    with pytest.raises(UserError, match=r"fit\.max_iterations: input should be a valid integer"):
        overrides_it_knows(paths, ["fit.max_iterations.nonsense=3"])
    rate = "fit.optimizers.encoder.learning_rate=1e-3"
    assert dict(overrides_it_knows(paths, [rate])) == {paths[0]: [], paths[1]: [rate]}


def test_arrays_of_numpy_in_a_spec_are_lists():
    labels = load_spec({**GOOD, "data": {"label": "y", "labels": list(np.unique([3, 1, 3])), "columns": np.array(["x"])}}).data
    assert (labels.labels, labels.columns) == ((1, 3), ("x",))
