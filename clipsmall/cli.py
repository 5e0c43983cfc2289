"""What all commands share: how a model is named, and how a command ends on bad input."""

import re
import sys
from typing import NoReturn

MODEL_HELP = (
    "a run folder or checkpoint of ours; a folder or hub id of a HF CLIP or SigLIP; an open_clip "
    "model name (with --pretrained TAG). hf: or open_clip: in front decides where it is unclear"
)


def refuse(error: Exception, code: int = 2) -> NoReturn:
    """End a command: print the message, each line after `error:`, and exit; 2 is bad input."""
    message = str(error)
    # torch passes a loader worker's error on as its traceback: "\nmodule.Class: message"
    if message.startswith("Caught "):
        message = re.split(r"\n(?:\w+\.)*[A-Z]\w*: ", message)[-1]
    for line in message.splitlines():
        print(f"error: {line}", file=sys.stderr)
    sys.exit(code)
