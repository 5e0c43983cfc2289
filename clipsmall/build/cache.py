"""Cached features of frozen towers: computed once per shard, then read instead of raw data."""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm import tqdm

from clipsmall.build.data import TrainingData
from clipsmall.config.schema import TuneSection
from clipsmall.data import Catalog, read_index
from clipsmall.data.features import Features, feature_file, usable, write_features
from clipsmall.data.scores import good_rows
from clipsmall.distributed import world
from clipsmall.evaluation import Encoder
from clipsmall.evaluation.shard_features import (
    encode_shard_images,
    encode_shard_texts,
    read_shard_captions,
)
from clipsmall.model.digest import model_digest
from clipsmall.model.dual_encoder import DualEncoder
from clipsmall.model.towers import Loaded
from clipsmall.storage import checkpoint


def cacheable_towers(
    tune: TuneSection,
    data: TrainingData,
    model: DualEncoder,
    *,
    steps: int,
    augmented: bool,
    reads_tokens: bool,
) -> list[str]:
    """The towers (`image`, `text`) whose features can be cached: frozen, with unaugmented input.

    Empty if the cache is off, if pairs have no stable numbers, or if no pair is seen twice in the
    run, so that a cache would save nothing.

    Args:
        steps: number of steps of the whole run.
        augmented: whether images are cropped at random.
        reads_tokens: whether a head needs token ids, which cached text features would replace.
    """
    if not tune.cache or data.catalog is None or steps <= data.per_epoch:
        return []
    trained = set()
    for name, parameter in model.towers.named_parameters():
        if parameter.requires_grad:
            trained.add(model.towers.locate(name).tower)
    found = []
    if "image" not in trained and not augmented:
        found.append("image")
    if "text" not in trained and not reads_tokens:
        found.append("text")
    return found


def frozen_features(
    towers: list[str],
    folder: str,
    catalog: Catalog,
    loaded: Loaded,
    model: DualEncoder,
    accelerator: Accelerator,
    *,
    batch_size: int,
    workers: int,
    max_pixels: int,
) -> dict[str, Features]:
    """The cached features of the given towers, by tower. Every rank must call.

    Complete files are read; the shards that lack one are divided among the ranks and computed.

    Args:
        towers: the result of `cacheable_towers`; their weights must already be the final ones.
        folder: where the features are written; "" = next to the shards.
        batch_size: images or captions encoded at a time.
        workers: loader processes per rank.
        max_pixels: larger images count as unreadable.

    Raises:
        ValueError: features cannot be written.
    """
    found = {}
    encoder = Encoder(
        # TowerOutputs has all that an Encoder uses: encode_image, encode_text and the spec
        TowerOutputs(model),  # type: ignore[arg-type]
        loaded.tokenize,
        accelerator.device,
        batch_size,
        workers,
        max_pixels=max_pixels,
    )
    maker = FeatureMaker(catalog, encoder, accelerator)
    for tower in towers:
        digest = tower_digest(tower, loaded, model, accelerator.mixed_precision, max_pixels)
        found[tower] = tower_features(tower, digest, Path(folder) if folder else None, maker)
    return found


def tower_features(tower: str, digest: str, folder: Path | None, maker: "FeatureMaker") -> Features:
    """The features of one tower over all shards; missing files are computed first."""
    shards = maker.catalog.shards
    files = [feature_file(shard, tower, digest, folder) for shard in shards]
    missing = []
    for number, (file, shard) in enumerate(zip(files, shards, strict=True)):
        if not usable(file, shard, digest):
            missing.append(number)
    # every rank lists the missing files before any rank writes, so all divide the same list
    world.barrier()
    mine = missing[world.rank() :: world.size()]
    for number in tqdm(mine, desc=f"{tower} features", disable=world.rank() > 0):
        features, first = maker.images(number) if tower == "image" else maker.texts(number)
        write_features(files[number], shards[number], digest, features, first)
    world.barrier()
    if world.rank() == 0:
        size = sum(file.stat().st_size for file in files) / 2**20
        print(
            f"{tower} tower frozen: read as features, {size:,.0f} MiB in {files[0].parent}",
            file=sys.stderr,
        )
    return Features(maker.catalog, files)


def load_towers_of(folder: Path, model: DualEncoder) -> None:
    """Load the weights of a checkpoint, before the rest of a resumed run's state.

    A rebuilt model starts with fresh weights, but features must come from the trained ones.

    Raises:
        CheckpointError: the checkpoint holds a model of another size.
    """
    try:
        model.load_state_dict(checkpoint.read_tensors(folder, "model"), strict=False)
    except RuntimeError as error:
        raise checkpoint.CheckpointError(f"{folder}: holds another model ({error})") from None


class TowerOutputs(nn.Module):
    """A dual encoder whose features are the raw outputs of its towers, as training needs them."""

    def __init__(self, model: DualEncoder) -> None:
        super().__init__()
        self.model = model
        self.spec = model.spec

    def encode_image(self, pixels: Tensor) -> Tensor:
        return self.model.image_outputs(pixels, self.model.towers)

    def encode_text(self, ids: Tensor) -> Tensor:
        return self.model.text_outputs(ids, self.model.towers)


@dataclass
class FeatureMaker:
    """Computes features shard by shard, on this rank and without exchange with other ranks.

    `images` and `texts` return the arguments of `write_features`: (m, D) features and (n + 1,)
    offsets `first`; the features of row i of the shard's index are `first[i] : first[i + 1]`.
    """

    catalog: Catalog
    encoder: Encoder
    accelerator: Accelerator

    def images(self, shard: int) -> tuple[Tensor, Tensor]:
        """One feature per image; NaN for an image that is left out or cannot be read."""
        rows, total = self._index_rows(shard)
        with self.accelerator.autocast():
            made, readable = encode_shard_images(self.encoder, self.catalog, shard)
        features = torch.full((total, made.shape[1]), torch.nan)
        features[rows[readable]] = made
        return features, torch.arange(total + 1)

    def texts(self, shard: int) -> tuple[Tensor, Tensor]:
        """One feature per caption; none for pairs that are left out."""
        rows, total = self._index_rows(shard)
        captions = read_shard_captions(self.catalog, shard)
        counts = torch.zeros(total, dtype=torch.int64)
        counts[rows] = torch.tensor([len(each) for each in captions], dtype=torch.int64)
        flat = [caption for each in captions for caption in each]
        with self.accelerator.autocast():
            features = encode_shard_texts(self.encoder, flat)
        first = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
        return features, first

    def _index_rows(self, shard: int) -> tuple[Tensor, int]:
        """The rows of a shard's index that hold usable pairs, and the number of all its rows.

        The catalog leaves out the other rows, whose pairs the index marks as bad.
        """
        table = read_index(self.catalog.shards[shard], ["status"])
        return torch.from_numpy(good_rows(table)), len(table)


def tower_digest(
    tower: str, loaded: Loaded, model: DualEncoder, precision: str, max_pixels: int
) -> str:
    """A digest of everything the features depend on: weights, layers, preprocessing, precision."""
    # The tokenizer enters the digest by its output for one sentence with capitals, a number, an
    # accent and punctuation.
    probe = (
        loaded.tokenize(["A photo of 2 cats, é!"]).tolist()
        if tower == "text"
        else (loaded.spec, max_pixels)
    )
    weights = {}
    for name, tensor in model.towers.state_dict().items():
        if model.towers.locate(name).tower == tower:
            weights[name] = tensor
    # modules as well as weights, because activation functions have no weights
    layers = (
        (name, part)
        for name, part in model.towers.named_modules()
        if model.towers.locate(f"{name}.").tower == tower
    )
    return model_digest(layers, weights, tower, probe, precision)
