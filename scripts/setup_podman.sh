#!/usr/bin/env bash
# Podman, and debootstrap for a base image where there is no registry, on Debian 12.
set -euo pipefail
packages=(podman buildah runc netavark aardvark-dns conmon uidmap iptables debootstrap)

if command -v podman >/dev/null && command -v debootstrap >/dev/null; then exit 0; fi
if [ "$(id -u)" != 0 ]; then
  echo "Not root, so nothing can be installed: run 'sudo apt-get install ${packages[*]}', or use Docker by 'make images ENGINE=docker'." >&2
  exit 1
fi
apt-get update -qq
apt-get install -y -qq --no-install-recommends "${packages[@]}"
