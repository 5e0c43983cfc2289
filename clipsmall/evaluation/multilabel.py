"""Multi-label sets: reading the targets, and average precision per class."""

import os
from io import BytesIO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clipsmall.data import Catalog
from clipsmall.data.index import MAX_TEXT_BYTES, Member, group_members, tar_members
from clipsmall.evaluation.top_k import chunk_rows, scores


def average_precisions(images: Tensor, classes: Tensor, targets: Tensor) -> Tensor:
    """(n, D), (C, D), (n, C) bool -> (C,) average precision of each class over the images.

    Σ_t (R_t − R_{t−1}) P_t over the distinct scores t, as in scikit-learn; NaN for a class without
    a positive. Tied images enter together, so a collapsed model gets the fraction of positives,
    which is chance. CLIP_benchmark's `average_precision_per_class` ranks tied images in sort order,
    which may be lucky, and its mean counts a class without a positive as 0; otherwise the two
    agree.
    """
    # imported here: takes a second, and only multi-label sets need it
    from sklearn.metrics import average_precision_score

    found = torch.full((len(classes),), torch.nan, dtype=torch.float64)
    has_positive = targets.any(dim=0)
    with_positive = has_positive.nonzero()[:, 0]
    size = chunk_rows(len(images))
    for part in torch.split(with_positive, size):
        # (n, size)
        values = scores(images, classes[part]).numpy()
        for column, number in enumerate(part.tolist()):
            truth = targets[:, number].numpy()
            class_scores = values[:, column]
            found[number] = average_precision_score(truth, class_scores)
    return found


def read_targets(catalog: Catalog, classes: int) -> Tensor:
    """(N, C) bool: which of C classes each image shows, from its `.npy` of C numbers, each 0 or 1.

    Shard indexes do not list `.npy` members, so the tars' headers are read once.

    Raises:
        ValueError: an image without a `.npy`, or with an invalid one; the message names the image.
        ShardError: a truncated tar.
    """
    targets = torch.empty(len(catalog), classes, dtype=torch.bool)
    for number, shard in enumerate(catalog.shards):
        # offset of an image's member -> its .npy member
        npy_beside: dict[int, Member | None] = {}
        for _, group in group_members(tar_members(shard)):
            for member in group.values():
                npy_beside[member.offset] = group.get("npy")
        rows = np.flatnonzero(catalog.shard == number)
        for row in rows.tolist():
            image_offset = int(catalog.spans[row, 0, 0])
            npy = npy_beside[image_offset]
            try:
                target = _target(catalog.descriptor(number), npy, classes)
            except (ValueError, MemoryError) as error:
                what = f"{catalog.name(row)}.npy" if npy else catalog.name(row)
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
    # unlike numpy.load, this does not open archives
    values = np.lib.format.read_array(BytesIO(data), allow_pickle=False)
    if values.shape != (classes,):
        raise ValueError(f"has shape {values.shape} for {classes} classes")
    # NaN is neither 0 nor 1
    is_odd = (values != 0) & (values != 1)
    odd = values[is_odd].tolist()
    if odd:
        raise ValueError(f"holds {odd[0]!r}, neither 0 nor 1")
    return values.astype(np.bool_)
