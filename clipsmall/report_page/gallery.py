"""What a model retrieves, and its logits of one batch."""

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
    """(shards, name, classes) of the data sets that a gallery can show, each once.

    Those on which images are matched with named classes; if there are none, those with captions.
    """
    named = []
    captioned = []
    for each in section.all:
        matches = TASKS[each.task].matches
        if matches == "classes" and not each.label and not each.kind:
            named.append((each.data, each.name, each.classes))
        elif matches == "captions":
            captioned.append((each.data, each.name, "captions"))
    found: list[tuple[list[str], str, str]] = []
    for one in named or captioned:
        if one not in found:
            found.append(one)
    return found


def gallery(encoder: Encoder, catalog: Catalog, name: str, class_file: str) -> list[Query]:
    """A few images with the names they find, and a few captions with the images they find.

    Searched are at most CANDIDATES pairs, evenly spread over the data set.
    """
    # rounded up
    step = -(-len(catalog) // CANDIDATES)
    candidates = list(range(0, len(catalog), step))
    captions = dict(zip(candidates, read_texts(catalog, rows=candidates).captions, strict=True))
    hashes = {}
    for row, its_captions in captions.items():
        hashes[row] = {caption_hash(caption) for caption in its_captions}
    features, rows = encoder.images(catalog, candidates)
    shown = permutation(len(rows), 0)[:QUERIES].tolist()

    names = class_names(class_file, list(captions.values()), [])
    names_features = encoder.texts(names)
    queries = []
    for position in shown:
        row = int(rows[position])
        best, order = (features[position] @ names_features.T).topk(min(ANSWERS, len(names)))
        texts = []
        for score, number in zip(best.tolist(), order.tolist(), strict=True):
            name_found = names[number]
            texts.append((name_found, score, caption_hash(name_found) in hashes[row]))
        image = catalog.read(row).image
        queries.append(Query(image, captions[row][0], "image_to_text", name, texts=texts))

    asked = encoder.texts([captions[int(rows[position])][0] for position in shown])
    for position, text in zip(shown, asked, strict=True):
        row = int(rows[position])
        caption = captions[row][0]
        wanted = caption_hash(caption)
        best, order = (text @ features.T).topk(min(ANSWERS, len(features)))
        images = []
        for score, other in zip(best.tolist(), rows[order].tolist(), strict=True):
            right = wanted in hashes[other]
            images.append((catalog.read(other).image, captions[other][0], score, right))
        image = catalog.read(row).image
        queries.append(Query(image, caption, "text_to_image", name, images=images))
    return queries


def first_batch(catalog: Catalog, seed: int, shuffle_window: int, batch_size: int) -> list[int]:
    """The first MATRIX rows of a run's first global batch."""
    shuffled = Order(catalog.sizes, seed, shuffle_window)
    positions = torch.arange(min(MATRIX, batch_size)).numpy()
    rows: list[int] = shuffled.rows(0, positions).tolist()
    return rows


@torch.no_grad()
def logit_matrix(
    encoder: Encoder, catalog: Catalog, rows: list[int], scale: Tensor
) -> tuple[Tensor, list[str]]:
    """(n, n) scaled cosines of n pairs, images down and texts across; and their captions.

    In the order of `rows`. Pairs whose image cannot be read are left out.
    """
    images, found = encoder.images(catalog, sorted(rows))
    position_of = {row: position for position, row in enumerate(found.tolist())}
    good = [row for row in rows if row in position_of]
    captions = [its_captions[0] for its_captions in read_texts(catalog, rows=good).captions]
    in_order = images[[position_of[row] for row in good]]
    return scale.cpu() * in_order @ encoder.texts(captions).T, captions
