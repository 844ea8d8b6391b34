"""Ask a served teacher while the student trains: its answers on some blocks, in memory."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from moe2dense.common.http import RequestFailed
from moe2dense.data.blocks import Blocks
from moe2dense.distillation.targets.served.rows import answers_of, sequences_of
from moe2dense.distillation.targets.served.server import TeacherServer, failure
from moe2dense.losses.teacher_rows import TopKRows


@dataclass
class TopKTargets:
    """The k likeliest tokens at every position of N blocks, in memory: ids [N, S, k], log_p [N, S, k], at temperature 1."""

    ids: Tensor
    log_p: Tensor

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, rows: slice) -> "TopKTargets":
        return TopKTargets(self.ids[rows], self.log_p[rows])

    def batch(self, indices: Sequence[int]) -> TopKRows:
        """Return the teacher at every position of some blocks, in their order."""
        rows = list(indices)
        return TopKRows(self.ids[rows].flatten(0, 1).long(), self.log_p[rows].flatten(0, 1).float())


def ask_targets(server: TeacherServer, blocks: Blocks) -> TopKTargets:
    """Return a served teacher's answers on all blocks. Raises UserError for a server that fails for good."""
    sequences = sequences_of(blocks)
    try:
        answers = [server.likeliest([ids])[0] for _, _, ids in sequences]
    except RequestFailed as error:
        raise failure(server, error, "--resume goes on from the last checkpoint") from None
    rows = answers_of(blocks, sequences, answers, server.k)
    return TopKTargets(rows.ids, rows.log_p)
