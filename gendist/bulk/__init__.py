"""Rows by the billion into files, part by part, on any number of workers: `sample`, `score`, `encode`, `classify`, `impute`."""

from gendist.bulk.work import Written, classify, encode, impute, sample, sample_options, sample_table, score

__all__ = ["Written", "classify", "encode", "impute", "sample", "sample_options", "sample_table", "score"]
