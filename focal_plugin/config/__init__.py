"""From a command line to a config that is ready to run. ``keys`` is the plugin's keys; the rest reads files."""

from .keys import ConfigError, add_focal_config

__all__ = ["ConfigError", "add_focal_config"]
