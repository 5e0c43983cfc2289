"""One dual encoder over any pair of towers: ours, open_clip's, or those of a HF CLIP or SigLIP checkpoint."""

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor, nn

from clipsmall.batch import Embeddings, Pairs
from clipsmall.preprocess import ImageSpec
from clipsmall.small_towers import SmallConfig, SmallTowers, WordTokenizer

MAX_LOG_SCALE = math.log(100.0)  # CLIP's bound: beyond it float32 logits lose the small differences


class Towers(Protocol):
    """Two towers in one module: normalised pixels (B, 3, H, W) and token ids (B, L) -> (B, D)."""

    def image(self, pixels: Tensor) -> Tensor: ...

    def text(self, ids: Tensor) -> Tensor: ...


class DualEncoder(nn.Module):
    """Towers, a temperature and a bias: pairs in, unit embeddings out.

    Args:
        towers: a module with `image` and `text`.
        spec: the towers' image size, mean and std.
        logit_scale: the positive factor of the cosines at the start (1/temperature).
        logit_bias: at the start; learned only if `learn_bias`.
    """

    def __init__(
        self, towers: nn.Module, spec: ImageSpec, logit_scale: float, logit_bias: float, learn_bias: bool
    ) -> None:
        super().__init__()
        self.towers: Any = towers
        self.spec = spec
        self.logit_scale = nn.Parameter(torch.tensor(math.log(logit_scale)))
        self.logit_bias = nn.Parameter(torch.tensor(logit_bias), requires_grad=learn_bias)
        self.register_buffer("mean", torch.tensor(spec.mean).view(3, 1, 1) * 255, persistent=False)
        self.register_buffer("std", torch.tensor(spec.std).view(3, 1, 1) * 255, persistent=False)

    def encode_image(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) uint8 -> (B, D) unit rows, at least float32."""
        return unit(self.towers.image((pixels.to(self.mean.dtype) - self.mean) / self.std))

    def encode_text(self, ids: Tensor) -> Tensor:
        """(B, L) token ids -> (B, D) unit rows, at least float32."""
        return unit(self.towers.text(ids))

    def forward(self, pairs: Pairs) -> Embeddings:
        return Embeddings(
            image=self.encode_image(pairs.image),
            text=self.encode_text(pairs.text),
            index=pairs.index,
            caption_hash=pairs.caption_hash,
            logit_scale=self.logit_scale.exp(),
            logit_bias=self.logit_bias,
        )

    @torch.no_grad()
    def clamp_logit_scale(self) -> None:
        """Keep 1 ≤ scale ≤ 100. Called after each step: a clamp in forward would kill the gradient at the bound."""
        self.logit_scale.clamp_(0.0, MAX_LOG_SCALE)


def unit(x: Tensor) -> Tensor:
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1)


@dataclass
class Loaded:
    """Towers with all that belongs to them."""

    towers: nn.Module
    spec: ImageSpec
    tokenize: Callable[[list[str]], Tensor]
    logit_scale: float | None  # what the weights were trained with; None = fresh
    logit_bias: float | None
    description: dict[str, Any]  # JSON from which `rebuild` makes the same architecture
    save_tokenizer: Callable[[Path], None]


# ---- ours ------------------------------------------------------------------------------------------------------


def small(config: SmallConfig, tokenizer: WordTokenizer) -> Loaded:
    image = config.image
    return Loaded(
        towers=SmallTowers(config),
        spec=ImageSpec(image.size, image.mean, image.std),
        tokenize=tokenizer,
        logit_scale=None,
        logit_bias=None,
        description={"kind": "small", "config": config.model_dump(mode="json")},
        save_tokenizer=lambda folder: (folder / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8"),  # type: ignore[func-returns-value]
    )


# ---- open_clip -------------------------------------------------------------------------------------------------


class OpenClipTowers(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def image(self, pixels: Tensor) -> Tensor:
        features: Tensor = self.model.encode_image(pixels)
        return features

    def text(self, ids: Tensor) -> Tensor:
        features: Tensor = self.model.encode_text(ids)
        return features


def taken_over(model: Any, fresh: bool) -> tuple[float | None, float | None]:
    """Scale and bias of a library's model. They are removed there: DDP refuses parameters that nothing uses."""
    scale = model.logit_scale.exp().item()
    bias = model.logit_bias.item() if getattr(model, "logit_bias", None) is not None else None
    for name in ("logit_scale", "logit_bias"):
        if isinstance(getattr(model, name, None), nn.Parameter):
            delattr(model, name)
    return (None, None) if fresh else (scale, bias)


def from_open_clip(name: str, pretrained: str, weights: bool = True) -> Loaded:
    """An open_clip model by name, by a model JSON, or by `local-dir:FOLDER`.

    Args:
        pretrained: a weight tag or file of open_clip, "" for none.
        weights: False builds the architecture alone, to load our own weights into.

    Raises:
        ValueError: no such model or weights.
    """
    import open_clip

    if name.endswith(".json"):
        open_clip.add_model_config(Path(name))
        name = Path(name).stem
    fresh = not weights or (not pretrained and not name.startswith("local-dir:"))
    try:
        model = open_clip.create_model(name, pretrained=pretrained or None, load_weights=weights)
        tokenizer = open_clip.get_tokenizer(name)
    except (RuntimeError, FileNotFoundError, OSError) as error:
        raise ValueError(f"open_clip cannot make model {name!r} with pretrained={pretrained!r}: {error}") from None
    found = open_clip.get_model_preprocess_cfg(model)
    size = found["size"] if isinstance(found["size"], int) else found["size"][0]
    resize = {"shortest": "shortest", "squash": "squash"}.get(found["resize_mode"])
    if resize is None:
        raise ValueError(f"open_clip model {name!r} resizes by {found['resize_mode']!r}; shortest and squash are supported")
    spec = ImageSpec(size, tuple(found["mean"]), tuple(found["std"]), found["interpolation"], resize)  # type: ignore[arg-type]
    config = _open_clip_config(name)
    scale, bias = taken_over(model, fresh)
    return Loaded(
        towers=OpenClipTowers(model),
        spec=spec,
        tokenize=tokenizer,
        logit_scale=scale,
        logit_bias=bias,
        description={"kind": "open_clip"},
        save_tokenizer=lambda folder: (folder / "open_clip_config.json").write_text(
            json.dumps({"model_cfg": config, "preprocess_cfg": dict(found)}, indent=2)
        ),  # type: ignore[func-returns-value]
    )


def _open_clip_config(name: str) -> dict[str, Any]:
    import open_clip

    if name.startswith("local-dir:"):
        text = (Path(name.removeprefix("local-dir:")) / "open_clip_config.json").read_text()
        local: dict[str, Any] = json.loads(text)["model_cfg"]
        return local
    named: dict[str, Any] = open_clip.get_model_config(name)
    return named


# ---- transformers ----------------------------------------------------------------------------------------------


class HFTowers(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def image(self, pixels: Tensor) -> Tensor:
        features: Tensor = self.model.get_image_features(pixel_values=pixels).pooler_output
        return features

    def text(self, ids: Tensor) -> Tensor:
        # no attention mask: CLIP is causal and pools before its padding, SigLIP was trained with padding in sight
        features: Tensor = self.model.get_text_features(input_ids=ids).pooler_output
        return features


def from_transformers(name: str, weights: bool = True) -> Loaded:
    """A HF `CLIPModel` or `SiglipModel` from a folder or the hub, in float32, with its tokenizer and processor.

    Raises:
        ValueError: not there, not a CLIP or SigLIP, or preprocessing we do not speak.
    """
    from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoTokenizer

    try:
        config = AutoConfig.from_pretrained(name)
        if config.model_type not in ("clip", "siglip"):
            raise ValueError(f"{name}: a {config.model_type!r} model; only clip and siglip are dual encoders we know")
        if weights:
            model = AutoModel.from_pretrained(name, dtype=torch.float32)
        else:
            model = AutoModel.from_config(config, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(name)
        processor = AutoImageProcessor.from_pretrained(name)
    except OSError as error:
        raise ValueError(f"{name}: neither a folder nor a hub id that transformers can load ({error})") from None
    length = config.text_config.max_position_embeddings

    def tokenize(captions: list[str]) -> Tensor:
        ids: Tensor = tokenizer(
            captions, padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        ).input_ids
        return ids

    def save(folder: Path) -> None:
        tokenizer.save_pretrained(folder)
        processor.save_pretrained(folder)
        config.save_pretrained(folder)

    scale, bias = taken_over(model, fresh=not weights)
    return Loaded(
        towers=HFTowers(model),
        spec=_hf_image_spec(name, processor.to_dict()),
        tokenize=tokenize,
        logit_scale=scale,
        logit_bias=bias,
        description={"kind": "transformers"},
        save_tokenizer=save,
    )


def _hf_image_spec(name: str, processor: dict[str, Any]) -> ImageSpec:
    size, crop = dict(processor["size"]), dict(processor.get("crop_size") or {})
    edge = size.get("shortest_edge")
    side = edge or size.get("height")
    interpolation = {2: "bilinear", 3: "bicubic"}.get(int(processor["resample"]))
    square = crop.get("height") == crop.get("width") == edge if edge else size.get("height") == size.get("width")
    if side is None or interpolation is None or not square:
        raise ValueError(f"{name}: preprocessing with size {size}, crop {crop}, resample {processor['resample']} is not supported")
    mean, std = processor["image_mean"], processor["image_std"]
    return ImageSpec(side, tuple(mean), tuple(std), interpolation, "shortest" if edge else "squash")  # type: ignore[arg-type]


# ---- by name ---------------------------------------------------------------------------------------------------


def load_towers(name: str, pretrained: str, captions: Callable[[], Iterable[str]]) -> Loaded:
    """Towers by what the user names.

    Args:
        name: a tower JSON of ours (`"kind": "small"`), an open_clip model name or model JSON, a folder, or a hub id
            of transformers; `open_clip:` or `hf:` in front decides where it is unclear.
        pretrained: an open_clip tag, "" for the default (a folder or hub id brings its weights, an open_clip name
            none), "none" for an architecture with fresh weights.
        captions: the training captions, from which our own towers learn their vocabulary.

    Raises:
        ValueError: nothing of that name, or a broken description.
    """
    weights = pretrained != "none"
    tag = pretrained if weights else ""
    path = Path(name)
    if name.startswith("open_clip:"):
        return from_open_clip(name.removeprefix("open_clip:"), tag, weights)
    if name.startswith("hf:"):
        return from_transformers(name.removeprefix("hf:"), weights)
    if path.suffix == ".json":
        description = _json(path)
        if description.get("kind") != "small":
            return from_open_clip(name, tag, weights)
        try:
            config = SmallConfig.model_validate(description)
        except ValidationError as error:
            raise ValueError(f"{name}: {error}") from None
        return small(config, WordTokenizer.train(captions(), config.text))
    if (path / "open_clip_config.json").exists():
        return from_open_clip(f"local-dir:{name}", tag, weights)
    if path.is_dir():
        return from_transformers(name, weights)
    import open_clip

    if name in open_clip.list_models():
        return from_open_clip(name, tag, weights)
    if "/" in name:
        return from_transformers(name, weights)
    raise ValueError(f"{name!r} is no tower JSON, folder, open_clip model or hub id; see open_clip.list_models()")


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except OSError:
        raise ValueError(f"{path}: no such file") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON ({error})") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: holds no JSON object")
    return found


def rebuild(folder: Path) -> Loaded:
    """The architecture and tokenizer that `save_model_files` wrote into a checkpoint folder, with fresh weights."""
    description = _json(folder / "towers.json")
    if description["kind"] == "small":
        config = SmallConfig.model_validate(description["config"])
        loaded = small(config, WordTokenizer.load(folder / "tokenizer.json", config.text.context_length))
    elif description["kind"] == "open_clip":
        loaded = from_open_clip(f"local-dir:{folder}", "", weights=False)
    else:
        loaded = from_transformers(str(folder), weights=False)
    loaded.spec = ImageSpec(**{k: tuple(v) if isinstance(v, list) else v for k, v in description["spec"].items()})
    return loaded


def save_model_files(loaded: Loaded, folder: Path) -> None:
    """What `rebuild` needs, beside the weights."""
    loaded.save_tokenizer(folder)
    (folder / "towers.json").write_text(json.dumps({**loaded.description, "spec": asdict(loaded.spec)}, indent=2))
