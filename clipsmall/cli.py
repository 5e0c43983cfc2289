"""What all commands share: how a model is named, and how a command ends on bad input."""

import re
import sys
from typing import NoReturn

MODEL_HELP = (
    "a run folder or checkpoint of ours; a folder or hub id of a HF CLIP or SigLIP; an open_clip model name "
    "(with --pretrained TAG). hf: or open_clip: in front decides where it is unclear"
)


def refuse(error: Exception, code: int = 2) -> NoReturn:
    """How every command ends on bad input: the message after `error:`, and exit code 2."""
    said = str(error)
    # torch hands on a loader worker's error as its traceback: "\nmodule.Class: message"
    if said.startswith("Caught "):
        said = re.split(r"\n(?:\w+\.)*[A-Z]\w*: ", said)[-1]
    for line in said.splitlines():
        print(f"error: {line}", file=sys.stderr)
    sys.exit(code)
