"""Rows by the billion into files: `sample` and `score`, part by part, on any number of workers."""

from gendist.bulk.work import Written, sample, sample_options, score

__all__ = ["Written", "sample", "sample_options", "score"]
