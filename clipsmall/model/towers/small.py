"""Small towers that train on a laptop's CPU: strided convolutions, and a transformer over words."""

import json
from collections.abc import Callable, Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from tokenizers import Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import WordLevel
from tokenizers.trainers import WordLevelTrainer
from torch import Tensor, nn

from clipsmall.data.preprocess import ImageSpec
from clipsmall.model.towers.base import Loaded, Towers, read_json

# token ids
PAD = 0
UNKNOWN = 1


class SmallImage(BaseModel):
    model_config = ConfigDict(extra="forbid")
    size: int = Field(32, ge=8, description="pixels, square; halved once for each width")
    widths: tuple[int, ...] = Field(
        (32, 64, 128), min_length=1, description="channels after each halving"
    )
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)

    @model_validator(mode="after")
    def _halves(self) -> "SmallImage":
        halvings = len(self.widths)
        if self.size % 2**halvings:
            raise ValueError(f"size={self.size} cannot be halved {halvings} times")
        return self


class SmallText(BaseModel):
    model_config = ConfigDict(extra="forbid")
    width: int = Field(128, ge=8)
    layers: int = Field(1, ge=1)
    heads: int = Field(4, ge=1)
    context_length: int = Field(16, ge=2, description="words")
    vocab_size: int = Field(
        8192, ge=16, description="words at most, the most frequent of the training captions"
    )

    @model_validator(mode="after")
    def _divides(self) -> "SmallText":
        if self.width % self.heads:
            raise ValueError(f"width={self.width} does not divide by heads={self.heads}")
        return self


class SmallConfig(BaseModel):
    """A tower JSON of the kind `small`."""

    model_config = ConfigDict(extra="forbid")
    kind: str = Field("small", pattern="^small$")
    embed_dim: int = Field(128, ge=2)
    image: SmallImage = SmallImage()
    text: SmallText = SmallText()


class SmallTowers(Towers):
    """The towers that a `SmallConfig` describes, with fresh weights."""

    kind = "small"
    why_no_lora = "our small towers take no adapters; train them full"

    def __init__(self, config: SmallConfig) -> None:
        super().__init__()
        self.config = config
        # each convolution halves the image's side
        channels = (3, *config.image.widths)
        layers: list[nn.Module] = []
        for before, after in pairwise(channels):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.GELU()]
        side = config.image.size // 2 ** len(config.image.widths)
        last = nn.Linear(side * side * channels[-1], config.embed_dim)
        self.visual = nn.Sequential(*layers, nn.Flatten(), last)
        text = config.text
        self.words = nn.Embedding(text.vocab_size, text.width, padding_idx=PAD)
        self.positions = nn.Parameter(torch.randn(text.context_length, text.width) * 0.01)
        block = nn.TransformerEncoderLayer(
            text.width,
            text.heads,
            4 * text.width,
            dropout=0.0,
            activation="gelu",
            batch_first=True,
            norm_first=True,
        )
        self.blocks = nn.TransformerEncoder(block, text.layers, enable_nested_tensor=False)
        self.head = nn.Linear(text.width, config.embed_dim)

    def image(self, pixels: Tensor) -> Tensor:
        features: Tensor = self.visual(pixels)
        return features

    def text(self, ids: Tensor) -> Tensor:
        """Word ids (B, L) -> (B, D): the mean over a caption's words."""
        is_word = ids != PAD
        x = self.words(ids) + self.positions
        x = self.blocks(x, src_key_padding_mask=~is_word)
        # (B, L, 1): 1 for a word, 0 for padding
        weights = is_word.to(x.dtype)[:, :, None]
        total = (x * weights).sum(dim=1)
        words = weights.sum(dim=1).clamp(min=1)
        features: Tensor = self.head(total / words)
        return features

    @classmethod
    def load(
        cls, name: str, tag: str, weights: bool, captions: Callable[[], Iterable[str]]
    ) -> Loaded:
        """Fresh towers by a tower JSON; `tag` and `weights` have no meaning here."""
        try:
            config = SmallConfig.model_validate(read_json(Path(name)))
        except ValidationError as error:
            raise ValueError(f"{name}: {error}") from None
        tokenizer = WordTokenizer.train(captions(), config.text)
        return load_small(config, tokenizer)

    @classmethod
    def rebuild(cls, folder: Path, description: dict[str, Any]) -> Loaded:
        config = SmallConfig.model_validate(description["config"])
        length = config.text.context_length
        tokenizer = WordTokenizer.load(folder / "tokenizer.json", length)
        return load_small(config, tokenizer)


def load_small(config: SmallConfig, tokenizer: "WordTokenizer") -> Loaded:
    """Small towers with fresh weights, and all that belongs to them."""

    def save(folder: Path) -> None:
        (folder / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")

    image = config.image
    return Loaded(
        towers=SmallTowers(config),
        spec=ImageSpec(image.size, image.mean, image.std),
        tokenize=tokenizer,
        logit_scale=None,
        logit_bias=None,
        description={"config": config.model_dump(mode="json")},
        save_files=save,
    )


class WordTokenizer:
    """Captions -> (n, context_length) word ids, padded with PAD."""

    def __init__(self, tokenizer: Tokenizer, context_length: int) -> None:
        self.tokenizer = tokenizer
        tokenizer.enable_truncation(context_length)
        tokenizer.enable_padding(length=context_length, pad_id=PAD, pad_token="[PAD]")

    @classmethod
    def train(cls, captions: Iterable[str], config: SmallText) -> "WordTokenizer":
        """The words of the training captions, most frequent first.

        The same captions give the same vocabulary, in whatever order they come.
        """
        tokenizer = Tokenizer(WordLevel(unk_token="[UNK]"))
        tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        trainer = WordLevelTrainer(
            vocab_size=config.vocab_size, special_tokens=["[PAD]", "[UNK]"], show_progress=False
        )
        tokenizer.train_from_iterator(captions, trainer)
        return cls(tokenizer, config.context_length)

    @classmethod
    def load(cls, path: Path, context_length: int) -> "WordTokenizer":
        return cls(Tokenizer.from_str(path.read_text(encoding="utf-8")), context_length)

    def to_json(self) -> str:
        return json.dumps(json.loads(self.tokenizer.to_str()), ensure_ascii=False, indent=1)

    def __call__(self, captions: list[str]) -> Tensor:
        encodings = self.tokenizer.encode_batch(captions)
        ids = torch.tensor([encoding.ids for encoding in encodings])
        # a caption of nothing but symbols, which the splitter drops, is one unknown word
        is_empty = ids.eq(PAD).all(dim=1)
        ids[is_empty, 0] = UNKNOWN
        return ids
