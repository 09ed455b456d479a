"""Data that come with what gendist is installed with. The digits are in test_sources.py."""

from __future__ import annotations

from collections import Counter

import sklearn.cluster
from blocks_of import dataset_of

from gendist.config import load_data_spec
from gendist.data import DataConfig, open_source
from gendist.data.embedded import MIN_WORDS, PACKAGES


def test_docstrings_are_texts_of_scikit_learn_with_their_package():
    table = open_source(DataConfig(source="docstrings")).table
    texts, packages = table["text"].to_pylist(), table["package"].to_pylist()
    assert len(texts) > 500
    assert len(set(texts)) == len(texts)
    assert all(len(text.split()) >= MIN_WORDS and ">>> " not in text for text in texts)
    assert set(Counter(packages)) == set(PACKAGES)
    assert min(Counter(packages).values()) > 20
    about_kmeans = next(text for text in texts if text.startswith("K-Means clustering."))
    assert " ".join(about_kmeans.split()) in " ".join(sklearn.cluster.KMeans.__doc__.split())


def test_they_are_data_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_data_spec("docstrings").data.source == "docstrings"
    text = {"column": "text", "min_count": 5}
    dataset = dataset_of(None, source="docstrings", label="package", text=text, weight=None)
    assert dataset.labels == PACKAGES
    assert {"cluster", "regression", "the"} <= set(dataset.schema.feature_names)
