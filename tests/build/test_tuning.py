"""Tests of fine-tuning: what trains, what gets a gradient, what is saved, and what is refused.

Seen to fail when: see the note of each test.
"""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from clipsmall import train
from clipsmall.batch import Pairs, RunContext
from clipsmall.build import (
    chunks as build_chunks,
)
from clipsmall.build import (
    run as build,
)
from clipsmall.config import Config
from clipsmall.config.reader import validated
from clipsmall.distributed import devices
from clipsmall.model import lora
from clipsmall.model.dual_encoder import DualEncoder
from clipsmall.model.load import rebuild, save_model_files
from clipsmall.model.parameter_names import LAST, depths, linear_maps, locate
from clipsmall.model.saved import load_model
from tests.local_clip import local_clip, local_siglip
from tests.model.test_towers import write_open_clip_json
from tests.shards_for_tests import config

BATCH = 6


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    return {
        "clip": str(local_clip(folder / "clip")),
        "siglip": str(local_siglip(folder / "siglip")),
        "open_clip": str(write_open_clip_json(folder)),
    }


def config_of(name: str, **sections: Any) -> Config:
    tree = {
        "data": {"train": ["x"], "batch_size": BATCH},
        "optim": {"pairs": 600},
        "model": {"name": name},
    }
    for section, value in sections.items():
        tree[section] = {**tree.get(section, {}), **value}
    return validated(tree)


def built(config: Config) -> DualEncoder:
    torch.manual_seed(0)
    loaded = build.loaded_towers(config, SimpleNamespace(captions=list), None)  # type: ignore[arg-type]
    if config.model.checkpoint_activations is True:
        loaded.towers.checkpoint_activations()
    encoder = build.dual_encoder(config, loaded, build.run_context(config, loaded, None)).train()
    encoder.chunk_size = config.model.chunk_size  # type: ignore[assignment]
    encoder.tokenize = loaded.tokenize  # type: ignore[assignment]
    return encoder


def pairs_for(encoder: DualEncoder) -> Pairs:
    generator = torch.Generator().manual_seed(1)
    numbers = torch.arange(BATCH)
    size = encoder.spec.size
    pixels = torch.randint(0, 256, (BATCH, 3, size, size), dtype=torch.uint8, generator=generator)
    captions = [
        "a cat",
        "a dog",
        "the letter e",
        "a red heart",
        "a black face",
        "a photo of the small dog",
    ]
    return Pairs(pixels, encoder.tokenize(captions), numbers, numbers)  # type: ignore[operator]


def gradients(encoder: DualEncoder, config: Config) -> dict[str, Tensor | None]:
    objective = build.objective(config, RunContext(8, BATCH, 10))
    rows = encoder(pairs_for(encoder))
    objective(rows, rows)["loss"].backward()
    return {name: p.grad for name, p in encoder.named_parameters() if p.requires_grad}


def stirred(encoder: DualEncoder) -> DualEncoder:
    """Adapters start as zero, and then one half of them has no gradient."""
    for name, parameter in encoder.named_parameters():
        if ".lora_B" in name:
            nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(len(name)))
    return encoder


# ---- gradients


@pytest.mark.parametrize("kind", ["clip", "siglip", "open_clip"])
@pytest.mark.parametrize("amount", ["full", "lora", 1])
def test_every_trainable_tensor_gets_the_same_gradient_whole_chunked_and_checkpointed(
    models: dict[str, str], kind: str, amount: Any
) -> None:
    """Fails when checkpoints are re-entrant, or a tensor is marked that nothing reaches."""
    found = []
    for chunk in (0, 4):
        for anew in (False, True):
            config = config_of(
                models[kind],
                model={"chunk_size": chunk, "checkpoint_activations": anew},
                tune={"image": amount, "text": amount, "projections": True, "lora": {"rank": 2}},
                objective={"name": "sigmoid"},
            )
            found.append(gradients(stirred(built(config)).double(), config))
    assert len(found[0]) > 10
    for name, reference in found[0].items():
        # positions that no caption reaches, and SigLIP's keys' biases, which softmax ignores, have
        # gradients of 0
        assert reference is not None, name
        assert reference.abs().max() > 0 or "k_proj.bias" in name, name
        for other in found[1:]:
            torch.testing.assert_close(other[name], reference, rtol=1e-9, atol=1e-12)


def test_a_tensor_that_trains_without_a_gradient_stops_the_first_step(
    models: dict[str, str],
) -> None:
    encoder = built(config_of(models["clip"]))
    encoder.towers.register_parameter("idle", nn.Parameter(torch.zeros(2)))
    adamw = build.optimizer(config_of(models["clip"]), encoder)
    gradients(encoder, config_of(models["clip"]))
    with pytest.raises(
        ValueError, match=r"1 of \d+ trainable tensors got no gradient: towers\.idle"
    ):
        adamw.step()
    encoder.towers.idle.requires_grad_(False)
    adamw = build.optimizer(config_of(models["clip"]), encoder)
    adamw.step()
    encoder.zero_grad()
    # looked at once
    adamw.step()


# ---- what trains


def trained(encoder: DualEncoder) -> set[str]:
    return {name for name, p in encoder.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("kind", ["clip", "siglip", "open_clip"])
def test_each_amount_trains_what_it_says(models: dict[str, str], kind: str) -> None:
    def of(**tune: Any) -> set[str]:
        return trained(built(config_of(models[kind], tune=tune)))

    names = of()
    image = {n for n in names if locate(n).tower == "image" and n.startswith("towers.")}
    text = {n for n in names if locate(n).tower == "text" and n.startswith("towers.")}
    assert names == image | text | {"logit_scale"}
    assert len(image) > 20 < len(text)
    assert of(image="frozen") == text | {"logit_scale"}
    assert of(image="frozen", text="frozen") == {"logit_scale"}
    assert of(text="frozen", logit_scale=False) == image
    assert of(image="frozen", text=1) == {n for n in text if locate(n).block >= 1} | {"logit_scale"}
    last = {n for n in image if locate(n).projection}
    assert of(image="frozen", projections=True) == text | last | {"logit_scale"}
    assert of(projections=False) == {n for n in image | text if not locate(n).projection} | {
        "logit_scale"
    }
    adapters = of(image="lora", text="frozen") - {"logit_scale"}
    assert adapters
    assert all(
        ".lora_" in n and locate(n).tower == "image" and 0 <= locate(n).block < LAST
        for n in adapters
    )
    both = of(image="lora", text=1)
    assert {n for n in both if ".lora_" not in n} == {n for n in text if locate(n).block >= 1} | {
        "logit_scale"
    }


def test_a_name_tells_its_place() -> None:
    for name, expected in {
        "towers.model.vision_model.encoder.layers.3.mlp.fc1.weight": ("image", 3, False),
        "model.text_model.encoder.layers.0.self_attn.q_proj.base_layer.weight": ("text", 0, False),
        "model.visual.transformer.resblocks.11.attn.in_proj_weight": ("image", 11, False),
        "model.transformer.resblocks.2.ln_1.weight": ("text", 2, False),
        "model.visual.trunk.stages.3.blocks.1.mlp.fc1.weight": ("image", 3, False),
        "model.visual.layer4.0.conv1.weight": ("image", 3, False),
        "model.visual.trunk.patch_embed.proj.weight": ("image", -1, False),
        "model.token_embedding.weight": ("text", -1, False),
        "model.vision_model.pre_layrnorm.weight": ("image", -1, False),
        "model.vision_model.post_layernorm.weight": ("image", LAST, False),
        "model.visual.trunk.attn_pool.kv.weight": ("image", LAST, False),
        "model.visual.proj": ("image", LAST, True),
        "model.text_projection": ("text", LAST, True),
        "model.text.text_projection.bias": ("text", LAST, True),
        "model.visual_projection.weight": ("image", LAST, True),
        "model.text_model.head.weight": ("text", LAST, True),
        "model.visual_projection.base_layer.weight": ("image", LAST, True),
    }.items():
        assert tuple(locate(name)) == expected, name
    names = ["model.visual.transformer.resblocks.11.x.w", "model.transformer.resblocks.2.w"]
    assert depths(map(locate, names)) == {"image": 12, "text": 3}


def test_lr_falls_block_by_block(models: dict[str, str]) -> None:
    config = config_of(models["clip"], optim={"lr": 1e-3, "layer_decay": 0.5})
    encoder = built(config)
    adamw = build.optimizer(config, encoder)
    names = {p: name for name, p in encoder.named_parameters()}
    lrs = {names[p]: group["lr"] for group in adamw.param_groups for p in group["params"]}
    assert len(lrs) == len(trained(encoder))
    for name, lr in lrs.items():
        here = locate(name)
        # two blocks
        follows = 0 if name == "logit_scale" or here.block == LAST else 2 - here.block
        assert lr == pytest.approx(1e-3 * 0.5**follows), name
    # what the log shows
    assert adamw.param_groups[0]["lr"] == 1e-3


def test_what_is_frozen_has_no_dropout(models: dict[str, str], tmp_path: Path) -> None:
    folder = local_clip(tmp_path / "dropout")
    settings = json.loads((folder / "config.json").read_text())
    for side in ("vision_config", "text_config"):
        settings[side]["attention_dropout"] = 0.5
    (folder / "config.json").write_text(json.dumps(settings))
    encoder = built(config_of(str(folder), tune={"image": "frozen"}, model={"attention": "eager"}))
    pairs = pairs_for(encoder)
    first = encoder(pairs)
    second = encoder(pairs)
    assert torch.equal(first.image, second.image)
    assert not torch.equal(first.text, second.text)
    assert not first.image.requires_grad
    assert first.text.requires_grad


def test_frozen_batch_norm_may_be_cut_into_chunks(tmp_path: Path) -> None:
    """It keeps its statistics; trained, a chunk's would not be the batch's."""
    vision = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None}
    name = str(write_open_clip_json(tmp_path, "tiny-resnet.json", vision_cfg=vision))
    alone: Any = SimpleNamespace(device=torch.device("cpu"))
    for amount in ("full", "frozen"):
        config = config_of(name, model={"chunk_size": 2}, tune={"image": amount})
        loaded = build.loaded_towers(config, SimpleNamespace(captions=list), None)  # type: ignore[arg-type]
        encoder = build.dual_encoder(
            config, loaded, build.run_context(config, loaded, None)
        ).train()
        if amount == "full":
            with pytest.raises(ValueError, match="BatchNorm"):
                build_chunks.chunk_size(2, BATCH, 1, alone, loaded, encoder)
        else:
            assert build_chunks.chunk_size(2, BATCH, 1, alone, loaded, encoder) == 2
            before = {
                name: buffer.clone()
                for name, buffer in encoder.towers.named_buffers()
                if "running" in name
            }
            encoder.towers.image(torch.randn(4, 3, 32, 32))
            assert before
            assert all(
                torch.equal(before[name], buffer)
                for name, buffer in encoder.towers.named_buffers()
                if name in before
            )


# ---- adapters


@pytest.mark.parametrize("kind", ["clip", "siglip", "open_clip"])
@pytest.mark.parametrize("option", ["", "dora", "rslora"])
def test_merged_equals_unmerged(models: dict[str, str], kind: str, option: str) -> None:
    options = {"rank": 4, option: True} if option else {"rank": 4}
    tune = {"image": "lora", "text": "lora", "lora": options}
    # peft has none for attention modules of one tensor
    if (kind, option) == ("open_clip", "dora"):
        with pytest.raises(ValueError, match=r"peft refuses these targets or options: .* DoRA"):
            built(config_of(models[kind], tune=tune))
        return
    plain = built(config_of(models[kind])).eval()
    encoder = built(config_of(models[kind], tune=tune)).eval()
    pairs = pairs_for(encoder)
    with torch.no_grad():
        # no change at first
        torch.testing.assert_close(encoder(pairs).image, plain(pairs).image, rtol=0, atol=1e-5)
        unmerged = stirred(encoder)(pairs)
        assert (unmerged.image - plain(pairs).image).abs().max() > 1e-2
        lora.merge(encoder.towers.model)
        merged = encoder(pairs)
    for one, other in ((merged.image, unmerged.image), (merged.text, unmerged.text)):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-4)
    assert set(encoder.state_dict()) == set(plain.state_dict())


def test_peft_itself_loads_what_adapter_gives(models: dict[str, str], tmp_path: Path) -> None:
    from peft import PeftModel
    from safetensors.torch import save_file
    from transformers import CLIPModel

    encoder = stirred(
        built(config_of(models["clip"], tune={"image": "lora", "text": "lora"}))
    ).eval()
    content, tensors = lora.adapter(encoder.towers.model)
    (tmp_path / "adapter_config.json").write_text(json.dumps(content))
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    theirs = PeftModel.from_pretrained(CLIPModel.from_pretrained(models["clip"]), tmp_path).eval()
    pairs = pairs_for(encoder)
    with torch.no_grad():
        expected = encoder.towers.image(encoder.normalised(pairs.image))
        found = theirs.get_image_features(
            pixel_values=encoder.normalised(pairs.image)
        ).pooler_output
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_targets_by_name_and_expression(models: dict[str, str]) -> None:
    model = built(config_of(models["clip"])).towers.model
    assert len(lora.targets(model, "auto")) == len(linear_maps(model)) == 2 * 2 * 6
    assert len(lora.targets(model, ["q_proj", "v_proj"])) == 8
    assert lora.targets(model, ["layers.0.mlp.fc1"]) == [
        "text_model.encoder.layers.0.mlp.fc1",
        "vision_model.encoder.layers.0.mlp.fc1",
    ]
    assert len(lora.targets(model, r"vision_model\..*\.(q_proj|v_proj)")) == 4


@pytest.mark.parametrize(
    ("tune", "message"),
    [
        (
            {"image": "lora", "lora": {"targets": ["q_prok"]}},
            "no module is named 'q_prok'; do you mean 'q_proj'",
        ),
        ({"image": "lora", "lora": {"targets": "vision.*q"}}, "matches no module whole"),
        ({"image": "lora", "lora": {"targets": "("}}, "no regular expression"),
        (
            {"image": "lora", "text": "lora", "lora": {"targets": "vision_model.*fc1"}},
            "nothing in the text tower",
        ),
        ({"image": "lora", "lora": {"targets": ["self_attn"]}}, "peft refuses"),
        ({"image": 3}, "the image tower has 2 blocks"),
        ({"image": "frozen", "text": "frozen", "logit_scale": False}, "nothing would train"),
    ],
)
def test_what_cannot_train_is_refused(
    models: dict[str, str], tune: dict[str, Any], message: str
) -> None:
    config = config_of(models["clip"], tune=tune)
    with pytest.raises(ValueError, match=message):
        build.optimizer(config, built(config))


def test_our_small_towers_have_no_adapters_nor_checkpoints(glyphs: Path, tmp_path: Path) -> None:
    for change, message in (
        ({"tune.image": "lora"}, "take no adapters; train them full"),
        ({"model.checkpoint_activations": True}, "take model.chunk_size"),
        ({"model.attention": "eager"}, "SDPA only"),
        ({"tune.image": 1}, "has 0 blocks"),
    ):
        with pytest.raises(SystemExit) as left:
            train.main(config(glyphs, tmp_path / "none", **change))
        assert left.value.code == 2, message
    assert not (tmp_path / "none").exists()


# ---- runs


def weights(out: Path, step: int) -> dict[str, Tensor]:
    return load_file(out / f"checkpoints/step_{step:08d}/model.safetensors")


def test_a_lora_run_changes_adapters_and_scale_alone_and_resumes(
    models: dict[str, str], glyphs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {
        "model.name": models["clip"],
        "tune.image": "lora",
        "tune.text": "lora",
        "tune.lora.dropout": 0.1,
        "optim.pairs": 32 * 10,
    }
    whole = tmp_path / "whole"
    cut = tmp_path / "cut"
    assert train.main(config(glyphs, whole, **changes)) == 0
    said = capsys.readouterr().err
    assert "image tower  adapters" in said
    assert "fp32 on cpu, attention by sdpa, AdamW" in said
    assert train.main(config(glyphs, cut, **changes)) == 0
    for later in (cut / "checkpoints").glob("*10"):
        later.rename(tmp_path / "later")
    assert train.main([*config(glyphs, cut, **changes), "--resume=auto"]) == 0
    first = weights(whole, 5)
    last = weights(whole, 10)
    again = weights(cut, 10)
    assert all(torch.equal(last[name], again[name]) for name in last)
    changed = {name for name in last if not torch.equal(first[name], last[name])}
    assert changed == {name for name in last if ".lora_" in name} | {"logit_scale"}
    base, _ = load_model(models["clip"])
    plain = base.state_dict()
    for name in last:
        if ".lora_" not in name and name.startswith("towers."):
            assert torch.equal(last[name], plain[name.replace(".base_layer", "")]), name
    model, loaded = load_model(str(whole))
    assert loaded.description["base"] == models["clip"]
    assert loaded.description["lora"]["others"] == []
    assert torch.equal(model.state_dict()["logit_scale"], last["logit_scale"])
    pairs = pairs_for_loaded(model, loaded.tokenize)
    with torch.no_grad():
        tuned = model.eval().encode_image(pairs.image)
        before = base.eval().encode_image(pairs.image)
    assert (tuned - before).abs().max() > 1e-3


def pairs_for_loaded(model: DualEncoder, tokenize: Any) -> Pairs:
    model.tokenize = tokenize  # type: ignore[assignment]
    return pairs_for(model)


def test_a_relative_bias_is_told_to_others_as_a_plain_one(
    models: dict[str, str], glyphs: Path, tmp_path: Path
) -> None:
    changes = {
        "model.name": models["clip"],
        "objective": "sigmoid",
        "objective.sigmoid.relative_bias": True,
    }
    assert train.main(config(glyphs, tmp_path / "run", **changes, **{"optim.pairs": 32 * 5})) == 0
    raw = weights(tmp_path / "run", 5)
    model, _ = load_model(str(tmp_path / "run"))
    assert raw["logit_bias"] != 0
    assert model.logit_bias.item() == pytest.approx(
        (raw["logit_bias"] * raw["logit_scale"].exp()).item()
    )


def test_another_tuning_is_another_run(
    models: dict[str, str], glyphs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {
        "model.name": models["clip"],
        "tune.image": "lora",
        "tune.text": "frozen",
        "optim.pairs": 32 * 5,
    }
    assert train.main(config(glyphs, tmp_path / "run", **changes)) == 0
    for change in ({"tune.lora.rank": 4}, {"tune.text": "full"}, {"optim.layer_decay": 0.5}):
        with pytest.raises(SystemExit):
            train.main(
                [*config(glyphs, tmp_path / "run", **{**changes, **change}), "--resume=auto"]
            )
        assert f"another run: {next(iter(change))} was" in capsys.readouterr().err


def test_files_of_a_checkpoint_rebuild_the_adapters(models: dict[str, str], tmp_path: Path) -> None:
    config = config_of(
        models["siglip"], tune={"image": "lora", "text": "frozen", "lora": {"rank": 3}}
    )
    loaded = build.loaded_towers(config, SimpleNamespace(captions=list), None)  # type: ignore[arg-type]
    save_model_files(loaded, tmp_path)
    again = rebuild(tmp_path)
    assert list(again.towers.state_dict()) == list(loaded.towers.state_dict())
    assert again.description["lora"] == loaded.description["lora"]


def test_a_fresh_siglip_starts_with_a_sane_bias(models: dict[str, str]) -> None:
    """HF starts the bias at 0 and the scale at 1; beside 10 and 0 a batch of 6 would lose about
    6·5·ln 2 and more.
    """
    config = config_of(
        models["siglip"], model={"pretrained": "none"}, objective={"name": "sigmoid"}
    )
    encoder = built(config)
    assert encoder.logit_bias.item() == pytest.approx(-math.log(BATCH - 1))
    rows = encoder(pairs_for(encoder))
    loss = build.objective(config, RunContext(8, BATCH, 10))(rows, rows)["loss"].item()
    # about 1 for the positive at scale 10, 1 for all negatives
    assert loss < 5.5


@pytest.mark.parametrize("learned", [True, False])
def test_a_scale_beyond_100_stays_what_it_was(tmp_path: Path, learned: bool) -> None:
    """SigLIP's is about 117; without its bias' counterpart the loss would jump."""
    from safetensors.torch import save_file

    folder = local_siglip(tmp_path / "siglip")
    tensors = load_file(folder / "model.safetensors")
    tensors["logit_scale"] = torch.tensor([math.log(117.0)])
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = config_of(
        str(folder),
        tune={"logit_scale": learned},
        optim={"lr": 1e-5},
        objective={"name": "sigmoid"},
    )
    encoder = built(config)
    adamw = build.optimizer(config, encoder)
    gradients(encoder, config)
    adamw.step()
    scale = encoder.logit_scale.exp().item()
    assert scale == pytest.approx(117.0, abs=0.01 if learned else 1e-4)
    assert scale < 117.001
    assert encoder.largest_log_scale == pytest.approx(math.log(117.0))


def test_a_checkpoint_of_ours_and_a_folder_without_weights_are_no_start(
    models: dict[str, str], glyphs: Path, tmp_path: Path
) -> None:
    from safetensors.torch import save_file

    from clipsmall.model.load import load_towers

    changes = {"model.name": models["clip"], "optim.pairs": 32 * 5}
    assert train.main(config(glyphs, tmp_path / "run", **changes)) == 0
    for name in (tmp_path / "run", tmp_path / "run/checkpoints/step_00000005"):
        with pytest.raises(
            ValueError, match="a run or checkpoint of ours; continue it with --resume"
        ):
            load_towers(str(name), "", list)
    folder = local_clip(tmp_path / "lacking")
    tensors = load_file(folder / "model.safetensors")
    del tensors["visual_projection.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"lack 1 of the model's weights \(visual_projection"):
        load_towers(str(folder), "", list)


def test_code_of_a_model_is_not_run(tmp_path: Path) -> None:
    from clipsmall.model.load import load_towers

    text = {"hf_tokenizer_name": str(tmp_path), "tokenizer_kwargs": {"trust_remote_code": True}}
    description = {"embed_dim": 8, "vision_cfg": {"width": 8}, "text_cfg": text}
    (tmp_path / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": description, "preprocess_cfg": {}})
    )
    with pytest.raises(ValueError, match="trust_remote_code"):
        load_towers(str(tmp_path), "", list)


# ---- devices


def test_kernels_are_known_by_architecture() -> None:
    wheel = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"]
    assert not devices.has_kernels((7, 0), wheel)
    assert devices.has_kernels((7, 5), wheel)
    # sm_86 code
    assert devices.has_kernels((8, 9), wheel)
    assert devices.has_kernels((9, 0), ["sm_90a"])
    assert devices.has_kernels((12, 1), wheel)
    assert not devices.has_kernels((8, 0), ["sm_86"])
    # PTX
    assert devices.has_kernels((13, 0), wheel)
    assert not devices.has_kernels((13, 0), wheel[:-1])


def test_precision_is_what_the_launcher_or_the_card_says(monkeypatch: pytest.MonkeyPatch) -> None:
    emulated = lambda including_emulation=True: including_emulation  # noqa: E731  a V100
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    assert devices.precision("auto") is None
    assert devices.precision("fp32") == "no"
    assert devices.precision("fp16") == "fp16"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", emulated)
    assert devices.precision("auto") == "fp16"
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    assert devices.precision("auto") == "bf16"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    assert devices.precision("auto") is None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla V100")
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_80"])
    with pytest.raises(
        ValueError, match=r"no kernels for Tesla V100 \(sm_70\), only for sm_75.*cu126"
    ):
        devices.check_kernels()


def test_blocks_are_made_anew_where_a_batch_does_not_fit(
    models: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for fits, chunk, expected in ((True, 0, False), (False, 0, True), (False, 2, False)):
        config = config_of(models["clip"], model={"chunk_size": chunk})
        loaded = build.loaded_towers(config, SimpleNamespace(captions=list), None)  # type: ignore[arg-type]
        monkeypatch.setattr(build_chunks, "fits", lambda *_, fits=fits: fits)
        gpu: Any = SimpleNamespace(device=torch.device("cuda"))
        monkeypatch.setattr(
            build_chunks.torch, "tensor", lambda value, device: torch.as_tensor(value)
        )
        build_chunks.checkpoint_blocks("auto", chunk, BATCH, gpu, loaded, None)  # type: ignore[arg-type]
        monkeypatch.undo()
        assert loaded.checkpointed == expected
        assert loaded.towers.model.is_gradient_checkpointing == expected
