"""Looking at a config, its data and its checkpoints: ``python -m focal_plugin analysis --help``."""
