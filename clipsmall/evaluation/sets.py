"""A data set to evaluate on: our shards, or CLIP_benchmark's layout as it is, with the words that
belong to it.
"""

import hashlib
import shlex
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from clipsmall.data import Catalog, build_index, index_path, open_catalog, shard_paths, write_index
from clipsmall.data.index import IMAGE_SUFFIXES
from clipsmall.data.making.tables import TABLES
from clipsmall.distributed import world

# dataset_type.txt -> the task it is made for
KINDS = {
    "retrieval": "retrieval",
    "multilabel": "zero_shot",
}
# what data_tools.make_shards opens
SOURCES = (*TABLES, ".zip")


@dataclass(frozen=True)
class DataSet:
    """Images, where their class names and templates come from (see `prompts`), and how to tell an
    image's class.
    """

    name: str
    # folder, glob or brace list
    shards: str
    # of the images that probes learn from; "" = none known
    train: str
    # one of KINDS, or "": whatever it has
    kind: str
    classes: str
    templates: str
    label: str

    @cached_property
    def catalog(self) -> Catalog:
        """Every image, with a caption or without. Raises ShardError."""
        return _indexed(self.shards)

    @cached_property
    def training(self) -> Catalog:
        """The images that probes learn from. Raises ValueError where there are none, or the very
        ones to classify.
        """
        if not self.train:
            raise ValueError(
                f"{self.name}: no images to learn from beside it (a folder `train`); name them by --train"
            )
        if both := {path.resolve() for path in shard_paths(self.train)} & {
            path.resolve() for path in shard_paths(self.shards)
        }:
            raise ValueError(
                f"{self.name}: would learn from the images it is asked about ({min(both)}); see --train"
            )
        return _indexed(self.train)

    @property
    def tasks(self) -> list[str]:
        """What it is made for: retrieval where it has captions, zero_shot where it has a class list
        or label.
        """
        if self.kind:
            return [KINDS[self.kind]]
        captions = bool(self.catalog.caption_hash.any())
        return ["zero_shot"] * (self.classes != "captions" or not captions) + [
            "retrieval"
        ] * captions

    def digest(self, training: bool) -> str:
        """Of all that results on it depend on."""
        words = [
            self.label,
            self.catalog.fingerprint,
            *["multilabel"] * (self.kind == "multilabel"),
        ]
        if training:
            try:
                words.append(self.training.fingerprint)
            except ValueError as error:
                # the task will say so
                words.append(str(error))
        for words_or_file in (self.classes, self.templates):
            path = Path(words_or_file)
            # bytes that are no text are for the task to refuse
            words.append(
                path.read_text(encoding="utf-8", errors="replace")
                if path.is_file()
                else words_or_file
            )
        return hashlib.sha256("\0".join(words).encode()).hexdigest()


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

    found = DataSet(
        name=set_name(path),
        shards=shards,
        train=train or beside("train", ""),
        kind=kind if kind in KINDS else "",
        classes=classes or beside("classnames.txt", "labels" if label else "captions"),
        templates=templates or beside("zeroshot_classification_templates.txt", "plain"),
        label=label,
    )
    # opened now: what is missing is told before a model is loaded
    assert len(found.catalog)
    assert not train or len(found.training)
    return found


def set_name(path: str) -> str:
    """The name of a data set in results: of a folder with `test/` in it its own, else with its
    parent's in front.
    """
    root = Path(path).resolve()
    return root.name if _has_test(root) else f"{root.parent.name}/{root.name}"


def _has_test(root: Path) -> bool:
    return root.is_dir() and not any(root.glob("*.tar")) and (root / "test").is_dir()


def _word(path: Path) -> str:
    return path.read_text(encoding="utf-8").strip() if path.exists() else ""


def _refuse_images(path: str) -> None:
    """Raises ValueError for images that are no shards yet, and says how they become some."""
    place = Path(path.removeprefix("hf:")).resolve()
    # train fits beside
    made = f"{place.parent.name}-shards/test" if place.name == "test" else f"{place.stem}-shards"
    if path.startswith("hf:"):
        columns = "--split test --caption COLUMN --label COLUMN"
    elif place.suffix in SOURCES and place.is_file():
        columns = "--label COLUMN"
    elif place.is_dir() and not any(place.glob("*.tar")) and any(map(_is_image, place.rglob("*"))):
        columns = "--label class"
    else:
        return
    given = shlex.quote(path)
    out = shlex.quote(f"data/{made}")
    raise ValueError(
        f"{path}: no shards (*.tar) yet; make them: python -m data_tools.make_shards {given} {out} {columns}; "
        f"then evaluate with --data {out} --label label"
    )


def _is_image(path: Path) -> bool:
    return path.suffix[1:].lower() in IMAGE_SUFFIXES


def _check_count(shards: str) -> None:
    said = _word(Path(shards) / "nshards.txt")
    there = len(shard_paths(shards))
    if said and said != str(there):
        raise ValueError(
            f"{shards}: nshards.txt says {said}, {there} tars are there; copy the missing ones"
        )


def _indexed(shards: str) -> Catalog:
    """The catalog; tars that nobody has indexed yet are indexed now, by one rank."""
    try:
        for shard in shard_paths(shards) if world.rank() == 0 else []:
            if not index_path(shard).exists():
                write_index(shard, build_index(shard))
    except OSError as error:
        raise ValueError(
            f"{shards}: has no index and none can be written beside it ({error.strerror})"
        ) from None
    finally:
        # also after an error, or the others would wait here for ever; they fail below
        world.barrier()
    return open_catalog(shards, captions=False)
