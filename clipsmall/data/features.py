"""Cached features of frozen towers, in sidecars `NNNNN.image-1a2b3c4d.safetensors` of shards."""

import hashlib
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from clipsmall.data.catalog import Catalog
from clipsmall.data.index import ShardError, proof, read_index
from clipsmall.data.order import Rows
from clipsmall.data.preprocess import BadImage
from clipsmall.data.scores import good_rows
from clipsmall.storage import atomic

VERSION = "1"


def feature_file(shard: Path, tower: str, digest: str, folder: Path | None = None) -> Path:
    """The path of a shard's features: next to the shard, or in `folder`.

    Args:
        tower: image or text.
        digest: digest of that tower.
        folder: may serve several data sets whose shards have equal names; a hash of the shard's
            path in the file name distinguishes them.
    """
    ending = f"{tower}-{digest[:8]}.safetensors"
    if folder is None:
        return shard.parent / f"{shard.stem}.{ending}"
    path_hash = hashlib.sha256(str(shard.resolve()).encode()).hexdigest()[:8]
    return folder / f"{shard.stem}-{path_hash}.{ending}"


def _belongs(shard: Path, digest: str) -> dict[str, str]:
    """What features are made from: the shard's content, its usable pairs, and the tower."""
    good = good_rows(read_index(shard, ["status"]))
    return {
        "version": VERSION,
        "tar_proof": proof(shard),
        "rows": hashlib.sha256(good.tobytes()).hexdigest()[:16],
        "digest": digest,
    }


def usable(path: Path, shard: Path, digest: str) -> bool:
    """Whether the file at `path` is complete and was made by this tower from this shard."""
    try:
        with safe_open(path, framework="pt") as file:
            found = file.metadata() or {}
    except (OSError, SafetensorError):
        return False
    return found == _belongs(shard, digest)


def write_features(path: Path, shard: Path, digest: str, features: Tensor, first: Tensor) -> None:
    """Write the features of a shard atomically.

    Args:
        features: (m, D) features; NaN for an image that cannot be read.
        first: (n + 1,) offsets: the features of row i of the shard's index, one per image or one
            per caption, are `features[first[i] : first[i + 1]]`.

    Raises:
        ValueError: the disk is full, or the path is not writable.
    """
    metadata = _belongs(shard, digest)
    try:
        with atomic.new_file(path) as temporary:
            save_file({"features": features.contiguous(), "first": first}, temporary, metadata)
            # safetensors writes files with mode 0600, but others may read the shards
            temporary.chmod(0o644)
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{path}: features of the frozen tower cannot be written ({error}); "
            "give another tune.cache_folder, or --tune.cache=false"
        ) from None


class Features:
    """The cached features of all pairs of a catalog, read from memory-mapped files.

    `features(row, 2)` is the (D,) feature of the third caption of the pair in that row.

    Args:
        files: the feature file of each shard of the catalog, checked by `usable`.

    Raises:
        ShardError: a file is missing.
    """

    def __init__(self, catalog: Catalog, files: list[Path]) -> None:
        if missing := [file for file in files if not file.exists()]:
            raise ShardError(
                f"{missing[0]}: missing, though another rank has written it: ranks on several "
                "machines need a tune.cache_folder that all of them can read"
            )
        self.shard = catalog.shard
        self.files = files
        # (N,) for each row of the catalog, the row in the index of its shard
        rows = [good_rows(read_index(shard, ["status"])) for shard in catalog.shards]
        self.index_row: Rows = np.concatenate(rows)
        self._open: dict[int, tuple[Tensor, Tensor]] = {}

    def __call__(self, row: int, caption: int = 0) -> Tensor:
        """Raises BadImage for an image that could not be read when features were made."""
        shard = int(self.shard[row])
        if shard not in self._open:
            with safe_open(self.files[shard], framework="pt") as file:
                self._open[shard] = (file.get_tensor("features"), file.get_tensor("first"))
        features, first = self._open[shard]
        of_first_caption = int(first[self.index_row[row]])
        found = features[of_first_caption + caption]
        if not found.isfinite().all():
            raise BadImage("could not be read when its features were made")
        return found.clone()

    def __getstate__(self) -> dict[str, object]:
        # every process maps the files itself
        return {**self.__dict__, "_open": {}}
