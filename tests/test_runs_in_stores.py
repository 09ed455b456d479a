"""A run that is kept in an object store: whoever is killed and whatever fails for a while, the bytes of a run in a folder."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from object_store import ObjectStore

import gendist
from gendist import atomic, em_checkpoints, em_fitting, run_directory, training, training_job
from gendist.artifact import NotThisGendist
from gendist.config import load_spec
from gendist.launch import cli
from gendist.protocols import UserError
from gendist.run_directory import RunDirectory
from gendist.storage import Storage, mirror, patience
from gendist.storage.lease import Holder, Lease, Taken

pytestmark = pytest.mark.usefixtures("toy")

X = np.random.default_rng(0).normal(size=(60, 2))
EM = {
    "name": "mixture",
    "family": "gmm",
    "model": {"num_components": 3},
    "fit": {"max_iterations": 6, "tolerance": 0.0, "checkpoint_every": 2},
}
DEEP = {
    "name": "line",
    "family": "toy",
    "model": {"width": 8},
    "fit": {"num_steps": 8, "global_batch_size": 16, "eval_every": 4, "checkpoint_every": 2, "record_every": 1, "ema": 0.05},
    "data": {"validation_fraction": 0.2},
}
SPECS = {"em": EM, "deep": DEEP}


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch) -> None:
    for module, name in ((training, "draw_samples"), (training, "draw_figures"), (training_job, "samples_picture")):
        monkeypatch.setattr(module, name, lambda *_: None)
    monkeypatch.setattr(em_fitting, "draw_samples", lambda *_: None)
    monkeypatch.setattr(em_fitting, "draw_figures", lambda *_: None)


@pytest.fixture(scope="module", params=SPECS)
def kind(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def plain(kind, toy, tmp_path_factory) -> Path:
    """A run in a folder, which nobody disturbs."""
    path = tmp_path_factory.mktemp("plain") / "run"
    gendist.fit(SPECS[kind], data=X, run_dir=path)
    return path


def trace(path: Path) -> list[dict]:
    """The records of a run, without what a clock says."""
    records = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in record.items() if key not in ("seconds", "samples_per_s")} for record in records]


def check(url: str, plain: Path) -> None:
    """What is in the store is what is in the folder, and nothing that only a run at work needs."""
    folder = Path(url.removeprefix("objects://"))
    assert (folder / "artifact" / "model.safetensors").read_bytes() == (plain / "artifact" / "model.safetensors").read_bytes()
    assert trace(folder) == trace(plain)
    assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == []
    assert steps(folder)[-2:] == steps(plain)[-2:], "what a kill kept from being removed may stand beside them"


def steps(folder: Path) -> list[str]:
    return sorted({path.relative_to(folder).parts[1] for path in folder.glob("checkpoints/[0-9]*/**/*") if path.is_file()})


class Killed(BaseException):
    pass


def test_killed_before_any_call_of_the_store_it_ends_in_the_same_bytes(monkeypatch, kind, plain, store):
    """Every object that is written, read or removed is the last; then the same command again."""
    monkeypatch.setattr(ObjectStore, "death", Killed)
    gendist.fit(SPECS[kind], data=X, run_dir=f"{store}/unbroken")
    check(f"{store}/unbroken", plain)
    num_calls = len(ObjectStore.calls)
    for number in range(num_calls, 0, -4 if kind == "em" else -7):
        url = f"{store}/{number}"
        ObjectStore.calls.clear()
        ObjectStore.dies_at = number
        with pytest.raises(Killed):
            gendist.fit(SPECS[kind], data=X, run_dir=url)
        ObjectStore.dies_at = None
        run = gendist.fit(SPECS[kind], data=X, run_dir=url)
        assert run.path == url
        check(url, plain)
    seen = []
    gendist.fit(SPECS[kind], data=X, run_dir=url, watch=seen.append)
    assert seen == [], "it is finished"


PROGRAM = """
import os, signal, sys
sys.path.insert(0, sys.argv[5])
import gendist.models, toy_family
gendist.models.__path__.append(toy_family.FOLDER)
import gendist, numpy
def watch(record):
    if record.get("step", record.get("iteration")) == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
gendist.fit(sys.argv[1], data=numpy.load(sys.argv[4]), run_dir=sys.argv[2], watch=watch)
"""


def test_a_process_that_was_killed_is_no_obstacle(kind, plain, store, tmp_path):
    """It holds a lease still, and the same machine knows that it is dead. Nor does it leave a working copy for ever."""
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(SPECS[kind]))
    np.save(tmp_path / "x.npy", X)
    url = f"{store}/run"
    arguments = [str(tmp_path / "spec.yaml"), url, "5", str(tmp_path / "x.npy"), str(Path(__file__).parent)]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", PROGRAM, *arguments], timeout=120, capture_output=True, env=environment)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert (tmp_path / "store" / "run" / ".lease.json").exists()
    copies = tmp_path / f"gendist-runs-{os.getuid()}"
    assert any(copies.iterdir())
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("tempfile.tempdir", str(tmp_path))
        began = time.monotonic()
        gendist.fit(SPECS[kind], data=X, run_dir=url)
    assert time.monotonic() - began < 20, "nobody waited for the lease to expire"
    check(url, plain)
    assert not any(copies.iterdir())


def trouble_at(number: int, begin, records: list):
    def watch(record):
        records.append(record)
        if len(records) == number:
            begin()

    return watch


def mended_after(seconds: float, mend) -> None:
    threading.Timer(seconds, mend).start()


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(patience, "FIRST_PAUSE_S", 0.05)
    monkeypatch.setattr(patience, "LONGEST_PAUSE_S", 0.1)
    return lambda seconds: monkeypatch.setattr(patience, "PATIENCE_S", seconds)


def test_a_store_that_fails_for_a_while_is_waited_for(caplog, impatient, kind, plain, store, tmp_path):
    impatient(20.0)
    trouble = tmp_path / "store" / ".trouble"

    def begin():
        trouble.write_text("503 Slow Down")
        mended_after(0.8, trouble.unlink)

    gendist.fit(SPECS[kind], data=X, run_dir=f"{store}/run", watch=trouble_at(3, begin, []))
    check(f"{store}/run", plain)
    assert "503 Slow Down; it is tried again for 20 s more" in caplog.text
    assert "done at last" in caplog.text


def test_a_store_that_fails_for_too_long_ends_the_run_which_goes_on_later(impatient, kind, plain, store, tmp_path):
    impatient(0.4)
    trouble = tmp_path / "store" / ".trouble"
    with pytest.raises(
        UserError, match=r"503, for 0 s; the last good checkpoint is checkpoints/0000000[24] in objects:"
    ) as told:
        gendist.fit(SPECS[kind], data=X, run_dir=f"{store}/run", watch=trouble_at(5, lambda: trouble.write_text("503"), []))
    assert "\n" not in str(told.value)
    trouble.unlink()
    gendist.fit(SPECS[kind], data=X, run_dir=f"{store}/run")
    check(f"{store}/run", plain)


@pytest.mark.parametrize("number", [errno.EROFS, errno.ENOSPC, errno.ESTALE])
def test_a_disk_that_fails_for_a_while_is_waited_for(monkeypatch, caplog, impatient, kind, plain, tmp_path, number):
    """And training goes on meanwhile, but no further than the next checkpoint."""
    impatient(20.0)
    fsync, fails, records, seen = os.fsync, [], [], []

    def failing(descriptor):
        if fails:
            raise OSError(number, os.strerror(number))
        fsync(descriptor)

    def mend():
        seen.extend(records)
        fails.clear()

    def begin():
        deadline = time.monotonic() + 30
        while kind == "deep" and not (tmp_path / "run" / "checkpoints" / "00000002").exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        fails.append(True)
        mended_after(1.0, mend)

    monkeypatch.setattr(atomic.os, "fsync", failing)
    gendist.fit(SPECS[kind], data=X, run_dir=tmp_path / "run", watch=trouble_at(4, begin, records))
    assert trace(tmp_path / "run") == trace(plain)
    model = Path("artifact") / "model.safetensors"
    assert (tmp_path / "run" / model).read_bytes() == (plain / model).read_bytes()
    assert f"{os.strerror(number)}; it is tried again" in caplog.text
    if kind == "deep":
        assert seen[-1]["step"] == 6


def test_a_disk_that_fails_for_too_long_ends_the_run_which_goes_on_later(monkeypatch, impatient, kind, plain, tmp_path):
    impatient(0.3)
    with monkeypatch.context() as patched:

        def begin():
            def failing(descriptor):
                raise OSError(errno.EROFS, os.strerror(errno.EROFS))

            patched.setattr(atomic.os, "fsync", failing)

        with pytest.raises(UserError, match="Read-only file system, for 0 s; the last good checkpoint is checkpoints/"):
            gendist.fit(SPECS[kind], data=X, run_dir=tmp_path / "run", watch=trouble_at(5, begin, []))
    gendist.fit(SPECS[kind], data=X, run_dir=tmp_path / "run")
    assert trace(tmp_path / "run") == trace(plain)


def test_a_sign_to_stop_reaches_a_run_in_a_store(monkeypatch, toy, store, tmp_path):
    monkeypatch.setattr(mirror, "STOP_POLL_S", 0.0)
    sign = tmp_path / "store" / "run" / ".stop"
    spec = {
        **DEEP,
        "fit": {**DEEP["fit"], "num_steps": 100_000, "record_every": 50, "checkpoint_every": 100_000, "eval_every": 0},
    }
    with pytest.raises(KeyboardInterrupt):
        gendist.fit(spec, data=X, run_dir=f"{store}/run", watch=trouble_at(2, sign.touch, []))
    assert not sign.exists()
    assert len(steps(tmp_path / "store" / "run")) == 1


def test_a_damaged_checkpoint_is_passed_over(kind, plain, store, tmp_path):
    folder = tmp_path / "store" / "run"

    def lose():
        newest = [step for step in steps(folder) if (folder / "checkpoints" / step / ".files.json").exists()][-1]
        next(path for path in (folder / "checkpoints" / newest).rglob("*.safetensors")).write_bytes(b"half")
        raise Killed

    with pytest.raises(Killed):
        gendist.fit(SPECS[kind], data=X, run_dir=f"{store}/run", watch=trouble_at(6, lose, []))
    gendist.fit(SPECS[kind], data=X, run_dir=f"{store}/run")
    check(f"{store}/run", plain)


def elsewhere() -> Holder:
    return replace(Holder.here(), host="another machine", node="far", process=7)


def test_whoever_has_lost_a_run_changes_nothing_of_it(store):
    """Here the other one is at work, there it has come and gone."""
    for number, is_gone in enumerate((False, True)):
        url = f"{store}/{number}"
        storage = Storage(url)
        with RunDirectory(url, load_spec(EM)) as loser:
            loser.begin({"data": 1, "machine": "here", "started": "now", "run_id": "x"})
            winner = Lease(storage, ".lease.json", elsewhere())
            winner.seize()
            storage.write(".writer.json", b"of the winner")
            storage.write("checkpoints/00000004/.files.json", b"{}")
            if is_gone:
                winner.release()
            before = storage.names()
            (loser.checkpoints / "00000002").mkdir(parents=True)
            for act in (
                loser.abandon,
                loser.forget_to_stop,
                loser.ask_to_stop,
                lambda: loser.checkpoint_written("00000002", set),
                lambda: loser.append_metrics([]),
            ):
                with pytest.raises(Taken, match="another process is at work here"):
                    act()
        assert storage.names() == before


def test_a_worker_whose_run_another_has_taken_stops(monkeypatch, store):
    monkeypatch.setattr(mirror, "STOP_POLL_S", 0.0)
    writer = Lease(Storage(store), ".writer.json")
    writer.seize()
    sign = mirror.StopSign(Storage(store), ".stop", writer)
    Lease(Storage(store), ".writer.json", elsewhere()).seize()
    deadline = time.monotonic() + 20
    while not sign():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_newer_checkpoint_that_may_be_whole_stays(store):
    with RunDirectory(store, load_spec(EM)) as run:
        for step in ("00000004", "00000002"):
            (run.checkpoints / step).mkdir(parents=True)
            (run.checkpoints / step / "x").write_text(step)
            run.checkpoint_written(step, lambda steps: set(steps[-1:]))
        assert steps_in(store) == ["00000002", "00000004"]
        assert run.newest(lambda path: (path / "x").read_text()) == "00000004"
        Storage(store).write("checkpoints/00000004/x", b"damaged")
        assert run.newest(lambda path: (path / "x").read_text()) == "00000002"
        with pytest.raises(FileNotFoundError, match="not there any more, or not whole"):
            run.fetch("00000004")
        run.checkpoint_written("00000002", lambda steps: set(steps[-1:]))
        assert steps_in(store) == ["00000002"]


def steps_in(url: str) -> list[str]:
    return sorted({name.split("/")[1] for name in Storage(url).names("checkpoints")})


@pytest.mark.parametrize("is_store", [False, True])
def test_em_goes_on_from_what_could_not_be_read_at_first(monkeypatch, impatient, store, tmp_path, is_store):
    """And where only a newer gendist can read it, it stays."""
    impatient(20.0)
    place = f"{store}/run" if is_store else tmp_path / "run"
    folder = tmp_path / "store" / "run" if is_store else tmp_path / "run"

    def kill():
        raise Killed

    with pytest.raises(Killed):
        gendist.fit(EM, data=X, run_dir=place, watch=trouble_at(5, kill, []))
    before = steps(folder)
    load, errors = em_checkpoints.load_artifact, [NotThisGendist("written by a newer gendist")]

    def failing(path):
        if errors:
            raise errors.pop()
        return load(path)

    monkeypatch.setattr(em_checkpoints, "load_artifact", failing)
    with pytest.raises(UserError, match="newer gendist"):
        gendist.fit(EM, data=X, run_dir=place)
    assert steps(folder) == before
    for _ in range(3):
        errors.append(UserError("damaged"))
        errors[-1].__cause__ = OSError(errno.EIO, "Input/output error")
    records = []
    gendist.fit(EM, data=X, run_dir=place, watch=records.append)
    assert [record["iteration"] for record in records] == [5, 6]


def test_an_interrupt_leaves_whole_metrics_in_the_store(monkeypatch, store, tmp_path):
    append = RunDirectory.append_metrics

    def interrupted(directory, records):
        append(directory, records)
        if records[-1]["iteration"] == 3:
            with directory.metrics_file.open("a") as file:
                file.write('{"half')
            raise KeyboardInterrupt

    monkeypatch.setattr(RunDirectory, "append_metrics", interrupted)
    with pytest.raises(KeyboardInterrupt):
        gendist.fit(EM, data=X, run_dir=f"{store}/run")
    assert [record["iteration"] for record in trace(tmp_path / "store" / "run")] == [1, 2, 3]


def test_a_job_waits_for_the_attempt_before(monkeypatch, tmp_path):
    assert RunDirectory(tmp_path, load_spec(EM)).wait_s == 0.0
    monkeypatch.setattr(run_directory, "is_in_a_job", lambda: True)
    assert RunDirectory(tmp_path, load_spec(EM)).wait_s > 90, "as long as NFS keeps a lock"


def test_a_model_is_loaded_and_served_from_a_store(monkeypatch, capsys, store, tmp_path):
    from gendist.serve.server_config import named_artifacts

    url = f"{store}/mixture"
    run = gendist.fit({**EM, "cluster": {"storage": store}}, data=X)
    assert run.path == url
    for path in (url, f"{url}/artifact"):
        model = gendist.load(path)
        assert all(torch.equal(tensor, run.model.tensors()[name]) for name, tensor in model.tensors().items())
        assert named_artifacts([path]) == {"mixture": path}
    for number, path in enumerate((url, str(tmp_path / "store" / "mixture"))):
        monkeypatch.setattr(sys, "argv", ["gendist", "sample", path, "-n", "5", "--out", str(tmp_path / f"{number}.npy")])
        cli.main()
    assert (tmp_path / "0.npy").read_bytes() == (tmp_path / "1.npy").read_bytes()
    assert gendist.fit({**EM, "fit": {**EM["fit"], "init": url}}, data=X).results["num_iterations"] == 6
    with pytest.raises(UserError, match=r"no such artifact \(no model.json there\)"):
        gendist.load(f"{store}/other")


def test_a_run_in_memory_and_one_at_a_file_url(tmp_path):
    gendist.fit(EM, data=X, run_dir="memory://bucket/runs/x")
    at_path = gendist.fit(EM, data=X, run_dir=f"file://{tmp_path}/runs/x")
    assert at_path.path == tmp_path / "runs" / "x"
    assert torch.equal(gendist.load("memory://bucket/runs/x").means, gendist.load(f"file://{tmp_path}/runs/x").means)
    again = gendist.fit(EM, data=X, run_dir="memory://bucket/runs/x", watch=pytest.fail)
    assert len(again.history) == 6


def test_another_spec_other_data_and_other_files_are_refused(store, tmp_path):
    gendist.fit(EM, data=X, run_dir=f"{store}/run")
    with pytest.raises(UserError, match=r"objects://.*run: holds a run of another spec \(different: seed\)"):
        gendist.fit({**EM, "seed": 1}, data=X, run_dir=f"{store}/run")
    with pytest.raises(UserError, match="the data has changed"):
        gendist.fit(EM, data=X + 1, run_dir=f"{store}/run")
    (tmp_path / "store" / "other").mkdir()
    (tmp_path / "store" / "other" / "notes.txt").touch()
    with pytest.raises(UserError, match=r"holds files that are not of a run \(notes.txt\)"):
        gendist.fit(EM, data=X, run_dir=f"{store}/other")


def test_a_mistake_leaves_nothing_in_the_store(toy, store, tmp_path):
    with pytest.raises(UserError):
        gendist.fit({**EM, "data": {"columns": ["a"]}}, data=X, run_dir=f"{store}/run")
    with pytest.raises(UserError):
        gendist.fit({**DEEP, "model": {"width": 8, "explode_at": 0}}, data=X, run_dir=f"{store}/deep")
    assert [path for path in (tmp_path / "store").rglob("*") if path.is_file()] == []


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("s3://bucket/runs/x", "Install s3fs"),
        ("nowhere://bucket/x", "Protocol not known: nowhere"),
        ("s3://me:secret@bucket/x", "a password before the host"),
        ("gs://bucket/x?token=secret", "the parameter token"),
        ("simplecache::s3://bucket/x", "a chain of file systems"),
    ],
)
def test_a_url_that_cannot_be_is_one_line_without_secrets(monkeypatch, capsys, tmp_path, url, expected):
    monkeypatch.chdir(tmp_path)
    Path("spec.yaml").write_text(yaml.safe_dump({**EM, "data": {"source": "digits"}}))
    for arguments in (["--run-dir", url], [f"cluster.storage={url}"]):
        monkeypatch.setattr(sys, "argv", ["gendist", "fit", "spec.yaml", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert ended.value.code == 2
        err = capsys.readouterr().err
        assert expected in err
        assert "secret" not in err
        assert err.count("\n") == 1
    assert sorted(os.listdir()) == ["spec.yaml"]
