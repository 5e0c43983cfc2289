"""Class names and prompt templates: open_clip's, from a file, or from the data set."""

from collections.abc import Callable, Iterable
from pathlib import Path

Template = Callable[[str], str]


def prompt_templates(name: str) -> list[Template]:
    """`plain` = only the class name; `simple`, `openai` = open_clip's 7 and 80; else a file.

    Each line of the file has {c} in place of the class name.

    Raises:
        ValueError: no such file, or a line without {c}.
    """
    if name == "plain":
        return [str]
    if name in ("simple", "openai"):
        import open_clip

        if name == "simple":
            return list(open_clip.SIMPLE_IMAGENET_TEMPLATES)
        return list(open_clip.OPENAI_IMAGENET_TEMPLATES)
    lines = _lines(name, "templates (plain, simple, openai or a file)")
    for number, line in enumerate(lines, start=1):
        if "{c}" not in line:
            raise ValueError(f"{name}, line {number}: {line!r} has no {{c}} for the class name")
    return [lambda c, line=line: line.replace("{c}", c) for line in lines]  # type: ignore[misc]


def class_names(name: str, captions: list[list[str]], labels: list[str | int]) -> list[str]:
    """`imagenet`; `captions` or `labels` (the distinct ones of the data set, sorted); or a file.

    The file has one class per line. Names that differ only in letter case are one class.

    Raises:
        ValueError: no such file, or class numbers where names are needed.
    """
    if name in ("captions", "labels") and any(isinstance(label, int) for label in labels):
        raise ValueError(
            f"classes={name}: labels are numbers here; "
            "give a classnames.txt beside the data, or --classes FILE"
        )
    if name == "imagenet":
        import open_clip

        return list(open_clip.IMAGENET_CLASSNAMES)
    if name == "captions":
        return _distinct(caption for of_one_image in captions for caption in of_one_image)
    if name == "labels":
        return _distinct(map(str, labels))
    return _lines(name, "classes (imagenet, captions, labels or a file)")


def _distinct(names: Iterable[str]) -> list[str]:
    # of several spellings of a name, keep the first in sorted order
    spelling = {name.casefold(): name for name in sorted(names, reverse=True)}
    return sorted(spelling.values())


def _lines(path: str, what: str) -> list[str]:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{what}: {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    lines = [line.strip() for line in text.splitlines()]
    filled = [line for line in lines if line]
    if not filled:
        raise ValueError(f"{path}: holds no line")
    return filled
