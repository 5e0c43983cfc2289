"""Plan files: their batches and no others, in a new order each epoch, refused for other data.

Seen to fail when: the order leaves out the epoch, or shuffles pairs instead of batches; numbers are
taken for rows; the fingerprint, the batch size or a pair twice is not looked at; an epoch is as
long as the data set.
"""

import json
import multiprocessing
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clipsmall import train
from clipsmall.data import Catalog, GlobalBatches, ShardError, batch_loader, open_catalog
from clipsmall.data.batch_plan import AHEAD, PlannedOrder, read_plan, write_plan
from clipsmall.data.preprocess import ImageSpec, ImageTransform
from tests.data.test_reader import TOKENIZE
from tests.shards_for_tests import config

Pairs = np.ndarray[tuple[int, int], np.dtype[np.int64]]


def some_batches(catalog: Catalog, count: int, size: int) -> Pairs:
    """Numbers of pairs, none twice."""
    return np.random.default_rng(0).permutation(catalog.index)[: count * size].reshape(count, size)


@pytest.fixture
def catalog(glyphs: Path) -> Catalog:
    return open_catalog(str(glyphs / "train"))


@pytest.fixture
def file(catalog: Catalog, tmp_path: Path) -> Path:
    path = tmp_path / "plans" / "plan.parquet"
    write_plan(path, some_batches(catalog, 7, 32), catalog.fingerprint, {"seed": 3})
    return path


# ---- the order


@settings(max_examples=40, deadline=None)
@given(count=st.integers(1, 40), size=st.integers(1, 9), epoch=st.integers(0, 3))
def test_an_epoch_plays_every_batch_once_as_it_is(count: int, size: int, epoch: int) -> None:
    plan = (
        np.random.default_rng(count)
        .permutation(count * size * 2)[: count * size]
        .reshape(count, size)
    )
    order = PlannedOrder(plan, seed=1)
    rows = order.rows(epoch, np.arange(order.length))
    assert sorted(map(tuple, rows.reshape(count, size).tolist())) == sorted(
        map(tuple, plan.tolist())
    )
    backwards = [int(order.rows(epoch, np.array([p]))[0]) for p in reversed(range(order.length))]
    # whatever was asked before
    assert backwards[::-1] == rows.tolist()
    windows = -(-order.length // order.window)
    for window in range(windows):
        inside = [row for row, one in order.window_blocks(epoch, window) if one == 1]
        assert inside == sorted(rows[window * order.window : (window + 1) * order.window].tolist())
    # reading ahead at the end
    assert order.window_blocks(epoch, windows) == []


def test_epochs_and_seeds_differ_in_the_order_of_batches() -> None:
    plan = np.arange(400).reshape(100, 4)
    first, second = (PlannedOrder(plan, 0).rows(epoch, np.arange(400)) for epoch in (0, 1))
    assert first.tolist() != second.tolist()
    assert PlannedOrder(plan, 1).rows(0, np.arange(400)).tolist() != first.tolist()
    assert first.tolist() != plan.reshape(-1).tolist()


# ---- in training


def reader(catalog: Catalog, file: Path, rank: int = 0, world: int = 1) -> GlobalBatches:
    order = PlannedOrder(read_plan(file, catalog, 32).rows, seed=3)
    return GlobalBatches(catalog, order, ImageTransform(ImageSpec(16)), TOKENIZE, 32, rank, world)


@pytest.mark.parametrize(("world", "workers"), [(1, 2), (2, 0), (4, 2)])
def test_ranks_and_workers_play_the_batches_of_the_file(
    catalog: Catalog, file: Path, world: int, workers: int
) -> None:
    """Two epochs of seven batches, from the fourth batch on."""
    numbers = range(3, 14)
    parts = [
        list(batch_loader(reader(catalog, file, r, world), numbers, workers)) for r in range(world)
    ]
    found = [
        sorted(torch.cat([p[k].pairs.index for p in parts]).tolist()) for k in range(len(numbers))
    ]
    planned = sorted(sorted(batch) for batch in some_batches(catalog, 7, 32).tolist())
    assert sorted(found[4:]) == planned
    assert all(batch in planned for batch in found[:4])
    whole = reader(catalog, file)
    assert whole.per_epoch == 7
    for step, number in enumerate(numbers):
        assert torch.equal(
            torch.cat([p[step].pairs.index for p in parts]), whole[number].pairs.index
        )


def test_spawned_workers_play_a_plan(catalog: Catalog, file: Path) -> None:
    loader = batch_loader(reader(catalog, file), range(3, 5), workers=1)
    loader.multiprocessing_context = multiprocessing.get_context("spawn")
    assert [b.pairs.index.tolist() for b in loader] == [
        reader(catalog, file)[k].pairs.index.tolist() for k in (3, 4)
    ]


def test_a_window_is_read_ahead(
    catalog: Catalog, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = list[int]()
    monkeypatch.setattr(
        "os.posix_fadvise", lambda file, offset, size, advice: asked.append(offset), raising=False
    )
    played = reader(catalog, file)
    played[0]
    assert played.order.window == AHEAD * 32 > 7 * 32
    # small images, one advice each
    assert len(asked) == 7 * 32


def test_a_run_plays_a_plan_and_resumes_exactly(glyphs: Path, file: Path, tmp_path: Path) -> None:
    def losses(out: Path) -> list[float]:
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        return [row["loss"] for row in rows if "loss" in row]

    whole = tmp_path / "whole"
    cut = tmp_path / "cut"
    assert train.main(config(glyphs, whole, **{"data.plan": file})) == 0
    shutil.copytree(whole, cut)
    for folder in (cut / "checkpoints").iterdir():
        if int(folder.name[5:]) > 10:
            shutil.rmtree(folder)
    assert (
        train.main(config(glyphs, cut, **{"data.plan": file, "resume": "auto", "data.workers": 1}))
        == 0
    )
    assert losses(cut) == losses(whole)
    assert len(losses(cut)) == 24
    plain = tmp_path / "plain"
    assert train.main(config(glyphs, plain)) == 0
    assert losses(plain) != losses(whole)


def test_another_plan_does_not_continue_a_run(
    glyphs: Path, catalog: Catalog, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = {"data.plan": file, "optim.pairs": 32 * 6}
    assert train.main(config(glyphs, tmp_path / "run", **words)) == 0
    write_plan(file, some_batches(catalog, 6, 32), catalog.fingerprint, {})
    with pytest.raises(SystemExit):
        train.main(config(glyphs, tmp_path / "run", **words, resume="auto"))
    assert "has changed since" in capsys.readouterr().err


# ---- what is refused


def test_a_plan_names_pairs_not_rows(glyphs: Path, tmp_path: Path) -> None:
    """The rows of the second shard alone begin at 0, its pairs' numbers at 100."""
    second = open_catalog(str(glyphs / "train" / "00001.tar"))
    path = tmp_path / "second.parquet"
    write_plan(path, second.index[:64].reshape(2, 32), second.fingerprint, {"seed": 5})
    plan = read_plan(path, second)
    assert second.index[0] == 100
    assert plan.rows.tolist() == np.arange(64).reshape(2, 32).tolist()
    assert plan.about == {"seed": 5}
    assert len(plan.digest) == 64


def test_another_data_set_is_refused(glyphs: Path, file: Path) -> None:
    with pytest.raises(ShardError, match="made for other shards"):
        read_plan(file, open_catalog(str(glyphs / "test")))


def test_another_batch_size_is_refused_and_named(catalog: Catalog, file: Path) -> None:
    with pytest.raises(ShardError, match=r"batches of 32, not data\.batch_size=64; set that to 32"):
        read_plan(file, catalog, 64)


def test_unknown_pairs_and_pairs_twice_are_refused(catalog: Catalog, file: Path) -> None:
    batches = some_batches(catalog, 7, 32)
    for number in (-1, 300, 10**12):
        write_plan(
            file, np.where(batches == batches[2, 5], number, batches), catalog.fingerprint, {}
        )
        with pytest.raises(ShardError, match=f"names pair {number}, which"):
            read_plan(file, catalog)
    batches[3, 30] = batches[3, 2]
    write_plan(file, batches, catalog.fingerprint, {})
    with pytest.raises(ShardError, match=f"has pair {batches[3, 2]} twice"):
        read_plan(file, catalog)


@pytest.mark.parametrize("how", ["missing", "cut", "other parquet", "other version"])
def test_what_is_no_plan_is_refused(catalog: Catalog, file: Path, how: str) -> None:
    if how == "missing":
        file.unlink()
    elif how == "cut":
        file.write_bytes(file.read_bytes()[:-40])
    else:
        table = pa.table({"pairs": [1]}) if how == "other parquet" else pq.read_table(file)
        pq.write_table(table.replace_schema_metadata({"clipsmall_plan": "9"}), file)
    with pytest.raises(
        ShardError, match=r"plan\.parquet: (cannot be read as a plan|not a plan).*mine_shards plan"
    ):
        read_plan(file, catalog)


def test_a_failing_write_leaves_the_old_plan(
    catalog: Catalog, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = file.read_bytes()

    def full(table: pa.Table, path: Path) -> None:
        path.write_bytes(b"PAR1")
        raise OSError("disk full")

    monkeypatch.setattr(pq, "write_table", full)
    with pytest.raises(OSError, match="disk full"):
        write_plan(file, some_batches(catalog, 3, 32), catalog.fingerprint, {})
    assert file.read_bytes() == before
    assert list(file.parent.iterdir()) == [file]
