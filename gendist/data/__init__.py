"""From rows in files, tables and arrays to blocks: sources, what their columns mean, and a first look at all of it."""

from gendist.data.dataset import Dataset
from gendist.data.memory import source_of
from gendist.data.schema import Schema
from gendist.data.sequences import as_rows, as_sequences
from gendist.data.sources import DataConfig, identity, open_source

__all__ = ["DataConfig", "Dataset", "Schema", "as_rows", "as_sequences", "identity", "open_source", "source_of"]
