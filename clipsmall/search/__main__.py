"""Search the pictures and captions of a data set with any model, on a page in your browser.

    python -m clipsmall.search runs/demo --data data/glyphs/test_unseen
    python -m clipsmall.search ViT-B-32 --pretrained laion2b_s34b_b79k --data data/photos --k 48

Type a text to find pictures, or drop a picture to find similar pictures and captions. The first
start embeds all images and captions and keeps them in --embeddings, in clip-retrieval's layout;
later starts embed only shards that have changed.

Only this machine can open the page (127.0.0.1). It needs Gradio: pip install 'clipsmall[demo]'.
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
from clipsmall.search import INDEXES, Searcher, embed, search_page

# Pictures in the first answer, if the data set has that many.
DEFAULT_K = 24


def main(words: list[str] | None = None) -> int:
    options = _options(words)
    try:
        # checked before embedding, which may take minutes
        search_page.require_gradio()
        catalog = open_catalog(options.data)
        searcher = _searcher(options, catalog)
        k = min(DEFAULT_K, searcher.images) if options.k is None else options.k
        if not 1 <= k <= searcher.images:
            images = searcher.images
            raise ValueError(f"--k={k}: the data set has {images} images; ask for 1 to {images}")

        data = _short_name(options.data[0])
        page = search_page.build_search_page(searcher, data, _short_name(options.model), k)
        address = search_page.launch_search_page(page, options.port)
        print(f"search page: {address} (Ctrl-C ends it)", flush=True)
        page.block_thread()
    except ValueError as error:
        refuse(error)

    return 0


def _searcher(options: argparse.Namespace, catalog: Catalog) -> Searcher:
    """Load the model and load or compute its embeddings of the data set."""
    folder = options.embeddings or _default_folder(options, catalog)
    device = _device(options.device)
    encoder = load_encoder(
        options.model,
        options.pretrained,
        device,
        options.batch_size,
        options.workers,
        progress=True,
    )

    name = f"{options.model} {options.pretrained}".strip()
    embeddings = embed(encoder, catalog, folder, name)
    left_out = sum(catalog.left_out.values())
    print(
        f"{len(catalog):,} pairs; left out: {left_out:,} by their index, "
        f"{embeddings.broken:,} unreadable images; embeddings in {folder}",
        file=sys.stderr,
    )
    return Searcher(encoder, catalog, embeddings, options.index)


def _default_folder(options: argparse.Namespace, catalog: Catalog) -> Path:
    """embeddings/DATA-MODEL-DIGEST; the digest tells apart equal short names."""
    identity = [options.pretrained, str(Path(options.model).resolve())]
    for shard in catalog.shards:
        identity.append(str(shard.resolve()))

    digest = hashlib.sha256("\0".join(identity).encode()).hexdigest()

    data = _short_name(options.data[0])
    model = _short_name(options.model)
    name = f"{data} {model} {digest[:8]}"
    # hub ids contain a slash, folder names may contain blanks
    return Path("embeddings") / re.sub(r"[^\w.-]+", "-", name)


def _device(given: str) -> torch.device:
    """The device of that name, or the accelerator if there is one. Raises ValueError."""
    try:
        device = torch.device(
            given or torch.accelerator.current_accelerator(check_available=True) or "cpu"
        )
        # a missing device has a valid name, so try to use it
        torch.empty(1, device=device)
    except RuntimeError as error:
        raise ValueError(f"--device={given}: {str(error).splitlines()[0]}") from None

    if device.type == "cuda":
        devices.check_kernels()

    return device


def _short_name(given: str) -> str:
    """The last two parts of a path, as one alone may be just `test`; a hub id stays as it is."""
    path = Path(given)
    if not path.exists():
        return given

    last_two = path.resolve().parts[-2:]
    # of a path in the root folder, one part is "/"
    return "/".join(last_two).lstrip("/")


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
        "--embeddings",
        type=Path,
        help="folder to keep the embeddings in [embeddings/DATA-MODEL-DIGEST]",
    )
    parser.add_argument("--port", type=int, default=7860, help="port of the page [7860]")
    parser.add_argument(
        "--k", type=int, help="pictures in an answer at first; the page has a slider [24]"
    )
    parser.add_argument(
        "--index",
        choices=sorted(INDEXES),
        default="exact",
        help="how to search: exact reads the embeddings from disk, faiss (pip install faiss-cpu) "
        "holds them in memory [exact]",
    )
    parser.add_argument(
        "--device",
        default="",
        help="cpu, cuda, cuda:1 ... [the accelerator, if there is one]",
    )
    parser.add_argument(
        "--batch_size", type=int, default=256, help="images or captions embedded at once [256]"
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=0,
        help="processes that decode images; 0: the main process [0]",
    )
    return parser.parse_args(words)


if __name__ == "__main__":
    sys.exit(main())
