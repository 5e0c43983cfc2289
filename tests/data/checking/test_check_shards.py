"""Tests of check_shards: other tools' shards, cut tars, broken images, duplicates."""

import json
from pathlib import Path

import pyarrow as pa
import pytest
from PIL import Image

from clipsmall.data import (
    ShardError,
    build_index,
    index_path,
    open_catalog,
    read_index,
    write_index,
)
from clipsmall.data.checking.shard_check import Problem
from clipsmall.data.checking.shard_report import report_of
from clipsmall.data.index import tar_members
from data_tools.check_shards import main
from tests.shard_samples import (
    COLOURS,
    exit_code,
    make_photos,
    pair_members,
    picture,
    run,
    write_tar,
)


def check(*args: object) -> int:
    return exit_code(main, [str(arg) for arg in [*args, "--workers", 1]])


def report(folder: Path) -> dict:
    return json.loads((folder / "check.json").read_text())


def three_pairs() -> list[tuple[str, bytes]]:
    keys = zip(("a", "b", "c"), COLOURS, strict=False)
    return [
        member
        for key, colour in keys
        for member in pair_members(key, picture(colour), f"a {colour} box")
    ]


# where in the third member's neighbourhood the file ends
CUTS = {
    "between samples": lambda m: m["c.png"] - 512,
    "in a header": lambda m: m["c.png"] - 100,
    "between image and text": lambda m: m["c.txt"] - 512,
    "in the data": lambda m: m["c.png"] + 20,
    "in the padding": lambda m: m["c.json"] + 500,
    "at once": lambda m: 0,
}


@pytest.mark.parametrize("cut", CUTS)
def test_cut_tars_are_noticed(tmp_path: Path, cut: str, capsys: pytest.CaptureFixture) -> None:
    shard = write_tar(tmp_path / "00000.tar", three_pairs())
    write_tar(tmp_path / "00001.tar", three_pairs())
    data = shard.read_bytes()
    shard.write_bytes(
        data[: CUTS[cut]({member.name: member.offset for member in tar_members(shard)})]
    )
    with pytest.raises(ShardError, match=r"00000\.tar"):
        build_index(shard)
    assert check(tmp_path) == 1
    assert "00000.tar" in capsys.readouterr().out
    assert not index_path(shard).exists()
    # the other one is used
    assert (report(tmp_path)["shards"], report(tmp_path)["good"]) == (1, 3)


@pytest.mark.parametrize("longer", [0, 3])
def test_a_shard_that_was_replaced_after_it_was_indexed(tmp_path: Path, longer: int) -> None:
    """Also by one of the same length: tars are padded."""
    big = pair_members("d", bytes(20_000), "d") * (longer > 0)
    shard = write_tar(tmp_path / "0.tar", three_pairs() + big)
    size = shard.stat().st_size
    assert check(tmp_path) == 0
    write_tar(shard, three_pairs()[:6])
    assert (shard.stat().st_size == size) == (longer == 0)
    assert check(tmp_path) == 1
    assert "--rebuild" in report(tmp_path)["unusable"][str(shard)]
    assert check(tmp_path, "--rebuild") == 0
    assert report(tmp_path)["pairs"] == 2


def test_all_unusable_shards_are_named(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for number in (0, 2):
        write_tar(tmp_path / f"{number}.tar", three_pairs())
    (tmp_path / "1.tar").write_bytes(b"")
    (tmp_path / "3.tar").write_text("<html>not found</html>")
    # its tar was not copied
    (tmp_path / "4_stats.json").write_text(json.dumps({"successes": 3}))
    (tmp_path / "2_stats.json").write_text(json.dumps({"successes": 4}))
    assert check(tmp_path) == 1
    unusable = report(tmp_path)["unusable"]
    assert {Path(name).name for name in unusable} == {"1.tar", "2.tar", "3.tar", "4.tar"}
    assert "holds 3 samples, 2_stats.json says 4" in unusable[str(tmp_path / "2.tar")]
    assert capsys.readouterr().out.count("UNUSABLE") == 4
    assert check(str(tmp_path / "{0..7}.tar")) == 1
    assert len(report(tmp_path)["unusable"]) == 7


def test_stats_are_compared_for_shards_with_an_index_too(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", three_pairs())
    assert check(tmp_path) == 0
    (tmp_path / "0_stats.json").write_text(json.dumps({"successes": 5}))
    assert check(tmp_path) == 1


@pytest.mark.parametrize("arg", ["nowhere", "some.tar.gz", "empty_folder", "nowhere.tar"])
def test_wrong_use(tmp_path: Path, arg: str, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "some.tar.gz").write_bytes(b"x")
    (tmp_path / "empty_folder").mkdir()
    assert check(tmp_path / arg) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert arg in error


def test_img2dataset_shards(tmp_path: Path) -> None:
    """Text "" where the caption is None; gaps in the keys; `sha256` of the picture before
    resizing.
    """
    members = []
    for number, colour in enumerate(COLOURS[:6]):
        caption = None if number == 2 else f"a {colour}\nbox"
        members += pair_members(
            f"00003{number * 7:04d}", picture(colour), caption, sha256="0" * 64, url="http://x/y"
        )
    write_tar(tmp_path / "00003.tar", members)
    (tmp_path / "00003_stats.json").write_text(
        json.dumps({"count": 9, "successes": 6, "failed_to_download": 3})
    )
    assert check(tmp_path, "--decode") == 0
    found = report(tmp_path)
    assert {why: left["pairs"] for why, left in found["left_out"].items()} == {"empty caption": 1}
    assert found["left_out"]["empty caption"]["examples"] == [f"{tmp_path / '00003.tar'}:000030014"]
    assert len(open_catalog(str(tmp_path))) == 5


def test_datacomp_shards(tmp_path: Path) -> None:
    for number in range(2):
        members = []
        for place, colour in enumerate(COLOURS[:4]):
            uid = f"{number * 4 + place:032x}"
            members += pair_members(
                f"{number:08d}{place:04d}", picture(colour), f"{colour} {number}", uid=uid
            )
        write_tar(tmp_path / f"{number:08d}.tar", members)
    assert check(tmp_path) == 0
    # no `index` in the json: the place
    assert open_catalog(str(tmp_path)).index.tolist() == list(range(8))


def test_clip_benchmark_shards(tmp_path: Path) -> None:
    """Split folders; classes in .cls and no text; several captions a picture, one a line."""
    classes = [
        m
        for i, c in enumerate(COLOURS)
        for m in ((f"s{i}.png", picture(c)), (f"s{i}.cls", str(i).encode()))
    ]
    write_tar(tmp_path / "classes/test/0.tar", classes)
    (tmp_path / "classes/test/nshards.txt").write_text("2\n")
    texts = [
        m
        for i, c in enumerate(COLOURS)
        for m in ((f"s{i}.png", picture(c)), (f"s{i}.txt", f"a {c}\nb".encode()))
    ]
    write_tar(tmp_path / "texts/test/0.tar", texts)
    (tmp_path / "texts/test/nshards.txt").write_text("1")
    assert check(tmp_path / "classes") == 1
    found = report(tmp_path / "classes")
    assert list(found["unusable"]) == [str(tmp_path / "classes/test/1.tar")]
    assert (found["pairs"], found["labelled"]) == (12, 12)
    assert check(tmp_path / "texts") == 0
    assert report(tmp_path / "texts")["good"] == 12
    assert len(open_catalog(str(tmp_path / "texts/test"))) == 12


def test_decode_marks_bad_pairs_and_training_leaves_them_out(tmp_path: Path) -> None:
    members = []
    for number, colour in enumerate(COLOURS):
        members += pair_members(f"{number:04d}", picture(colour), f"a {colour} box", index=number)
    names = [name for name, _ in members]
    members[names.index("0001.png")] = ("0001.png", b"<html>404</html>")
    members[names.index("0004.png")] = ("0004.png", picture("pink")[:-25])
    # a good picture, but another one
    members[names.index("0006.png")] = (
        "0006.png",
        picture("lime"),
    )
    shard = write_tar(tmp_path / "0.tar", members)
    assert check(tmp_path) == 0
    # nobody has looked yet
    assert len(open_catalog(str(tmp_path))) == 12
    assert check(tmp_path, "--decode") == 0
    status = dict(
        zip(*(read_index(shard)[name].to_pylist() for name in ("key", "status")), strict=True)
    )
    assert {key: why for key, why in status.items() if why} == {
        "0001": "not an image",
        "0004": "truncated or broken image",
        "0006": "sha256 differs",
    }
    catalog = open_catalog(str(tmp_path))
    assert sorted(catalog.index.tolist()) == [0, 2, 3, 5, 7, 8, 9, 10, 11]
    assert catalog.left_out == {
        "not an image": 1,
        "truncated or broken image": 1,
        "sha256 differs": 1,
    }
    # a later look without --decode keeps what is known
    assert check(tmp_path) == 0
    assert report(tmp_path)["good"] == 9


def test_odd_members(tmp_path: Path) -> None:
    """Hostile or broken text never ends the check, and never becomes a caption."""
    members = [
        ("a.png", picture("red")),
        ("a.txt", b"caf\xe9"),
        ("b.png", picture("red")),
        ("b.json", b"[" * 100_000),
        ("c.png", picture("red")),
        ("c.txt", b"x" * (1 << 20) + b"y"),
        ("d.txt", b"no picture"),
        ("e.png", picture("red")),
        ("e.txt", b"  \n "),
        ("f.PNG", picture("red")),
        ("f.txt", b"good"),
        ("f.json", b'{"index": true}'),
        ("caf\udce9.png", picture("red")),
        ("caf\udce9.txt", b"good"),
    ]
    write_tar(tmp_path / "0.tar", members)
    assert check(tmp_path, "--decode") == 0
    assert {why: left["pairs"] for why, left in report(tmp_path)["left_out"].items()} == {
        "caption is not UTF-8": 1,
        "broken json": 1,
        "caption or json over 1 MiB": 1,
        "no image": 1,
        "empty caption": 1,
    }
    assert report(tmp_path)["good"] == 2


def test_duplicates(tmp_path: Path) -> None:
    photos = make_photos(tmp_path)
    rows = [
        f"images/{colour}.png,{caption}"
        for colour, caption in zip(COLOURS, ["Calendar", "calendar ", *COLOURS[2:]], strict=True)
    ]
    (photos / "images/copy.png").write_bytes(picture("gold"))
    (photos / "photos.csv").write_text(
        "\n".join(["image,caption", *rows, "images/copy.png,CALENDAR"])
    )
    assert run(photos / "photos.csv", tmp_path / "out") == 0
    assert check(tmp_path / "out") == 0
    found = report(tmp_path / "out")
    assert (found["same_caption"]["groups"], found["same_caption"]["pairs"]) == (1, 3)
    assert found["same_caption"]["largest"][0]["caption"].lower() == "calendar"
    assert len(found["same_caption"]["largest"][0]["examples"]) == 3
    assert (found["same_image"]["groups"], found["same_image"]["pairs"]) == (1, 2)


def test_report_of_nothing_and_of_numbers(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "0.tar", three_pairs())
    frame = build_index(shard).to_pandas().assign(shard="0.tar", caption_chars=[1, 2, 9])
    found = report_of(frame, [Problem(Path("1.tar"), "gone")], 1, 1234, lambda row: [row["key"]])
    assert (found.caption_chars.least, found.caption_chars.median, found.caption_chars.most) == (
        1,
        2,
        9,
    )
    assert (found.caption_chars.mean, found.bytes, found.unusable) == (4.0, 1234, {"1.tar": "gone"})
    (tmp_path / "0.tar").write_bytes(b"")
    assert check(tmp_path) == 1
    assert (report(tmp_path)["pairs"], report(tmp_path)["caption_chars"]) == (0, None)


def test_the_sheet_is_a_picture_and_captions_are_no_mathematics(tmp_path: Path) -> None:
    members = pair_members("a", picture("red", size=(300, 20)), r"$\nosuch{$ 日本")
    members += pair_members("b", b"not an image", "b")
    write_tar(tmp_path / "0.tar", members)
    assert check(tmp_path, "--sheet", tmp_path / "s.png", "--json", tmp_path / "r.json") == 0
    with Image.open(tmp_path / "s.png") as sheet:
        assert (255, 0, 0) in {colour for _, colour in sheet.convert("RGB").getcolors(1 << 24)}
    assert json.loads((tmp_path / "r.json").read_text())["pairs"] == 2
    assert not (tmp_path / "check.png").exists()


def test_many_workers_give_the_same_report(tmp_path: Path) -> None:
    for number in range(5):
        write_tar(tmp_path / f"{number}.tar", three_pairs())
    (tmp_path / "3.tar").write_bytes(b"")
    assert main([str(tmp_path), "--workers", "3", "--json", str(tmp_path / "a.json")]) == 1
    assert main([str(tmp_path), "--workers", "1", "--json", str(tmp_path / "b.json")]) == 1
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()


def test_an_index_of_another_version_is_named(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "0.tar", three_pairs())
    table = build_index(shard)
    write_index(shard, table.replace_schema_metadata({"clipsmall_index": "999", "tar_size": "1"}))
    assert isinstance(table, pa.Table)
    assert check(tmp_path) == 1
    assert "--rebuild" in report(tmp_path)["unusable"][str(shard)]
    assert check(tmp_path, "--rebuild") == 0
