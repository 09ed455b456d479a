"""What is said between a job and whoever follows it. What it has to do comes with it in a file; what it says stands in lines of
its log that begin with a mark and are JSON; all others are the log's own.

record     what metrics.jsonl gets
begin      the first line of ours in a log; Ray's own stand above it
finished   what the fit came to: its `summary` as lines, `verbs` that suit it, and the `path` of its run
error      a mistake of the user's, as one line
failed     why it was given up
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, TextIO

JOB_FILE = "gendist-job.json"
MARK = "@gendist "


@dataclass(frozen=True)
class Message:
    kind: str
    value: Any


def say(kind: str, value: Any, out: TextIO) -> None:
    print(f"{MARK}{json.dumps({kind: value})}", file=out, flush=True)


def heard(line: str) -> tuple[str, Message | None]:
    """What a line is to be shown as, and the message in it. A text without an end of its own may stand before a message."""
    text, mark, said = line.partition(MARK)
    if not mark:
        return line, None
    try:
        ((kind, value),) = json.loads(said).items()
    except (ValueError, AttributeError):
        return line, None
    return text, Message(kind, value)


def position(record: dict[str, Any]) -> int:
    """How far a record is."""
    return int(record["step"] if "step" in record else record["iteration"])


def reached(record: dict[str, Any], goal: str | None = None) -> str:
    """The same in words."""
    return f"{'step' if 'step' in record else 'iteration'} {position(record):,}" + (f"/{int(goal):,}" if goal else "")


@dataclass
class Progress:
    """How often a fit has ended before its time since it was last further than ever before."""

    furthest: int = -1
    num_ends: int = 0

    def saw(self, record: dict[str, Any]) -> None:
        if position(record) > self.furthest:
            self.furthest, self.num_ends = position(record), 0
