"""Scores, plans and repacked shards: each pair scored once by whichever rank, hard batches of all
of them, in order.

Seen to fail when: a sidecar is written in place; a cut, replaced or other model's one is kept; the
last caption is scored; broken images shift the rows; a rank scores all shards, or encodes a share
of each; a pair's place in its shard is taken for its number; windows overflow, or batches come out
of one window; the other half of a plan stays mined; copies meet in a group; repack goes on into
another plan's folder, or takes a half-written shard for done.
"""

import json
import os
import shutil
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import webdataset
from PIL import Image

from clipsmall import __version__, train
from clipsmall.data import (
    GlobalBatches,
    Order,
    ShardError,
    build_index,
    captions_of,
    fields_of,
    index_path,
    open_catalog,
    read_index,
    write_index,
)
from clipsmall.data.batch_plan import read_plan, write_plan
from clipsmall.data.index import image_hash, proof
from clipsmall.data.making import repack
from clipsmall.data.making.shard_writer import ShardSample, write_shard
from clipsmall.data.preprocess import ImageSpec, ImageTransform
from clipsmall.data.scores import Scorer, Scores, all_scores, sidecar
from clipsmall.evaluation import shard_scores
from clipsmall.mining import MiningRecipe, hard_pairs, plans
from clipsmall.mining.plans import routed, seated
from clipsmall.model.saved import load_model
from data_tools import mine_shards
from tests.data.test_reader import TOKENIZE
from tests.shard_samples import exit_code
from tests.shards_for_tests import config

SMALL = ["--batch_size", "16", "--window", "64", "--guard", "0", "--near", "1"]
SCORER = Scorer("a", "", "0", 16, 20.0, 0.0)


@pytest.fixture(scope="module")
def model(glyphs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 24 steps; its checkpoints are other models."""
    out = tmp_path_factory.mktemp("scorer") / "run"
    assert train.main(config(glyphs, out)) == 0
    return out


@pytest.fixture(scope="module")
def scored(glyphs: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The training shards with their scores; not to be changed."""
    folder = tmp_path_factory.mktemp("scored") / "train"
    shutil.copytree(glyphs / "train", folder)
    assert run("score", model, "--data", folder) == 0
    return folder


@pytest.fixture
def shards(scored: Path, tmp_path: Path) -> Path:
    """A copy of them, to be changed."""
    shutil.copytree(scored, tmp_path / "train")
    return tmp_path / "train"


def run(*words: object) -> int:
    return exit_code(mine_shards.main, [str(word) for word in words])


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """The message of a command that must fail."""
    capsys.readouterr()
    assert run(*words) == 2
    return capsys.readouterr().err


def tables(folder: Path) -> list[pa.Table]:
    return [pq.read_table(path) for path in sorted(folder.glob("*.scores.parquet"))]


def shard_of(*names: str, folder: Path, colour: str = "red") -> Path:
    """A shard without json: captions and one-coloured pictures; as of img2dataset, but for the
    numbers.
    """
    folder.mkdir(exist_ok=True)
    out = BytesIO()
    Image.new("RGB", (20, 16), colour).save(out, "PNG")
    shard = folder / f"{len(list(folder.glob('*.tar'))):05d}.tar"
    with webdataset.TarWriter(str(shard), encoder=False) as tar:
        for place, name in enumerate(names):
            image = out.getvalue() if name != "broken" else b"\x89PNG\r\n\x1a\n" + bytes(40)
            tar.write({"__key__": f"{shard.stem}_{place}", "png": image, "txt": name.encode()})
    write_index(shard, build_index(shard))
    return shard


# ---- scores


def test_a_sidecar_holds_what_the_model_makes_of_each_pair(scored: Path, model: Path) -> None:
    encoder, loaded = load_model(str(model))
    encoder.eval()
    shard = scored / "00001.tar"
    catalog = open_catalog(str(shard))
    index = read_index(shard)
    table = tables(scored)[1]
    assert table["row"].to_pylist() == list(range(100))
    for name in ("key", "index", "caption_hash"):
        assert table[name].to_pylist() == index[name].to_pylist()
    assert table["image_hash"].to_pylist() == [
        image_hash(catalog.read(row).image) for row in range(100)
    ]
    assert table.schema.field("image").type == pa.list_(pa.float16(), 16)
    with torch.no_grad():
        members = [catalog.read(row) for row in range(100)]
        transform = ImageTransform(encoder.spec)
        image = encoder.encode_image(torch.stack([transform(each.image) for each in members]))
        text = encoder.encode_text(
            loaded.tokenize([captions_of(m.text, fields_of(m.json))[0] for m in members])
        )
    for name, wanted in (("image", image), ("text", text)):
        found = np.stack(table[name].to_numpy())
        np.testing.assert_allclose(found, wanted.numpy(), atol=1e-3)
    np.testing.assert_allclose(
        table["similarity"].to_numpy(), (image * text).sum(1).numpy(), atol=1e-5
    )
    said = {key.decode(): value.decode() for key, value in table.schema.metadata.items()}
    assert said["tar_proof"] == proof(shard)
    assert said["clipsmall"] == __version__
    scorer = json.loads(said["scorer"])
    assert scorer["model"] == str(model)
    assert scorer["image_size"] == 16
    assert scorer["logit_scale"] == pytest.approx(encoder.logit_scale.exp().item())


def test_a_second_run_scores_only_what_is_missing_cut_or_replaced(
    shards: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    done = list[int]()
    real = shard_scores.score_shard

    def counted(encoder: Any, catalog: Any, place: int) -> Any:
        done.append(place)
        return real(encoder, catalog, place)

    monkeypatch.setattr(mine_shards, "score_shard", counted)
    before = tables(shards)
    again = ("score", model, "--data", shards)
    assert run(*again) == 0
    assert done == []
    assert "3 shards had their scores" in capsys.readouterr().out
    sidecar(shards / "00000.tar").unlink()
    cut = sidecar(shards / "00001.tar")
    cut.write_bytes(cut.read_bytes()[:-20])
    assert run(*again) == 0
    assert done == [0, 1]
    assert tables(shards) == before
    shutil.copy(shards / "00000.tar", shards / "00002.tar")
    write_index(shards / "00002.tar", build_index(shards / "00002.tar"))
    assert run(*again) == 0
    assert done == [0, 1, 2]
    assert tables(shards)[2]["image_hash"] == before[0]["image_hash"]


def test_another_scorers_sidecar_stays_unless_told(
    shards: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = model / "checkpoints" / "step_00000005"
    before = tables(shards)
    said = refused(capsys, "score", other, "--data", shards)
    assert "00000.scores.parquet: scores of another model" in said
    assert "--rescore" in said
    assert tables(shards) == before
    # one is missing, others are another's: nothing is begun
    sidecar(shards / "00000.tar").unlink()
    refused(capsys, "score", other, "--data", shards)
    assert not sidecar(shards / "00000.tar").exists()
    assert run("score", other, "--data", shards, "--rescore") == 0
    written = [path.stat().st_mtime_ns for path in sorted(shards.glob("*.scores.parquet"))]
    # goes on: nothing is left to do
    assert run("score", other, "--data", shards, "--rescore") == 0
    assert [path.stat().st_mtime_ns for path in sorted(shards.glob("*.scores.parquet"))] == written
    assert tables(shards)[1]["image"] != before[1]["image"]
    assert tables(shards)[1]["image_hash"] == before[1]["image_hash"]
    assert run("score", other, "--data", shards, "--scores", shards / "mine") == 0
    assert [table["text"] for table in tables(shards / "mine")] == [
        table["text"] for table in tables(shards)
    ]


def test_the_same_weights_by_another_name_are_the_same_scorer(
    shards: Path, model: Path, tmp_path: Path
) -> None:
    shutil.copytree(model, tmp_path / "moved")
    assert run("score", tmp_path / "moved", "--data", shards) == 0
    assert all(str(model).encode() in table.schema.metadata[b"scorer"] for table in tables(shards))


def test_a_sidecar_is_written_whole_or_not_at_all(
    shards: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in shards.glob("*.scores.parquet"):
        path.unlink()
    real = pq.write_table
    written = list[Path]()

    def failing(table: pa.Table, path: Path, **options: Any) -> None:
        real(table, path, **options)
        written.append(path)
        if len(written) == 2:
            path.write_bytes(path.read_bytes()[:500])
            raise OSError("disk full")

    monkeypatch.setattr(pq, "write_table", failing)
    assert "disk full" in refused(capsys, "score", model, "--data", shards)
    assert [path.name for path in shards.iterdir() if "scores" in path.name] == [
        "00000.scores.parquet"
    ]


def test_broken_images_are_left_out_and_counted(
    glyphs: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shard_of("one", "broken", "latin small letter a", folder=tmp_path / "some")
    shard_of("two", "three", folder=tmp_path / "some")
    assert run("score", model, "--data", tmp_path / "some") == 0
    said = capsys.readouterr()
    assert "scored 4 pairs of 2 shards" in said.out
    assert "1 images cannot be read" in said.out
    assert "00000.tar: 1 images" in said.err
    table = tables(tmp_path / "some")[0]
    assert table["row"].to_pylist() == [0, 2]
    assert table["key"].to_pylist() == ["00000_0", "00000_2"]
    assert (
        run(
            "plan",
            "--data",
            tmp_path / "some",
            "--out",
            tmp_path / "p",
            "--batch_size",
            2,
            "--group",
            2,
        )
        == 0
    )
    assert "1 have no scores" in capsys.readouterr().out
    # a shard without one good image does not keep the others from being scored
    shard_of("broken", folder=tmp_path / "some")
    shard_of("four", folder=tmp_path / "some")
    assert run("score", model, "--data", tmp_path / "some") == 0
    assert "scored 1 pairs of 2 shards" in capsys.readouterr().out
    assert [len(table) for table in tables(tmp_path / "some")] == [2, 2, 0, 1]
    assert (
        run(
            "plan",
            "--data",
            tmp_path / "some",
            "--out",
            tmp_path / "p",
            "--batch_size",
            2,
            "--group",
            2,
        )
        == 0
    )
    assert "2 have no scores" in capsys.readouterr().out


def test_the_first_of_several_captions_is_scored(model: Path, glyphs: Path, tmp_path: Path) -> None:
    catalog = open_catalog(str(glyphs / "train"))
    captions = [catalog.read(row).text.decode() for row in range(4)]
    for folder, each in (("one", captions[:1]), ("four", captions)):
        write_shard(
            tmp_path / folder, 0, [ShardSample(0, catalog.read(0).image, "png", each, 32, 32)] * 2
        )
        assert run("score", model, "--data", tmp_path / folder) == 0
    assert tables(tmp_path / "one")[0]["text"] == tables(tmp_path / "four")[0]["text"]


def score_in_ranks(words: list[str]) -> list[str]:
    """Run by each rank; returns the shards that it scored."""
    from accelerate.state import PartialState

    done = list[str]()
    real = mine_shards.score_shard
    try:
        mine_shards.score_shard = lambda e, c, place: (
            done.append(c.shards[place].name),
            real(e, c, place),
        )[1]
        assert mine_shards.main(words) == 0
        return done
    finally:
        mine_shards.score_shard = real
        PartialState._reset_state()


def test_two_ranks_score_each_shard_once_and_alike(
    ranks: Any, scored: Path, shards: Path, model: Path
) -> None:
    for path in shards.glob("*.scores.parquet"):
        path.unlink()
    words = ["score", str(model), "--data", str(shards)]
    done = ranks(2, score_in_ranks, words)
    assert done == [["00000.tar", "00002.tar"], ["00001.tar"]]
    for mine, theirs in zip(tables(shards), tables(scored), strict=True):
        assert mine.drop(["image", "text", "similarity"]) == theirs.drop(
            ["image", "text", "similarity"]
        )
        for name in ("image", "text"):
            np.testing.assert_allclose(
                np.stack(mine[name].to_numpy()), np.stack(theirs[name].to_numpy()), atol=1e-3
            )
    for name in ("00001", "00002"):
        (shards / f"{name}.scores.parquet").unlink()
    assert ranks(2, score_in_ranks, words) == [["00001.tar"], ["00002.tar"]]


# ---- plans


def test_a_plan_has_every_pair_once(
    scored: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    catalog = open_catalog(str(scored))
    made = ("plan", "--data", scored, *SMALL, "--out")
    assert run(*made, tmp_path / "all", "--fraction", 1) == 0
    plan = read_plan(tmp_path / "all", catalog, 16)
    assert plan.rows.shape == (18, 16)
    assert len(np.unique(plan.rows)) == 288
    assert plan.about["numbers"]["mined_batches"] == 18
    assert plan.about["recipe"]["group"] == 4
    said = capsys.readouterr().out
    assert "18 of 16: 18 mined" in said
    assert "12 pairs fill none" in said
    assert run(*made, tmp_path / "whole", "--method", "chain") == 0
    assert read_plan(tmp_path / "whole", catalog).about["recipe"]["group"] == 0
    assert run(*made, tmp_path / "again", "--fraction", 1) == 0
    assert read_plan(tmp_path / "again", catalog).rows.tolist() == plan.rows.tolist()
    assert run(*made, tmp_path / "other", "--fraction", 1, "--seed", 1) == 0
    assert read_plan(tmp_path / "other", catalog).rows.tolist() != plan.rows.tolist()


def topics(pairs: int) -> Scores:
    """Scores of pairs of twelve topics, and a little of each pair's own."""
    random = np.random.default_rng(0)
    topic = np.tile(random.normal(size=(12, 16)), (pairs // 12, 1)) + 0.5 * random.normal(
        size=(pairs, 16)
    )
    sides = [topic + 0.2 * random.normal(size=(pairs, 16)) for _ in range(2)]
    image, text = (
        (side / np.linalg.norm(side, axis=1, keepdims=True)).astype(np.float16) for side in sides
    )
    return Scores(np.arange(pairs), np.arange(pairs), image, text, SCORER)


def hardness(table: Scores, batches: Any) -> np.ndarray[Any, Any]:
    """Of each batch: the mean cosine of images with the captions of the same four slots."""
    groups = batches.reshape(-1, 4)
    cosines = np.einsum(
        "gid,gjd->gij", table.image[groups].astype(float), table.text[groups].astype(float)
    )
    of_groups = (cosines.sum(axis=(1, 2)) - np.trace(cosines, axis1=1, axis2=2)) / 12
    return of_groups.reshape(len(batches), -1).mean(axis=1)


def test_mined_batches_are_hard_and_half_a_plan_is_random(scored: Path) -> None:
    catalog = open_catalog(str(scored))
    table = topics(300)
    mined = {}
    for fraction in (1, 0.5):
        batches, numbers = plans.plan_batches(
            catalog, table, MiningRecipe(batch_size=16, guard=0, near=1), fraction, 300, 0
        )
        assert np.unique(batches).size == batches.size == 288
        assert numbers["mined_batches"] == round(18 * fraction)
        assert numbers["mined_loss"] > 1.3 * numbers["random_loss"]
        mined[fraction] = hardness(table, batches) > 0.5
    assert hardness(table, np.random.default_rng(0).permutation(288).reshape(18, 16)).max() < 0.4
    assert mined[1].all()
    assert mined[0.5].sum() == 9
    # all in one shuffled list
    assert 0 < mined[0.5][:9].sum() < 9


def test_a_batch_is_made_of_groups_from_all_windows(scored: Path) -> None:
    """Windows of 64 alike pairs: a batch out of one of them would be hard as a whole."""
    catalog = open_catalog(str(scored))
    table = topics(300)
    recipe = MiningRecipe(batch_size=16, guard=0, near=1)
    batches, _ = plans.plan_batches(catalog, table, recipe, 1, 64, 0)
    generator = np.random.default_rng(0)
    places = np.sort(generator.permutation(300)[:288])
    windows = routed(table, places, 16, 4, generator)
    assert [len(window) for window in windows] == [60, 60, 56, 56, 56]
    window_of = np.full(300, -1)
    for number, window in enumerate(windows):
        window_of[window] = number
    of_groups = window_of[batches].reshape(18, 4, 4)
    assert (of_groups == of_groups[:, :, :1]).all()
    assert np.mean([len(np.unique(batch)) for batch in of_groups]) > 2.5


def test_copies_are_kept_apart_in_a_group(scored: Path) -> None:
    """Alike as can be: the same caption, or the same image."""
    catalog = open_catalog(str(scored))
    table = topics(240)
    catalog.caption_hash[:240] = np.arange(240) % 48
    for copies in (catalog.caption_hash, table.image_hash):
        batches, _ = plans.plan_batches(
            catalog, table, MiningRecipe(batch_size=16, guard=0, near=1), 1, 120, 0
        )
        groups = copies[batches].reshape(-1, 4)
        assert all(len(set(group)) == 4 for group in groups.tolist())
        catalog.caption_hash[:240] = np.arange(240)
        table.image_hash[:] = np.arange(240) % 48


def test_pairs_without_numbers_are_named_by_their_place(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "some"
    # an empty caption: left out of the catalog
    shard_of("one", "two", "", "three", folder=folder)
    shard_of("four", "five", "broken", "six", folder=folder)
    assert run("score", model, "--data", folder) == 0
    assert tables(folder)[1]["index"].to_pylist() == [-1, -1, -1]
    assert (
        run(
            "plan",
            "--data",
            folder,
            "--out",
            tmp_path / "p",
            "--batch_size",
            2,
            "--group",
            2,
            "--window",
            4,
        )
        == 0
    )
    catalog = open_catalog(str(folder))
    rows = np.sort(read_plan(tmp_path / "p", catalog).rows.reshape(-1))
    assert rows.tolist() == [0, 1, 2, 3, 4, 6]
    assert catalog.index[rows].tolist() == [0, 1, 3, 4, 5, 7]


def test_pairs_found_bad_after_scoring_are_in_no_plan(shards: Path, tmp_path: Path) -> None:
    index = read_index(shards / "00001.tar")
    status = ["" if row not in (3, 50) else "broken" for row in range(100)]
    place = index.column_names.index("status")
    write_index(shards / "00001.tar", index.set_column(place, "status", pa.array(status)))
    assert (
        run(
            "plan",
            "--data",
            shards,
            "--out",
            tmp_path / "p",
            *SMALL,
            "--batch_size",
            2,
            "--group",
            2,
        )
        == 0
    )
    catalog = open_catalog(str(shards))
    found = catalog.index[read_plan(tmp_path / "p", catalog).rows]
    assert found.size == 298
    assert not {103, 150} & set(found.reshape(-1).tolist())


def test_windows_are_exactly_full_and_hold_pairs_alike() -> None:
    random = np.random.default_rng(0)
    centres = np.linalg.qr(random.normal(size=(8, 8)))[0][:6]
    which = random.permutation(np.repeat(np.arange(6), 20))
    rows = centres[which] + 0.05 * random.normal(size=(120, 8))
    rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)
    table = Scores(np.arange(120), np.arange(120), rows, rows, SCORER)
    windows = routed(table, np.arange(120), 5, 4, random)
    assert [len(window) for window in windows] == [20] * 6
    assert sorted(np.concatenate(windows).tolist()) == list(range(120))
    assert all(len(set(which[window])) == 1 for window in windows)
    seats = np.array([40, 4, 0, 36, 20, 20])
    both = np.concatenate([centres, centres], axis=1)
    window = seated(table, np.arange(120), both, seats)
    assert np.bincount(window, minlength=6).tolist() == seats.tolist()
    assert (window == which).sum() == 20 + 4 + 20 + 20 + 20
    assert [len(window) for window in routed(table, np.arange(120), 7, 4, random)] == [24] * 5
    assert [len(window) for window in routed(table, np.arange(60), 100, 4, random)] == [60]


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("missing", "00001.tar has no scores; run: python -m data_tools.mine_shards score"),
        ("cut", "00001.scores.parquet: cut or broken"),
        ("replaced", "00001.tar was replaced since it was scored"),
        ("scorer", "00001.scores.parquet: scored by"),
        ("foreign", "00001.scores.parquet: not scores of version"),
    ],
)
def test_unusable_scores_make_no_plan(
    shards: Path,
    model: Path,
    tmp_path: Path,
    how: str,
    says: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = sidecar(shards / "00001.tar")
    shard = shards / "00001.tar"
    if how == "missing":
        path.unlink()
    elif how == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    elif how == "replaced":
        data = shard.read_bytes()
        shard.write_bytes(data.replace(b'"width": 32', b'"width": 31'))
        assert shard.read_bytes() != data
        write_index(shard, build_index(shard))
    elif how == "scorer":
        path.unlink()
        alone = tmp_path / "alone"
        alone.mkdir()
        for name in (shard, index_path(shard)):
            shutil.copy(name, alone)
        assert run("score", model / "checkpoints" / "step_00000005", "--data", alone) == 0
        shutil.copy(alone / path.name, path)
    else:
        pq.write_table(pq.read_table(path).replace_schema_metadata({}), path)
    assert says in refused(capsys, "plan", "--data", shards, "--out", tmp_path / "p", *SMALL)
    assert not (tmp_path / "p").exists()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            ["--batch_size", 512],
            "--batch_size=512: must be at least 2, and at most the 300 scored pairs",
        ),
        (["--group", 3], "--group=3: must be 0, or 2 to --batch_size=16 and divide it"),
        (["--group", 1], "--group=1"),
        (["--window", 3], "--window=3: must hold at least one group of 4"),
        (["--guard", 1], "--guard=1.0 must be in [0, 1)"),
        (["--fraction", 0], "--fraction=0.0"),
        (["--fraction", 1.5], "--fraction=1.5"),
        (["--data", "nowhere"], "nowhere: no shards there"),
    ],
)
def test_a_plan_that_cannot_be_made(
    scored: Path, tmp_path: Path, words: list[object], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert says in refused(
        capsys, "plan", "--data", scored, "--out", tmp_path / "p", *SMALL, *words
    )
    assert not (tmp_path / "p").exists()


# ---- repacked shards


@pytest.fixture
def plan_file(scored: Path, tmp_path: Path) -> Path:
    assert run("plan", "--data", scored, "--out", tmp_path / "plan", *SMALL) == 0
    return tmp_path / "plan"


def test_repacked_shards_play_the_plan_as_they_lie(
    scored: Path, plan_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "mined"
    assert (
        run("repack", "--data", scored, "--plan", plan_file, "--out", out, "--pairs_per_shard", 100)
        == 0
    )
    old = open_catalog(str(scored))
    new = open_catalog(str(out))
    plan = read_plan(plan_file, old)
    assert new.sizes == [96, 96, 96]
    order = Order(new.sizes, seed=7, window=0)
    for number in range(18):
        rows = order.rows(0, np.arange(number * 16, number * 16 + 16))
        assert new.index[rows].tolist() == old.index[plan.rows[number]].tolist()
    for place, row in enumerate(plan.rows.reshape(-1).tolist()):
        mine = new.read(place)
        theirs = old.read(row)
        assert (mine.image, mine.text) == (theirs.image, theirs.text)
        fields = json.loads(mine.json)
        kept = json.loads(theirs.json)
        assert fields.pop("key") == f"{place // 96:05d}{place % 96:04d}"
        kept.pop("key")
        assert fields == kept
    assert new.caption_hash.tolist() == old.caption_hash[plan.rows].reshape(-1).tolist()


def test_a_loader_of_ours_plays_repacked_shards(
    scored: Path, plan_file: Path, tmp_path: Path
) -> None:
    assert run("repack", "--data", scored, "--plan", plan_file, "--out", tmp_path / "mined") == 0
    old = open_catalog(str(scored))
    new = open_catalog(str(tmp_path / "mined"))
    order = Order(new.sizes, 0, window=0)
    parts = [
        GlobalBatches(new, order, ImageTransform(ImageSpec(16)), TOKENIZE, 16, rank, 2)
        for rank in (0, 1)
    ]
    assert parts[0].per_epoch == 18
    wanted = old.index[read_plan(plan_file, old).rows].tolist()
    assert [
        torch.cat([part[k].pairs.index for part in parts]).tolist() for k in range(18)
    ] == wanted


def test_suffixes_captions_and_sizes_of_foreign_shards_are_kept(
    model: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "some"
    folder.mkdir()
    pictures = []
    for kind, suffix in (("JPEG", "jpeg"), ("WEBP", "webp")):
        out = BytesIO()
        Image.new("RGB", (40, 30), "red").save(out, kind)
        pictures.append((suffix, out.getvalue()))
    with webdataset.TarWriter(str(folder / "00000.tar"), encoder=False) as tar:
        for place, (suffix, data) in enumerate(pictures):
            tar.write(
                {"__key__": f"a{place}", suffix: data, "txt": f"one {place}\ntwo {place}".encode()}
            )
    write_index(folder / "00000.tar", build_index(folder / "00000.tar"))
    catalog = open_catalog(str(folder))
    write_plan(tmp_path / "p", np.array([[1, 0]]), catalog.fingerprint, {})
    assert (
        run("repack", "--data", folder, "--plan", tmp_path / "p", "--out", tmp_path / "mined") == 0
    )
    new = open_catalog(str(tmp_path / "mined"))
    assert read_index(new.shards[0])["image_suffix"].to_pylist() == ["webp", "jpeg"]
    assert new.index.tolist() == [1, 0]
    fields = fields_of(new.read(0).json)
    assert captions_of(new.read(0).text, fields) == ["one 1", "two 1"]
    assert (fields["width"], fields["height"]) == (40, 30)


def test_repack_goes_on_where_it_stopped(
    scored: Path,
    plan_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "mined"
    written = list[int]()
    words = ("repack", "--data", scored, "--plan", plan_file, "--out", out, "--pairs_per_shard", 64)

    def failing(folder: Path, number: int, samples: Any) -> int:
        written.append(number)
        if len(written) == 3:
            raise OSError("disk full")
        return write_shard(folder, number, samples)

    monkeypatch.setattr(repack, "write_shard", failing)
    assert "disk full" in refused(capsys, *words)
    # as if killed just before
    (out / "00000_stats.json").unlink()
    assert run(*words) == 0
    assert written == [0, 1, 2, 0, 2, 3, 4]
    assert open_catalog(str(out)).sizes == [64, 64, 64, 64, 32]
    assert not [name for name in os.listdir(out) if name.startswith(".tmp")]


def test_repack_refuses_another_plan_and_other_shards(
    scored: Path, glyphs: Path, plan_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def words(plan: Path, out: Path) -> tuple[object, ...]:
        return "repack", "--data", scored, "--plan", plan, "--out", out

    assert run(*words(plan_file, tmp_path / "mined")) == 0
    assert run("plan", "--data", scored, "--out", tmp_path / "other", *SMALL, "--seed", 5) == 0
    assert "holds shards of another plan" in refused(
        capsys, *words(tmp_path / "other", tmp_path / "mined")
    )
    assert "not made by repack" in refused(capsys, *words(plan_file, scored))
    catalog = open_catalog(str(scored))
    write_plan(tmp_path / "twice", np.array([[0, 1], [1, 2]]), catalog.fingerprint, {})
    assert "has pair 1 twice" in refused(
        capsys, *words(tmp_path / "twice", tmp_path / "twice shards")
    )
    said = refused(
        capsys, "repack", "--data", glyphs / "test", "--plan", plan_file, "--out", tmp_path / "new"
    )
    assert "made for other shards" in said
    assert not (tmp_path / "new").exists()


def test_shards_of_one_name_need_scores_beside_them(
    scored: Path, model: Path, glyphs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("score", model, "--scores", tmp_path / "scores", "--data", scored, glyphs / "test")
    assert "two shards are named 00000.tar" in refused(capsys, *words)
    with pytest.raises(ShardError, match=r"has no scores"):
        all_scores(open_catalog(str(glyphs / "test")))


def test_the_hardest_groups_are_shown(
    glyphs: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = topics(60)
    places = np.arange(60).reshape(-1, 4)[::-1]
    own, negative = hard_pairs.closeness(table, places)
    cosines = table.image.astype(np.float32) @ table.text.astype(np.float32).T
    for row, members in enumerate(places):
        for column, pair in enumerate(members):
            others = [other for other in members if other != pair]
            assert own[row, column] == pytest.approx(cosines[pair, pair], abs=1e-5)
            assert negative[row, column] == pytest.approx(
                max(cosines[pair, others].max(), cosines[others, pair].max()), abs=1e-5
            )
    drawn: dict[str, Any] = {}
    monkeypatch.setattr(
        hard_pairs,
        "draw_sheet",
        lambda path, cells, spread, what, title: drawn.update(cells=cells, spread=spread),
    )
    assert run("score", model, "--data", glyphs / "train", "--scores", tmp_path / "s") == 0
    words = [
        "--data",
        glyphs / "train",
        "--scores",
        tmp_path / "s",
        "--batch_size",
        32,
        "--out",
        tmp_path / "plan.parquet",
    ]
    assert run("plan", *words) == 0
    assert len(drawn["cells"]) == hard_pairs.SHOWN
    assert [len(values) for values in drawn["spread"].values()] == [288, 288]
    catalog = open_catalog(str(glyphs / "train"))
    scores = all_scores(catalog, tmp_path / "s")
    rows = read_plan(tmp_path / "plan.parquet", catalog).rows.reshape(-1, 4)
    own, negative = hard_pairs.closeness(scores, np.searchsorted(scores.row, rows))
    first = rows[(negative - own).max(axis=1).argmax()]
    assert [each.caption for each in drawn["cells"][:4]] == [
        catalog.read(int(row)).text.decode() for row in first
    ]
    monkeypatch.undo()
    assert run("plan", *words) == 0
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
