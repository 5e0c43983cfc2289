"""Anything that holds images and texts, opened as one table and one store of image bytes."""

from dataclasses import dataclass
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, NamedTuple

import pandas as pd
import pyarrow as pa

from clipsmall.data.index import IMAGE_SUFFIXES
from clipsmall.data.making.stores import DatasetStore, ImageStore, open_store
from clipsmall.data.making.tables import (
    IMAGE_NAMES,
    TABLES,
    columns_of,
    parquet_schema,
    pick,
    read_table,
)
from clipsmall.data.preprocess import BadImage

if TYPE_CHECKING:
    from datasets import Dataset


METADATA = tuple(f"metadata{suffix}" for suffix in TABLES)


@dataclass(frozen=True)
class SourceRequest:
    """What the user asked for; `make_shards --help` says what each field means."""

    input: str
    table: str | None = None
    images: str | None = None
    split: str | None = None
    subset: str | None = None
    image: str | None = None
    caption: tuple[str, ...] = ()
    label: str | None = None
    keep: tuple[str, ...] = ()
    group: str | None = None
    caption_split: str | None = None
    where: str | None = None

    @property
    def texts(self) -> set[str]:
        """Columns that must be read as text."""
        return {*self.caption, *(name for name in (self.image, self.group) if name)}


class Source(NamedTuple):
    """A table whose rows name images in a store: by the column `image`, or by row number if that is
    None.
    """

    frame: pd.DataFrame
    store: ImageStore
    image: str | None
    # the column to take for the class when the user names none
    label: str | None = None


def open_source(request: SourceRequest) -> Source:
    """Open `request.input`, reading texts but no images.

    Raises:
        ValueError: nothing there, or nothing that can be read; the message names it.
    """
    if request.input.startswith("hf:"):
        return _dataset_source(_load_dataset(request), request)
    path = Path(request.input)
    if path.suffix == ".tar" or (path.is_dir() and any(path.glob("*.tar"))):
        raise ValueError(
            f"{path}: holds shards already; look at them with: "
            f"python -m data_tools.check_shards {path}"
        )
    if path.is_file() and path.suffix.lower() in TABLES:
        return _table_source(path, Path(request.images) if request.images else path.parent, request)
    if path.is_file() and path.suffix.lower() != ".zip":
        raise ValueError(f"{path}: not a folder, a .zip or a table ({', '.join(TABLES)})")
    if request.images:
        raise ValueError(
            f"{path} holds the images already: give the table by --table, and leave --images out"
        )
    if request.table:
        return _table_source(Path(request.table), path, request)
    store = open_store(path)
    names = store.names()
    tables = [name for name in names if PurePosixPath(name).name in METADATA]
    if tables:
        return _metadata_source(str(path), store, tables, request)
    return _files_source(str(path), store, names)


def _metadata_source(
    origin: str, store: ImageStore, tables: list[str], request: SourceRequest
) -> Source:
    """A store with a table inside, at the top or the only one; its paths are relative to it."""
    top = [name for name in METADATA if name in tables]
    if not top and len(tables) > 1:
        raise ValueError(
            f"{origin}: several tables ({', '.join(tables[:3])}); "
            "open one of their folders at a time"
        )
    name = (top or tables)[0]
    try:
        data = store.read(name)
    except BadImage as error:
        raise ValueError(f"{origin}: {name}: {error}") from None
    frame = read_table(f"{origin}/{name}", BytesIO(data), request.texts)
    image = pick(columns_of(frame), IMAGE_NAMES, request.image, "--image")
    folder = PurePosixPath(name).parent
    places = frame[image].map(lambda place: str(folder / str(place)), na_action="ignore")
    return Source(frame.assign(**{image: places}), store, image)


def _table_source(table: Path, images: Path, request: SourceRequest) -> Source:
    if not table.is_file():
        raise ValueError(f"{table}: no such file")
    if table.suffix.lower() not in TABLES:
        raise ValueError(f"{table}: not a table ({', '.join(TABLES)})")
    if table.suffix.lower() == ".parquet":
        schema = parquet_schema(table)
        kind = schema.field(pick(schema.names, IMAGE_NAMES, request.image, "--image")).type
        if pa.types.is_struct(kind) or pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
            # images inside: `datasets` maps them into memory; Parquet itself is read by whole row
            # groups
            return _dataset_source(_load_dataset(request, parquet=table), request)
    with table.open("rb") as file:
        frame = read_table(str(table), file, request.texts)
    image = pick(columns_of(frame), IMAGE_NAMES, request.image, "--image")
    if frame[image].head(100).astype(str).str.match(r"https?://").any():
        raise ValueError(
            f"{table}: column {image} holds web addresses; download them with img2dataset first"
        )
    return Source(frame, open_store(images), image)


def _files_source(origin: str, store: ImageStore, names: list[str]) -> Source:
    """A table of image files: `image`, `class` (its folder), `caption` (the .txt beside it, else
    class).
    """
    images = list[PurePosixPath]()
    for name in names:
        path = PurePosixPath(name)
        if path.suffix[1:].lower() in IMAGE_SUFFIXES:
            images.append(path)
    if not images:
        raise ValueError(f"{origin}: no image files there (*.{', *.'.join(IMAGE_SUFFIXES)})")
    texts = {name for name in names if name.endswith(".txt")}
    beside = [str(path.with_suffix(".txt")) for path in images]
    columns = {
        "image": [str(path) for path in images],
        "class": [path.parent.name for path in images],
    }
    frame = pd.DataFrame(columns)
    if texts & set(beside):
        # "" for an image without a text
        files = [text if text in texts else "" for text in beside]
        lines = _lines(origin, store, files)
        return Source(frame.assign(caption=pd.Series(lines, dtype=object)), store, "image")
    if not frame["class"].any():
        raise ValueError(
            f"{origin}: no captions: neither a .txt beside an image, class folders, metadata.csv "
            "nor --table"
        )
    if frame["class"].nunique() == 1 and len(frame) > 1:
        stray = [name for name in names if PurePosixPath(name).suffix.lower() in TABLES]
        hint = f" ({stray[0]}?)" if stray else ""
        raise ValueError(
            f"{origin}: the name of the only folder, {frame['class'][0]!r}, would be every "
            f"caption; give a table by --table{hint}, or a folder for each class"
        )
    captions = frame["class"].str.replace(r"[_\s]+", " ", regex=True)
    return Source(frame.assign(caption=captions), store, "image", label="class")


def _lines(origin: str, store: ImageStore, texts: list[str]) -> list[list[str]]:
    """The lines of each file; none of "". Raises ValueError if some cannot be read as UTF-8."""
    found = list[list[str]]()
    broken = list[str]()
    for text in texts:
        lines = list[str]()
        try:
            if text:
                lines = store.read(text).decode("utf-8-sig").splitlines()
        except UnicodeDecodeError:
            broken.append(f"{text}: not UTF-8")
        except BadImage as error:
            broken.append(f"{text}: {error}")
        found.append(lines)
    if broken:
        raise ValueError(
            f"{origin}: {len(broken)} captions cannot be read, as {broken[0]}; "
            "convert (iconv -t utf-8) or remove them"
        )
    return found


def _load_dataset(request: SourceRequest, parquet: Path | None = None) -> "Dataset":
    import datasets

    name = request.input.removeprefix("hf:")
    try:
        if parquet:
            return datasets.load_dataset("parquet", data_files=str(parquet), split="train")
        if any(Path(name, mark).exists() for mark in ("dataset_dict.json", "state.json")):
            found = datasets.load_from_disk(name)
        else:
            found = datasets.load_dataset(name, request.subset)
    except Exception as error:
        # the hub, fsspec, pyarrow: anything
        reason = (str(error).splitlines() or [""])[0]
        raise ValueError(
            f"{parquet or request.input}: cannot be loaded: {type(error).__name__}: {reason}"
        ) from None
    if isinstance(found, datasets.Dataset):
        return found
    if request.split is None and len(found) > 1:
        raise ValueError(f"{request.input}: has several splits; say --split {' or '.join(found)}")
    if request.split is not None and request.split not in found:
        raise ValueError(
            f"{request.input}: no split {request.split}; there are: {', '.join(found)}"
        )
    return found[request.split or next(iter(found))]


def _dataset_source(dataset: "Dataset", request: SourceRequest) -> Source:
    import datasets

    def binary(kind: Any) -> bool:
        if isinstance(kind, dict):
            return "bytes" in kind
        dtype = getattr(kind, "dtype", "")
        return isinstance(kind, datasets.Image) or dtype in ("binary", "large_binary")

    inside = [name for name, kind in dataset.features.items() if binary(kind)]
    others = [name for name in dataset.column_names if name not in inside]
    if not others:
        raise ValueError(f"{request.input}: has no column beside the images ({', '.join(inside)})")
    frame: pd.DataFrame = dataset.select_columns(others).with_format(None).to_pandas()
    for name in others:
        classes = dataset.features[name]
        if isinstance(classes, datasets.ClassLabel):
            frame[name] = [_class_name(classes, number) for number in dataset[name]]
    if request.image in others or (request.image is None and not inside):
        image = pick(others, IMAGE_NAMES, request.image, "--image")
        folder = request.images or request.input.removeprefix("hf:")
        return Source(frame, open_store(Path(folder)), image)
    # without a usual name, the first column of images is taken
    names = [*IMAGE_NAMES, *(name.lower() for name in inside)]
    column = pick(inside, names, request.image, "--image")
    pictures = dataset.select_columns([column])
    if isinstance(dataset.features[column], datasets.Image):
        pictures = pictures.cast_column(column, datasets.Image(decode=False))
    return Source(frame, DatasetStore(pictures, column), None)


def _class_name(classes: Any, number: int | None) -> str | None:
    """None for a row without a class, which some data sets number -1."""
    if number is None or number < 0:
        return None
    name: str = classes.int2str(number)
    return name
