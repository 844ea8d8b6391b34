"""Run in vLLM's environment: load exported students one after the other and print a line of JSON with what vLLM makes of each.

python run_vllm.py "FLAGS of vllm serve" FOLDER/HOST...        with what transformers answers in FOLDER/HOST.json
"""

import gc
import json
import os
import sys
import traceback
from pathlib import Path

os.environ.setdefault(
    "VLLM_ENABLE_V1_MULTIPROCESSING", "0"
)  # one process for all, since starting takes most of the time

os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")  # small models run once each

import vllm
from vllm.distributed import cleanup_dist_env_and_memory


def settings(flags: str) -> dict:
    """The arguments of vllm.LLM that say the same as flags of `vllm serve`, each with a value."""
    words = flags.split()
    return {
        name.removeprefix("--").replace("-", "_"): json.loads(value) if value.startswith("{") else value
        for name, value in zip(words[::2], words[1::2], strict=True)
    }


def answers(folder: str, reference: dict, flags: str) -> dict:
    """What one student writes and gives the likeliest tokens."""
    model = vllm.LLM(
        model=folder, dtype="float32", enforce_eager=True, max_model_len=128, max_logprobs=reference["top"], max_num_seqs=8,
        enable_prefix_caching=False, disable_log_stats=True, **settings(flags),
    )  # fmt: skip
    greedy = model.generate(
        [{"prompt_token_ids": ids} for ids in reference["prompts"]],
        vllm.SamplingParams(temperature=0.0, max_tokens=reference["new"], ignore_eos=True, detokenize=False),
    )
    read = model.generate(
        [{"prompt_token_ids": reference["prompts"][-1]}],
        vllm.SamplingParams(temperature=1.0, max_tokens=1, prompt_logprobs=reference["top"], detokenize=False),
    )
    tops = []
    for entries in read[0].prompt_logprobs[1:]:
        ranked = sorted(entries.items(), key=lambda entry: -entry[1].logprob)[: reference["top"]]
        tops.append({str(i): entry.logprob for i, entry in ranked})
    return {"version": vllm.__version__, "greedy": [list(one.outputs[0].token_ids) for one in greedy], "tops": tops}


def main(flags: str, folders: list[str]) -> None:
    for folder in folders:
        host = Path(folder).name
        print("STARTED " + host, flush=True)
        try:
            answer = answers(folder, json.loads(Path(f"{folder}.json").read_text()), flags)
        except Exception as error:  # whatever a host ends in is what is to be known of it
            place = traceback.extract_tb(error.__traceback__)[-1]
            answer = {"error": f"{type(error).__name__}: {error} ({Path(place.filename).name}:{place.lineno})"[-1500:]}
        print("ANSWER " + json.dumps({"host": host} | answer), flush=True)
        gc.collect()
        cleanup_dist_env_and_memory()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
