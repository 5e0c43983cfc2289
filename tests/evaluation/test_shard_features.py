"""Features of one shard: what cannot be read is left out, other errors are not taken for it."""

import gc
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from clipsmall.data import Catalog, ShardError, build_index, open_catalog, write_index
from clipsmall.distributed import world
from clipsmall.evaluation.features import NoReadableImage
from clipsmall.evaluation.shard_features import (
    encode_shard_images,
    encode_shard_texts,
    read_shard_captions,
)
from tests.shard_samples import pair_members, picture, write_tar


class FakeEncoder:
    """Sees an image as its row, a caption as its length; raises what it is given instead."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error

    def images(self, catalog: Catalog) -> tuple[Tensor, Tensor]:
        assert world.size() == 1
        if self.error is not None:
            raise self.error
        rows = torch.arange(len(catalog))
        return rows[:, None].float(), rows

    def texts(self, captions: list[str]) -> Tensor:
        assert world.size() == 1
        return torch.tensor([len(caption) for caption in captions]).reshape(-1, 1).float()


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    for number, colours in enumerate([["red"], ["blue", "green", "gold"]]):
        members = [
            member
            for colour in colours
            for member in pair_members(colour, picture(colour), f"a {colour} box\nit")
        ]
        shard = write_tar(tmp_path / f"{number:05d}.tar", members)
        write_index(shard, build_index(shard))
    return open_catalog(str(tmp_path))


def open_files() -> int:
    # files of other tests that wait for the collector may be closed at any time
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


def test_one_shard_is_encoded_and_its_file_closed(catalog: Catalog) -> None:
    before = open_files()
    encoder: Any = FakeEncoder()
    features, rows = encode_shard_images(encoder, catalog, 1)
    assert features.tolist() == [[0.0], [1.0], [2.0]]
    assert rows.tolist() == [0, 1, 2]
    captions = read_shard_captions(catalog, 1)
    assert captions == [[f"a {colour} box it"] for colour in ("blue", "green", "gold")]
    assert read_shard_captions(catalog, 1, [2, 0]) == [captions[2], captions[0]]
    assert encode_shard_texts(encoder, ["a", "abc"]).tolist() == [[1.0], [3.0]]
    assert open_files() <= before


def test_a_shard_without_a_readable_image_has_no_features(catalog: Catalog) -> None:
    encoder: Any = FakeEncoder(NoReadableImage("in other words"))
    features, rows = encode_shard_images(encoder, catalog, 0)
    assert features.shape == (0, 1)
    assert rows.shape == (0,)
    assert rows.dtype == torch.int64


@pytest.mark.parametrize("kind", [ValueError, ShardError])
def test_another_error_is_not_taken_for_unreadable_images(
    catalog: Catalog, kind: type[Exception]
) -> None:
    before = open_files()
    encoder: Any = FakeEncoder(kind("none of 3 images can be read"))
    with pytest.raises(kind):
        encode_shard_images(encoder, catalog, 0)
    assert open_files() <= before
