"""A fitted model takes tables by the names of their columns, and gives samples as tables."""

from __future__ import annotations

import copy
import inspect
import pickle

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from scipy.sparse import csr_array

import gendist
from gendist import bulk
from gendist.config import families, family_class
from gendist.fitted_model import VERBS_OF_ROWS, FittedModel
from gendist.models.gmm import GaussianMixture
from gendist.models.naive_bayes import NaiveBayes
from gendist.protocols import UserError

RNG = np.random.default_rng(0)
CLASS = RNG.integers(0, 2, 300)
FRAME = pd.DataFrame(
    {
        "income": RNG.normal(30_000 + 9_000 * CLASS, 1_000).round(),
        "city": np.where(RNG.random(300) < 0.3 + 0.4 * CLASS, "rome", "oslo"),
        "age": RNG.normal(40, 5, 300),
        "label": np.where(CLASS, "yes", "no"),
    }
)
FRAME.loc[3, "city"] = None
FRAME.loc[4, "age"] = np.nan
BAYES = {
    "name": "people",
    "family": "naive_bayes",
    "model": {"kind": "mixed", "columns": {"income": "gaussian"}},
    "data": {"label": "label"},
}
NUMBERS = ["income", "age"]


@pytest.fixture(scope="module")
def bayes() -> FittedModel:
    return gendist.fit(BAYES, data=FRAME).model


def coded(frame: pd.DataFrame) -> np.ndarray:
    """The rows of x as the fit has coded them."""
    city = frame["city"].map({"oslo": 0.0, "rome": 1.0}).to_numpy()
    return np.stack([frame["income"], city, frame["age"]], 1).astype(np.float64)


MAKERS = {
    "frame": lambda frame: frame,
    "other columns": lambda frame: frame[["age", "label", "city", "income"]],
    "table": lambda frame: pa.table(frame[["age", "city", "income"]]),
    "mapping": lambda frame: {name: frame[name].to_numpy() for name in ("city", "age", "income")},
    "categorical": lambda frame: frame.assign(city=frame["city"].astype("category")),
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize("verb", ["log_prob", "joint_log_prob", "encode", "classify", "impute"])
def test_tables_are_what_arrays_of_the_same_rows_are(bayes, make, verb):
    of_array = getattr(bayes.plain, verb)(coded(FRAME))
    assert torch.equal(getattr(bayes, verb)(make(FRAME)), of_array)
    assert torch.equal(getattr(bayes, verb)(coded(FRAME)), of_array)
    assert torch.equal(getattr(bayes, verb)(torch.from_numpy(coded(FRAME))), of_array)


def test_a_text_that_the_fit_did_not_see_is_a_category_more(bayes):
    x = coded(FRAME)[:1]
    x[0, 1] = 2.0
    assert torch.equal(bayes.log_prob(FRAME[:1].assign(city="paris")), bayes.plain.log_prob(x))


@pytest.mark.parametrize(
    ("given", "match"),
    [
        (FRAME.drop(columns="age"), "the data frame: no column 'age'; there are 'income', 'city', 'label'"),
        (FRAME.rename(columns={"age": "agee"}), "no column 'age'; did you mean 'agee'"),
        (FRAME.assign(city=1.0), "column 'city' holds double, but the model was fitted to texts there"),
        (FRAME.assign(age="old"), "column 'age' is not numeric"),
        (FRAME[:0], "the data set is empty"),
        ({"age": 1.0, "city": "oslo", "income": 3.0}, r"has shape \(\); one row a sample is needed"),
        ({"age": [1.0], "city": ["oslo", "rome"], "income": [3.0]}, "columns of different lengths"),
        (FRAME[["income", "city", "age"]].to_numpy(), "not a ndarray of object; give a data frame"),
    ],
)
def test_what_is_no_table_of_its_rows_is_told_in_one_line(bayes, given, match):
    with pytest.raises(UserError, match=match) as told:
        bayes.log_prob(given)
    assert "\n" not in str(told.value)


def test_a_model_without_names_says_which_has_them(bayes):
    with pytest.raises(UserError, match=r"gendist.load returns knows the names of its columns"):
        bayes.plain.log_prob(FRAME[NUMBERS])


def test_columns_in_another_order_are_the_same_rows():
    spec = {"name": "two", "family": "gmm", "model": {"num_components": 2}}
    frame = FRAME[NUMBERS].dropna()
    model = gendist.fit(spec, data=frame).model
    assert torch.equal(model.log_prob(frame[["age", "income"]]), model.log_prob(frame.to_numpy()))
    transformed = gendist.fit({**spec, "data": {"transforms": ["standardize"]}}, data=frame).model
    expected = transformed.log_prob(frame.to_numpy())
    assert torch.equal(transformed.log_prob(frame[["age", "income"]]), expected)
    assert transformed.model.num_features == 2
    assert isinstance(transformed.model, GaussianMixture)


def test_it_is_one_of_its_family_and_knows_its_columns(bayes, tmp_path):
    assert isinstance(bayes, NaiveBayes)
    assert isinstance(bayes, FittedModel)
    assert bayes.column_names == bayes.feature_names == ("income", "city", "age")
    assert bayes.categories == {"city": ("oslo", "rome")}
    assert {"classify", "column_names", "weights"} <= set(dir(bayes))
    assert bayes.classify.__doc__ == NaiveBayes.classify.__doc__
    assert not hasattr(bayes, "reconstruct")
    for again in (pickle.loads(pickle.dumps(bayes)), copy.deepcopy(bayes)):
        assert torch.equal(again.log_prob(FRAME), bayes.log_prob(FRAME))


def test_a_model_goes_on_from_another(bayes):
    again = gendist.fit(BAYES, data=FRAME, init=bayes).model
    torch.testing.assert_close(again.log_prob(FRAME), bayes.log_prob(FRAME))
    fewer = FRAME[FRAME["city"] != "oslo"]  # of which there would be other indices
    assert gendist.fit(BAYES, data=fewer, init=bayes).model.categories == bayes.categories
    with pytest.raises(UserError, match="does not say which texts its categories are"):
        gendist.fit(BAYES, data=FRAME, init=bayes.plain)


def test_samples_are_the_table_that_the_command_writes(bayes, tmp_path):
    bayes.save(tmp_path / "people")
    for given in (None, "yes"):
        bulk.sample(tmp_path / "people", 20, tmp_path / "x.parquet", seed=3, offset=5, given=given)
        assert bayes.sample_table(20, seed=3, offset=5, given=given) == pq.read_table(tmp_path / "x.parquet")
    table = bayes.sample_table(50, seed=1)
    assert table.column_names == ["income", "city", "age", "label"]
    assert set(table["city"].to_pylist()) <= {"oslo", "rome", None}
    assert torch.equal(bayes.log_prob(table.to_pandas().dropna()), bayes.log_prob(table.filter(table["city"].is_valid())))


def test_filled_rows_have_names_too(bayes):
    table = bayes.table(bayes.impute(FRAME))
    assert table.column_names == ["income", "city", "age"]
    assert table["city"][3].as_py() in ("oslo", "rome")
    kept = FRAME["city"].notna()
    assert (table.to_pandas()["city"][kept] == FRAME["city"][kept]).all()
    with pytest.raises(UserError, match=r"x has shape \(300, 2\); \(N, 3\) is needed"):
        bayes.table(np.zeros((300, 2)))


def test_sequences_are_told_from_a_column_of_ids(tmp_path):
    frame = pd.DataFrame({"day": np.tile(np.arange(40), 3), "id": np.repeat([5, 3, 9], 40), "v": RNG.normal(size=120)})
    spec = {"name": "walks", "family": "hmm", "model": {"num_states": 2}, "data": {"sequence": "id", "order": "day"}}
    run = gendist.fit(spec, data=frame)
    sequences = [frame["v"].to_numpy()[i : i + 40, None] for i in (0, 40, 80)]
    assert torch.equal(run.model.log_prob(frame), run.model.log_prob(sequences))
    for one, other in zip(run.model.most_likely_states(pa.table(frame)), run.model.most_likely_states(sequences), strict=True):
        assert torch.equal(one, other)
    with pytest.raises(UserError, match="no column 'id', which tells the sequences of the model's data apart"):
        run.model.log_prob(frame[["v", "day"]])
    run.save(tmp_path / "walks")
    bulk.sample(tmp_path / "walks", 4, tmp_path / "x.parquet", seed=3, length=6)
    table = run.model.sample_table(4, seed=3, length=6)
    assert table == pq.read_table(tmp_path / "x.parquet")
    assert torch.equal(run.model.log_prob(table), run.model.log_prob(list(run.model.sample(4, seed=3, length=6))))
    assert run.model.sample_table(2).num_rows == 2 * run.model.length


def test_texts_and_sparse_rows(tmp_path):
    texts = pd.DataFrame({"body": ["a b b", "c", "a a c", "b"] * 5, "y": [0, 1, 0, 1] * 5})
    spec = {"name": "texts", "family": "naive_bayes", "model": {"kind": "multinomial"}}
    data = {"label": "y", "text": {"column": "body", "pattern": r"\w"}}
    model = gendist.fit({**spec, "data": data}, data=texts).model
    counts = np.array([[1, 2, 0], [0, 0, 1], [2, 0, 1], [0, 1, 0]] * 5)
    assert model.feature_names == ("a", "b", "c")
    assert torch.equal(model.classify(texts[["body"]]), model.classify(csr_array(counts)))
    sparse = gendist.fit({**spec, "data": {"label": "y"}}, data={"x": csr_array(counts), "y": texts["y"].to_numpy()}).model
    assert torch.equal(sparse.classify({"x": csr_array(counts)}), sparse.classify(csr_array(counts)))


def test_images_by_name():
    x = RNG.random((64, 8, 8))
    spec = {"name": "images", "family": "vae", "fit": {"num_steps": 1, "global_batch_size": 16}}
    spec["model"] = {"latent_dim": 2, "encoder": {"hidden_sizes": [8]}, "decoder": {"hidden_sizes": [8]}}
    model = gendist.fit(spec, data={"image": x}).model
    assert model.column_names == ("image",)
    for verb in ("elbo", "encode", "reconstruct"):
        assert torch.equal(getattr(model, verb)({"image": x}), getattr(model, verb)(x.reshape(64, -1)))
    mixture = gendist.fit({"name": "z", "family": "gmm", "model": {"num_components": 2}}, data=model.encode({"image": x})).model
    with_prior = model.with_prior(mixture)
    assert isinstance(with_prior, FittedModel)
    assert with_prior.artifact.prior is mixture.artifact
    assert model.with_prior(mixture.plain).prior is mixture.plain


def test_a_saved_model_is_an_artifact(bayes, tmp_path):
    run = gendist.fit(BAYES, data=FRAME)
    run.save(tmp_path / "new" / "people")
    again = gendist.load(tmp_path / "new" / "people")
    assert torch.equal(again.classify(FRAME), run.model.classify(FRAME))
    assert again.categories == run.model.categories
    written = bulk.sample(tmp_path / "new" / "people", 3, tmp_path / "x.npy")
    assert written.num_rows == 3
    with pytest.raises(UserError, match="stands there already; choose another folder"):
        run.save(tmp_path / "new" / "people")
    with pytest.raises(UserError, match="save memory://bucket/people: a URL, and only files and folders of this machine"):
        run.save("memory://bucket/people")


@pytest.mark.parametrize("family", families())
def test_every_verb_of_rows_is_known_as_one(family):
    """By the names of their arguments, which families keep to."""
    for name, verb in inspect.getmembers(family_class(family), inspect.isfunction):
        parameters = list(inspect.signature(verb).parameters)[1:2]
        if not name.startswith("_") and parameters and (parameters[0].split("_")[0] == "x" or parameters[0] == "sequences"):
            assert name in VERBS_OF_ROWS, name


def test_other_columns_may_hold_anything_and_have_any_length():
    frame = pd.DataFrame({"a": np.arange(60.0), "b": np.random.default_rng(0).normal(size=60)})
    model = gendist.fit({"name": "two", "family": "gmm", "model": {"num_components": 2}}, data=frame).model
    expected = model.log_prob(frame)
    odd = frame.assign(z=[1, "a"] * 30)
    twice = pd.concat([odd, odd[["z"]]], axis=1)
    mapping = {"a": frame["a"].to_numpy(), "b": frame["b"].to_numpy(), "other": np.arange(7)}
    for table in (odd, twice, mapping, pa.table(frame.assign(z="x"))):
        torch.testing.assert_close(model.log_prob(table), expected, rtol=0, atol=0)


def test_a_model_is_not_started_from_on_its_columns_in_another_order():
    frame = pd.DataFrame(np.random.default_rng(0).normal([0.0, 50.0], size=(60, 2)), columns=["a", "b"])
    spec = {"name": "two", "family": "gmm", "model": {"num_components": 2}}
    model = gendist.fit(spec, data=frame).model
    with pytest.raises(UserError, match=r"init: was fitted to other columns \(a, b\) than these \(b, a\)"):
        gendist.fit(spec, data=frame[["b", "a"]], init=model)
    gendist.fit(spec, data=frame.rename(columns={"a": "c"}), init=model)  # called otherwise
    gendist.fit(spec, data=frame.to_numpy(), init=model)
