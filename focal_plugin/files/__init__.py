"""Files: read without running what is in them, written whole or not at all."""

from . import downloads
