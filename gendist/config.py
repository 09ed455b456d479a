"""The spec: one YAML file says what is fitted, on which data, how, and on how many workers.

name: digits-gmm
family: gmm                  # a module of gendist/models
seed: 0
model: {...}                 # the family's own Config
data: {...}                  # gendist.data.DataConfig
fit: {...}                   # gendist.em.config.EMConfig, or gendist.train.config.DeepConfig, as the family is fitted
cluster: {...}               # ClusterConfig
tracking: {...}              # gendist.tracking.TrackingConfig
"""

from __future__ import annotations

import importlib
import json
import pkgutil
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    Tag,
    TypeAdapter,
    ValidationError,
    create_model,
    model_validator,
)

from gendist.data import DataConfig
from gendist.data.embedded import EMBEDDED
from gendist.em.config import EMConfig
from gendist.noise import MAX_SEED
from gendist.protocols import UserError
from gendist.secrets_in_urls import require_no_secrets, without_secrets
from gendist.spec_yaml import read, read_value
from gendist.storage import below, place_of
from gendist.tracking import TrackingConfig
from gendist.train.config import DeepConfig

C = TypeVar("C", bound=BaseModel)
Count = Annotated[int, Field(ge=0)]


def _number_or_range(given: Any) -> Any:
    """Checked by hand: of a union, pydantic reports an error for each type."""
    if isinstance(given, int) and not isinstance(given, bool) and given >= 0:
        return given
    is_list = isinstance(given, list | tuple)
    if is_list and len(given) == 2 and all(type(number) is int for number in given) and 1 <= given[0] <= given[1]:
        return tuple(given)
    said = f", not {list(given)}" if is_list else ""
    raise ValueError(f"a whole number from 0 on is needed, or [least, most], such as [1, 4]{said}")


class ClusterConfig(BaseModel):
    """
    num_workers  Ray tasks or training processes at work at a time; 0 computes in this process, without Ray. Of a family that
                 is trained by gradient it may be [least, most]: as many as the cluster has at the time
    use_gpu      whether each computes on a GPU of its own
    storage      where runs are kept that are given no run directory, each by its name: a folder that all nodes share, or a URL
                 such as s3://bucket/runs
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    num_workers: Annotated[Count | tuple[Count, Count], BeforeValidator(_number_or_range)] = 0
    use_gpu: bool = False
    storage: Annotated[str, Field(min_length=1)] | None = None

    @model_validator(mode="after")  # of the whole block, so that no message repeats what the field holds
    def _has_no_credentials(self) -> Self:
        if self.storage is not None:
            place_of(self.storage)
        return self

    @property
    def fixed_num_workers(self) -> int:
        """UserError where it is elastic, which only training is."""
        if isinstance(self.num_workers, tuple):
            raise UserError(
                f"cluster.num_workers {list(self.num_workers)}: only training by gradient is elastic; give one number here"
            )
        return self.num_workers


class Spec(BaseModel):
    """A whole run. What `model` and `fit` may hold depends on the family: see `spec_class`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)
    family: str
    seed: int = Field(default=0, ge=0, le=MAX_SEED)
    model: BaseModel
    data: DataConfig = DataConfig()
    fit: EMConfig | DeepConfig
    cluster: ClusterConfig = ClusterConfig()
    tracking: TrackingConfig = TrackingConfig()

    @model_validator(mode="after")
    def _only_training_is_elastic(self) -> Self:
        if isinstance(self.fit, EMConfig) and isinstance(self.cluster.num_workers, tuple):
            raise ValueError(
                f"cluster.num_workers {list(self.cluster.num_workers)}: the family {self.family} is fitted in passes over the "
                "data, which any number of workers share; give one number"
            )
        return self

    @property
    def place_in_storage(self) -> str | None:
        """The run directory where none is given: by the name in `cluster.storage`, if there is one."""
        return None if self.cluster.storage is None else below(self.cluster.storage, self.name)

    def to_yaml(self) -> str:
        """The resolved spec: every field with its value."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)

    def identity(self) -> dict[str, Any]:
        """What makes two specs the same run: all of it but where it computes, which may change from one start to the next.

        Any number of workers may go on, and of a family that is trained by gradient any engine, in micro-batches of any size,
        since its checkpoints are of none.
        """
        return self.model_dump(mode="json", exclude=self._surroundings)

    def surroundings(self) -> dict[str, Any]:
        """All the rest: where it computes, and how."""
        return self.model_dump(mode="json", include=self._surroundings)

    @property
    def _surroundings(self) -> Any:
        return {"cluster": True, "tracking": True, "fit": set(self.fit.MAY_CHANGE)}


def families() -> list[str]:
    """The names of all families: the modules of `gendist/models`."""
    package = importlib.import_module("gendist.models")
    return sorted(module.name for module in pkgutil.iter_modules(package.__path__) if not module.ispkg)


def family_class(family: str) -> type[Any]:
    """The class that a family's module calls `Model`: a `GenerativeModel`."""
    model: type[Any] = importlib.import_module(f"gendist.models.{family}").Model
    return model


def model_class(family: str, config: BaseModel) -> type[Any]:
    """The class of the models that a family's `model` block describes: the family's own, or one of its models a class."""
    model: Any = family_class(family)
    if getattr(config, "labels", None) != "classes":
        return model
    from gendist.class_conditional import class_conditional

    return class_conditional(model)


def is_trained(family: type[Any]) -> bool:
    """Whether a family is fitted by gradient (a `DeepModel`), and not by expectation-maximization (a `StatisticsModel`)."""
    return hasattr(family, "phases")


class ScoreSpec(BaseModel):
    """What `score` reads of a YAML file: any spec of a fit will do, since other blocks are passed over."""

    model_config = ConfigDict(frozen=True)

    data: DataConfig
    cluster: ClusterConfig = ClusterConfig()


@cache
def spec_class(family: str) -> type[Spec]:
    """The spec of a family, whose `model` block is the family's own Config, and `fit` that of how it is fitted."""
    model = family_class(family)
    fit = DeepConfig if is_trained(model) else EMConfig
    fields: Any = {"family": (Literal[family], ...), "model": (model.Config, ...), "fit": (fit, fit())}
    return create_model("Spec", __base__=Spec, **fields)


def load_spec(spec: str | Path | Mapping[str, Any] | Spec, overrides: Iterable[str] = ()) -> Spec:
    """A spec from a YAML file, a dict, or as it is, with `key=value` overrides, such as `model.num_components=10`.

    UserError where it is not a spec, with the file's name and, for an unknown key, the nearest that is allowed.
    """
    if isinstance(spec, Spec):
        return spec
    if isinstance(spec, Mapping):
        name, content = "spec", spec
    elif isinstance(spec, str | Path):
        name, content = without_secrets(str(spec)), read_yaml(spec)
    else:
        raise UserError(f"spec: a {type(spec).__name__}; give a path to a YAML file, or a dict")
    content = apply_overrides(content, overrides, name)
    require_no_secrets(content)
    family = content.get("family")
    if family is None:
        raise UserError(f"{name}: family is missing; allowed are {', '.join(families())}")
    if family not in families():
        raise UserError(f"{name}: {nearest('family', str(family), families())}")
    return validated(spec_class(family), content, name)


def overrides_it_knows(specs: Sequence[Path], overrides: Iterable[str]) -> list[tuple[Path, list[str]]]:
    """Of overrides that are meant for several specs of different families, those that the family of each knows.

    UserError where none knows one of them.
    """
    overrides = list(overrides)
    known = {path: [each for each in overrides if _is_known(_spec_class_of(path), each)] for path in specs}
    for override in overrides:
        if not any(override in each for each in known.values()):
            load_spec(specs[0], [override])  # which tells what is wrong with it
    return list(known.items())


def _spec_class_of(path: Path) -> type[Spec]:
    return spec_class(str(read_yaml(path).get("family")))


def _is_known(config: type[BaseModel], override: str) -> bool:
    *parents, last = override.partition("=")[0].split(".")
    is_any_key = False  # of a mapping, whose keys are the user's
    for parent in parents:
        if is_any_key:
            is_any_key = False
            continue
        if parent not in config.model_fields:
            return False
        annotation = config.model_fields[parent].annotation
        block, is_any_key = _block_of(annotation, ()), get_origin(annotation) is Mapping
        if block is None:
            return False
        config = block
    return is_any_key or last in config.model_fields


def load_data_spec(data: str, overrides: Iterable[str] = ()) -> ScoreSpec:
    """Where rows are, from a path to them, the name of embedded data ("digits"), or a YAML file with a `data:` block."""
    overrides = _of_blocks(overrides, "data", "cluster")
    if data.endswith((".yaml", ".yml")):
        content = read_yaml(data)
    else:
        content = {"data": {"source": data} if data in EMBEDDED and not Path(data).exists() else {"path": data}}
    content = apply_overrides(content, overrides, without_secrets(data))
    require_no_secrets(content)
    return validated(ScoreSpec, content, without_secrets(data))


def load_cluster_config(overrides: Iterable[str]) -> ClusterConfig:
    """Where to compute, from `cluster.KEY=value` alone."""
    content = apply_overrides({"cluster": {}}, _of_blocks(overrides, "cluster"), "cluster")
    require_no_secrets(content)
    return validated(ClusterConfig, content["cluster"], "cluster")


def _of_blocks(overrides: Iterable[str], *blocks: str) -> list[str]:
    """The overrides; UserError where one is of another block than these."""
    overrides = list(overrides)
    for override in overrides:
        if not override.startswith(tuple(f"{block}." for block in blocks)):
            raise UserError(f"'{override}': only {' and '.join(f'{block}.KEY' for block in blocks)} can be said here")
    return overrides


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping that a YAML file holds."""
    shown = without_secrets(str(path))
    try:
        content = read(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{shown}: no such file") from None
    except OSError as error:
        raise UserError(f"{shown}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{shown}: cannot be read ({error})") from error
    except yaml.YAMLError as error:
        raise UserError(f"{shown}: not YAML ({' '.join(str(error).split())})") from error
    if not isinstance(content, dict):
        raise UserError(f"{shown}: a mapping of keys and values is needed, such as `family: gmm`")
    return content


def _plain(value: Any) -> Any:
    """Of what JSON does not know: NumPy's numbers and arrays as numbers and lists, all else as text."""
    return value.tolist() if hasattr(value, "tolist") else str(value)


def apply_overrides(content: Mapping[str, Any], overrides: Iterable[str], name: str) -> dict[str, Any]:
    """A copy of a mapping with dotted `key=value` applied; values are YAML (`[a, b]`, `1e-3`, `true`, `null`)."""
    try:
        result: dict[str, Any] = json.loads(json.dumps(content, default=_plain))
    except (TypeError, ValueError) as error:
        raise UserError(f"{name}: holds something else than plain keys and values ({error})") from error
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise UserError(f"'{override}' is not an override; write key=value, such as fit.max_iterations=10")
        *parents, last = key.split(".")
        place = result
        for parent in parents:
            if not isinstance(place.setdefault(parent, {}), dict):
                raise UserError(f"'{override}': {parent} is a value, not a block")
            place = place[parent]
        place[last] = read_value(text)
    return result


def flat(content: Mapping[str, Any], block: str = "") -> dict[str, Any]:
    """The values in a mapping of blocks, by dotted keys."""
    values: dict[str, Any] = {}
    for key, value in content.items():
        values |= flat(value, f"{block}{key}.") if isinstance(value, Mapping) else {f"{block}{key}": value}
    return values


def validated(config: type[C], content: Any, where: str) -> C:
    """A validated configuration; UserError, in one line, where `content` is not one."""
    try:
        return config.model_validate(content)
    except ValidationError as error:
        problems = dict.fromkeys(_explain(problem, config) for problem in error.errors())
        raise UserError(f"{where}: " + "; ".join(problems)) from None


def _explain(problem: Any, config: type[BaseModel]) -> str:
    kind = problem["type"]
    # Of a field that may be of several types, pydantic names the type as if it were a key; that of a block's is in brackets.
    named = [str(part) for part in problem["loc"]]
    location = [part for part in named if part != "str" and "[" not in part]
    key = ".".join(location)
    if kind == "extra_forbidden":
        *parents, unknown = location
        for part in parents:
            if part in config.model_fields:  # and not a place in a list, or a key of the user's
                config = _block_of(config.model_fields[part].annotation, named) or config
        return nearest("unknown key", unknown, list(config.model_fields), ".".join(parents))
    if kind == "missing":
        return f"{key} is missing"
    message = problem["msg"].removeprefix("Value error, ")
    if not key:
        return message
    given = f", not {problem['input']!r}" if not isinstance(problem["input"], dict | list) else ""
    return f"{key}: {message[:1].lower()}{message[1:]}{given}"


def _block_of(annotation: Any, named: Sequence[str]) -> type[BaseModel] | None:
    """The configuration class inside the type of a field, such as `Block | None` or `dict[str, Block]`; of several with tags
    that which is named. None where there is none."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    parts = [part for part in get_args(annotation) if part is not type(None)]
    chosen = [part for part in parts if any(isinstance(each, Tag) and each.tag in named for each in get_args(part))]
    return next((block for part in chosen or parts if (block := _block_of(part, named))), None)


def nearest(what: str, given: str, allowed: Sequence[str], block: str = "") -> str:
    """One line for a name that is not allowed: the nearest one that is, or all of them."""
    inside = f" in {block}" if block else ""
    near = [name for name in allowed if given and given in name] or get_close_matches(given, allowed, n=1)
    hint = f"did you mean '{near[0]}'?" if near else "allowed are"
    return f"{what} '{given}'{inside}; {hint} {'' if near else ', '.join(allowed)}".strip()


def json_schema() -> dict[str, Any]:
    """The JSON schema of a spec of any family, for editors."""
    # A union made at run time: of one family today, of as many as there are modules tomorrow.
    anything: Any = Union[tuple(spec_class(family) for family in families())]  # noqa: UP007
    return TypeAdapter(anything).json_schema()
