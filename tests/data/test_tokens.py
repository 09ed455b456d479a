"""Text as counts of tokens, against scikit-learn's vectorizers."""

from __future__ import annotations

import hashlib
import re

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from blocks_of import dataset_of, joined, matrix_of, one_run_a_leaf
from sklearn.feature_extraction.text import CountVectorizer

import gendist
from gendist import em_fitting
from gendist.artifact import load_artifact
from gendist.data import DataConfig, Schema, source_of
from gendist.data import domains as domains_module
from gendist.data.survey import survey
from gendist.data.tokens import TOKEN, bucket
from gendist.protocols import UserError

TEXTS = [
    "The quick brown fox jumps over the lazy dog.",
    "A naïve façade: Straße, ΣΊΣΥΦΟΣ, 北京 and snake_case 3.14 x y",
    "",
    "dog dog DOG, fox; it's a dog-eat-dog world",
    "1984 was 42 years ago\nor so",
] * 50
DOCUMENTS = {"body": TEXTS, "y": np.arange(len(TEXTS)) % 2}


def counted(**text) -> tuple[tuple[str, ...], np.ndarray]:
    dataset = dataset_of(DOCUMENTS, text={"column": "body", **text})
    return dataset.schema.feature_names, matrix_of(dataset)


@pytest.mark.parametrize("lowercase", [True, False])
def test_counts_are_those_of_scikit_learn(lowercase):
    vectorizer = CountVectorizer(lowercase=lowercase)
    expected = vectorizer.fit_transform(TEXTS).toarray()
    names, counts = counted(lowercase=lowercase)
    assert names == tuple(vectorizer.get_feature_names_out())
    np.testing.assert_array_equal(counts, expected)


def test_the_most_frequent_tokens_are_kept_and_of_equals_the_first_in_the_alphabet():
    totals = CountVectorizer().fit(TEXTS)
    counts = dict(zip(totals.get_feature_names_out(), totals.transform(TEXTS).sum(0).tolist()[0], strict=True))
    for most in (1, 3, 7, 1000):
        expected = sorted(sorted(counts, key=lambda token: (-counts[token], token))[:most])
        names, matrix = counted(max_vocabulary=most)
        assert list(names) == expected
        np.testing.assert_array_equal(matrix.sum(0), [counts[name] for name in names])
    names, _ = counted(min_count=100)
    assert set(names) == {name for name, count in counts.items() if count >= 100}


def test_a_hash_needs_no_vocabulary_and_is_the_same_everywhere():
    names, counts = counted(hash_buckets=7)
    assert names == tuple(f"hash_{i}" for i in range(7))
    expected = np.zeros((len(TEXTS), 7))
    for row, text in enumerate(TEXTS):
        for token in re.findall(TOKEN, text.lower()):
            digest = hashlib.blake2b(token.encode(), digest_size=8).digest()
            expected[row, int.from_bytes(digest, "little") % 7] += 1
    np.testing.assert_array_equal(counts, expected)
    assert bucket("dog", 2**20) == int.from_bytes(hashlib.blake2b(b"dog", digest_size=8).digest(), "little") % 2**20


def test_a_hash_is_found_without_a_pass_over_the_rows(monkeypatch):
    monkeypatch.setattr(domains_module.Look, "__call__", None)
    dataset_of(DOCUMENTS, text={"column": "body", "hash_buckets": 7})


def test_lists_of_tokens_are_taken_as_they_are():
    lists = pa.table({"body": pa.array([["The", "the", "a"], None, ["the", None], []], pa.list_(pa.string()))})
    dataset = dataset_of(lists, text={"column": "body"})
    assert dataset.schema.feature_names == ("The", "a", "the")
    np.testing.assert_array_equal(matrix_of(dataset), [[1, 1, 1], [0, 0, 0], [0, 0, 1], [0, 0, 0]])


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".jsonl"])
def test_the_same_texts_in_other_files_are_the_same_bytes(tmp_path, suffix):
    frame = pd.DataFrame({"body": [text.replace("\n", " ") or None for text in TEXTS]})
    for i, start in enumerate(range(0, len(frame), 97)):
        part, path = frame.iloc[start : start + 97], tmp_path / f"{i}{suffix}"
        if suffix == ".parquet":
            part.to_parquet(path, index=False)
        elif suffix == ".csv":
            part.assign(y=1).to_csv(path, index=False)
        else:
            part.to_json(path, orient="records", lines=True)
    text = {"column": "body", "min_count": 2}
    here = dataset_of(frame, text=text)
    there = dataset_of(None, one_run_a_leaf, path=str(tmp_path), text=text)
    assert there.schema == here.schema
    assert survey(there.blocks()).fingerprint == survey(here.blocks()).fingerprint


@pytest.mark.ray
def test_the_vocabulary_is_the_same_on_any_workers(cluster):
    from gendist.blocks.ray_blocks import RayBlocks

    text = {"column": "body", "max_vocabulary": 9}
    here = dataset_of(DOCUMENTS, text=text)
    there = dataset_of(DOCUMENTS, lambda load, leaves, most, keep: RayBlocks(load, leaves, 3, most, keep), text=text)
    assert there.schema == here.schema
    assert survey(there.blocks()).fingerprint == survey(here.blocks()).fingerprint


@pytest.mark.parametrize("hash_buckets", [0, 16])
def test_a_model_reads_texts_by_its_own_vocabulary(counter, tmp_path, monkeypatch, hash_buckets):
    monkeypatch.setattr(em_fitting, "draw_samples", lambda *_: None)
    spec = {
        "name": "texts",
        "family": counter,
        "model": {},
        "data": {"text": {"column": "body", "hash_buckets": hash_buckets}, "label": "y"},
        "fit": {"max_iterations": 2},
    }
    run = gendist.fit(spec, data=DOCUMENTS, run_dir=tmp_path / "run")
    known = load_artifact(tmp_path / "run").schema
    assert known == dataset_of(DOCUMENTS, **spec["data"]).schema.model_copy(update={"types": {}})
    other = source_of({"letter": ["dog fox unheard", "nothing known at all"], "z": [1, 2]})
    schema = Schema.of(other, DataConfig(columns=("letter",)), known=known)
    dataset = type(dataset_of(DOCUMENTS, **spec["data"])).open(other, DataConfig(), schema, gendist.blocks.LocalBlocks)
    (block,) = joined(dataset.blocks())
    assert block.x.shape == (2, run.model.num_features)
    if hash_buckets == 0:
        present = [known.feature_names[i] for i in block.x.col_indices().tolist()]
        assert sorted(present) == ["dog", "fox"]
    with pytest.raises(UserError, match="the model has counted tokens otherwise"):
        Schema.of(other, DataConfig(text={"column": "letter", "lowercase": False}), known=known)


@pytest.mark.parametrize(
    ("data", "config", "expected"),
    [
        (DOCUMENTS, {"text": {"column": "bdy"}}, "no column 'bdy'; did you mean 'body'"),
        (DOCUMENTS, {"text": {"column": "y"}}, "column 'y' holds int64; data.text counts tokens, of texts or lists of them"),
        (
            DOCUMENTS,
            {"text": {"column": "body"}, "columns": ["y"]},
            "data.columns: 'y'; with data.text its column 'body' is fitted",
        ),
        (
            DOCUMENTS,
            {"text": {"column": "body", "min_count": 10**6}},
            "occurs 1000000 times in all rows .of .*lower data.text.min",
        ),
        (
            {"body": ["", "a b"]},
            {"text": {"column": "body"}},
            "has no token that occurs 1 times in all rows; a token of a text",
        ),
        (
            DOCUMENTS,
            {"text": {"column": "body"}, "transforms": ["log1p"]},
            "holds texts, whose counts are sparse, which data.tr",
        ),
    ],
)
def test_mistakes_are_told(data, config, expected):
    with pytest.raises(UserError, match=expected) as caught:
        dataset_of(data, **config)
    assert "\n" not in str(caught.value)
