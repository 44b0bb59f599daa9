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

# .unfinished is there from the first step to the last. Where one is left behind, nothing is trusted and all is done
# again; but if only the last steps fail, by Detectron2's source say, the large part is kept.
trap 'exit 130' HUP INT TERM
large_part=
leave() {
    status=$?
    [ $status -ne 0 ] || return 0
    printf 'focal_plugin: the set-up did not finish; the next make goes on with it.\n' >&2
    [ -z "$large_part" ] || [ $status -gt 128 ] || mv "$VENV/.unfinished" "$VENV/.setup-incomplete"
}
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
    trap leave EXIT
    "$PYTHON" -m venv "$VENV"
    say "Installing PyTorch and the other requirements: about 3.2 GB to download, 6 GB on disk, some minutes"
else
    say "Bringing $VENV up to date"
    touch "$VENV/.unfinished"
    trap leave EXIT
    rm -f "$VENV"/.setup-*
fi
pip install $quiet -r requirements/build.txt
pip install $quiet --no-build-isolation -r requirements/base.txt -r requirements/dev.txt -r requirements/docs.txt
large_part=whole

say "Installing Detectron2: $DETECTRON2"
former=$("$VENV/bin/python" -c 'from importlib.metadata import packages_distributions as packages
print(*set(packages().get("detectron2", [])))')
[ -z "$former" ] || pip uninstall --quiet --yes $former
if [ "$DETECTRON2" = default ]; then
    # The wheel is tagged for another Python, which is why pip has to be told where to put it.
    site=$("$VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    pip install $quiet --no-deps --require-hashes --only-binary=:all: --python-version 3.10 --upgrade --target "$site" \
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
rm -f "$VENV/.setup-incomplete"
touch "$STAMP"
rm "$VENV/.unfinished"
say "Done: everything runs in $VENV"
