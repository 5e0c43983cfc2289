"""Tests of make_shards: stable numbers, bad pairs, resuming, refusals."""

import hashlib
import json
import zipfile
from io import BytesIO
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image

from clipsmall.shards import read_index
from data_tools.pairs import clean_captions
from tests.shard_samples import by_index, check_colours, make_photos, picture, run, samples


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return make_photos(tmp_path)


def test_numbers_and_bytes_do_not_depend_on_workers_or_the_shuffle(photos: Path, tmp_path: Path) -> None:
    size = ("--pairs_per_shard", 3)
    assert run(photos / "photos.csv", tmp_path / "one", *size, "--workers", 1) == 0
    assert run(photos / "photos.csv", tmp_path / "four", *size, "--workers", 4) == 0
    shards = sorted(path.name for path in (tmp_path / "one").glob("*.tar"))
    assert len(shards) == 4
    for name in shards:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "four" / name).read_bytes()
    orders = {}
    for seed in ("0", "7", "none"):
        assert run(photos / "photos.csv", tmp_path / seed, *size, "--shuffle", seed) == 0
        check_colours(tmp_path / seed)
        orders[seed] = [sample["index"] for sample in samples(tmp_path / seed).values()]
    assert orders["none"] == list(range(12))
    assert len({tuple(order) for order in orders.values()}) == 3


def test_unusable_pairs_are_left_out_and_counted(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    table = pd.read_csv(photos / "photos.csv")
    table.loc[1, "caption"] = "  \t "
    table.loc[2, "caption"] = None
    table.loc[3, "path"] = "images/nowhere.png"
    table.loc[4, "caption"] = "null"  # a word, not a missing value
    table.loc[5, "caption"] = "007"
    (photos / "images/black.png").write_bytes(b"<html>404</html>")
    (photos / "images/pink.png").write_bytes(picture("pink")[:-30])
    table.to_csv(photos / "photos.csv", index=False)
    args = (photos / "photos.csv", tmp_path / "out", "--pairs_per_shard", 12)
    assert run(*args) == 1
    assert "5 of 12 pairs" in capsys.readouterr().err
    assert run(*args, "--max_error_rate", 0.5) == 0
    stats = json.loads((tmp_path / "out/00000_stats.json").read_text())
    assert stats["status_dict"] == {
        "success": 7, "empty caption": 2, "no such image file": 1, "not an image": 1,
        "truncated or broken image": 1,
    }  # fmt: skip
    found = by_index(tmp_path / "out")
    assert sorted(found) == [0, 4, 5, 6, 8, 10, 11]
    assert (found[4]["caption"], found[5]["caption"]) == ("null", "007")
    assert "2 empty caption" in capsys.readouterr().out


def test_formats_and_sizes(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    kinds = {
        "a.jpg": "JPEG",
        "b.webp": "WEBP",
        "c.gif": "GIF",
        "d.tif": "TIFF",
        "e.avif": "AVIF",
        "f.png": "PNG",
    }
    for name, kind in kinds.items():
        (folder / name).write_bytes(picture("teal", kind, (60, 30)))
    pd.DataFrame({"file": list(kinds), "text": list(kinds)}).to_csv(folder / "t.csv", index=False)
    assert run(folder / "t.csv", tmp_path / "keep") == 0
    found = by_index(tmp_path / "keep")
    assert [found[i][".suffix"] for i in range(6)] == ["jpg", "webp", "png", "png", "png", "png"]
    for number, name in ((0, "a.jpg"), (1, "b.webp"), (5, "f.png")):
        assert found[number][".image"] == (folder / name).read_bytes()
        assert found[number]["sha256"] == hashlib.sha256((folder / name).read_bytes()).hexdigest()
    assert run(folder / "t.csv", tmp_path / "small", "--resize", 10, "--format", "webp") == 0
    for sample in samples(tmp_path / "small").values():
        with Image.open(BytesIO(sample[".image"])) as image:
            assert (image.format, image.size) == ("WEBP", (20, 10))
        assert (sample["width"], sample["height"]) == (20, 10)
    assert run(folder / "t.csv", tmp_path / "same", "--resize", 300) == 0  # never enlarged
    assert {(s["width"], s["height"]) for s in samples(tmp_path / "same").values()} == {(60, 30)}


def test_goes_on_after_a_kill(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    args = (photos / "photos.csv", out, "--pairs_per_shard", 2)
    assert run(*args) == 0
    whole = {path.name: path.read_bytes() for path in out.glob("*.tar")}
    times = {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    (out / "00001_stats.json").unlink()  # killed before the mark was set
    (out / "00002.tar").write_bytes(whole["00002.tar"][:1000])  # cut later on
    (out / "00003.index.parquet").unlink()
    stats = json.loads((out / "00004_stats.json").read_text())
    (out / "00004_stats.json").write_text(json.dumps(stats | {"successes": 1}))  # not of this tar
    (out / ".tmp-4711-00001.tar").write_bytes(b"half a shard")
    assert run(*args) == 0
    assert {path.name: path.read_bytes() for path in out.glob("*.tar")} == whole
    remade = {name for name in whole if (out / name).stat().st_mtime_ns != times[name]}
    assert remade == {"00001.tar", "00002.tar", "00003.tar", "00004.tar"}
    assert not list(out.glob(".tmp-*"))
    check_colours(out)


def test_other_arguments_or_inputs_are_refused(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "out"
    assert run(photos / "photos.csv", out, "--pairs_per_shard", 3) == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    capsys.readouterr()
    assert run(photos / "photos.csv", out, "--pairs_per_shard", 6) == 2
    assert "pairs_per_shard 3 -> 6" in capsys.readouterr().err
    table = pd.read_csv(photos / "photos.csv")
    table.assign(caption="other").to_csv(photos / "photos.csv", index=False)
    assert run(photos / "photos.csv", out, "--pairs_per_shard", 3) == 2
    assert "input has changed" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert run(photos / "photos.csv", out, "--pairs_per_shard", 6, "--overwrite") == 0
    assert sorted(path.name for path in out.glob("*.tar")) == ["00000.tar", "00001.tar"]
    assert {s["caption"] for s in samples(out).values()} == {"other"}
    (out / "make_shards.json").unlink()
    assert run(photos / "photos.csv", out, "--pairs_per_shard", 6) == 2  # somebody else's shards, for all we know


def test_zip_members_that_claim_too_much_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import data_tools.stores

    monkeypatch.setattr(data_tools.stores, "MAX_FILE_BYTES", 10_000)
    with zipfile.ZipFile(tmp_path / "in.zip", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("a/good.png", picture("red"))
        file.writestr("a/bomb.png", bytes(1_000_000))
    assert run(tmp_path / "in.zip", tmp_path / "out", "--max_error_rate", 0.5) == 0
    stats = json.loads((tmp_path / "out/00000_stats.json").read_text())
    assert stats["status_dict"] == {"success": 1, "file over 256 MiB": 1}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["missing.csv", "out"], "missing.csv"),
        (
            ["photos/photos.csv", "out", "--image", "nope"],
            "--image nope: no such column; there are: path, caption",
        ),
        (["photos/photos.csv", "out", "--caption", "nope"], "--caption nope"),
        (["photos/photos.csv", "out", "--keep", "nope"], "--keep nope"),
        (["photos/photos.csv", "out", "--where", "size > 99"], "selects none of 12 rows"),
        (["photos/photos.csv", "out", "--where", "nope > 1"], "--where 'nope > 1'"),
        (["photos/photos.csv", "out", "--pairs_per_shard", "20000"], "at most 10000"),
        (["photos/photos.csv", "photos/photos.csv"], "is a file"),
        (["photos/photos.csv", "out", "--max_error_rate", "3"], "between 0 and 1"),
        (["photos/images", "out"], "no captions: neither a .txt"),
        (["photos/images/red.png", "out"], "not a folder, a .zip or a table"),
        (["latin.csv", "out"], "not UTF-8"),
        (["urls.csv", "out"], "img2dataset"),
        (["empty.csv", "out"], "has no rows"),
        (["broken.zip", "out"], "broken.zip"),
        (["broken.parquet", "out"], "broken.parquet"),
        (["hf:./nowhere", "out"], "hf:./nowhere"),
    ],
)
def test_wrong_use_ends_with_one_line_and_no_output(
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    args: list,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("latin.csv").write_bytes("image,caption\na.png,caf\xe9\n".encode("latin-1"))
    Path("urls.csv").write_text("image,caption\nhttps://example.org/a.png,a\n")
    Path("empty.csv").write_text("image,caption\n")
    Path("broken.zip").write_bytes(b"PK not really")
    Path("broken.parquet").write_bytes(b"PAR1 not really")
    code = run(*args)
    error = capsys.readouterr().err
    assert code == 2
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error
    assert not Path("out").exists()


def test_cells_to_captions() -> None:
    assert clean_captions("  a\n\tb\0 c ") == ["a b c"]
    assert clean_captions("a | |b", "|") == ["a", "b"]
    assert clean_captions(["a", None, ["b "], 3]) == ["a", "b"]
    assert clean_captions(float("nan")) == clean_captions(None) == clean_captions(7) == []
    assert clean_captions("\ud800 x")[0].encode()


def test_the_index_matches_the_stats(photos: Path, tmp_path: Path) -> None:
    assert run(photos / "photos.csv", tmp_path / "out", "--pairs_per_shard", 5) == 0
    counts = [read_index(shard).num_rows for shard in sorted((tmp_path / "out").glob("*.tar"))]
    assert counts == [5, 5, 2]
    assert read_index(tmp_path / "out/00002.tar")["key"].to_pylist() == ["000020000", "000020001"]
