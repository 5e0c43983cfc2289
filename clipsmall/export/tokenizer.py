"""Tokenizers of open_clip's models for transformers: CLIP's byte pairs from open_clip's own file,
and SigLIP's.
"""

import copy
import re
import string
from typing import Any

from clipsmall.export.weights import Inexpressible
from clipsmall.model.hf import HFTokenize

# 256 bytes, those ending a word, 48,894 merges, and two marks: of every CLIP since OpenAI's
VOCABULARY = 49408


def clip_tokenizer(context_length: int = 77) -> Any:
    """A `transformers.CLIPTokenizer` with the ids of `open_clip.SimpleTokenizer`; needs no network.

    open_clip repairs a text with ftfy before (curly quotes become straight, "&amp;" becomes "&"),
    transformers does
    not: captions that ftfy leaves alone get equal ids. Padding differs, 49407 here and 0 there; no
    CLIP looks at it.

    Args:
        context_length: ids of a caption, marks included, to which `truncation=True` cuts.
    """
    from open_clip.tokenizer import SimpleTokenizer
    from transformers import CLIPTokenizer

    theirs = SimpleTokenizer()
    words = {word: place for word, place in theirs.encoder.items() if place < VOCABULARY - 2}
    words |= {"<|startoftext|>": VOCABULARY - 2, "<|endoftext|>": VOCABULARY - 1}
    return CLIPTokenizer(
        vocab=words, merges=list(theirs.bpe_ranks), model_max_length=context_length
    )


def is_clips(tokenizer: Any) -> bool:
    """Whether open_clip's own tokenizer gives the same ids as this one of transformers."""
    return len(tokenizer) == VOCABULARY and tokenizer.get_vocab() == clip_tokenizer().get_vocab()


def for_transformers(tokenize: Any, masked: bool, name: str) -> Any:
    """The tokenizer of transformers that gives what `tokenize` of a model's `Loaded` gives.

    Args:
        tokenize: a `HFTokenize` of ours, or a tokenizer of open_clip.
        masked: whether it tells the model where padding is; SigLIP was trained with padding in
            sight.

    Raises:
        Inexpressible: open_clip cuts or cleans captions as transformers cannot.
    """
    from open_clip.tokenizer import HFTokenizer, SimpleTokenizer

    if isinstance(tokenize, HFTokenize):
        found = tokenize.tokenizer
        length = tokenize.length
    else:
        length = tokenize.context_length
        cleaning = tokenize.clean_fn.__name__
        if (
            type(tokenize) is SimpleTokenizer
            and cleaning == "_clean_lower"
            and not tokenize.reduction_fn
        ):
            found = clip_tokenizer(length)
        elif type(tokenize) is HFTokenizer and not (
            tokenize.strip_sep_token or tokenize.tokenizer_mode
        ):
            found = _cleaned(tokenize.tokenizer, cleaning)
        else:
            raise Inexpressible(
                f"{name}: transformers has no tokenizer that treats captions as open_clip does here"
            )
    found = copy.deepcopy(found)
    found.model_max_length = length
    # of where it was loaded from
    for key in ("is_local", "local_files_only", "_commit_hash"):
        found.init_kwargs.pop(key, None)
    if not masked:
        found.model_input_names = ["input_ids"]
        # what is saved
        found.init_kwargs["model_input_names"] = ["input_ids"]
    return found


def _cleaned(tokenizer: Any, cleaning: str) -> Any:
    """open_clip's cleaning for SigLIP (no punctuation, lower case) as a part of the tokenizer
    itself.
    """
    from tokenizers import Regex, Tokenizer, normalizers
    from transformers import PreTrainedTokenizerFast

    if cleaning != "_clean_canonicalize":
        return tokenizer
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    steps = [
        normalizers.Replace("_", " "),
        normalizers.Replace(Regex(f"[{re.escape(string.punctuation)}]"), ""),
        normalizers.Lowercase(),
        normalizers.Replace(Regex(r"\s+"), " "),
        normalizers.Strip(),
    ]
    backend.normalizer = normalizers.Sequence(
        [*steps, backend.normalizer] if backend.normalizer else steps
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        padding_side=tokenizer.padding_side,
        **tokenizer.special_tokens_map,
    )
