"""Tests of the evaluations against open_clip's own, against counting by hand, and on several ranks.

Seen to fail when: prompts are averaged before they are normalised; `in_top_k` counts ties as hits
or as misses; `scores` multiplies in float32 (equal features in a one-row block differ); every rank
encodes every batch; a broken image stays in with zeros; `relevance` keeps equal captions apart;
recall divides by captions instead of queries.
"""

import json
import math
from collections.abc import Callable
from fractions import Fraction
from io import BytesIO
from itertools import combinations, permutations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from clipsmall import retrieve, zero_shot
from clipsmall.data import Catalog, build_index, open_catalog, write_index
from clipsmall.data.making.shard_writer import ShardSample, write_shard
from clipsmall.data.preprocess import ImageSpec
from clipsmall.evaluation import (
    Encoder,
    Result,
    classification,
    prompts,
    recall,
    results_text,
    write_cell,
)
from clipsmall.evaluation.classification import accuracies, class_features
from clipsmall.evaluation.features import class_indices, read_texts
from clipsmall.evaluation.recall import recalls, relevance
from clipsmall.evaluation.sets import DataSet
from clipsmall.evaluation.tasks.retrieval import retrieval
from clipsmall.evaluation.tasks.zero_shot import zero_shot as classify
from clipsmall.evaluation.top_k import (
    chance_in_top_k,
    in_top_k,
    refuse_non_finite,
    scores,
    tied_in_top_k,
)
from clipsmall.evaluation.view import DataView
from clipsmall.model.dual_encoder import DualEncoder
from clipsmall.model.load import load_towers
from clipsmall.model.towers.small import SmallConfig, SmallTowers, WordTokenizer
from tests.model.test_towers import write_clip, write_open_clip_folder, write_open_clip_json
from tests.shard_samples import write_tar
from tests.shards_for_tests import TOWERS

COLOURS = ["red", "green", "blue", "navy", "teal", "olive", "gold", "pink"]
BROKEN = b"\x89PNG\r\n\x1a\n" + bytes(40)


def picture(number: int) -> bytes:
    """A blurred patch of noise in one of several shapes."""
    random = np.random.default_rng(number)
    image = Image.fromarray(random.integers(0, 256, (3, 3, 3), dtype=np.uint8))
    out = BytesIO()
    image.resize(
        [(48, 32), (32, 48), (32, 32), (70, 60)][number % 4], Image.Resampling.BICUBIC
    ).save(out, "PNG")
    return out.getvalue()


def write_pictures(folder: Path, count: int = 43, broken: tuple[int, ...] = ()) -> Path:
    """`count` pictures in two shards; json fields `kind` (0-7), `colour` and, of odd types, `share`
    and `nothing`.
    """
    # no picture is pink
    kinds = np.random.default_rng(5).integers(0, len(COLOURS) - 1, count).tolist()

    def samples(first: int, last: int) -> Any:
        for i in range(first, last):
            fields = {
                "kind": kinds[i],
                "colour": COLOURS[kinds[i]].upper(),
                "share": 0.5,
                "nothing": None,
            }
            image = BROKEN if i in broken else picture(i)
            yield ShardSample(
                i, image, "png", [COLOURS[kinds[i]], f"picture {i}"][: 1 + i % 2], 32, 32, fields
            )

    write_shard(folder, 0, samples(0, count // 3))
    write_shard(folder, 1, samples(count // 3, count))
    return folder


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("pictures") / "coloured pictures")


def small_encoder(batch_size: int = 16, **options: Any) -> Encoder:
    torch.manual_seed(4)
    config = SmallConfig.model_validate(TOWERS)
    tokenizer = WordTokenizer.train([*COLOURS, "picture", *map(str, range(100))], config.text)
    model = DualEncoder(SmallTowers(config), ImageSpec(16), 10.0, 0.0, False)
    return Encoder(model, tokenizer, torch.device("cpu"), batch_size, **options)


def view_of(encoder: Encoder, catalog: Catalog, name: str, *words: str) -> DataView:
    """A view of a catalog that is open already; words: classes, templates, label."""
    classes, templates, label = (*words, *("captions", "plain", "")[len(words) :])
    data = DataSet(name, tuple(map(str, catalog.shards)), (), "", classes, templates, label)
    data.__dict__["catalog"] = catalog
    return DataView(encoder, data, empty_classes=True)


def measure_zero_shot(
    encoder: Encoder,
    catalog: Catalog,
    name: str,
    classes: str = "captions",
    templates: str = "plain",
    label: str = "",
) -> Result:
    return classify(view_of(encoder, catalog, name, classes, templates, label))


def measure_retrieval(encoder: Encoder, catalog: Catalog, name: str) -> Result:
    return retrieval(view_of(encoder, catalog, name))


def classes_file(folder: Path) -> str:
    path = folder / "classes.txt"
    path.write_text("\n".join(COLOURS) + "\n")
    return str(path)


def unit_rows(*shape: int, seed: int = 0) -> Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


# ---- zero-shot ----


def open_clips_accuracy(output: Tensor, target: Tensor, topk: tuple[int, ...]) -> list[float]:
    """open_clip_train.zero_shot.accuracy, which calls float() on an array of one: an error since
    NumPy 2.5.
    """
    predicted = output.topk(max(topk), 1, True, True)[1].t()
    correct = predicted.eq(target.view(1, -1).expand_as(predicted))
    return [correct[:k].reshape(-1).float().sum().item() for k in topk]


@pytest.mark.parametrize("templates", ["simple", "openai"])
def test_zero_shot_is_open_clips_own(
    templates: str, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import open_clip
    from open_clip_train.zero_shot import run

    monkeypatch.setattr("open_clip_train.zero_shot.accuracy", open_clips_accuracy)
    path = write_open_clip_json(tmp_path, "tiny-zero-shot.json")
    torch.manual_seed(7)
    loaded = load_towers(str(path), "", lambda: [])
    theirs, _, preprocess = open_clip.create_model_and_transforms(path.stem)
    theirs.load_state_dict({**theirs.state_dict(), **loaded.towers.model.state_dict()})
    theirs.eval()
    named = {
        "simple": open_clip.SIMPLE_IMAGENET_TEMPLATES,
        "openai": open_clip.OPENAI_IMAGENET_TEMPLATES,
    }[templates]
    assert len(named) == {"simple": 7, "openai": 80}[templates]
    classifier = open_clip.build_zero_shot_classifier(
        theirs, open_clip.get_tokenizer(path.stem), COLOURS, named
    )
    catalog = open_catalog(str(shards))
    images = [
        preprocess(Image.open(BytesIO(catalog.read(row).image))) for row in range(len(catalog))
    ]
    labels = [json.loads(catalog.read(row).json)["kind"] for row in range(len(catalog))]
    batches = list(zip(torch.stack(images).split(10), torch.tensor(labels).split(10), strict=True))

    class Loader(list[Any]):
        batch_size = 10

    options = SimpleNamespace(device="cpu", precision="fp32", batch_size=10)
    top1, top5 = run(theirs, classifier, Loader(batches), options)
    assert 0 < top1 < top5 < 1

    encoder = Encoder(
        DualEncoder(loaded.towers, loaded.spec, 1.0, 0.0, False),
        loaded.tokenize,
        torch.device("cpu"),
        30,
    )
    weights = class_features(encoder, COLOURS, prompts.prompt_templates(templates))
    torch.testing.assert_close(weights.T, classifier, rtol=0, atol=1e-5)
    cell = measure_zero_shot(
        encoder, catalog, "pictures", classes_file(tmp_path), templates, "kind"
    )
    assert cell.metrics["acc1"] == pytest.approx(top1, abs=1e-12)
    assert cell.metrics["acc5"] == pytest.approx(top5, abs=1e-12)
    assert cell.chance == {"acc1": pytest.approx(1 / 8), "acc5": pytest.approx(5 / 8)}
    assert cell.counts == {"images": 43, "classes": 8, "skipped": 0}


def test_mean_per_class_recall_by_hand() -> None:
    images = unit_rows(200, 6, seed=1)
    classes = unit_rows(9, 6, seed=2)
    # class 8 has no image
    labels = (torch.rand(200, generator=torch.Generator().manual_seed(3)) ** 3 * 8).long()
    predicted = (images @ classes.T).argmax(dim=1)
    found = accuracies(images, classes, labels)
    by_class = [
        np.mean([predicted[i] == c for i in range(200) if labels[i] == c]) for c in range(8)
    ]
    assert len(set(by_class)) > 3
    assert found["mean_per_class_recall"] == pytest.approx(np.mean(by_class))
    assert found["acc1"] == pytest.approx(np.mean((predicted == labels).numpy()))
    assert found["acc1"] != pytest.approx(found["mean_per_class_recall"], abs=1e-3)


def test_top_5_of_five_classes_is_no_measure() -> None:
    labels = torch.zeros(3, dtype=torch.int64)
    assert set(accuracies(unit_rows(3, 4), unit_rows(5, 4), labels)) == {
        "acc1",
        "mean_per_class_recall",
    }
    assert set(accuracies(unit_rows(3, 4), unit_rows(6, 4), labels)) == {
        "acc1",
        "acc5",
        "mean_per_class_recall",
    }
    assert accuracies(unit_rows(3, 4), unit_rows(1, 4), labels) == {
        "acc1": 1.0,
        "mean_per_class_recall": 1.0,
    }


def test_templates_are_applied_class_by_class() -> None:
    encoder = small_encoder()
    templates = [lambda name: f"picture {name}", lambda name: f"{name} 7", str]
    found = class_features(encoder, COLOURS, templates)
    for name, row in zip(COLOURS, found, strict=True):
        alone = encoder.texts([f"picture {name}", f"{name} 7", name])
        torch.testing.assert_close(row, F.normalize(alone.mean(dim=0), dim=0))


# ---- hits and ties ----


@settings(deadline=None)
@given(st.integers(-1, 7), st.integers(0, 4), st.integers(0, 4))
def test_tied_in_top_k_is_the_share_of_all_draws(slots: int, right: int, wrong: int) -> None:
    draws = list(combinations(range(right + wrong), min(max(slots, 0), right + wrong)))
    expected = np.mean([any(answer < right for answer in draw) for draw in draws])
    assert tied_in_top_k(*map(torch.tensor, (slots, right, wrong))).item() == pytest.approx(
        expected, abs=1e-14
    )


@pytest.mark.parametrize("answers", [10**3, 10**6, 10**8])
@pytest.mark.parametrize("right", [1, 3, 100])
def test_tied_in_top_k_is_exact_for_millions_of_answers(answers: int, right: int) -> None:
    for k in (1, 5, 10):
        expected = float(1 - Fraction(math.comb(answers - right, k), math.comb(answers, k)))
        found = tied_in_top_k(*map(torch.tensor, (k, right, answers - right))).item()
        assert found == pytest.approx(expected, rel=1e-6, abs=1e-14)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 2), st.booleans()), min_size=1, max_size=5))
def test_in_top_k_is_the_mean_over_all_orders_of_the_tied(answers: list[tuple[int, bool]]) -> None:
    if not any(right for _, right in answers):
        return
    ks = tuple(range(1, len(answers) + 1))
    orders = [sorted(order, key=lambda answer: -answer[0]) for order in permutations(answers)]
    expected = [np.mean([any(right for _, right in order[:k]) for order in orders]) for k in ks]
    values = torch.tensor([[float(score) for score, _ in answers]])
    right = torch.tensor([[r for _, r in answers]])
    torch.testing.assert_close(
        in_top_k(values, right, ks)[0],
        torch.tensor(expected),
        rtol=0,
        atol=1e-12,
        check_dtype=False,
    )


@pytest.mark.parametrize("n", [2, 3, 7, 13, 60, 101, 257])
def test_a_model_that_says_always_the_same_gets_chance(
    n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a block of scores has one row: BLAS then rounds equal columns differently."""
    for rows in (1, 2, 1000):
        monkeypatch.setattr(classification, "chunk_rows", lambda columns, rows=rows: rows)
        monkeypatch.setattr(recall, "chunk_rows", lambda columns, rows=rows: rows)
        for seed in range(4):
            same = unit_rows(1, 512, seed=seed)
            all_same = same.expand(n, -1).contiguous()
            others = unit_rows(9, 512, seed=seed + 100)
            found = accuracies(others, all_same, torch.arange(9) % n)
            assert found["acc1"] == pytest.approx(1 / n, abs=1e-12)
            assert found.get("acc5", 5 / n) == pytest.approx(5 / n, abs=1e-12)
            _, belongs = relevance([[f"caption {i}"] for i in range(n)])
            for side in ("image", "text"):
                for k, value in recalls(all_same, all_same, belongs, side).items():
                    assert value == pytest.approx(k / n, abs=1e-12)


def test_equal_features_get_equal_scores() -> None:
    for n in range(1, 70):
        same = unit_rows(1, 100, seed=n).expand(n, -1).contiguous()
        assert len(scores(unit_rows(1, 100, seed=n + 100), same).unique()) == 1


def test_chance_is_what_random_scores_reach() -> None:
    generator = torch.Generator().manual_seed(0)
    right = torch.zeros(4000, 12, dtype=torch.bool)
    right[:, :3] = True
    values = torch.rand(4000, 12, generator=generator)
    found = in_top_k(values, right, (1, 5)).mean(dim=0)
    expected = chance_in_top_k(torch.full((4000,), 12), torch.full((4000,), 3), (1, 5))
    torch.testing.assert_close(found, expected, atol=0.03, rtol=0, check_dtype=False)
    assert expected.tolist() == pytest.approx([3 / 12, 1 - math.comb(9, 5) / math.comb(12, 5)])


# ---- retrieval ----


def brute_force(values: np.ndarray, right: np.ndarray, k: int) -> float:
    """(q, n) scores and right answers: the share of queries with a right one among the k best."""
    best = np.argsort(-values, axis=1)[:, :k]
    return float(np.mean([right[q, best[q]].any() for q in range(len(values))]))


@settings(
    deadline=None,
    max_examples=50,
    derandomize=True,
    # chance ties in float32 would be no error
)
@given(
    st.lists(st.lists(st.integers(0, 25), min_size=1, max_size=4), min_size=1, max_size=30),
    st.integers(0, 10**6),
)
def test_recall_is_a_brute_force_count(owned: list[list[int]], seed: int) -> None:
    """Several captions an image, several images a caption, and the same caption twice at one
    image.
    """
    spellings = ["Caption {}", "caption  {}", "CAPTION {} "]
    captions = [
        [spellings[(i + j) % 3].format(number) for j, number in enumerate(n)]
        for i, n in enumerate(owned)
    ]
    texts, belongs = relevance(captions)
    numbers = [int(text.split()[1]) for text in texts]
    assert sorted(numbers) == sorted({number for n in owned for number in n})
    right = np.array([[number in n for number in numbers] for n in owned])
    images = unit_rows(len(owned), 6, seed=seed)
    features = unit_rows(len(texts), 6, seed=seed + 1)
    values = images.double().numpy() @ features.double().numpy().T
    for side, queries, answers, v, r in (
        ("image", images, features, values, right),
        ("text", features, images, values.T, right.T),
    ):
        assert belongs.counts(side).tolist() == r.sum(axis=1).tolist()
        assert np.array_equal(belongs.block(side, 0, len(r)).numpy(), r)
        found = recalls(queries, answers, belongs, side)
        assert set(found) == {k for k in (1, 5, 10) if k == 1 or k < len(answers)}
        for k, value in found.items():
            assert value == pytest.approx(brute_force(v, r, k), abs=1e-12)


def test_retrieval_counts_both_ways(shards: Path) -> None:
    catalog = open_catalog(str(shards))
    encoder = small_encoder()
    cell = measure_retrieval(encoder, catalog, "pictures")
    captions = [catalog.read(row).text.decode().splitlines() for row in range(len(catalog))]
    texts = list(dict.fromkeys(caption for all_of_one in captions for caption in all_of_one))
    assert cell.counts == {"images": 43, "captions": len(texts), "skipped": 0}
    assert len(texts) < sum(map(len, captions))
    right = np.array([[text in all_of_one for text in texts] for all_of_one in captions])
    values = (encoder.images(catalog)[0].double() @ encoder.texts(texts).double().T).numpy()
    for k in (1, 5, 10):
        assert cell.metrics[f"text_retrieval_recall@{k}"] == pytest.approx(
            brute_force(values, right, k)
        )
        assert cell.metrics[f"image_retrieval_recall@{k}"] == pytest.approx(
            brute_force(values.T, right.T, k)
        )
        misses = [
            math.comb(len(texts) - n, k) / math.comb(len(texts), k) for n in right.sum(axis=1)
        ]
        assert cell.chance[f"text_retrieval_recall@{k}"] == pytest.approx(1 - np.mean(misses))
    assert set(cell.chance) == set(cell.metrics)


@pytest.mark.parametrize("rows", [1, 3, 42])
def test_chunks_change_nothing(
    rows: int, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    catalog = open_catalog(str(shards))
    encoder = small_encoder()
    calls = list[int]()

    def measure() -> list[dict[str, float]]:
        cell = measure_zero_shot(encoder, catalog, "z", classes_file(tmp_path), "plain", "kind")
        return [cell.metrics, measure_retrieval(encoder, catalog, "r").metrics]

    def few(columns: int) -> int:
        calls.append(columns)
        return rows

    whole = measure()
    monkeypatch.setattr(classification, "chunk_rows", few)
    monkeypatch.setattr(recall, "chunk_rows", few)
    assert measure() == whole
    assert len(calls) == 3


# ---- ranks, and images that cannot be read ----


def on_a_rank(folder: Path, classes: str, batch_size: int, workers: int = 0) -> tuple[Any, ...]:
    encoder = small_encoder(batch_size, workers=workers)
    catalog = open_catalog(str(folder))
    images, rows = encoder.images(catalog)
    texts = encoder.texts([f"{colour} {i}" for i in range(5) for colour in COLOURS])
    cells = [
        measure_zero_shot(encoder, catalog, "z", classes, "plain", "kind"),
        measure_retrieval(encoder, catalog, "r"),
    ]
    return (
        images.numpy(),
        rows.tolist(),
        texts.numpy(),
        [(c.metrics, c.chance, c.counts) for c in cells],
    )


@pytest.mark.parametrize("batch_size", [4, 7, 16, 64])
def test_features_and_measures_are_the_same_bits_on_any_number_of_ranks(
    batch_size: int, ranks: Any, tmp_path: Path
) -> None:
    """43 pictures: with batches of 16, ranks get 2 and 1; with 64, one rank has all and the others
    none.
    """
    folder = write_pictures(tmp_path / "pictures", broken=(3, 16, 17, 18, 19, 42))
    classes = classes_file(tmp_path)
    ((images, rows, texts, cells),) = ranks(1, on_a_rank, folder, classes, batch_size)
    assert rows == [row for row in range(43) if row not in (3, 16, 17, 18, 19, 42)]
    assert len(images) == 37
    assert len(np.unique(images, axis=0)) == 37
    assert [cell[2]["skipped"] for cell in cells] == [6, 6]
    for world_size in (2, 4):
        for found in ranks(world_size, on_a_rank, folder, classes, batch_size):
            assert found[1] == rows
            assert found[0].tobytes() == images.tobytes()
            assert found[2].tobytes() == texts.tobytes()
            assert found[3] == cells


def test_every_image_meets_its_own_feature(shards: Path) -> None:
    catalog = open_catalog(str(shards))
    alone = small_encoder(1)
    images, rows = small_encoder(16).images(catalog)
    assert rows.tolist() == list(range(43))
    torch.testing.assert_close(images, alone.images(catalog)[0])
    assert len(images.unique(dim=0)) == 43
    captions = [f"{colour} {i}" for i in range(5) for colour in COLOURS]
    torch.testing.assert_close(small_encoder(16).texts(captions), alone.texts(captions))


def test_workers_and_progress_change_nothing(shards: Path) -> None:
    catalog = open_catalog(str(shards))
    expected = small_encoder().images(catalog)
    found = small_encoder(workers=2, progress=True).images(catalog)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


def test_encoding_leaves_the_training_as_it_was(shards: Path) -> None:
    for training in (True, False):
        encoder = small_encoder()
        encoder.model.train(training)
        state = torch.get_rng_state()
        features, _ = encoder.images(open_catalog(str(shards)))
        assert encoder.model.training is training
        assert torch.equal(torch.get_rng_state(), state)
        assert not features.requires_grad


def test_skipped_images_leave_the_others_with_their_labels(shards: Path, tmp_path: Path) -> None:
    classes = classes_file(tmp_path)
    broken = open_catalog(str(write_pictures(tmp_path / "broken", broken=(0, 20))))
    cell = measure_zero_shot(small_encoder(), broken, "z", classes, "plain", "kind")
    assert cell.counts == {"images": 41, "classes": 8, "skipped": 2}
    catalog = open_catalog(str(shards))
    encoder = small_encoder()
    labels = class_indices(read_texts(catalog, "kind").labels, COLOURS)
    images, _ = encoder.images(catalog)
    good = torch.tensor([row for row in range(43) if row not in (0, 20)])
    assert cell.metrics == accuracies(
        images[good], class_features(encoder, COLOURS, [str]), labels[good]
    )


def test_a_data_set_without_a_readable_image_is_refused_by_name(tmp_path: Path) -> None:
    catalog = open_catalog(str(write_pictures(tmp_path / "all-broken", 6, broken=tuple(range(6)))))
    for measure in (measure_zero_shot, measure_retrieval):
        with pytest.raises(ValueError, match=r"all-broken.*none of 6 images"):
            measure(small_encoder(), catalog, "x")


# ---- labels, classes, templates ----


def test_names_and_numbers_are_the_same_labels(shards: Path, tmp_path: Path) -> None:
    catalog = open_catalog(str(shards))
    encoder = small_encoder()
    by_number = measure_zero_shot(encoder, catalog, "z", classes_file(tmp_path), "plain", "kind")
    assert (
        measure_zero_shot(encoder, catalog, "z", classes_file(tmp_path), "plain", "colour")
        == by_number
    )
    # the first caption
    assert measure_zero_shot(encoder, catalog, "z", classes_file(tmp_path)) == by_number
    own = measure_zero_shot(encoder, catalog, "z", "labels", "plain", "colour")
    # no picture is pink
    assert own.counts["classes"] == 7
    # and `picture 1`, `picture 3`, ...
    assert measure_zero_shot(encoder, catalog, "z").counts["classes"] == 7 + 21


def test_class_indices() -> None:
    assert class_indices(["Red", 2, "GREEN", "red"], ["red", "green", "Red"]).tolist() == [
        0,
        2,
        1,
        0,
    ]
    for odd in ("pink", 3, -1, ""):
        with pytest.raises(ValueError, match=rf"label {odd!r} is none of the 3 classes"):
            class_indices(["red", odd], ["red", "green", "blue"])


def test_the_cls_member_is_a_label(tmp_path: Path) -> None:
    def shard(name: str, labels: list[bytes], captions: bool = False) -> Catalog:
        members = []
        for i, label in enumerate(labels):
            members += [(f"{i:04d}.png", picture(i)), (f"{i:04d}.cls", label)]
            members += [(f"{i:04d}.txt", b"never a label")] if captions else []
        path = write_tar(tmp_path / name / "0.tar", members)
        write_index(path, build_index(path))
        return open_catalog(str(tmp_path / name), captions=False)

    assert read_texts(shard("numbers", [b"3", b"0\n", b"7"], captions=True)).labels == [3, 0, 7]
    catalog = shard("images", [b"3", b"0\n", b"7"])
    assert read_texts(catalog).labels == [3, 0, 7]
    cell = measure_zero_shot(small_encoder(), catalog, "z", classes_file(tmp_path))
    assert cell.counts == {"images": 3, "classes": 8, "skipped": 0}
    with pytest.raises(ValueError, match="label 8 is none of the 8 classes"):
        measure_zero_shot(small_encoder(), shard("high", [b"8"]), "z", classes_file(tmp_path))
    for name, odd in (
        ("words", b"cat"),
        ("fraction", b"1.5"),
        ("negative", b"-1"),
        ("bytes", b"\x80\x02K\x03."),
    ):
        with pytest.raises(ValueError, match=rf"{name}/0.tar:0001: label"):
            read_texts(shard(name, [b"0", odd]))
    with pytest.raises(ValueError, match=r"empty/0.tar:0000: .*neither a .cls nor a caption"):
        read_texts(shard("empty", [b""]))
    with pytest.raises(ValueError, match="labels are numbers"):
        measure_zero_shot(small_encoder(), catalog, "z", "labels")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"label": "color"},
            r"00000\.tar:000000000: its json has no field 'color'; it has .*colour",
        ),
        ({"label": "share"}, r"00000\.tar:000000000: label 0\.5 is neither"),
        ({"label": "nothing"}, r"00000\.tar:000000000: label None is neither"),
        (
            {"label": "colour", "classes": "{folder}/few.txt"},
            r"label '[A-Z]+' is none of the 2 classes",
        ),
        ({"label": "kind", "classes": "labels"}, "labels are numbers"),
        ({"classes": "{folder}/none.txt"}, r"none\.txt: No such file"),
        ({"classes": "imagnet"}, "imagnet: No such file"),
        ({"classes": "{folder}/empty.txt"}, r"empty\.txt: holds no line"),
        ({"templates": "{folder}/none.txt"}, r"none\.txt: No such file"),
        ({"templates": "{folder}/odd.txt"}, r"odd\.txt, line 2: 'a photo' has no \{c\}"),
        ({"templates": "{folder}/empty.txt"}, r"empty\.txt: holds no line"),
    ],
)
def test_what_cannot_be_classified_is_refused_by_name(
    options: dict[str, str], said: str, shards: Path, tmp_path: Path
) -> None:
    (tmp_path / "few.txt").write_text("red\ngreen\n")
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "odd.txt").write_text("a {c}\n\na photo\n")
    given = {name: value.replace("{folder}", str(tmp_path)) for name, value in options.items()}
    with pytest.raises(ValueError, match=said):
        measure_zero_shot(small_encoder(), open_catalog(str(shards)), "z", **given)


def test_classes_and_templates_by_name(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("a {c} of {c}\n\n  {c}, {x}  \n", encoding="utf-8")
    assert [template("cat") for template in prompts.prompt_templates(str(tmp_path / "t.txt"))] == [
        "a cat of cat",
        "cat, {x}",
    ]
    assert [template("cat") for template in prompts.prompt_templates("plain")] == ["cat"]
    assert prompts.prompt_templates("simple")[0]("cat") == "itap of a cat."
    assert len(prompts.class_names("imagenet", [], [])) == 1000
    assert prompts.class_names("captions", [["b", "a"], ["c", "a"]], []) == ["a", "b", "c"]
    assert prompts.class_names("labels", [], ["b", "a", "b"]) == ["a", "b"]


def spoilt(model: DualEncoder, side: str) -> None:
    layer = model.towers.visual[-1] if side == "image" else model.towers.head
    torch.nn.init.constant_(layer.bias, math.nan)


@pytest.mark.parametrize("side", ["image", "text"])
def test_features_that_are_not_finite_are_refused(side: str, shards: Path) -> None:
    encoder = small_encoder()
    spoilt(encoder.model, side)
    word = {"image": "image", "text": "class"}[side]
    with pytest.raises(ValueError, match=rf"\d+ of \d+ {word} features are not finite"):
        measure_zero_shot(encoder, open_catalog(str(shards)), "z")
    with pytest.raises(ValueError, match=rf"\d+ of \d+ {side} features are not finite"):
        measure_retrieval(encoder, open_catalog(str(shards)), "r")
    refuse_non_finite(torch.ones(3, 2), "good")
    with pytest.raises(ValueError, match="1 of 3 odd features"):
        refuse_non_finite(torch.tensor([[1.0, 2.0], [math.inf, math.nan], [0.0, 0.0]]), "odd")


def test_a_batch_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="batch_size=0"):
        small_encoder(0)


# ---- cells ----


def test_a_cell_is_clip_benchmarks(tmp_path: Path) -> None:
    cell = Result(
        "wds/image net",
        "zeroshot_classification",
        {"acc1": 0.5, "acc5": 0.75},
        {"acc1": 0.001},
        {"images": 4000},
    )
    path = write_cell(cell, tmp_path / "new" / "folder", "org/ViT-B-32", "laion2b_s34b_b79k")
    assert (
        path.name == "wds-image-net_laion2b_s34b_b79k_org-ViT-B-32_en_zeroshot_classification.json"
    )
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    content = json.loads(path.read_text())
    assert {
        key: content[key]
        for key in ("dataset", "model", "pretrained", "task", "metrics", "language")
    } == {
        "dataset": "wds/image net",
        "model": "org/ViT-B-32",
        "pretrained": "laion2b_s34b_b79k",
        "task": "zeroshot_classification",
        "metrics": {"acc1": 0.5, "acc5": 0.75},
        "language": "en",
    }
    assert (content["chance"], content["counts"]) == ({"acc1": 0.001}, {"images": 4000})
    table = results_text([cell, cell]).splitlines()
    assert len(table) == 6
    assert table[0] == "wds/image net · classification (4,000 images)"
    assert table[1].split() == ["acc1", "50.00%", "chance", "0.100%"]
    assert table[2].split() == ["acc5", "75.00%"]


# ---- the commands ----


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    write_clip(folder / "hf-clip")
    write_open_clip_folder(folder / "open-clip", {})
    return {"hf": folder / "hf-clip", "open_clip": folder / "open-clip"}


@pytest.mark.parametrize("kind", ["hf", "open_clip"])
def test_the_commands_print_a_table_and_write_a_cell(
    kind: str,
    models: dict[str, Path],
    shards: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = [
        str(models[kind]),
        "--data",
        str(shards),
        "--out",
        str(tmp_path / "out"),
        "--batch_size",
        "9",
    ]
    classes = ["--classes", classes_file(tmp_path), "--templates", "simple", "--label", "kind"]
    loaded = load_towers(str(models[kind]), "", lambda: [])
    scale = loaded.logit_scale or 1.0
    bias = loaded.logit_bias or 0.0
    model = DualEncoder(loaded.towers, loaded.spec, scale, bias, False)
    digest = Encoder(model, loaded.tokenize, torch.device("cpu")).digest()[:8]
    # of other sets and weights: others
    name = f"{shards.parent.name}-coloured-pictures_{digest}_{models[kind].name}"
    for command, more, file, metrics in (
        (
            zero_shot,
            classes,
            f"{name}_en_zeroshot_classification.json",
            {"acc1", "acc5", "mean_per_class_recall"},
        ),
        (
            retrieve,
            [],
            f"{name}_en_zeroshot_retrieval.json",
            {f"{task}_retrieval_recall@{k}" for task in ("image", "text") for k in (1, 5, 10)},
        ),
    ):
        assert command.main([*words, *more]) == 0
        output = capsys.readouterr()
        content = json.loads((tmp_path / "out" / file).read_text())
        assert set(content["metrics"]) == metrics
        assert "coloured pictures" in output.out.splitlines()[0]
        for metric, value in content["metrics"].items():
            (line,) = [
                line.split() for line in output.out.splitlines() if line.split()[0] == metric
            ]
            assert line[1] == f"{value:.2%}"
        assert file in output.err
    assert len(list((tmp_path / "out").iterdir())) == 2


def test_the_command_measures_what_the_function_does(
    models: dict[str, Path], shards: Path, tmp_path: Path
) -> None:
    zero_shot.main(
        [
            str(models["hf"]),
            "--data",
            str(shards),
            "--out",
            str(tmp_path),
            "--label",
            "kind",
            "--name",
            "a b",
            "--classes",
            classes_file(tmp_path),
        ]
    )
    loaded = load_towers(str(models["hf"]), "", lambda: [])
    encoder = Encoder(
        DualEncoder(loaded.towers, loaded.spec, 1.0, 0.0, False),
        loaded.tokenize,
        torch.device("cpu"),
        256,
    )
    cell = measure_zero_shot(
        encoder, open_catalog(str(shards)), "a b", classes_file(tmp_path), "plain", "kind"
    )
    (path,) = tmp_path.glob("a-b_*_hf-clip_en_zeroshot_classification.json")
    assert json.loads(path.read_text())["metrics"] == cell.metrics


NONSENSE: dict[str, Callable[[str, str], list[str]]] = {
    "nothing": lambda model, data: [],
    "no data": lambda model, data: [model],
    "unknown option": lambda model, data: [model, "--data", data, "--no_such_option"],
    "unknown model": lambda model, data: ["no-such-model", "--data", data],
    "missing shards": lambda model, data: [model, "--data", f"{data}-not-there"],
    "nowhere to write": lambda model, data: [
        model,
        "--data",
        data,
        "--out",
        f"{data}/00000.tar/eval",
    ],
    "no batch": lambda model, data: [model, "--data", data, "--batch_size", "0"],
    "a word for a number": lambda model, data: [model, "--data", data, "--batch_size", "many"],
    "an untrained tower JSON": lambda model, data: ["configs/towers/glyph.json", "--data", data],
    "no weights": lambda model, data: ["ViT-B-32", "--data", data],
    "an unknown weight tag": lambda model, data: [
        "ViT-B-32",
        "--pretrained",
        "no-such-tag",
        "--data",
        data,
    ],
}


@pytest.mark.parametrize("command", [zero_shot, retrieve], ids=lambda command: command.__name__)
@pytest.mark.parametrize("what", NONSENSE)
def test_nonsense_ends_with_2_and_writes_nothing(
    what: str,
    command: Any,
    models: dict[str, Path],
    shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if what == "an untrained tower JSON":
        (tmp_path / "configs" / "towers").mkdir(parents=True)
        (tmp_path / "configs" / "towers" / "glyph.json").write_text(json.dumps(TOWERS))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as left:
        command.main(NONSENSE[what](str(models["hf"]), str(shards)))
    assert left.value.code == 2
    output = capsys.readouterr()
    assert "error: " in output.err
    assert "Traceback" not in output.err
    assert output.out == ""
    assert not (tmp_path / "eval").exists()


def test_a_label_that_is_missing_ends_zero_shot_with_2(
    models: dict[str, Path], shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        zero_shot.main(
            [
                str(models["hf"]),
                "--data",
                str(shards),
                "--label",
                "color",
                "--out",
                str(tmp_path / "out"),
            ]
        )
    assert left.value.code == 2
    assert "its json has no field 'color'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_class_numbers_are_not_places_in_a_list_of_captions() -> None:
    with pytest.raises(ValueError, match="classes=captions: labels are numbers here"):
        prompts.class_names("captions", [["zebra"], ["apple"]], [0, 1])
    with pytest.raises(ValueError, match="classes=labels: labels are numbers here"):
        prompts.class_names("labels", [["zebra"], ["apple"]], [0, 1])


def test_names_that_differ_in_letter_case_are_one_class() -> None:
    assert prompts.class_names("captions", [["red dot", "Red dot"], ["a"], ["A"]], ["x"]) == [
        "A",
        "Red dot",
    ]
    assert prompts.class_names("labels", [], ["straße", "STRASSE", "cat"]) == ["STRASSE", "cat"]
