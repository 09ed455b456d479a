"""The process of a job that fits, without a cluster."""

from __future__ import annotations

import logging
import os
import signal

import pytest

from gendist.launch import job_driver
from gendist.protocols import UserError


def test_a_cluster_with_other_packages_is_refused_before_the_fit_begins(tmp_path):
    job = {"versions": {"torch": "1.0.0", "numpy": "0.9"}, "spec": {}, "run_dir": str(tmp_path / "run")}
    with pytest.raises(UserError, match=r"torch is 1\.0\.0 here and .* there, numpy is 0\.9 here and .* there"):
        job_driver._fit(job)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (OSError(28, "No space left on device", "/shared/run"), 2, "No space left on device: /shared/run"),
        (ConnectionResetError(104, "Connection reset by peer"), None, ""),
    ],
)
def test_what_the_file_system_refuses_is_told_in_one_line(error, code, said, tmp_path, monkeypatch, capsys):
    def fail(_: object) -> None:
        raise error

    (tmp_path / job_driver.JOB_FILE).write_text("{}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(job_driver, "_fit", fail)
    monkeypatch.setattr(job_driver, "_end_with_the_keeper", lambda: None)
    monkeypatch.setattr(job_driver.signal, "signal", lambda *_: None)
    monkeypatch.setattr(job_driver, "logger", logging.getLogger("gendist.test_job_driver"))
    if code is None:  # it may pass: the keeper tries again
        with pytest.raises(type(error)):
            job_driver.main()
    else:
        assert job_driver.main() == code
    assert said in capsys.readouterr().out


def test_whether_wandb_would_find_a_key(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert not job_driver.has_wandb_key({})
    assert job_driver.has_wandb_key({"WANDB_API_KEY": "abc"})
    assert job_driver.has_wandb_key({"WANDB_MODE": "disabled"})
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password abc\n")
    (tmp_path / ".netrc").chmod(0o600)
    assert job_driver.has_wandb_key({})
    assert not job_driver.has_wandb_key({"WANDB_BASE_URL": "https://wandb.example.com"})


def test_told_to_stop_twice_it_is_interrupted_once():
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        signal.signal(signal.SIGTERM, job_driver._interrupt)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
