"""A real Slurm cluster on this machine, thrown away afterwards: four nodes with fake GPUs, accounting included.

    python3 slurm/local_cluster.py install      Debian or Ubuntu with root: the packages
    python3 slurm/local_cluster.py up FOLDER    prints how to use it
    python3 slurm/local_cluster.py down FOLDER

Everything lies under FOLDER: keys, sockets, the accounting's data base, spools, logs. Nothing of the system's own
configuration is read or written, no port is fixed, and several clusters run beside each other, as root or as an
ordinary user. `down` ends what `up` started, by process id, and what its jobs left. Needs Python alone.
"""

import json
import os
import pwd
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

PACKAGES = ("slurmctld", "slurmd", "slurmdbd", "slurm-client", "munge", "mariadb-server")
PROGRAMS = ("slurmctld", "slurmd", "slurmdbd", "sbatch", "sacctmgr", "munged", "mariadbd", "mariadb-install-db")
NODES = 4
GPUS_PER_NODE = 8
CPUS_PER_NODE = 16
START_SECONDS = 120  # 3 on a free machine
STOP_SECONDS = 15  # slurmctld saves its state, MariaDB closes its tables
POLL_SECONDS = 0.05
GRACE_SECONDS = 30  # that a preempted job has, from the signal on
KILL_SECONDS = 5  # between the last SIGTERM and SIGKILL
SYSTEM_PATHS = ("/usr/sbin", "/sbin")
"""Where Debian keeps daemons; not on an ordinary user's PATH."""


class ClusterError(Exception):
    """The cluster cannot be started; the message says why and what to do."""


def missing_programs() -> list[str]:
    """The programs that are not on this machine; with one missing there is no cluster."""
    return [name for name in PROGRAMS if shutil.which(name, path=search_path()) is None]


def search_path() -> str:
    return os.pathsep.join([os.environ.get("PATH", os.defpath), *SYSTEM_PATHS])


def install() -> None:
    """Install the packages. Raises ClusterError, naming them, where this user cannot."""
    if not missing_programs():
        return
    command = ["apt-get", "install", "-qq", "-y", "--no-install-recommends", *PACKAGES]
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        raise ClusterError(
            f"{', '.join(missing_programs())}: not on this machine, and only root of a Debian or Ubuntu can install "
            f"them; run: sudo {' '.join(command)}"
        )
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    for step in (["apt-get", "update", "-qq"], command):
        done = subprocess.run(step, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise ClusterError(f"{' '.join(step)}: {done.stderr.strip()[-2000:]}")


@dataclass(frozen=True)
class _Daemon:
    """A process of the cluster. The start time tells it from a later process with the same number."""

    name: str
    pid: int
    started: str


class LocalCluster:
    """One cluster in one folder. `up`, then `environment` for everything that is to use it, then `down`."""

    def __init__(self, folder: Path, *, settings: Mapping[str, str] | None = None) -> None:
        """`settings` of slurm.conf take the place of those below."""
        self.folder = folder.resolve()
        self._settings = settings or {}
        self._daemons: list[_Daemon] = []

    @property
    def config(self) -> Path:
        return self.folder / "etc" / "slurm.conf"

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs to reach this cluster."""
        return {"SLURM_CONF": str(self.config), "PATH": search_path()}

    @property
    def node_names(self) -> list[str]:
        """Unlike those of any other folder's cluster: nodes of one name on one host disturb each other."""
        prefix = f"n{self.folder.stat().st_ino % 0xFFFFFF:06x}x"
        return [f"{prefix}{number}" for number in range(1, NODES + 1)]

    def up(self) -> None:
        """Start everything. Raises ClusterError with the logs that tell why; then nothing is left running."""
        if missing := missing_programs():
            raise ClusterError(f"{', '.join(missing)}: not on this machine; run `make cluster-up` as root once")
        self._make_folders()
        try:
            self._start_munge()
            accounting_port = self._start_accounting()
            self._write_config(accounting_port)
            self._start_daemon("slurmctld", ["slurmctld", "-D", "-i"], lambda: "is UP" in self.ask("scontrol", "ping"))
            for node in self.node_names:
                self._start_daemon(node, ["slurmd", "-D", "-N", node])
            self._wait(
                "the nodes",
                lambda: self.ask("sinfo", "-h", "-N", "-p", "gpu", "-o", "%T").split().count("idle") == NODES,
            )
        except BaseException:
            self.down()
            raise

    def down(self) -> None:
        """End the jobs, the daemons and whatever a job left. Nothing to do is fine."""
        with suppress(FileNotFoundError):
            self._daemons = [_Daemon(**entry) for entry in json.loads(self._state.read_text())]
        if any(daemon.name == "slurmctld" and _runs(daemon) for daemon in self._daemons):
            self.cancel_all()
        for daemon in sorted(self._daemons, key=_end_order):
            _end(daemon)
        for pid in self.job_processes():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._state.unlink(missing_ok=True)

    def cancel_all(self) -> None:
        """Cancel every job and wait until none is left, as long as that takes a cluster in order."""
        self.ask("scancel", "--user", _me())
        deadline = time.monotonic() + STOP_SECONDS
        while self.ask("squeue", "-h") and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)

    def job_processes(self, *, rank: int | None = None) -> list[int]:
        """Processes of this cluster's jobs that are alive, tasks as well as slurmstepd; or those of one rank."""
        mark, found = f"SLURM_CONF={self.config}".encode(), []
        for folder in Path("/proc").iterdir():
            if not folder.name.isdigit():
                continue
            with suppress(OSError):  # it has ended, or is another user's
                variables = (folder / "environ").read_bytes().split(b"\0")
                step = (folder / "comm").read_text().startswith("slurmstepd")
                in_job = step or any(variable.startswith(b"SLURM_JOB_ID=") for variable in variables)
                asked = rank is None or f"SLURM_PROCID={rank}".encode() in variables
                if mark in variables and in_job and asked and _state_of(int(folder.name)) != "Z":
                    found.append(int(folder.name))
        return found

    @contextmanager
    def without(self, node: str) -> Iterator[None]:
        """Inside the block a node's slurmd does not run; what its jobs have started does."""
        (daemon,) = [daemon for daemon in self._daemons if daemon.name == node]
        _end(daemon)
        self._daemons.remove(daemon)
        try:
            yield
        finally:
            self._start_daemon(node, ["slurmd", "-D", "-N", node])

    def ask(self, *command: str, timeout_seconds: float = 60) -> str:
        """What one of Slurm's commands prints; nothing if it fails."""
        done = subprocess.run(
            command,
            env=os.environ | self.environment,
            capture_output=True,
            text=True,
            timeout=timeout_seconds,
            check=False,
        )
        return done.stdout

    # Daemons

    @property
    def _state(self) -> Path:
        return self.folder / "daemons.json"

    def _make_folders(self) -> None:
        if self._state.exists():
            raise ClusterError(f"{self.folder}: holds a cluster; `down` first, or give another folder")
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in ("etc", "run", "log", "state", "munge", "gpus", *(f"spool/{node}" for node in self.node_names)):
            (self.folder / name).mkdir(parents=True, exist_ok=True)

    def _start_daemon(
        self,
        name: str,
        command: list[str],
        ready: Callable[[], bool] = lambda: True,
        extra: dict[str, str] | None = None,
    ) -> None:
        log = self.folder / "log" / f"{name}.out"
        with log.open("ab") as output:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd=self.folder,
                env=os.environ | self.environment | (extra or {}),
                start_new_session=True,
            )
        self._daemons.append(_Daemon(name, process.pid, _started(process.pid)))
        self._state.write_text(json.dumps([vars(daemon) for daemon in self._daemons]))
        self._wait(name, lambda: process.poll() is None and ready(), failed=lambda: process.poll() is not None)

    def _wait(self, what: str, ready: Callable[[], bool], failed: Callable[[], bool] = lambda: False) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not ready():
            if failed() or time.monotonic() > deadline:
                raise ClusterError(f"{what} did not start; the logs say:\n{self._last_words()}")
            time.sleep(POLL_SECONDS)

    def _last_words(self) -> str:
        newest = sorted((self.folder / "log").iterdir(), key=lambda path: path.stat().st_mtime)[-3:]
        return "\n".join(f"{path}:\n{path.read_text(errors='replace')[-800:]}" for path in newest)

    def _start_munge(self) -> None:
        key = self.folder / "munge" / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        options = {
            "key-file": key,
            "socket": self._munge_socket,
            "pid-file": self.folder / "munge" / "munged.pid",
            "log-file": self.folder / "log" / "munged.log",
            "seed-file": self.folder / "munge" / "munged.seed",
            "num-threads": 2,
        }
        # --force: a folder that only its owner may enter is fine here, where all of Slurm runs as that owner.
        command = ["munged", "-F", "--force", *(f"--{name}={value}" for name, value in options.items())]
        self._start_daemon("munged", command, self._munge_socket.exists)

    @property
    def _munge_socket(self) -> Path:
        return self.folder / "munge" / "munge.socket"

    def _start_accounting(self) -> int:
        """MariaDB and slurmdbd; the port of the latter."""
        data, database = self.folder / "mysql", self.folder / "run" / "mysqld.sock"
        with (self.folder / "log" / "mariadb-install.out").open("wb") as log:
            subprocess.run(
                [
                    "mariadb-install-db",
                    "--no-defaults",
                    f"--datadir={data}",
                    f"--user={_me()}",
                    "--auth-root-authentication-method=normal",
                    "--skip-test-db",
                ],
                env=os.environ | self.environment,
                stdout=log,
                stderr=log,
                check=True,
            )
        client = ["--no-defaults", f"--socket={database}", "-uroot"]
        self._start_daemon(
            "mariadbd",
            self._database_command(data, database),
            lambda: "alive" in self.ask("mariadb-admin", *client, "ping"),
        )
        self.ask("mariadb", *client, "-e", _CREATE_DATABASE)
        port = free_ports(1)[0]
        config = self.folder / "etc" / "slurmdbd.conf"
        config.write_text(_SLURMDBD_CONF.format(folder=self.folder, munge=self._munge_socket, port=port, me=_me()))
        config.chmod(0o600)  # slurmdbd refuses to start with one that others may read
        # libmariadb takes the path of its socket from this variable where the host is localhost.
        self.config.write_text(f"ClusterName=local\nAuthInfo=socket={self._munge_socket}\n")
        self._start_daemon("slurmdbd", ["slurmdbd", "-D"], lambda: _listens(port), {"MYSQL_UNIX_PORT": str(database)})
        return port

    def _database_command(self, data: Path, database: Path) -> list[str]:
        options = ["--no-defaults", f"--datadir={data}", f"--socket={database}", "--skip-networking", f"--user={_me()}"]
        options += [f"--pid-file={self.folder}/run/mariadbd.pid", "--performance-schema=OFF"]
        # As small as slurmdbd accepts; the lock wait is what it asks for.
        sizes = ["--innodb-buffer-pool-size=64M", "--innodb-log-file-size=8M", "--innodb-lock-wait-timeout=900"]
        return ["mariadbd", *options, *sizes]

    def _write_config(self, accounting_port: int) -> None:
        controller, *ports = free_ports(1 + NODES)
        nodes = "\n".join(
            _NODE.format(name=name, port=port, cpus=CPUS_PER_NODE, gpus=GPUS_PER_NODE)
            for name, port in zip(self.node_names, ports, strict=True)
        )
        text = _SLURM_CONF.format(
            folder=self.folder,
            host=socket.gethostname().split(".")[0],
            controller=controller,
            accounting=accounting_port,
            munge=self._munge_socket,
            me=_me(),
            nodes=nodes,
            grace=GRACE_SECONDS,
            kill=KILL_SECONDS,
        )
        for name, value in self._settings.items():
            text = re.sub(rf"^{name}=.*\n", "", text, flags=re.MULTILINE) + f"{name}={value}\n"
        self.config.write_text(text)
        for number in range(GPUS_PER_NODE):
            # A GPU is a device file to Slurm; a link to /dev/null is one, and needs no root.
            (self.folder / "gpus" / f"gpu{number}").symlink_to("/dev/null")
        (self.folder / "etc" / "gres.conf").write_text(
            "".join(
                f"NodeName={name} Name=gpu File={self.folder}/gpus/gpu[0-{GPUS_PER_NODE - 1}]\n"
                for name in self.node_names
            )
        )
        self.ask("sacctmgr", "-i", "add", "cluster", "local")
        self.ask("sacctmgr", "-i", "add", "account", "everyone")
        self.ask("sacctmgr", "-i", "add", "user", _me(), "account=everyone", "defaultaccount=everyone")


_CREATE_DATABASE = (
    "create database slurm_acct_db; create user 'slurm'@'localhost' identified by 'slurm'; "
    "grant all on slurm_acct_db.* to 'slurm'@'localhost';"
)

_SLURMDBD_CONF = """\
AuthType=auth/munge
AuthInfo=socket={munge}
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort={port}
SlurmUser={me}
LogFile={folder}/log/slurmdbd.log
PidFile={folder}/run/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=slurm
StoragePass=slurm
StorageLoc=slurm_acct_db
"""

# cred_expire: a requeued job starts after it has passed once; the default of two minutes is long to wait for.
# AccountingStorageEnforce: as on most shared clusters; there are no limits until somebody sets one with sacctmgr.
# AccountingStoragePass: clients of slurmdbd look for munge's socket here, not in AuthInfo.
# proctrack/linuxproc: works for root and for others alike and leaves no cgroup folders behind.
_SLURM_CONF = """\
ClusterName=local
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser={me}
SlurmdUser={me}
AuthType=auth/munge
AuthInfo=socket={munge},cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/slurmd-%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,bf_resolution=1,batch_sched_delay=0,sched_min_interval=0
ReturnToService=2
SlurmctldTimeout=10
SlurmdTimeout=60
InactiveLimit=0
KillWait={kill}
MinJobAge=600
WaitTime=0
JobRequeue=1
MaxArraySize=1001
PropagateResourceLimits=NONE
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={accounting}
AccountingStoragePass={munge}
AccountingStoreFlags=job_comment,job_env,job_script
AccountingStorageEnforce=associations,limits,qos
GresTypes=gpu
{nodes}
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=gpu Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO PriorityTier=1 GraceTime={grace}
PartitionName=cpu Nodes=ALL Default=NO MaxTime=INFINITE State=UP OverSubscribe=NO PriorityTier=1
PartitionName=urgent Nodes=ALL Default=NO MaxTime=INFINITE State=UP OverSubscribe=NO PriorityTier=2 PreemptMode=OFF
"""

_NODE = (
    "NodeName={name} NodeHostname={name} NodeAddr=127.0.0.1 Port={port} CPUs={cpus} Boards=1 SocketsPerBoard=1 "
    "CoresPerSocket={cpus} ThreadsPerCore=1 RealMemory=64000 Gres=gpu:{gpus} State=UNKNOWN"
)


def _me() -> str:
    return pwd.getpwuid(os.getuid()).pw_name


def free_ports(number: int) -> list[int]:
    """Ports that nothing listens on; all are open at once here, so that none comes twice."""
    sockets = [socket.socket() for _ in range(number)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


def _listens(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def _stat(pid: int) -> list[str]:
    """/proc/PID/stat after the name: state first. Empty once it has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []


def _state_of(pid: int) -> str:
    """`Z` of one that has ended and only waits for its parent, or is gone."""
    return (_stat(pid) or ["Z"])[0]


def _started(pid: int) -> str:
    """In ticks since the machine's start."""
    return (_stat(pid) or ["0"] * 20)[19]


def _runs(daemon: _Daemon) -> bool:
    return _state_of(daemon.pid) != "Z" and _started(daemon.pid) == daemon.started


def _end_order(daemon: _Daemon) -> int:
    """Nodes first, then the controller, then what it writes its accounting to."""
    last = ("slurmctld", "slurmdbd", "mariadbd", "munged")
    return last.index(daemon.name) + 1 if daemon.name in last else 0


def _end(daemon: _Daemon) -> None:
    """Politely, then not."""
    for number, seconds in ((signal.SIGTERM, STOP_SECONDS), (signal.SIGKILL, STOP_SECONDS)):
        if not _runs(daemon):
            return
        os.kill(daemon.pid, number)
        deadline = time.monotonic() + seconds
        while _runs(daemon) and time.monotonic() < deadline:
            with suppress(ChildProcessError):
                os.waitpid(daemon.pid, os.WNOHANG)
            time.sleep(POLL_SECONDS)


_HOW_TO_USE = """\
a cluster of {nodes} nodes with {gpus} fake GPUs each, in {folder}. In a shell:

  export SLURM_CONF={config}
  sinfo
  make submit RECIPE=tiny NODES=4 CLUSTER=throw-away

`make cluster-down` ends it."""


def _throw_away(cluster: LocalCluster) -> None:
    """End the cluster and remove its folder, if it is one."""
    if not cluster.config.exists():
        raise ClusterError(f"{cluster.folder}: holds no cluster; give the folder that `up` was given")
    cluster.down()
    shutil.rmtree(cluster.folder)


def main(arguments: list[str]) -> int:
    try:
        match arguments:
            case ["install"]:
                install()
            case ["up", folder]:
                cluster = LocalCluster(Path(folder))
                cluster.up()
                print(_HOW_TO_USE.format(nodes=NODES, gpus=GPUS_PER_NODE, folder=cluster.folder, config=cluster.config))
            case ["down", folder]:
                _throw_away(LocalCluster(Path(folder)))
            case _:
                print(__doc__)
                return 2
    except ClusterError as error:
        print(f"cluster: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
