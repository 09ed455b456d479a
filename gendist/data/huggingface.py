"""Data sets of the Hugging Face hub, by their name there or as a folder in its layout or as `save_to_disk` leaves it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

from gendist.data.files import Files
from gendist.data.formats import FORMATS, SUFFIXES, open_files
from gendist.data.memory import HuggingFaceSource
from gendist.data.picture_files import PictureFiles
from gendist.protocols import UserError

HUB_TIMEOUT_S = 10.0
NOT_OF_THE_FILES = ("name", "version", "data_dir", "data_files", "description", "features")  # fields of a configuration


def open_huggingface(
    path: str, split: str | None, subset: str | None, streaming: bool
) -> HuggingFaceSource | Files[Any] | PictureFiles:
    """One split of a data set.

    split      its name; "train" where None. Without streaming also a part of it, such as "train[:1000]"
    subset     the name of a configuration; may be None where there is one
    streaming  read the data files where they lie, by row number all the same, instead of a copy in the cache of `datasets`;
               what lies in a folder is not copied in either case

    UserError where there is no such data set, the hub does not answer, or files to stream are of a kind without row numbers.
    """
    import datasets

    wanted, name = split or "train", f"{path} ({split or 'train'})"
    with _told(path):
        if not os.path.isdir(path):
            _check_hub(path)
        elif not streaming and _saved(path):
            return HuggingFaceSource(_part(path, wanted, split, datasets.load_from_disk(path)), name)
        builder = datasets.load_dataset_builder(path, subset)
        files = builder.config.data_files or {}
        if files and wanted not in files and (streaming or re.fullmatch(r"[\w.-]+", wanted)):
            hint = "; a part of a split is not streamed: leave data.streaming out" if "[" in wanted else ""
            raise UserError(f"{path}: no split '{wanted}'; there are {', '.join(map(str, files))}{hint}")
        kind = type(builder).__module__.rpartition(".")[2]
        obstacle = _obstacle(builder, kind, files.get(wanted, ()))
        if streaming and obstacle:
            raise UserError(f"{path}: {obstacle} cannot be streamed; leave data.streaming out")
        if not obstacle:
            # Not through the readers of `datasets`, which round some numbers (of a JSON array, for one), refuse files without
            # rows, and take the types of the first rows for those of all.
            where = list(files[wanted])
            return open_files(where if streaming else datasets.DownloadManager(dataset_name=path).download(where), kind)
        return HuggingFaceSource(datasets.load_dataset(path, subset, split=wanted), name)


@contextmanager
def _told(path: str) -> Iterator[None]:
    """A failure of `datasets` or of the hub as one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as failure:  # anything may come from there
        error = failure.__cause__ if type(failure).__name__ == "DatasetGenerationError" else failure
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{path}: cannot be opened as a data set of the hub ({reason[:300]})") from failure


def _check_hub(name: str) -> None:
    """UserError unless the hub knows the data set. `datasets` itself tries again and again for half a minute."""
    import huggingface_hub
    from huggingface_hub import errors

    if huggingface_hub.is_offline_mode():
        return  # what was loaded before lies in the cache
    try:
        huggingface_hub.HfApi().dataset_info(name, timeout=HUB_TIMEOUT_S)
    except errors.HFValidationError:
        raise UserError(f"{name}: neither a folder nor a name of the hub, such as ylecun/mnist") from None
    except errors.RepositoryNotFoundError:
        raise UserError(f"{name}: no such folder, and no such data set on the hub that this login may read") from None
    except Exception as error:  # of whatever library the hub's client talks through
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{name}: no such folder, and the hub at {huggingface_hub.constants.ENDPOINT} cannot be reached ({reason}); give a "
            "folder, or set HF_HUB_OFFLINE=1 for what was loaded before"
        ) from error


def _saved(folder: str) -> bool:
    return any(Path(folder, name).is_file() for name in ("state.json", "dataset_dict.json"))


def _part(path: str, wanted: str, said: str | None, saved: Any) -> Any:
    """The split of what `save_to_disk` wrote: a data set, which may be of no split, or several by their names."""
    splits = saved if isinstance(saved, dict) else {str(saved.split or wanted): saved}
    if said is None and len(splits) == 1:
        return next(iter(splits.values()))
    if wanted not in splits:
        raise UserError(f"{path}: no split '{wanted}'; there are {', '.join(splits)}")
    return splits[wanted]


def _obstacle(builder: Any, kind: str, files: Sequence[str]) -> str:
    """What keeps our own readers from finding every row of the files as `datasets` would; empty where nothing does."""
    odd = sorted({suffix for file in files if SUFFIXES.get(suffix := Path(file).suffix.lower()) != kind})
    if kind not in FORMATS or odd or not files:
        return f"data of the kind '{kind}'" + (f" in files of {', '.join(odd)}" if odd else "")
    usual = type(builder.config)()
    for field in fields(usual):
        given = getattr(builder.config, field.name)
        if field.name not in NOT_OF_THE_FILES and given != getattr(usual, field.name):
            return f"files with {field.name}={given!r}"
    return ""
