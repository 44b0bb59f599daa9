"""Read YAML configs without running anything in them.

Detectron2 falls back to ``yaml.unsafe_load``, which runs whatever program a file holds, because its Base-RetinaNet.yaml
computes the anchor sizes with ``!!python/object/apply:eval``. Here that tag is arithmetic on lists of numbers, and
every other tag that is not plain YAML is refused.
"""

import functools
import io
import itertools
import os
from collections.abc import Iterator

import yaml
from detectron2.config import CfgNode, downgrade_config, upgrade_config
from detectron2.config.compat import guess_version
from yaml.constructor import ConstructorError

from ..config import ConfigError
from .arithmetic import LARGEST, ExpressionError, evaluate
from .regular import read_regular
from .shipped import CONFIGS, shipped

MOST_BYTES = 1_000_000  # of a config
_MOST_NODES = 50_000  # of a file, aliases written out: far above any config, far below what fills the memory
_MOST_FILES = 100  # that a config is based on: each may name several
_LONGEST_LINE = 300  # of a message
_MOST_DIGITS = 400  # of a number
_TOO_DEEP = "is nested too deep, or its _BASE_ leads back to itself."


def merge_from_file(cfg: CfgNode, path: str) -> None:
    """Merge a config file and its ``_BASE_`` files into ``cfg``, as Detectron2's ``cfg.merge_from_file`` does.

    A ``_BASE_`` is relative to its file, as in Detectron2, or else the name of a shipped config.

    Args:
        cfg: a config of Detectron2's latest version; changed in place.
        path: a file, or what Detectron2's PathManager opens. A file of an older version is upgraded.

    Raises:
        ConfigError: the file, or one that it is based on, is no YAML mapping, or asks for code to be run.
        FileNotFoundError: one of them is not there.
        KeyError: it has a key that ``cfg`` does not have.
    """
    files = type("_Files", (_SafeFiles,), {"opened": itertools.count()})  # counts those of this config
    try:
        loaded = CfgNode(files.load_yaml_with_base(path))
    except RecursionError as error:
        raise ConfigError(f"{path} {_TOO_DEEP}") from error
    version = _version(loaded, path)
    if version == cfg.VERSION:
        cfg.merge_from_other_cfg(loaded)
        return
    old = downgrade_config(cfg, to_version=version)
    old.merge_from_other_cfg(loaded)
    upgraded = upgrade_config(old)
    cfg.clear()
    cfg.update(upgraded)


def _version(loaded: CfgNode, path: str) -> int:
    """Return the version of a config file, or by Detectron2's guess if it names none.

    Raises:
        ConfigError: it is none of Detectron2's.
    """
    version = loaded.get("VERSION")
    if version is None:
        try:
            return guess_version(loaded, path)
        except TypeError:  # a section that is none, which merging explains
            return 2
    if type(version) is not int or version not in (1, 2):
        raise ConfigError(f"{path}: VERSION is {version!r:.40}; expected 1 or 2, as of Detectron2's configs.")
    return version


class _SafeFiles(CfgNode):
    """fvcore's reader of ``_BASE_`` chains; it is given plain YAML, so that it never falls back to unsafe loading."""

    opened: Iterator[int]

    @classmethod
    def _open_cfg(cls, filename: str) -> io.StringIO:
        if next(cls.opened) > _MOST_FILES:
            raise ConfigError(
                f"{filename} is based on more than {_MOST_FILES} files, or its _BASE_ leads back to itself."
            )
        try:
            content = parse_yaml(read_regular(filename, MOST_BYTES), filename)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise ConfigError(str(error)) from error
        if bases := content.get("_BASE_"):
            content["_BASE_"] = [_find_base(base, filename) for base in (bases if isinstance(bases, list) else [bases])]
        return io.StringIO(yaml.safe_dump(content, sort_keys=False))


def _find_base(base: str, config: str) -> str:
    """Return ``base`` as ``config`` names it, relative to itself, or if no such file exists, the shipped config.

    Raises:
        FileNotFoundError: it is neither.
    """
    beside = os.path.join(os.path.dirname(config), os.path.expanduser(base))
    if "://" in config or "://" in base or os.path.exists(beside):
        return base
    if shipped(base).is_file():
        return str(shipped(base))
    raise FileNotFoundError(
        f"{config}: _BASE_ is {base}; expected a file relative to {config}, or a shipped config of {CONFIGS}."
    )


def parse_yaml(text: str | bytes, where: str, keys: tuple[type, ...] = (str,)) -> dict:
    """Return the mapping that ``text`` is, {} if it is empty.

    Args:
        text: bytes are UTF-8.
        where: what names it in messages.
        keys: the types that keys of mappings may have.

    Raises:
        ConfigError: it is no YAML, no mapping, or asks for more than data.
    """
    try:
        text = text.decode("utf-8-sig") if isinstance(text, bytes) else text
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{where} is not text in UTF-8 ({error}); expected a config in YAML, saved as UTF-8."
        ) from error
    try:
        content = yaml.load(text, functools.partial(_Loader, where=where, keys=keys))
    except RecursionError as error:
        raise ConfigError(f"{where} {_TOO_DEEP}") from error
    except Exception as error:  # PyYAML raises errors of many types on text that is no YAML
        lines = str(error).splitlines() or [type(error).__name__]
        raise ConfigError(f"{where}: " + "\n".join(line[:_LONGEST_LINE] for line in lines[:6])) from error
    content = {} if content is None else content
    if not isinstance(content, dict):
        raise ConfigError(f"{where} holds {type(content).__name__}, expected keys and values.")
    bases = content.get("_BASE_", [])
    if not all(isinstance(base, str) for base in (bases if isinstance(bases, list) else [bases])):
        raise ConfigError(f"{where}: _BASE_ is {bases!r:.200}, expected a path or a list of paths.")
    return content


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with one more tag and a limit on aliases; ``where`` names the text in messages."""

    def __init__(self, text: str, where: str, keys: tuple[type, ...]):
        super().__init__(text)
        self.name = where
        self.keys = keys
        self.composed = 0
        self.checked: set[yaml.MappingNode] = set()

    def compose_node(self, parent: yaml.Node, index: object) -> yaml.Node:
        """Compose a node, as long as there are not too many."""
        self.composed += 1
        if self.composed > _MOST_NODES:
            found = f"the file stands for more than {_MOST_NODES:,} values"
            raise ConstructorError(None, None, found, self.peek_event().start_mark)
        return super().compose_node(parent, index)

    def construct_document(self, node: yaml.Node) -> object:
        _count(node, {})
        return super().construct_document(node)

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Check the keys, before PyYAML writes out what ``<<`` stands for: its keys may be repeated."""
        if node not in self.checked:
            self._check_keys(node)
        self.checked.add(node)
        super().flatten_mapping(node)

    def _check_keys(self, node: yaml.MappingNode) -> None:
        seen = set()
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                continue
            value = self.construct_object(key, deep=True)
            if type(value) not in self.keys:
                kind = type(value).__name__
                found = f"the key {value!r:.40} is {kind}; expected text (in YAML, quote yes, no and numbers)"
                raise ConstructorError(None, None, found, key.start_mark)
            if value in seen:
                found = f"the key {value!r} is here twice; expected each key once"
                raise ConstructorError(None, None, found, key.start_mark)
            seen.add(value)

    def construct_number(self, node: yaml.Node) -> int | float:
        """Return an int or a float. Long ones take PyYAML long, and nothing in a config is beyond 2^63."""
        if len(self.construct_scalar(node)) > _MOST_DIGITS:
            found = f"a number of {len(node.value)} characters; expected at most {_MOST_DIGITS}"
            raise ConstructorError(None, None, found, node.start_mark)
        if node.tag.endswith("float"):
            return self.construct_yaml_float(node)
        value = self.construct_yaml_int(node)
        if abs(value) > LARGEST:
            raise ConstructorError(None, None, f"the number {node.value:.40} is beyond 2^63", node.start_mark)
        return value

    def construct_eval(self, node: yaml.Node) -> object:
        """Return the value of ``!!python/object/apply:eval ["expression"]``."""
        arguments = self.construct_sequence(node)
        if len(arguments) != 1 or not isinstance(arguments[0], str):
            raise ConstructorError(None, None, f"eval has {arguments!r}, expected one expression", node.start_mark)
        try:
            return evaluate(arguments[0])
        except ExpressionError as error:
            raise ConstructorError(None, None, str(error), node.start_mark) from error

    def refuse(self, node: yaml.Node) -> None:
        """Raise the error for a tag that is not plain YAML."""
        tag = node.tag.replace("tag:yaml.org,2002:", "!!")
        raise ConstructorError(
            None,
            None,
            f"the tag {tag} asks for more than data, which is refused. Write the value itself; a tuple is text in "
            "round brackets. (The config.yaml of a LazyConfig's run holds objects and cannot be read as a config.)",
            node.start_mark,
        )


_Loader.add_constructor("tag:yaml.org,2002:python/object/apply:eval", _Loader.construct_eval)
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_number)
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.construct_number)
_Loader.add_constructor(None, _Loader.refuse)


def _count(node: yaml.Node, counts: dict[int, int | None]) -> int:
    """Count the nodes of a tree with its aliases written out; few lines of aliases can stand for billions of nodes."""
    if id(node) not in counts:
        counts[id(node)] = None  # under way
        children = node.value if isinstance(node, yaml.CollectionNode) else []
        if isinstance(node, yaml.MappingNode):
            children = [part for pair in children for part in pair]
        counts[id(node)] = 1 + sum(_count(child, counts) for child in children)
    count = counts[id(node)]
    if count is None or count > _MOST_NODES:
        found = "contains itself" if count is None else f"stands for more than {_MOST_NODES:,} values"
        raise ConstructorError(None, None, f"what is written here {found}", node.start_mark)
    return count
