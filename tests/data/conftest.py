"""Where `datasets` of the Hugging Face hub copies what it reads."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="module")
def cache_of_datasets(tmp_path_factory):
    """A folder of the test's own."""
    import datasets

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield
