"""A case of the bench is a recipe of its own, whose features, shape and documents are those that were asked."""

from itertools import pairwise

import pytest

from pipeline.bench import ladder
from pipeline.bench.cases import Case, plan_of, recipe_of
from pipeline.bench.machine import gpu_of
from pipeline.errors import UserError
from pipeline.plan.known_models import KNOWN_MODELS
from pipeline.recipe.schema import Gpu
from tests.unit.bench_support import H200, basis


def case(rung: str = "offload", **changes) -> Case:
    return Case(**{"engine": "alst", "rung": rung, "seq_len": 131072, "layers": 2, "purpose": "speed"} | changes)


def test_each_rung_has_what_the_rungs_below_it_have_and_more():
    names = [rung.name for rung in ladder.LADDER]
    for lower, upper in pairwise(names):
        assert ladder.overrides_of(upper)[: len(ladder.overrides_of(lower))] == ladder.overrides_of(lower)
        assert recipe_of(case(lower), basis(H200)).memory != recipe_of(case(upper), basis(H200)).memory


def test_the_first_rung_has_no_feature_and_keeps_layer_inputs_on_the_device():
    memory = recipe_of(case("baseline"), basis(H200)).memory
    assert (memory.tiled_loss, memory.tiled_mlp, memory.tiled_norm) == (None, None, None)
    assert memory.activation_checkpoint.offload is None


def test_the_offload_rung_leaves_nothing_on_the_device():
    checkpoint = plan_of(case(), basis(H200)).recipe.memory.activation_checkpoint
    assert (checkpoint.offload, checkpoint.resident_groups) == ("cpu", 0)


def test_the_recipes_own_features_are_measured_as_it_has_them():
    assert recipe_of(case("recipe"), basis(H200)).memory.tiled_loss.tile_tokens == 1024, "as in tiny.yaml"


@pytest.mark.parametrize("model", sorted(KNOWN_MODELS))
def test_every_known_shape_can_be_benched_with_one_layer_and_with_few(model):
    for layers in (1, 3):
        plan = plan_of(case(layers=layers, purpose="length"), basis(H200, recipe="llama8b", model=model))
        assert plan.model.num_layers == layers
        assert plan.model.hidden_size == KNOWN_MODELS[model]["hidden_size"]
        assert plan.recipe.model.init == "random"
        assert plan.recipe.model.name_or_path is None, "nothing is looked up on the hub"


def test_speed_is_of_one_document_and_length_of_many_of_16k():
    speed, length = recipe_of(case(), basis(H200)), recipe_of(case(purpose="length"), basis(H200))
    assert speed.data.cross_document_attention
    assert not length.data.cross_document_attention
    assert length.data.sources[0].max_document_tokens == 16384
    assert plan_of(case(), basis(H200)).packing_key == plan_of(case(purpose="length"), basis(H200)).packing_key


def test_positions_reach_to_the_end_of_the_sample():
    assert recipe_of(case(seq_len=2**20), basis(H200)).model.config["max_position_embeddings"] == 2**20


def test_nothing_but_steps_is_measured():
    recipe = recipe_of(case(), basis(H200))
    assert (recipe.train.self_check, recipe.evaluation, recipe.checkpoint, recipe.tracking.mlflow) == (
        *[None] * 3,
        False,
    )
    assert recipe.train.steps == 3, "one that is left out, and two"


def test_what_the_user_overrides_wins():
    recipe = recipe_of(case(), basis(H200, "zero.offload_optimizer=null", "train.steps=9"))
    assert (recipe.zero.offload_optimizer, recipe.train.steps) == (None, 9)


def test_hugging_face_alone_has_no_sequence_parallelism():
    assert plan_of(case("baseline", engine="plain", seq_len=1024), basis()).sp == 1
    assert plan_of(case("baseline", seq_len=1024), basis()).sp == 2


def test_a_real_model_is_refused_where_there_is_no_gpu():
    with pytest.raises(
        UserError, match=r"1,\d{3}M parameters with 2 layers, and without a GPU at most 200M .*alst bench tiny"
    ):
        plan_of(case(), basis(recipe="llama8b"))


def test_an_unknown_rung_is_refused_with_those_that_there_are():
    with pytest.raises(UserError, match=r"--rungs quick: is no feature set; use some of baseline, .*recipe"):
        ladder.rungs_of(["quick"])


@pytest.mark.parametrize(
    ("name", "mib", "gpu"),
    [
        ("NVIDIA H200", 143771, Gpu.H200_141GB),
        ("NVIDIA H100 80GB HBM3", 81559, Gpu.H100_80GB),
        ("NVIDIA A100-SXM4-40GB", 40960, Gpu.A100_40GB),
        ("NVIDIA A100-SXM4-80GB", 81920, Gpu.A100_80GB),
        (None, 0, Gpu.CPU),
    ],
)
def test_a_gpu_is_known_by_its_drivers_name(name, mib, gpu):
    assert gpu_of(name, mib) is gpu


def test_a_gpu_without_a_name_in_recipes_is_refused():
    with pytest.raises(UserError, match="this machine has NVIDIA L4, for which recipes have no name"):
        gpu_of("NVIDIA L4", 23034)
