"""The command line with one family more, for tests that start processes: `python toy_family.py fit SPEC`."""

from __future__ import annotations

from pathlib import Path

import gendist.models

FOLDER = str(Path(__file__).parent / "families")


def main() -> None:
    gendist.models.__path__.append(FOLDER)
    from gendist.launch.cli import main as command_line

    command_line()


if __name__ == "__main__":
    main()
