"""A cluster's profile is read as it is meant; what cannot be meant is told with value, rule and remedy."""

from pathlib import Path

import pytest
import yaml

from pipeline.errors import UserError
from pipeline.plan.cluster import CLUSTERS, ClusterProfile, cluster_names, default_cluster, load_cluster

SMALL = """
hardware: {gpu: cpu, gpus_per_node: 2}
pack: {time: "01:00:00", cpus_per_task: 2}
train: {time: "1-02:30:01", cpus_per_task: 2}
"""


@pytest.fixture
def profile(tmp_path):
    """The small profile with other keys, at a path."""

    def profile(**changes) -> str:
        raw = yaml.safe_load(SMALL)
        for key, value in changes.items():
            raw[key] = raw[key] | value if isinstance(value, dict) and key in raw else value
        path = tmp_path / "mine.yaml"
        path.write_text(yaml.safe_dump(raw))
        return str(path)

    return profile


def refusal(path: str) -> str:
    with pytest.raises(UserError) as caught:
        load_cluster(path)
    assert path in str(caught.value)
    return str(caught.value)


def test_every_profile_under_slurm_clusters_loads_by_name():
    assert {"default", "infiniband", "efa", "cpu-only", "throw-away"} <= set(cluster_names())
    for name in cluster_names():
        assert isinstance(load_cluster(name), ClusterProfile)


def test_the_default_profile_shows_every_key():
    """Whoever copies it sees what there is; the container's keys stand there as a comment."""
    raw = yaml.safe_load((CLUSTERS / "default.yaml").read_text())
    assert raw.keys() == ClusterProfile.model_fields.keys()
    fields = load_cluster("default")
    assert raw["pack"].keys() == type(fields.pack).model_fields.keys()
    assert raw["train"].keys() == type(fields.train).model_fields.keys()


def test_every_line_of_an_example_says_why():
    for name in ("infiniband", "efa"):
        assert len(load_cluster(name).environment) >= 4
        assert all(len(row.reason.split()) >= 4 for row in load_cluster(name).environment)


def test_the_default_is_the_one_the_environment_names(monkeypatch):
    monkeypatch.delenv("ALST_CLUSTER", raising=False)
    assert default_cluster() == "default"
    monkeypatch.setenv("ALST_CLUSTER", "efa")
    assert default_cluster() == "efa"


def test_a_time_limit_is_counted_in_whole_minutes_never_less(profile):
    loaded = load_cluster(profile())
    assert loaded.pack.time_minutes == 60
    assert loaded.train.time_minutes == 24 * 60 + 2 * 60 + 30 + 1


def test_the_cluster_says_what_its_nodes_have(profile):
    said = load_cluster(profile(tracking_uri="http://tracking:5000")).overrides(nodes=3)
    assert said == [
        "hardware.gpu=cpu",
        "hardware.gpus_per_node=2",
        "hardware.host_memory_gib=null",
        "hardware.fabric_gigabytes_per_second=null",
        "hardware.disk_gigabytes_per_second=null",
        "hardware.scratch_gib=null",
        "hardware.scratch_gigabytes_per_second=null",
        "hardware.nodes=3",
        "tracking.uri='http://tracking:5000'",
    ]
    assert "hardware.scratch='/local'" in load_cluster(profile(scratch="/local")).overrides(nodes=None)
    assert "hardware.nodes" not in " ".join(load_cluster(profile()).overrides(nodes=None))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        pytest.param({"trian": {}}, ["trian is not a key here", "'train'?"], id="key"),
        pytest.param({"train": {"partiton": "x"}}, ["train.partiton", "'partition'?"], id="key of a section"),
        pytest.param({"train": {"time": "2 hours"}}, ["train.time = '2 hours'"], id="time"),
        pytest.param({"train": {"cpus_per_task": 0}}, ["train.cpus_per_task = 0", "greater than 0"], id="cpus"),
        pytest.param({"train": {"mem": "lots"}}, ["train.mem = 'lots'"], id="mem"),
        pytest.param({"hardware": {"gpu": "V100"}}, ["hardware.gpu = 'V100'", "H100-80GB"], id="gpu"),
        pytest.param({"umask": "9"}, ["umask = '9'"], id="umask"),
        pytest.param({"train": {"gpus": {"option": "gpus"}}}, ["train.gpus.option = 'gpus'", "gres"], id="gpu option"),
        pytest.param(
            {"pack": {"extra": {"time": "1:00"}}}, ["pack.extra", "place of its own", "`time`"], id="extra with a key"
        ),
        pytest.param({"pack": {"extra": {"output": "x"}}}, ["pack.extra", "output", "remove it"], id="extra of ours"),
        pytest.param(
            {"pack": {"tasks": 64}, "max_array_size": 64},
            ["pack.tasks = 64", "less than", "pack.tasks: 63"],
            id="array",
        ),
        pytest.param(
            {"environment": [{"name": "HF_TOKEN", "value": "x", "reason": "gated models"}]},
            ["'HF_TOKEN'", "can be read by others", "`secrets`"],
            id="secret",
        ),
        pytest.param(
            {"environment": [{"name": "NCCL_DEBUG", "value": "INFO"}]}, ["environment.0.reason is missing"], id="reason"
        ),
    ],
)
def test_a_profile_that_cannot_be_meant_is_refused(profile, changes, told):
    message = refusal(profile(**changes))
    for words in told:
        assert words in message
    assert ";" in message, "no remedy"


def test_a_value_of_a_secret_is_not_repeated_in_the_refusal(profile):
    message = refusal(profile(environment=[{"name": "HF_TOKEN", "value": "hf_canary", "reason": "gated"}]))
    assert "hf_canary" not in message


def test_an_unknown_cluster_is_refused_with_those_there_are():
    with pytest.raises(UserError, match=r"'infinband'.*infiniband.*local"):
        load_cluster("infinband")


def test_a_profile_that_is_no_yaml_is_refused(tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text("pack: [1\ntrain: 2\n")
    assert "line 2" in refusal(str(path))


def test_a_profile_may_be_copied_away_and_named_by_its_path(tmp_path):
    copy = tmp_path / "mine.yaml"
    copy.write_bytes(Path(CLUSTERS / "efa.yaml").read_bytes())
    assert load_cluster(str(copy)) == load_cluster("efa")
