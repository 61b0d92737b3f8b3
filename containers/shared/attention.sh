#!/bin/sh
# flash-attn 2 and 3, compiled from the source in /mnt/flash-attention, then 4, which must come last: the package of 2
# holds an old flash_attn/cute, and the later install wins. Hours on few cores: MAX_JOBS takes about 5 GiB each.
set -eu
export PATH="/opt/venv/bin:/usr/local/cuda/bin:$PATH" CUDA_HOME=/usr/local/cuda
export FLASH_ATTENTION_FORCE_BUILD=TRUE FLASH_ATTENTION_OFFLINE_BUILD=1 FLASH_ATTN_CUDA_ARCHS="80;90;100"
export MAX_JOBS="${MAX_JOBS:-$(($(nproc) / 4 + 1))}"
cp -r /mnt/flash-attention /tmp/flash-attention
for source in /tmp/flash-attention /tmp/flash-attention/hopper; do
    python -m pip install --quiet --no-index --no-deps --no-build-isolation --no-cache-dir "$source"
done
rm -rf /tmp/flash-attention
python -m pip install --quiet --no-index --find-links=/mnt/wheels --no-deps --no-cache-dir --force-reinstall \
    --constraint=/opt/alst/versions.lock --pre flash-attn-4
