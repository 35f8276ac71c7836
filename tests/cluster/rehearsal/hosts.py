"""Hosts: several machines on one, for rehearsing a cluster. Linux and root only; nothing of it outlives the process.

    with hosts() as machines:                  # in a process that `enter` has put into namespaces of its own
        machines.head.run("hostname -I")       # a shell command there, as its user would run it
        machines.workers[0].kill()             # SIGKILL to everything on it, as when the power goes
        machines.workers[0].boot()
        machines.workers[1].link("down")       # the cable
        machines.workers[1].slow("20mbit")     # a slow link, both ways

The process itself lives in a network namespace that is the switch: a bridge, with an S3 server on it. Every host has a
network, mount, PID, UTS and IPC namespace, a /tmp, /run and /dev/shm in memory, a /root on disk that survives `kill`,
and an sshd that takes one throw-away key. Python, its packages and the project are those of this machine.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

PROJECT = Path(__file__).parents[3]
BRIDGE, SWITCH = "br0", "10.77.0.1"
ADDRESSES = {"head": "10.77.0.11", "worker-1": "10.77.0.12", "worker-2": "10.77.0.13", "laptop": "10.77.0.20"}
TOOLS = ("ip", "tc", "rsync", "ssh", "ssh-keygen", "unshare", "nsenter", "sshd")  # iproute2, rsync, openssh, util-linux
SEARCH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
PACKAGES = Path(sys.prefix)
COMPILED = Path(os.environ.get("TORCH_EXTENSIONS_DIR", "~/.cache/torch_extensions")).expanduser()
MEMORY_DISK = "3g"  # of /tmp and of /dev/shm of each host, as a limit

SSHD = """\
Port 22
ListenAddress 0.0.0.0
HostKey /run/sshd/host_key
PermitRootLogin prohibit-password
PasswordAuthentication no
UsePAM no
UseDNS no
MaxStartups 50
MaxSessions 50
PidFile /run/sshd/pid
Subsystem sftp internal-sftp
"""

# The first process of a host. It waits for its network card, hides the machine's own folders, and then reaps.
BOOT = """\
set -e
mount --make-rprivate /
hostname {name}
until ip link show eth0 >/dev/null 2>&1; do sleep 0.05; done
ip link set lo up
ip link set eth0 address {mac}
ip addr add {address}/24 dev eth0
ip link set eth0 up
ip route add default via {switch}
mount -t tmpfs -o size={disk},mode=1777 tmpfs {folder}/tmp
mount -t tmpfs -o size={disk},mode=1777 tmpfs /dev/shm
mount -t tmpfs -o size=16m,mode=755 tmpfs /run
mkdir -p /run/sshd /run/lock
install -m 600 {folder}/host_key {folder}/sshd_config /run/sshd/
{binds}
mount --bind {folder}/hosts /etc/hosts
mount --bind {folder}/resolv.conf /etc/resolv.conf
mount --rbind {folder}/root /root
mount --rbind {folder}/tmp /tmp
touch /run/ready
cd /root
exec env -i HOME=/root USER=root LOGNAME=root SHELL=/bin/bash LANG=C.UTF-8 PATH={path} bash -c \
  '{sshd} while :; do sleep 3600 & wait $!; done'
"""


def why_not() -> str:
    """Why no hosts can be made here; empty where they can."""
    if not sys.platform.startswith("linux"):
        return "hosts are namespaces of the Linux kernel"
    if os.geteuid():
        return "making namespaces with a network needs root"
    missing = [tool for tool in TOOLS if shutil.which(tool, path=f"{os.environ['PATH']}:{SEARCH}") is None]
    if missing:
        return f"no {', '.join(missing)}: apt-get install openssh-server iproute2 rsync util-linux"
    script = f"mount --make-rprivate / && ip link add {BRIDGE} type bridge && ip link add v0 type veth peer name v1"
    tried = subprocess.run([*NAMESPACES, "sh", "-c", script], text=True, capture_output=True, check=False)
    return f"namespaces are not permitted here: {tried.stderr.strip()}" if tried.returncode else ""


NAMESPACES = ("unshare", "--net", "--mount", "--pid", "--fork", "--kill-child=SIGKILL", "--mount-proc")


def enter(arguments: list[str]) -> NoReturn:
    """Become this Python with `arguments` in namespaces of its own; the kernel ends all that is left there with it."""
    environment = os.environ | {"PATH": f"{os.environ['PATH']}:{SEARCH}"}
    os.execvpe(NAMESPACES[0], [*NAMESPACES, sys.executable, *arguments], environment)


def sh(*command: str, check: bool = True) -> None:
    subprocess.run(command, check=check, capture_output=True, text=True)


@dataclass
class Host:
    """One machine: its name, its address, its files below `folder`."""

    name: str
    address: str
    folder: Path
    process: subprocess.Popen[bytes] | None = None
    pid: int = 0  # of its first process, as this machine counts
    profile: dict[str, str] = field(default_factory=dict)  # what a shell of its user has set

    def boot(self) -> None:
        """Start it; it answers to ssh when this returns."""
        (self.folder / "tmp").mkdir(parents=True, exist_ok=True)
        self._write_files()
        log = (self.folder / "boot.log").open("ab")
        command = ["unshare", "--net", "--mount", "--uts", "--ipc", "--pid", "--fork", "--kill-child=SIGKILL"]
        self.process = subprocess.Popen(
            [*command, "--mount-proc", "bash", "-c", self._script()],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, cwd="/",
        )  # fmt: skip
        self.pid = self._first_process(self.process.pid)
        sh("ip", "link", "add", self.cable, "type", "veth", "peer", "name", "eth0", "netns", str(self.pid))
        sh("ip", "link", "set", self.cable, "master", BRIDGE, "up")
        self._wait()

    @property
    def cable(self) -> str:
        """The network card on the side of the switch."""
        return f"v-{self.name}"

    def run(self, command: str, *, timeout: float = 300, cwd: str = "/root") -> subprocess.CompletedProcess[str]:
        """A shell command there, its output and errors as one text. Raises subprocess.TimeoutExpired."""
        full = self._enter(command, cwd)
        return subprocess.run(
            full, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=timeout, check=False
        )

    def start(self, command: str, log: Path, *, cwd: str = "/root") -> subprocess.Popen[bytes]:
        """A shell command that goes on in the background."""
        with log.open("wb") as output:
            return subprocess.Popen(
                self._enter(command, cwd),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def processes(self, pattern: str) -> list[str]:
        """Command lines there that hold `pattern`."""
        shown = self.run("ps -eo args --no-headers").stdout.splitlines()
        return [line for line in shown if pattern in line]

    def kill(self) -> None:
        """SIGKILL to the first process: the kernel kills all others of the namespace."""
        if self.process is not None:
            os.kill(self.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None
            sh("ip", "link", "del", self.cable, check=False)

    def link(self, state: str) -> None:
        """The cable: `up` or `down`."""
        sh("ip", "link", "set", self.cable, state)

    def slow(self, rate: str | None) -> None:
        """Both directions of its link at `rate`, as tc writes it; None: as fast as it goes."""
        inside = ("nsenter", "-t", str(self.pid), "--net", "tc")
        for tc, device in ((inside, "eth0"), (("tc",), self.cable)):
            sh(*tc, "qdisc", "del", "dev", device, "root", check=False)
            if rate:
                sh(*tc, *f"qdisc add dev {device} root tbf rate {rate} burst 256kbit latency 400ms".split())

    def _enter(self, command: str, cwd: str) -> list[str]:
        return [
            *("nsenter", "-t", str(self.pid), "--mount", "--uts", "--ipc", "--net", "--pid"),
            *("env", "-i", "HOME=/root", "USER=root", "LOGNAME=root", "LANG=C.UTF-8", "SHELL=/bin/bash", "TERM=dumb"),
            *("bash", "-c", f"source ~/.bashrc; cd {shlex.quote(cwd)} && {command}"),
        ]

    def _script(self) -> str:
        binds = []
        # A link, such as a .venv that several checkouts share, is bound with what it points to.
        named = {Path(sys.base_prefix), PACKAGES, PROJECT}
        for path in sorted(named | {path.resolve() for path in named}):
            for hidden in ("root", "tmp"):
                if path.is_relative_to(f"/{hidden}"):
                    there = f"{self.folder}{path}"
                    binds.append(f"mkdir -p {there}\nmount --rbind {path} {there}")
        return BOOT.format(
            name=self.name, address=self.address, mac=self._mac(), switch=SWITCH, folder=self.folder,
            disk=MEMORY_DISK, path=SEARCH,
            binds="\n".join(binds),
            sshd="" if self.name == "laptop" else "/usr/sbin/sshd -f /run/sshd/sshd_config -E /run/sshd/log;",
        )  # fmt: skip

    def _mac(self) -> str:
        """The same after every boot: others remember it."""
        return "02:00:" + ":".join(f"{int(part):02x}" for part in self.address.split("."))

    def _write_files(self) -> None:
        ssh = self.folder / "root/.ssh"
        ssh.mkdir(parents=True, exist_ok=True)
        for folder in (ssh, self.folder / "root"):
            folder.chmod(0o700)
        key = self.folder.parent / "key"
        shutil.copy(key.with_suffix(".pub"), ssh / "authorized_keys")
        if self.name == "laptop":
            shutil.copy(key, ssh / "id_ed25519")
        if not (self.folder / "host_key").exists():
            sh("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.folder / "host_key"))
        # A host's own name is 127.0.1.1, as Debian's installer writes it.
        lines = ["127.0.0.1 localhost", f"127.0.1.1 {self.name}"]
        lines += [f"{address} {name}" for name, address in ADDRESSES.items() if name != self.name]
        (self.folder / "hosts").write_text("\n".join(lines) + "\n")
        (self.folder / "resolv.conf").write_text("options timeout:1 attempts:1\n")
        (self.folder / "sshd_config").write_text(SSHD)
        # DeepSpeed's op compiled beforehand, as in the image: three hosts at once would take minutes for it.
        if not (self.folder / "root/.cache").exists() and COMPILED.is_dir():
            shutil.copytree(COMPILED, self.folder / "root/.cache/torch_extensions")
        exports = {"PATH": f"{PACKAGES / 'bin'}:{SEARCH}", "RAY_USAGE_STATS_ENABLED": "0"} | self.profile
        text = "".join(f"export {name}={shlex.quote(value)}\n" for name, value in exports.items())
        for name in (".bashrc", ".profile"):
            (self.folder / "root" / name).write_text(text)

    def _first_process(self, parent: int) -> int:
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            if children := Path(f"/proc/{parent}/task/{parent}/children").read_text().split():
                return int(children[0])
            time.sleep(0.02)
        raise RuntimeError(f"{self.name} did not boot: {(self.folder / 'boot.log').read_text()}")

    def _wait(self) -> None:
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            if Path(f"/proc/{self.pid}/root/run/ready").exists() and (self.name == "laptop" or self._answers()):
                return
            time.sleep(0.05)
        raise RuntimeError(f"{self.name} did not boot: {(self.folder / 'boot.log').read_text()}")

    def _answers(self) -> bool:
        try:
            with socket.create_connection((self.address, 22), timeout=1) as ssh:
                return bool(ssh.recv(4))
        except OSError:
            return False


@dataclass(frozen=True)
class Hosts:
    """The machines of a rehearsal: a head, two workers, and the laptop that commands are typed on."""

    folder: Path
    head: Host
    workers: tuple[Host, Host]
    laptop: Host

    @property
    def all(self) -> tuple[Host, ...]:
        return (self.head, *self.workers, self.laptop)


@contextmanager
def hosts() -> Iterator[Hosts]:
    """The switch and the machines on it, for a process that `enter` has started."""
    sh("mount", "--make-rprivate", "/")
    sh("ip", "link", "set", "lo", "up")
    sh("ip", "link", "add", BRIDGE, "type", "bridge")
    sh("ip", "addr", "add", f"{SWITCH}/24", "dev", BRIDGE)
    sh("ip", "link", "set", BRIDGE, "up")
    with tempfile.TemporaryDirectory(prefix="hosts-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        sh("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / "key"))
        head, first, second, laptop = (Host(name, address, folder / name) for name, address in ADDRESSES.items())
        machines = Hosts(folder, head, (first, second), laptop)
        try:
            for host in machines.all:
                host.boot()
            yield machines
        finally:
            for host in machines.all:
                host.kill()
