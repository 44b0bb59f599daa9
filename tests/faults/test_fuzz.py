"""Every parser gives a value or its documented error, within 2 s and 500 MB, whatever it is given."""

import os
import signal

import pytest

from tests.faults import fuzzing

SHORT, LONG = 40, 1000  # cases of each parser
pytestmark = pytest.mark.filterwarnings("ignore")  # of PyTorch, on what is in damaged files


@pytest.mark.parametrize("name", fuzzing.FUZZERS)
def test_any_file_gives_a_value_or_an_error(name):
    outcome = fuzzing.run(fuzzing.FUZZERS[name], SHORT)
    assert outcome.cases >= SHORT // 2 and outcome.errors


@pytest.mark.slow
def test_thousands_of_files(capsys):
    """Print the table of ``docs/reliability.md``. ``FUZZ_SEED`` chooses other cases."""
    number = int(os.environ.get("FUZZ_SEED", 1))
    outcomes = {name: fuzzing.run(fuzzer, LONG, number) for name, fuzzer in fuzzing.FUZZERS.items()}
    with capsys.disabled():
        print(f"\n{fuzzing.table(outcomes)}")
    assert all(outcome.values and outcome.errors for outcome in outcomes.values())


def _wait():
    while True:
        pass


LIMITS = {
    "Python": (_wait, "TooLong"),
    "C": (lambda: sum(range(10**11)), f"ended with status {int(signal.SIGVTALRM)}"),
    "memory": (lambda: bytearray(2**30), "MemoryError"),
    "crash": (lambda: os._exit(3), "ended with status"),
    "error": (lambda: {}["a"], "KeyError"),
}


@pytest.mark.parametrize(
    ("parse", "says"),
    [pytest.param(*LIMITS[name], id=name, marks=[pytest.mark.slow] * (name in ("Python", "C"))) for name in LIMITS],
)
def test_the_limits_hold(parse, says):
    fuzzer = fuzzing.Fuzzer(fuzzing.st.just(1), lambda *_: parse(), (ValueError,))
    with pytest.raises(AssertionError, match=says):
        fuzzing.run(fuzzer, 1)
