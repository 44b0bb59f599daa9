"""Fuzzers of everything that reads a file from elsewhere: made-up and damaged files, of the format's own structure.

Each case ends with a value or with the parser's documented error, within 2 s of the CPU, 20 s in all, and 500 MB: the
cases of a parser run in a process of its own, whose memory is limited, and timers interrupt each.
"""

import copy
import functools
import io
import json
import os
import pickle
import pickletools
import resource
import signal
import tempfile
import time
import traceback
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import yaml
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from PIL import Image

from focal_plugin import ConfigError, add_focal_config
from focal_plugin.config.explain import flatten
from focal_plugin.config.load import load_config
from focal_plugin.data import DataError
from focal_plugin.data.coco import CocoSet
from focal_plugin.data.formats import FolderSet
from focal_plugin.data.proposals import load_proposals_into_dataset
from focal_plugin.data.records import Checker
from focal_plugin.data.voc import VocSet
from focal_plugin.engine.batch_file import load_batch
from focal_plugin.files.safe_load import WeightsError, load_torch, load_zoo

SECONDS, WAITING, MEGABYTES = 2, 20, 500


@dataclass(frozen=True)
class Fuzzer:
    """A parser and what it is given.

    Attributes:
        cases: a strategy of what ``parse`` is called with.
        parse: called with a case and an empty folder; returns anything.
        errors: those that ``parse`` may raise.
    """

    cases: st.SearchStrategy
    parse: Callable[[object, Path], object]
    errors: tuple[type[Exception], ...]


@dataclass
class Outcome:
    """How many cases gave a value and how many a documented error; the longest time of one, in seconds of the CPU."""

    values: int = 0
    errors: int = 0
    worst: float = 0.0

    @property
    def cases(self) -> int:
        """The number of cases."""
        return self.values + self.errors


class TooLong(BaseException):
    """A case took too long. No parser catches it."""


def run(fuzzer: Fuzzer, cases: int, number: int = 0) -> Outcome:
    """Run a number of cases, chosen by the seed ``number``, in a process with limits.

    Raises:
        AssertionError: a case had another outcome; the message has it.
    """
    _start_hypothesis()
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        try:
            answer = {"outcome": vars(_run_limited(fuzzer, cases, number))}
        except BaseException:
            answer = {"problem": traceback.format_exc()}
        with os.fdopen(writer, "w") as file:
            json.dump(answer, file)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as file:
        text = file.read()
    _, status = os.waitpid(pid, 0)
    answer = json.loads(text) if text else {"problem": f"the process ended with status {status}"}
    assert "problem" not in answer, answer["problem"]
    return Outcome(**answer["outcome"])


@functools.cache
def _start_hypothesis() -> None:
    """Run an empty test before the first fork: at the first of a process, Hypothesis collects garbage for a second."""
    settings(max_examples=1, database=None)(given(st.none())(lambda _: None))()


def _run_limited(fuzzer: Fuzzer, cases: int, number: int) -> Outcome:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEGABYTES * 2**20, resource.RLIM_INFINITY))
    for which in (signal.SIGALRM, signal.SIGPROF):
        signal.signal(which, _too_long)
    outcome = Outcome()

    @seed(number)
    @settings(
        max_examples=cases,
        database=None,
        derandomize=False,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(fuzzer.cases)
    def attempt(case):
        with tempfile.TemporaryDirectory() as folder:
            start = time.process_time()
            _set_timers(SECONDS, WAITING)
            try:
                fuzzer.parse(case, Path(folder))
                outcome.values += 1
            except fuzzer.errors as error:
                assert str(error) and len(str(error)) < 5000, "an error without a message, or with an endless one"
                outcome.errors += 1
            finally:
                _set_timers(0, 0)
            outcome.worst = max(outcome.worst, time.process_time() - start)

    attempt()
    return outcome


def _set_timers(seconds: float, waiting: float) -> None:
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.setitimer(signal.ITIMER_REAL, waiting)
    signal.setitimer(signal.ITIMER_VIRTUAL, 2 * seconds)  # ends the process, where C does not return to Python


def _too_long(*_: object) -> None:
    raise TooLong(f"more than {SECONDS} s of the CPU, or {WAITING} s in all")


def table(outcomes: dict[str, Outcome]) -> str:
    """Return the outcomes by the names of their parsers, as a table in Markdown."""
    lines = ["| parser | cases | values | documented errors | longest, s of the CPU |", "|---|---|---|---|---|"]
    for name, found in outcomes.items():
        lines.append(f"| {name} | {found.cases:,} | {found.values:,} | {found.errors:,} | {found.worst:.2f} |")
    return "\n".join(lines)


# Values of any kind, and changes of good ones

anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-5, 300)
    | st.sampled_from([2**31, 2**63, 2**64 + 1, 10**400, -1, 1e308, 1e-320, float("nan"), float("inf")])
    | st.floats()
    | st.text(max_size=6)
    | st.sampled_from(["None", "(1,)", "[[1]]", "{'a': 1}", "1e5", "../a", "/dev/zero", "https://example.invalid/a"])
    | st.sampled_from(["\x00", "é", "\u202e", "a" * 3000, "(" * 300, "-" * 5000 + "1", "['a', ", "%s{0}"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


def places(node: object, path: tuple = ()) -> list[tuple]:
    """Return the path of every value in nested dicts and lists."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [place for key, value in items for place in [(*path, key), *places(value, (*path, key))]]


@st.composite
def changed(draw, good: object, most: int = 4):
    """A copy of ``good`` with some of its values replaced, removed or repeated, and others added."""
    content = copy.deepcopy(good)
    for _ in range(draw(st.integers(0, most))):
        if not (found := places(content)):
            break
        *path, last = draw(st.sampled_from(found))
        node = content
        for key in path:
            node = node[key]
        action = draw(st.sampled_from(["replace", "replace", "remove", "add", "repeat"]))
        if action == "replace" and isinstance(node, dict | list):
            node[last] = draw(anything)
        elif action == "remove":
            del node[last]
        elif action == "add" and isinstance(node, dict):
            new = draw(st.text(max_size=5) | st.sampled_from(["_BASE_", "VERSION", "MODEL", "<<", "id"]))
            node[new] = draw(anything)
        elif isinstance(node, list):
            node.extend([copy.deepcopy(node[last])] * draw(st.integers(1, 30)))
    return content


@st.composite
def damaged(draw, good: st.SearchStrategy, pieces: list[bytes]):
    """Bytes of ``good`` with some changed, dropped, inserted or repeated."""
    data = draw(good)
    for _ in range(draw(st.sampled_from([0, 1, 1, 1, 2, 4]))):
        at, length = draw(st.integers(0, len(data))), draw(st.integers(0, 8))
        piece = draw(st.binary(max_size=4) | st.sampled_from(pieces))
        data = data[:at] + piece * draw(st.sampled_from([1, 1, 1, 50, 2000])) + data[at + length :]
    return data


# COCO's JSON

COCO = {
    "images": [{"id": 1, "file_name": "a.png", "width": 60, "height": 40}, {"id": 2, "file_name": "b.png"}],
    "annotations": [
        {"id": 1, "image_id": 1, "category_id": 5, "bbox": [1, 2, 3, 4], "area": 12, "iscrowd": 0},
        {"id": 2, "image_id": 2, "category_id": 7, "bbox": [5, 5, 10.5, 10], "area": 105, "iscrowd": 1},
    ],
    "categories": [{"id": 5, "name": "cat"}, {"id": 7, "name": "dog"}],
}
JSON_PIECES = [
    b"[",
    b"]",
    b"{",
    b"}",
    b'"',
    b":",
    b",",
    b"NaN",
    b"-Infinity",
    b"1e999",
    b"9" * 30,
    b"\\ud800",
    b"\xef\xbb\xbf",
]
modes = st.sampled_from(["raise", "skip"])


def parse_coco(case, folder):
    """Read the JSON, with two images beside it."""
    content, mode = case
    for name in ("a.png", "b.png"):
        Image.new("RGB", (60, 40)).save(folder / name)
    (folder / "a.json").write_bytes(content)
    return CocoSet("fuzz", str(folder / "a.json"), str(folder), on_error=mode).load(Checker("fuzz", mode))


coco_bytes = changed(COCO).map(lambda content: json.dumps(content).encode())

# VOC's XML

XML = (
    b'<?xml version="1.0" encoding="utf-8"?><annotation><filename>a.png</filename>'
    b"<size><width>60</width><height>40</height></size>"
    b"<object><name>cat</name><difficult>0</difficult><bndbox><xmin>1</xmin><ymin>2</ymin><xmax>9</xmax><ymax>8.5</ymax>"
    b"</bndbox></object></annotation>"
)
XML_PIECES = [
    *(
        b"<a>",
        b"</a>",
        b"<!DOCTYPE a [<!ENTITY b 'c'>]>",
        b"&b;",
        b"<![CDATA[",
        b"]]>",
        b"<?a?>",
        b"<!--",
        b"-->",
        b"utf-16",
    ),
    *(
        b"nan",
        b"1e999",
        b"-1",
        b"<object>",
        b"</object>",
        b"<bndbox>",
        b"\xff\xfe",
        b"xmlns:a='b'",
        b"&#0;",
        b"&#x10FFFF;",
    ),
]


def parse_voc(case, folder):
    """Read the XML, with its image, as a split of one image."""
    content, split, mode = case
    for name in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (folder / name).mkdir(parents=True)
    Image.new("RGB", (60, 40)).save(folder / "JPEGImages" / "a.png")
    (folder / "Annotations" / "a.xml").write_bytes(content)
    (folder / "ImageSets" / "Main" / "all.txt").write_bytes(split)
    return VocSet("fuzz", str(folder), "all", on_error=mode).load(Checker("fuzz", mode))


splits = st.just(b"a\n") | st.binary(max_size=10) | st.sampled_from([b"a\na\n", b"../a\n", b"/a\n", b"b\n", b"a\x00\n"])

# YOLO's data.yaml and labels, and CSV files, each found in its folder

DATA_YAML = {
    "path": ".",
    "train": ["images/train"],
    "val": "val.txt",
    "names": {0: "cat", 1: "dog"},
    "kpt_shape": [1, 2],
}
LABELS = b"0 0.5 0.5 0.25 0.25 0.1 0.1\n1 .1 .2 .2 .1 1 2\n"
ROWS = b"image_path,xmin,ymin,xmax,ymax,label\na.png,1,2,30,20.5,cat\na.png,5,5,9,9,dog\nb.png,,,,,\n"
NUMBER_PIECES = [
    b"nan",
    b"inf",
    b"-1",
    b"1e999",
    b"0x1",
    b"1_0",
    b"9" * 400,
    b"\x00",
    b"\xff",
    b"\r",
    b'"',
    b",",
    b" ",
    b"../",
]
yaml_bytes = changed(DATA_YAML).map(lambda content: yaml.safe_dump(content).encode())


def parse_yolo(case, folder):
    """Read a split of a folder with two images."""
    content, labels, listed, split, mode = case
    for name in ("images", "labels"):
        (folder / name / "train").mkdir(parents=True)
    for name in ("a.png", "b.png"):
        Image.new("RGB", (60, 40)).save(folder / "images" / "train" / name)
    (folder / "data.yaml").write_bytes(content)
    (folder / "labels" / "train" / "a.txt").write_bytes(labels)
    (folder / "val.txt").write_bytes(listed)
    return FolderSet("fuzz", str(folder), split=split, classes=None, on_error=mode).load(Checker("fuzz", mode))


def parse_csv(case, folder):
    """Read the file, with two images beside it."""
    content, mode = case
    for name in ("a.png", "b.png"):
        Image.new("RGB", (60, 40)).save(folder / name)
    (folder / "a.csv").write_bytes(content)
    return FolderSet("fuzz", str(folder), on_error=mode).load(Checker("fuzz", mode))


# Configs: text in YAML, the whole config, and the command line

YAML_GOOD = {
    "VERSION": 2,
    "MODEL": {"META_ARCHITECTURE": "FocalRetinaNet", "RETINANET": {"NUM_CLASSES": 2}, "FOCAL": {"IMPORTS": []}},
    "SOLVER": {"BASE_LR": 0.01, "STEPS": [1, 2], "MAX_ITER": 4},
    "DATASETS": {"TRAIN": ["a"], "LOCAL": [{"name": "a", "format": "coco", "json": "a.json", "images": "imgs"}]},
    "INPUT": {"AUGMENTATIONS": [{"name": "RandomFlip", "horizontal": True}]},
}
TAGS = [
    "!!python/object/apply:eval",
    "!!int",
    "!!float",
    "!!binary",
    "!!set",
    "!!timestamp",
    "!!omap",
    "!!pairs",
    "!!null",
]
YAML_PIECES = [
    *(piece.encode() for tag in TAGS for piece in (f"{tag} ", f"{tag} ['1']")),
    *(
        b"<<: ",
        b"&a ",
        b"*a ",
        b"_BASE_: ",
        b"_BASE_: a.yaml\n",
        b"\n- ",
        b"\nk: ",
        b"2001-99-99",
        b"---\n",
        b"...\n",
        b"? ",
        b"%TAG ! a\n",
    ),
    *(b"1:1", b"0x", b"[", b"{", b"'", b'"', b"|\n", b">\n", b"\t", b"\xff", b"\x00", b"#", b"\xe2\x80\xa8", b"\r"),
]


def parse_yaml_file(content, folder):
    """Load the file as a config."""
    (folder / "a.yaml").write_bytes(content)
    return _load(str(folder / "a.yaml"), [])


def parse_config(content, folder):
    """Load a config whose keys have these values."""
    (folder / "a.yaml").write_text(yaml.safe_dump(content))
    return _load(str(folder / "a.yaml"), [])


def parse_opts(words, folder):
    """Load Detectron2's config with these words of a command line."""
    return _load("", words)


def _load(path, opts):
    before = set(DatasetCatalog), set(MetadataCatalog)
    try:
        cfg = load_config(path, opts)
        assert cfg.dump()
    finally:
        for catalog, names in zip((DatasetCatalog, MetadataCatalog), before):
            for name in set(catalog) - names:
                catalog.remove(name)


def _defaults() -> dict[str, object]:
    cfg = get_cfg()
    add_focal_config(cfg)
    return flatten(cfg)


LEAVES = _defaults()
# Modules are programs, and other modules than those of a fuzzer are none of the parser's.
KEYS = sorted(set(LEAVES) - {"MODEL.FOCAL.IMPORTS"})


@st.composite
def configs(draw):
    """A nested config of some keys, each near its default or of any kind; and sections that are none."""
    content = {"VERSION": 2}
    for key in draw(st.lists(st.sampled_from(KEYS), max_size=5)):
        default = LEAVES[key]
        listed = list(default) if isinstance(default, tuple) else default
        value = draw(anything | changed([listed]).map(lambda new: new[0] if new else None))
        *sections, leaf = key.split(".")
        node = content
        for section in sections:
            node = node.setdefault(section, {}) if isinstance(node.get(section, {}), dict) else {}
        node[leaf] = value
    if draw(st.integers(0, 5)) == 0:
        content[draw(st.sampled_from(["MODEL", "SOLVER", "VERSION", "DATASETS", "x", ""]))] = draw(anything)
    return content


texts = anything.map(lambda value: str(value)[:4000]) | st.text(max_size=9)
words = st.lists(st.tuples(st.sampled_from(KEYS) | texts, texts), max_size=3).map(lambda pairs: list(sum(pairs, ())))

# Pickles and checkpoints

ARRAY = np.arange(6, dtype=np.float32).reshape(2, 3)
PLAIN = [1, 2.5, "ä", b"\xff", None, True, 2**70, (), {1, 2}, frozenset("a"), {"a": {"b": [3]}}, np.float64(0.5)]
ZOO = [{"model": {"a": ARRAY}, "__author__": "x", "more": PLAIN}, {"blobs": {"a_w": ARRAY, "b": ARRAY.T}}, {"a": ARRAY}]
PROPOSALS = {
    "ids": [1, 2],
    "boxes": [ARRAY[:, :1].repeat(4, 1)] * 2,
    "objectness_logits": [np.zeros(2)] * 2,
    "bbox_mode": 0,
}
OPCODES = sorted(opcode.code.encode("latin1") for opcode in pickletools.opcodes)
NAMES = [
    b"cnumpy\ndtype\n",
    b"cnumpy\nndarray\n",
    b"cnumpy.core.multiarray\nscalar\n",
    b"cbuiltins\nset\n",
    b"cos\nsystem\n",
]
NAMES += [
    b"cnumpy.core.multiarray\n_reconstruct\n",
    b"ccollections\nOrderedDict\n",
    b"c_codecs\nencode\n",
    b"(K\x01K\x02t",
]
NAMES += [b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch\nFloatStorage\n", b"ccollections\nCounter\n"]
PICKLE_PIECES = [
    *OPCODES,
    *NAMES,
    b"K\x00",
    b"U\x02f4",
    b"q\x00h\x00\x86",
    b"q\x00h\x00h\x00e",
    b"\x8a\x08" + b"\xff" * 8,
]


def pickles(values: list) -> st.SearchStrategy:
    """Bytes of good and damaged pickles, and of pickles put together from opcodes."""
    good = st.sampled_from([pickle.dumps(value, protocol) for value in values for protocol in (0, 2, 4, 5)])
    composed = st.lists(st.sampled_from(PICKLE_PIECES), max_size=40).map(lambda parts: b"".join([*parts, b"."]))
    return damaged(good, PICKLE_PIECES) | composed


def parse_pkl(content, folder):
    """Read a file of a zoo."""
    (folder / "a.pkl").write_bytes(content)
    return load_zoo(str(folder / "a.pkl"))


def parse_proposals(content, folder):
    """Read a file of proposals for two images."""
    (folder / "a.pkl").write_bytes(content)
    return load_proposals_into_dataset([{"image_id": 1}, {"image_id": 2}], str(folder / "a.pkl"))


def _saved(value: object, old: bool = False) -> bytes:
    file = io.BytesIO()
    torch.save(value, file, _use_new_zipfile_serialization=not old)
    return file.getvalue()


CHECKPOINT = {"model": {"a": torch.ones(2, 3), "b": torch.zeros(4).half()}, "iteration": 3, "more": [1, "a", {"b": 2}]}
SAVED, OLD = _saved(CHECKPOINT), _saved(CHECKPOINT, old=True)
with zipfile.ZipFile(io.BytesIO(SAVED)) as _archive:
    MEMBERS = {entry: _archive.read(entry) for entry in _archive.namelist()}


@st.composite
def archives(draw):
    """A zip of ``torch.save`` whose members are damaged and have right checksums."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", draw(st.sampled_from([0, 0, 0, 8]))) as archive:
        for name, content in MEMBERS.items():
            if draw(st.integers(0, 20)):
                damage = name.endswith("data.pkl") or draw(st.integers(0, 5)) == 0
                content = draw(damaged(st.just(content), PICKLE_PIECES)) if damage else content
                archive.writestr(name, content)
    return file.getvalue()


def parse_pth(content, folder):
    """Read a checkpoint."""
    (folder / "a.pth").write_bytes(content)
    return load_torch(str(folder / "a.pth"))


def parse_batch(content, folder):
    """Read a batch as ``focal replay`` does."""
    torch.save(content, folder / "a.pth")
    return load_batch(str(folder / "a.pth"))


INSTANCES = {"Instances": {"gt_boxes": {"Boxes": torch.ones(1, 4)}}, "image_size": [4, 4]}
BATCH_FILE = {
    "batch": [{"file_name": "a", "image": torch.zeros(3, 4, 4), "instances": INSTANCES}],
    "model": {"a": torch.ones(2)},
}

FUZZERS = {
    "COCO JSON": Fuzzer(st.tuples(damaged(coco_bytes, JSON_PIECES) | coco_bytes, modes), parse_coco, (DataError,)),
    "VOC XML": Fuzzer(st.tuples(damaged(st.just(XML), XML_PIECES), splits, modes), parse_voc, (DataError,)),
    "YOLO": Fuzzer(
        st.tuples(
            damaged(yaml_bytes, YAML_PIECES) | yaml_bytes,
            damaged(st.just(LABELS), NUMBER_PIECES),
            damaged(st.just(b"images/train/a.png\nimages/train/b.png\n"), NUMBER_PIECES),
            st.sampled_from(["train", "val"]),
            modes,
        ),
        parse_yolo,
        (DataError,),
    ),
    "CSV": Fuzzer(st.tuples(damaged(st.just(ROWS), NUMBER_PIECES), modes), parse_csv, (DataError,)),
    "YAML": Fuzzer(
        damaged(changed(YAML_GOOD).map(lambda c: yaml.safe_dump(c).encode()), YAML_PIECES),
        parse_yaml_file,
        (ConfigError, FileNotFoundError, ImportError),
    ),
    "the whole config": Fuzzer(configs(), parse_config, (ConfigError, FileNotFoundError)),
    "KEY VALUE pairs": Fuzzer(words, parse_opts, (ConfigError,)),
    ".pkl": Fuzzer(pickles(ZOO), parse_pkl, (WeightsError,)),
    "proposals": Fuzzer(pickles([PROPOSALS]), parse_proposals, (ConfigError,)),
    ".pth": Fuzzer(
        archives() | damaged(st.sampled_from([SAVED, OLD]), PICKLE_PIECES) | pickles([CHECKPOINT["more"]]),
        parse_pth,
        (WeightsError,),
    ),
    "batches to replay": Fuzzer(changed(BATCH_FILE), parse_batch, (WeightsError,)),
}
