"""A model to evaluate, by name: a run or checkpoint of ours, or whatever its libraries can load."""

from collections.abc import Iterator
from pathlib import Path

from clipsmall.batch import RunContext
from clipsmall.model.dual_encoder import DualEncoder
from clipsmall.model.heads import HEADS
from clipsmall.model.load import load_towers, rebuild
from clipsmall.model.towers import Loaded
from clipsmall.storage import checkpoint


def load_model(name: str, pretrained: str = "") -> tuple[DualEncoder, Loaded]:
    """A model to evaluate.

    Args:
        name: a run folder or checkpoint of ours, or anything that `load_towers` knows.
        pretrained: a weight tag of open_clip; "none" asks for random weights; "" for what the name
            brings.

    Raises:
        ValueError: nothing usable of that name, or no weights.
    """
    path = Path(name)
    if (path / "checkpoints").is_dir():
        # verified by `newest`
        newest = checkpoint.newest(path / "checkpoints")
        if newest is None:
            raise ValueError(f"{path}: no complete checkpoint in this run")
        path = newest
    elif (path / "manifest.json").exists():
        checkpoint.verify(path)
    else:
        return _from_library(name, pretrained)
    if pretrained:
        raise ValueError(
            f"{name}: a run of ours has its own weights; leave out --pretrained {pretrained}"
        )
    return _from_checkpoint(path)


def _from_checkpoint(path: Path) -> tuple[DualEncoder, Loaded]:
    loaded = rebuild(path)
    weights = checkpoint.read_tensors(path, "model")
    head = ""
    heads = {}
    retrieval = loaded.description.get("retrieval")
    if retrieval:
        head = retrieval["head"]
        context = RunContext(retrieval["width"], 0, 0)
        heads[head] = HEADS[head](context, **retrieval["options"])
    model = DualEncoder(
        loaded.towers, loaded.spec, 1.0, 0.0, False, heads=heads, retrieval_head=head
    )
    # heads that only training needs stay in the file
    needed = model.state_dict().keys()
    model.load_state_dict({name: tensor for name, tensor in weights.items() if name in needed})
    if loaded.description.get("relative_bias"):
        # it was learned in units of the scale
        model.logit_bias.data.mul_(model.logit_scale.data.exp())
    return model, loaded


def _from_library(name: str, pretrained: str) -> tuple[DualEncoder, Loaded]:
    def no_captions() -> Iterator[str]:
        raise ValueError(
            f"{name}: an untrained tower JSON has no vocabulary; give a run folder or checkpoint"
        )

    loaded = load_towers(name, pretrained, no_captions)
    if loaded.logit_scale is None and pretrained != "none":
        raise ValueError(
            f"{name}: no weights named, its towers would be random; choose a tag that "
            "open_clip.list_pretrained() has (--pretrained TAG; evaluate: NAME,TAG), or none for "
            "random ones all the same"
        )
    scale = loaded.logit_scale or 1.0
    bias = loaded.logit_bias or 0.0
    return DualEncoder(loaded.towers, loaded.spec, scale, bias, False), loaded
