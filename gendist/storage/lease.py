"""One process at a time writes to a run in a store, which knows no locks: an object says who, and goes on saying it.

Clocks are not compared. A holder writes anew every RENEW_S; one that has not for EXPIRES_S, while somebody looked, is gone.
Two who come at the same moment may both take it; the one who wrote last has it, and the other finds out before it writes or
removes anything else. Where it is gone, it is nobody's, and whoever had it has lost it.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

from gendist.errors import UserError
from gendist.storage.objects import Storage

RENEW_S = 10.0
EXPIRES_S = 35.0  # three times as long, and then some
LOOK_S = 1.0
QUICK_S = 0.3  # from a look at it until it is taken, unless the store is slow
SETTLE_S = QUICK_S  # for somebody who takes it at the same moment

_held_here: set[str] = set()  # the tokens of the leases of this process
logger = logging.getLogger("gendist")


class Taken(UserError):
    """Somebody else has the lease."""


@dataclass(frozen=True)
class Holder:
    """Who holds a lease.

    token    of this one time
    host     a machine, since it was booted, and the processes that see each other there
    process  its number, and when it began
    """

    token: str
    node: str
    host: str
    process: int
    process_began: int
    renewed: int = 0

    @classmethod
    def here(cls) -> Holder:
        pid = os.getpid()
        return cls(uuid.uuid4().hex, os.uname().nodename, _host(), pid, _began(pid) or 0)

    @classmethod
    def parse(cls, content: bytes | None) -> Holder | None:
        """None where there is none, or what there is was not written to its end. A newer gendist may say more."""
        try:
            said = json.loads(content or b"")
            return cls(**{known.name: said[known.name] for known in fields(cls)})
        except (ValueError, TypeError, KeyError):
            return None

    def in_bytes(self) -> bytes:
        return json.dumps(self.__dict__).encode()

    def is_known_dead(self) -> bool:
        """Whether it was a process of this machine that has ended, or a fit of this process; of another machine nobody here
        can tell."""
        if self.host != _host():
            return False
        if (self.process, self.process_began) == (os.getpid(), _began(os.getpid()) or 0):
            return self.token not in _held_here
        return _is_gone(self.process, self.process_began)


def _host() -> str:
    parts = [os.uname().nodename]
    with suppress(OSError):
        parts += [Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/pid")]
    return " ".join(parts)


def _is_gone(pid: int, began: int) -> bool:
    """Whether a process has ended, though another may have its number now. One that may not be looked at is alive."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OSError:  # another user's
        pass
    return _began(pid) not in (None, began)


def _began(pid: int) -> int | None:
    """When a process began, in ticks since the machine did; -1 where it only waits to be buried, None where nobody says."""
    try:
        state, *others = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return -1 if state in "ZX" else int(others[18])


@dataclass
class Lease:
    """The right to write to a run, which an object of this name in its store stands for.

    lost  what was found when somebody else had it
    """

    storage: Storage
    name: str
    holder: Holder = field(default_factory=Holder.here)
    lost: Taken | None = field(default=None, init=False)
    _one_at_a_time: threading.RLock = field(default_factory=threading.RLock, init=False, repr=False)
    _is_half_there: bool = field(default=False, init=False, repr=False)  # where a renewal broke off, and a store keeps a part

    @contextmanager
    def held(self, wait_s: float = 0.0) -> Iterator[Lease]:
        """Take it where nobody has it, and keep it for the length of a `with` block. UserError where somebody has, and has it
        still after so long a wait."""
        looked_at = self._await_free(wait_s)
        done = threading.Event()
        renewing = threading.Thread(target=self._renew, args=(done,), name="lease", daemon=True)
        _held_here.add(self.holder.token)
        try:
            self.seize()
            # Where the store was slow, somebody who looked at the same moment has settled by now, and finds out at a renewal.
            time.sleep(SETTLE_S if time.monotonic() - looked_at <= QUICK_S else SETTLE_S + RENEW_S)
            self.check()
            renewing.start()
            yield self
        finally:
            done.set()
            if renewing.ident:
                renewing.join()
            try:
                self.release()
            finally:
                _held_here.discard(self.holder.token)  # not before: somebody of this process might seize it, and lose it

    def seize(self) -> None:
        """Take it from whoever has it, who will find out."""
        self.storage.write(self.name, self.holder.in_bytes())

    def check(self, is_patient: bool = True) -> None:
        """UserError unless it is there, and this holder's."""
        if self.lost:
            raise self.lost
        storage = replace(self.storage, is_patient=is_patient and self.storage.is_patient)
        with self._one_at_a_time:  # what is being renewed may be half there
            content = storage.read(self.name)
            there = Holder.parse(content)
            if content is not None and there is None and self._is_half_there:
                return
            if there is None or there.token != self.holder.token:
                self.lost = self._taken(there)
                raise self.lost

    def release(self) -> None:
        with suppress(UserError):
            quick = replace(self.storage, is_patient=False)
            there = Holder.parse(quick.read(self.name))
            if there is not None and there.token == self.holder.token:
                quick.remove([self.name])

    def _await_free(self, wait_s: float) -> float:
        """Until nobody has it, or whoever has it is gone: known to be dead, or silent for EXPIRES_S on another machine. Returns
        when the look at it began that told (`time.monotonic`)."""
        self.storage.read(self.name)  # the first time takes longer than any other
        began = looked_at = time.monotonic()
        there = self.storage.read(self.name)
        silent_s, is_at_work, said = 0.0, False, ""
        while there is not None:
            holder = Holder.parse(there)
            if holder and holder.is_known_dead():
                return looked_at
            is_here = holder is not None and holder.host == self.holder.host
            if not is_here and silent_s >= EXPIRES_S:
                return looked_at
            is_at_work |= is_here
            if is_at_work and time.monotonic() - began >= wait_s:
                raise self._taken(holder)
            saying = f"is at work here; it is waited for, up to {wait_s:.0f} s" if is_at_work else (
                f"was at work here; looking for {EXPIRES_S:.0f} s whether it still is")  # fmt: skip
            if saying != said:
                logger.warning("%s: %s %s", self.storage.url, _called(holder), saying)
                said = saying
            before, looked_before = there, looked_at
            time.sleep(LOOK_S)
            looked_at = time.monotonic()
            there = self.storage.read(self.name)
            # While the store answers nobody, the holder can say nothing: of a look that took long, little counts.
            silent_s += min(looked_at - looked_before, 2.0 * LOOK_S)
            if there != before:
                is_at_work, silent_s = True, 0.0
        return looked_at

    def _renew(self, done: threading.Event) -> None:
        """What the thread does. Where the store does not answer, whoever writes there says so."""
        storage = replace(self.storage, is_patient=False)
        while not done.wait(RENEW_S):
            with suppress(Exception), self._one_at_a_time:
                self.check(is_patient=False)
                self.holder = replace(self.holder, renewed=self.holder.renewed + 1)
                self._is_half_there = True
                storage.write(self.name, self.holder.in_bytes())
                self._is_half_there = False
            if self.lost:
                return

    def _taken(self, by: Holder | None) -> Taken:
        who = f" ({_called(by)})" if by else ""
        return Taken(f"{self.storage.url}: another process is at work here{who}; wait for it or stop it")


def _called(holder: Holder | None) -> str:
    return f"process {holder.process} of {holder.node}" if holder else "another process"
