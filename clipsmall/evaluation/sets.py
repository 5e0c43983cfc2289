"""Data sets to evaluate on: shards, or CLIP_benchmark's layout; with class names and labels."""

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

# The words of dataset_type.txt that have a meaning here; others are ignored.
KINDS = ("retrieval", "multilabel")
# Suffixes of files that data_tools.make_shards can convert.
SOURCES = (*TABLES, ".zip")


@dataclass(frozen=True)
class DataSet:
    """Shards of images, and where class names, prompt templates and labels come from."""

    name: str
    # folders, globs or brace lists
    shards: tuple[str, ...]
    # shards of training images, for probes; () = none
    train: tuple[str, ...]
    # one of KINDS, or "" = unspecified
    kind: str
    # see `prompts`
    classes: str
    templates: str
    # see `read_texts`
    label: str
    # leave out images without a caption before encoding
    only_captioned: bool = False

    @cached_property
    def catalog(self) -> Catalog:
        """All images; see `only_captioned`. Raises ShardError."""
        return _indexed(self.shards, self.only_captioned)

    @cached_property
    def training(self) -> Catalog:
        """The training images, for probes.

        Raises:
            ValueError: there are none, or they overlap the test images.
        """
        if not self.train:
            raise ValueError(
                f"{self.name}: has no training images (a folder `train` beside it); "
                "give their shards with --train"
            )
        learned = {path.resolve() for path in shard_paths(list(self.train))}
        asked = {path.resolve() for path in shard_paths(list(self.shards))}
        if both := learned & asked:
            raise ValueError(
                f"{self.name}: {min(both)} is both training and test data; "
                "give other shards with --train"
            )
        return _indexed(self.train)

    @property
    def has_captions(self) -> bool:
        """Whether the default tasks on captions apply."""
        return self.kind == "retrieval" or (not self.kind and self._some_captions)

    @property
    def has_classes(self) -> bool:
        """Whether the default is classification: it has a class list, or labels but no captions."""
        if self.kind:
            return self.kind == "multilabel"
        return self.classes != "captions" or not self._some_captions

    @property
    def _some_captions(self) -> bool:
        return bool(self.catalog.caption_hash.any())

    def digest(self, training: bool) -> str:
        """Digest of everything that results depend on; with `training`, training images as well.

        Part of the keys in existing result files: do not change what is hashed, nor the order.
        """
        words = [self.label, self.catalog.fingerprint]
        if self.kind == "multilabel":
            words.append("multilabel")
        if training:
            try:
                words.append(self.training.fingerprint)
            except ValueError as error:
                # the task will raise this error
                words.append(str(error))
        for words_or_file in (self.classes, self.templates):
            path = Path(words_or_file)
            if path.is_file():
                # the task will refuse a file that is not UTF-8
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
    """Open a data set exactly as given; no files beside its shards are used.

    Raises:
        ValueError: no shards, or an unknown kind.
    """
    if kind and kind not in KINDS:
        raise ValueError(f"{name}: kind={kind}: must be one of {', '.join(KINDS)}, or left out")
    data = DataSet(
        name, tuple(shards), tuple(train), kind, classes, templates, label, only_captioned
    )
    # open it now: missing shards should fail before training, or before a model is loaded
    assert len(data.catalog)
    assert not train or len(data.training)
    return data


def open_set(
    path: str, classes: str = "", templates: str = "", label: str = "", train: str = ""
) -> DataSet:
    """Open the data set at `path`; what is not given is looked for beside its shards.

    Args:
        path: a folder, glob or brace list of tars, or a folder with `test/` in CLIP_benchmark's
            layout: `{split}/{i}.tar`, `{split}/nshards.txt`, `classnames.txt`,
            `zeroshot_classification_templates.txt`, `dataset_type.txt`. The last three may also lie
            beside a folder of tars.
        classes, templates, label: as `zero_shot` takes them.
        train: shards of training images; default: the folder `train` beside the data.

    Raises:
        ValueError: no shards (for plain images the message has the command that makes shards), or
            another number of shards than nshards.txt says.
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
    # open it now: missing shards should fail before a model is loaded
    assert len(data.catalog)
    assert not train or len(data.training)
    return data


def set_name(path: str) -> str:
    """The name of a data set in results: PARENT and FOLDER of its path.

    For a folder that contains `test/`, only the folder's own name.
    """
    root = Path(path).resolve()
    return root.name if _has_test(root) else f"{root.parent.name}/{root.name}"


def _has_test(root: Path) -> bool:
    """Whether the folder has CLIP_benchmark's layout instead of holding shards itself."""
    if not root.is_dir() or any(root.glob("*.tar")):
        return False
    return (root / "test").is_dir()


def _word(path: Path) -> str:
    return path.read_text(encoding="utf-8").strip() if path.exists() else ""


def _refuse_images(path: str) -> None:
    """Raises ValueError for plain images; the message has the command that makes shards."""
    place = Path(path.removeprefix("hf:")).resolve()
    # keeps the name `test`, so that `train` can be made beside it
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
    """Whether the folder holds images, at any depth, but no tars."""
    if not folder.is_dir() or any(folder.glob("*.tar")):
        return False

    for path in folder.rglob("*"):
        # without the dot
        suffix = path.suffix[1:].lower()
        if suffix in IMAGE_SUFFIXES:
            return True
    return False


def _check_count(shards: str) -> None:
    """Raises ValueError if nshards.txt gives another number of tars than there are."""
    wanted = _word(Path(shards) / "nshards.txt")
    there = len(shard_paths(shards))
    if wanted and wanted != str(there):
        raise ValueError(
            f"{shards}: nshards.txt says {wanted}, {there} tars are there; copy the missing ones"
        )


def _indexed(shards: Sequence[str], only_captioned: bool = False) -> Catalog:
    """Open the catalog; tars without an index are indexed first, by one rank."""
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
        # reached after an error as well, so that no rank waits for ever; all fail below
        world.barrier()
    # a single pattern appears in messages as it was given
    patterns = shards[0] if len(shards) == 1 else list(shards)
    return open_catalog(patterns, captions=only_captioned)
