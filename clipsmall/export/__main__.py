"""Export a trained model as a folder for transformers and open_clip, with its model card.

    python -m clipsmall.export runs/demo --to exported/demo --licence apache-2.0
    python -m clipsmall.export runs/lora --to exported/adapter --adapter
    python -m clipsmall.export ViT-B-32 --pretrained laion2b_s34b_b79k --to vit-b-32 --push ORG/NAME

LoRA adapters are merged into the weights; --adapter exports only the adapters and the logit scale.
Before the folder gets its final name, both libraries load it, and its features are compared with
the model's.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from torch import Tensor

from clipsmall.cli import MODEL_HELP, refuse
from clipsmall.evaluation.command import single_threaded_tokenizers
from clipsmall.export import adapter, card, comparison, folder, hub, usage
from clipsmall.model import lora
from clipsmall.model.dual_encoder import DualEncoder
from clipsmall.model.saved import load_model
from clipsmall.model.towers import Loaded
from clipsmall.storage import checkpoint
from clipsmall.storage.run_folder import RunFolder
from clipsmall.storage.yaml_files import read_yaml


def find_run(name: str) -> tuple[str, dict[str, Any]]:
    """Find the checkpoint of MODEL if it is a run, and fields of the model card from the run.

    Returns:
        The checkpoint's path and the fields; or the name unchanged and no fields.
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
    # evaluations of another step do not describe this checkpoint
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
    # what users will write to load the model
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
            # nothing to compare: adapters without their base are not a model
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
    """The log of logit_scale, and logit_bias if it was learned or the model family has one."""
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
    parser.add_argument("--adapter", action="store_true", help="only the LoRA adapters, not merged")
    parser.add_argument("--name", default="", help="title of the model card; default: the folder's")
    parser.add_argument(
        "--licence", default="", help="licence as the hub identifies it, such as apache-2.0"
    )
    parser.add_argument(
        "--push", default="", metavar="ORG/NAME", help="upload to the Hugging Face hub, too"
    )
    parser.add_argument("--private", action="store_true", help="make the hub's repository private")
    options = parser.parse_args(words)
    single_threaded_tokenizers()
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
