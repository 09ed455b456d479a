"""What several commands take, and how the program was called."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from gendist.errors import UserError
from gendist.secrets_in_urls import without_secrets

# Places stay the text that they were given as: a URL that is made a path loses a slash, and with it what is a secret in it.
SpecArgument = Annotated[str, typer.Argument(metavar="SPEC.yaml", help="What to fit; see configs/.")]
ArtifactArgument = Annotated[str, typer.Argument(metavar="ARTIFACT", help="A run directory, or its artifact/; or its URL.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[key=value ...]", help="Changes to the spec, such as cluster.num_workers=4.", show_default=False),
]
WhereToCompute = Annotated[
    list[str] | None,
    typer.Argument(metavar="[key=value ...]", help="Where to compute: cluster.num_workers=4.", show_default=False),
]
Address = Annotated[
    str | None, typer.Option(metavar="ADDR", help="HOST:PORT of a Ray head; this machine if not given.", show_default=False)
]
JobsAddress = Annotated[
    str | None,
    typer.Option(
        metavar="URL",
        help="http://HEAD:8265, where a Ray head takes jobs; that of RAY_API_SERVER_ADDRESS or RAY_ADDRESS if not given.",
        show_default=False,
    ),
]


def require_lasting(run_dir: str) -> str:
    """The run directory. UserError where it would be gone with the process."""
    if run_dir.startswith("memory://"):
        raise UserError(
            f"{without_secrets(run_dir)}: in the memory of this process, and gone with it; give a folder, or a URL such as "
            "s3://bucket/runs/NAME"
        )
    return run_dir


def command() -> str:
    """How this program was called."""
    return "gendist" if Path(sys.argv[0]).name == "gendist" else "python launch.py"
