"""Tokenizers of open_clip's models for transformers: CLIP's byte pairs, and SigLIP's."""

import copy
import re
import string
from typing import Any

from clipsmall.export.weights import Inexpressible

# 256 bytes, those ending a word, 48,894 merges, and two marks: of every CLIP since OpenAI's
VOCABULARY = 49408


def clip_tokenizer(context_length: int = 77) -> Any:
    """A `transformers.CLIPTokenizer` with the ids of `open_clip.SimpleTokenizer`.

    It is made of open_clip's own vocabulary file and needs no network. open_clip repairs a text
    with ftfy before (curly quotes become straight, "&amp;" becomes "&"), transformers does not:
    captions that ftfy leaves as they are get equal ids. Padding differs, 49407 here and 0 there; no
    CLIP looks at it.

    Args:
        context_length: ids of a caption, marks included, to which `truncation=True` cuts.
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
    """Whether open_clip's own tokenizer gives the same ids as this one of transformers."""
    return len(tokenizer) == VOCABULARY and tokenizer.get_vocab() == clip_tokenizer().get_vocab()


def transformers_tokenizer_of(tokenize: Any, name: str) -> tuple[Any, int]:
    """A tokenizer of transformers that gives what one of open_clip gives, and its context length.

    Raises:
        Inexpressible: open_clip cuts or cleans captions as transformers cannot.
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
    """A copy of a tokenizer of transformers, to be saved beside a model.

    Args:
        length: the model's context length.
        has_mask: whether it tells the model where padding is; SigLIP was trained with its padding
            in sight.
    """
    prepared = copy.deepcopy(tokenizer)
    prepared.model_max_length = length
    # where it was loaded from is nobody's business
    for key in ("is_local", "local_files_only", "_commit_hash"):
        prepared.init_kwargs.pop(key, None)
    if not has_mask:
        prepared.model_input_names = ["input_ids"]
        # what is saved
        prepared.init_kwargs["model_input_names"] = ["input_ids"]
    return prepared


def _with_cleaning(tokenizer: Any, cleaning: str) -> Any:
    """The tokenizer with open_clip's cleaning for SigLIP as a part of it.

    It takes out punctuation and makes letters lower case, which open_clip does before it calls the
    tokenizer.
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
