"""Config -> features of frozen towers, computed once a shard and read instead of images or
captions.
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm import tqdm

from clipsmall.build import objective as build_objective
from clipsmall.build.data import TrainingData
from clipsmall.config import Config
from clipsmall.data import Catalog, captions_of, fields_of, read_index
from clipsmall.data.features import Features, feature_file, usable, write_features
from clipsmall.data.scores import good_rows
from clipsmall.distributed import world
from clipsmall.evaluation import Encoder
from clipsmall.model.dual_encoder import DualEncoder
from clipsmall.model.parameter_names import place
from clipsmall.model.towers import Loaded
from clipsmall.storage import checkpoint


class Outputs(nn.Module):
    """A dual encoder whose features are its towers' outputs: what training goes on from."""

    def __init__(self, model: DualEncoder) -> None:
        super().__init__()
        self.model = model
        self.spec = model.spec

    def encode_image(self, pixels: Tensor) -> Tensor:
        return self.model.image_outputs(pixels, self.model.towers)

    def encode_text(self, ids: Tensor) -> Tensor:
        return self.model.text_outputs(ids, self.model.towers)


def idle_towers(config: Config, data: TrainingData, model: DualEncoder) -> list[str]:
    """The towers whose outputs are the same whenever a pair comes, and pairs come more than once:
    nothing in them trains, nothing augments their input."""
    if not config.tune.cache or data.catalog is None or config.steps <= data.per_epoch:
        return []
    trained = {place(name).tower for name, p in model.towers.named_parameters() if p.requires_grad}
    found = [tower for tower in ("image", "text") if tower not in trained]
    if config.data.crop_scale < 1 and "image" in found:
        found.remove("image")
    if "tokens" in build_objective.head_options(config) and "text" in found:
        # the head reads token ids
        found.remove("text")
    return found


def frozen_features(
    config: Config,
    data: TrainingData,
    loaded: Loaded,
    model: DualEncoder,
    accelerator: Accelerator,
    resumed: Path | None = None,
) -> dict[str, Features]:
    """`image` and `text` of the towers that are idle; every rank makes those of its shards, all
    read all.

    Args:
        resumed: the checkpoint whose towers these will be; a rebuilt model has fresh weights until
            then.

    Raises:
        ValueError: features cannot be written, or the checkpoint holds another model.
    """
    found = {}
    catalog = data.catalog
    folder = Path(config.tune.cache_folder) if config.tune.cache_folder else None
    towers = idle_towers(config, data, model)
    if towers and resumed is not None:
        try:
            model.load_state_dict(checkpoint.read_tensors(resumed, "model"), strict=False)
        except RuntimeError as error:
            # of another size
            raise checkpoint.CheckpointError(f"{resumed}: holds another model ({error})") from None
    for tower in towers:
        assert catalog is not None
        digest = _digest(tower, config, loaded, model, accelerator)
        files = [feature_file(shard, tower, digest, folder) for shard in catalog.shards]
        left = [k for k, file in enumerate(files) if not usable(file, catalog.shards[k], digest)]
        # all have looked before anybody writes: they share the same list
        world.barrier()
        maker = Maker(config, catalog, loaded, Outputs(model), accelerator)
        for k in tqdm(
            left[world.rank() :: world.size()], desc=f"{tower} features", disable=world.rank() > 0
        ):
            features, first = maker.images(k) if tower == "image" else maker.texts(k)
            write_features(files[k], catalog.shards[k], digest, features, first)
        world.barrier()
        found[tower] = Features(catalog, files)
        if world.rank() == 0:
            size = sum(file.stat().st_size for file in files) / 2**20
            print(
                f"{tower} tower frozen: read as features, {size:,.0f} MiB in {files[0].parent}",
                file=sys.stderr,
            )
    return found


@dataclass
class Maker:
    """Makes the features of one shard after another, on this rank alone."""

    config: Config
    catalog: Catalog
    loaded: Loaded
    model: Any
    accelerator: Accelerator

    def images(self, shard: int) -> tuple[Tensor, Tensor]:
        """As `write_features` takes them."""
        alone, rows, total = self._alone(shard)
        try:
            with world.single_process(), self.accelerator.autocast():
                made, there = self._encoder().images(alone)
        except ValueError as error:
            if "can be read" not in str(error):
                raise
            made = self._encoder().texts(["a"])[:0]
            there = torch.empty(0, dtype=torch.int64)
        finally:
            os.close(alone.descriptor(0))
        features = torch.full((total, made.shape[1]), torch.nan)
        features[rows[there]] = made
        return features, torch.arange(total + 1)

    def texts(self, shard: int) -> tuple[Tensor, Tensor]:
        alone, rows, total = self._alone(shard)
        captions = list[str]()
        counts = torch.zeros(total, dtype=torch.int64)
        for row, place_ in enumerate(rows.tolist()):
            members = alone.read_text(row)
            mine = captions_of(members.text, fields_of(members.json))
            captions += mine
            counts[place_] = len(mine)
        os.close(alone.descriptor(0))
        with world.single_process(), self.accelerator.autocast():
            features = self._encoder().texts(captions)
        return features, torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])

    def _alone(self, shard: int) -> tuple[Catalog, Tensor, int]:
        """One shard as a catalog, the rows of its index that these are, and how many the index
        has.
        """
        table = read_index(self.catalog.shards[shard], ["status"])
        return self.catalog.only(shard), torch.from_numpy(good_rows(table)), len(table)

    def _encoder(self) -> Encoder:
        size = self.config.evaluate.batch_size
        data = self.config.data
        device = self.accelerator.device
        return Encoder(
            self.model, self.loaded.tokenize, device, size, data.workers, max_pixels=data.max_pixels
        )


def _digest(
    tower: str, config: Config, loaded: Loaded, model: DualEncoder, accelerator: Accelerator
) -> str:
    """Of everything the features depend on: weights, preprocessing, tokens, precision."""
    probe = (
        loaded.tokenize(["A photo of 2 cats, é!"]).tolist()
        if tower == "text"
        else (loaded.spec, config.data.max_pixels)
    )
    weights = {
        name: x for name, x in model.towers.state_dict().items() if place(name).tower == tower
    }
    layers = (
        (name, part)
        for name, part in model.towers.named_modules()
        if place(f"{name}.").tower == tower
    )
    return checkpoint.model_digest(layers, weights, tower, probe, accelerator.mixed_precision)
