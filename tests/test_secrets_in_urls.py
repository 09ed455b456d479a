"""A path or URL with a secret in it is refused, and the refusal does not tell the secret."""

from __future__ import annotations

import pytest

import gendist
from gendist.config import load_data_spec, load_spec
from gendist.protocols import UserError
from gendist.secrets_in_urls import require_no_secret, secret_in_url, without_secrets

SECRET = "hush7Qx"
GLUED = ("authtoken", "accesstoken", "secretkey", "auth", "pwd", "jwt", "bearer", "passphrase", "sas", "X-Auth", "dbPassword")


@pytest.mark.parametrize(
    "url",
    [
        f"s3://AKIAEXAMPLE:{SECRET}@bucket/runs",
        f"https://user:{SECRET}@example.org/data.parquet",
        f"https://bucket.s3.amazonaws.com/x.parquet?X-Amz-Expires=60&X-Amz-Signature={SECRET}",
        f"https://account.blob.core.windows.net/c/x.parquet?sv=2024&sig={SECRET}",
        f"https://example.org/x.parquet?access_token={SECRET}",
        f"https://example.org/x.parquet?apiKey={SECRET}",
        f"abfs://c@account.dfs.core.windows.net/x?account_key={SECRET}",
        f"simplecache::https://user:{SECRET}@example.org/x.npy",
        f"https://example.org/x#token={SECRET}",
        *(f"https://example.org/x?{name}={SECRET}" for name in GLUED),
        f"https://{SECRET}@example.org/x.npy",
        f"s3://AKIAEXAMPLE%3A{SECRET}@bucket/runs",
        *(f"s3://AKIAEXAMPLE:wJal{special}{SECRET}@bucket/runs/x" for special in "/?#[+"),
        f"simplecache::s3://AKIAEXAMPLE:wJal/{SECRET}/k@bucket/runs",
    ],
)
def test_a_secret_is_refused_wherever_it_stands_and_not_told(url):
    assert secret_in_url(url)
    assert SECRET not in without_secrets(url)
    spec = {"name": "a", "family": "gmm", "model": {"num_components": 2}}
    attempts = [
        lambda: require_no_secret(url, "--run-dir"),
        lambda: load_spec({**spec, "data": {"path": url}}),
        lambda: load_spec({**spec, "data": {"path": ["a.parquet", url]}}),
        lambda: load_spec(spec, [f"data.path='{url}'"]),
        lambda: load_data_spec(url),
        lambda: gendist.fit({**spec, "data": {"path": url}}),
    ]
    for attempt in attempts:
        with pytest.raises(UserError, match=r"would be kept with the run and shown; leave it out and give keys") as error:
            attempt()
        assert SECRET not in str(error.value)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "url",
    [
        "/data/events/*.parquet",
        "C:\\data\\x.csv",
        "s3://bucket/runs/monkey=3/x.parquet",
        "s3://bucket/key=5/part.parquet",  # folders of a partition, which no query is
        "gs://bucket/runs",
        "abfs://container@account.dfs.core.windows.net/runs",  # a container, no user
        "file:///shared/runs",
        "https://example.org/x.parquet?version=3&monkey=see",
        "sftp://user@example.org/x.npy",
        "https://example.org/x.parquet?tokenizer=bpe&author=me&passage=3&keyword=sea&signal=4",
        "https://example.org/x.parquet?token=",
        "http://[::1/x.parquet",
        "http://host:8080/a@b/x.parquet",
        "http://[::1]:8265/x@y",
        "hdfs://namenode:8020/user@realm/x.parquet",
        "hf://datasets/user/name@main/x.parquet",
        "zip://x.csv::https://example.org/p@q.zip",
        "user:password@not-a-url",
    ],
)
def test_what_holds_none_is_left_alone(url):
    assert secret_in_url(url) is None
    assert require_no_secret(url, "data.path") == url
