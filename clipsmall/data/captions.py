"""The captions of a sample: read from its files, cleaned, and hashed."""

import hashlib
import json
import unicodedata
from typing import Any


def caption_hash(caption: str) -> int:
    """Signed 64-bit hash of a caption; ignores letter case, white space and Unicode form."""
    words = unicodedata.normalize("NFKC", caption).casefold().split()
    digest = hashlib.blake2b(" ".join(words).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def fields_of(record: bytes) -> dict[str, Any]:
    """The fields of a sample's `.json`; {} if there is no such file or it holds no object.

    Raises:
        ValueError, RecursionError: not JSON, or numbers too long or nesting too deep to parse.
    """
    parsed = json.loads(record) if record else {}
    return parsed if isinstance(parsed, dict) else {}


def captions_of(text: bytes, fields: dict[str, Any]) -> list[str]:
    """The captions of a sample, from its `.txt` and its parsed `.json`; blank ones are dropped.

    A json field `captions` takes precedence. A json field `caption` marks img2dataset's layout, in
    which the `.txt` (or, if there is none, that field) is one caption. Any other `.txt` holds one
    caption per line, as in CLIP_benchmark's retrieval sets.

    Raises:
        UnicodeDecodeError: the `.txt` is not UTF-8.
    """
    listed = fields.get("captions")
    if isinstance(listed, list):
        found = [str(caption) for caption in listed]
    elif "caption" in fields:
        found = [text.decode("utf-8") or str(fields["caption"] or "")]
    else:
        found = text.decode("utf-8").splitlines()
    cleaned = []
    for caption in found:
        # JSON can contain half a surrogate pair, which cannot be encoded as UTF-8
        plain = caption.encode("utf-8", "ignore").decode().replace("\0", " ")
        words = plain.split()
        if words:
            cleaned.append(" ".join(words))
    return cleaned
