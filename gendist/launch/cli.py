"""The command line: `gendist VERB ...`, or `python launch.py VERB ...`."""

from __future__ import annotations

import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from gendist.launch import job_verbs
from gendist.launch.arguments import (
    Address,
    ArtifactArgument,
    Overrides,
    SpecArgument,
    WhereToCompute,
    command,
    require_lasting,
)
from gendist.launch.job_keeper import INTERRUPTED
from gendist.started_by import is_by_torchrun, is_first

FILE_OR_FOLDER = "Without a suffix a folder of Parquet files; else a file, written as the suffix says:"
DataArgument = Annotated[str, typer.Argument(metavar="DATA", help="A path, 'digits', or a YAML file with a data: block.")]
MAX_SEED = 2**64 - 1  # as gendist.noise has it, which --help does not pay for
OutOption = Annotated[str, typer.Option(metavar="OUT", help=f"{FILE_OR_FOLDER} .npy .npz .parquet .csv")]

app = typer.Typer(
    name="gendist",
    help="Fit, sample and score generative models on one machine or a Ray cluster, from one YAML spec.",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

job_verbs.register(app)


def main() -> None:
    """Run a command. A mistake of the user's is one line on stderr and exit code 2."""
    _run()
    if is_by_torchrun():
        # Libraries keep the process group (DeepSpeed does), whose threads want an interpreter that has ended by then: one such
        # exit in a hundred aborts, or waits for ever. All is written and closed.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def _run() -> None:
    # A job that is told to end (SIGTERM, as schedulers do) leaves a resumable run, as Ctrl-C does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if len(sys.argv) == 1:
        sys.argv.append("--help")
    try:
        if app(standalone_mode=False) == INTERRUPTED:
            _fail("interrupted", INTERRUPTED)
    except ValueError as error:
        from gendist.protocols import UserError

        if not isinstance(error, UserError):
            raise
        _fail(str(error), 2)
    except OSError as error:
        if error.errno is None:
            raise
        _fail(f"{error.strerror}" + (f": {error.filename}" if error.filename else ""), 2)
    except Exception as error:
        if not hasattr(error, "format_message"):
            raise
        _fail(f"{' '.join(error.format_message().split())} (--help tells more)", 2)  # a call that typer could not read


# The commands import what they need: neither torch nor ray is paid for by --help.


@app.command()
def fit(
    spec: SpecArgument,
    overrides: Overrides = None,
    run_dir: Annotated[
        str | None,
        typer.Option(
            metavar="DIR|URL",
            help="Where to keep the run; if not given, NAME in cluster.storage, or runs/NAME.",
            show_default=False,
        ),
    ] = None,
    address: Address = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the resolved spec, and how large its networks are; stop.")
    ] = False,
) -> None:
    """Fit a model. On an unfinished run directory of the same spec it goes on; on a finished one it changes nothing."""
    from gendist.config import load_spec

    resolved = load_spec(spec, overrides or ())
    if dry_run:
        from gendist.dry_run import sizes

        print(resolved.to_yaml(), end="")
        for line in sizes(resolved):
            print(f"# {line}")
        return
    run = _fit(resolved, require_lasting(run_dir or resolved.place_in_storage or f"runs/{resolved.name}"), address)
    if not is_first():
        return
    from gendist.launch.summary import next_steps, verbs

    print()
    for line in next_steps(verbs(run.model), command(), run.path):
        print(line)


@app.command()
def sample(
    artifact: ArtifactArgument,
    num_samples: Annotated[int, typer.Option("-n", min=1, help="How many samples.")],
    out: Annotated[str, typer.Option(metavar="OUT", help=f"{FILE_OR_FOLDER} .npy .npz .parquet .csv .png")],
    overrides: WhereToCompute = None,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="The same seed gives the same samples.")] = 0,
    offset: Annotated[int, typer.Option(min=0, help="The row of the seed's endless sample to begin with.")] = 0,
    given: Annotated[
        str | None, typer.Option(metavar="LABEL", help="Draw from this label or component alone.", show_default=False)
    ] = None,
    length: Annotated[
        int | None,
        typer.Option(
            metavar="T",
            min=1,
            help="Steps of each, of a model of sequences; as long as the model says if not given.",
            show_default=False,
        ),
    ] = None,
    address: Address = None,
) -> None:
    """Draw samples. 100 samples are the same as 40 and then 60 with --offset 40. A folder that was left unfinished goes on."""
    from gendist import bulk
    from gendist.artifact import load_artifact
    from gendist.config import load_cluster_config
    from gendist.pictures import most_shown, save_picture
    from gendist.storage import path_here

    cluster = load_cluster_config(overrides or ())
    path = path_here(out, "--out")
    if path.suffix.lower() == ".png":
        loaded = load_artifact(artifact)
        options = bulk.sample_options(loaded.model, length)
        number = min(num_samples, most_shown(loaded.schema))
        x = loaded.model.sample(number, seed=seed, offset=offset, given=given, **options)
        save_picture(x, loaded.schema, path)
        num_samples = number
    else:
        with _writing(path, "samples") as watch:
            written = bulk.sample(
                artifact,
                num_samples,
                path,
                seed=seed,
                offset=offset,
                given=given,
                length=length,
                cluster=cluster,
                address=address,
                watch=watch,
            )
        if written.was_finished:
            print(f"{out} is finished; nothing to do")
    print(f"{num_samples:,} samples in {out}")


@app.command()
def score(
    artifact: ArtifactArgument,
    data: DataArgument,
    out: OutOption,
    overrides: Overrides = None,
    address: Address = None,
) -> None:
    """Write the log density of every row of DATA, or every sequence, in nats, in their order. An unfinished folder goes on."""
    from gendist import bulk

    written = _of_data(bulk.score, artifact, data, overrides, out, address, "log densities")
    total = written.sums["log_likelihood"]
    a_step = f", {total / num_steps:.6f} a step" if (num_steps := written.sums.get("num_steps")) else ""
    print(f"{written.num_rows:,} {written.what} scored, mean log density {total / written.num_rows:.6f} nats{a_step}, in {out}")
    if written.density:
        print(f"  ({written.density})")


@app.command()
def encode(
    artifact: ArtifactArgument,
    data: DataArgument,
    out: OutOption,
    overrides: Overrides = None,
    draw: Annotated[
        int | None,
        typer.Option(
            metavar="SEED",
            min=0,
            max=MAX_SEED,
            help="Draw a latent of each row instead of its mean, of a vae.",
            show_default=False,
        ),
    ] = None,
    address: Address = None,
) -> None:
    """Write the representation of every row of DATA, in their order: latents, or of a mixture its responsibilities."""
    from gendist import bulk

    written = _of_data(bulk.encode, artifact, data, overrides, out, address, "latents", draw=draw)
    print(f"{written.num_rows:,} rows encoded, in {out}")


@app.command()
def classify(
    artifact: ArtifactArgument,
    data: DataArgument,
    out: OutOption,
    overrides: Overrides = None,
    address: Address = None,
) -> None:
    """Write the most probable label of every row of DATA, or every sequence, and the probability of each label."""
    from gendist import bulk

    written = _of_data(bulk.classify, artifact, data, overrides, out, address, "labels")
    print(f"{written.num_rows:,} {written.what} classified, in {out}")


@app.command()
def impute(
    artifact: ArtifactArgument,
    data: DataArgument,
    out: OutOption,
    overrides: Overrides = None,
    draw: Annotated[
        int | None,
        typer.Option(
            metavar="SEED", min=0, max=MAX_SEED, help="Draw what is missing instead of what is expected.", show_default=False
        ),
    ] = None,
    address: Address = None,
) -> None:
    """Write every row of DATA with its missing entries filled in, from what the row has."""
    from gendist import bulk

    written = _of_data(bulk.impute, artifact, data, overrides, out, address, "rows", draw=draw)
    print(f"{written.num_rows:,} rows, in {out}")
    if num_unknown := int(written.sums["num_unknown"]):
        print(f"  ({num_unknown:,} texts that the fit has not seen are left out)")


@app.command()
def prior(
    run: Annotated[str, typer.Argument(metavar="RUN", help="The run directory of a vae.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[key=value ...]", help="Of the mixture's spec: model.num_components=50.", show_default=False),
    ] = None,
    out: Annotated[
        str | None, typer.Option(metavar="DIR", help="Where to keep it; RUN/prior if not given.", show_default=False)
    ] = None,
    address: Address = None,
) -> None:
    """Fit a Gaussian mixture to the latents of a run's training rows, and sample from it instead of the standard normal."""
    from rich.console import Console

    from gendist.latent_prior import LatentPrior
    from gendist.launch.progress import fit_progress

    latent_prior = LatentPrior.of(run, overrides or (), out)
    with _writing(latent_prior.path / "latents", "latents") as watch_rows:
        latent_prior.encode(address, watch_rows)
    console = Console(stderr=True)
    with _interruptible(latent_prior.path / "fit" / "spec.yaml"), fit_progress(console, latent_prior.mixture.fit) as watch:
        fitted = latent_prior.fit(address, watch)
    _tell(latent_prior.mixture, fitted)
    print(f"\nnext:  {command()} sample {shlex.quote(str(latent_prior.path))} -n 64 --out samples.png")


@app.command()
def serve(
    artifacts: Annotated[
        list[str],
        typer.Argument(
            metavar="ARTIFACT ...", help="Run directories or artifacts; NAME=PATH to call one otherwise than its folder."
        ),
    ],
    host: Annotated[str, typer.Option(help="The address to listen on; 0.0.0.0 for all of this machine.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 for any that is free.")] = 8000,
    replicas: Annotated[
        str,
        typer.Option(
            metavar="N|MIN:MAX", help="Processes that compute, each with all models; or as many as the load asks for."
        ),
    ] = "1",
    gpus_per_replica: Annotated[float, typer.Option(min=0.0, help="May be a fraction, such as 0.25.")] = 0.0,
    token_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Who calls must have one of its tokens, one a line.", show_default=False)
    ] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="Let anybody call who reaches --host.")] = False,
    cors: Annotated[
        list[str] | None, typer.Option(metavar="ORIGIN", help="Of pages that may call from a browser.", show_default=False)
    ] = None,
    limit: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="max_rows, max_body_bytes, time_limit_s, ... (README).", show_default=False),
    ] = None,
    address: Address = None,
) -> None:
    """Answer HTTP requests with fitted models, of any families, until Ctrl-C. See README, "Serving"."""
    from gendist.config import apply_overrides
    from gendist.serve import local_server
    from gendist.serve.server_config import named_artifacts, server_config
    from gendist.storage import absolute

    limits = apply_overrides({}, limit or (), "--limit")
    content: dict[str, Any] = {
        "models": {name: absolute(path) for name, path in named_artifacts(artifacts).items()},
        **local_server.as_replicas(replicas),
        "gpus_per_replica": gpus_per_replica,
        "limits": limits,
        "insecure": insecure,
        "cors_origins": tuple(cors or ()),
    }
    if token_file is not None:
        content["token_file"] = str(token_file.absolute())
    try:
        local_server.serve(server_config(content), host, port, address, tell=lambda line: print(line, flush=True))
    except KeyboardInterrupt:
        print("stopped")


@app.command()
def plan(
    spec: SpecArgument,
    overrides: Overrides = None,
    workers: Annotated[int, typer.Option(metavar="N", min=0, help="Processes, each on a core or a GPU.")] = 64,
    gpus_per_node: Annotated[int, typer.Option(metavar="N", min=0, help="0: workers are cores.")] = 0,
    gpu: Annotated[str, typer.Option(metavar="NAME", help="a100, h100 or h200.")] = "h100",
    workers_per_node: Annotated[
        int, typer.Option(metavar="N", min=0, help="Cores of a node; as many as here if not given.", show_default=False)
    ] = 0,
    memory_gb: Annotated[
        float | None, typer.Option(metavar="GB", min=0.0, help="That a worker has to itself.", show_default=False)
    ] = None,
    network_gbits: Annotated[
        float | None, typer.Option(metavar="GBIT", min=0.001, help="A second, between nodes.", show_default=False)
    ] = None,
    latency_us: Annotated[
        float | None, typer.Option(metavar="US", min=0.0, help="Of a message between nodes.", show_default=False)
    ] = None,
    rows: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Where the data are not here, or will be more.", show_default=False)
    ] = None,
    features: Annotated[
        int | None, typer.Option(metavar="D", min=1, help="Of a row, where the data are not here.", show_default=False)
    ] = None,
    out: Annotated[str | None, typer.Option(metavar="FILE.json", help="The same, for programs.", show_default=False)] = None,
) -> None:
    """Tell what a fit will hold, send and take on so many workers, and what it assumes; nothing is started."""
    import json

    from gendist.config import load_spec
    from gendist.planning import plan_of
    from gendist.storage import path_here

    path = None if out is None else path_here(out, "--out")
    planned = plan_of(
        load_spec(spec, overrides or ()),
        workers,
        gpus_per_node=gpus_per_node,
        gpu=gpu,
        workers_per_node=workers_per_node,
        memory_gb=memory_gb,
        network_gbits=network_gbits,
        latency_us=latency_us,
        num_rows=rows,
        num_features=features,
    )
    if path is not None:
        path.write_text(json.dumps(planned.facts, indent=2, allow_nan=False) + "\n")
    planned.show()


@app.command()
def demo(overrides: Overrides = None) -> None:
    """Fit every configs/*_digits.yaml on embedded real data, and draw pictures from what comes out."""
    from gendist.config import load_spec, overrides_it_knows

    # Beside the package in a checkout, inside it where it was installed.
    places = [Path(__file__).parents[2] / "configs", Path(__file__).parents[1] / "configs"]
    folder = next(place for place in places if place.is_dir())
    paths = sorted(folder.glob("*_digits.yaml"))
    specs = [load_spec(path, known) for path, known in overrides_it_knows(paths, overrides or ())]
    runs = [_fit(spec, f"runs/demo/{path.stem}", None) for spec, path in zip(specs, paths, strict=True)]
    print("\npictures of digits that no one has written:")
    for run in runs:
        print(f"  {run.path}/samples.png")
    print(f"\nnext:  more of them         {command()} sample {runs[0].path} -n 100 --seed 1 --out digits.png")
    print(f"       your own data        {command()} fit {folder.name}/gmm_parquet.yaml data.path=YOUR.parquet")
    print("       what a spec can say  README.md")


def _fit(spec: Any, run_dir: str, address: str | None) -> Any:
    """A fit with a progress bar, and what came of it."""
    from rich.console import Console

    from gendist import fitting
    from gendist.launch.progress import fit_progress, log_to
    from gendist.storage import place_of

    console = Console(stderr=True, quiet=not is_first())
    log_to(console)
    place = place_of(run_dir)
    with _interruptible(place / "spec.yaml" if isinstance(place, Path) else None), fit_progress(console, spec.fit) as watch:
        run = fitting.fit(spec, run_dir=run_dir, address=address, watch=watch)
    if is_first():
        _tell(spec, run)
    return run


def _tell(spec: Any, run: Any) -> None:
    from gendist.launch.summary import summary

    for line in summary(spec, run):
        print(line)


@contextmanager
def _writing(out: Path, what: str) -> Iterator[Any]:
    """Messages and progress of rows that are written; yields what is to be called with their number."""
    from rich.console import Console

    from gendist.launch.progress import log_to, rows_progress

    console = Console(stderr=True)
    log_to(console)
    with _interruptible(out / "_request.json"), rows_progress(console, what) as watch:
        yield watch


def _of_data(
    verb: Callable[..., Any], artifact: str, data: str, overrides: list[str] | None, out: str, address: str | None, what: str,
    **options: Any,
) -> Any:  # fmt: skip
    """What one of `gendist.bulk` has written of every row of the data, in the words of the command line."""
    from gendist.config import load_data_spec
    from gendist.storage import path_here

    spec, path = load_data_spec(data, overrides or ()), path_here(out, "--out")
    with _writing(path, what) as watch:
        written = verb(artifact, spec.data, path, cluster=spec.cluster, address=address, watch=watch, **options)
    if written.was_finished:
        print(f"{out} is finished; nothing to do")
    return written


@contextmanager
def _interruptible(begun: Path | None) -> Iterator[None]:
    """Ctrl-C is one line, which says how to go on where there is a file `begun`; None: there may be one elsewhere."""
    try:
        yield
    except KeyboardInterrupt:
        is_begun = begun is None or begun.exists()
        kept = "; what was reached is kept: the same command goes on from there" if is_begun else ""
        _fail(f"interrupted{kept}", INTERRUPTED)


def _fail(message: str, code: int) -> NoReturn:
    if is_first():
        print(f"error: {message}", file=sys.stderr, flush=True)
    if ray_cluster := sys.modules.get("gendist.ray_cluster"):
        ray_cluster.end_without_head(code)
    raise SystemExit(code)
