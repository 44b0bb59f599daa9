"""Whether Triton's interpreter is on, as the variable says that Triton reads when it is imported."""

import os

import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# Of cases that the interpreter takes seconds for, on values that others have too.
SLOW_IN_INTERPRETER = [pytest.mark.slow] if INTERPRETED else []
