"""One real Slurm cluster for all tests here. Without its packages they are skipped; under CI=true they fail."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from pipeline.plan.cluster import CLUSTERS
from slurm.local_cluster import LocalCluster, missing_programs
from tests.cluster.user import User


@pytest.fixture(scope="session")
def programs() -> None:
    """Slurm's and MariaDB's programs are on this machine."""
    if missing := missing_programs():
        told = f"{', '.join(missing)} not on this machine; run `make cluster-up` as root once"
        if os.environ.get("CI") == "true":
            pytest.fail(told)
        pytest.skip(told)


@pytest.fixture(scope="session")
def cluster(programs) -> Iterator[LocalCluster]:
    with tempfile.TemporaryDirectory(prefix="alst-") as folder:
        cluster = LocalCluster(Path(folder) / "c")
        cluster.up()
        try:
            yield cluster
        finally:
            cluster.down()


@pytest.fixture(scope="session")
def user(tmp_path_factory, cluster) -> User:
    """One for all tests, so that what one packed the others need not."""
    return User(tmp_path_factory.mktemp("user"), cluster)


@pytest.fixture
def profile(tmp_path):
    """The profile `throw-away` with changes, at a path."""

    def profile(**changes) -> str:
        raw = yaml.safe_load((CLUSTERS / "throw-away.yaml").read_text())
        for key, value in changes.items():
            raw[key] = raw[key] | value if isinstance(value, dict) and key in raw else value
        path = tmp_path / "mine.yaml"
        path.write_text(yaml.safe_dump(raw))
        return str(path)

    return profile
