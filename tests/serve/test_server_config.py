"""What may be said of a server, and how it is told what may not."""

from __future__ import annotations

import pytest

from gendist.protocols import UserError
from gendist.serve.server_config import named_artifacts, server_config

MODELS = {"a": "runs/a"}


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ({}, "models is missing"),
        ({"models": {}}, "models"),
        ({"models": {"a/b": "x"}}, "the name 'a/b'"),
        ({"models": ["runs/a", "other/a"]}, "two models are called 'a'"),
        ({"models": MODELS, "num_replica": 2}, "did you mean 'num_replicas'"),
        ({"models": MODELS, "num_replicas": 0}, "num_replicas"),
        ({"models": MODELS, "num_replicas": 2, "autoscaling": {"max_replicas": 3}}, "exclude each other"),
        ({"models": MODELS, "autoscaling": {"min_replicas": 4, "max_replicas": 3}}, "above max_replicas 3"),
        ({"models": MODELS, "limits": {"batch_row": 1}}, "batch_row"),
        ({"models": MODELS, "digests": {"b": "0" * 64}}, "no model 'b'"),
        ({"models": MODELS, "digests": {"a": "0" * 63}}, "64 digits"),
        ({"models": MODELS, "gpus_per_replica": 1.5}, "gpus_per_replica 1.5"),
        ({"models": MODELS, "token_file": "f", "token_variable": "V"}, "exclude each other"),
        *[
            ({"models": MODELS, "cors_origins": [origin]}, "without a path or a slash")
            for origin in ("https://a.example/", "a.example", "https://A.example", "https://a.example/page", "ftp://a", "")
        ],
    ],
)
def test_a_mistake_is_told_in_one_line(content, told):
    with pytest.raises(UserError) as error:
        server_config(content)
    assert told in str(error.value)
    assert "\n" not in str(error.value)


def test_models_are_called_as_their_folders_or_as_said(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    paths = ["runs/a", "runs/b/artifact", "runs/c/", "mine=runs/a", "."]
    names = named_artifacts(paths)
    assert list(names) == ["a", "b", "c", "mine", tmp_path.name]
    assert names["mine"] == "runs/a"
    assert server_config({"models": paths}).models == names


def test_tokens_are_those_of_a_file_or_a_variable(tmp_path, monkeypatch):
    first, second = "0" * 32, "1" * 32
    file = tmp_path / "tokens"
    file.write_text(f"{first}\n{second}\n")
    monkeypatch.setenv("THE_TOKENS", second)
    assert server_config({"models": MODELS}).tokens() == frozenset()
    assert server_config({"models": MODELS, "token_file": str(file)}).tokens() == {first, second}
    assert server_config({"models": MODELS, "token_variable": "THE_TOKENS"}).tokens() == {second}


@pytest.mark.parametrize("where", ["token_file", "token_variable"])
def test_a_line_is_a_token_and_a_token_is_a_line(where, tmp_path, monkeypatch):
    first, second = "0" * 32, '!~"#' * 8

    def tokens(text):
        (tmp_path / "tokens").write_text(text, encoding="utf-8", newline="")
        monkeypatch.setenv("THE_TOKENS", text)
        said = {"token_file": str(tmp_path / "tokens"), "token_variable": "THE_TOKENS"}[where]
        return server_config({"models": MODELS, where: said}).tokens()

    assert tokens(f"\ufeff{first}\r\n\n  {second}\t\r\n") == {first, second}
    secret = "the-secret-of-somebody"
    for line in (f"{secret} of-the-staging-environment", f"# {secret}", f"{secret}é", f"{secret}\x07", f"\ufeff{secret}"):
        with pytest.raises(UserError, match="line 2 is no token; write one a line") as error:
            tokens(f"{first}\n{line}\n")
        assert secret not in str(error.value)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("origin", ["*", "https://a.example", "http://localhost:3000", "http://[::1]:8000"])
def test_origins_as_browsers_say_them(origin):
    assert server_config({"models": MODELS, "cors_origins": [origin]}).cors_origins == (origin,)


@pytest.mark.parametrize("content", [b"", b" \n", b"short\n", b"\xff\xfe" * 16])
def test_a_file_without_a_token_opens_nothing(content, tmp_path):
    (tmp_path / "tokens").write_bytes(content)
    with pytest.raises(UserError, match="token"):
        server_config({"models": MODELS, "token_file": str(tmp_path / "tokens")}).tokens()
