"""The commands about jobs on a cluster, as a person types them; what they do stands in `jobs.py`."""

from __future__ import annotations

from typing import Annotated

import typer

from gendist.launch.arguments import JobsAddress, Overrides, SpecArgument

JobArgument = Annotated[str, typer.Argument(metavar="NAME", help="The name of the spec, or the id of a run or of a job.")]


def register(app: typer.Typer) -> None:
    for verb in (submit, status, logs, stop):
        app.command()(verb)


def submit(
    spec: SpecArgument,
    overrides: Overrides = None,
    address: JobsAddress = None,
    run_dir: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Where to keep the run: a folder that all nodes share, or a URL; cluster.storage/NAME if not given.",
            show_default=False,
        ),
    ] = None,
    detach: Annotated[bool, typer.Option("--detach", help="Submit, and do not wait for the end.")] = False,
    again: Annotated[
        bool, typer.Option("--again", help="Fit a finished run once more, where its run directory was removed.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the resolved spec and what would be sent; stop.")] = False,
) -> None:
    """Fit as a job on a Ray cluster. The same command attaches to a running job and resumes a broken one."""
    from gendist.config import load_spec

    resolved = load_spec(spec, overrides or ())
    if dry_run:
        from gendist.launch.job_package import package
        from gendist.launch.submission import kept_in, require_workers, run_id

        require_workers(resolved)
        kept = kept_in(resolved, run_dir)
        print(resolved.to_yaml(), end="")
        print(f"# {run_id(resolved, kept)}, which would be kept in {kept}")
        for name in package(resolved, kept, {}).files:
            print(f"# sent with it: {name}")
        return
    from gendist.launch import jobs

    _end(jobs.submit(resolved, run_dir, address, detach, again, tell))


def status(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Of one run all jobs, by its name or an id.")] = None,
    address: JobsAddress = None,
) -> None:
    """The jobs on a Ray cluster, and how far they are."""
    from gendist.launch import jobs

    for line in jobs.status(name, address):
        tell(line)


def logs(
    name: JobArgument,
    address: JobsAddress = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Until the job ends.")] = False,
) -> None:
    """What a job has said."""
    from gendist.launch import jobs

    _end(jobs.logs(name, address, follow, tell))


def stop(name: JobArgument, address: JobsAddress = None) -> None:
    """Stop a job, which leaves a checkpoint: submitted again, it goes on from there."""
    from gendist.launch import jobs

    _end(jobs.stop(name, address, tell))


def tell(line: str) -> None:
    print(line, flush=True)


def _end(code: int) -> None:
    if code:
        raise SystemExit(code)
    return
