"""Search is exact, embeddings are made once and noticed to be stale, and the page shows what was
found.

The browser test drives Chromium through ChromeDriver; it is skipped where these, or Gradio, are
missing.
"""

import base64
import json
import os
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from clipsmall.data import build_index, open_catalog, write_index
from clipsmall.evaluation import Encoder, command
from clipsmall.model.dual_encoder import DualEncoder
from clipsmall.model.towers.small import SmallConfig, WordTokenizer, load_small
from clipsmall.search import (
    Answer,
    Exact,
    Hit,
    Searcher,
    answer_html,
    embed,
    index,
    search_page,
)
from clipsmall.search import __main__ as search
from clipsmall.search.store import lock_folder
from tests.bench import search as bench
from tests.meter import Meter
from tests.shard_samples import pair_members, picture, write_tar
from tests.shards_for_tests import TOWERS

# ---- exact search


def brute(
    parts: list[Tensor], rows: Tensor, query: Tensor, k: int
) -> tuple[list[float], list[int]]:
    """Every cosine in float64, to float32; of equal ones the lower row first."""
    whole = torch.cat([part.double() for part in parts])
    cosines = [float((whole[row] @ query.double()).float()) for row in rows.tolist()]
    order = sorted(range(len(rows)), key=lambda place: (-cosines[place], place))[:k]
    return [cosines[place] for place in order], rows[torch.tensor(order)].tolist()


def found(
    parts: list[Tensor], rows: Tensor, query: Tensor, k: int
) -> tuple[list[float], list[int]]:
    cosines, best = Exact(parts, rows)(query, k)
    return cosines.tolist(), best.tolist()


def units(count: int, width: int = 24, seed: int = 0) -> Tensor:
    return F.normalize(
        torch.randn(count, width, generator=torch.Generator().manual_seed(seed)), dim=1
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("sizes", [[50], [8, 8, 8], [7, 0, 9, 1, 16, 17], [1, 1, 1]])
def test_the_best_are_those_of_brute_force(
    dtype: torch.dtype, sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index, "CHUNK", 8)
    count = sum(sizes)
    whole = units(count)
    # each twice, in other chunks
    whole[count // 2 :] = whole[: count - count // 2].clone()
    parts = list(whole.to(dtype).split(sizes))
    every = torch.arange(count)
    for rows in (
        every,
        every[::2].clone(),
        every[count // 3 :],
        every[-1:],
        every[(every % 5 == 0) | (every > 20)],
    ):
        for k in {1, 2, len(rows) // 2 + 1, len(rows)}:
            if k <= len(rows):
                query = units(1, seed=k)[0]
                assert found(parts, rows, query, k) == brute(parts, rows, query, k)


@pytest.mark.parametrize("part", [1, 3, 5, 8, 13])
def test_equal_rows_come_in_order_wherever_they_are_cut(
    part: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """BLAS sums a row in another order at the edge of a block."""
    monkeypatch.setattr(index, "CHUNK", 5)
    rows = torch.arange(40)
    same = units(1, 515)
    parts = list(same.half().expand(40, -1).contiguous().split(part))
    query = units(1, 515, seed=1)[0]
    cosines, best = found(parts, rows, query, 17)
    assert best == list(range(17))
    assert len(set(cosines)) == 1


def test_differences_that_float32_products_lose_still_rank() -> None:
    base = units(1, 512)[0]
    nudge = units(1, 512, seed=1)[0]
    steps = torch.randperm(400, generator=torch.Generator().manual_seed(0)).double()
    rows = (base.double() + 2e-7 * steps[:, None] * nudge.double()).float()
    query = F.normalize(nudge + 0.1 * base, dim=0)
    assert found([rows], torch.arange(400), query, 30) == brute(
        [rows], torch.arange(400), query, 30
    )


def test_memory_is_bounded_by_a_number_a_row_and_a_chunk() -> None:
    count = 50_000
    width = 64
    # every row ties with 499 others
    part = units(100, width).half().repeat(count // 100, 1)
    query = units(1, width, seed=1)[0]
    with Meter() as meter:
        Exact([part], torch.arange(count))(query, 600)
    # all in float32 would be 12.8 MB
    assert meter.peak_bytes < 3 * 8 * count + 3 * 8 * index.CHUNK * width


@pytest.mark.parametrize("k", [0, -1, 11])
def test_k_must_be_there(k: int) -> None:
    with pytest.raises(ValueError, match=rf"k={k}: there are 10 to choose from"):
        Exact([units(10)], torch.arange(10))(units(1)[0], k)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_features_that_are_not_finite_are_refused(value: float) -> None:
    parts = [units(10), units(10)]
    parts[1][3, 2] = value
    with pytest.raises(ValueError, match="1 of 20 cosines are not finite"):
        Exact(parts, torch.arange(20))(units(1)[0], 2)


def test_faiss_is_asked_for_by_name() -> None:
    if find_spec("faiss") is None:
        with pytest.raises(ValueError, match="pip install faiss-cpu"):
            index.Faiss([units(4)], torch.arange(4))
        return
    parts = list(units(100).half().split(30))
    rows = torch.arange(0, 100, 3)
    query = units(1, seed=1)[0]
    cosines, best = index.Faiss(parts, rows)(query, 9)
    expected, places = Exact(parts, rows)(query, 9)
    torch.testing.assert_close(cosines, expected)
    assert best.tolist() == places.tolist()


# ---- embeddings

COLOURS = [
    "red",
    "green",
    "blue",
    "gold",
    "pink",
    "grey",
    "black",
    "white",
    "cyan",
    "navy",
    "teal",
    "olive",
]
NASTY = (
    "<img src=x onerror=\"document.title='owned'\"> ${document.title='owned'} {{value}} <b>navy</b>"
)


def made_encoder(seed: int = 0, batch_size: int = 5) -> Encoder:
    config = SmallConfig.model_validate(TOWERS)
    torch.manual_seed(seed)
    loaded = load_small(config, WordTokenizer.train([f"a {c} box" for c in COLOURS], config.text))
    model = DualEncoder(loaded.towers, loaded.spec, 1.0, 0.0, False)
    return Encoder(model.eval(), loaded.tokenize, torch.device("cpu"), batch_size)


def write_shard(path: Path, colours: list[str], broken: tuple[str, ...] = ()) -> None:
    members = []
    for colour in colours:
        captions = (
            [f"a {colour} box", f"{colour} paper", "a Box"] if colour in ("green", "pink") else None
        )
        first = NASTY if colour == "navy" else f"a {colour} box"
        image = b"no image" if colour in broken else picture(colour)
        members += pair_members(
            colour, image, first, **({"captions": captions} if captions else {})
        )
    write_index(write_tar(path, members), build_index(path))


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Three shards of four colours; two of the first three pictures with three captions, one
    picture broken.
    """
    for number in range(3):
        write_shard(
            tmp_path / "data" / f"{number:05d}.tar", COLOURS[4 * number : 4 * number + 4], ("blue",)
        )
    return tmp_path / "data"


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Shards whose images are encoded, in order."""
    names: list[str] = []
    plain = Encoder.images

    def images(self: Encoder, catalog: Any, only: Any = None) -> Any:
        names.append(catalog.shards[0].stem)
        return plain(self, catalog, only)

    monkeypatch.setattr(Encoder, "images", images)
    return names


def test_embeddings_lie_as_clip_retrieval_lays_them(shards: Path, tmp_path: Path) -> None:
    encoder = made_encoder()
    catalog = open_catalog(str(shards))
    stored = embed(encoder, catalog, tmp_path / "emb")
    folder = tmp_path / "emb"
    kinds = {"img_emb": "npy", "text_emb": "npy", "metadata": "parquet"}
    names = {f"{kind}/{kind}_{number}.{end}" for kind, end in kinds.items() for number in range(3)}
    assert {str(p.relative_to(folder)) for p in folder.rglob("*.*")} == names | {"embeddings.json"}
    image, text = (
        np.concatenate([np.load(folder / k / f"{k}_{n}.npy") for n in range(3)])
        for k in list(kinds)[:2]
    )
    table = pd.concat(
        [pd.read_parquet(folder / "metadata" / f"metadata_{number}.parquet") for number in range(3)]
    )
    keys = ["red", "green", "green", "green", "gold", "pink", "pink", "pink", *COLOURS[5:]]
    assert table["key"].tolist() == keys
    assert table["shard"].tolist() == ["00000.tar"] * 5 + ["00001.tar"] * 6 + ["00002.tar"] * 4
    assert table["row"].tolist() == [0, 1, 1, 1, 3, 0, 0, 0, 1, 2, 3, 0, 1, 2, 3]
    assert table["caption"].tolist()[1:5] == ["a green box", "green paper", "a Box", "a gold box"]
    assert image.dtype == text.dtype == np.float16
    truth, rows = encoder.images(catalog)
    expected = truth.half()[
        torch.repeat_interleave(torch.arange(len(rows)), torch.tensor([1, 3, 1, 3, *[1] * 7]))
    ]
    assert torch.equal(torch.from_numpy(image), expected)
    assert torch.equal(torch.from_numpy(text), encoder.texts(table["caption"].tolist()).half())
    assert stored.broken == 1
    assert [COLOURS[row] for row in stored.rows.tolist()] == keys
    assert [keys[row] for row in stored.distinct_images().tolist()] == [
        c for c in COLOURS if c != "blue"
    ]
    captions = [stored.captions[row].as_py() for row in stored.distinct_captions().tolist()]
    assert sorted(captions) == sorted(set(table["caption"]))
    # "a Box" twice
    assert len(captions) == len(keys) - 1


def test_many_shards_are_numbered_so_that_names_sort(tmp_path: Path) -> None:
    for number in range(11):
        write_shard(tmp_path / "data" / f"{number:05d}.tar", [COLOURS[number]])
    stored = embed(made_encoder(), open_catalog(str(tmp_path / "data")), tmp_path / "emb")
    files = sorted((tmp_path / "emb" / "metadata").iterdir())
    assert [file.name for file in files[:2]] == ["metadata_00.parquet", "metadata_01.parquet"]
    assert (
        pd.concat([pd.read_parquet(file) for file in files])["key"].unique().tolist()
        == COLOURS[:11]
    )
    assert stored.rows.unique().tolist() == list(range(11))


def test_what_is_there_is_not_made_again(
    shards: Path, tmp_path: Path, made: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = made_encoder()
    catalog = open_catalog(str(shards))
    folder = tmp_path / "emb"
    plain = Encoder.texts

    def stopped(self: Encoder, captions: Any) -> Tensor:
        if "a cyan box" in captions:
            raise KeyboardInterrupt
        return plain(self, captions)

    with monkeypatch.context() as patch:
        patch.setattr(Encoder, "texts", stopped)
        with pytest.raises(KeyboardInterrupt):
            embed(encoder, catalog, folder)
    assert made == ["00000", "00001", "00002"]
    first = embed(encoder, catalog, folder)
    assert made[3:] == ["00002"]
    second = embed(made_encoder(), open_catalog(str(shards)), folder)
    assert made[4:] == []
    assert all(torch.equal(a, b) for a, b in zip(first.images, second.images, strict=True))


def test_another_model_is_noticed(
    shards: Path, tmp_path: Path, made: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    catalog = open_catalog(str(shards))
    folder = tmp_path / "emb"
    old = embed(made_encoder(), catalog, folder, "old").images[0].clone()
    del made[:]
    new = embed(made_encoder(seed=1), catalog, folder, "new").images[0]
    assert made == ["00000", "00001", "00002"]
    assert not torch.equal(old, new)
    assert "of another model (old" in capsys.readouterr().err
    assert json.loads((folder / "embeddings.json").read_text())["model"] == "new"


@pytest.mark.parametrize("part", ["weight", "activation", "preprocessing", "tokens"])
def test_all_that_makes_a_model_counts(
    part: str, shards: Path, tmp_path: Path, made: list[str]
) -> None:
    catalog = open_catalog(str(shards))
    encoder = made_encoder()
    embed(encoder, catalog, tmp_path / "emb")
    del made[:]
    if part == "weight":
        next(encoder.model.towers.parameters()).data.view(-1)[-1] += 1e-6
    elif part == "activation":
        name = next(
            name
            for name, module in encoder.model.named_modules()
            if isinstance(module, torch.nn.GELU)
        )
        encoder.model.set_submodule(name, torch.nn.ReLU())
    elif part == "preprocessing":
        encoder.model.spec = type(encoder.model.spec)(
            **{**vars(encoder.model.spec), "resize": "squash"}
        )
    else:
        tokens = encoder.tokenize
        encoder.tokenize = lambda captions: tokens(["box " + caption for caption in captions])
    embed(encoder, catalog, tmp_path / "emb")
    assert made == ["00000", "00001", "00002"]


@pytest.mark.parametrize("change", ["replaced", "same size", "marked", "cut", "gone", "other rows"])
def test_only_the_changed_shard_is_made_again(
    change: str, shards: Path, tmp_path: Path, made: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "emb"
    embed(made_encoder(), open_catalog(str(shards)), folder)
    del made[:]
    shard = shards / "00001.tar"
    image = folder / "img_emb" / "img_emb_1.npy"
    if change == "replaced":
        write_shard(shard, ["tan", "grey"])
    elif change == "same size":
        shard.write_bytes(shard.read_bytes().replace(b"a grey box", b"a gray box"))
        write_index(shard, build_index(shard))
    elif change == "marked":
        # as `check_shards --decode` does
        table = build_index(shard)
        status = ["not an image", *table["status"].to_pylist()[1:]]
        place = table.schema.get_field_index("status")
        write_index(shard, table.set_column(place, table.schema.field(place), [status]))
    elif change == "cut":
        os.truncate(image, image.stat().st_size - 1)
    elif change == "gone":
        image.unlink()
    else:
        shutil.copy(folder / "img_emb" / "img_emb_0.npy", image)
    stored = embed(made_encoder(), open_catalog(str(shards)), folder)
    assert made == ["00001"]
    assert "1 of 3 shards have changed" in capsys.readouterr().err
    keys = pd.read_parquet(folder / "metadata" / "metadata_1.parquet")["key"].unique().tolist()
    assert keys == {"replaced": ["tan", "grey"], "marked": COLOURS[5:8]}.get(change, COLOURS[4:8])
    assert len(stored.rows) == sum(map(len, stored.images))


def test_parts_of_shards_that_are_gone_go(shards: Path, tmp_path: Path) -> None:
    embed(made_encoder(), open_catalog(str(shards)), tmp_path / "emb")
    other = tmp_path / "emb" / "img_emb" / "notes.txt"
    other.write_text("kept")
    (shards / "00002.tar").unlink()
    stored = embed(made_encoder(), open_catalog(str(shards)), tmp_path / "emb")
    assert sorted(p.name for p in other.parent.iterdir()) == [
        "img_emb_0.npy",
        "img_emb_1.npy",
        "notes.txt",
    ]
    assert len(stored.images) == 2


def test_broken_images_are_left_out_and_counted(tmp_path: Path) -> None:
    write_shard(tmp_path / "data" / "00000.tar", COLOURS[:2], ("red", "green"))
    with pytest.raises(ValueError, match="none of 2 images can be read"):
        embed(made_encoder(), open_catalog(str(tmp_path / "data")), tmp_path / "emb")
    write_shard(tmp_path / "data" / "00001.tar", COLOURS[2:5], ("gold",))
    catalog = open_catalog(str(tmp_path / "data"))
    stored = embed(made_encoder(), catalog, tmp_path / "emb")
    assert stored.broken == 3
    searcher = Searcher(made_encoder(), catalog, stored)
    assert (searcher.images, searcher.captions) == (2, 4)
    assert {hit.image for hit in searcher.by_text("a blue box", 2).images} == {
        picture("blue"),
        picture("pink"),
    }


def test_a_folder_of_something_else_is_left_alone(shards: Path, tmp_path: Path) -> None:
    catalog = open_catalog(str(shards))
    (tmp_path / "photos" / "img_emb").mkdir(parents=True)
    (tmp_path / "photos" / "img_emb" / "img_emb_7.npy").write_bytes(b"mine")
    (tmp_path / "file").write_text("mine")
    for name in ("photos", "file"):
        with pytest.raises(ValueError, match="holds something else than our embeddings"):
            embed(made_encoder(), catalog, tmp_path / name)
    assert (tmp_path / "photos" / "img_emb" / "img_emb_7.npy").read_bytes() == b"mine"
    for text in ("", "[]", "{}", '{"version": 99}'):
        (tmp_path / "photos" / "embeddings.json").write_text(text)
        with pytest.raises(ValueError, match=r"embeddings.json: not a record of version 1"):
            embed(made_encoder(), catalog, tmp_path / "photos")


def test_a_diverged_model_is_refused(shards: Path, tmp_path: Path) -> None:
    encoder = made_encoder()
    for parameter in (
        encoder.model.towers.image_tower.parameters()
        if hasattr(encoder.model.towers, "image_tower")
        else encoder.model.towers.parameters()
    ):
        parameter.data.fill_(torch.nan)
    with pytest.raises(ValueError, match=r"00000.tar: image features are not finite"):
        embed(encoder, open_catalog(str(shards)), tmp_path / "emb")
    assert not list((tmp_path / "emb").rglob("*.npy"))


# ---- answers


@pytest.fixture
def searcher(shards: Path, tmp_path: Path) -> Searcher:
    encoder = made_encoder()
    catalog = open_catalog(str(shards))
    return Searcher(encoder, catalog, embed(encoder, catalog, tmp_path / "emb"))


def test_a_text_finds_pictures(searcher: Searcher, tmp_path: Path) -> None:
    before = set(tmp_path.rglob("*"))
    encoder = searcher.encoder
    catalog = searcher.catalog
    features, rows = encoder.images(catalog)
    query = encoder.texts(["a pink box"])[0]
    expected = brute([features.half()], torch.arange(len(rows)), query, 11)
    answer = searcher.by_text("  a pink\n box ", 11)
    assert [hit.image for hit in answer.images] == [
        catalog.read(int(rows[row])).image for row in expected[1]
    ]
    np.testing.assert_allclose([hit.cosine for hit in answer.images], expected[0], atol=1e-6)
    firsts = {
        picture(colour): NASTY if colour == "navy" else f"a {colour} box" for colour in COLOURS
    }
    assert all(hit.caption == firsts[hit.image] for hit in answer.images)
    assert answer.captions == []
    assert answer.embedding > 0 < answer.comparing
    # pictures are not written anywhere
    assert set(tmp_path.rglob("*")) == before


def test_a_picture_finds_itself_and_captions(searcher: Searcher) -> None:
    answer = searcher.by_image(picture("pink", "PNG", (12, 8)), 11)
    assert answer.images[0].image == picture("pink")
    assert answer.images[0].cosine == pytest.approx(1, abs=1e-3)
    captions = sorted({each.as_py() for each in searcher.found.captions})
    features = searcher.encoder.texts(captions)
    # blue is not there
    query = searcher.encoder.images(searcher.catalog)[0][3]
    expected = (features.half().double() @ query.double()).topk(11)
    assert [hit.caption for hit in answer.captions] == [
        captions[place] for place in expected.indices.tolist()
    ]
    np.testing.assert_allclose([hit.cosine for hit in answer.captions], expected.values, atol=1e-6)


def test_fewer_captions_than_pictures_are_all_shown(tmp_path: Path) -> None:
    members = [
        each
        for c in COLOURS
        for each in pair_members(c, picture(c), f"{'A' if c == 'red' else 'a'} box")
    ]
    path = tmp_path / "data" / "00000.tar"
    write_index(write_tar(path, members), build_index(path))
    encoder = made_encoder()
    catalog = open_catalog(str(path))
    answer = Searcher(encoder, catalog, embed(encoder, catalog, tmp_path / "emb")).by_image(
        picture("red"), 12
    )
    assert (len(answer.images), [hit.caption for hit in answer.captions]) == (12, ["A box"])


def test_queries_that_cannot_be_answered(searcher: Searcher) -> None:
    for text in ("", " \n"):
        with pytest.raises(ValueError, match="the query is empty"):
            searcher.by_text(text, 3)
    with pytest.raises(ValueError, match="this picture cannot be used: not an image"):
        searcher.by_image(b"<svg/>", 3)
    with pytest.raises(ValueError, match="k=12: there are 11 to choose from"):
        searcher.by_text("a pink box", 12)


def test_html_escapes_captions_and_holds_its_pictures() -> None:
    hits = [Hit(0.5, NASTY, picture("red")), Hit(-0.25, "plain", picture("red", size=(600, 400)))]
    page_ = answer_html.answer_html(Answer(0.004, 0.02, hits, [Hit(0.1, NASTY, b"")]), 1234)
    assert "<b>" not in page_
    assert "<img src=x" not in page_
    # a caption; a picture's caption, alt and title
    assert page_.count("&lt;b&gt;navy&lt;/b&gt;") == 4
    assert page_.count('src="data:image/') == 2
    assert base64.b64encode(picture("red")).decode() in page_
    assert "20.0 ms to search 1,234 images, 4.0 ms to embed the query" in page_
    assert "0.500" in page_
    assert "-0.250" in page_
    assert "<img" not in answer_html.note_html(NASTY)


def test_the_page_says_what_is_wrong_with_a_query(searcher: Searcher) -> None:
    wrong = search_page.answer_or_error(lambda: searcher.by_text(" ", 3), searcher.images)
    assert "the query is empty" in wrong
    right = search_page.answer_or_error(lambda: searcher.by_text("a box", 3), searcher.images)
    assert right.count("<figure>") == 3


# ---- the command


@pytest.fixture
def ask(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """The command with a model of random weights, in `tmp_path`; a page that would open is not."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(search_page, "require_gradio", lambda: None)
    encoder = made_encoder()
    tokenize = type("Loaded", (), {"tokenize": staticmethod(encoder.tokenize)})
    loaded = (encoder.model, tokenize)
    monkeypatch.setattr(command, "load_model", lambda name, pretrained: loaded)

    class Made:
        def block_thread(self) -> None:
            raise AssertionError("served")

    monkeypatch.setattr(search_page, "build_search_page", lambda *args: Made())
    monkeypatch.setattr(search_page, "launch_search_page", lambda made, port: "http://127.0.0.1:1")
    return lambda *words: search.main(["model", "--data", str(shards), "--device=cpu", *words])


def test_the_command_embeds_and_serves(
    ask: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(AssertionError, match="served"):
        ask()
    (folder,) = (tmp_path / "embeddings").glob(f"{tmp_path.name}-data-model-*")
    assert (folder / "embeddings.json").exists()
    said = capsys.readouterr()
    assert "12 pairs; left out: 0 by their index, 1 unreadable images" in said.err
    assert "http://127.0.0.1:1" in said.out


def test_other_weights_or_shards_have_a_folder_of_their_own(
    ask: Callable[..., int], tmp_path: Path
) -> None:
    for number, words in enumerate(
        [[], ["--pretrained=tag"], ["--data", str(tmp_path / "data" / "00000.tar")], []]
    ):
        with pytest.raises(AssertionError, match="served"):
            ask(*words)
        assert len(list((tmp_path / "embeddings").iterdir())) == min(number + 1, 3)


def test_two_commands_do_not_embed_into_one_folder(shards: Path, tmp_path: Path) -> None:
    encoder = made_encoder()
    catalog = open_catalog(str(shards))
    with (
        lock_folder(tmp_path / "emb"),
        pytest.raises(ValueError, match="emb: another command embeds there"),
    ):
        embed(encoder, catalog, tmp_path / "emb")
    assert embed(encoder, catalog, tmp_path / "emb").rows.numel()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--k=12"], "--k=12: the data set has 11 images"),
        (["--k=0"], "--k=0: the data set has 11 images"),
        (["--device=toaster"], "--device=toaster"),
        (["--batch_size=0"], "batch_size=0"),
        (["--embeddings", "data"], "data: holds something else"),
        (["--data", "nowhere"], "nowhere: no shards there"),
        *(
            []
            if find_spec("faiss")
            else [(["--index=faiss"], "--index=faiss: it is not installed")]
        ),
    ],
)
def test_bad_input_ends_with_2(
    words: list[str], message: str, ask: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        ask(*words)
    assert end.value.code == 2
    assert f"error: {message}" in capsys.readouterr().err


def test_without_gradio_it_says_how_to_get_it(
    shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(search_page, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as end:
        search.main(["model", "--data", str(shards)])
    assert end.value.code == 2
    assert "pip install 'clipsmall[demo]'" in capsys.readouterr().err
    assert not (tmp_path / "embeddings").exists()


def test_the_bench_times_every_side(tmp_path: Path) -> None:
    bench.main(
        ["--sizes", "300", "--width", "16", "--rounds", "2", "--json", str(tmp_path / "out.json")]
    )
    found = {
        row["side"]: row["ms"] for row in json.loads((tmp_path / "out.json").read_text())["results"]
    }
    assert found.keys() >= {"exact", "dense"}
    assert found["exact"]["median"] >= found["exact"]["best"] > 0


# ---- the page in a browser

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
needs_browser = pytest.mark.skipif(
    not (find_spec("gradio") and CHROMIUM and DRIVER),
    reason="needs gradio, chromium and chromedriver",
)
FLAGS = [
    "headless",
    "no-sandbox",
    "disable-gpu",
    "disable-quic",
    "no-first-run",
    "disable-background-networking",
    "disable-component-update",
    "disable-sync",
    "disable-dev-shm-usage",
]


def free_port() -> int:
    with socket.socket() as it:
        it.bind(("127.0.0.1", 0))
        return int(it.getsockname()[1])


class Browser:
    """A headless Chromium, spoken to in the WebDriver protocol."""

    def __init__(self, folder: Path) -> None:
        port = free_port()
        assert DRIVER
        self.driver = subprocess.Popen([DRIVER, f"--port={port}"], stdout=subprocess.DEVNULL)
        self.base = f"http://127.0.0.1:{port}"
        self.until(lambda: self.call("GET", "/status")["ready"])
        options = {"binary": CHROMIUM, "args": [*FLAGS, f"--user-data-dir={folder}"]}
        wanted = {"capabilities": {"alwaysMatch": {"goog:chromeOptions": options}}}
        self.base += f"/session/{self.call('POST', '/session', wanted)['sessionId']}"

    def call(self, method: str, path: str, body: Any = None) -> Any:
        data = None if method == "GET" else json.dumps(body or {}).encode()
        request = urllib.request.Request(
            self.base + path, data, {"Content-Type": "application/json"}, method=method
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["value"]

    def run(self, script: str) -> Any:
        return self.call("POST", "/execute/sync", {"script": script, "args": []})

    def type(self, selector: str, text: str) -> None:
        found = self.call("POST", "/element", {"using": "css selector", "value": selector})
        self.call("POST", f"/element/{next(iter(found.values()))}/value", {"text": text})

    def until(self, done: Callable[[], Any], seconds: float = 60) -> Any:
        end = time.monotonic() + seconds
        while True:
            try:
                if value := done():
                    return value
            except OSError:
                # the driver is not up yet, or the element not there
                if self.driver.poll() is not None:
                    raise
            assert time.monotonic() < end, "the page does not come that far"
            time.sleep(0.1)

    def close(self) -> None:
        try:
            self.call("DELETE", "")
        finally:
            self.driver.terminate()
            self.driver.wait(10)


@pytest.mark.skipif(not find_spec("gradio"), reason="needs gradio")
@pytest.mark.parametrize("kind", ["taken", "no number of a port"])
def test_a_port_that_is_not_to_be_had(kind: str, searcher: Searcher) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1] if kind == "taken" else 70_000
        made = search_page.build_search_page(searcher, "data", "model", 4)
        with pytest.raises(ValueError, match=f"--port={port}: taken"):
            search_page.launch_search_page(made, port)


@pytest.mark.skipif(not find_spec("gradio"), reason="needs gradio")
@pytest.mark.parametrize(
    ("images", "k", "most"), [(1, 1, 2), (11, 4, 11), (900, 24, 200), (900, 300, 300)]
)
def test_the_slider_goes_as_far_as_it_may(
    images: int, k: int, most: int, searcher: Searcher
) -> None:
    searcher.images = images
    blocks = search_page.build_search_page(searcher, "data", "model", k).blocks.values()
    (slider,) = [block for block in blocks if type(block).__name__ == "Slider"]
    assert (slider.minimum, slider.value, slider.maximum) == (1, k, most)


@needs_browser
def test_a_browser_types_a_query_and_sees_pictures(
    searcher: Searcher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "uploads"))
    made = search_page.build_search_page(searcher, "data", "model", 4)
    address = ""
    port = free_port()
    browser = Browser(tmp_path / "profile")
    try:
        address = search_page.launch_search_page(made, port)
        assert address.rstrip("/") == f"http://127.0.0.1:{port}"
        browser.call("POST", "/url", {"url": address})
        browser.until(lambda: browser.run("return !!document.querySelector('#query textarea')"))
        # Enter
        browser.type("#query textarea", "a navy box\ue007")
        shown = (
            "return [...document.querySelectorAll('.answer img')]"
            ".filter(i => i.complete && i.naturalWidth).length"
        )
        browser.until(lambda: browser.run(shown) == 4)
        texts = browser.run(
            "return [...document.querySelectorAll('.answer figcaption')].map(e => e.textContent)"
        )
        expected = searcher.by_text("a navy box", 4).images
        assert texts == [f"{hit.cosine:.3f} {hit.caption}" for hit in expected]
        sources = browser.run(
            "return [...document.querySelectorAll('.answer img')].map(e => e.src)"
        )
        assert [base64.b64decode(source.partition(",")[2]) for source in sources] == [
            hit.image for hit in expected
        ]

        (tmp_path / "query.png").write_bytes(picture("navy"))
        browser.type("#query input[type=file]", str(tmp_path / "query.png"))
        captions = "return [...document.querySelectorAll('.captions li')].map(e => e.textContent)"
        said = browser.until(lambda: browser.run(captions))
        answer = searcher.by_image(picture("navy"), 11)
        assert said == [f"{hit.cosine:.3f} {hit.caption}" for hit in answer.captions[:4]]
        assert browser.run("return document.querySelector('#query textarea').value") == ""

        slide = "let e = document.querySelector('#query input[type=number]'); e.value = 11; "
        browser.run(slide + "e.dispatchEvent(new Event('input', {bubbles: true})); e.blur()")
        # every caption of the data is on the page, escaped
        browser.until(lambda: browser.run(shown) == 11)
        assert NASTY in " ".join(
            browser.run(
                "return [...document.querySelectorAll('figcaption')].map(e => e.textContent)"
            )
        )
        assert browser.run("return document.title") == "Search data"
        assert browser.run("return document.querySelectorAll('.answer b').length") == 0
        with pytest.raises(urllib.error.HTTPError):
            urllib.request.urlopen(
                f"{address.rstrip('/')}/gradio_api/file={searcher.catalog.shards[0]}"
            )
        loaded = browser.run("return performance.getEntriesByType('resource').map(e => e.name)")
        assert {name.split("/")[2] for name in loaded if name.startswith("http")} <= {
            f"127.0.0.1:{port}"
        }
    finally:
        browser.close()
        made.close()
