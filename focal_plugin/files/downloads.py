"""Downloads stay in their folder, and one that fails says so.

Detectron2 opens URLs through iopath, which saves a file under the path in its URL, inside a cache. A URL with ``..``
would write anywhere, such as to a module that Python imports when it starts.
"""

from typing import Any
from urllib.error import URLError
from urllib.parse import urlparse

from detectron2.utils.file_io import HTTPURLHandler, PathManager

from ..config import ConfigError


class _InsideCache(HTTPURLHandler):
    """iopath's downloads, for URLs whose file lies in the cache."""

    def _get_local_path(self, path: str, *args: Any, **kwargs: Any) -> str:
        # As iopath splits it: urlparse drops tabs and line ends, and the file's name is what follows the last slash.
        if ".." in [*urlparse(path).path.split("/"), path.rpartition("/")[2]]:
            raise ConfigError(f"{path} leads out of the folder of downloads; expected a URL without .. in it.")
        try:
            return super()._get_local_path(path, *args, **kwargs)
        except (URLError, ConnectionError, TimeoutError) as error:
            raise FileNotFoundError(
                f"{path} could not be downloaded ({getattr(error, 'reason', error)}). Without a network, get the file "
                "on another machine, and give the path of its copy here."
            ) from error


PathManager.register_handler(_InsideCache(), allow_override=True)
