"""The base class of all towers: what a kind must define, and what it may."""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from clipsmall.data.preprocess import ImageSpec
from clipsmall.model.parameter_names import Location, locate


@dataclass
class Loaded:
    """Towers with everything that belongs to them."""

    towers: "Towers"
    spec: ImageSpec
    # captions -> (n, L) token ids
    tokenize: Callable[[list[str]], Tensor]
    # those the weights were trained with; None for fresh weights
    logit_scale: float | None
    logit_bias: float | None
    # JSON kept in a checkpoint, from which `Towers.rebuild` makes the same architecture
    description: dict[str, Any]
    # writes tokenizer and configs into a checkpoint's folder, for `Towers.rebuild`
    save_files: Callable[[Path], None]
    # activation checkpointing is on
    checkpointed: bool = False


class Towers(nn.Module):
    """An image tower and a text tower of one kind.

    A kind defines `kind`, `image`, `text`, `load` and `rebuild`. All else has a default that suits
    plain modules described by a JSON file. A class's name stays: digests of models contain it, by
    which cached features and score files are found again.
    """

    # the key in TOWERS, and "kind" in a checkpoint's towers.json and in tower JSON files
    kind: ClassVar[str]
    # before a name it chooses this kind, as in "hf:openai/clip-vit-base-patch32"; "" = no prefix
    prefix: ClassVar[str] = ""
    # whether `checkpoint_activations` works
    can_checkpoint: ClassVar[bool] = False
    # why adapters (tune: lora) are refused; "" if they are taken
    why_no_lora: ClassVar[str] = "lora is for the towers of transformers and open_clip"

    def image(self, pixels: Tensor) -> Tensor:
        """Normalised pixels (B, 3, H, W) -> (B, D), not of unit length."""
        raise NotImplementedError

    def text(self, ids: Tensor) -> Tensor:
        """Token ids (B, L) -> (B, D), not of unit length."""
        raise NotImplementedError

    @classmethod
    def recognises(cls, name: str, description: dict[str, Any] | None) -> bool:
        """Whether `load` knows what this name means.

        Args:
            name: as the user gave it, without any kind's prefix.
            description: the content of the JSON file that the name points to, if it does.
        """
        return description is not None and description.get("kind") == cls.kind

    @classmethod
    def known_as(cls) -> str:
        """What `recognises` accepts, in words: the end of "x is no …"."""
        return f'tower JSON with "kind": "{cls.kind}"'

    @classmethod
    def load(
        cls, name: str, tag: str, weights: bool, captions: Callable[[], Iterable[str]]
    ) -> Loaded:
        """Towers by a name that this kind recognises.

        Args:
            name: see `recognises`.
            tag: which weights, where a name has several; "" for the default.
            weights: False makes the architecture alone, with fresh weights.
            captions: the training captions, for kinds that learn their vocabulary from them.

        Raises:
            ValueError: nothing of that name, or broken files.
        """
        raise NotImplementedError

    @classmethod
    def rebuild(cls, folder: Path, description: dict[str, Any]) -> Loaded:
        """The same architecture and tokenizer, with fresh weights.

        Args:
            folder: a checkpoint, into which `Loaded.save_files` wrote.
            description: the content of its towers.json: `Loaded.description`.
        """
        raise NotImplementedError

    @classmethod
    def name_in_library(cls, name: str) -> str:
        """What the library itself calls the model that the user named `name`."""
        return name.removeprefix(cls.prefix)

    @property
    def attention(self) -> str:
        """How attention is computed, as model.attention calls it."""
        return "sdpa"

    def set_attention(self, way: str) -> None:
        """Choose how attention is computed: "sdpa" or "eager".

        Raises:
            ValueError: these towers have no such way.
        """
        if way != self.attention:
            raise ValueError(
                f"model.attention={way}: {self.kind} towers compute attention by SDPA only; take "
                "auto"
            )

    def checkpoint_activations(self) -> None:
        """Drop each block's activations, and compute them again in the backward pass.

        Raises:
            ValueError: these towers cannot; chunks do the same for any kind.
        """
        raise ValueError(
            f"model.checkpoint_activations: {self.kind} towers have none; take model.chunk_size"
        )

    @property
    def adaptable(self) -> Any:
        """The module that adapters are put into; tune.lora.targets names its parts."""
        return self

    def locate(self, name: str) -> Location:
        """In which tower and block a parameter or module stands.

        The default knows common names: image parameters lie under `visual.`, blocks are numbered
        in `layers` or `blocks`, the map onto the embeddings is called `head` (see parameter_names).

        Args:
            name: full name of a parameter; of a module with a "." behind it.
        """
        return locate(name)

    @property
    def family(self) -> str:
        """For exports: "clip" or "siglip"; "" if no other library has such towers."""
        return ""


class LibraryTowers(Towers):
    """Towers around a model of a library.

    It is kept as `model`, so in a checkpoint its weights are named "towers.model." + its names.
    """

    can_checkpoint = True
    why_no_lora = ""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    @property
    def adaptable(self) -> Any:
        return self.model


def take_scale_and_bias(model: Any, fresh: bool) -> tuple[float | None, float | None]:
    """Scale (not its log) and bias of a library's model, which are removed from it.

    DualEncoder has its own, and DDP refuses parameters that nothing uses.

    Args:
        fresh: the weights were never trained, so neither were scale and bias: returns None, None.
    """
    scale = model.logit_scale.exp().item()
    has_bias = getattr(model, "logit_bias", None) is not None
    bias = model.logit_bias.item() if has_bias else None
    for name in ("logit_scale", "logit_bias"):
        if isinstance(getattr(model, name, None), nn.Parameter):
            delattr(model, name)
    return (None, None) if fresh else (scale, bias)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        ValueError: no such file, or something else in it.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise ValueError(f"{path}: no such file") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not JSON ({error})") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: holds no JSON object")
    return found
