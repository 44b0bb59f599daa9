"""Imported before all else: says what to do where Detectron2 is missing, and imports it without its deprecations."""

import warnings
from importlib.util import find_spec

spec = find_spec("detectron2")
if spec is None or spec.origin is None:  # None: a bare folder of that name, such as that of a clone
    raise ImportError(
        "focal_plugin needs Detectron2, which is not installed: run `make setup` in focal_plugin's folder, or follow "
        "https://detectron2.readthedocs.io/tutorials/install.html.",
        name="detectron2",
    )

# Old calls in Detectron2, for its maintainers to change and not for its users to read about. Each filter names the
# message and the module that warns, and nothing else is silenced.
warnings.filterwarnings("ignore", "pkg_resources is deprecated as an API", UserWarning, r"detectron2\.")
warnings.filterwarnings("ignore", r"torch\.meshgrid: in an upcoming release", UserWarning, r"torch\.functional$")

# These are imported here because they call torch.jit.script when they are imported; the filter ends with the block,
# so that a later call of the user's own still warns.
with warnings.catch_warnings():
    warnings.filterwarnings("ignore", r"`torch\.jit\.script` is", FutureWarning, r"torch\.jit\.")
    import detectron2.modeling  # noqa: F401
    import fvcore.nn  # noqa: F401
