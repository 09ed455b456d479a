"""Networks of these tests are so small that a second thread only gets in the way of other processes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from gendist.one_thread import one_thread


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield
