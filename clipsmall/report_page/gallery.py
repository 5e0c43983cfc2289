"""What a model retrieves, and its logits of one batch."""

import torch
from torch import Tensor

from clipsmall.config import Config
from clipsmall.data import Catalog, caption_hash
from clipsmall.data.order import Order, permutation
from clipsmall.evaluation import Encoder
from clipsmall.evaluation.features import read_texts
from clipsmall.evaluation.prompts import classes
from clipsmall.pages.html_page import Query

QUERIES = 8
ANSWERS = 5
CANDIDATES = 10_000
MATRIX = 256


def shown_sets(config: Config) -> list[tuple[list[str], str, str]]:
    """(shards, name, classes) of the run's zero-shot sets whose classes are names, or else of its
    retrieval sets.
    """
    named = [(z.data, z.name, z.classes) for z in config.evaluate.zero_shot if not z.label]
    return named or [(r.data, r.name, "captions") for r in config.evaluate.retrieval]


def gallery(encoder: Encoder, catalog: Catalog, name: str, class_file: str) -> list[Query]:
    """A few images with the names they find, and a few captions with the images they find.

    Searched are at most CANDIDATES pairs, evenly spread over the data set.
    """
    candidates = list(range(0, len(catalog), -(-len(catalog) // CANDIDATES)))
    captions = dict(zip(candidates, read_texts(catalog, rows=candidates).captions, strict=True))
    hashes = {
        row: {caption_hash(caption) for caption in of_one} for row, of_one in captions.items()
    }
    features, rows = encoder.images(catalog, candidates)
    names = classes(class_file, list(captions.values()), [])
    names_features = encoder.texts(names)
    shown = permutation(len(rows), 0)[:QUERIES].tolist()
    queries = []
    for place in shown:
        row = int(rows[place])
        own = catalog.read(row).image
        best, order = (features[place] @ names_features.T).topk(min(ANSWERS, len(names)))
        found = [
            (names[i], score, caption_hash(names[i]) in hashes[row])
            for score, i in zip(best.tolist(), order.tolist(), strict=True)
        ]
        queries.append(Query(own, captions[row][0], "image_to_text", name, texts=found))
    texts = encoder.texts([captions[int(rows[place])][0] for place in shown])
    for place, text in zip(shown, texts, strict=True):
        row = int(rows[place])
        wanted = caption_hash(captions[row][0])
        best, order = (text @ features.T).topk(min(ANSWERS, len(features)))
        images = []
        for score, i in zip(best.tolist(), rows[order].tolist(), strict=True):
            images.append((catalog.read(i).image, captions[i][0], score, wanted in hashes[i]))
        queries.append(
            Query(catalog.read(row).image, captions[row][0], "text_to_image", name, images=images)
        )
    return queries


def batch_rows(config: Config, catalog: Catalog) -> list[int]:
    """The first MATRIX rows of the run's first global batch."""
    shuffled = Order(catalog.sizes, config.seed, config.data.shuffle_window)
    rows: list[int] = shuffled.rows(
        0, torch.arange(min(MATRIX, config.data.batch_size)).numpy()
    ).tolist()
    return rows


@torch.no_grad()
def logit_matrix(
    encoder: Encoder, catalog: Catalog, rows: list[int], scale: Tensor
) -> tuple[Tensor, list[str]]:
    """(n, n) scaled cosines of n pairs, images down and texts across, in the order of `rows`; and
    their captions.

    Pairs whose image is broken are left out.
    """
    images, found = encoder.images(catalog, sorted(rows))
    places = {row: place for place, row in enumerate(found.tolist())}
    good = [row for row in rows if row in places]
    captions = [of_one[0] for of_one in read_texts(catalog, rows=good).captions]
    return scale.cpu() * images[[places[row] for row in good]] @ encoder.texts(captions).T, captions
