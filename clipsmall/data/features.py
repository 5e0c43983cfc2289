"""Features that a frozen tower made once: sidecars `NNNNN.image-1a2b3c4d.safetensors` of shards."""

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
    """Where the features of a shard are: beside it, or in a folder.

    Args:
        tower: image or text.
        digest: of that tower.
        folder: for several data sets, whose shards may have the same name: a hash of the path tells
            them apart.
    """
    ending = f"{tower}-{digest[:8]}.safetensors"
    if folder is None:
        return shard.parent / f"{shard.stem}.{ending}"
    path_hash = hashlib.sha256(str(shard.resolve()).encode()).hexdigest()[:8]
    return folder / f"{shard.stem}-{path_hash}.{ending}"


def _belongs(shard: Path, digest: str) -> dict[str, str]:
    """What features are made from: the file that lies there now, the pairs in it that are good, and
    the tower.
    """
    good = good_rows(read_index(shard, ["status"]))
    return {
        "version": VERSION,
        "tar_proof": proof(shard),
        "rows": hashlib.sha256(good.tobytes()).hexdigest()[:16],
        "digest": digest,
    }


def usable(path: Path, shard: Path, digest: str) -> bool:
    """Whether a shard's features are there, whole, of this tower and of the file that lies there
    now.
    """
    try:
        with safe_open(path, framework="pt") as file:
            found = file.metadata() or {}
    except (OSError, SafetensorError):
        return False
    return found == _belongs(shard, digest)


def write_features(path: Path, shard: Path, digest: str, features: Tensor, first: Tensor) -> None:
    """Write the features of a shard, whole or not at all.

    Args:
        features: (m, D); NaN where there are none.
        first: (n + 1,) row i of the shard's index has `features[first[i] : first[i + 1]]`: one per
            image, or one per caption.

    Raises:
        ValueError: no room, or no right to write.
    """
    metadata = _belongs(shard, digest)
    try:
        with atomic.new_file(path) as temporary:
            save_file({"features": features.contiguous(), "first": first}, temporary, metadata)
            # safetensors leaves 0600; shards are shared
            temporary.chmod(0o644)
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{path}: features of the frozen tower cannot be written ({error}); "
            "give another tune.cache_folder, or --tune.cache=false"
        ) from None


class Features:
    """Features of all pairs of a catalog, mapped from their files: `features(row, 2)` is the third
    caption's, (D,).

    Args:
        files: of each shard of the catalog, checked by `usable`.

    Raises:
        ShardError: a file is not there.
    """

    def __init__(self, catalog: Catalog, files: list[Path]) -> None:
        if missing := [file for file in files if not file.exists()]:
            raise ShardError(
                f"{missing[0]}: not there, though another rank made it: ranks on several machines "
                "need a tune.cache_folder that all of them see"
            )
        self.shard = catalog.shard
        self.files = files
        # (N,) for each row of the catalog, its row in the index of its shard
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
        # each process maps the files itself
        return {**self.__dict__, "_open": {}}
