"""Spark MLlib's Gaussian mixture on this machine, as a contender of benchmarks/gmm.py."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from gmm_cases import Case

DRIVER_MEMORY = "8g"
STOP_TIMEOUT_S = 30.0


def what_spark_lacks() -> str | None:
    """One line where Spark cannot run here."""
    if importlib.util.find_spec("pyspark") is None:
        return "Spark MLlib is left out: pyspark is not installed (pip install pyspark)"
    if shutil.which("java") is None:
        return "Spark MLlib is left out: there is no java on the path (version 17 or newer)"
    return None


@contextmanager
def spark_session(num_cores: int) -> Iterator[Any]:
    """A session of `num_cores` threads; it and its JVM are gone at the end."""
    from pyspark import SparkContext
    from pyspark.sql import SparkSession

    builder = SparkSession.builder.master(f"local[{num_cores}]").config("spark.driver.memory", DRIVER_MEMORY)
    builder = builder.config("spark.ui.enabled", "false").config("spark.ui.showConsoleProgress", "false")
    session = builder.config("spark.driver.host", "127.0.0.1").getOrCreate()
    session.sparkContext.setLogLevel("ERROR")
    gateway = SparkContext._gateway
    try:
        yield session
    finally:
        session.stop()
        gateway.shutdown()
        gateway.proc.stdin.close()  # on which the JVM ends
        try:
            gateway.proc.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            gateway.proc.kill()


class SparkMixture:
    """The rows as a cached data frame of vectors, already counted, and a fit to warm the JVM's compiler."""

    def __init__(self, session: Any, case: Case, x: np.ndarray):
        from pyspark.ml.functions import array_to_vector

        self._case = case
        self._folder = tempfile.TemporaryDirectory(prefix="gendist-spark-")
        file = Path(self._folder.name) / "x.parquet"
        column = pa.FixedSizeListArray.from_arrays(pa.array(x.reshape(-1)), x.shape[1]).cast(pa.list_(pa.float64()))
        pq.write_table(pa.table({"x": column}), file)
        frame = session.read.parquet(str(file)).repartition(session.sparkContext.defaultParallelism)
        self._frame = frame.select(array_to_vector("x").alias("features")).cache()
        assert self._frame.count() == len(x)
        self._seconds(1)

    def seconds_per_iteration(self, num_iterations: int) -> float:
        """Less what every fit costs: its start, which is random rows, for Spark takes no initial model."""
        once = self._seconds(1)
        return (self._seconds(num_iterations) - once) / (num_iterations - 1)

    def _seconds(self, num_iterations: int) -> float:
        from pyspark.ml.clustering import GaussianMixture

        estimator = GaussianMixture(k=self._case.num_components, maxIter=num_iterations, tol=0.0, seed=1)
        began = time.perf_counter()
        model = estimator.fit(self._frame)
        assert model.summary.numIter == num_iterations
        return time.perf_counter() - began

    def close(self) -> None:
        self._frame.unpersist()
        self._folder.cleanup()
