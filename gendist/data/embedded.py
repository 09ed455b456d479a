"""Real data that come with what gendist is installed with: nothing is downloaded."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from functools import cache
from importlib import resources
from typing import Any

import pyarrow as pa

from gendist.data.memory import TableSource, array_column

EXAMPLES = re.compile(r"\nExamples?\n|\n *>>> ")
MIN_WORDS = 20  # of a docstring that tells what it is about
PACKAGES = (
    "cluster",
    "decomposition",
    "ensemble",
    "gaussian_process",
    "linear_model",
    "metrics",
    "model_selection",
    "preprocessing",
)


def digits() -> TableSource:
    """The 1,797 handwritten digits that come with scikit-learn: 8 x 8 pixels of 0..1 and their label."""
    from sklearn.datasets import load_digits

    embedded = load_digits()
    columns = {"image": array_column(embedded.images / 16.0, "digits"), "label": pa.array(embedded.target)}
    return TableSource(pa.table(columns), "digits", image_shape=(8, 8))


@cache
def docstrings() -> TableSource:
    """About 900 English texts of 20 words and more: what scikit-learn's sources (BSD licence) say of their functions and
    classes, with the package of each. Other versions of scikit-learn have other texts.

    Examples are cut off, since they name the package, and of texts that are the same the first stands.
    """
    rows: dict[str, str] = {}
    for package in PACKAGES:
        for text in _docstrings_in(resources.files(f"sklearn.{package}")):
            rows.setdefault(text, package)
    return TableSource(pa.table({"text": list(rows), "package": list(rows.values())}), "docstrings")


def _docstrings_in(folder: Any) -> Iterator[str]:
    """Of all files but tests, in the order of their names and then of their lines."""
    for file in sorted(folder.iterdir(), key=lambda each: each.name):
        if file.is_dir() and file.name != "tests":
            yield from _docstrings_in(file)
        elif file.name.endswith(".py"):
            for text in _docstrings_below(ast.parse(file.read_text(encoding="utf-8"))):
                text = EXAMPLES.split(text, maxsplit=1)[0]
                if len(text.split()) >= MIN_WORDS:
                    yield text


def _docstrings_below(node: ast.Module | ast.ClassDef) -> Iterator[str]:
    for inside in node.body:
        if isinstance(inside, ast.FunctionDef | ast.ClassDef):
            yield ast.get_docstring(inside) or ""
            if isinstance(inside, ast.ClassDef):
                yield from _docstrings_below(inside)


@cache
def topics() -> TableSource:
    """About 80 English texts, 0.4 million characters: what Python's manual says of each topic of the language, for `help`.
    Other versions of Python have other texts. Lines are joined."""
    from pydoc_data.topics import topics as texts

    names = sorted(texts)
    return TableSource(pa.table({"topic": names, "text": [" ".join(texts[name].split()) for name in names]}), "topics")


EMBEDDED: dict[str, Callable[[], TableSource]] = {"digits": digits, "docstrings": docstrings, "topics": topics}
