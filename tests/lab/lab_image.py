"""Disk images for the lab: Debian with real OpenZFS, built once per release and kept in the cache.

Two layers, because the first takes minutes and the second is what one edits:

- the *package layer*, a tarball: mmdebstrap installs everything and DKMS builds the ZFS modules;
- the *image*: that tarball plus FILES and CUSTOMISE, as an ext4 disk with its kernel and initrd outside it.

Both are named after the hash of their recipe, so a changed recipe builds anew and an unchanged one never does.
They appear by rename, under a lock: a killed build leaves nothing that looks finished, two at once build once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import io
import os
import shutil
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Callable

RELEASES = ("bookworm", "trixie", "backports")
"""From the oldest OpenZFS to the newest: 2.1, 2.3, 2.4. `backports` is trixie with OpenZFS from trixie-backports."""
OLDEST, NEWEST = RELEASES[0], RELEASES[-1]
CACHE = Path.home() / ".cache" / "zfs_replicate"
HOSTS = {"source": "10.77.0.11", "backup": "10.77.0.12", "third": "10.77.0.13", "fourth": "10.77.0.14"}

Progress = Callable[[str], None]


class LabError(Exception):
    """The lab could not do what was asked; the message says what and, where known, the way out."""


# --- The recipe -------------------------------------------------------------------------------------------------------

PACKAGES = (
    "linux-image-cloud-amd64,linux-headers-cloud-amd64,systemd-sysv,udev,dbus,openssh-server,mbuffer,"
    "python3,python3-paramiko,python3-pytest,sudo,cron,zstd,lz4,pigz,pv,iproute2,nftables,procps,psmisc,"
    "strace,tcsh,dma,acl,attr,zfs-dkms,zfsutils-linux,zfs-zed,zfs-auto-snapshot,sanoid"
)

# Unanswered, these two questions abort the build of the modules.
PRESEED = r"""printf 'zfs-dkms zfs-dkms/stop-build-for-%s-kernel boolean false\n' unknown 32bit \
| chroot "$1" debconf-set-selections"""

LAYER_OPTIONS = [
    "--variant=minbase",
    "--mode=root",
    "--components=main,contrib",
    "--dpkgopt=path-exclude=/usr/share/doc/*",
    "--dpkgopt=path-exclude=/usr/share/info/*",
    "--dpkgopt=path-exclude=/usr/share/locale/*",
    f"--essential-hook={PRESEED}",
    f"--include={PACKAGES}",
]

# Only OpenZFS: the kernel stays trixie's. The mirror is not part of the recipe.
FROM_BACKPORTS = r"""
echo "deb $LAB_MIRROR trixie-backports main contrib" >"$1/etc/apt/sources.list.d/backports.list"
printf '%s\n' 'Package: src:zfs-linux' 'Pin: release n=trixie-backports' 'Pin-Priority: 900' \
    >"$1/etc/apt/preferences.d/backports"
"""
MIRROR = "http://deb.debian.org/debian"

SSHD = """\
# VERBOSE writes "Starting session: command for ..." for each command, so that tests can count them.
LogLevel VERBOSE
MaxSessions 100
MaxStartups 100
UseDNS no
# The post-quantum exchange costs two seconds of emulated processor per login, and shows nothing here.
KexAlgorithms curve25519-sha256,curve25519-sha256@libssh.org
PermitRootLogin prohibit-password
HostKey /etc/ssh/ssh_host_ed25519_key
AuthorizedKeysFile .ssh/authorized_keys /etc/ssh/lab_control.pub
"""

# A copy of a running machine must become another machine before ZFS draws its first guid. Entropy comes on stdin.
PERSONALISE = """\
#!/bin/sh
# lab-personalise NAME HOSTID EPOCH
set -eu
date -u -s "@$3" >/dev/null
python3 - 3<&0 <<'END'
import fcntl, os, struct
RNDRESEEDCRNG, GETFLAGS, SETFLAGS, SYNC, DIRSYNC = 0x5207, 0x80086601, 0x40086602, 0x8, 0x10000
with open("/dev/urandom", "wb", buffering=0) as pool:
    pool.write(os.read(3, 4096))
    fcntl.ioctl(pool, RNDRESEEDCRNG)
# As chattr +DS: zpool.cache must survive a power loss as soon as it is written, or the next boot imports no pool.
directory = os.open("/etc/zfs", os.O_RDONLY)
flags = struct.unpack("l", fcntl.ioctl(directory, GETFLAGS, bytes(8)))[0]
fcntl.ioctl(directory, SETFLAGS, struct.pack("l", flags | SYNC | DIRSYNC))
END
echo "$1" | tee /etc/hostname >/etc/mailname
hostname "$1"
zgenhostid -f "$2"
sync
modprobe zfs
"""

# MODULES=list: a small initrd loads in a third of the time. Compressed modules cost 12 s of an emulated boot.
CUSTOMISE = """\
kernel=$(basename /lib/modules/*)
find /lib/modules -name '*.ko.xz' -exec unxz {} +
depmod "$kernel"
sed -i 's/^MODULES=.*/MODULES=list/; s/^COMPRESS=.*/COMPRESS=lz4/' /etc/initramfs-tools/initramfs.conf
printf '%s\\n' virtio_pci virtio_blk ext4 crc32c_generic >> /etc/initramfs-tools/modules
update-initramfs -u -k "$kernel"

# No surprise snapshots, scrubs or pruning, and nothing that eats emulated time behind a test's back.
rm -f /etc/cron.*/zfs-auto-snapshot /etc/cron.d/zfsutils-linux /etc/cron.d/sanoid
rm -f /etc/ssh/ssh_host_rsa_key* /etc/ssh/ssh_host_ecdsa_key*
systemctl set-default multi-user.target
systemctl mask getty@tty1.service serial-getty@ttyS0.service systemd-networkd-wait-online.service \\
    systemd-logind.service apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer e2scrub_all.timer e2scrub_reap.service fstrim.timer \\
    systemd-tmpfiles-clean.timer sanoid.timer sanoid.service sanoid-prune.service zfs-zed.service
systemctl enable systemd-networkd.service ssh.service cron.service zfs.target \\
    zfs-import-cache.service zfs-import.target zfs-mount.service zfs-volume-wait.service zfs-volumes.target

# OpenSSH from 9.8 shuts out addresses that fail to log in, which would make one test's failure the next one's.
mkdir -p /run/sshd
if sshd -t -o PerSourcePenalties=no 2>/dev/null; then
    echo 'PerSourcePenalties no' >> /etc/ssh/sshd_config.d/lab.conf
fi
"""

# Run by root in a mount namespace of its own. /proc is gone before anything is deleted.
ASSEMBLE = """\
set -eu
layer=$1 files=$2 out=$3
root=$(mktemp -d -p "$out")
tar --zstd --numeric-owner -xpf "$layer" -C "$root"
tar --no-overwrite-dir -xpf "$files" -C "$root"
mount -t proc proc "$root/proc"
chroot "$root" sh -eu /root/customise
umount "$root/proc"
rm "$root/root/customise"
cp "$root"/boot/vmlinuz-* "$out/vmlinuz"
cp "$root"/boot/initrd.img-* "$out/initrd"
mke2fs -q -t ext4 -F -d "$root" "$out/root.img" 4G
rm -rf --one-file-system "$root"
chown --reference="$layer" "$out"/*
chmod 644 "$out"/*
"""


def layer_recipe(release: str) -> tuple[str, list[str]]:
    """The suite of Debian that mmdebstrap installs for a release, and its options."""
    if release == "backports":
        return "trixie", [*LAYER_OPTIONS, f"--setup-hook={FROM_BACKPORTS}"]
    return release, LAYER_OPTIONS


def mac_address(name: str) -> str:
    """The hardware address of that machine's card on the lab network."""
    return f"52:54:00:77:00:{int(HOSTS[name].rpartition('.')[2]):02x}"


def known_hosts(host_key: str) -> str:
    """One known_hosts line naming every machine by name and address (all share the host key)."""
    return f"{','.join([*HOSTS, *HOSTS.values(), 'localhost'])} {host_key}"


def network_files() -> dict[str, str]:
    """systemd-networkd's files: the card decides the address, so every image can be every machine."""
    directory = "etc/systemd/network"
    cards = " ".join(mac_address(name) for name in HOSTS)
    files = {
        f"{directory}/10-lab.link": f"[Match]\nMACAddress={cards}\n[Link]\nName=lab0\n",
        f"{directory}/10-control.network": "[Match]\nName=eth0\n[Network]\nAddress=10.0.2.15/24\nGateway=10.0.2.2\n",
    }
    for name, address in HOSTS.items():
        # As with ifupdown, a pulled cable does not take the address away.
        files[f"{directory}/20-{name}.network"] = (
            f"[Match]\nMACAddress={mac_address(name)}\n[Link]\nRequiredForOnline=no\n[Network]\nAddress={address}/24\n"
            "LinkLocalAddressing=no\nConfigureWithoutCarrier=yes\nIgnoreCarrierLoss=yes\n"
        )
    return files


def image_files(keys: Keys) -> dict[str, str]:
    """Every file the image gets on top of the packages, by path; `file_mode` decides its mode."""
    hosts = "".join(f"{address} {name}\n" for name, address in HOSTS.items())
    return {
        **network_files(),
        "etc/fstab": "/dev/vda / ext4 defaults 0 0\n",
        "etc/hostname": "template\n",
        "etc/mailname": "template\n",
        "etc/hosts": f"127.0.0.1 localhost\n{hosts}",
        "etc/systemd/journald.conf.d/lab.conf": "[Journal]\nRateLimitIntervalSec=0\n",
        "etc/ssh/sshd_config.d/lab.conf": SSHD,
        "etc/ssh/lab_control.pub": keys.text("control.pub"),
        "etc/ssh/ssh_host_ed25519_key": keys.text("host"),
        "etc/ssh/ssh_host_ed25519_key.pub": keys.text("host.pub"),
        "etc/ssh/ssh_known_hosts": known_hosts(keys.text("host.pub")),
        "root/.ssh/id_ed25519": keys.text("root"),
        "root/.ssh/id_ed25519.pub": keys.text("root.pub"),
        "root/.ssh/authorized_keys": keys.text("root.pub"),
        "usr/local/sbin/lab-personalise": PERSONALISE,
        "root/customise": CUSTOMISE,
    }


def file_mode(path: str) -> int:
    """Mode of a file of the image: private keys are secret, our programs executable."""
    if path in ("etc/ssh/ssh_host_ed25519_key", "root/.ssh/id_ed25519"):
        return 0o600
    return 0o755 if "/sbin/" in path else 0o644


# --- Small tools ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def locked(path: Path, timeout: float = 6000.0) -> Iterator[None]:
    """Hold an exclusive lock on a file, so that a thing is built once; other threads and processes wait."""
    path.parent.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + timeout
    with path.open("w") as handle:
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise LabError(f"{path} stayed locked for {timeout:.0f} s by another build") from None
                time.sleep(0.2)
        yield


@contextlib.contextmanager
def built(path: Path) -> Iterator[Path]:
    """A scratch directory that becomes `path` when the block succeeds, and vanishes when it fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        yield scratch
        scratch.rename(path)
    finally:
        if scratch.exists():
            call([*as_root(), "rm", "-rf", "--one-file-system", str(scratch)], timeout=120)


def as_root() -> list[str]:
    """What to put before a command that needs root."""
    return [] if os.geteuid() == 0 else ["sudo", "-n"]


def call(command: list[str], timeout: float, **extra_environment: str) -> None:
    """Run a command on the host; failure is a LabError with the end of what it said."""
    path = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"
    environment = {**os.environ, "PATH": path, "LC_ALL": "C", **extra_environment}
    try:
        result = subprocess.run(
            command,
            env=environment,
            timeout=timeout,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise LabError(f"took longer than {timeout:.0f} s: {' '.join(command)[:300]}") from error
    if result.returncode:
        raise LabError(f"exit {result.returncode}: {' '.join(command)[:300]}\n{result.stdout[-3000:]}")


def fingerprint(*parts: str) -> str:
    """A short name for a recipe."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]


def require_room(gigabytes: int) -> None:
    """Fail early, and with the reason, where a build would run out of disk."""
    CACHE.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(CACHE).free / 2**30
    if free < gigabytes:
        raise LabError(f"{CACHE} has {free:.1f} GiB free, the lab needs {gigabytes} GiB there")


# --- What the host needs ----------------------------------------------------------------------------------------------

PROGRAMS = {
    "qemu-system-x86_64": "qemu-system-x86",
    "qemu-img": "qemu-utils",
    "mmdebstrap": "mmdebstrap",
    "mke2fs": "e2fsprogs",
    "zstd": "zstd",
    "ssh": "openssh-client",
    "unshare": "util-linux",
}


def prepare_host(progress: Progress) -> None:
    """Install, through apt, the programs the lab calls and this host lacks."""
    path = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"
    missing = sorted({package for program, package in PROGRAMS.items() if not shutil.which(program, path=path)})
    if not missing:
        return
    progress(f"installing on this host: {' '.join(missing)}")
    apt = [*as_root(), "env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "-q", "-o", "DPkg::Lock::Timeout=300"]
    call([*apt, "update"], timeout=300)
    call([*apt, "install", "-y", "--no-install-recommends", "debian-archive-keyring", *missing], timeout=900)


# --- Keys -------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Keys:
    """The lab's ssh keys: `control` (host to machine), `root` (machine to machine) and the shared `host` key."""

    directory: Path

    def text(self, name: str) -> str:
        """The key file of that name."""
        return (self.directory / name).read_text(encoding="ascii")


def ready_keys() -> Keys:
    """The keys, made on first use. They outlive images, so that machines of all releases trust each other."""
    directory = CACHE / "keys"
    with locked(CACHE / "keys.lock"):
        if not directory.exists():
            with built(directory) as scratch:
                for name in ("control", "root", "host"):
                    options = ["-q", "-t", "ed25519", "-N", "", "-C", f"lab-{name}"]
                    call(["ssh-keygen", *options, "-f", str(scratch / name)], timeout=30)
    return Keys(directory)


# --- Layers and images ------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Image:
    """A bootable Debian of one release. Its files are never written to: machines run on overlays."""

    release: str
    directory: Path

    @property
    def disk(self) -> Path:
        """The root file system, raw."""
        return self.directory / "root.img"

    @property
    def kernel(self) -> Path:
        """The kernel, booted from outside the disk."""
        return self.directory / "vmlinuz"

    @property
    def initrd(self) -> Path:
        """The initial RAM disk that belongs to the kernel."""
        return self.directory / "initrd"


def ready_image(release: str, progress: Progress) -> Image:
    """The image of a release; built first (about seven minutes) where the cache has none."""
    if release not in RELEASES:
        raise LabError(f"no release {release!r}; the lab knows {', '.join(RELEASES)}")
    prepare_host(progress)
    files = image_files(ready_keys())
    layer_name = fingerprint(release, *layer_recipe(release)[1])
    # The keys are random and never change: their public halves in the hash tie an image to the keys it trusts.
    image_name = fingerprint(layer_name, ASSEMBLE, *(f"{path}={text}" for path, text in sorted(files.items())))
    image = Image(release, CACHE / "images" / f"{release}-{image_name}")
    with locked(CACHE / "images" / f"{release}.lock"):
        if not image.directory.exists():
            require_room(8)
            layer = ready_layer(release, layer_name, progress)
            build_image(image, layer, files, progress)
    return image


def ready_layer(release: str, name: str, progress: Progress) -> Path:
    """The tarball of installed packages and compiled modules. The caller holds the release's lock."""
    layer = CACHE / "layers" / f"{release}-{name}" / "root.tar.zst"
    if not layer.exists():
        progress(f"{release}: installing packages and compiling ZFS (about 5 minutes)")
        # An unusual mirror is the host's business: the default serves everywhere else.
        mirror = [os.environ["LAB_MIRROR"]] if "LAB_MIRROR" in os.environ else []
        with built(layer.parent) as scratch:
            scratch.chmod(0o755)
            target = str(scratch / layer.name)
            # In a mount namespace of its own: a killed build leaves no mounts behind.
            environment = ["env", f"TMPDIR={scratch}", f"LAB_MIRROR={(mirror or [MIRROR])[0]}"]
            suite, options = layer_recipe(release)
            shell = [*as_root(), "unshare", "--mount", *environment]
            call([*shell, "mmdebstrap", *options, suite, target, *mirror], timeout=5400)
    return layer


def build_image(image: Image, layer: Path, files: dict[str, str], progress: Progress) -> None:
    """Make disk, kernel and initrd from the package layer and our files."""
    progress(f"{image.release}: making the disk image (about 40 seconds)")
    with built(image.directory) as scratch:
        archive = scratch / "files.tar"
        write_archive(archive, files)
        shell = [*as_root(), "unshare", "--mount", "sh", "-c", ASSEMBLE, "assemble"]
        call([*shell, str(layer), str(archive), str(scratch)], timeout=600)
        archive.unlink()


def write_archive(archive: Path, files: dict[str, str]) -> None:
    """A tar of the image's own files, all root's."""
    with tarfile.open(archive, "w") as tar:
        for path, text in files.items():
            entry = tarfile.TarInfo(path)
            entry.mode, entry.size, entry.mtime = file_mode(path), len(text.encode()), int(time.time())
            tar.addfile(entry, io.BytesIO(text.encode()))
