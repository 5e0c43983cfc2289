"""Tests of the streaming reader: right pairs, unique numbers, everything bad counted, nothing
executed.
"""

import http.server
import json
import os
import pickle
import random
import threading
from collections import Counter
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path

import fsspec
import pytest
import torch
from torch import Tensor

from clipsmall.batch import Pairs
from clipsmall.data import (
    LoadedBatch,
    ShardError,
    Skips,
    StreamedBatches,
    batch_loader,
    caption_hash,
    remote,
)
from clipsmall.data.preprocess import ImageSpec, ImageTransform
from tests.shard_samples import pair_members, picture, write_tar

COLOURS = {"red": (255, 0, 0), "lime": (0, 255, 0), "blue": (0, 0, 255), "white": (255, 255, 255)}
NAMES = sorted(COLOURS)
pytestmark = pytest.mark.filterwarnings("ignore:streaming")


def numbers(captions: list[str]) -> Tensor:
    """(n, 2): which colour a caption names, and its number."""
    words = [caption.split() for caption in captions]
    return torch.tensor([[NAMES.index(colour), int(number)] for colour, number in words])


def good(shard: int, pairs: int = 40) -> list[tuple[str, bytes]]:
    """Flat pictures, captioned `COLOUR NUMBER`."""
    found = []
    for pair in range(pairs):
        colour = NAMES[pair % len(NAMES)]
        found += pair_members(
            f"{shard:05d}{pair:04d}", picture(colour), f"{colour} {shard * pairs + pair}"
        )
    return found


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four shards of 40 pairs, without an index."""
    folder = tmp_path_factory.mktemp("stream")
    for shard in range(4):
        write_tar(folder / f"{shard:05d}.tar", good(shard))
    return folder


def streamed(
    urls: object, rank: int = 0, world: int = 1, batch: int = 8, **options: object
) -> StreamedBatches:
    where = [str(url) for url in urls] if isinstance(urls, list) else str(urls)
    image = ImageTransform(
        ImageSpec(4), options.pop("crop_scale", 1.0), options.pop("max_pixels", 10_000)
    )
    return StreamedBatches(where, image, numbers, batch, rank, world, **{"shuffle": 16, **options})


def first(batches: Iterator[LoadedBatch], count: int) -> tuple[Pairs, Skips]:
    """The first `count` batches as one."""
    loaded = list(islice(batches, count))
    skips = Skips()
    for batch in loaded:
        skips.merge(batch.skips)
    return Pairs(*map(torch.cat, zip(*[batch.pairs for batch in loaded], strict=True))), skips


def of(urls: object, count: int = 6, **options: object) -> tuple[Pairs, Skips]:
    return first(iter(streamed(urls, **options)), count)


def check_colours(pairs: Pairs) -> None:
    """Every caption names the colour of its picture, and the hash is its own."""
    wanted = torch.tensor([COLOURS[NAMES[n]] for n in pairs.text[:, 0].tolist()])
    assert pairs.image.dtype == torch.uint8
    assert torch.equal(pairs.image.long(), wanted.view(-1, 3, 1, 1).expand(-1, 3, 4, 4))
    hashes = [caption_hash(f"{NAMES[colour]} {number}") for colour, number in pairs.text.tolist()]
    assert pairs.caption_hash.tolist() == hashes


def test_captions_belong_to_their_pictures(shards: Path) -> None:
    pairs, skips = of(shards, 40)
    check_colours(pairs)
    assert pairs.index.tolist() == list(range(320))
    assert (skips.seen, skips.total) == (320, 0)
    # of 160: several shards, drawn with replacement
    assert len(set(pairs.text[:, 1].tolist())) > 80


def test_ranks_and_workers_stream_apart(shards: Path) -> None:
    def flow(rank: int, workers: int) -> list[Pairs]:
        loader = batch_loader(streamed(shards, rank, 2, batch=16), None, workers)
        return [batch.pairs for batch in islice(iter(loader), 8)]

    flows = [flow(0, 2), flow(1, 2)]
    assert all(len(pairs.index) == 8 for pairs in [*flows[0], *flows[1]])
    for pairs in [*flows[0], *flows[1]]:
        check_colours(pairs)
    places = torch.cat([pairs.index for flow in flows for pairs in flow])
    assert len(places.unique()) == len(places) == 128
    # loaders take turns among workers: streams are rank x worker
    orders = [
        tuple(torch.cat([p.text[:, 1] for p in flow[w::2]]).tolist())
        for flow in flows
        for w in range(2)
    ]
    assert len(set(orders)) == 4
    again = flow(1, 2)
    assert all(
        torch.equal(a, b)
        for x, y in zip(flows[1], again, strict=True)
        for a, b in zip(x, y, strict=True)
    )


def test_seed_and_start_change_the_draws(shards: Path) -> None:
    later = streamed(shards)
    later.start = 6
    orders = [of(shards)[0].text, of(shards, seed=1)[0].text, first(iter(later), 6)[0].text]
    assert len({str(order.tolist()) for order in orders}) == 3
    assert first(iter(later), 6)[0].index.min() == 48


def test_random_crops_leave_the_global_generator_alone(shards: Path) -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    check_colours(of(shards, crop_scale=0.3)[0])
    assert torch.equal(torch.get_rng_state(), before)


def test_bad_members_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "MAX_IMAGE_BYTES", 4_000)
    white = picture("white")
    deep = b"[" * 100_000
    write_tar(
        tmp_path / "0.tar",
        [
            *good(0, 20),
            ("picture.png", b"no picture"),
            ("picture.txt", b"white 1"),
            ("giant.png", picture("white", size=(200, 100))),
            ("giant.txt", b"white 1"),
            ("heavy.png", random.Random(0).randbytes(5_000)),
            ("heavy.txt", b"white 1"),
            ("wordless.png", white),
            ("blank.png", white),
            ("blank.txt", b" \n"),
            ("latin.png", white),
            ("latin.txt", "café".encode("latin-1")),
            ("surrogate.png", white),
            ("surrogate.json", rb'{"captions": ["white \ud800 1"]}'),
            ("long.png", white),
            ("long.txt", b"white " * 200_000),
            ("deep.png", white),
            ("deep.json", deep),
            ("integer.png", white),
            ("integer.json", b'{"index": ' + b"1" * 5_000 + b"}"),
            ("blind.txt", b"white 1"),
            ("half.png", white[:50]),
            ("half.txt", b"white 1"),
            ("twice.png", white),
            ("twice.png", white),
            ("twice.txt", b"white 1"),
            ("list.png", white),
            ("list.json", b"[1]"),
            ("list.txt", b"white 1"),
        ],
    )
    pairs, skips = of(tmp_path, 40, max_pixels=10_000)
    check_colours(pairs)
    assert set(skips.reasons) == {
        "not an image",
        "too many pixels",
        "image over 256 MiB",
        "no caption",
        "empty caption",
        "caption is not UTF-8",
        "caption or json over 1 MiB",
        "broken json",
        "no image",
        "truncated or broken image",
        "member comes twice",
    }
    assert skips.examples["not an image"][0].endswith("0.tar:picture")
    assert skips.seen == 320


def test_any_of_several_captions(tmp_path: Path) -> None:
    listed = json.dumps({"captions": ["red 1", "red 2", "red 3"]}).encode()
    write_tar(tmp_path / "0.tar", [("a.png", picture("red")), ("a.json", listed)])
    pairs, _ = of(tmp_path, 8)
    check_colours(pairs)
    assert Counter(pairs.text[:, 1].tolist()).keys() == {1, 2, 3}


@pytest.mark.parametrize("cut", ["end mark", "header", "data", "between jpg and txt"])
def test_cut_shard_is_counted_and_passed(tmp_path: Path, shards: Path, cut: str) -> None:
    whole = (shards / "00000.tar").read_bytes()
    # headers stand at multiples of 512; each member here fills two blocks
    last = whole.rindex(b"000000039.png")
    size = {
        "end mark": last + 512 * 6,
        "header": last + 100,
        "data": last + 600,
        "between jpg and txt": last + 1024,
    }
    (tmp_path / "cut.tar").write_bytes(whole[: size[cut]])
    pairs, skips = of([tmp_path, shards / "00001.tar"], 40)
    check_colours(pairs)
    assert set(skips.reasons) == {"cut shard"}
    shown = set(pairs.text[:, 1].tolist())
    assert shown & set(range(39)), "the pairs before the cut are used"
    assert 39 not in shown, "nobody knows whether the pair at the cut is whole"
    assert shown & set(range(40, 80)), "the other shard follows"


def test_broken_header_in_the_middle_is_a_cut(tmp_path: Path, shards: Path) -> None:
    broken = bytearray((shards / "00000.tar").read_bytes())
    middle = broken.index(b"000000020.png")
    # the header's checksum is wrong now
    broken[middle : middle + 4] = b"????"
    (tmp_path / "broken.tar").write_bytes(broken)
    pairs, skips = of([tmp_path], 20)
    assert skips.reasons["cut shard"] > 0
    assert pairs.text[:, 1].max() < 20


def test_missing_shard_is_counted(shards: Path) -> None:
    pairs, skips = of(["memory://nowhere/0.tar", shards / "00001.tar"], 20)
    check_colours(pairs)
    assert set(skips.reasons) == {"unreachable shard"}
    assert skips.examples["unreachable shard"][0] == "memory://nowhere/0.tar"


def test_all_shards_failing_ends_the_stream(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match=r"no pair in 2 shards.*nowhere/\d.tar: unreachable shard"):
        of("memory://nowhere/{0..1}.tar")
    (tmp_path / "0.tar").write_bytes(b"")
    with pytest.raises(ShardError, match=r"0\.tar: cut shard"):
        of(tmp_path)
    write_tar(tmp_path / "0.tar", [("readme.md", b"nothing here")])
    with pytest.raises(ShardError, match="empty shard"):
        of(tmp_path)
    write_tar(tmp_path / "0.tar", [("a.png", picture("red"))])
    with pytest.raises(ShardError, match=r"10000 bad pairs in a row.*no caption"):
        of(tmp_path)


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("pipe:touch hacked", "pipes are never run"),
        ("nowhere", "no shards there"),
        ("http://127.0.0.1/{00..02}.tar.gz", "compressed"),
        ("http://127.0.0.1/*.tar", "brace list"),
        ("memory://nowhere/*.tar", "no shards there"),
        ("nostore://a/0.tar", "Protocol not known"),
    ],
)
def test_unusable_urls_are_refused(
    url: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ShardError, match=told):
        streamed(url)
    assert not (tmp_path / "hacked").exists()


def test_store_behind_fsspec(shards: Path) -> None:
    for shard in shards.glob("*.tar"):
        fsspec.filesystem("memory").pipe_file(f"/bucket/{shard.name}", shard.read_bytes())
    for urls in ("memory://bucket/{00000..00003}.tar", "memory://bucket/*.tar"):
        assert len(streamed(urls).urls) == 4
        pairs, skips = of(urls)
        check_colours(pairs)
        assert skips.total == 0


def test_web_server(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None: ...

    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), partial(Quiet, directory=shards)
    ) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        here = f"http://127.0.0.1:{server.server_port}"
        pairs, skips = of([f"{here}/{{00000..00003}}.tar", f"{here}/none.tar?signature=secret"], 40)
        server.shutdown()
    check_colours(pairs)
    assert set(skips.reasons) == {"unreachable shard"}
    # signed queries are not printed
    assert skips.examples["unreachable shard"][0] == f"{here}/none.tar"


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple[object, ...]:
            return os.mkdir, (str(tmp_path / "hacked"),)

    payload = pickle.dumps(Payload())
    evil = [(f"a.{suffix}", payload) for suffix in ("pyd", "pkl", "pickle", "pth", "npy", "cls")]
    write_tar(tmp_path / "0.tar", [("a.png", picture("red")), ("a.txt", b"red 1"), *evil])
    check_colours(of(tmp_path)[0])
    assert not (tmp_path / "hacked").exists()


def test_promises_are_told_once_on_the_main_rank(
    shards: Path, recwarn: pytest.WarningsRecorder
) -> None:
    for rank in range(2):
        streamed(shards, rank, 2)
    assert ["not exactly" in str(warning.message) for warning in recwarn] == [True]
    with pytest.raises(ValueError, match="not divisible"):
        streamed(shards, 0, 3)
