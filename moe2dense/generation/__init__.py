"""Text written by a teacher: streamed decoding, sampling, filters, and datasets with provenance."""

from moe2dense.generation.sampling import Sampling
from moe2dense.generation.streamed import Completion, generate

__all__ = ["Completion", "Sampling", "generate"]
