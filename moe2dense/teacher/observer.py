"""Watch a teacher while it streams."""

from torch import Tensor

from moe2dense.teacher.layer_pass import LayerPass
from moe2dense.teacher.skeleton import Skeleton


class Observer:
    """Methods that are called as the teacher streams; override what is needed.

    A long input is run as several macro-batches: `layer` then comes once per layer and macro-batch.
    """

    def begin(self, teacher: Skeleton, tokens: int) -> None:
        """Prepare, before anything is read. `tokens`: real tokens to come."""

    def expert(self, layer: LayerPass, e: int, rows: Tensor, weights: Tensor, hidden: Tensor, output: Tensor) -> None:
        """Take one expert on the tokens routed to it: rows [n] (flat token index), weights [n], hidden [n, F], output [n, H].

        The block's output is the sum of weights * output over experts, plus what is shared. Where a family scales the expert's input
        instead (llama4), hidden and output belong to the scaled input and weights are ones. hidden and output lie in memory that the
        next expert overwrites: keep copies.
        """

    def wants_experts(self) -> bool:
        """Return whether `expert` is to be called; computing every expert's activations apart costs a little."""
        return type(self).expert is not Observer.expert

    def layer(self, layer: LayerPass) -> None:
        """Take a layer, its y and hidden_out final and its weights still in memory."""

    def end(self) -> None:
        """Finish, after the last layer."""
