"""Tests of cached features: computed once, they change no number and lose no pair.

Seen to fail when: see the notes of the tests.
"""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from clipsmall.data import ShardError, open_catalog
from clipsmall.data.features import Features, feature_file, usable, write_features
from clipsmall.data.making.shard_writer import ShardSample, write_shard
from clipsmall.data.preprocess import BadImage
from data_tools import check_shards
from tests.data.test_reader import damaged
from tests.distributed.test_world import run_trainer
from tests.local_clip import local_clip
from tests.shard_samples import COLOURS, picture
from tests.shards_for_tests import config


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(local_clip(tmp_path_factory.mktemp("models") / "clip"))


@pytest.fixture
def data(glyphs: Path, tmp_path: Path) -> Path:
    shutil.copytree(glyphs, tmp_path / "glyphs", ignore=shutil.ignore_patterns("*.safetensors"))
    return tmp_path / "glyphs"


def losses(out: Path) -> list[float]:
    return [
        json.loads(line)["loss"]
        for line in (out / "metrics.jsonl").read_text().splitlines()
        if "loss" in line
    ]


def cached(data: Path) -> list[str]:
    return sorted(path.name for path in (data / "train").glob("*.safetensors"))


@pytest.mark.parametrize("frozen", ["image", "text"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_cached_run_is_an_uncached_one(
    ranks: Any, clip: str, data: Path, tmp_path: Path, frozen: str, world_size: int
) -> None:
    """24 steps, two and a half epochs. Fails when the rows of a shard are shifted by one."""
    for name, more in (("plain", {"tune.cache": False}), ("made", {}), ("again", {})):
        words = config(
            data, tmp_path / name, **{"model.name": clip, f"tune.{frozen}": "frozen", **more}
        )
        assert ranks(world_size, run_trainer, words) == [0] * world_size
        assert len(cached(data)) == (0 if name == "plain" else 3)
    plain, made, again = (losses(tmp_path / name) for name in ("plain", "made", "again"))
    assert len(plain) == 24
    assert made == pytest.approx(plain, rel=1e-5)
    assert again == made


CAPTIONS = [
    ["a cat"],
    ["a dog", "the black dog", "small dog"],
    ["red heart", "a heart"],
    ["a face"],
    ["the letter"],
]


def test_each_caption_has_features_of_its_own(clip: str, tmp_path: Path) -> None:
    """Fails when `first` counts pairs instead of captions, or the first caption's features serve
    for all.
    """
    colours = zip(CAPTIONS, COLOURS, strict=False)
    samples = [
        ShardSample(k, picture(colour), "png", texts, 12, 8)
        for k, (texts, colour) in enumerate(colours)
    ]
    write_shard(tmp_path / "train", 0, samples)
    changes = {
        "model.name": clip,
        "tune.text": "frozen",
        "data.batch_size": 4,
        "optim.pairs": 4 * 12,
    }
    for name, more in (("plain", {"tune.cache": False}), ("made", {})):
        assert run_trainer(config(tmp_path, tmp_path / name, **changes, **more)) == 0
    (file,) = (tmp_path / "train").glob("*.safetensors")
    with safe_open(file, framework="pt") as features:
        assert features.get_tensor("first").tolist() == [0, 1, 4, 6, 7, 8]
        assert len(features.get_tensor("features")) == 8
    assert losses(tmp_path / "made") == pytest.approx(losses(tmp_path / "plain"), rel=1e-5)


def test_broken_images_are_replaced_and_counted_as_ever(
    clip: str, glyphs: Path, data: Path, tmp_path: Path
) -> None:
    shutil.rmtree(data / "train")
    damaged(glyphs, data / "train", [3, 150, 299])
    changes = {"model.name": clip, "tune.image": "frozen", "data.max_error_rate": 0.5}
    counts = []
    for name, more in (("plain", {"tune.cache": False}), ("made", {})):
        assert run_trainer(config(data, tmp_path / name, **changes, **more)) == 0
        last = json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[-1])
        counts.append((last["skipped"], losses(tmp_path / name)))
    assert counts[0][0] == counts[1][0] > 0
    assert counts[1][1] == pytest.approx(counts[0][1], rel=1e-5)


def test_only_what_stays_the_same_is_cached(clip: str, data: Path, tmp_path: Path) -> None:
    for number, change in enumerate(
        (
            # augmented
            {"data.crop_scale": 0.5},
            # the projection trains
            {"tune.projections": True},
            # each pair comes once
            {"optim.pairs": 32 * 9},
            {"tune.image": 1},
            {"tune.cache": False},
        )
    ):
        words = config(
            data, tmp_path / str(number), **{"model.name": clip, "tune.image": "frozen", **change}
        )
        assert run_trainer(words) == 0
        assert not cached(data), change


def test_features_belong_to_a_tower_and_a_shard(clip: str, data: Path, tmp_path: Path) -> None:
    """Another model, another file; a cut file or a replaced shard is made anew, whole ones are left
    alone.
    """
    changes = {"model.name": clip, "tune.image": "frozen"}
    assert run_trainer(config(data, tmp_path / "first", **changes)) == 0
    names = cached(data)
    files = [data / "train" / name for name in names]
    files[1].write_bytes(files[1].read_bytes()[:-100])
    before = [file.stat().st_mtime_ns for file in files]
    assert run_trainer(config(data, tmp_path / "second", **changes)) == 0
    after = [file.stat().st_mtime_ns for file in files]
    assert [a == b for a, b in zip(before, after, strict=True)] == [True, False, True]
    assert losses(tmp_path / "second") == losses(tmp_path / "first")
    other = str(local_clip(tmp_path / "other", seed=1))
    assert run_trainer(config(data, tmp_path / "third", **{**changes, "model.name": other})) == 0
    assert len(cached(data)) == 6
    shard = data / "train/00000.tar"
    digest = metadata(files[0])["digest"]
    assert usable(files[0], shard, digest)
    assert not usable(files[0], shard, digest[::-1])
    assert not usable(files[0], data / "train/00001.tar", digest)


def metadata(file: Path) -> dict[str, str]:
    with safe_open(file, framework="pt") as opened:
        return opened.metadata()


def test_a_resumed_run_goes_on_with_the_features_of_its_own_tower(
    clip: str, data: Path, tmp_path: Path
) -> None:
    """Fails when they are made before the checkpoint's weights are there: of a tower with fresh
    ones.
    """
    changes = {"model.name": clip, "tune.image": "frozen", "optim.pairs": 32 * 20}
    assert run_trainer(config(data, tmp_path / "whole", **changes)) == 0
    names = cached(data)
    assert run_trainer(config(data, tmp_path / "cut", **changes)) == 0
    for step in (15, 20):
        shutil.rmtree(tmp_path / f"cut/checkpoints/step_{step:08d}")
    assert run_trainer([*config(data, tmp_path / "cut", **changes), "--resume=auto"]) == 0
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    assert cached(data) == names


def test_sets_whose_shards_have_one_name_share_a_folder(
    clip: str, data: Path, tmp_path: Path
) -> None:
    shutil.copytree(data / "test", tmp_path / "other")
    both = f"[{data / 'train'}, {tmp_path / 'other'}]"
    changes = {
        "model.name": clip,
        "tune.image": "frozen",
        "data.train": both,
        "tune.cache_folder": tmp_path / "made",
    }
    assert run_trainer(config(data, tmp_path / "made_run", **changes)) == 0
    assert len(list((tmp_path / "made").iterdir())) == 4
    assert run_trainer(config(data, tmp_path / "plain", **changes, **{"tune.cache": False})) == 0
    assert losses(tmp_path / "made_run") == pytest.approx(losses(tmp_path / "plain"), rel=1e-5)


def test_features_follow_the_pairs_that_are_good_and_max_pixels(
    clip: str, glyphs: Path, data: Path, tmp_path: Path
) -> None:
    shutil.rmtree(data / "train")
    damaged(glyphs, data / "train", [3])
    changes = {"model.name": clip, "tune.image": "frozen", "data.max_error_rate": 1.0}
    assert run_trainer(config(data, tmp_path / "first", **changes)) == 0
    file = data / "train" / cached(data)[0]
    assert check_shards.main([str(data / "train"), "--decode"]) == 0
    assert not usable(file, data / "train/00000.tar", metadata(file)["digest"])
    # every image is too large
    with pytest.raises(SystemExit):
        run_trainer(config(data, tmp_path / "small", **changes, **{"data.max_pixels": 100}))


def test_an_activation_without_weights_makes_another_tower(
    clip: str, data: Path, tmp_path: Path
) -> None:
    changes = {"tune.image": "frozen", "optim.pairs": 32 * 10}
    assert run_trainer(config(data, tmp_path / "first", **changes, **{"model.name": clip})) == 0
    other = Path(shutil.copytree(clip, tmp_path / "other"))
    text = (other / "config.json").read_text()
    (other / "config.json").write_text(text.replace("quick_gelu", "gelu"))
    assert run_trainer(config(data, tmp_path / "second", **changes, **{"model.name": other})) == 0
    assert len(cached(data)) == 6


def test_a_folder_of_its_own_and_one_that_cannot_be_written(
    clip: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {"model.name": clip, "tune.image": "frozen", "tune.cache_folder": tmp_path / "made"}
    assert run_trainer(config(data, tmp_path / "run", **changes)) == 0
    assert len(list((tmp_path / "made").iterdir())) == 3
    assert not cached(data)
    (tmp_path / "file").write_text("")
    changes["tune.cache_folder"] = tmp_path / "file" / "below"
    with pytest.raises(SystemExit):
        run_trainer(config(data, tmp_path / "none", **changes))
    assert "cannot be written" in (said := capsys.readouterr().err)
    assert "give another tune.cache_folder" in said
    assert not (tmp_path / "none").exists()


def test_features_by_row(data: Path) -> None:
    catalog = open_catalog(str(data / "train"))
    files = []
    for place, shard in enumerate(catalog.shards):
        rows = catalog.sizes[place]
        values = torch.arange(rows).float()[:, None] + 1000 * place + torch.zeros(3)
        values[5] = torch.nan
        files.append(feature_file(shard, "image", "abcdefgh"))
        write_features(files[-1], shard, "abcdefgh", values, torch.arange(rows + 1))
    features = Features(catalog, files)
    assert features(207).tolist() == [2007.0] * 3
    # as a spawned worker gets it
    assert copy.deepcopy(features)(207).tolist() == [2007.0] * 3
    with pytest.raises(BadImage):
        features(105)
    files[1].unlink()
    with pytest.raises(ShardError, match="all of them can read"):
        Features(catalog, files)


def test_pairs_left_out_by_the_index_shift_nothing(
    clip: str, glyphs: Path, data: Path, tmp_path: Path
) -> None:
    """Rows of a catalog are not rows of a shard where some are known to be bad. Fails when they are
    taken for it.
    """
    shutil.rmtree(data / "train")
    damaged(glyphs, data / "train", [3, 150, 299])
    assert check_shards.main([str(data / "train"), "--decode"]) == 0
    curves = []
    for name, more in (("plain", {"tune.cache": False}), ("made", {})):
        words = config(
            data, tmp_path / name, **{"model.name": clip, "tune.image": "frozen", **more}
        )
        assert run_trainer(words) == 0
        curves.append(losses(tmp_path / name))
    assert curves[1] == pytest.approx(curves[0], rel=1e-5)


def test_a_head_that_reads_tokens_keeps_them(clip: str, data: Path, tmp_path: Path) -> None:
    mix = "{softmax: 1, superclass: 0.1}"
    changes = {"model.name": clip, "tune.text": "frozen", "objective": mix, "optim.pairs": 32 * 12}
    assert run_trainer(config(data, tmp_path / "run", **changes)) == 0
    assert not cached(data)


def test_mining_scores_what_is_cached(clip: str, data: Path, tmp_path: Path) -> None:
    changes = {
        "model.name": clip,
        "tune.image": "frozen",
        "mining.method": "groups",
        "mining.pool": 128,
    }
    curves = []
    for name, more in (("plain", {"tune.cache": False}), ("made", {})):
        assert run_trainer(config(data, tmp_path / name, **changes, **more)) == 0
        curves.append(losses(tmp_path / name))
    assert curves[1] == pytest.approx(curves[0], rel=1e-4)
