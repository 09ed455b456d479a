"""One process at a time writes to a run in a store, which knows no locks: an object says who, and goes on saying it.

Clocks are not compared. A holder writes anew every RENEW_S; one that has not for EXPIRES_S, while somebody looked, is gone.
Two who come at the same moment may both take it; the one who wrote last has it, and the other finds out before its next
checkpoint at the latest.
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
from dataclasses import dataclass, field, replace
from pathlib import Path

from gendist.errors import UserError
from gendist.storage.objects import Storage

RENEW_S = 10.0
EXPIRES_S = 35.0  # three times as long, and then some
LOOK_S = 1.0
SETTLE_S = 0.3  # for somebody who takes it at the same moment

_held_here: set[str] = set()  # the tokens of the leases of this process
logger = logging.getLogger("gendist")


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
        """None where there is none, or what there is was not written to its end."""
        try:
            return cls(**json.loads(content or b""))
        except (ValueError, TypeError):
            return None

    def in_bytes(self) -> bytes:
        return json.dumps(self.__dict__).encode()

    def is_known_dead(self) -> bool:
        """Whether it was a process of this machine that has ended, or a fit of this process; of another machine nobody here
        can tell."""
        if self.host != _host():
            return False
        is_this_process = (self.process, self.process_began) == (os.getpid(), _began(os.getpid()))
        return self.token not in _held_here if is_this_process else _began(self.process) != self.process_began


def _host() -> str:
    parts = [os.uname().nodename]
    with suppress(OSError):
        parts += [Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/pid")]
    return " ".join(parts)


def _began(pid: int) -> int | None:
    """When a process began, in ticks since the machine did; None where there is no such process, or it waits to be buried."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else int(fields[18])


@dataclass
class Lease:
    """The right to write to a run, which an object of this name in its store stands for."""

    storage: Storage
    name: str
    holder: Holder = field(default_factory=Holder.here)

    @contextmanager
    def held(self) -> Iterator[Lease]:
        """Take it where nobody has it, and keep it for the length of a `with` block. UserError where somebody has."""
        self._await_free()
        done = threading.Event()
        renewing = threading.Thread(target=self._renew, args=(done,), name="lease", daemon=True)
        _held_here.add(self.holder.token)
        try:
            self.seize()
            time.sleep(SETTLE_S)
            self.check()
            renewing.start()
            yield self
        finally:
            done.set()
            if renewing.ident:
                renewing.join()
            _held_here.discard(self.holder.token)
            self.release()

    def seize(self) -> None:
        """Take it from whoever has it, who will find out."""
        self.storage.write(self.name, self.holder.in_bytes())

    def check(self) -> None:
        """UserError where somebody else has it now."""
        there = Holder.parse(self.storage.read(self.name))
        if there is not None and there.token != self.holder.token:
            raise self._taken(there)

    def release(self) -> None:
        with suppress(UserError):
            quick = replace(self.storage, is_patient=False)
            there = Holder.parse(quick.read(self.name))
            if there is not None and there.token == self.holder.token:
                quick.remove([self.name])

    def _await_free(self) -> None:
        first = self.storage.read(self.name)
        if first is None:
            return
        holder = Holder.parse(first)
        if holder and holder.is_known_dead():
            return
        if holder and holder.host == self.holder.host:
            raise self._taken(holder)
        who = f"process {holder.process} of {holder.node}" if holder else "another process"
        logger.warning("%s: %s was at work here; looking for %.0f s whether it still is", self.storage.url, who, EXPIRES_S)
        began = time.monotonic()
        while time.monotonic() - began < EXPIRES_S:
            time.sleep(LOOK_S)
            there = self.storage.read(self.name)
            if there is None:
                return
            if there != first and (holder := Holder.parse(there)):
                raise self._taken(holder)

    def _renew(self, done: threading.Event) -> None:
        """What the thread does. Where the store does not answer, whoever writes there says so."""
        storage = replace(self.storage, is_patient=False)
        while not done.wait(RENEW_S):
            with suppress(Exception):
                there = Holder.parse(storage.read(self.name))
                if there is not None and there.token != self.holder.token:
                    return
                self.holder = replace(self.holder, renewed=self.holder.renewed + 1)
                storage.write(self.name, self.holder.in_bytes())

    def _taken(self, by: Holder) -> UserError:
        return UserError(
            f"{self.storage.url}: another process is at work here (process {by.process} of {by.node}); wait for it or stop it"
        )
