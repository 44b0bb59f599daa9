"""Weights in every format of the zoo load; what else a file asks for is refused, never imported."""

import collections
import inspect
import os
import pickle
import pickletools
import resource
import signal
import textwrap
import time
import traceback
import zipfile
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from hypothesis import given, settings
from hypothesis import strategies as st

from focal_plugin.engine import AtomicCheckpointer
from focal_plugin.files.safe_load import WeightsError, load_torch, load_zoo, unpickle

WEIGHTS = np.arange(6, dtype=np.float32).reshape(2, 3)
VALUES = {
    "array": WEIGHTS,
    "fortran": np.asfortranarray(WEIGHTS),
    "not contiguous": WEIGHTS[:, ::2],
    "empty": np.zeros((0, 4), np.float16),
    "no dimension": np.array(3, np.int64),
    "big-endian": WEIGHTS.astype(">f4"),
    "bools": np.array([True, False]),
    "complex": np.array([1 + 2j]),
    "bytes": np.array([b"ab", b"c"]),
    "text": np.array(["ä", "bc"]),
    "scalar": np.float64(0.5),
    "integer scalar": np.int32(-7),
    "text scalar": np.str_("abc"),
    "plain": [1, 2.5, "ä", b"\xff", b"", None, True, 2**70, (), (1,), {1, 2}, frozenset("a"), {"a": {"b": [3]}}],
    "ordered": collections.OrderedDict(b=WEIGHTS, a=1),
    "shared": [WEIGHTS, WEIGHTS, (WEIGHTS,)],
}


def assert_same(found, expected):
    """The same values of the same types, arrays in this machine's byte order."""
    if isinstance(expected, np.ndarray):
        assert type(found) is np.ndarray and found.dtype == expected.dtype.newbyteorder("=")
        np.testing.assert_array_equal(found, expected)
        found[...] = found  # it can be written to
        return
    assert type(found) is (dict if isinstance(expected, dict) else type(expected))
    if isinstance(expected, dict):
        assert list(found) == list(expected)
        found, expected = list(found.values()), list(expected.values())
    if isinstance(expected, list | tuple):
        assert len(found) == len(expected)
        for pair in zip(found, expected):
            assert_same(*pair)
    else:
        assert found == expected


def numpy_1(data):
    """The pickle as NumPy 1 would have written it."""
    for name in (b"multiarray", b"numeric"):
        data = data.replace(b"numpy._core." + name, b"numpy.core." + name)
    for name in (b"multiarray", b"numeric"):  # from protocol 4 on, names come with their lengths
        new = b"numpy.core." + name
        data = data.replace(bytes([len(new) + 1]) + new, bytes([len(new)]) + new)
    return data


@pytest.mark.parametrize("write", [bytes, numpy_1], ids=["NumPy 2", "NumPy 1"])
@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
def test_values_come_back(value, protocol, write):
    data = pickle.dumps(value, protocol)
    if write is numpy_1 and protocol >= 4:  # a frame's length is that of its new contents
        data = write(_unframed(data))
    else:
        data = write(data)
    assert_same(unpickle(data, "a.pkl"), value)


def _unframed(data):
    """A pickle without its frames, which are 9 bytes each and optional."""
    for opcode, _, position in reversed(list(pickletools.genops(data))):
        if opcode.name == "FRAME":
            data = data[:position] + data[position + 9 :]
    return data


def test_a_pickle_of_python_2():
    """Bytes are text there: protocol 2, SHORT_BINSTRING, __builtin__. Detectron's model zoo has such files."""
    data = (
        b"\x80\x02}q\x01U\x05blobsq\x02}q\x03(U\x05fc1_wq\x04cnumpy.core.multiarray\n_reconstruct\nq\x05cnumpy\nndarray\n"
        b"q\x06K\x00\x85U\x01b\x87Rq\x07(K\x01K\x02\x85cnumpy\ndtype\nq\x08U\x02f4K\x00K\x01\x87Rq\t(K\x03U\x01<NNNJ\xff"
        b"\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89U\x08\x00\x00\x80?\x00\x00\x00\xbftbU\x0efc1_w_momentumq\nK\x00us."
    )
    assert pickle.loads(data, encoding="latin1")["blobs"]["fc1_w"].tolist() == [1.0, -0.5]
    assert_same(unpickle(data, "a.pkl"), {"blobs": {"fc1_w": np.array([1, -0.5], np.float32), "fc1_w_momentum": 0}})


class Detector(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1 = torch.nn.Linear(3, 2)


FILES = {
    "Detectron2": ("a.pkl", {"model": {"fc1.weight": WEIGHTS}, "__author__": "someone", "extra": [1]}),
    "converted": ("a.pkl", {"model": {"fc1.weight": WEIGHTS}, "__author__": "x", "matching_heuristics": True}),
    "Detectron": ("a.pkl", {"blobs": {"fc1_w": WEIGHTS, "fc1_w_momentum": WEIGHTS}, "cfg": "text"}),
    "ImageNet": ("a.pkl", {"fc1_w": WEIGHTS, "fc1_b_momentum": WEIGHTS}),
    "pycls": (
        "a.pyth",
        {"model_state": {"fc1.weight": torch.tensor(WEIGHTS), "num_batches_tracked": torch.zeros(1)}, "epoch": 3},
    ),
}


@pytest.mark.filterwarnings("ignore:.*weights_only=False")
@pytest.mark.parametrize(("name", "content"), FILES.values(), ids=FILES)
def test_files_of_the_zoos_are_what_detectron2_makes_of_them(name, content, tmp_path):
    path = tmp_path / name
    if path.suffix == ".pkl":
        path.write_bytes(pickle.dumps(content, 2))
    else:
        torch.save(content, path)
    found, expected = load_zoo(str(path)), DetectionCheckpointer(Detector())._load_file(str(path))
    assert found.keys() == expected.keys()
    for key in expected.keys() - {"model"}:
        assert found[key] == expected[key]
    assert found["model"].keys() == expected["model"].keys()
    for key, value in expected["model"].items():
        np.testing.assert_array_equal(found["model"][key], value)


@pytest.mark.parametrize("old", [False, True], ids=["zip", "before PyTorch 1.6"])
def test_a_run_of_ones_own(tmp_path, old):
    optimizer = torch.optim.SGD(Detector().parameters(), lr=0.1, momentum=0.9)
    state = {"model": Detector().state_dict(), "optimizer": optimizer.state_dict(), "iteration": 3}
    torch.save(state, tmp_path / "a.pth", _use_new_zipfile_serialization=not old)
    loaded = load_torch(str(tmp_path / "a.pth"))
    assert loaded.keys() == state.keys() and loaded["optimizer"] == state["optimizer"]
    torch.testing.assert_close(loaded["model"], state["model"])


# What is refused


@pytest.fixture
def trap(tmp_path, monkeypatch):
    """A file that a hostile one would write."""
    monkeypatch.chdir(tmp_path)
    return tmp_path / "executed"


class Call:
    """Unpickled, it is what ``function(*arguments)`` returns."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def hostile_pickles():
    touch = Call(os.system, "touch executed")
    return {
        "os.system": {"model": {"a": touch}, "__author__": "x"},
        "eval": [Call(eval, "open('executed', 'w')")],
        "exec": Call(exec, "open('executed', 'w')"),
        "open": Call(open, "executed", "w"),
        "getattr": Call(getattr, WEIGHTS, "tolist"),
        "a method": Call("executed".join, ["a"]),
        "a class": Fraction(1, 2),
        "tensor": {"model": {"a": torch.zeros(2)}, "__author__": "x"},
        "array of objects": np.array([touch, None], dtype=object),
        "records": np.zeros(2, dtype=[("a", "f4"), ("b", "O")]),
        "dates": np.array(["2020-01-01"], dtype="datetime64[D]"),
        "bytearray": bytearray(b"a"),
        "defaultdict": collections.defaultdict(list),
        "recarray": np.zeros(2).view(np.recarray),
        "masked array": np.ma.zeros(2),
        "range": range(10**9),
    }


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("name", hostile_pickles())
def test_a_hostile_pickle_is_refused(name, protocol, trap, tmp_path):
    (tmp_path / "hostile.pkl").write_bytes(pickle.dumps(hostile_pickles()[name], protocol))
    with pytest.raises(WeightsError) as error:
        load_zoo("hostile.pkl")
    assert "hostile.pkl" in str(error.value) and str(error.value).count("hostile.pkl") == 1
    assert not trap.exists() and os.listdir(tmp_path) == ["hostile.pkl"]


def test_the_refusal_says_what_was_asked_for_and_what_to_do(trap, tmp_path):
    (tmp_path / "hostile.pkl").write_bytes(pickle.dumps(hostile_pickles()["os.system"]))
    with pytest.raises(WeightsError, match=r"asks for posix\.system, which is refused.*save its state_dict"):
        load_zoo("hostile.pkl")
    torch.save(hostile_pickles()["os.system"], tmp_path / "hostile.pth")
    with pytest.raises(WeightsError, match=r"hostile\.pth asks for posix\.system, which is refused.*state_dict"):
        load_torch("hostile.pth")
    assert not trap.exists()


def test_there_is_no_switch(trap, monkeypatch):
    """PyTorch's own is without effect, and the readers take nothing but a path."""
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    torch.save(hostile_pickles()["os.system"], "hostile.pth")
    with pytest.raises(WeightsError, match=r"posix\.system, which is refused"):
        load_torch("hostile.pth")
    assert not trap.exists()
    assert [list(inspect.signature(read).parameters) for read in (load_torch, load_zoo)] == [["path"], ["path"]]
    torch.load("hostile.pth")
    assert trap.exists()  # the switch works


@pytest.mark.parametrize("ending", ["pkl", "pth", "pyth"])
def test_a_run_starts_from_no_hostile_file(ending, trap, tmp_path):
    path = tmp_path / f"hostile.{ending}"
    content = {"model": {}, "model_state": {}, "__author__": Call(os.system, "touch executed")}
    if ending == "pkl":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path)
    with pytest.raises(WeightsError, match=r"hostile.*posix\.system"):
        AtomicCheckpointer(Detector()).resume_or_load(str(path), resume=False)
    assert not trap.exists()


@pytest.mark.parametrize("name", ["Detectron2", "converted", "pycls"])
def test_a_run_starts_from_files_of_the_zoos(name, tmp_path):
    name, content = FILES[name]
    if name.endswith(".pkl"):
        (tmp_path / name).write_bytes(pickle.dumps(content, 2))
    else:
        torch.save(content, tmp_path / name)
    model = Detector()
    AtomicCheckpointer(model).load(str(tmp_path / name))
    np.testing.assert_array_equal(model.fc1.weight.detach(), WEIGHTS)


def test_the_trap_works(trap, tmp_path):
    pickle.loads(pickle.dumps(hostile_pickles()["os.system"]))
    assert trap.exists()


CRAFTED = {
    "dotted names": b"\x80\x04\x8c\x05numpy\x8c\x0dndarray.fill\x93.",
    "a name of ours": b"cfocal_plugin.safe_load\nunpickle\n.",
    "persistent": b"Pmodel\n.",
    "extension": b"\x80\x02\x82\x01.",
    "dtype of objects": b"\x80\x02cnumpy\ndtype\n(U\x02O8K\x00K\x01tR.",
    "dtype with the flags of another": (
        b"\x80\x02cnumpy\ndtype\n(U\x02f4K\x00K\x01tR(K\x03U\x01<NN}K\x08K\x08K?tb."  # which NumPy takes
    ),
    "function with a state": b"cnumpy\ndtype\n}U\x08functionNsb.",
    "function with slots": b"cnumpy\ndtype\nN}U\x08functionNs\x86b.",
    "class with a state": b"cnumpy\nndarray\n}U\x05valueNsb.",
    "array without a state": b"\x80\x02cnumpy\nndarray\n)\x81.",
    "array of another type": b"\x80\x02cnumpy.core.multiarray\n_reconstruct\n(cbuiltins\nset\nK\x00\x85U\x01btR.",
    "encoding": b"c_codecs\nencode\n(Va\nVrot13\ntR.",
    "the type itself": b"cbuiltins\nset\n.",
    "bytes of a size": b"c__builtin__\nbytes\n(K\x05tR.",
    "list of itself": b"]q\x00h\x00a.",
    "huge bytes": b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7f.",
    "unhashable key": b"}]Ns.",
    "no stop": b"\x80\x02N",
    "empty": b"",
    "text": b"weights",
    "deep": b"]" * 5000 + b"a" * 4999 + b".",
    "a zip file": b"PK\x03\x04",
}


@pytest.mark.parametrize("data", CRAFTED.values(), ids=CRAFTED)
def test_a_crafted_pickle_is_refused(data):
    with pytest.raises(WeightsError, match=r"^a\.pkl "):
        unpickle(data, "a.pkl")


def test_room_is_made_for_what_is_there_alone():
    """The values' numbers and the length of a frame are none of the memory that is used."""
    frame = b"\x80\x04\x95" + b"\xff" * 7 + b"\x7fN."
    for data in (b"\x80\x02Nr\xff\xff\xff\xff.", b"Np99999999999\n.", frame):
        assert unpickle(data, "a.pkl") is None


def test_arrays_of_another_size_than_their_bytes():
    good = pickle.dumps(np.zeros(4, np.float32), 2)
    (position,) = (at for opcode, value, at in pickletools.genops(good) if opcode.name == "BININT1" and value == 4)
    for count in (0, 3, 5, 255):
        bad = good[:position] + b"K" + bytes([count]) + good[position + 2 :]
        with pytest.raises(WeightsError, match="16 bytes for an array of float32"):
            unpickle(bad, "a.pkl")


def test_lists_of_lists_that_would_fill_the_memory_are_shared():
    """2^60 elements, written out."""
    value = unpickle(b"]" + b"q\x00](h\x00h\x00e" * 60 + b".", "a.pkl")
    assert value[0] is value[1]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.pkl", [1], "a.pkl is of type list"),
        ("a.pkl", {"model": [], "__author__": "x"}, "model of a.pkl is of type list"),
        ("a.pkl", {"blobs": 5}, "blobs of a.pkl is of type int"),
        ("a.pkl", {"fc1_w": 5}, "has int for the weights 'fc1_w'"),
        ("a.pkl", {7: WEIGHTS}, "for the weights 7"),
        ("a.pyth", {"epoch": 3}, "model_state of a.pyth is of type NoneType"),
        ("a.pth", torch.zeros(3), "a.pth is of type Tensor"),
    ],
)
def test_files_without_weights(name, content, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if name.endswith(".pkl"):
        (tmp_path / name).write_bytes(pickle.dumps(content))
    else:
        torch.save(content, name)
    with pytest.raises(WeightsError, match=says.replace(".", r"\.")):
        (load_torch if name.endswith(".pth") else load_zoo)(name)


@pytest.mark.parametrize("old", [False, True], ids=["zip", "before PyTorch 1.6"])
def test_a_damaged_file(tmp_path, old):
    path = tmp_path / "a.pth"
    torch.save({"model": Detector().state_dict()}, path, _use_new_zipfile_serialization=not old)
    whole = path.read_bytes()
    for length in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(WeightsError, match=r"a\.pth is damaged"):
            load_torch(str(path))
    with pytest.raises(FileNotFoundError):
        load_torch(str(tmp_path / "gone.pth"))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"<html>404</html>", r"b'<html>404</html>' and has 16 bytes"),
        (b"version https://git-lfs.github.com/spec/v1\noid", r"b'version https://git-lfs"),
        (b"", "it is empty"),
    ],
)
def test_a_file_that_was_not_downloaded(tmp_path, content, says):
    (tmp_path / "a.pth").write_bytes(content)
    with pytest.raises(WeightsError, match=says) as error:
        load_torch(str(tmp_path / "a.pth"))
    assert "weights_only" not in str(error.value)  # PyTorch's advice is to read it as a program


# Pickles that take long


def nested(depth, make=b"\x86"):
    """The opcodes of ``t = (t, t)``, ``depth`` times: 2^depth values to hash, to compare or to print."""
    return b"K\x01" + b"".join(b"q" + bytes([i]) + b"h" + bytes([i]) + make for i in range(depth))


# One hash for all.
FLOOD = [b"\x8a\x0a" + (k * (2**61 - 1)).to_bytes(10, "little") for k in range(1, 100_000)]
_RECONSTRUCT = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85U\x01btR"
BOMBS = {
    "key": b"\x80\x02}" + nested(60) + b"K\x01s.",
    "keys": b"\x80\x02}(" + nested(60) + b"K\x01u.",
    "dict": b"(" + nested(60) + b"K\x01d.",
    "set by a call": b"\x80\x02cbuiltins\nset\n](" + nested(60) + b"e\x85R.",
    "frozenset by a call": b"\x80\x02cbuiltins\nfrozenset\n](" + nested(60) + b"e\x85R.",
    "ordered by a call": b"\x80\x02ccollections\nOrderedDict\n]" + nested(60) + b"K\x01\x86a\x85R.",
    "set": b"\x80\x04\x8f(" + nested(60) + b"\x90.",
    "frozenset": b"\x80\x04(" + nested(60) + b"\x91.",
    "class": b"\x80\x02" + nested(60) + b"0cbuiltins\nset\n](h\x3be\x85\x81.",
    "one hash": b"\x80\x02}(" + b"".join(key + b"N" for key in FLOOD) + b"u.",
    "one hash in a set": b"\x80\x04\x8f(" + b"".join(FLOOD) + b"\x90.",
    "complex keys": b"\x80\x04\x8f(cbuiltins\ncomplex\n(K\x01K\x02tR\x90.",
    "shape": _RECONSTRUCT + b"(K\x01" + nested(60) + b"cnumpy\ndtype\n(U\x02f4K\x00K\x01tR\x89U\x00tb.",
    "shape of text": _RECONSTRUCT + b"(K\x01(J\xff\xff\xff\x7fU\x01atcnumpy\ndtype\n(U\x02f4K\x00K\x01tR\x89U\x00tb.",
    "kind": b"cnumpy.core.multiarray\n_reconstruct\n(" + nested(60) + b"NNtR.",
    "code": b"cnumpy\ndtype\n(" + nested(60) + b"tR.",
    "encoding": b"c_codecs\nencode\n(Va\n" + nested(60) + b"tR.",
    "text": b"c_codecs\nencode\n(" + nested(60) + b"Vlatin1\ntR.",
    "order": b"cnumpy.core.numeric\n_frombuffer\n(U\x00N" + nested(60) + nested(60) + b"tR.",
    "lists in an error": b"cnumpy.core.numeric\n_frombuffer\n(U\x00N" + nested(60, b"2\x86") + b"U\x01CtR.",
    "bytearray": b"\x80\x05\x96\xff\xff\xff\xff\xff\xff\x00\x00.",
    "a name of a megabyte": b"c" + b"a" * 1_000_000 + b"\nb\n.",
}


@pytest.mark.parametrize("data", BOMBS.values(), ids=BOMBS)
def test_a_pickle_that_takes_long_is_refused(data):
    run_limited(
        f"""
        from focal_plugin.files.safe_load import WeightsError, unpickle
        try:
            unpickle({data!r}, "a.pkl")
        except WeightsError as error:
            assert str(error).startswith("a.pkl ") and len(str(error)) < 1000
        else:
            raise AssertionError
        """
    )


@pytest.mark.parametrize("old", [False, True], ids=["zip", "before PyTorch 1.6"])
@pytest.mark.parametrize("name", ["key", "ordered by a call", "one hash"])
def test_a_checkpoint_that_takes_long_is_refused(name, old, tmp_path):
    path = tmp_path / "a.pth"
    if old:  # a magic number, a version, facts of the machine, the content, and the keys of storages
        parts = [pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, {})]
        path.write_bytes(b"".join([*parts, BOMBS[name], pickle.dumps([], 2)]))
    else:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", BOMBS[name])
            archive.writestr("archive/version", "3\n")
            archive.writestr("archive/byteorder", "little")
    run_limited(
        f"""
        from focal_plugin.files.safe_load import WeightsError, load_torch
        try:
            load_torch({str(path)!r})
        except WeightsError as error:
            assert "a.pth" in str(error) and len(str(error)) < 1000, error
        else:
            raise AssertionError
        """
    )


def test_a_checkpoint_that_expands_is_refused(tmp_path):
    torch.save({"model": {"a": torch.zeros(2_000_000)}}, tmp_path / "a.pth")
    with zipfile.ZipFile(tmp_path / "a.pth") as whole, zipfile.ZipFile(tmp_path / "b.pth", "w", 8) as packed:
        for name in whole.namelist():
            packed.writestr(name, whole.read(name))
    assert load_torch(str(tmp_path / "a.pth"))["model"]["a"].shape == (2_000_000,)
    with pytest.raises(WeightsError, match=r"b\.pth is compressed: .* expected one that torch\.save wrote"):
        load_torch(str(tmp_path / "b.pth"))


def test_a_file_of_many_values_is_read_soon():
    value = {f"layer{i}": np.zeros(3, np.float32) for i in range(2000)}
    data, start = pickle.dumps(value, 2), time.perf_counter()
    assert len(unpickle(data, "a.pkl")) == 2000
    assert time.perf_counter() - start < 2


def run_limited(program, seconds=10):
    """Run a program in this process's image, with 500 MB more than it has, and end it after some seconds."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + 500 * 2**20, resource.RLIM_INFINITY))
            signal.alarm(seconds)
            exec(textwrap.dedent(program), {})
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    _, status = os.waitpid(pid, 0)
    assert not os.WIFSIGNALED(status), f"ended by signal {os.WTERMSIG(status)}, after {seconds} s if it is 14"
    assert os.WEXITSTATUS(status) == 0


# Any bytes at all

SEEDS = [pickle.dumps(value, protocol) for value in VALUES.values() for protocol in (0, 2, 4)]
OPCODES = sorted(opcode.code.encode("latin1") for opcode in pickletools.opcodes)
NAMES = [
    b"cnumpy\ndtype\n",
    b"cnumpy\nndarray\n",
    b"cnumpy.core.multiarray\nscalar\n",
    b"cbuiltins\nset\n",
    b"cos\nsystem\n",
]


@st.composite
def damaged(draw):
    """A good pickle with some bytes changed, dropped or inserted."""
    data = draw(st.sampled_from(SEEDS))
    for _ in range(draw(st.integers(1, 4))):
        at, length = draw(st.integers(0, len(data))), draw(st.integers(0, 3))
        data = data[:at] + draw(st.one_of(st.binary(max_size=3), st.sampled_from(OPCODES))) + data[at + length :]
    return data


composed = st.lists(st.sampled_from([*OPCODES, *NAMES, b"K\x00", b"U\x02f4", b"]", b"("]), max_size=25)


@given(st.one_of(damaged(), st.binary(max_size=30), composed.map(lambda parts: b"".join([*parts, b"."]))))
@settings(max_examples=300)
def test_any_bytes_are_values_or_refused(data):
    try:
        unpickle(data, "a.pkl")
    except WeightsError as error:
        assert str(error).startswith("a.pkl ")
