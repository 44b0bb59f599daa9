"""A campaign of random faults: what is hit by them ends in bounded time, and resumed it is what was not hit.

Each kind of fault is a method of ``Campaign`` that injects a number of them.
"""

import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from focal_plugin.deploy import predict
from focal_plugin.engine import AtomicCheckpointer
from focal_plugin.engine.checkpoint import what_is_broken
from tests.engine import faulty
from tests.engine.same import assert_same, assert_same_run
from tests.engine.test_faults import TINY

SECONDS = 90  # in which whatever is hit must have ended
SIGNAL_SECONDS = 25  # after SIGTERM and SIGINT
STOPPED = (130, 143, -signal.SIGINT, -signal.SIGTERM)  # where nothing is left to save, a signal just ends the process
STEPS = ["SOLVER.MAX_ITER", 6, "SOLVER.CHECKPOINT_PERIOD", 2]
WORDS = [*STEPS, "DATASETS.TEST", "('shapes_test',)", "TEST.EVAL_PERIOD", 3, "VIS.ENABLED", True, "VIS.NUM_IMAGES", 1]


@dataclass
class Row:
    """Of a kind of fault: how many were injected, survived, lost something and led to another result."""

    injected: int = 0
    outcomes: Counter = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)


class Campaign:
    """Faults on the runs of a config, in ``folder``; ``table`` has a ``Row`` by the name of each kind."""

    def __init__(self, config, weights, folder, seed=0):
        self.config, self.weights, self.folder = config, weights, Path(folder)
        self.random = random.Random(seed)
        self.table: dict[str, Row] = {}
        self.turns: Counter = Counter()
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["tests.faults.campaign"])
        self.count = 0
        self.folder.mkdir(exist_ok=True)
        assert self.ended(self.train(self.new("first"))) == 0  # waits for imports
        began = time.monotonic()
        self.whole = self.new("whole")
        assert self.ended(self.train(self.whole)) == 0, self.log(self.whole)
        self.duration = time.monotonic() - began

    def next(self, *kinds):
        """The one of ``kinds`` after that of the last call with these."""
        self.turns[kinds] += 1
        return kinds[self.turns[kinds] % len(kinds)]

    # Processes

    def new(self, name):
        """A folder that is not there yet."""
        self.count += 1
        return self.folder / f"{name}-{self.count}"

    def start(self, function, *args):
        process = self.context.Process(target=function, args=args)
        process.start()
        return process

    def train(self, output, fault=None, place=0):
        words = [*self.words(output), "DATALOADER.NUM_WORKERS", self.random.choice([0, 0, 2])]
        return self.start(faulty.train, words, f"{output}.log", fault, place)

    def words(self, output, *flags):
        return ["--config-file", self.config, *(flags or ["--resume"]), "OUTPUT_DIR", output, *TINY, *WORDS]

    def ended(self, process, seconds=SECONDS):
        """The exit code."""
        process.join(seconds)
        if process.is_alive():
            process.kill()
            process.join()
            raise AssertionError(f"it did not end in {seconds} s")
        return process.exitcode

    def log(self, output):
        path = Path(f"{output}.log")
        return path.read_text(errors="replace")[-2000:] if path.exists() else ""

    def after(self, process, longest):
        """Wait for a random time."""
        process.join(self.random.uniform(0, longest))

    # Outcomes

    @contextmanager
    def faults(self, kind, number=1):
        """Inside, ``number`` faults are injected and what they hit is compared."""
        row = self.table.setdefault(kind, Row())
        row.injected += number
        try:
            yield
        except AssertionError as error:
            outcome = "differs" if "differs" in str(error) else "lost"
            row.problems.append(f"{kind}: {error}")
        else:
            outcome = "survived"
        row.outcomes[outcome] += number

    def resumes(self, output):
        """Let the run go on, undisturbed, and compare it with the whole one."""
        code = self.ended(self.train(output))
        assert code == 0, f"resumed, it ends with {code}: {self.log(output)}"
        self.is_the_whole(output)

    def is_the_whole(self, output):
        try:
            assert_same_run(output, self.whole)
        except AssertionError as error:
            raise AssertionError(f"{output} differs: {error}") from error
        left = [path.name for path in output.iterdir() if path.name.endswith(".part")]
        assert not left, f"{output} keeps {left}"

    # Kinds

    def kills(self, number, kind="SIGKILL at a random moment", most=5, fault=None, places=()):
        """Kill a run again and again, then let it end."""
        while number > 0:
            output, hits = self.new("killed"), 0
            for _ in range(min(most, number)):
                if fault:
                    process = self.train(output, fault=fault, place=self.random.choice(places))
                    code = self.ended(process)
                else:
                    process = self.train(output)
                    self.after(process, self.duration)
                    process.kill()
                    code = self.ended(process)
                if code == 0:
                    break
                hits += 1
            with self.faults(kind, hits):
                self.resumes(output)
            number -= max(hits, 1)

    def kills_in_writes(self, number):
        kinds = [("in a write", range(1, 4)), ("before a sync", range(1, 12)), ("before a rename", range(1, 6))]
        for i, (fault, places) in enumerate(kinds):
            self.kills(number // 3 + (i < number % 3), f"SIGKILL {fault} of a checkpoint", 4, fault, list(places))

    def signals(self, number):
        """SIGTERM and SIGINT at a random moment: in training, evaluation or the report."""
        for _ in range(number):
            output, process = self.new("stopped"), None
            process = self.train(output)
            self.after(process, self.duration)
            with self.faults("SIGTERM or SIGINT at a random moment"):
                if process.is_alive():
                    os.kill(process.pid, self.random.choice([signal.SIGTERM, signal.SIGINT]))
                code = self.ended(process, SIGNAL_SECONDS)
                started = "Starting training" in self.log(output)
                assert code in (0, *STOPPED) or (code == 1 and not started), f"it ended with {code}: {self.log(output)}"
                self.resumes(output)

    def signals_in_evaluations(self, number):
        """As a process of a scheduler's, in an evaluation that takes a minute."""
        for _ in range(number):
            output, where = self.new("evaluating"), self.next("Python", "C++")
            with self.faults(f"SIGTERM in a long evaluation, in {where}"):
                code = self.ended(self.train(output, fault=f"signal in {where}", place=1), 45)
                assert code == 143, f"it ended with {code}: {self.log(output)}"
                self.resumes(output)

    def bits(self, number):
        """One bit of a checkpoint flips, anywhere in the file: it is noticed, or changes nothing."""
        source = self.whole / "model_final.pth"
        content, expected = source.read_bytes(), torch.load(source, weights_only=True)
        folder = self.new("bits")
        folder.mkdir()
        shutil.copy(self.whole / "model_0000003.pth", folder)
        (folder / "last_checkpoint").write_text("model_final.pth")
        checkpointer = AtomicCheckpointer(None, str(folder))
        directory = content.index(b"PK\x01\x02")
        for i in range(number):
            first = 8 * directory if i % 2 else 0
            bit = self.random.randrange(first, 8 * len(content))
            broken = bytearray(content)
            broken[bit // 8] ^= 1 << bit % 8
            (folder / "model_final.pth").write_bytes(broken)
            where = "the directory" if bit >= 8 * directory else "the content"
            with self.faults(f"a bit of {where} of a checkpoint flips"):
                if what_is_broken(str(folder / "model_final.pth")):
                    found = checkpointer.last_whole_checkpoint()
                    assert found.endswith("model_0000003.pth"), f"bit {bit}: {found}"
                else:
                    try:
                        assert_same(torch.load(folder / "model_final.pth", weights_only=True), expected)
                    except Exception as error:
                        raise AssertionError(f"bit {bit} differs: {error}") from error

    def full_disks(self, number):
        """A file system of random size, or where none can be mounted a limit of files: with room, the run goes on."""
        size = sum(path.stat().st_size for path in self.whole.rglob("*") if path.is_file())
        for _ in range(number):
            output = self.new("full")
            output.mkdir()
            room = int(self.random.uniform(0.05, 0.95) * size) + 65536
            is_mounted = mount(output, room)
            kind = "a full disk" if is_mounted else "a limit of file sizes"
            with self.faults(f"{kind} of random size"):
                try:
                    process = self.train(output, **({} if is_mounted else {"fault": "full disk", "place": room // 4}))
                    code = self.ended(process)
                    assert code in (0, 1), f"it ended with {code}"
                    if is_mounted:
                        subprocess.run(["mount", "-o", "remount,size=1g", str(output)], check=True)
                    self.resumes(output)
                finally:
                    if is_mounted:
                        subprocess.run(["umount", "-l", str(output)], check=True)

    def files(self, number):
        """Files vanish or change while the run is stopped, or while it goes on."""
        kinds = [
            "last_checkpoint vanishes",
            "last_checkpoint is garbage",
            "a checkpoint vanishes",
            "config.yaml is garbage",
        ]
        kinds += ["a checkpoint is cut", "training images vanish"]
        images = Path(self.config).parent / "shapes_train"
        for _ in range(number):
            output, kind = self.new("files"), self.next(*kinds)
            with self.faults(kind):
                process = self.train(output, fault="in a step", place=self.random.randint(4, 5))  # of two checkpoints
                if kind == "training images vanish":
                    self.after(process, self.duration)
                    images.rename(images.with_name("away"))
                    try:
                        code = self.ended(process)
                    finally:
                        images.with_name("away").rename(images)
                    assert code in (0, 1, -signal.SIGKILL), f"it ended with {code}"
                else:
                    self.ended(process)
                    self.damage(output, kind)
                self.resumes(output)

    def damage(self, output, kind):
        names = {"last": "last_checkpoint", "config": "config.yaml"}
        name = names.get(kind.partition("_")[0].partition(".")[0])
        path = output / name if name else self.random.choice(sorted(output.glob("model_*.pth")))
        if kind.endswith("vanishes"):
            path.unlink()
        elif kind.endswith("cut"):
            path.write_bytes(path.read_bytes()[: self.random.randrange(path.stat().st_size)])
        else:
            path.write_bytes(self.random.randbytes(40))

    def two_in_a_folder(self, number):
        """A second training is refused, and an evaluation works; the first goes on as if it was alone."""
        for _ in range(number):
            output, flags = self.new("two"), self.next((), ("--eval-only", "--resume"))
            with self.faults("an evaluation beside a training" if flags else "a second training in the folder"):
                first = self.train(output)
                while first.is_alive() and "Saving checkpoint" not in self.log(output):
                    time.sleep(0.01)
                self.after(first, self.duration / 4)
                is_alone = not first.is_alive()
                second = self.start(faulty.train, self.words(output, *flags), f"{output}-second.log")
                code = self.ended(second)
                expected = 0 if flags or is_alone or not first.is_alive() else 1
                said = self.log(f"{output}-second")
                assert code == expected or (code == 1 and "is in use: process" in said), f"{code}: {said}"
                code = self.ended(first)
                assert code == 0, f"the first ended with {code}: {self.log(output)}"
                self.is_the_whole(output)

    def predictions(self, number):
        """predict is killed or told to end: its JSON files are whole, with the first of the images."""
        images = Path(self.config).parent / "shapes_train"
        whole = self.new("predicted")
        began = time.monotonic()
        assert self.ended(self.start(predictions, self.config, self.weights, images, whole)) == 0
        duration = time.monotonic() - began
        expected = json.loads((whole / "images.json").read_text())["images"]
        for _ in range(number):
            output, how = self.new("predicted"), self.random.choice([signal.SIGTERM, signal.SIGKILL])
            process = self.start(predictions, self.config, self.weights, images, output)
            process.join(self.random.uniform(0.3, 1) * duration)
            with self.faults("SIGTERM or SIGKILL during predict"):
                if process.is_alive():
                    os.kill(process.pid, how)
                assert self.ended(process, SIGNAL_SECONDS) in (0, 143, -how)
                found = []
                if (output / "images.json").exists():
                    found = json.loads((output / "images.json").read_text())["images"]
                    ids = {one["image_id"] for one in json.loads((output / "detections.json").read_text())}
                    assert found == expected[: len(found)] and ids <= {image["id"] for image in found}, "differs"
                drawn = list(output.glob("*.png"))
                assert len(drawn) <= len(found) + 1, "a picture is not listed"

    def exports(self, number):
        """export is killed or told to end: there is no file, or a whole one, and nothing else after the next."""
        output = self.new("exported")
        for _ in range(number):
            process, how = self.start(exports, self.config, self.weights, output), self.random.choice([15, 9])
            self.after(process, 6)
            with self.faults("SIGTERM or SIGKILL during export"):
                if process.is_alive():
                    os.kill(process.pid, how)
                code = self.ended(process, SIGNAL_SECONDS)
                path = output / "detector.ts"
                assert path.exists() or code != 0, "there is no file"
                if path.exists():
                    torch.jit.load(path)  # it is whole
                    path.unlink()
                left = list(output.iterdir()) if output.exists() else []
                assert not left or how == signal.SIGKILL or code in (0, -15), f"it leaves {left}"
        with self.faults("SIGTERM or SIGKILL during export", 0):
            assert self.ended(self.start(exports, self.config, self.weights, output)) == 0
            assert [path.name for path in output.iterdir()] == ["detector.ts"]

    def run(self, share=1.0, kinds=(), rounds=4, minutes=60):
        """Inject ``share`` of all faults, at least one of each kind a round; no round begins after so many minutes.

        Only those of the methods ``kinds``, if there are any.
        """
        end = time.monotonic() + 60 * minutes
        numbers = {"bits": 80, "kills": 40, "kills_in_writes": 36, "signals": 24, "signals_in_evaluations": 4}
        numbers |= {"full_disks": 12, "files": 12, "two_in_a_folder": 12, "predictions": 10, "exports": 6}
        rounds = rounds if share == 1 else 1
        for _ in range(rounds):
            if time.monotonic() < end:
                for kind, number in [(kind, numbers[kind]) for kind in kinds or numbers]:
                    getattr(self, kind)(max(1, round(share * number / rounds)))
                    (self.folder / "table.md").write_text(f"{self}\n")
        return self.table

    def __str__(self):
        lines = ["| fault | injected | survived | lost | differing |", "|---|---|---|---|---|"]
        total = Counter()
        for kind, row in self.table.items():
            numbers = {"injected": row.injected} | {
                name: row.outcomes[name] for name in ("survived", "lost", "differs")
            }
            total.update(numbers)
            lines.append(f"| {kind} | " + " | ".join(map(str, numbers.values())) + " |")
        return "\n".join([*lines, "| **all** | " + " | ".join(str(total[name]) for name in numbers) + " |"])


def mount(folder, size):
    """Mount a file system of ``size`` bytes; whether that can be done."""
    command = ["mount", "-t", "tmpfs", "-o", f"size={size // 4096 * 4096}", "tmpfs", str(folder)]
    try:
        return os.geteuid() == 0 and subprocess.run(command, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


def predictions(config, weights, images, output):
    torch.set_num_threads(1)
    quiet()
    words = ["--config-file", config, "--weights", weights, "--output", str(output), str(images), "MODEL.DEVICE", "cpu"]
    raise SystemExit(predict.main(words))


def exports(config, weights, output):
    from focal_plugin.deploy import export

    torch.set_num_threads(1)
    quiet()
    words = ["--config-file", config, "--weights", weights, "--output", str(output / "detector.ts")]
    raise SystemExit(export.main([*words, "--format", "torchscript", "MODEL.DEVICE", "cpu"]))


def quiet():
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
