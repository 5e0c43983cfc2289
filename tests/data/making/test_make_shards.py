"""Tests of make_shards: stable numbers, bad pairs, resuming, refusals."""

import hashlib
import json
import zipfile
from io import BytesIO
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image

from clipsmall.data import open_catalog, read_index
from clipsmall.data.making import stores
from clipsmall.data.making.pairs import clean_captions
from clipsmall.storage import locks
from data_tools import check_shards
from tests.shard_samples import by_index, check_colours, make_photos, picture, run, samples


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return make_photos(tmp_path)


def test_numbers_and_bytes_do_not_depend_on_workers_or_the_shuffle(
    photos: Path, tmp_path: Path
) -> None:
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


def test_unusable_pairs_are_left_out_and_counted(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    table = pd.read_csv(photos / "photos.csv")
    table.loc[1, "caption"] = "  \t "
    table.loc[2, "caption"] = None
    table.loc[3, "path"] = "images/nowhere.png"
    # a word, not a missing value
    table.loc[4, "caption"] = "null"
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
        "success": 7,
        "empty caption": 2,
        "no such image file": 1,
        "not an image": 1,
        "truncated or broken image": 1,
    }
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
    # never enlarged
    assert run(folder / "t.csv", tmp_path / "same", "--resize", 300) == 0
    assert {(s["width"], s["height"]) for s in samples(tmp_path / "same").values()} == {(60, 30)}


def test_goes_on_after_a_kill(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    args = (photos / "photos.csv", out, "--pairs_per_shard", 2)
    assert run(*args) == 0
    whole = {path.name: path.read_bytes() for path in out.glob("*.tar")}
    times = {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    # killed before the mark was set
    (out / "00001_stats.json").unlink()
    # cut later on
    (out / "00002.tar").write_bytes(whole["00002.tar"][:1000])
    (out / "00003.index.parquet").unlink()
    stats = json.loads((out / "00004_stats.json").read_text())
    # not of this tar
    (out / "00004_stats.json").write_text(json.dumps(stats | {"successes": 1}))
    (out / ".tmp-4711-00001.tar").write_bytes(b"half a shard")
    assert run(*args) == 0
    assert {path.name: path.read_bytes() for path in out.glob("*.tar")} == whole
    remade = {name for name in whole if (out / name).stat().st_mtime_ns != times[name]}
    assert remade == {"00001.tar", "00002.tar", "00003.tar", "00004.tar"}
    assert not list(out.glob(".tmp-*"))
    check_colours(out)


def test_other_arguments_or_inputs_are_refused(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
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
    # somebody else's shards, for all we know
    assert run(photos / "photos.csv", out, "--pairs_per_shard", 6) == 2


def test_zip_members_that_claim_too_much_are_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stores, "MAX_FILE_BYTES", 10_000)
    with zipfile.ZipFile(tmp_path / "in.zip", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("b/good.png", picture("red"))
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


def colours(out: Path) -> dict[str, bytes]:
    """Caption -> picture."""
    return {sample["caption"]: sample[".image"] for sample in by_index(out).values()}


def test_repaired_images_are_taken_by_the_same_command(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    hidden = (photos / "images").rename(photos / "not mounted")
    args = (photos / "photos.csv", tmp_path / "out", "--pairs_per_shard", 6)
    # a second time it is no success either
    for _ in range(2):
        assert run(*args) == 1
        assert "no such image file" in capsys.readouterr().err
    hidden.rename(photos / "images")
    (photos / "images/black.png").rename(photos / "black.png")
    assert run(*args, "--max_error_rate", 0.1) == 0
    assert len(by_index(tmp_path / "out")) == 11
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.tar")}
    (photos / "black.png").rename(photos / "images/black.png")
    assert run(*args) == 0
    check_colours(tmp_path / "out")
    after = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.tar")}
    # the other shard lacked nothing
    assert sum(before[name] != after[name] for name in before) == 1


def test_a_stopped_run_is_no_whole_data_set(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "out"
    assert run(photos / "photos.csv", out, "--pairs_per_shard", 4) == 0
    for path in out.glob("00002*"):
        path.unlink()
    said = "make_shards has made 8 of 12 pairs: run the same command again"
    with pytest.raises(ValueError, match=said):
        open_catalog(str(out))
    assert check_shards.main([str(out)]) == 1
    output = capsys.readouterr()
    assert said in output.out + output.err
    # named one by one they are what is wanted
    assert len(open_catalog(f"{out}/*.tar")) == 8
    # twice named, there once
    assert len(open_catalog([f"{out}/*.tar", f"{out}/00000.tar"])) == 8


def test_the_name_of_the_only_folder_is_no_caption(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "in" / "Images").mkdir(parents=True)
    for name in ("red", "blue"):
        (tmp_path / "in" / "Images" / f"{name}.png").write_bytes(picture(name))
    (tmp_path / "in" / "captions.csv").write_text("image,caption\nImages/red.png,red\n")
    assert run(tmp_path / "in", tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert "'Images', would be every caption; give a table by --table (captions.csv?)" in said


def test_a_table_inside_a_zipped_folder_is_found(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    with zipfile.ZipFile(tmp_path / "in.zip", "w") as file:
        file.writestr("photos/metadata.csv", "file_name,caption\na/red.png,red\na/blue.png,blue\n")
        for name in ("red", "blue"):
            file.writestr(f"photos/a/{name}.png", picture(name))
    assert run(tmp_path / "in.zip", tmp_path / "out") == 0
    assert colours(tmp_path / "out") == {"red": picture("red"), "blue": picture("blue")}
    with zipfile.ZipFile(tmp_path / "in.zip", "a") as file:
        file.writestr("more/metadata.csv", "file_name,caption\na/red.png,red\n")
    assert run(tmp_path / "in.zip", tmp_path / "other") == 2
    assert "several tables (more/metadata.csv, photos/metadata.csv)" in capsys.readouterr().err


def test_texts_that_are_no_text_are_named(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "in").mkdir()
    for name, words in {"red": b"\xef\xbb\xbfred", "blue": "café".encode("latin-1")}.items():
        (tmp_path / "in" / f"{name}.png").write_bytes(picture(name))
        (tmp_path / "in" / f"{name}.txt").write_bytes(words)
    assert run(tmp_path / "in", tmp_path / "out") == 2
    assert "1 captions cannot be read, as blue.txt: not UTF-8; convert" in capsys.readouterr().err
    (tmp_path / "in" / "blue.txt").write_text("blue")
    assert run(tmp_path / "in", tmp_path / "out") == 0
    # no byte order mark
    assert set(colours(tmp_path / "out")) == {"red", "blue"}


def test_rows_without_an_image_are_left_out_one_by_one(photos: Path, tmp_path: Path) -> None:
    table = pd.read_csv(photos / "photos.csv")
    table.loc[[1, 2, 3], "path"] = None
    table.to_csv(photos / "photos.csv", index=False)
    assert run(photos / "photos.csv", tmp_path / "out", "--max_error_rate", 0.5) == 0
    stats = json.loads((tmp_path / "out/00000_stats.json").read_text())
    assert (stats["count"], stats["status_dict"]["success"]) == (12, 9)


def test_numbers_beside_empty_cells_stay_what_they_are(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    table = pd.read_csv(photos / "photos.csv")
    table["group"] = [f"90071992547409{i:04d}" for i in range(11)] + [None]
    table["kind"] = pd.Series([*range(11), None], dtype="Int64")
    table["id"] = pd.Series([2**60 + i for i in range(11)] + [None], dtype="Int64")
    table.to_csv(photos / "photos.csv", index=False)
    args = (photos / "photos.csv", tmp_path / "out", "--group", "group", "--label", "kind")
    assert run(*args) == 0
    assert {number: sample["label"] for number, sample in by_index(tmp_path / "out").items()} == {
        **{i: i for i in range(11)},
        11: None,
    }
    assert all(
        type(sample["label"]) is int
        for number, sample in by_index(tmp_path / "out").items()
        if number < 11
    )
    assert run(*args, "--keep", "id", "--overwrite") == 2
    assert (
        "column id: long numbers beside empty cells lose their last digits"
        in capsys.readouterr().err
    )


def test_pictures_that_a_format_cannot_hold_are_counted(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name, size in {"long": (17_000, 500), "short": (40, 30)}.items():
        Image.new("RGB", size).save(tmp_path / "in" / f"{name}.png")
        (tmp_path / "in" / f"{name}.txt").write_text("black")
    assert run(tmp_path / "in", tmp_path / "out", "--format", "webp", "--max_error_rate", 0.5) == 0
    stats = json.loads((tmp_path / "out/00000_stats.json").read_text())
    assert stats["status_dict"] == {"success": 1, "cannot be written as webp": 1}


def test_captions_that_no_reader_takes_are_counted(photos: Path, tmp_path: Path) -> None:
    table = pd.read_csv(photos / "photos.csv")
    table.loc[3, "caption"] = "word " * 300_000
    table.to_csv(photos / "photos.csv", index=False)
    assert run(photos / "photos.csv", tmp_path / "out", "--max_error_rate", 0.5) == 0
    stats = json.loads((tmp_path / "out/00000_stats.json").read_text())
    assert stats["status_dict"] == {"success": 11, "captions too long": 1}


def test_two_commands_do_not_make_shards_in_one_folder(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / ".tmp-1-00000_stats.json").touch()
    with locks.exclusive(out, "this one"):
        assert run(photos / "photos.csv", out) == 2
    assert f"error: {out}: another command makes shards there; wait" in capsys.readouterr().err
    # not swept
    assert [file.name for file in out.iterdir()] == [".tmp-1-00000_stats.json"]
    assert run(photos / "photos.csv", out) == 0


def test_a_link_that_leads_back_gives_no_picture_twice(tmp_path: Path) -> None:
    for name in ("red", "blue"):
        (tmp_path / "in" / name).mkdir(parents=True)
        (tmp_path / "in" / name / "1.png").write_bytes(picture(name))
    (tmp_path / "in" / "red" / "self").symlink_to(tmp_path / "in")
    assert run(tmp_path / "in", tmp_path / "out") == 0
    assert len(by_index(tmp_path / "out")) == 2
