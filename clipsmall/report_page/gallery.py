"""Examples of a model's retrievals, and its logits of one batch."""

import torch
from torch import Tensor

from clipsmall.config.schema import EvaluateSection
from clipsmall.data import Catalog, caption_hash
from clipsmall.data.order import Order, permutation
from clipsmall.evaluation import Encoder
from clipsmall.evaluation.features import read_texts
from clipsmall.evaluation.prompts import class_names
from clipsmall.evaluation.tasks import TASKS
from clipsmall.pages.html_page import Query

QUERIES = 8
ANSWERS = 5
CANDIDATES = 10_000
MATRIX = 256


def gallery_sets(section: EvaluateSection) -> list[tuple[list[str], str, str]]:
    """(shards, name, classes) of the data sets that a gallery can show, without repeats.

    Data sets with named classes; if there are none, data sets with captions.
    """
    named = []
    captioned = []
    for each in section.all:
        matches = TASKS[each.task].matches
        # the gallery recognises right answers by captions, so labels must be captions
        if matches == "classes" and not each.label and not each.kind:
            named.append((each.data, each.name, each.classes))
        elif matches == "captions":
            captioned.append((each.data, each.name, "captions"))

    # several tasks may be measured on one data set
    found: list[tuple[list[str], str, str]] = []
    for one in named or captioned:
        if one not in found:
            found.append(one)
    return found


def gallery(encoder: Encoder, catalog: Catalog, name: str, class_file: str) -> list[Query]:
    """Image-to-text and text-to-image retrievals for a few queries.

    The search is among at most CANDIDATES pairs, evenly spaced over the data set.
    """
    # rounded up
    step = -(-len(catalog) // CANDIDATES)
    candidates = list(range(0, len(catalog), step))
    words = read_texts(catalog, rows=candidates)

    # row -> captions, and hashes of captions, which tell whether an answer is right
    captions = dict(zip(candidates, words.captions, strict=True))
    hashes = {}
    for row, its_captions in captions.items():
        hashes[row] = {caption_hash(caption) for caption in its_captions}

    features, rows = encoder.images(catalog, candidates)
    # a random choice with a fixed seed
    order_shown = permutation(len(rows), 0)
    shown = order_shown[:QUERIES].tolist()

    # image queries: find class names
    names = class_names(class_file, list(captions.values()), [])
    names_features = encoder.texts(names)
    names_shown = min(ANSWERS, len(names))
    queries = []
    for position in shown:
        row = int(rows[position])
        # (names,)
        cosines = features[position] @ names_features.T
        best, order = cosines.topk(names_shown)
        texts = []
        for score, number in zip(best.tolist(), order.tolist(), strict=True):
            name_found = names[number]
            right = caption_hash(name_found) in hashes[row]
            texts.append((name_found, score, right))

        image = catalog.read(row).image
        queries.append(Query(image, captions[row][0], "image_to_text", name, texts=texts))

    # text queries: find images
    shown_rows = [int(rows[position]) for position in shown]
    first_captions = [captions[row][0] for row in shown_rows]
    asked = encoder.texts(first_captions)
    images_shown = min(ANSWERS, len(features))
    for position, text in zip(shown, asked, strict=True):
        row = int(rows[position])
        caption = captions[row][0]
        wanted = caption_hash(caption)
        # (images,)
        cosines = text @ features.T
        best, order = cosines.topk(images_shown)
        images = []
        for score, other in zip(best.tolist(), rows[order].tolist(), strict=True):
            right = wanted in hashes[other]
            other_image = catalog.read(other).image
            images.append((other_image, captions[other][0], score, right))

        image = catalog.read(row).image
        queries.append(Query(image, caption, "text_to_image", name, images=images))
    return queries


def first_batch(catalog: Catalog, seed: int, shuffle_window: int, batch_size: int) -> list[int]:
    """The first MATRIX rows of a run's first global batch."""
    shuffled = Order(catalog.sizes, seed, shuffle_window)
    count = min(MATRIX, batch_size)
    positions = torch.arange(count).numpy()
    # rows of epoch 0
    first = shuffled.rows(0, positions)
    rows: list[int] = first.tolist()
    return rows


@torch.no_grad()
def logit_matrix(
    encoder: Encoder, catalog: Catalog, rows: list[int], scale: Tensor
) -> tuple[Tensor, list[str]]:
    """(n, n) logits (scaled cosines) of n pairs, images down and texts across; and the captions.

    In the order of `rows`, without pairs whose image cannot be read.
    """
    # the encoder returns ascending rows; `position_of` restores the order of `rows`
    images, found = encoder.images(catalog, sorted(rows))
    position_of: dict[int, int] = {}
    for position, row in enumerate(found.tolist()):
        position_of[row] = position

    good = [row for row in rows if row in position_of]
    words = read_texts(catalog, rows=good)
    captions = [its_captions[0] for its_captions in words.captions]

    # (n, D), (n, D)
    positions = [position_of[row] for row in good]
    in_order = images[positions]
    texts = encoder.texts(captions)
    logits = scale.cpu() * in_order @ texts.T
    return logits, captions
