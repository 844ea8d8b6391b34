"""Write stored targets as a captured set that DistillKit's trainers read: parquet files and the settings they are packed with."""

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from moe2dense.common.files import whole_folder
from moe2dense.common.progress import Report
from moe2dense.data.blocks import Blocks
from moe2dense.distillation.targets.captured.bits import id_bits, pack
from moe2dense.distillation.targets.captured.log_probs import pack_log_p
from moe2dense.distillation.targets.captured.settings import SETTINGS_FILE, Packing, default_packing, write_packing
from moe2dense.distillation.targets.protocols import Targets, WholeRows
from moe2dense.errors import UserError
from moe2dense.losses.teacher_rows import TeacherRows, TopKRows

_FILE_ROWS = 256
_SCHEMA = pa.schema(
    [
        pa.field("input_ids", pa.list_(pa.uint64())),
        pa.field("compressed_logprobs", pa.list_(pa.list_(pa.uint8()))),
        pa.field("bytepacked_indices", pa.list_(pa.list_(pa.uint8()))),
        pa.field("attention_mask", pa.list_(pa.int64())),
    ]
)


def write_captured(
    targets: Targets,
    blocks: Blocks,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    k: int = 64,
    packing: Packing | None = None,
    overwrite: bool = False,
    progress: Report | None = None,
) -> Packing:
    """Write the k likeliest tokens of `targets` at every position of `blocks` to a new folder; return how they are packed.

    Rows are the blocks without padding, with their documents numbered from 1 as attention_mask. packing: by default one that loses
    little. The tokenizer goes along. Raises UserError for sampled targets, and for those of another temperature than 1.
    """
    rows = targets.batch([0])
    k = rows.ids.shape[1] if isinstance(rows, TopKRows) else k
    vocabulary = max(tokenizer.get_vocab().values()) + 1
    highest = max(vocabulary, int(blocks.input_ids.max()) + 1, rows.vocabulary or 0)
    packing = packing or default_packing(highest, min(k, highest))
    with whole_folder(Path(folder), overwrite) as partial:
        write_packing(partial / SETTINGS_FILE, packing)
        tokenizer.save_pretrained(partial / "tokenizer")
        for start in range(0, len(blocks), _FILE_ROWS):
            chosen = range(start, min(start + _FILE_ROWS, len(blocks)))
            rows_of_file = list(_rows(targets, blocks, chosen, packing))
            table = pa.Table.from_pylist(rows_of_file, schema=_SCHEMA)
            pq.write_table(table, partial / f"data_{start // _FILE_ROWS}.parquet")
            if progress:
                progress("write", chosen.stop, len(blocks))
    return packing


def _rows(targets: Targets, blocks: Blocks, chosen: range, packing: Packing) -> Iterator[dict[str, list]]:
    for i in chosen:
        ids, log_p = likeliest(targets.batch([i]), packing.k)
        real = (
            torch.ones(len(ids), dtype=torch.bool) if blocks.attention_mask is None else blocks.attention_mask[i].bool()
        )
        document = (
            torch.zeros(len(ids), dtype=torch.int64) if blocks.document_ids is None else blocks.document_ids[i].long()
        )
        yield {
            "input_ids": blocks.input_ids[i][real].tolist(),
            "compressed_logprobs": pack_log_p(log_p[real], packing).tolist(),
            "bytepacked_indices": pack(ids[real].numpy(), id_bits(packing.d)).tolist(),
            "attention_mask": (document[real] - int(document[real].min()) + 1).tolist(),
        }


def likeliest(rows: TeacherRows, k: int) -> tuple[Tensor, Tensor]:
    """Return (ids [n, k], log_p [n, k]) of the likeliest tokens, likeliest first. Raises UserError where they are not known."""
    if isinstance(rows, TopKRows):
        if rows.temperature != 1:
            raise UserError(
                f"these targets are of temperature {rows.temperature:g}, and DistillKit reads those of 1; write them again"
            )
        log_p, order = rows.log_p.float().sort(1, descending=True)
        return rows.ids.gather(1, order)[:, :k], log_p[:, :k]
    if not isinstance(rows, WholeRows):
        raise UserError("sampled targets know no likeliest tokens; write targets of another --format")
    top = rows.logits_of(slice(0, len(rows)), torch.float32).log_softmax(-1).topk(k)
    return top.indices, top.values
