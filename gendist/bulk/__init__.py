"""Rows by the billion into files: `sample`, `score` and `encode`, part by part, on any number of workers."""

from gendist.bulk.work import Written, encode, sample, sample_options, score

__all__ = ["Written", "encode", "sample", "sample_options", "score"]
