"""A machine that loses its power at a chosen moment."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from gendist import atomic


class PowerCut(BaseException):
    pass


def cut_power_at(monkeypatch, number: int) -> list[int]:
    """Let the number-th change of the disk fail, and all after it, as if the machine had gone."""
    calls = [0]

    def failing(original):
        def change(*arguments, **options):
            calls[0] += 1
            if calls[0] >= number:
                raise PowerCut
            return original(*arguments, **options)

        return change

    monkeypatch.setattr(atomic.os, "fsync", failing(os.fsync))
    monkeypatch.setattr(shutil, "rmtree", failing(shutil.rmtree))
    for name in ("rename", "replace", "unlink", "mkdir"):
        monkeypatch.setattr(Path, name, failing(getattr(Path, name)))
    return calls
