"""The command line without an installed package: `python launch.py fit SPEC.yaml` (see `gendist/launch/cli.py`)."""

from gendist.launch.cli import main

if __name__ == "__main__":
    main()
