"""Rows by the billion into files: `sample` and `score`, part by part, on any number of workers."""

from gendist.bulk.work import Written, sample, score

__all__ = ["Written", "sample", "score"]
