"""Over how many devices the model is spread, and what runs it there."""

from __future__ import annotations

import attrs

from folo_core.validation import Checked, as_int, integer, text


@attrs.frozen(slots=True, kw_only=True, repr=False)
class ParallelConfig(Checked):
    """Tensor, pipeline and data parallel sizes. Whether they can be served is the executor's to say."""

    tensor_parallel_size: int = attrs.field(default=1, converter=as_int, metadata=integer(low=1))
    """Devices that share each layer."""
    pipeline_parallel_size: int = attrs.field(default=1, converter=as_int, metadata=integer(low=1))
    """Stages of layers, one after another."""
    data_parallel_size: int = attrs.field(default=1, converter=as_int, metadata=integer(low=1))
    """Whole copies of the model."""
    executor: str = attrs.field(
        default="in-process",
        metadata=text(pattern=r"[A-Za-z0-9][\w.:-]*", mend="must be the name of an executor, such as 'in-process'"),
    )
    """Name of an executor plugin."""

    @property
    def world_size(self) -> int:
        """Number of devices in all: the product of the three sizes."""
        return self.tensor_parallel_size * self.pipeline_parallel_size * self.data_parallel_size
