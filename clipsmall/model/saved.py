"""A model to evaluate, by name: a run or checkpoint of ours, or whatever its libraries can load."""

from collections.abc import Iterator
from pathlib import Path

from clipsmall.batch import RunContext
from clipsmall.model import load as tower_loading
from clipsmall.model.dual_encoder import DualEncoder
from clipsmall.model.heads import HEADS
from clipsmall.model.towers import Loaded
from clipsmall.storage import checkpoint


def load_model(name: str, pretrained: str = "") -> tuple[DualEncoder, Loaded]:
    """A model to evaluate: a run folder or checkpoint of ours, or anything
    `tower_loading.load_towers` knows.

    Raises:
        ValueError: nothing usable of that name, or no weights (`pretrained="none"` asks for random
            ones).
    """
    path = Path(name)
    if (path / "checkpoints").is_dir():
        newest = checkpoint.newest(path / "checkpoints")
        if newest is None:
            raise ValueError(f"{path}: no complete checkpoint in this run")
        # verified
        path = newest
    elif (path / "manifest.json").exists():
        checkpoint.verify(path)
    if (path / "manifest.json").exists():
        if pretrained:
            raise ValueError(
                f"{name}: a run of ours has its own weights; leave out --pretrained {pretrained}"
            )
        loaded = tower_loading.rebuild(path)
        weights = checkpoint.read_tensors(path, "model")
        retrieval = loaded.description.get("retrieval")
        head = retrieval["head"] if retrieval else ""
        heads = (
            {head: HEADS[head](RunContext(retrieval["width"], 0, 0), **retrieval["options"])}
            if retrieval
            else {}
        )
        model = DualEncoder(loaded.towers, loaded.spec, 1.0, 0.0, False, heads=heads, through=head)
        # heads that only training needs stay in the file
        needed = model.state_dict().keys()
        model.load_state_dict({name: tensor for name, tensor in weights.items() if name in needed})
        if loaded.description.get("relative_bias"):
            model.logit_bias.data.mul_(model.logit_scale.data.exp())
        return model, loaded

    def no_captions() -> Iterator[str]:
        raise ValueError(
            f"{name}: an untrained tower JSON has no vocabulary; give a run folder or checkpoint"
        )

    loaded = tower_loading.load_towers(name, pretrained, no_captions)
    if loaded.logit_scale is None and pretrained != "none":
        raise ValueError(
            f"{name}: no weights named, its towers would be random; choose a tag that open_clip.list_pretrained() has "
            "(--pretrained TAG; evaluate: NAME,TAG), or none for random ones all the same"
        )
    model = DualEncoder(
        loaded.towers, loaded.spec, loaded.logit_scale or 1.0, loaded.logit_bias or 0.0, False
    )
    return model, loaded
