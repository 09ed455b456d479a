"""What runs in stores stand on: patience, whole objects, leases, and the look at a place from several machines."""

from __future__ import annotations

import errno
import json
import subprocess
import threading
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from gendist import folder_lock
from gendist.protocols import UserError
from gendist.storage import check as storage_check
from gendist.storage import lease, patience
from gendist.storage.check import Marks
from gendist.storage.lease import Holder, Lease, Taken
from gendist.storage.objects import Storage, below, explained, is_url, path_here, place_of
from gendist.storage.patience import PATIENCE_S, StorageError, first_whole, next_pause, patiently


def test_pauses_grow_and_end_with_patience():
    pauses, waited = [], 0.0
    while (pause := next_pause(len(pauses), waited)) is not None:
        pauses.append(pause)
        waited += pause
    assert waited == pytest.approx(PATIENCE_S)
    assert pauses[:4] == [0.25, 0.5, 1.0, 2.0]
    assert max(pauses) <= patience.LONGEST_PAUSE_S


def test_what_may_pass_is_tried_again_and_nothing_else(monkeypatch):
    monkeypatch.setattr(patience, "FIRST_PAUSE_S", 0.001)
    left = [OSError(errno.EIO, "Input/output error"), OSError(errno.ESTALE, "Stale file handle")]

    def act():
        if left:
            raise left.pop()
        return "done"

    assert patiently("x", act) == "done"
    for lasting in (PermissionError(errno.EACCES, "Permission denied"), ValueError("x")):
        left.append(lasting)
        with pytest.raises(type(lasting)):
            patiently("x", act)
    monkeypatch.setattr(patience, "PATIENCE_S", 0.0)
    left.append(OSError(errno.EIO, "Input/output error"))
    with pytest.raises(StorageError, match=r"^x: Input/output error, for 0 s$"):
        patiently("x", act)


def test_what_is_written_here_alone_has_a_path():
    assert path_here("out/x.npy", "--out") == Path("out/x.npy")
    assert path_here("file:///out/x.npy", "--out") == Path("/out/x.npy")
    for url in (
        "s3://bucket/x",
        Path("s3://bucket/x"),
        "s3:/bucket/x",
        "s3://key:hush@bucket/x",
        "https://hush@bucket/x?sig=hush",
    ):
        with pytest.raises(UserError, match=r"^--out (s3|https)://bucket/x: a URL, and only files and folders") as told:
            path_here(url, "--out")
        assert "hush" not in str(told.value)


def test_a_place_is_a_path_or_a_url():
    assert place_of("runs/x") == Path("runs/x")
    assert place_of("file:///shared/runs/x") == Path("/shared/runs/x")
    assert place_of("s3://bucket/runs/x/") == "s3://bucket/runs/x"
    assert place_of("sftp://me@host/runs") == "sftp://me@host/runs"
    assert place_of("memory://") == "memory://"  # its root, and no path `memory:`
    assert place_of("file:///") == Path("/")
    assert below("memory://", "x") == "memory://x"
    assert below("s3://bucket/", "x") == "s3://bucket/x"
    assert [is_url(place) for place in ("runs/x", "file:///x", "gs://b/x", Path("x"))] == [False, False, True, False]
    with pytest.raises(UserError, match="a URL that was made a path") as told:
        place_of(Path("s3://key:secret@bucket/runs"))
    assert "secret" not in str(told.value)


@pytest.mark.parametrize("url", ["s3://key:secret@bucket/x", "gs://bucket/x?token=secret", "https://a:secret@b/c?d=secret"])
def test_credentials_in_a_url_are_refused_and_not_repeated(url):
    with pytest.raises(UserError, match=r"a password|the parameter|question mark") as told:
        place_of(url)
    assert "secret" not in str(told.value)


def test_why_a_store_does_nothing_is_told():
    class NoCredentialsError(Exception):
        """As botocore has one."""

    assert explained(NoCredentialsError("Unable to locate credentials")).startswith("no credentials (Unable")
    assert explained(PermissionError("Access Denied")) == "no permission (Access Denied)"
    assert explained(FileNotFoundError("bucket")) == "no such bucket or folder (bucket)"


@pytest.mark.parametrize("scheme", ["objects", "memory"])
def test_objects_are_whole(scheme, store, tmp_path):
    storage = Storage(store if scheme == "objects" else "memory://of/test_objects_are_whole")
    assert storage.names() == []
    assert storage.read("a/b.json") is None
    storage.write("a/b.json", b"{}")
    storage.write("ab", b"")
    assert storage.read("a/b.json") == b"{}"
    assert (storage.names(), storage.names("a")) == (["a/b.json", "ab"], ["a/b.json"])
    storage.download("a/b.json", tmp_path / "c" / "d")
    assert (tmp_path / "c" / "d").read_bytes() == b"{}"
    with pytest.raises(FileNotFoundError):
        storage.download("a/c", tmp_path / "e")
    storage.remove(["a/b.json", "never there"])
    assert storage.names() == ["ab"]


@pytest.mark.parametrize("name", ["/tmp/x", "a//tmp/x", "../x", "a/../../x", "a/.."])
def test_no_name_in_a_store_leads_out_of_a_folder(store, tmp_path, name):
    with pytest.raises(UserError, match="is no name of a file below it"):
        Storage(store).download(name, tmp_path / "inside" / name)


def elsewhere(**changes) -> Holder:
    return replace(Holder.here(), host="another machine", node="far", process=7, **changes)


@pytest.fixture
def soon(monkeypatch):
    for name, seconds in (("EXPIRES_S", 0.5), ("LOOK_S", 0.02), ("RENEW_S", 0.05)):
        monkeypatch.setattr(lease, name, seconds)


def test_a_second_writer_is_refused(soon, store):
    refused = pytest.raises(UserError, match="another process is at work here")
    with Lease(Storage(store), "lease").held(), refused, Lease(Storage(store), "lease").held():
        pass
    assert Storage(store).names() == []
    with Lease(Storage(store), "lease").held():
        pass


def test_a_writer_on_another_machine_is_heard_before_it_is_refused(soon, store):
    far = Lease(Storage(store), "lease", elsewhere())
    with far.held(), pytest.raises(UserError, match="process 7 of far"), Lease(Storage(store), "lease").held():
        pass


def test_one_that_is_silent_is_gone(soon, store, caplog):
    storage = Storage(store)
    Lease(storage, "lease", elsewhere()).seize()
    with Lease(storage, "lease").held() as held:
        held.check()
    assert "process 7 of far was at work here" in caplog.text


def test_one_that_has_lost_it_finds_out(soon, store):
    storage = Storage(store)
    with Lease(storage, "lease").held() as held:
        Lease(storage, "lease", elsewhere()).seize()
        with pytest.raises(UserError, match="process 7 of far"):
            held.check()
    assert storage.names() == ["lease"], "it is not taken from whoever has it now"


def test_of_two_who_come_at_once_to_a_slow_store_one_has_it(soon, store, monkeypatch):
    """The second has looked when nobody had it, and has its word there when the first has settled and is at work."""
    monkeypatch.setattr(lease, "QUICK_S", 0.0)
    monkeypatch.setattr(lease, "RENEW_S", 1.0)
    storage, is_in, ended = Storage(store), threading.Event(), threading.Event()
    lost: list[str] = []

    class Slow(Storage):
        def write(self, name, content):
            assert is_in.wait(30)
            super().write(name, content)

    def first():
        try:
            with Lease(storage, "lease", elsewhere()).held() as mine:
                is_in.set()
                while not ended.wait(0.01):
                    mine.check()
        except Taken:
            lost.append("first")

    second = Lease(Slow(store), "lease")
    looked = second._await_free(0.0)
    monkeypatch.setattr(second, "_await_free", lambda wait_s: looked)
    thread = threading.Thread(target=first)
    thread.start()
    try:
        with second.held():
            assert lost == ["first"], "it has found out before the second begins"
    finally:
        ended.set()
        thread.join()


def test_while_a_store_answers_nobody_a_holder_is_not_silent(soon, store, monkeypatch):
    storage = Storage(store)
    lease_of_other = Lease(storage, "lease", elsewhere())
    lease_of_other.seize()
    looks = 0

    class Away(Storage):
        def read(self, name):
            nonlocal looks
            looks += 1
            if looks == 5:
                time.sleep(2.0)  # four times as long as a silent holder is given
                lease_of_other.holder = replace(lease_of_other.holder, renewed=1)
                content = super().read(name)
                lease_of_other.seize()  # just after the first look for a long time
                return content
            return super().read(name)

    with pytest.raises(Taken, match="process 7 of far"), Lease(Away(store), "lease").held():
        pass


def test_a_renewal_that_breaks_off_is_written_anew(soon, store):
    """As of a store that keeps what has arrived when a connection is lost."""
    breaking = threading.Event()

    class Breaking(Storage):
        def write(self, name, content):
            if breaking.is_set():
                breaking.clear()
                super().write(name, content[:20])
                raise ConnectionResetError
            super().write(name, content)

    # `_renew` asks for a store that does not wait, which is one of the same class.
    with Lease(Breaking(store), "lease").held() as held:
        breaking.set()
        until = time.monotonic() + 30
        while breaking.is_set() or Holder.parse(Storage(store).read("lease")) is None:
            held.check()
            assert time.monotonic() < until
        held.check()


def test_what_is_half_written_is_not_believed(soon, store):
    storage = Storage(store)
    storage.write("lease", b'{"token": ')
    with Lease(storage, "lease").held():
        pass


def test_one_that_another_has_come_and_gone_since_has_lost_it(monkeypatch, store):
    storage = Storage(store)
    with Lease(storage, "lease").held() as held:
        other = Lease(storage, "lease", elsewhere())
        other.seize()
        other.release()
        monkeypatch.setattr(lease, "RENEW_S", 0.01)
        held._renew(threading.Event())
        assert held.lost, "and so it is known without another look"
        with pytest.raises(Taken, match="another process is at work here"):
            held.check()
        assert storage.names() == [], "nor is it written anew"


@pytest.mark.parametrize("said", ['{"token": "x", "new": %d}', "of another form: %d"])
def test_one_of_a_newer_gendist_is_heard(soon, store, said):
    storage, done = Storage(store), threading.Event()

    def renew():
        number = 0
        while not done.wait(0.02):
            number += 1
            storage.write("lease", (said % number).encode())

    storage.write("lease", (said % 0).encode())
    renewing = threading.Thread(target=renew)
    renewing.start()
    try:
        with pytest.raises(Taken), Lease(storage, "lease").held():
            pass
    finally:
        done.set()
        renewing.join()
    assert Holder.parse(json.dumps({**elsewhere().__dict__, "new": 1}).encode()).node == "far"


def test_a_job_waits_for_one_that_is_about_to_end(soon, store, caplog):
    storage = Storage(store)
    with ExitStack() as held:
        held.enter_context(Lease(storage, "lease", elsewhere()).held())
        threading.Timer(0.5, held.pop_all().close).start()
        with Lease(storage, "lease").held(wait_s=30) as mine:
            mine.check()
    assert caplog.text.count("process 7 of far is at work here; it is waited for, up to 30 s") == 1


def test_a_process_of_another_user_is_alive(monkeypatch):
    """Which /proc may say nothing of (hidepid)."""
    monkeypatch.setattr(lease, "_began", lambda pid: None)
    assert not replace(Holder.here(), process=1, process_began=5).is_known_dead()
    with subprocess.Popen(["true"]) as ended:
        pass
    assert replace(Holder.here(), process=ended.pid, process_began=5).is_known_dead()


def test_a_job_waits_for_the_lock_of_a_folder(monkeypatch, tmp_path, caplog):
    monkeypatch.setattr(folder_lock, "LOOK_S", 0.02)
    (tmp_path / "kept").touch()
    with ExitStack() as held:
        held.enter_context(folder_lock.locked(tmp_path))
        with pytest.raises(UserError, match="another process is at work here"), folder_lock.locked(tmp_path):
            pass
        threading.Timer(0.2, held.pop_all().close).start()
        with folder_lock.locked(tmp_path, wait_s=30):
            pass
    assert caplog.text.count("it is waited for, up to 30 s") == 1


def test_what_a_failing_folder_said_is_not_masked(monkeypatch, tmp_path):
    def failing(path):
        raise OSError(errno.ESTALE, "Stale file handle")

    def work():
        with folder_lock.locked(tmp_path / "run"):
            monkeypatch.setattr(Path, "iterdir", failing)
            raise StorageError("first")

    with pytest.raises(StorageError, match="first"):
        work()


def test_only_what_is_damaged_is_passed_over(monkeypatch):
    monkeypatch.setattr(patience, "FIRST_PAUSE_S", 0.001)
    errors = [OSError(errno.EIO, "Input/output error"), OSError(errno.EIO, "Input/output error")]

    def read(path):
        if path.name == "2":
            raise ValueError("other bytes")
        if errors:
            raise errors.pop()
        return path.name

    assert first_whole([Path("2"), Path("1"), Path("0")], read) == (Path("1"), "1")
    assert first_whole([Path("2")], read) is None
    for lasting in (PermissionError(errno.EACCES, "Permission denied"), UserError("Permission denied by a newer gendist")):
        errors.append(lasting)
        with pytest.raises(UserError, match="Permission denied"):
            first_whole([Path("1"), Path("0")], read)


@pytest.mark.parametrize("is_store", [False, True])
def test_machines_that_share_a_place_see_each_other(is_store, store, tmp_path):
    marks = Marks(store if is_store else str(tmp_path), "key")
    assert [marks.leave(name) for name in ("a", "b")] == [None, None]
    assert marks.missing(["a", "b"]) is None
    marks.remove(["a", "b"])
    assert list(tmp_path.rglob(".check*")) == []


def test_a_place_that_is_not_shared_is_told(monkeypatch, tmp_path):
    monkeypatch.setattr(storage_check, "SEEN_WITHIN_S", 0.05)
    assert Marks(str(tmp_path / "none"), "key").leave("a") == "no such folder there: it is not shared"
    assert Marks(str(tmp_path), "key").missing(["a"]) == "what a has written is not seen there: it is not shared"
    assert Marks("s3://bucket/x", "key").leave("a").startswith("cannot be written (Install s3fs")


def test_a_slow_folder_is_given_time(tmp_path):
    marks = Marks(str(tmp_path), "key")
    threading.Timer(0.3, marks.leave, ["a"]).start()
    assert marks.missing(["a"]) is None


@pytest.mark.ray
def test_every_node_of_a_cluster_is_asked(cluster, monkeypatch, store, tmp_path):
    from gendist.storage.ray_check import check_storage

    node = cluster.add_node(num_cpus=1, include_dashboard=False, object_store_memory=80_000_000)
    try:
        check_storage(str(tmp_path))
        check_storage(store)
        assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
        with pytest.raises(
            UserError, match=r"memory://x: what driver-\S+ has written is not seen there.* on node [0-9.]+.*URL"
        ):
            check_storage("memory://x")
        with pytest.raises(UserError, match="no such folder there: it is not shared on this machine"):
            check_storage(str(tmp_path / "none"))
    finally:
        cluster.remove_node(node)
