"""The captions of a sample: read from its members, cleaned, and hashed."""

import hashlib
import json
import unicodedata
from typing import Any


def caption_hash(caption: str) -> int:
    """Signed 64-bit hash of a caption, blind to letter case, white space and Unicode form."""
    plain = " ".join(unicodedata.normalize("NFKC", caption).casefold().split())
    return int.from_bytes(
        hashlib.blake2b(plain.encode(), digest_size=8).digest(), "little", signed=True
    )


def fields_of(record: bytes) -> dict[str, Any]:
    """The fields of a sample's `.json`; {} if it has none, or holds no object.

    Raises:
        ValueError, RecursionError: not JSON; numbers or nesting beyond reason.
    """
    parsed = json.loads(record) if record else {}
    return parsed if isinstance(parsed, dict) else {}


def captions_of(text: bytes, fields: dict[str, Any]) -> list[str]:
    """The captions of a sample, from its `.txt` and its parsed `.json`; blank ones are dropped.

    `captions` in the json wins; a json with `caption` marks img2dataset's layout, whose `.txt` (or,
    without one, that field) is one caption; any other `.txt` holds one caption a line, as in
    CLIP_benchmark's retrieval sets.

    Raises:
        UnicodeDecodeError: the `.txt` is not UTF-8.
    """
    if isinstance(listed := fields.get("captions"), list):
        found = [str(caption) for caption in listed]
    else:
        whole = text.decode("utf-8")
        found = (
            [whole or str(fields["caption"] or "")] if "caption" in fields else whole.splitlines()
        )
    # half a surrogate pair, which json can spell, cannot be encoded again
    plain = (caption.encode("utf-8", "ignore").decode().replace("\0", " ") for caption in found)
    return [cleaned for caption in plain if (cleaned := " ".join(caption.split()))]
