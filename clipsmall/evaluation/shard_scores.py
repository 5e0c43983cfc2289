"""Embeddings and similarities of one shard's pairs, from which hard batches are mined."""

from pathlib import Path

import numpy as np
import pyarrow as pa
from torch import Tensor

from clipsmall.data import Catalog, ShardError, read_index
from clipsmall.data.scores import Scorer, good_rows, read_scores, sidecar
from clipsmall.evaluation import Encoder
from clipsmall.evaluation.shard_features import (
    encode_shard_images,
    encode_shard_texts,
    read_shard_captions,
)
from clipsmall.model.digest import model_digest
from clipsmall.model.dual_encoder import DualEncoder


def scorer_of(model: DualEncoder, name: str, pretrained: str) -> Scorer:
    """How the score files (sidecars) describe the model that made them."""
    spec = model.spec
    digest = model_digest(model.named_modules(), model.state_dict(), spec)
    # plain numbers: they are written as JSON
    scale = model.logit_scale.exp().item()
    bias = model.logit_bias.item()
    return Scorer(name, pretrained, digest, spec.size, scale, bias)


def score_shard(encoder: Encoder, catalog: Catalog, place: int) -> tuple[pa.Table, int]:
    """Score one shard of a catalog; the other ranks need not call.

    Returns a table of the n pairs whose images can be read, and the number of the others. Columns:
    `row` (ordinal within the shard's index), `key` and `index` (as in that index), `caption_hash`,
    `image_hash`, `image` and `text` (unit embeddings, float16), `similarity` (their cosine). Only
    the first caption of a pair is used, and images are not augmented.
    """
    shard = catalog.shards[place]
    image, found = encode_shard_images(encoder, catalog, place)
    captions = read_shard_captions(catalog, place, found.tolist())
    first_captions = [its_captions[0] for its_captions in captions]
    text = encode_shard_texts(encoder, first_captions)

    # the rows of the index whose images can be read
    table = read_index(shard, ["key", "index", "caption_hash", "sha256", "status"])
    rows = good_rows(table)[found.numpy()]
    named = table.take(rows)
    scores = {
        "row": rows,
        "key": named["key"],
        "index": named["index"],
        "caption_hash": named["caption_hash"],
        "image_hash": image_hashes(named["sha256"].to_pylist()),
        "image": _halves(image),
        "text": _halves(text),
        "similarity": (image * text).sum(dim=1).numpy(),
    }
    unreadable = catalog.sizes[place] - len(found)
    return pa.table(scores), unreadable


def image_hashes(sha256: list[str]) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """(n,) the first 8 bytes of each checksum, which are `data.index.image_hash` of the image."""
    # two hexadecimal digits per byte
    digits = "".join(each[:16] for each in sha256)
    raw = bytes.fromhex(digits)
    return np.frombuffer(raw, "<i8").astype(np.int64)


def _halves(rows: Tensor) -> pa.Array:
    """(n, D) rows as a column of n lists of D float16."""
    flat = rows.half().numpy().reshape(-1)
    numbers = pa.array(flat)
    return pa.FixedSizeListArray.from_arrays(numbers, rows.shape[1])


def needs_scores(shard: Path, folder: Path | None, scorer: Scorer, rescore: bool = False) -> bool:
    """Whether a shard still lacks usable scores by this model.

    Raises:
        ShardError: it has scores of another model, and `rescore` is False.
    """
    try:
        found = read_scores(shard, folder, ["row"])[1]
    except ShardError:
        return True
    if found.digest != scorer.digest and not rescore:
        raise ShardError(
            f"{sidecar(shard, folder)}: scores of another model ({found.model} "
            f"{found.pretrained}, weights {found.digest[:8]}; this one's are {scorer.digest[:8]}); "
            "replace them with --rescore, or keep both with --scores FOLDER"
        )
    return found.digest != scorer.digest
