"""Export a trained model as a folder for transformers and open_clip, with its model card.

    python -m clipsmall.export runs/demo --to exported/demo --licence apache-2.0
    python -m clipsmall.export runs/lora --to exported/adapter --adapter
    python -m clipsmall.export ViT-B-32 --pretrained laion2b_s34b_b79k --to vit-b-32 --push ORG/NAME

LoRA adapters are merged; --adapter exports them without their base, with the logit scale beside
them. The folder is loaded again by both libraries and compared with the model before it gets its
name.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from torch import Tensor

from clipsmall.cli import MODEL_HELP, refuse
from clipsmall.export import adapter, card, comparison, folder, hub, usage
from clipsmall.model import lora
from clipsmall.model.dual_encoder import DualEncoder
from clipsmall.model.saved import load_model
from clipsmall.model.towers import Loaded
from clipsmall.storage import checkpoint
from clipsmall.storage.run_folder import RunFolder
from clipsmall.storage.yaml_files import read_yaml


def find_run(name: str) -> tuple[str, dict[str, Any]]:
    """The checkpoint that MODEL means, if it is a run's, and what the run's folder says of it.

    Returns:
        The checkpoint's path, and fields of the model card; or the name as it is, and none.
    """
    path = Path(name)
    if (path / "checkpoints").is_dir():
        path = checkpoint.newest(path / "checkpoints") or path
    run = RunFolder(str(path.parent.parent))
    if not (path / "manifest.json").exists() or not run.holds(path):
        return name, {}
    progress = checkpoint.read_state(path)["progress"]
    facts: dict[str, Any] = {"pairs": progress["pairs"]}
    if (run.path / "run.yaml").exists():
        facts["config"] = read_yaml(str(run.path / "run.yaml"))
    if (run.path / "env.json").exists():
        facts["versions"] = _read_json(run.path / "env.json")
    # results of another step are another model's
    if run.last_evaluation() in (-1, progress["step"]):
        cells = sorted(run.evaluations.glob("[!.]*.json"))
        facts["cells"] = [_read_json(cell) for cell in cells]
    return str(path), facts


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{path}: not JSON ({error}); mend or move it, the model card is made of it"
        ) from None


def export(options: argparse.Namespace) -> None:
    """Write the folder, whole or not at all.

    Raises:
        ValueError: a model that cannot be exported.
    """
    target = Path(options.to).resolve()
    # what users of the folder write to load it
    address = options.push or target.name
    source, facts = find_run(options.model)
    with folder.complete_folder(target) as partial:
        model, loaded = load_model(source, options.pretrained)
        model.eval()
        if model.retrieval_head:
            raise ValueError(
                f"{options.model}: retrieves through its head {model.retrieval_head!r}, which "
                "neither transformers nor open_clip has; without it its embeddings match by chance "
                "only"
            )
        scalars = _scalars(model, loaded)
        described = loaded.description
        family = loaded.towers.family
        base = described.get("base") or ("" if facts else options.model)
        revision = ""
        if options.adapter:
            # nothing to compare: without their base the adapters are no model
            base = adapter.base_name(loaded, options.model, public=bool(options.push))
            revision = described.get("revision") or ""
            config, tensors = lora.adapter(loaded.towers.adaptable)
            adapter.write_adapter(config, tensors, base, revision, scalars, partial)
            formats = ["peft", loaded.towers.kind]
            notes = [adapter.adapter_note(scalars, family)]
        else:
            if "lora" in described:
                lora.merge(loaded.towers.adaptable)
            formats, notes = folder.write_model(loaded, scalars, address, partial)
            differences = comparison.compare_exported(loaded, partial, formats, options.model)
            for library, off in differences.items():
                print(f"{library} loads it: features differ by {off:.1e}", file=sys.stderr)
        bias = scalars.get("logit_bias")
        model_card = card.Card(
            name=options.name or address,
            where=usage.Where(address, bool(options.push), family, formats, revision),
            licence=options.licence,
            scale=model.logit_scale.exp().item(),
            bias=None if bias is None else bias.item(),
            base=base,
            pretrained=described.get("pretrained") or options.pretrained,
            notes=notes,
            lora=described.get("lora", {}),
            **facts,
        )
        (partial / "README.md").write_text(card.card_text(model_card), encoding="utf-8")
    for note in notes:
        print(f"note: {note}", file=sys.stderr)


def _scalars(model: DualEncoder, loaded: Loaded) -> dict[str, Tensor]:
    """The scale's log; and the bias if one was learned, or this family of models has one."""
    found = {"logit_scale": model.logit_scale.detach()}
    if model.logit_bias.item() or loaded.towers.family == "siglip":
        found["logit_bias"] = model.logit_bias.detach()
    return found


def main(words: list[str] | None = None, api: Any = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m clipsmall.export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", help=MODEL_HELP)
    parser.add_argument("--to", required=True, help="new folder")
    parser.add_argument("--pretrained", default="", help="weight tag of an open_clip model")
    parser.add_argument("--adapter", action="store_true", help="LoRA alone, not merged")
    parser.add_argument("--name", default="", help="title of the model card; default: the folder's")
    parser.add_argument(
        "--licence", default="", help="an identifier of the hub's, such as apache-2.0"
    )
    parser.add_argument(
        "--push", default="", metavar="ORG/NAME", help="upload to the Hugging Face hub, too"
    )
    parser.add_argument("--private", action="store_true", help="make the hub's repository private")
    options = parser.parse_args(words)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        if options.push:
            from huggingface_hub import HfApi

            api = api or HfApi()
            hub.check_access(options.push, api)
        export(options)
        print(options.to)
        if options.push:
            print(hub.upload_folder(Path(options.to), options.push, options.private, api))
    except ValueError as error:
        refuse(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
