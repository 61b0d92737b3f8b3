#!/bin/sh
# Of the system: Python, and the compiler that Triton and DeepSpeed call at run time. Debian and Ubuntu.
set -eu
export DEBIAN_FRONTEND=noninteractive
apt-get -qq update
apt-get -qq install -y --no-install-recommends ca-certificates g++ libc6-dev python3 python3-dev python3-venv >/dev/null
apt-get clean
rm -rf /var/lib/apt/lists/* /var/log/*.log /var/log/apt /usr/share/doc /usr/share/man
