"""Read the keys of a command line, and explain what is wrong with a key of a config."""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches

from detectron2.config import CfgNode, get_cfg

from .keys import ConfigError, add_focal_config

_LONGEST = 1000  # characters of a message
_NO_KEY = re.compile(r"Non-existent (?:config )?key: (\S+)")
_NO_TYPE = re.compile(
    r"Type mismatch \(<class '(?:\w+\.)*(\w+)'> vs. <class '(?:\w+\.)*(\w+)'>\) "
    r"with values \(.* vs. (.*)\) for .*: (\S+)",
    re.DOTALL,
)

# By the type of the value before; None is that of a component's own key.
_EXPECTED = {"CfgNode": "keys, each with a colon and a value", "NoneType": "text, a number or a list"}


@contextmanager
def explained_keys(cfg: CfgNode, where: str) -> Iterator[None]:
    """Explain what is wrong with a file or with ``KEY VALUE`` pairs that are merged into ``cfg`` inside.

    Args:
        cfg: the config; the keys near a mistyped one are found in it.
        where: names the file or the command line in messages.

    Raises:
        ConfigError: there is no such key, it was renamed, or its value has another type, or none.
    """
    sections = [section for _, section in _open_sections(cfg)]
    before = [dict(section) for section in sections]
    for section in sections:
        section.clear()  # of values whose types would bind the new ones; the component's default does
    leaves = flatten(cfg)
    keys = [*leaves, *dict.fromkeys(key.rpartition(".")[0] for key in leaves if "." in key)]
    try:
        yield
    except ConfigError:
        raise
    except (MemoryError, RecursionError) as error:  # of Python's parser, which reads the values that are text
        raise ConfigError(f"{where}: a value is nested too deep; expected text, a number or a list.") from error
    except (AssertionError, KeyError, ValueError) as error:  # Detectron2's and fvcore's
        text = str(error.args[0]) if error.args else type(error).__name__
        if found := _NO_KEY.fullmatch(text):
            near = ", ".join(near_keys(found[1], keys))
            problem = f"there is no key {found[1]}." + (f" Near it: {near}." if near else "")
        elif found := _NO_TYPE.fullmatch(text):
            expected, kind, value, key = found.groups()
            example = """, as in "('a', 'b')" or "('a',)" for one""" if expected in ("list", "tuple") else ""
            of = _EXPECTED.get(expected, f"a value of type {expected}")
            problem = f"{key} is {value[:200]} ({kind}); expected {of}{example}."
        else:
            problem = text
        raise ConfigError(f"{where}: {problem[:_LONGEST]}") from error
    finally:
        for section, values in zip(sections, before):
            section.update({**values, **section})
    for key, value in flatten(cfg).items():
        if value is None and leaves.get(key) is not None:  # which yacs allows
            expected = type(leaves[key]).__name__
            raise ConfigError(f"{where}: {key} has no value; expected one of type {expected}, or leave the key out.")


def _open_sections(cfg: CfgNode, prefix: str = "") -> Iterator[tuple[str, CfgNode]]:
    """Yield the sections that take any key, those of users' components, by their whole keys."""
    for key, value in cfg.items():
        if isinstance(value, CfgNode):
            found = f"{prefix}{key}"
            yield from [(found, value)] if value.is_new_allowed() else _open_sections(value, f"{found}.")


def flatten(config: Mapping, prefix: str = "") -> dict[str, object]:
    """Return nested dicts by their whole keys: {"SOLVER": {"MAX_ITER": 4}} is {"SOLVER.MAX_ITER": 4}."""
    keys: dict[str, object] = {}
    for key, value in config.items():
        keys |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return keys


def split_pairs(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split a command line into its words and its ``KEY VALUE`` pairs, which begin with the first word like a key.

    Such a word is in upper case, no file has that name, and it is a key without a dot, such as SEED, or has a section
    of the config before its first dot. Whether the rest names a key is checked when the pairs are merged.
    """
    cfg = get_cfg()
    add_focal_config(cfg)
    first = next((i for i, word in enumerate(words) if _is_like_key(cfg, word)), len(words))
    return list(words[:first]), list(words[first:])


def _is_like_key(cfg: CfgNode, word: str) -> bool:
    section, dot, _ = word.partition(".")
    known = word.isupper() and section in cfg and isinstance(cfg[section], CfgNode) == bool(dot)
    return known and not os.path.lexists(word)


def merge_from_list(cfg: CfgNode, opts: Sequence[str]) -> None:
    """Merge the ``KEY VALUE`` pairs of a command line into ``cfg``, in place.

    Raises:
        ConfigError: a key has no value; or as ``explained_keys``.
    """
    if len(opts) % 2:
        raise ConfigError(
            f"{' '.join(map(str, opts))}: expected pairs of a key and its value, as in SOLVER.BASE_LR 0.01, with a "
            "space and no = between them."
        )
    with explained_keys(cfg, "The command line"):
        sections = dict(_open_sections(cfg))
        for section, _, key in (word.rpartition(".") for word in opts[::2]):
            if section in sections:
                sections[section][key] = None  # yacs merges words into keys that are there
        cfg.merge_from_list(list(opts))


def near_keys(key: str, keys: Sequence[str], most: int = 4) -> list[str]:
    """Return the ``keys`` that ``key`` may mean: those that end like it, or else are spelt like it, nearest first."""
    key = key[:200].upper()  # the comparison takes the square of its length
    last = key.rpartition(".")[2]
    alike = [other for other in keys if last in other.rpartition(".")[2]]
    return get_close_matches(key, alike, most, 0.3) or get_close_matches(key, keys, most, 0.75)
