"""A contact sheet of a plan's hardest groups, to check by eye for false negatives."""

from pathlib import Path

import numpy as np

from clipsmall.data import Catalog, captions_of, fields_of
from clipsmall.data.checking.contact_sheet import COLUMNS, SheetCell, draw_sheet
from clipsmall.data.preprocess import BadImage, decode
from clipsmall.data.scores import Scores
from clipsmall.mining.scored_pairs import Floats, Ints, select_scored

# number of pairs on the sheet
SHOWN = 48
# number of pairs from whose groups the hardest are chosen
MEASURED = 65_536


def draw_hardest(
    path: Path, catalog: Catalog, table: Scores, pairs: Ints, size: int, title: str
) -> None:
    """Write a PNG with the hardest groups, row by row, and histograms.

    The hardest groups are those whose hardest negative comes closest to a positive.

    Args:
        pairs: (m, B) numbers of pairs; each run of `size` pairs is a group.
    """
    numbers = catalog.index[table.row]
    order = np.argsort(numbers)
    groups = pairs.reshape(-1, size)[: max(MEASURED // size, 1)]
    places = order[np.searchsorted(numbers, groups, sorter=order)]
    own, negative = closeness(table, places)
    # one group per row of the sheet, cut off if the group is longer than the row
    in_row = min(size, COLUMNS)
    hardness = (negative - own).max(axis=1)
    hardest = np.argsort(-hardness, kind="stable")[: max(SHOWN // in_row, 1)]
    rows = table.row[places[hardest][:, :in_row]].reshape(-1)
    spread = {
        "cosine of a pair": own.ravel(),
        "cosine of its hardest negative in the group": negative.ravel(),
    }
    cells = [_sheet_cell(catalog, row) for row in rows.tolist()]
    draw_sheet(path, cells, spread, "pairs", title)


def closeness(table: Scores, places: Ints) -> tuple[Floats, Floats]:
    """(groups, size) each pair's positive cosine, and the cosine of its hardest negative.

    The hardest negative is taken within the group, over both directions.
    """
    own = np.empty(places.shape)
    negative = np.empty(places.shape)
    for number, members in enumerate(places):
        each = select_scored(table, members)
        cosines = each.image @ each.text.T
        own[number] = cosines.diagonal()
        # a pair is not a negative of itself
        np.fill_diagonal(cosines, -np.inf)
        of_text = cosines.max(axis=0)
        of_image = cosines.max(axis=1)
        negative[number] = np.maximum(of_text, of_image)
    return own, negative


def _sheet_cell(catalog: Catalog, row: int) -> SheetCell:
    members = catalog.read(row)
    caption = captions_of(members.text, fields_of(members.json))[0]
    try:
        return SheetCell(decode(members.image), caption)
    except BadImage as reason:
        return SheetCell(str(reason), caption)
