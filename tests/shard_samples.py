"""Small pictures, shards written by hand, and what is in a shard."""

import hashlib
import json
import tarfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import pandas as pd
from PIL import Image

from clipsmall.data import open_catalog
from data_tools.make_shards import main

COLOURS = [
    "red",
    "green",
    "blue",
    "navy",
    "teal",
    "olive",
    "gold",
    "pink",
    "grey",
    "black",
    "white",
    "cyan",
]


def picture(colour: str, kind: str = "PNG", size: tuple[int, int] = (12, 8)) -> bytes:
    out = BytesIO()
    Image.new("RGB", size, colour).save(out, kind)
    return out.getvalue()


def run(*args: object) -> int:
    """The exit code of make_shards with these words, in this process unless they say otherwise."""
    words = [str(arg) for arg in args]
    if "--workers" not in words:
        words += ["--workers", "1"]
    return exit_code(main, words)


def exit_code(command: Callable[[list[str]], int], words: list[str]) -> int:
    """Of a command that returns it, or ends with it."""
    try:
        return command(words)
    except SystemExit as ended:
        return int(str(ended.code))


def samples(out: Path) -> dict[str, dict[str, Any]]:
    """Everything in the shards: key -> json fields, with `.image`, `.suffix` and `.txt` added."""
    found: dict[str, dict[str, Any]] = {}
    for shard in sorted(out.glob("*.tar")):
        with tarfile.open(shard) as tar:
            for member in tar:
                data = tar.extractfile(member).read()
                key, suffix = member.name.split(".")
                here = found.setdefault(key, {})
                if suffix == "json":
                    here |= json.loads(data)
                elif suffix == "txt":
                    here[".txt"] = data.decode()
                else:
                    here |= {".image": data, ".suffix": suffix}
    return found


def by_index(out: Path) -> dict[int, dict[str, Any]]:
    return {sample["index"]: sample for sample in samples(out).values()}


def make_photos(tmp_path: Path) -> Path:
    """A folder with images/NAME.png and photos.csv."""
    folder = tmp_path / "photos"
    (folder / "images").mkdir(parents=True)
    for colour in COLOURS:
        (folder / "images" / f"{colour}.png").write_bytes(picture(colour))
    table = pd.DataFrame(
        {"path": [f"images/{c}.png" for c in COLOURS], "caption": [f"a {c} box" for c in COLOURS]}
    )
    table.assign(size=range(len(COLOURS)), kind=["a", "b"] * 6).to_csv(
        folder / "photos.csv", index=False
    )
    return folder


def check_colours(out: Path, captions: str = "a {} box") -> None:
    """Each colour once, under its number in the table, its caption on its picture."""
    found = by_index(out)
    assert sorted(found) == list(range(len(COLOURS)))
    for number, colour in enumerate(COLOURS):
        assert found[number]["caption"] == found[number][".txt"] == captions.format(colour)
        assert found[number][".image"] == picture(colour)
        assert (found[number]["width"], found[number]["height"]) == (12, 8)
    assert len(open_catalog(str(out))) == len(COLOURS)


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    """A tar as other tools write it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, BytesIO(data))
    return path


def pair_members(
    key: str, image: bytes, caption: str | None, **fields: Any
) -> list[tuple[str, bytes]]:
    """A sample as img2dataset lays it out."""
    record = {
        "key": key,
        "caption": caption,
        "status": "success",
        "sha256": hashlib.sha256(image).hexdigest(),
        **fields,
    }
    return [
        (f"{key}.png", image),
        (f"{key}.txt", (caption or "").encode()),
        (f"{key}.json", json.dumps(record).encode()),
    ]
