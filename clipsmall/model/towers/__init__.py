"""Image and text towers: one file per kind, under the base class `Towers`.

A new kind is a file with a subclass of `Towers`, and a line in TOWERS.
"""

from clipsmall.model.towers.base import Loaded, Towers
from clipsmall.model.towers.open_clip_towers import OpenClipTowers
from clipsmall.model.towers.small import SmallTowers
from clipsmall.model.towers.transformers_towers import HFTowers

__all__ = ["TOWERS", "Loaded", "Towers"]

# in the order in which kinds are asked whether they recognise a name
TOWERS: dict[str, type[Towers]] = {
    SmallTowers.kind: SmallTowers,
    OpenClipTowers.kind: OpenClipTowers,
    HFTowers.kind: HFTowers,
}
