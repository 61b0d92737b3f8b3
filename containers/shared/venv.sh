#!/bin/sh
# The Python environment in /opt/venv, from what lies in /mnt: wheels and requirements.txt. No index is asked, so the
# image knows the name of none. DS_BUILD_* say which of DeepSpeed's operators are built now and not in every job.
set -eu
python3 -m venv /opt/venv
export PATH="/opt/venv/bin:$PATH" # ninja, which compiles on all cores
pip() {
    python -m pip --disable-pip-version-check "$@" --quiet --no-index --find-links=/mnt/wheels \
        --no-cache-dir --root-user-action=ignore --constraint=/opt/alst/versions.lock
}
# DeepSpeed builds against torch; what it builds with is not isolated from that.
pip install torch setuptools wheel ninja packaging py-cpuinfo psutil
DS_BUILD_OPS=0 pip install --no-build-isolation --requirement=/mnt/requirements.txt
