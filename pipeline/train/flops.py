"""Model FLOPs of the steps of a run, for its MFU: of the real model, and of the documents that it really trains on."""

from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedModel

from pipeline.data.loader import PackedLoader, StepBatch
from pipeline.model.anatomy import matmul_parameters
from pipeline.plan.documents import DocumentMix
from pipeline.plan.flops import model_flops, seen_keys
from pipeline.plan.job import JobPlan
from pipeline.plan.model_shape import APPROXIMATE, ModelShape, shape_of
from pipeline.plan.time import step_seconds


@dataclass(frozen=True)
class StepFlops:
    """The model FLOPs of steps, by the planner's own function."""

    shape: ModelShape
    matmul_parameters: int

    @classmethod
    def of(cls, model: PreTrainedModel) -> "StepFlops | None":
        """The real model's; None where neither its linear maps nor its config tell how many of its experts a token
        meets."""
        shape = shape_of(model.config.get_text_config().to_dict())
        if shape.num_experts and shape.model_type in APPROXIMATE:
            return None
        counted = shape.matmul_parameters if shape.num_experts else matmul_parameters(model)
        return None if counted is None else cls(shape, counted)

    def of_step(self, batch: StepBatch, loader: PackedLoader) -> int:
        """Forward and backward of the whole global batch, over all ranks."""
        return model_flops(
            self.shape,
            tokens=batch.tokens,
            sum_len_squared=batch.sum_len_squared,
            sum_windowed=self._windowed(batch, loader),
            matmul_parameters=self.matmul_parameters,
        )

    def hardware_of_step(self, batch: StepBatch, loader: PackedLoader, plan: JobPlan) -> float | None:
        """With what runs again in backward, as the planner counts it; None where no peak is known, on a CPU."""
        samples = len(batch.samples)
        full = round(batch.sum_len_squared / samples)
        windowed = self._windowed(batch, loader)
        mean = DocumentMix(full, full if windowed is None else round(windowed / samples), "the step's own")
        seconds = step_seconds(plan, mean)
        return None if seconds is None else seconds.hardware_flops

    def _windowed(self, batch: StepBatch, loader: PackedLoader) -> int | None:
        """Of the step's documents, whose lengths matter only where there is a window."""
        if self.shape.window is None:
            return None
        samples = [loader.dataset.sample(sample) for sample in batch.samples]
        if loader.cross_document_attention:
            return seen_keys([sample.n_tokens for sample in samples], self.shape.window)
        lengths = [int(length) for sample in samples for length in np.diff(sample.cu_seqlens)]
        return seen_keys(lengths, self.shape.window)
