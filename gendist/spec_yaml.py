"""The YAML of specs and overrides: PyYAML's, but that a value is what it looks like. A number in decimal digits is one, any
other text is text; YAML 1.1 takes 010 for 8, 1:30 for 90, no for false, and a date for an object.
"""

from __future__ import annotations

import re
from itertools import pairwise
from typing import Any

import yaml

# What a tag that does not suit its value, such as `!!int foo`, comes to in PyYAML.
UNFIT = (ValueError, LookupError, AttributeError, RecursionError)


OTHERWISE = ("bool", "int", "float", "timestamp")  # told from text in another way than by PyYAML


class _Loader(yaml.SafeLoader):
    """What it takes for something else than text, PyYAML does, too: so that what that writes is read as it was."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [(tag, pattern) for tag, pattern in resolvers if tag.rpartition(":")[2] not in OTHERWISE]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"(true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"[-+]?(0|[1-9][0-9]*)$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"([-+]?[0-9]+\.[0-9]*([eE][-+][0-9]+)?|\.[0-9]+([eE][-+][0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$"),
    list("-+0123456789."),
)


def read(text: str) -> Any:
    """What a YAML document holds. yaml.YAMLError where it is none."""
    loader = _Loader(text)
    try:
        return loader.get_single_data()
    except UNFIT as error:
        raise yaml.YAMLError(f"a value that its tag does not suit: {error}") from error
    finally:
        loader.dispose()


def read_value(text: str) -> Any:
    """What stands behind the `=` of an override: YAML, or the text itself where it is none, such as *.parquet, or where YAML
    would pass over a part of it as a comment, such as `run #3`."""
    try:
        value = read(text)
        tokens = list(yaml.scan(text, _Loader))
    except yaml.YAMLError:
        return text
    if value == "" and text.strip() in ("|", ">"):  # the beginning of a text of several lines, of which there are none
        return text.strip()
    between = (text[one.end_mark.index : next_.start_mark.index] for one, next_ in pairwise(tokens))
    return text if any("#" in gap for gap in between) else value
