"""Write the captured sets of this folder with DistillKit itself, and what its own reader makes of them.

Run in an environment where `distillkit` (commit a61c2e7) can be imported: `python make.py TEACHER OUT`. The reader's values lie in
expected.safetensors beside each set, as ids-0, values-0 and so on by row.
"""

import json
import sys
from pathlib import Path

import torch
import yaml
from distillkit.compression import DistributionQuantizationConfig, LegacyLogitCompressionConfig, LogprobCompressor
from distillkit.pack_logits import pack_pass
from distillkit.sample_common import StreamingParquetWriter, compressed_logit_schema, legacy_compressed_logit_schema
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

TEXT = (
    "The sea was calm that morning, and nobody on the shore had seen the boat.",
    "It is a truth universally acknowledged, that a single man in possession of a good fortune must be in want of a wife.",
    "Call me Ishmael.",
)
PACKINGS = {
    "recommended": {"k": 24, "exact_k": 8, "exact_dtype": "bfloat16", "polynomial_terms": [0, 1, 2, 3, 4, "sqrt"], "residual_bins": []},
    "budget": {"k": 20, "exact_k": 1, "exact_dtype": "bfloat16", "polynomial_terms": [0, 1, "sqrt"], "residual_bins": []},
    "steps": {
        "k": 24, "exact_k": 4, "exact_dtype": "float32", "polynomial_terms": [0, 1, 2], "delta_encoding": True,
        "normalize_t": True,
        "residual_bins": [
            {"scale_dtype": "float16", "element_bits": 5, "num_elements": 11},
            {"scale_dtype": "bfloat16", "element_bits": 3, "num_elements": 5},
        ],
    },
    "bins": {
        "k": 17, "exact_k": 3, "exact_dtype": "float16", "error_diffusion": True, "term_dtype": "float16",
        "residual_bins": [
            {"scale_dtype": "float32", "element_bits": 8, "num_elements": 7},
            {"scale_dtype": "float32", "element_bits": 1, "num_elements": 4},
        ],
    },
    "exact": {"k": 16, "exact_k": 16, "exact_dtype": "float32", "residual_bins": []},
}  # fmt: skip
OLDER = {"k": 24, "exact_k": 8, "polynomial_degree": 4, "with_sqrt_term": True}


def main(teacher: str, out: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32).eval()
    rows = [tokenizer(text)["input_ids"] for text in TEXT]
    with torch.no_grad():  # of the last token the capture has none, as from vLLM
        log_p = [model(torch.tensor([ids])).logits[:, :-1].log_softmax(-1) for ids in rows]
    for name, options in PACKINGS.items():
        settings = DistributionQuantizationConfig(d=len(tokenizer), **{"delta_encoding": False, **options})
        write(out / name, LogprobCompressor(config=settings), rows, log_p, settings, compressed_logit_schema())
    settings = LegacyLogitCompressionConfig(vocab_size=len(tokenizer), **OLDER)
    write(
        out / "older",
        LogprobCompressor(legacy_config=settings),
        rows,
        log_p,
        settings,
        legacy_compressed_logit_schema(),
    )
    whole = [
        {**row, "input_ids": row["input_ids"][: len(row["bytepacked_indices"])]}
        for row in packed_rows(out / "recommended")
    ]
    joined = pack_pass({key: [row[key] for row in whole] for key in whole[0]}, 40)
    import pyarrow as pa
    import pyarrow.parquet as pq

    (out / "joined").mkdir(exist_ok=True)
    pq.write_table(pa.Table.from_pydict(joined), out / "joined" / "data_0.parquet")
    (out / "joined" / "compression_config.yaml").write_text(
        (out / "recommended" / "compression_config.yaml").read_text()
    )


def packed_rows(folder: Path) -> list[dict]:
    import pyarrow.parquet as pq

    return pq.read_table(folder / "data_0.parquet").to_pylist()


def write(folder, compressor, rows, log_p, settings, schema) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    expected = {}
    with StreamingParquetWriter(str(folder), schema=schema, file_max_rows=100, queue_maxsize=100) as writer:
        for i, (ids, row) in enumerate(zip(rows, log_p, strict=True)):
            packed = compressor.compress(row)
            expected[f"ids-{i}"], expected[f"values-{i}"] = (
                t.squeeze(0).contiguous() for t in compressor.decompress_to_sparse(packed)
            )
            expected[f"log_p-{i}"] = row[0].gather(1, expected[f"ids-{i}"])
            writer.write({"input_ids": ids} | {name: t.squeeze(0).tolist() for name, t in packed.items()})
    save_file(
        {name: t.float() if "ids" not in name else t for name, t in expected.items()}, folder / "expected.safetensors"
    )
    (folder / "compression_config.yaml").write_text(yaml.safe_dump(json.loads(settings.model_dump_json())))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
