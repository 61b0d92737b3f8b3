"""What each feature saves by the plan: the same formulas, once with it and once without."""

from pipeline.plan.job import JobPlan, plan_job
from pipeline.plan.limits import load_of
from pipeline.plan.savings import savings, savings_lines
from pipeline.recipe.load import load

CHECKPOINT = "memory.activation_checkpoint"


def planned(*overrides: str) -> JobPlan:
    settings = "keep_attention: true, layers_per_group: 2, resident_groups: 3, disk_groups: 3, offload_dtype: fp8"
    asked = [f"{CHECKPOINT}={{offload: disk, {settings}}}", "data.seq_len=2097152"]
    return plan_job(load("llama8b", overrides=[*asked, *overrides]))


def test_a_saving_is_the_difference_to_the_plan_without_the_feature():
    found = {saving.feature: saving for saving in savings(planned())}
    now = load_of(planned())
    for name in ("tiled_loss", "tiled_mlp", "tiled_norm"):
        without = load_of(planned(f"memory.{name}=null"))
        assert found[name].gpu_bytes == without.gpu.total - now.gpu.total > 0
    for name, value in (("disk_groups", 0), ("layers_per_group", 1), ("offload_dtype", "null")):
        without = load_of(planned(f"{CHECKPOINT}.{name}={value}"))
        assert found[name].host_bytes == without.host.total - now.host.total
    assert found["disk_groups"].host_bytes > 0
    assert found["keep_attention"].host_bytes < 0
    assert found["resident_groups"].gpu_bytes < 0 < found["resident_groups"].host_bytes
    assert found["offload to disk"].gpu_bytes > 0 > found["offload to disk"].host_bytes
    assert found["activation_checkpoint"].gpu_bytes > found["offload to disk"].gpu_bytes


def test_what_is_off_saves_nothing_and_what_is_on_is_told_in_a_line_each():
    off = plan_job(load("tiny", overrides=["memory={tiled_loss: null, tiled_mlp: null, tiled_norm: null}"]))
    assert [saving.feature for saving in savings(off)] == ["activation_checkpoint", "offload to cpu"]
    lines = list(savings_lines(planned(), peak_bytes=3 << 30))
    assert "GiB planned allocated on a GPU, 3.00 measured" in lines[0]
    assert len(lines) == 2 + len(savings(planned()))


def test_without_a_gpu_a_process_has_one_number_a_feature_its_host_memory():
    tiny = plan_job(load("tiny-million"))
    first, head, *lines, note = savings_lines(tiny, peak_bytes=1)
    assert "GiB planned resident in a process" in first
    assert head.split()[-2:] == ["a", "process"]
    for line, saving in zip(lines, savings(tiny), strict=True):
        assert line.split()[-1] == f"{saving.host_bytes / 2 / 2**30:+,.2f}"
    assert lines[-1].split() == ["offload", "to", "cpu", "-0.20"]
    assert "without one it only copies within the same memory" in note
