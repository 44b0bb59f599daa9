"""The packages of setup.cfg, and the configs as one more: they are beside the package here and in it when installed."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["focal_plugin*"]), "focal_plugin.configs"],
    package_dir={"focal_plugin.configs": "configs"},
    package_data={
        "focal_plugin.ablation": ["template.html"],
        "focal_plugin.analysis.labels": ["*.html"],
        "focal_plugin.evaluation": ["*.html"],
        "focal_plugin.configs": ["**/*.yaml", "**/*.py", "**/*.csv"],
    },
)
