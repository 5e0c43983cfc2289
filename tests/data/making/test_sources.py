"""Tests of every kind of input that make_shards takes."""

import json
import zipfile
from pathlib import Path

import pandas as pd
import pytest

from tests.shard_samples import COLOURS, by_index, check_colours, make_photos, picture, run


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return make_photos(tmp_path)


def pack(photos: Path) -> Path:
    archive = photos.parent / "photos.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for path in sorted((photos / "images").iterdir()):
            file.write(path, f"images/{path.name}")
    return archive


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet"])
def test_tables(photos: Path, tmp_path: Path, kind: str) -> None:
    table = pd.read_csv(photos / "photos.csv")
    path = photos / f"other.{kind}"
    match kind:
        case "parquet":
            table.to_parquet(path)
        case "jsonl":
            table.to_json(path, orient="records", lines=True)
        case _:
            table.to_csv(path, sep="\t" if kind == "tsv" else ",", index=False)
    assert run(path, tmp_path / "out", "--pairs_per_shard", 5) == 0
    assert len(list((tmp_path / "out").glob("*.tar"))) == 3
    check_colours(tmp_path / "out")


def test_zip_with_table_either_way_round(photos: Path, tmp_path: Path) -> None:
    archive = pack(photos)
    table = tmp_path / "elsewhere.csv"
    (photos / "photos.csv").rename(table)
    assert run(archive, tmp_path / "a", "--table", table) == 0
    assert run(table, tmp_path / "b", "--images", archive) == 0
    check_colours(tmp_path / "a")
    assert (tmp_path / "a/00000.tar").read_bytes() == (tmp_path / "b/00000.tar").read_bytes()


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("layout", ["classes", "txt", "metadata"])
def test_image_folders_and_zips(tmp_path: Path, layout: str, zipped: bool) -> None:
    files: dict[str, bytes] = {}
    for colour in COLOURS:
        folder = f"{colour}_box/" if layout == "classes" else ""
        files[f"{folder}{COLOURS.index(colour):02d}.png"] = picture(colour)
        files[f"{folder}.hidden.png"] = b"never read"
        if layout == "txt":
            files[f"{COLOURS.index(colour):02d}.txt"] = f"a {colour} box\na second line".encode()
    if layout == "metadata":
        lines = [{"file_name": f"{i:02d}.png", "text": f"a {c} box"} for i, c in enumerate(COLOURS)]
        files["metadata.jsonl"] = "\n".join(json.dumps(line) for line in lines).encode()
    source = tmp_path / ("in.zip" if zipped else "in")
    for name, data in files.items():
        if zipped:
            with zipfile.ZipFile(source, "a") as file:
                file.writestr(name, data)
        else:
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes(data)
    assert run(source, tmp_path / "out") == 0
    found = by_index(tmp_path / "out").values()
    assert {(s["caption"], s[".image"]) for s in found} == {
        (f"{c} box" if layout == "classes" else f"a {c} box", picture(c)) for c in COLOURS
    }
    assert {s.get("label") for s in found} == (
        {f"{c}_box" for c in COLOURS} if layout == "classes" else {None}
    )
    if layout == "txt":
        assert all(s["captions"] == [s["caption"], "a second line"] for s in found)


@pytest.mark.parametrize("kind", ["disk", "dict", "parquet", "hf_parquet", "plain_bytes"])
def test_datasets_and_bytes_in_parquet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    source = tmp_path / "source"
    columns = {
        "photo": [{"bytes": picture(c), "path": None} for c in COLOURS],
        "texts": [[f"a {c} box", f"{c}!"] for c in COLOURS],
        "kind": [i % 2 for i in range(len(COLOURS))],
    }
    features = datasets.Features(
        photo=datasets.Image(),
        texts=datasets.List(datasets.Value("string")),
        kind=datasets.ClassLabel(names=["a", "b"]),
    )
    made = datasets.Dataset.from_dict(columns, features=features)
    options = ["--caption", "texts", "--label", "kind"]
    if kind == "disk":
        made.save_to_disk(source)
    elif kind == "dict":
        datasets.DatasetDict(train=made, test=made.select([0])).save_to_disk(source)
        # which split?
        assert run(f"hf:{source}", tmp_path / "out", *options) == 2
        options += ["--split", "train"]
    elif kind == "plain_bytes":
        source = tmp_path / "plain.parquet"
        frame = pd.DataFrame({"image": [picture(c) for c in COLOURS], "texts": columns["texts"]})
        frame.assign(kind=["a", "b"] * 6).to_parquet(source)
    else:
        source.mkdir()
        made.to_parquet(source / "train.parquet")
        options += ["--image", "photo"]
        source = source / "train.parquet" if kind == "parquet" else source
    name = str(source) if source.suffix == ".parquet" else f"hf:{source}"
    assert run(name, tmp_path / "out", *options) == 0
    found = by_index(tmp_path / "out")
    for number, colour in enumerate(COLOURS):
        assert found[number]["captions"] == [f"a {colour} box", f"{colour}!"]
        assert found[number][".image"] == picture(colour)
        assert found[number]["label"] == "ab"[number % 2]
    before = (tmp_path / "out/00000.tar").stat().st_mtime_ns
    # the fingerprint of a data set does not change by itself
    assert run(name, tmp_path / "out", *options) == 0
    assert (tmp_path / "out/00000.tar").stat().st_mtime_ns == before


def test_rows_of_one_image_become_one_pair(photos: Path, tmp_path: Path) -> None:
    table = pd.DataFrame(
        {
            "image": [
                "images/red.png",
                "images/blue.png",
                "images/red.png",
                "images/blue.png",
                "images/pink.png",
            ],
            "caption": ["red one", "blue one", "red two|red three", "blue one", "pink"],
            "set": ["x", "x", "y", "y", "y"],
        }
    )
    table.to_csv(photos / "many.csv", index=False)
    options = ["--caption_split", "|", "--keep", "set", "--shuffle", "none"]
    assert run(photos / "many.csv", tmp_path / "path", *options) == 0
    found = by_index(tmp_path / "path")
    assert [found[i].get("captions") for i in range(3)] == [
        ["red one", "red two", "red three"],
        None,
        None,
    ]
    assert [found[i]["caption"] for i in range(3)] == ["red one", "blue one", "pink"]
    assert [found[i]["set"] for i in range(3)] == ["x", "x", "y"]
    assert run(photos / "many.csv", tmp_path / "set", "--group", "set") == 0
    assert by_index(tmp_path / "set")[1]["captions"] == ["red two|red three", "blue one", "pink"]


def test_several_caption_columns_kept_fields_and_where(photos: Path, tmp_path: Path) -> None:
    table = pd.read_csv(photos / "photos.csv").assign(
        alt=[f"{c}?" for c in COLOURS], index=range(100, 112)
    )
    table.loc[0, "kind"] = None
    table.to_csv(photos / "photos.csv", index=False)
    where = "size % 3 == 0 and caption.str.contains('box')"
    options = ("--caption", "alt,caption", "--keep", "kind,index", "--where", where)
    assert run(photos / "photos.csv", tmp_path / "out", *options) == 0
    found = by_index(tmp_path / "out")
    assert [found[i]["captions"] for i in range(4)] == [
        [f"{c}?", f"a {c} box"] for c in COLOURS[::3]
    ]
    assert [found[i]["kind"] for i in range(4)] == [None, "b", "a", "b"]
    # never our own `index`
    assert [found[i]["input_index"] for i in range(4)] == [
        100,
        103,
        106,
        109,
    ]
