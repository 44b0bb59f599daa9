"""Write checkpoints whole or not at all, and resume from the last whole one, also with another config."""

import glob
import logging
import math
import os
import re
import zipfile
from contextlib import suppress
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.utils import comm
from torch import nn

from ..config import ConfigError
from ..files.safe_load import WeightsError, load_torch, load_zoo
from ..files.weights import Fit, check_values, missing_file
from ..files.write import replace_file
from .changes import changes, describe, refuse_seed

logger = logging.getLogger(__name__)


_IS_FOLDER = 0x10  # an attribute of an entry of a zip archive
_KEYS = "MODEL.WEIGHTS (in a LazyConfig train.init_checkpoint)"
_EXPECTED = "a path, a URL, a name such as detectron2://ImageNetPretrained/MSRA/R-50.pkl, or nothing for random weights"


class AtomicCheckpointer(DetectionCheckpointer):
    """Detectron2's ``DetectionCheckpointer``, for machines that fail and files from strangers.

    A checkpoint, and the file ``last_checkpoint`` that names it, is written under another name, synced to the disk and
    renamed. Before a run resumes, the whole file is checked against its checksums; a broken one is reported and left
    where it is, and the one before it is used. Nothing in a file is executed (``files.safe_load``).

    Attributes:
        config: what ``changes.plain_config`` makes of the run's config, which is saved too; None if it is not known.
        fit: how the weights that were loaded last fit the model.
        resumed_from: the checkpoint that the run goes on from; "" for none.
    """

    config: dict[str, Any] | None = None
    fit: Fit
    resumed_from = ""

    def save(self, name: str, **kwargs: Any) -> None:
        """Save as fvcore's ``Checkpointer.save`` does; ``model`` among what is given takes the place of the weights.

        Raises:
            OSError: the file could not be written. Earlier checkpoints are unchanged.
        """
        if not self.save_dir or not self.save_to_disk:
            return
        if "://" in self.save_dir:  # not a file system: nothing can be renamed
            super().save(name, **kwargs)
            return
        state = {key: checkpointable.state_dict() for key, checkpointable in self.checkpointables.items()}
        self.save_weights(name, self.model, **state, **kwargs)
        self.tag_last_checkpoint(f"{name}.pth")

    def save_weights(self, name: str, model: nn.Module, /, **kwargs: Any) -> None:
        """Save a model and the config, with what is given; for MODEL.WEIGHTS, and not to resume from.

        Raises:
            OSError: the file could not be written. An earlier one is unchanged.
        """
        content = {"model": model.state_dict()} | ({} if self.config is None else {"config": self.config}) | kwargs
        path = os.path.join(self.save_dir, f"{name}.pth")
        logger.info(f"Saving checkpoint to {path}")
        replace_file(path, lambda file: torch.save(content, file))

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Name the checkpoint to resume from."""
        if "://" in self.save_dir:
            super().tag_last_checkpoint(last_filename_basename)
            return
        path = os.path.join(self.save_dir, "last_checkpoint")
        replace_file(path, lambda file: file.write(last_filename_basename.encode()))

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict[str, Any]:
        """Resume from the last whole checkpoint, or load ``path``, as fvcore's ``Checkpointer.resume_or_load`` does.

        A training, which has checkpointables, is warned if it will replace an earlier run's files; an evaluation, which
        has none, if it has no weights.

        Raises:
            FileNotFoundError: ``path`` is no file.
            OSError: there are checkpoints to resume from, and none is whole.
            ConfigError: the one to resume from is of another model, optimiser or seed than the config's.
        """
        if resume and self.has_checkpoint():
            self.resumed_from = self.last_whole_checkpoint()
            return self.load(self.resumed_from)
        if self.checkpointables and self.has_checkpoint():
            logger.warning(
                f"{self.save_dir} holds an earlier run, whose checkpoints this one replaces as it goes. To go on with "
                "that run instead, use --resume; to keep it, set another OUTPUT_DIR (in a LazyConfig train.output_dir)."
            )
        if not self.checkpointables and not path:
            logger.warning(
                "No weights given: what follows is an untrained model. Add MODEL.WEIGHTS (in a LazyConfig "
                "train.init_checkpoint) and a path, or --resume for the last checkpoint in OUTPUT_DIR."
            )
        problem = path and missing_file(_KEYS, path, _EXPECTED)
        if problem := comm.all_gather(problem)[0]:  # the main process reads it, and the others get it from there
            raise FileNotFoundError(problem)
        return self.load(path, checkpointables=[])

    def load(self, path: str, checkpointables: list[str] | None = None) -> dict[str, Any]:
        """Load as Detectron2's checkpointer does; nothing if ``path`` is empty.

        Raises:
            FileNotFoundError: a file could not be downloaded.
            WeightsError: the file is damaged, asks for more than data, is another project's checkpoint, or has weights
                that no model can use, such as a NaN.
            ConfigError: as ``resume_or_load``.
        """
        if not path:
            logger.info(f"{_KEYS} is empty: no checkpoint is loaded, and the weights stay as they were initialised.")
            return {}
        self._path, self._resumes = path, checkpointables is None and bool(self.checkpointables)
        try:
            return super().load(path, checkpointables)
        except FileNotFoundError as error:  # of a download
            raise FileNotFoundError(f"{_KEYS} is {path}: {error}") from error

    def has_checkpoint(self) -> bool:
        """Return whether there is a checkpoint to resume from, named in ``last_checkpoint`` or not."""
        return super().has_checkpoint() or bool(self.save_dir and self.numbered())

    def get_checkpoint_file(self) -> str:
        """Return the path that ``last_checkpoint`` names; "" if that cannot be read."""
        try:
            return super().get_checkpoint_file()
        except UnicodeDecodeError:
            return ""

    def last_whole_checkpoint(self) -> str:
        """Return the path of the checkpoint to resume from, and log which broken ones were passed over.

        Raises:
            OSError: there is no whole one.
        """
        if "://" in self.save_dir:
            return self.get_checkpoint_file()
        found, problems = "", []
        if comm.is_main_process():
            for path in self._candidates():
                problem = what_is_broken(path)
                if not problem:
                    found = path
                    break
                problems.append(f"{path}: {problem}")
        found, problems = comm.all_gather((found, problems))[0]
        listed = "\n  ".join(problems)
        if not found:
            raise OSError(
                f"--resume: no checkpoint in {self.save_dir} is whole. Put a good one there and its name into "
                f"last_checkpoint, or start anew without --resume.\n  {listed}"
            )
        if problems:
            logger.warning(f"Broken, so not resumed from:\n  {listed}\nGoing on from the one before: {found}.")
        elif not self.get_checkpoint_file():
            logger.warning(
                f"{self.save_dir}/last_checkpoint is gone or unreadable. Going on from {found}, which has the most "
                "steps of the checkpoints there."
            )
        return found

    def recorded_config(self) -> dict[str, Any]:
        """Return the config in the latest checkpoint that can be read, as ``config``; {} if none has it."""
        for path in self._candidates() if self.save_dir else ():
            with suppress(Exception):  # a broken one; the next is tried
                return read_whole(path)["config"]
        return {}

    def _candidates(self) -> list[str]:
        """List the checkpoint that ``last_checkpoint`` names, then those before it, the latest first.

        All of them, those with the most steps first, if it names none.
        """
        last, steps = self.get_checkpoint_file(), self.numbered()
        final = os.path.join(self.save_dir, "model_final.pth")
        if final in steps and not last:
            steps[final] = _steps_of(final)
        limit = math.inf if last.endswith("model_final.pth") else steps.get(last, math.inf)
        before = sorted((path for path in steps if path != last and steps[path] < limit), key=steps.get, reverse=True)
        return [last, *before] if last else before

    def numbered(self) -> dict[str, float]:
        """Return the steps of each checkpoint by its path; −1 for model_final.pth, of a shorter run if not the last."""
        steps = {}
        for path in glob.glob(os.path.join(glob.escape(self.save_dir), "model_*.pth")):
            if match := re.fullmatch(r"model_(\d+|final)\.pth", os.path.basename(path)):
                steps[path] = -1 if match[1] == "final" else int(match[1])
        return steps

    def _load_file(self, filename: str) -> dict[str, Any]:
        """Read a checkpoint file without executing anything in it."""
        return load_zoo(filename) if filename.endswith((".pkl", ".pyth")) else super()._load_file(filename)

    def _load_model(self, checkpoint: Any) -> Any:
        theirs = checkpoint.pop("config", None) or {}
        self._changes = changes(theirs, self.config) if theirs and self.config else {}
        if self._resumes:
            refuse_seed(self._path, self._changes)
        elif "ema" in checkpoint:
            logger.info(
                f"{self._path}: its weights as they are trained. It also has their average (MODEL.FOCAL.EMA): "
                "`python -m focal_plugin convert ema` makes weights of that."
            )
        # At the end, after names are matched and prefixes removed, and before the first tensor is copied.
        hook = self.model.register_load_state_dict_pre_hook(
            lambda model, found, *_: check_values(found, model.state_dict(), self._path)
        )
        try:
            incompatible = super()._load_model(checkpoint)
        except (ConfigError, WeightsError):
            raise
        except ValueError as error:  # fvcore's message does not name the file
            raise WeightsError(
                f"{self._path} is no checkpoint of Detectron2's: {error} Those of torchvision, MMDetection and "
                "Detectron are converted by `python -m focal_plugin convert`."
            ) from error
        finally:
            hook.remove()
        missing, unexpected, other_shapes = incompatible
        others = {name for name, _, _ in other_shapes}  # fvcore lists them among the missing ones, too
        self.fit = Fit([name for name in missing if name not in others], unexpected, other_shapes)
        if self._resumes:
            self._check_resumed(checkpoint)
        return incompatible

    def _check_resumed(self, checkpoint: dict[str, Any]) -> None:
        """Load the checkpointables here, with an explanation if they or the model do not fit; log what has changed.

        Raises:
            ConfigError: they do not.
        """
        differing = f"Keys that differ, theirs → this config's: {describe(self._changes)}." if self._changes else ""
        advice = "Resume with its config, or start another run with another OUTPUT_DIR."
        if problems := self.fit.problems():
            listed = "; ".join(problems[:2]) + (f"; and {len(problems) - 2} more" if len(problems) > 2 else "")
            raise ConfigError(f"{self._path} is of another model: {listed}. {differing}\n{advice}")
        names = [key for key in self.checkpointables if key in checkpoint]
        for key in names:
            try:
                self.checkpointables[key].load_state_dict(checkpoint.pop(key))
            except (ValueError, KeyError) as error:  # of an optimiser
                raise ConfigError(f"{self._path}, its {key}: {error}. {differing}\n{advice}") from error
        if "ema" in self.checkpointables and "ema" not in names:
            logger.warning(f"{self._path} has no average of the weights (MODEL.FOCAL.EMA): it begins here.")
        if self._changes:
            logger.warning(
                f"The config has changed since {self._path}. From here on, this one holds: {describe(self._changes)}."
            )

    def _log_incompatible_keys(self, incompatible: Any) -> None:
        super()._log_incompatible_keys(incompatible)
        if incompatible.incorrect_shapes and self._changes:
            logger.warning(f"{self._path} is of a run with other values of {describe(self._changes)}.")
        if any(name == "head.cls_score.weight" for name, _, _ in incompatible.incorrect_shapes):
            logger.warning(
                "The checkpoint has another number of classes than the model: head.cls_score keeps its initial values. "
                "`python -m focal_plugin convert classes` makes a checkpoint that keeps classes by their names."
            )

    def _torch_load(self, f: str) -> dict[str, Any]:
        return load_torch(f)


def what_is_broken(path: str) -> str:
    """Return why the checkpoint ``path`` is not whole, by the checksums in it; "" if it is."""
    if not os.path.isfile(path):
        return "there is no such file"
    try:
        with zipfile.ZipFile(path) as archive:
            part = archive.testzip()
            folders = [entry.filename for entry in archive.infolist() if entry.external_attr & _IS_FOLDER]
        if part:
            return f"the checksum of {part} in it is wrong"
        if folders:  # PyTorch reads nothing of it, and gives whatever is in the memory
            return f"{folders[0]} in it is marked as a folder"
        read_whole(path)  # PyTorch reads what zipfile does not
    except Exception as error:  # a bit of the archive's directory that has flipped raises errors of any type
        return f"{type(error).__name__}: {error} ({os.path.getsize(path)} bytes)"
    return ""


def _steps_of(path: str) -> float:
    """Return the steps before a checkpoint's last one; −1 if it is broken."""
    try:
        return int(read_whole(path)["iteration"])
    except Exception:  # as in what_is_broken
        return -1


def read_whole(path: str) -> dict[str, Any]:
    """Return what is in a checkpoint of which ``what_is_broken`` says nothing; its tensors are read when used."""
    return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
