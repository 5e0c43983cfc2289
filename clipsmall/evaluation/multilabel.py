"""Multi-label sets: which of C classes each image shows, and how well a score for each class ranks
the images.
"""

import os
from io import BytesIO

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.metrics import average_precision_score
from torch import Tensor

from clipsmall.data import Catalog
from clipsmall.data.index import MAX_TEXT_BYTES, Member, group_members, tar_members
from clipsmall.evaluation.hits import chunk_rows, scores


def average_precisions(images: Tensor, classes: Tensor, targets: Tensor) -> Tensor:
    """(n, D), (C, D), (n, C) bool -> (C,) each class's average precision over images; NaN for one
    without a positive.

    Σ_t (R_t − R_{t−1}) P_t over the distinct scores t, as scikit-learn has it: images of one score
    come in together, so a collapsed model gets the share of positives, a guess's value.
    CLIP_benchmark's `average_precision_per_class` takes tied images in the order of its sort, which
    may be luck, and its mean counts a class without a positive as 0; on other data the two are the
    same.
    """
    found = torch.full((len(classes),), torch.nan, dtype=torch.float64)
    for part in torch.split(targets.any(dim=0).nonzero()[:, 0], chunk_rows(len(images))):
        values = scores(images, classes[part]).numpy()
        for column, place in enumerate(part.tolist()):
            found[place] = average_precision_score(targets[:, place].numpy(), values[:, column])
    return found


def read_targets(catalog: Catalog, classes: int) -> Tensor:
    """(N, C) bool: which of C classes each image shows, from its `.npy` of C numbers, each 0 or 1.

    Indexes do not know `.npy`, so the tars' headers are read here: once, and nothing that lies
    between them.

    Raises:
        ValueError: an image without a `.npy`, or with one that is something else; the message names
            it.
        ShardError: a cut tar.
    """
    targets = torch.empty(len(catalog), classes, dtype=torch.bool)
    for number, shard in enumerate(catalog.shards):
        members = {
            member.offset: group.get("npy")
            for _, group in group_members(tar_members(shard))
            for member in group.values()
        }
        for row in np.flatnonzero(catalog.shard == number).tolist():
            member = members[int(catalog.spans[row, 0, 0])]
            try:
                target = _target(catalog.descriptor(number), member, classes)
            except (ValueError, MemoryError) as error:
                what = f"{catalog.name(row)}.npy" if member else catalog.name(row)
                raise ValueError(
                    f"{what}: {error}; a multi-label image needs a .npy of {classes} numbers"
                ) from None
            targets[row] = torch.from_numpy(target)
    return targets


def _target(file: int, member: Member | None, classes: int) -> NDArray[np.bool_]:
    if member is None:
        raise ValueError("is not there")
    if member.size > MAX_TEXT_BYTES:
        raise ValueError(f"has {member.size:,} bytes")
    data = os.pread(file, member.size, member.offset)
    # numpy.load would open archives, too
    told = np.lib.format.read_array(BytesIO(data), allow_pickle=False)
    if told.shape != (classes,):
        raise ValueError(f"has shape {told.shape} for {classes} classes")
    # NaN is neither
    if odd := told[(told != 0) & (told != 1)].tolist():
        raise ValueError(f"holds {odd[0]!r}, neither 0 nor 1")
    return told.astype(np.bool_)
