"""What would fail on the cluster, refused before anything is in its queue: message with value, rule and remedy.

`check_submission` looks at plan and profile before there is a run folder, `check_limits` at the jobs as they are asked
for. What Slurm alone can know, `sbatch --test-only` is asked in `submit`.
"""

import getpass
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import UserError
from pipeline.launch.entry import check_secrets
from pipeline.launch.jobs import JobRequest
from pipeline.launch.slurm import answer, ask, seconds_of
from pipeline.plan.cluster import ClusterProfile
from pipeline.plan.hub_cache import hub_needs, missing_from
from pipeline.plan.job import JobPlan
from pipeline.plan.run_dir import RunDir, runs_root
from pipeline.recipe.schema import Recipe

Fields = dict[str, str]


def check_submission(plan: JobPlan, profile: ClusterProfile) -> None:
    """Raises UserError for what can be seen from here, without a job."""
    if shutil.which("sbatch") is None:
        raise UserError(
            "sbatch: not on the PATH; submit from a login node of the cluster, or try CLUSTER=local, or DRY_RUN=1"
        )
    _check_partitions(profile)
    _check_shared(profile, "the folder of runs", runs_root(), remedy="set ALST_RUNS to a folder")
    _check_folders(profile)
    if profile.secrets is not None:
        check_secrets(Path(profile.secrets).expanduser())
    is_packed = RunDir(runs_root() / plan.recipe.name).is_packed(plan)  # by any run there
    check_staged(plan.recipe, profile, is_packed=is_packed)


def check_staged(recipe: Recipe, profile: ClusterProfile, *, is_packed: bool) -> None:
    """Raises UserError naming the first thing of the hub that jobs, which are offline, would not find.

    A packed data set holds its tokenizer, and training reads nothing of its sources.
    """
    cache = profile.hub_cache()
    for need in hub_needs(recipe):
        if is_packed and need.part in ("tokenizer", "data"):
            continue
        _check_shared(profile, "Hugging Face's cache", cache, remedy="set HF_HOME to a folder")
        if (trouble := missing_from(cache, need)) is not None:
            raise UserError(f"{need}: {trouble}; run `alst stage` with this recipe on a node with internet")


def check_limits(jobs: tuple[JobRequest, ...]) -> None:
    """Raises UserError for jobs that would wait for ever, or that Slurm would take only some of."""
    limits = _limits()
    for job in jobs:
        if job.array_tasks >= limits.array_size:
            raise UserError(
                f"pack.tasks = {job.array_tasks}: must be less than this cluster's MaxArraySize = "
                f"{limits.array_size}; use {limits.array_size - 1}"
            )
        for seconds, where in _time_limits(job, limits):
            _check_time(job, seconds, where)
    for (account, quality), number in _numbers(jobs, limits).items():
        for most, where in _submit_limits(account, quality, limits):
            _check_number(number, most, where)


def section_of(job: JobRequest) -> str:
    """Of the profile, that a job is asked for by."""
    return "train" if job.stage in ("train", "check") else "pack"


# Folders and partitions


def _check_partitions(profile: ClusterProfile) -> None:
    there = sorted(_partitions())
    for section, asked in (("pack", profile.pack.partition), ("train", profile.train.partition)):
        missing = [name for name in (asked or "").split(",") if name and name not in there]
        if missing:
            raise UserError(
                f"{section}.partition = {asked}: {', '.join(missing)} is not on this cluster; use one of "
                f"{', '.join(there)}"
            )


def _check_shared(profile: ClusterProfile, what: str, folder: Path, *, remedy: str) -> None:
    if profile.shared is None or any(folder.is_relative_to(shared) for shared in profile.shared):
        return
    raise UserError(f"{folder}: {what} is not shared with the nodes; {remedy} in one of {', '.join(profile.shared)}")


def _check_folders(profile: ClusterProfile) -> None:
    for folder in profile.shared or ():
        if not Path(folder).is_dir():
            raise UserError(f"shared = {folder}: no such folder here; mount it, or take it out of the profile")


# Limits


@dataclass(frozen=True)
class _Limits:
    """What Slurm and its accounting say; empty where they enforce nothing."""

    array_size: int
    partitions: dict[str, Fields]
    accounts: dict[str | None, Fields]
    """This user's associations; None is the account that is taken where none is named."""
    qualities: dict[str, Fields]


def _limits() -> _Limits:
    config = dict(_pairs(answer("scontrol", "show", "config").splitlines()))
    enforced = bool({"limits", "safe", "all"} & set(config.get("AccountingStorageEnforce", "").split(",")))
    return _Limits(
        array_size=int(config.get("MaxArraySize", 1001)),
        partitions=_partitions(),
        accounts=_accounts(config["ClusterName"]) if enforced else {},
        qualities={row["Name"]: row for row in _rows("qos", "Name", "MaxSubmitJobsPerUser", "MaxWall")}
        if enforced
        else {},
    )


def _partitions() -> dict[str, Fields]:
    rows = answer("scontrol", "show", "partition", "--oneliner").splitlines()
    found = [dict(_pairs(row.split())) for row in rows]
    return {fields["PartitionName"]: fields for fields in found if "PartitionName" in fields}


def _accounts(cluster: str) -> dict[str | None, Fields]:
    me = f"user={getpass.getuser()}"
    names = ("Account", "Partition", "DefaultQOS", "MaxSubmitJobs", "MaxWall")
    rows = _rows("assoc", *names, of=(me, f"cluster={cluster}"))
    found: dict[str | None, Fields] = {row["Account"]: row for row in rows if not row["Partition"]}
    for row in _rows("user", "DefaultAccount", of=(me,)):
        found[None] = found.get(row["DefaultAccount"], {})
    return found


def _rows(what: str, *names: str, of: tuple[str, ...] = ()) -> list[Fields]:
    """The accounting's rows; none where it does not answer."""
    printed = ask("sacctmgr", "-nP", "show", what, *of, f"format={','.join(names)}").stdout
    return [dict(zip(names, row.split("|"), strict=True)) for row in printed.splitlines()]


def _pairs(words: list[str]) -> Iterator[tuple[str, str]]:
    for word in words:
        name, equals, value = word.partition("=")
        if equals:
            yield name.strip(), value.strip()


def _asked(job: JobRequest, name: str) -> str | None:
    value = job.options.get(name)
    return None if value is None else str(value)


def _time_limits(job: JobRequest, limits: _Limits) -> Iterator[tuple[int, str]]:
    """Seconds a job may ask for, and who says so. Of several partitions the most generous counts."""
    asked = _asked(job, "partition")
    of_partitions = {
        name: seconds_of(fields.get("MaxTime", ""))
        for name, fields in limits.partitions.items()
        if (name in asked.split(",") if asked else fields.get("Default") == "YES")
    }
    finite = {name: limit for name, limit in of_partitions.items() if limit is not None}
    if finite and len(finite) == len(of_partitions):
        name = max(finite, key=lambda name: finite[name])
        yield finite[name], f"MaxTime of partition {name}"
    account, quality = _charged(job, limits)
    for fields, where in (
        (limits.accounts.get(account, {}), f"MaxWall of account {account or 'by default'}"),
        (limits.qualities.get(quality, {}), f"MaxWall of qos {quality}"),
    ):
        if (limit := seconds_of(fields.get("MaxWall", ""))) is not None:
            yield limit, where


def _check_time(job: JobRequest, limit: int, where: str) -> None:
    if job.time_minutes * 60 > limit:
        raise UserError(
            f"{section_of(job)}.time is {job.time_minutes} minutes: {where} is {limit // 60}, so the {job.stage} job "
            "would never start; ask for less, or for another partition, account or qos"
        )


def _charged(job: JobRequest, limits: _Limits) -> tuple[str | None, str]:
    """The account and the qos of a job; the account is None, and the qos the account's, where none is named."""
    account = _asked(job, "account")
    return account, _asked(job, "qos") or limits.accounts.get(account, {}).get("DefaultQOS") or "normal"


def _numbers(jobs: tuple[JobRequest, ...], limits: _Limits) -> Counter[tuple[str | None, str]]:
    """How many jobs are asked for by account and qos; each task of an array counts."""
    numbers: Counter[tuple[str | None, str]] = Counter()
    for job in jobs:
        numbers[_charged(job, limits)] += job.array_tasks
    return numbers


def _submit_limits(account: str | None, quality: str, limits: _Limits) -> Iterator[tuple[int, str]]:
    """Jobs that may be in the queue at once, and who says so."""
    for fields, key, where in (
        (limits.accounts.get(account, {}), "MaxSubmitJobs", f"account {account or 'by default'}"),
        (limits.qualities.get(quality, {}), "MaxSubmitJobsPerUser", f"qos {quality}"),
    ):
        if fields.get(key):
            yield int(fields[key]), f"{key} of {where}"


def _check_number(number: int, limit: int, where: str) -> None:
    queued = len(ask("squeue", "--noheader", "--array", "--user", getpass.getuser(), "--format=%i").stdout.split())
    if queued + number > limit:
        raise UserError(
            f"{number} jobs to submit and {queued} in the queue: {where} is {limit}; set pack.tasks to less, or wait"
        )
