"""Which folder a training writes to: never one that another has written to, unless it resumes that one."""

import itertools
import os

from detectron2.utils import comm

from ..config import ConfigError
from .checkpoint import AtomicCheckpointer
from .lock import check_local, holder

_DEFAULT = "./output"  # Detectron2's OUTPUT_DIR, and train.output_dir of its LazyConfigs


def training_folder(output_dir: str, resume: bool) -> str:
    """Return the folder of a training. For all processes of a run.

    It is ``output_dir``, if the user has named it. Detectron2's default gets a number if it is used: output-2 and so
    on; a resumed run goes on in the last of these.

    Raises:
        ConfigError: as ``refuse_used``, for a folder that the user has named; or it is a URL.
    """
    check_local(output_dir)
    folder, is_default = output_dir, os.path.normpath(output_dir) == os.path.normpath(_DEFAULT)
    if comm.is_main_process() and is_default:
        taken = itertools.takewhile(lambda path: _traces(path) or holder(path), _numbered(output_dir))
        used = len(list(taken))
        folder = next(itertools.islice(_numbered(output_dir), max(used - 1, 0) if resume else used, None))
    numbered = comm.all_gather(folder)[0]
    folder = numbered if is_default else output_dir  # a machine may have a folder of its own for its logs
    if not resume and not comm.all_gather(holder(folder))[0]:  # who is there is told by the lock
        refuse_used(folder)
    return folder


def refuse_used(folder: str) -> None:
    """Check that no training has left checkpoints or metrics in ``folder``, which a new one would mix with its own.

    Raises:
        ConfigError: one has.
    """
    if found := comm.all_gather(_traces(folder))[0]:
        raise ConfigError(
            f"OUTPUT_DIR {folder} holds an earlier run ({found}), which stays as it is. Go on with it by --resume, set "
            "another OUTPUT_DIR (in a LazyConfig train.output_dir), or remove the folder."
        )


def _numbered(folder: str):
    return (f"{folder}-{number}" if number > 1 else folder for number in itertools.count(1))


def _traces(folder: str) -> str:
    """Return the name of a file that a training has left in ``folder``; "" if there is none."""
    checkpointer = AtomicCheckpointer(None, folder)
    if checkpointer.has_checkpoint():
        return os.path.basename(checkpointer.get_checkpoint_file()) or "model_*.pth"
    metrics = os.path.join(folder, "metrics.json")
    return "metrics.json" if os.path.exists(metrics) and os.path.getsize(metrics) else ""
