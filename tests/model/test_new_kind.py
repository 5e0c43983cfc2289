"""Tests that a new kind of towers needs one class, and its name in TOWERS.

Seen to fail when: `load_towers` or `rebuild` asks a fixed list of kinds; the opening lines, the
cache of frozen features or `tune` ask for a library's `model`.
"""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from clipsmall import train
from clipsmall.data.preprocess import ImageSpec
from clipsmall.export import __main__ as export
from clipsmall.model.load import load_towers, rebuild, save_model_files
from clipsmall.model.saved import load_model
from clipsmall.model.towers import TOWERS
from clipsmall.model.towers.base import Loaded, Towers, read_json
from clipsmall.model.towers.small import PAD, SmallText, WordTokenizer
from tests.shards_for_tests import config

TEXT = SmallText(context_length=8, vocab_size=512)


class ToyTowers(Towers):
    """A linear map of each patch, averaged; the sum of a caption's word vectors."""

    kind = "toy"

    def __init__(self, width: int, patch: int) -> None:
        super().__init__()
        patches = nn.Conv2d(3, width, patch, stride=patch)
        self.visual = nn.Sequential(patches, nn.GELU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.words = nn.Embedding(TEXT.vocab_size, width, padding_idx=PAD)

    def image(self, pixels: Tensor) -> Tensor:
        features: Tensor = self.visual(pixels)
        return features

    def text(self, ids: Tensor) -> Tensor:
        features: Tensor = self.words(ids).sum(dim=1)
        return features

    @classmethod
    def load(
        cls, name: str, tag: str, weights: bool, captions: Callable[[], Iterable[str]]
    ) -> Loaded:
        return load_toy(read_json(Path(name)), WordTokenizer.train(captions(), TEXT))

    @classmethod
    def rebuild(cls, folder: Path, description: dict[str, Any]) -> Loaded:
        words = WordTokenizer.load(folder / "words.json", TEXT.context_length)
        return load_toy(description["config"], words)


def load_toy(config: dict[str, Any], tokenizer: WordTokenizer) -> Loaded:
    def save(folder: Path) -> None:
        (folder / "words.json").write_text(tokenizer.to_json())

    return Loaded(
        towers=ToyTowers(config["width"], config["patch"]),
        spec=ImageSpec(16),
        tokenize=tokenizer,
        logit_scale=None,
        logit_bias=None,
        description={"config": config},
        save_files=save,
    )


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """The name of toy towers, of which clipsmall now knows."""
    monkeypatch.setitem(TOWERS, ToyTowers.kind, ToyTowers)
    path = tmp_path / "toy.json"
    path.write_text(json.dumps({"kind": "toy", "width": 16, "patch": 4}))
    return str(path)


def test_it_trains_continues_and_is_loaded_again(toy: str, glyphs: Path, tmp_path: Path) -> None:
    words = {"model.name": toy, "optim.pairs": 32 * 10}
    whole = tmp_path / "whole"
    cut = tmp_path / "cut"
    assert train.main(config(glyphs, whole, **words)) == 0
    assert train.main(config(glyphs, cut, **words)) == 0
    (cut / "checkpoints" / "step_00000010").rename(tmp_path / "later")
    assert train.main([*config(glyphs, cut, **words), "--resume=auto"]) == 0
    last = load_file(whole / "checkpoints/step_00000010/model.safetensors")
    again = load_file(cut / "checkpoints/step_00000010/model.safetensors")
    assert last.keys() == again.keys()
    assert all(torch.equal(last[name], again[name]) for name in last)
    rows = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses[-1] < losses[0]
    model, loaded = load_model(str(whole))
    assert type(loaded.towers) is ToyTowers
    assert torch.equal(model.state_dict()["towers.words.weight"], last["towers.words.weight"])
    text = model.encode_text(loaded.tokenize(["a", "latin small letter a"]))
    assert text.shape == (2, 16)
    assert not torch.equal(text[0], text[1])


def test_a_frozen_tower_of_it_is_cached(
    toy: str, glyphs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = {
        "model.name": toy,
        "optim.pairs": 32 * 12,
        "tune.image": "frozen",
        "tune.cache_folder": tmp_path / "cache",
    }
    assert train.main(config(glyphs, tmp_path / "run", **words)) == 0
    printed = capsys.readouterr().err
    assert "image tower  frozen" in printed
    assert "image tower frozen: read as features" in printed


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"tune.image": "lora"}, "lora is for the towers of transformers and open_clip"),
        ({"tune.image": 1}, "the image tower has 0 blocks"),
        ({"model.checkpoint_activations": True}, "toy towers have none; take model.chunk_size"),
        ({"model.attention": "eager"}, "toy towers compute attention by SDPA only"),
    ],
)
def test_what_it_does_not_define_is_refused(
    option: dict[str, Any],
    message: str,
    toy: str,
    glyphs: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as left:
        train.main(config(glyphs, tmp_path / "run", **{"model.name": toy, **option}))
    assert left.value.code == 2
    assert message in capsys.readouterr().err


def test_no_library_gets_it(
    toy: str, glyphs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        train.main(config(glyphs, tmp_path / "run", **{"model.name": toy, "optim.pairs": 64})) == 0
    )
    with pytest.raises(SystemExit):
        export.main([str(tmp_path / "run"), "--to", str(tmp_path / "out")])
    assert "toy towers are in neither library" in capsys.readouterr().err


def test_a_kind_that_is_gone_is_named(
    toy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model_files(load_towers(toy, "", lambda: ["a cat"]), tmp_path)
    monkeypatch.delitem(TOWERS, "toy")
    with pytest.raises(ValueError, match="of the kind 'toy'; known kinds are small, open_clip"):
        rebuild(tmp_path)
    with pytest.raises(ValueError, match='is no tower JSON with "kind": "small"'):
        load_towers(toy, "", lambda: ["a cat"])
