"""Shared by all commands: the help text for model names, and the exit on bad input."""

import re
import sys
from typing import NoReturn

MODEL_HELP = (
    "a run folder or checkpoint of ours; a folder or hub id of a HF CLIP or SigLIP; an open_clip "
    "model name (with --pretrained TAG). the prefix hf: or open_clip: resolves ambiguous names"
)


def refuse(error: Exception, code: int = 2) -> NoReturn:
    """Print each line of the message after `error:` and exit; code 2 means bad input."""
    message = str(error)
    # torch re-raises a loader worker's error with the traceback as message; its last part is
    # "\nmodule.Class: message"
    if message.startswith("Caught "):
        message = re.split(r"\n(?:\w+\.)*[A-Z]\w*: ", message)[-1]
    for line in message.splitlines():
        print(f"error: {line}", file=sys.stderr)
    sys.exit(code)
