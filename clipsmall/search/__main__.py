"""A local page to search a data set with any model, by text or by picture.

    python -m clipsmall.search runs/demo --data data/glyphs/test_unseen
    python -m clipsmall.search ViT-B-32 --pretrained laion2b_s34b_b79k --data data/photos --k 48

All images and captions are embedded once, into --embeddings, in clip-retrieval's layout; a changed
model or shard is noticed. The page is on this machine alone (127.0.0.1) and needs Gradio: pip
install 'clipsmall[demo]'.
"""

import argparse
import hashlib
import re
import sys
from pathlib import Path

import torch

from clipsmall.cli import MODEL_HELP, refuse
from clipsmall.data import Catalog, open_catalog
from clipsmall.distributed import devices
from clipsmall.evaluation.command import load_encoder
from clipsmall.search import INDEXES, Searcher, embed, page


def main(words: list[str] | None = None) -> int:
    options = _options(words)
    try:
        page.require_gradio()
        catalog = open_catalog(options.data)
        data, model = (_name(given) for given in (options.data[0], options.model))
        paths = [Path(options.model).resolve(), *(shard.resolve() for shard in catalog.shards)]
        # names may be alike, embeddings are not
        told = "\0".join([options.pretrained, *map(str, paths)])
        own = hashlib.sha256(told.encode()).hexdigest()[:8]
        folder = options.embeddings or Path("embeddings") / re.sub(
            r"[^\w.-]+", "-", f"{data} {model} {own}"
        )
        searcher = _searcher(options, catalog, folder)
        k = min(24, searcher.images) if options.k is None else options.k
        if not 1 <= k <= searcher.images:
            raise ValueError(
                f"--k={k}: the data set has {searcher.images} images; ask for 1 to {searcher.images}"
            )
        made = page.build(searcher, data, model, k)
        print(f"search page: {page.launch(made, options.port)} (Ctrl-C ends it)", flush=True)
        made.block_thread()
    except ValueError as error:
        refuse(error)
    return 0


def _searcher(options: argparse.Namespace, catalog: Catalog, folder: Path) -> Searcher:
    device = _device(options.device)
    encoder = load_encoder(
        options.model,
        options.pretrained,
        device,
        options.batch_size,
        options.workers,
        progress=True,
    )
    embeddings = embed(encoder, catalog, folder, f"{options.model} {options.pretrained}".strip())
    broken = sum(catalog.left_out.values())
    print(
        f"{len(catalog):,} pairs; left out: {broken:,} by their index, {embeddings.broken:,} unreadable images; "
        f"embeddings in {folder}",
        file=sys.stderr,
    )
    return Searcher(encoder, catalog, embeddings, options.index)


def _device(given: str) -> torch.device:
    try:
        device = torch.device(
            given or torch.accelerator.current_accelerator(check_available=True) or "cpu"
        )
        torch.empty(1, device=device)
    except RuntimeError as error:
        raise ValueError(f"--device={given}: {str(error).splitlines()[0]}") from None
    if device.type == "cuda":
        devices.check_kernels()
    return device


def _name(given: str) -> str:
    """A path's last two parts, which tell more than `test` or `run`; a hub id as it is."""
    return "/".join(Path(given).resolve().parts[-2:]).lstrip("/") if Path(given).exists() else given


def _options(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m clipsmall.search",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", help=MODEL_HELP)
    parser.add_argument(
        "--data",
        nargs="+",
        required=True,
        help="folders, globs or brace lists of indexed tar shards",
    )
    parser.add_argument("--pretrained", default="", help="weight tag of an open_clip model")
    parser.add_argument(
        "--embeddings", type=Path, help="folder to keep them in; default: embeddings/DATA-MODEL"
    )
    parser.add_argument("--port", type=int, default=7860)
    parser.add_argument(
        "--k", type=int, help="pictures of an answer at first [24]; the page has a slider"
    )
    parser.add_argument(
        "--index", choices=sorted(INDEXES), default="exact", help="faiss needs faiss-cpu"
    )
    parser.add_argument(
        "--device",
        default="",
        help="cpu, cuda, cuda:1 ...; default: the accelerator, if there is one",
    )
    parser.add_argument("--batch_size", type=int, default=256)
    parser.add_argument("--workers", type=int, default=0, help="processes that decode images")
    return parser.parse_args(words)


if __name__ == "__main__":
    sys.exit(main())
