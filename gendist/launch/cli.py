"""The command line: `gendist VERB ...`, or `python launch.py VERB ...`."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

INTERRUPTED = 130  # the shell's code for a process that Ctrl-C ended, and typer's
ROWS_AT_ONCE = 1_000_000  # of a sample that is written part by part

app = typer.Typer(
    name="gendist",
    help="Fit, sample and score generative models on one machine or a Ray cluster, from one YAML spec.",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

SpecArgument = Annotated[Path, typer.Argument(metavar="SPEC.yaml", help="What to fit; see configs/.")]
ArtifactArgument = Annotated[Path, typer.Argument(metavar="ARTIFACT", help="A run directory, or its artifact/.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[key=value ...]", help="Changes to the spec, such as cluster.num_workers=4.", show_default=False),
]
Address = Annotated[
    str | None, typer.Option(metavar="ADDR", help="HOST:PORT of a Ray head; this machine if not given.", show_default=False)
]


def main() -> None:
    """Run a command. A mistake of the user's is one line on stderr and exit code 2."""
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
        Path | None, typer.Option(metavar="DIR", help="Where to keep the run; runs/NAME if not given.", show_default=False)
    ] = None,
    address: Address = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the resolved spec and stop.")] = False,
) -> None:
    """Fit a model. On an unfinished run directory of the same spec it goes on; on a finished one it changes nothing."""
    from gendist.config import load_spec

    resolved = load_spec(spec, overrides or ())
    if dry_run:
        print(resolved.to_yaml(), end="")
        return
    run = _fit(resolved, run_dir or Path("runs") / resolved.name, address)
    print(f"\nnext:  {_command()} sample {run.path} -n 64 --out samples.png")
    print(f"       {_command()} score {run.path} DATA --out scores.parquet")


@app.command()
def sample(
    artifact: ArtifactArgument,
    num_samples: Annotated[int, typer.Option("-n", min=1, help="How many samples.")],
    out: Annotated[Path, typer.Option(metavar="FILE", help="Written as the suffix says: .npy .npz .parquet .csv .png")],
    seed: Annotated[int, typer.Option(min=0, max=2**64 - 1, help="The same seed gives the same samples.")] = 0,
    offset: Annotated[int, typer.Option(min=0, help="The row of the seed's endless sample to begin with.")] = 0,
    given: Annotated[
        str | None, typer.Option(metavar="LABEL", help="Draw from this label or component alone.", show_default=False)
    ] = None,
) -> None:
    """Draw samples. 100 samples are the same as 40 and then 60 with --offset 40."""
    from gendist.artifact import load_artifact
    from gendist.launch.tables import SUFFIXES, check_out, is_array, write_table
    from gendist.pictures import MAX_SHOWN, save_picture

    check_out(out, (*SUFFIXES, ".png"))
    loaded = load_artifact(artifact)

    def draw(start: int, size: int) -> Any:
        return loaded.model.sample(size, seed=seed, offset=start, given=given).numpy()

    def parts() -> Iterator[dict[str, Any]]:
        for start in range(offset, offset + num_samples, ROWS_AT_ONCE):
            x_ND = draw(start, min(ROWS_AT_ONCE, offset + num_samples - start))
            yield {"x": x_ND} if is_array(out) else dict(zip(loaded.schema.feature_names, x_ND.T, strict=True))

    if out.suffix.lower() == ".png":
        save_picture(draw(offset, min(num_samples, MAX_SHOWN)), loaded.schema, out)
    else:
        write_table(parts(), out)
    print(f"{num_samples:,} samples of {loaded.family} in {out}")


@app.command()
def score(
    artifact: ArtifactArgument,
    data: Annotated[str, typer.Argument(metavar="DATA", help="A path, 'digits', or a YAML file with a data: block.")],
    out: Annotated[Path, typer.Option(metavar="FILE", help="Written as the suffix says: .npy .npz .parquet .csv")],
    overrides: Overrides = None,
    address: Address = None,
) -> None:
    """Write the log density of every row of DATA, in nats, in the order of the rows."""
    from gendist.artifact import load_artifact
    from gendist.config import load_data_spec
    from gendist.data import Dataset, Schema, open_source
    from gendist.evaluate.score import score as score_blocks
    from gendist.execution import execution
    from gendist.launch.tables import SUFFIXES, check_out, is_array, write_table
    from gendist.protocols import UserError
    from gendist.transformed import taken_apart

    check_out(out, SUFFIXES)
    loaded = load_artifact(artifact)
    spec = load_data_spec(data, overrides or ())
    transforms = taken_apart(loaded.model)[1]
    if spec.data.transforms not in ((), transforms.declared if transforms else ()):
        raise UserError(f"data.transforms: those of {artifact} are part of it and are applied; leave others out")
    source = open_source(spec.data)
    if os.path.realpath(out) in map(os.path.realpath, source.paths):
        raise UserError(f"--out {out}: the data themselves; choose another file")
    # The columns that were fitted; an array has no names and is taken by position.
    columns = spec.data.columns or (loaded.schema.columns if len(source.schema.names) > 1 else None)
    config = spec.data.model_copy(update={"columns": columns, "label": None, "weight": None})
    began, total = time.monotonic(), 0.0
    schema = Schema.of(source, config)
    if schema.num_features != loaded.model.num_features:
        raise UserError(
            f"{source.name}: {schema.num_features} features, but the model has {loaded.model.num_features} "
            f"({', '.join(loaded.schema.columns[:8])}); choose columns with data.columns=[...]"
        )
    with execution(spec.cluster, address) as make_blocks:
        dataset = Dataset.open(source, config, schema, make_blocks)

        def parts() -> Iterator[dict[str, Any]]:
            nonlocal total
            for rows, log_prob in score_blocks(loaded.model, dataset.blocks(keep=False)):
                total += float(log_prob.sum())
                yield ({} if is_array(out) else {"row": rows.numpy()}) | {"log_prob": log_prob.numpy()}

        num_rows = write_table(parts(), out)
    seconds = time.monotonic() - began
    print(f"{num_rows:,} rows scored in {seconds:.1f} s, mean log density {total / num_rows:.6f} nats, in {out}")
    if density := getattr(loaded.model, "density", None):
        print(f"  ({density})")


@app.command()
def demo(overrides: Overrides = None) -> None:
    """Fit every configs/*_digits.yaml on embedded real data, and draw pictures from what comes out."""
    from gendist.config import load_spec

    # Beside the package in a checkout, inside it where it was installed.
    places = [Path(__file__).parents[2] / "configs", Path(__file__).parents[1] / "configs"]
    folder = next(place for place in places if place.is_dir())
    runs = [
        _fit(load_spec(path, overrides or ()), Path("runs") / "demo" / path.stem, None)
        for path in sorted(folder.glob("*_digits.yaml"))
    ]
    print("\npictures of digits that no one has written:")
    for run in runs:
        print(f"  {run.path}/samples.png")
    print(f"\nnext:  more of them         {_command()} sample {runs[0].path} -n 100 --seed 1 --out digits.png")
    print(f"       your own data        {_command()} fit {folder.name}/gmm_parquet.yaml data.path=YOUR.parquet")
    print("       what a spec can say  README.md")


def _fit(spec: Any, run_dir: Path, address: str | None) -> Any:
    """A fit with a progress bar, and what came of it."""
    from rich.console import Console

    from gendist import fitting
    from gendist.launch.progress import fit_progress, log_to

    console = Console(stderr=True)
    log_to(console)
    try:
        with fit_progress(console, spec.fit.max_iterations, spec.fit.num_restarts) as watch:
            run = fitting.fit(spec, run_dir=run_dir, address=address, watch=watch)
    except KeyboardInterrupt:
        kept = "; what was reached is kept: the same command goes on from there" if (run_dir / "spec.yaml").exists() else ""
        _fail(f"interrupted{kept}", INTERRUPTED)
    results = run.results
    print(f"{spec.name}: {results['stopped']} after {results['num_iterations']} iterations, in {run.path}")
    print("  " + "  ".join(f"{key} {value:.6g}" for key, value in results.items() if isinstance(value, float)))
    print("  (of the fitted model; a log-likelihood is the mean a row, in nats)")
    if density := getattr(run.model, "density", None):
        print(f"  ({density})")
    if spec.fit.num_restarts > 1:
        print(f"  the best of {spec.fit.num_restarts} restarts; manifest.json says how each of them ended")
    if results["repairs"]:
        print(f"  {len(results['repairs'])} repairs, the last: {results['repairs'][-1]} (all in metrics.jsonl)")
    if results["iterations_that_fell"]:
        print(f"  the log-likelihood fell in iterations {results['iterations_that_fell']}; see metrics.jsonl")
    return run


def _command() -> str:
    """How this program was called."""
    return "gendist" if Path(sys.argv[0]).name == "gendist" else "python launch.py"


def _fail(message: str, code: int) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(code)
