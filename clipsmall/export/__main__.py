"""A trained model as a folder for transformers and open_clip, with its model card.

    python -m clipsmall.export runs/demo --to exported/demo --licence apache-2.0
    python -m clipsmall.export runs/lora --to exported/adapter --adapter
    python -m clipsmall.export ViT-B-32 --pretrained laion2b_s34b_b79k --to vit-b-32 --push ORG/NAME --private

LoRA is merged, or with --adapter exported alone, with its scale beside it. The folder is loaded
again by both libraries and compared with the model before it gets its name.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from torch import Tensor

from clipsmall.cli import MODEL_HELP, refuse
from clipsmall.config.reader import read_yaml
from clipsmall.export import adapter, card, comparison, folder, hub, usage
from clipsmall.model import lora
from clipsmall.model.dual_encoder import DualEncoder
from clipsmall.model.saved import load_model
from clipsmall.model.towers import Loaded
from clipsmall.storage import checkpoint
from clipsmall.storage.run_folder import RunFolder


def run_of(name: str) -> tuple[str, dict[str, Any]]:
    """The checkpoint that MODEL means, if it is one, and what the run's folder tells for the
    card.
    """
    path = Path(name)
    if (path / "checkpoints").is_dir():
        path = checkpoint.newest(path / "checkpoints") or path
    run = RunFolder(str(path.parent.parent))
    if not (path / "manifest.json").exists() or not run.holds(path):
        return name, {}
    facts: dict[str, Any] = {"pairs": checkpoint.read_state(path)["progress"]["pairs"]}
    step = checkpoint.read_state(path)["progress"]["step"]
    if (run.path / "run.yaml").exists():
        facts["config"] = read_yaml(str(run.path / "run.yaml"))
    if (run.path / "env.json").exists():
        facts["versions"] = read_json(run.path / "env.json")
    # those of another step are another model's
    if run.last_evaluation() in (-1, step):
        facts["cells"] = [read_json(cell) for cell in sorted(run.evaluations.glob("[!.]*.json"))]
    return str(path), facts


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{path}: not JSON ({error}); mend or move it, the model card is made of it"
        ) from None


def export(options: argparse.Namespace) -> None:
    """Write the folder, whole or not at all. Raises ValueError for a model that cannot be
    exported.
    """
    target = Path(options.to).resolve()
    place = options.push or target.name
    source, facts = run_of(options.model)
    with folder.complete(target) as partial:
        model, loaded = load_model(source, options.pretrained)
        model.eval()
        if model.through:
            raise ValueError(
                f"{options.model}: retrieves through its head {model.through!r}, which neither transformers nor "
                "open_clip has; without it its embeddings match by chance only"
            )
        scalars = scalars_of(model, loaded)
        described = loaded.description
        base = described.get("base") or ("" if facts else options.model)
        if options.adapter:
            base = adapter.base_name(described, options.model, bool(options.push))
            revision = described.get("revision") or ""
            adapter.write(*lora.adapter(loaded.towers.model), base, revision, scalars, partial)
            formats = ["peft", described["kind"]]
            notes = [adapter.note(scalars, folder.family(loaded))]
        else:
            revision = ""
            if "lora" in described:
                lora.merge(loaded.towers.model)
            formats, notes = folder.write(loaded, scalars, place, partial)
            for library, off in comparison.check(loaded, partial, formats, options.model).items():
                print(f"{library} loads it: features differ by {off:.1e}", file=sys.stderr)
        told = card.Card(
            options.name or place,
            usage.Where(place, bool(options.push), folder.family(loaded), formats, revision),
            options.licence,
            model.logit_scale.exp().item(),
            scalars["logit_bias"].item() if "logit_bias" in scalars else None,
            base,
            described.get("pretrained") or options.pretrained,
            notes,
            lora=described.get("lora", {}),
            **facts,
        )
        (partial / "README.md").write_text(card.text(told), encoding="utf-8")
    for note in notes:
        print(f"note: {note}", file=sys.stderr)


def scalars_of(model: DualEncoder, loaded: Loaded) -> dict[str, Tensor]:
    """The scale's log, and the bias if one was learned, or the model's kind has one."""
    found = {"logit_scale": model.logit_scale.detach()}
    if model.logit_bias.item() or folder.family(loaded) == "siglip":
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
            hub.reachable(options.push, api)
        export(options)
        print(options.to)
        if options.push:
            print(hub.push(Path(options.to), options.push, options.private, api))
    except ValueError as error:
        refuse(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
