"""Tokenizers for transformers that match open_clip's: CLIP's byte pairs, and SigLIP's."""

import copy
import re
import string
from typing import Any

from clipsmall.export.weights import Inexpressible

# CLIP's vocabulary: 256 bytes, 256 word-final bytes, 48,894 merges, start and end marks.
VOCABULARY = 49408


def clip_tokenizer(context_length: int = 77) -> Any:
    """A `transformers.CLIPTokenizer` with the ids of `open_clip.SimpleTokenizer`.

    It is built from open_clip's vocabulary file and needs no network. Unlike transformers,
    open_clip first repairs a text with ftfy (curly quotes become straight, "&amp;" becomes "&"):
    ids are equal for captions that ftfy does not change. Padding differs, 49407 here and 0 there,
    but CLIP does not use it.

    Args:
        context_length: ids per caption, marks included; `truncation=True` cuts to it.
    """
    from open_clip.tokenizer import SimpleTokenizer
    from transformers import CLIPTokenizer

    theirs = SimpleTokenizer()
    words = {word: number for word, number in theirs.encoder.items() if number < VOCABULARY - 2}
    words["<|startoftext|>"] = VOCABULARY - 2
    words["<|endoftext|>"] = VOCABULARY - 1
    return CLIPTokenizer(
        vocab=words, merges=list(theirs.bpe_ranks), model_max_length=context_length
    )


def is_clip_tokenizer(tokenizer: Any) -> bool:
    """Whether a transformers tokenizer gives the same ids as open_clip's."""
    return len(tokenizer) == VOCABULARY and tokenizer.get_vocab() == clip_tokenizer().get_vocab()


def transformers_tokenizer_of(tokenize: Any, name: str) -> tuple[Any, int]:
    """The transformers tokenizer that matches one of open_clip, and its context length.

    Raises:
        Inexpressible: open_clip truncates or cleans captions in a way that transformers cannot.
    """
    from open_clip.tokenizer import HFTokenizer, SimpleTokenizer

    length = tokenize.context_length
    cleaning = tokenize.clean_fn.__name__
    if type(tokenize) is SimpleTokenizer:
        plain = cleaning == "_clean_lower" and not tokenize.reduction_fn
        if plain:
            return clip_tokenizer(length), length
    if type(tokenize) is HFTokenizer:
        plain = not tokenize.strip_sep_token and not tokenize.tokenizer_mode
        if plain:
            return _with_cleaning(tokenize.tokenizer, cleaning), length
    raise Inexpressible(
        f"{name}: transformers has no tokenizer that treats captions as open_clip does here"
    )


def prepared_for_transformers(tokenizer: Any, length: int, has_mask: bool) -> Any:
    """A copy of a transformers tokenizer, to be saved with a model.

    Args:
        length: the model's context length.
        has_mask: whether it returns an attention mask; SigLIP was trained without one.
    """
    prepared = copy.deepcopy(tokenizer)
    prepared.model_max_length = length
    # do not publish where it was loaded from
    for key in ("is_local", "local_files_only", "_commit_hash"):
        prepared.init_kwargs.pop(key, None)
    if not has_mask:
        prepared.model_input_names = ["input_ids"]
        # init_kwargs are what gets saved
        prepared.init_kwargs["model_input_names"] = ["input_ids"]
    return prepared


def _with_cleaning(tokenizer: Any, cleaning: str) -> Any:
    """The tokenizer with open_clip's cleaning for SigLIP built in.

    open_clip removes punctuation and lower-cases text before it calls the tokenizer.
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
    if backend.normalizer:
        steps.append(backend.normalizer)
    backend.normalizer = normalizers.Sequence(steps)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        padding_side=tokenizer.padding_side,
        **tokenizer.special_tokens_map,
    )
