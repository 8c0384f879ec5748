#!/bin/sh
# ManiSkill3 needs a Vulkan driver. For CPUs that is Mesa's, version 25 or later. It is unpacked into a folder of its own,
# without root: installed, it would replace the GL libraries that LIBERO's pictures are made with.
set -eu
prefix=${1:-.vulkan}
packages="mesa-vulkan-drivers libvulkan1"
if ls /dev/nvidia[0-9]* >/dev/null 2>&1 && ls /usr/share/vulkan/icd.d/nvidia*.json /etc/vulkan/icd.d/nvidia*.json \
    >/dev/null 2>&1; then
    exit 0
fi
if [ -f "$prefix/env.sh" ]; then
    exit 0
fi
if ! command -v apt-get >/dev/null || ! command -v dpkg-deb >/dev/null; then
    echo "ManiSkill3 needs a Vulkan driver: install Mesa's (25 or later), and set VK_DRIVER_FILES to its lvp_icd*.json" >&2
    exit 1
fi
rm -rf "$prefix/apt" "$prefix/usr"
mkdir -p "$prefix/apt/lists/partial" "$prefix/apt/cache/archives/partial"
prefix=$(cd "$prefix" && pwd)
. /etc/os-release
options="-o Dir::State::lists=$prefix/apt/lists -o Dir::Cache=$prefix/apt/cache -o Debug::NoLocking=1"
if [ "${VERSION_CODENAME:-}" = bookworm ]; then  # its own Mesa is too old
    key="signed-by=/usr/share/keyrings/debian-archive-keyring.gpg"
    for suite in bookworm bookworm-backports; do
        echo "deb [$key] http://deb.debian.org/debian $suite main"
    done >"$prefix/apt/sources.list"
    options="$options -o Dir::Etc::sourcelist=$prefix/apt/sources.list -o Dir::Etc::sourceparts=- -t bookworm-backports"
fi
echo "unpacking Mesa's Vulkan driver for CPUs into $prefix"
# shellcheck disable=SC2086 # the options are words
{
    apt-get $options -qq update
    apt-get $options -qq install -y --no-install-recommends --download-only $packages >/dev/null
}
for package in "$prefix"/apt/cache/archives/*.deb; do
    case $(basename "$package") in
        libgl1* | libegl* | libosmesa* | libgbm* | libglx* | mesa-libgallium* | *-dev_*) ;;  # what LIBERO has already
        *) dpkg-deb -x "$package" "$prefix" ;;
    esac
done
rm -rf "$prefix/apt"
driver=$(find "$prefix" /usr/share/vulkan/icd.d -name 'lvp_icd*.json' 2>/dev/null | head -n 1)
if [ -z "$driver" ]; then
    echo "apt-get gave no Vulkan driver for CPUs; see above" >&2
    exit 1
fi
libraries=$(dirname "$(find "$prefix/usr/lib" -name 'libdrm.so.2' -o -name 'libvulkan.so.1' | head -n 1)")
cat >"$prefix/env.sh" <<END
export VK_DRIVER_FILES="$driver" VK_ICD_FILENAMES="$driver"
export LD_LIBRARY_PATH="$libraries\${LD_LIBRARY_PATH:+:\$LD_LIBRARY_PATH}"
END
