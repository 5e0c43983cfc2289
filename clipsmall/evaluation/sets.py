"""A data set to evaluate on: our shards, or CLIP_benchmark's layout, with its class names."""

import hashlib
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from clipsmall.data import Catalog, build_index, index_path, open_catalog, shard_paths, write_index
from clipsmall.data.index import IMAGE_SUFFIXES
from clipsmall.data.making.tables import TABLES
from clipsmall.distributed import world

# what dataset_type.txt may say; other words mean nothing here
KINDS = ("retrieval", "multilabel")
# files that data_tools.make_shards opens
SOURCES = (*TABLES, ".zip")


@dataclass(frozen=True)
class DataSet:
    """Images with the words that belong to them: class names, templates, and how to find labels."""

    name: str
    # folders, globs or brace lists
    shards: tuple[str, ...]
    # of the images to learn from; () = none known
    train: tuple[str, ...]
    # one of KINDS, or "": whatever it has
    kind: str
    # see `prompts`
    classes: str
    templates: str
    # see `read_texts`
    label: str
    # images without a caption are left out before anything is encoded
    only_captioned: bool = False

    @cached_property
    def catalog(self) -> Catalog:
        """Every image, with a caption or without (see `only_captioned`). Raises ShardError."""
        return _indexed(self.shards, self.only_captioned)

    @cached_property
    def training(self) -> Catalog:
        """The images to learn from.

        Raises:
            ValueError: there are none, or they are the very ones to classify.
        """
        if not self.train:
            raise ValueError(
                f"{self.name}: no images to learn from beside it (a folder `train`); "
                "name them by --train"
            )
        learned = {path.resolve() for path in shard_paths(list(self.train))}
        asked = {path.resolve() for path in shard_paths(list(self.shards))}
        if both := learned & asked:
            raise ValueError(
                f"{self.name}: would learn from the images it is asked about ({min(both)}); "
                "see --train"
            )
        return _indexed(self.train)

    @property
    def has_captions(self) -> bool:
        """Is it made for tasks on captions?"""
        return self.kind == "retrieval" or (not self.kind and self._some_captions)

    @property
    def has_classes(self) -> bool:
        """Is it made for classification: has it a class list, or labels but no captions?"""
        if self.kind:
            return self.kind == "multilabel"
        return self.classes != "captions" or not self._some_captions

    @property
    def _some_captions(self) -> bool:
        return bool(self.catalog.caption_hash.any())

    def digest(self, training: bool) -> str:
        """Of all that results on it depend on; `training`: also of the images to learn from.

        Keys of results depend on it: what goes in, and in which order, stays.
        """
        words = [self.label, self.catalog.fingerprint]
        if self.kind == "multilabel":
            words.append("multilabel")
        if training:
            try:
                words.append(self.training.fingerprint)
            except ValueError as error:
                # the task will say so
                words.append(str(error))
        for words_or_file in (self.classes, self.templates):
            path = Path(words_or_file)
            if path.is_file():
                # bytes that are no text are for the task to refuse
                words.append(path.read_text(encoding="utf-8", errors="replace"))
            else:
                words.append(words_or_file)
        return hashlib.sha256("\0".join(words).encode()).hexdigest()


def given_set(
    name: str,
    shards: Sequence[str],
    train: Sequence[str] = (),
    kind: str = "",
    classes: str = "captions",
    templates: str = "plain",
    label: str = "",
    only_captioned: bool = False,
) -> DataSet:
    """A data set as it is given, opened; nothing is looked for beside its shards.

    Raises:
        ValueError: no shards, or an unknown kind.
    """
    if kind and kind not in KINDS:
        raise ValueError(f"{name}: kind={kind}: must be one of {', '.join(KINDS)}, or left out")
    data = DataSet(
        name, tuple(shards), tuple(train), kind, classes, templates, label, only_captioned
    )
    # opened now: what is missing shows before training or a model's loading
    assert len(data.catalog)
    assert not train or len(data.training)
    return data


def open_set(
    path: str, classes: str = "", templates: str = "", label: str = "", train: str = ""
) -> DataSet:
    """The data set at `path`; what is not given is looked for beside its shards.

    Args:
        path: a folder, glob or brace list of tars, or a folder with `test/` in CLIP_benchmark's
            layout: `{split}/{i}.tar`, `{split}/nshards.txt`, `classnames.txt`,
            `zeroshot_classification_templates.txt`, `dataset_type.txt`. The last three may also lie
            beside a folder of tars.
        classes, templates, label: as `zero_shot` takes them.
        train: shards of images to learn from; default: the folder `train` beside.

    Raises:
        ValueError: no shards (for images: with the command that makes them), or not as many as
            nshards.txt says.
    """
    root = Path(path).resolve()
    shards = path
    if _has_test(root):
        shards = str(root / "test")
    else:
        root = root.parent
    _refuse_images(shards)
    _check_count(shards)
    kind = _word(root / "dataset_type.txt")

    def beside(file: str, otherwise: str) -> str:
        return str(root / file) if (root / file).exists() else otherwise

    learn_from = train or beside("train", "")
    data = DataSet(
        name=set_name(path),
        shards=(shards,),
        train=(learn_from,) if learn_from else (),
        kind=kind if kind in KINDS else "",
        classes=classes or beside("classnames.txt", "labels" if label else "captions"),
        templates=templates or beside("zeroshot_classification_templates.txt", "plain"),
        label=label,
    )
    # opened now: what is missing shows before a model is loaded
    assert len(data.catalog)
    assert not train or len(data.training)
    return data


def set_name(path: str) -> str:
    """The name of a data set in results: its folder's, with the parent's in front.

    Of a folder with `test/` in it, its own name.
    """
    root = Path(path).resolve()
    return root.name if _has_test(root) else f"{root.parent.name}/{root.name}"


def _has_test(root: Path) -> bool:
    """Is it a folder in CLIP_benchmark's layout, and not one of shards?"""
    if not root.is_dir() or any(root.glob("*.tar")):
        return False
    return (root / "test").is_dir()


def _word(path: Path) -> str:
    return path.read_text(encoding="utf-8").strip() if path.exists() else ""


def _refuse_images(path: str) -> None:
    """Raises ValueError for images that are no shards yet, and says how they become some."""
    place = Path(path.removeprefix("hf:")).resolve()
    # so that `train` can be made beside `test`
    made = f"{place.parent.name}-shards/test" if place.name == "test" else f"{place.stem}-shards"
    if path.startswith("hf:"):
        columns = "--split test --caption COLUMN --label COLUMN"
    elif place.suffix in SOURCES and place.is_file():
        columns = "--label COLUMN"
    elif _holds_images(place):
        columns = "--label class"
    else:
        return
    given = shlex.quote(path)
    out = shlex.quote(f"data/{made}")
    raise ValueError(
        f"{path}: no shards (*.tar) yet; make them: "
        f"python -m data_tools.make_shards {given} {out} {columns}; "
        f"then evaluate with --data {out} --label label"
    )


def _holds_images(folder: Path) -> bool:
    """A folder of images, at any depth, and of no tars."""
    if not folder.is_dir() or any(folder.glob("*.tar")):
        return False

    for path in folder.rglob("*"):
        # without the dot
        suffix = path.suffix[1:].lower()
        if suffix in IMAGE_SUFFIXES:
            return True
    return False


def _check_count(shards: str) -> None:
    """Raises ValueError where nshards.txt names another number of tars."""
    wanted = _word(Path(shards) / "nshards.txt")
    there = len(shard_paths(shards))
    if wanted and wanted != str(there):
        raise ValueError(
            f"{shards}: nshards.txt says {wanted}, {there} tars are there; copy the missing ones"
        )


def _indexed(shards: Sequence[str], only_captioned: bool = False) -> Catalog:
    """The catalog; tars that nobody has indexed yet are indexed now, by one rank."""
    try:
        paths = shard_paths(list(shards)) if world.rank() == 0 else []
        for shard in paths:
            if not index_path(shard).exists():
                write_index(shard, build_index(shard))
    except OSError as error:
        raise ValueError(
            f"{', '.join(shards)}: has no index and none can be written beside it "
            f"({error.strerror})"
        ) from None
    finally:
        # also after an error, or the others would wait here for ever; they fail below
        world.barrier()
    # a single one stands in messages as it was given
    patterns = shards[0] if len(shards) == 1 else list(shards)
    return open_catalog(patterns, captions=only_captioned)
