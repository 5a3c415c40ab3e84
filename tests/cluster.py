"""Two to four nodes on one machine: network, process, mount and host name of their own, a switch between them, and ssh.

    with Cluster(tmp_path, nodes=2) as cluster:
        done = cluster.run("n1", "deepspeed", "--hostfile", cluster.hostfile(slots=2), ...)

A node is a set of Linux namespaces with a real sshd, so that the real launchers run in it as they do on real machines;
files are shared, as on a cluster with one file system. Everything lives inside one outer process: when it ends, and it
ends with the process that made it, nothing is left. The machine's own network, /etc and ~/.ssh are not touched.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any

_PROGRAMS = {
    "unshare": "util-linux",
    "nsenter": "util-linux",
    "setpriv": "util-linux",
    "ip": "iproute2",
    "tc": "iproute2",
    "ssh": "openssh-client",
    "ssh-keygen": "openssh-client",
    "sshd": "openssh-server",
    "pdsh": "pdsh",
}
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_UNSHARE = ("unshare", "--net", "--mount", "--pid", "--uts", "--ipc", "--fork", "--kill-child", "--mount-proc")
_OURS = ("bash -c", "sshd:", "sshd-session:", "/usr/sbin/sshd", "ps -e")
_START_SECONDS = 30

# Binds hide the machine's own files inside the cluster only. root may be locked ("!"), which sshd would refuse.
_OUTER = """
set -eu
mount --make-rprivate /
mount -t tmpfs tmpfs /run
mkdir /run/sshd
mount --bind hosts /etc/hosts
mount --bind ssh_config /etc/ssh/ssh_config
mount --bind shadow /etc/shadow
if [ -d ~/.ssh ]; then mount -t tmpfs tmpfs ~/.ssh; fi
ip link set lo up
ip link add br0 type bridge
ip link set br0 up
touch ready
exec sleep infinity
"""
# bash stays as process 1: it buries the processes that lose their parent.
_NODE = """
set -eu
cd "$3"
hostname "$1"
mount -t tmpfs tmpfs /dev/shm
touch "$1.booted"
while ! ip link show eth0 >eth0.log 2>&1; do sleep 0.05; done
ip address add "$2/24" dev eth0
ip link set eth0 up
ip link set lo up
/usr/sbin/sshd -D -e -f sshd_config -o ListenAddress="$2" 2>"$1.sshd" &
wait
"""
_SSHD = """
Port 22
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/user_key.pub
PermitRootLogin prohibit-password
PasswordAuthentication no
UsePAM no
StrictModes no
PidFile none
MaxStartups 200
MaxSessions 100
"""
_SSH = """
Host *
    IdentityFile {folder}/user_key
    IdentitiesOnly yes
    StrictHostKeyChecking no
    UserKnownHostsFile /dev/null
    BatchMode yes
    ConnectTimeout 5
    LogLevel ERROR
"""


def why_not() -> str | None:
    """What keeps this machine from making nodes, in words; None if nothing does."""
    if os.geteuid() != 0:
        return "nodes need root"
    missing = {package for program, package in _PROGRAMS.items() if _program(program) is None}
    if missing:
        return f"nodes need the packages {', '.join(sorted(missing))}"
    tried = subprocess.run([*_UNSHARE, "ip", "link", "add", "br0", "type", "bridge"], capture_output=True, text=True)
    return f"no network namespaces here: {tried.stderr.strip()}" if tried.returncode else None


class Cluster:
    """Nodes n1, n2, ... at 10.77.0.1, 10.77.0.2, ...; a context manager. One at a time on a machine.

    `folder` is for keys and logs; the nodes see the machine's whole file system, but each its own /dev/shm.
    """

    def __init__(self, folder: Path, nodes: int = 2):
        self.folder = folder.resolve()
        self.nodes = [f"n{number}" for number in range(1, nodes + 1)]
        self.address = {node: f"10.77.0.{number}" for number, node in enumerate(self.nodes, 1)}
        self._lock: IO[str] | None = None
        self._outer: subprocess.Popen[bytes] | None = None
        self._node: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Cluster:
        self._lock = open(Path(tempfile.gettempdir(), "hyperpelt_cluster.lock"), "w")
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        try:
            self._write_files()
            # --pdeathsig: the cluster ends with this process, also when that is killed
            self._outer = self._begin("setpriv", "--pdeathsig", "KILL", *_UNSHARE, "bash", "-c", _OUTER)
            self._wait_for(self.folder / "ready", self._outer)
            for node in self.nodes:
                self.power_on(node)
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def hostfile(self, slots: int) -> Path:
        """A hostfile of all nodes."""
        file = self.folder / f"hostfile_{slots}"
        file.write_text("".join(f"{node} slots={slots}\n" for node in self.nodes))
        return file

    def start(
        self, node: str, *command: object, cwd: Path | None = None, env: Mapping[str, str] | None = None
    ) -> subprocess.Popen[str]:
        """Starts a command on a node, as if typed there; the environment is this process's, changed by `env`."""
        inside = ["bash", "-c", 'cd "$0" && exec "$@"', str(cwd or Path.cwd()), *map(str, command)]
        return subprocess.Popen(
            [*_enter(_first_process(self._node[node])), *inside],
            env={**os.environ, **(env or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def finish(self, *started: subprocess.Popen[str], timeout: float) -> list[subprocess.CompletedProcess[str]]:
        """Waits for started commands; stdout has both streams. If one takes longer, all nodes are switched off and on,
        which ends whatever runs on them, and TimeoutExpired is raised."""
        end, done = time.monotonic() + timeout, []
        for process in started:
            try:
                output, _ = process.communicate(timeout=max(0.1, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                self.reset()
                said = "".join(other.communicate()[0] for other in started[len(done) :])
                raise AssertionError(f"not finished in {timeout} s:\n{said[-6000:]}") from None
            done.append(subprocess.CompletedProcess(process.args, process.returncode, output))
        return done

    def run(self, node: str, *command: object, timeout: float = 120, **where: Any) -> subprocess.CompletedProcess[str]:
        """Runs one command on a node to its end."""
        return self.finish(self.start(node, *command, **where), timeout=timeout)[0]

    def processes(self, node: str) -> list[str]:
        """Command lines of what runs on a node beside its sshd."""
        inside = self.run(node, "ps", "-e", "-o", "args=", timeout=20).stdout.splitlines()
        return [line for line in inside if not line.startswith(_OURS)]

    def partition(self, node: str) -> None:
        """Pulls the node's network cable."""
        self._ip("link", "set", f"v{node}", "down")

    def heal(self, node: str) -> None:
        """Puts the cable back, and ends `slow`."""
        self._ip("link", "set", f"v{node}", "up")
        self._inside(f"tc qdisc del dev v{node} root 2>/dev/null || true")
        self._on(node, "tc qdisc del dev eth0 root 2>/dev/null || true")

    def slow(self, node: str, rate: str) -> None:
        """Limits what the node sends and receives, each to a rate such as 10mbit."""
        shape = f"root tbf rate {rate} burst 32kbit latency 400ms"
        self._inside(f"tc qdisc replace dev v{node} {shape}")
        self._on(node, f"tc qdisc replace dev eth0 {shape}")

    def power_off(self, node: str) -> None:
        """Everything on the node is gone at once, without a word to anyone: the cable first, since the kernel would
        close the connections of killed processes properly."""
        self.partition(node)
        process = self._node.pop(node)
        os.kill(_first_process(process), signal.SIGKILL)
        process.wait()
        self._inside(f"ip link delete v{node} 2>/dev/null || true")  # it also goes by itself, a little later

    def power_on(self, node: str) -> None:
        """Boots a node that is off, up to where ssh answers."""
        booted = self.folder / f"{node}.booted"
        booted.unlink(missing_ok=True)
        outer = self._outer_process()
        process = self._node[node] = self._begin(
            *(*_enter(outer), *_UNSHARE, "bash", "-c", _NODE, "node", node, self.address[node], str(self.folder))
        )
        self._wait_for(booted, process)
        end = ("name", "eth0", "address", f"02:00:00:00:00:{self.nodes.index(node) + 1:02x}")  # neighbours remember it
        self._ip("link", "add", f"v{node}", "type", "veth", "peer", *end, "netns", _first_process(process))
        self._ip("link", "set", f"v{node}", "master", "br0", "up")
        late = time.monotonic() + _START_SECONDS
        while self._inside_code(node, "ssh", node, "true"):
            assert time.monotonic() < late, f"{node} does not answer: {(self.folder / f'{node}.sshd').read_text()}"
            time.sleep(0.1)

    def reset(self) -> None:
        """Switches every node off and on again."""
        for node in self.nodes:
            if node in self._node:
                self.power_off(node)
        for node in self.nodes:
            self.power_on(node)

    def bytes(self, node: str) -> tuple[int, int]:
        """What the node has sent and received since it was switched on, with all headers, as its end of the switch
        counts."""
        shown = json.loads(self._ip("-json", "-statistics", "link", "show", f"v{node}"))
        counters = shown[0]["stats64"]
        return counters["rx"]["bytes"], counters["tx"]["bytes"]

    def _write_files(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "ready").unlink(missing_ok=True)
        for name in ("host_key", "user_key"):
            if not (self.folder / name).exists():
                made = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.folder / name)]
                subprocess.run(made, check=True, timeout=20)
        lines = [f"{address} {node}\n" for node, address in self.address.items()]
        (self.folder / "hosts").write_text("127.0.0.1 localhost\n" + "".join(lines))
        (self.folder / "shadow").write_text("root:*:1::::::\n")
        (self.folder / "shadow").chmod(0o600)
        (self.folder / "ssh_config").write_text(_SSH.format(folder=self.folder))
        (self.folder / "sshd_config").write_text(_SSHD.format(folder=self.folder))

    def _begin(self, *command: str) -> subprocess.Popen[bytes]:
        with open(self.folder / "cluster.log", "a") as log:
            return subprocess.Popen(command, cwd=self.folder, stderr=log)

    def _outer_process(self) -> int:
        assert self._outer is not None
        return _first_process(self._outer)

    def _ip(self, *arguments: object) -> str:
        """`ip` in the switch's network, with the machine's own process numbers."""
        network = ["nsenter", "--target", str(self._outer_process()), "--net", "ip", *map(str, arguments)]
        return subprocess.run(network, check=True, capture_output=True, text=True, timeout=20).stdout

    def _inside(self, script: str) -> None:
        subprocess.run([*_enter(self._outer_process()), "bash", "-c", script], check=True, timeout=20)

    def _on(self, node: str, script: str) -> None:
        subprocess.run([*_enter(_first_process(self._node[node])), "bash", "-c", script], check=True, timeout=20)

    def _inside_code(self, node: str, *command: str) -> int:
        inside = [*_enter(_first_process(self._node[node])), *command]
        return subprocess.run(inside, capture_output=True, timeout=20).returncode

    def _wait_for(self, file: Path, process: subprocess.Popen[bytes]) -> None:
        end = time.monotonic() + _START_SECONDS
        while not file.exists():
            assert process.poll() is None, f"ended with {process.returncode} before {file} was there"
            assert time.monotonic() < end, f"no {file} after {_START_SECONDS} s"
            time.sleep(0.05)

    def _end(self) -> None:
        for process in (self._outer, *self._node.values()):
            if process is not None:
                process.kill()  # its children go with it, and the kernel ends all that they started
                process.wait()
        self._node.clear()
        self._outer = None
        if self._lock is not None:
            self._lock.close()


def _program(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:{_PATH}")


def _enter(process: int) -> list[str]:
    """The command that runs what follows where `process` (a number of this machine) lives."""
    return ["nsenter", "--target", str(process), "--net", "--mount", "--pid", "--uts", "--ipc"]


def _first_process(started: subprocess.Popen[bytes]) -> int:
    """The machine's number of process 1 of the namespaces that `started` made: the first descendant that is no tool."""
    pid = started.pid
    while Path(f"/proc/{pid}/comm").read_text().strip() in ("setpriv", "nsenter", "unshare"):
        pid = int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])
    return pid
