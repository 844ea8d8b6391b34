"""Load one exported student in llama.cpp (xllamacpp) and print one line of JSON with what it makes of it."""

import importlib.metadata
import json
import sys
from pathlib import Path

from tests.exporting.llama_cpp import LlamaCpp


def main(folder: str, reference: dict) -> None:
    llama = LlamaCpp(next(Path(folder).glob("*.gguf")))
    greedy = [llama.generate(ids, reference["new"])[0] for ids in reference["prompts"]]
    longest = reference["prompts"][-1]
    tops = []
    for end in range(1, len(longest)):
        answer = llama.post(
            "/completion", prompt=longest[:end], n_predict=1, n_probs=reference["top"], cache_prompt=False, temperature=0.0,
            samplers=["top_k"], top_k=1, logit_bias=[[reference["letter"], 1000.0]],
        )  # fmt: skip
        entries = answer["completion_probabilities"][0]["top_logprobs"]
        tops.append({str(entry["id"]): entry["logprob"] for entry in entries})
    answer = {"version": f"xllamacpp {importlib.metadata.version('xllamacpp')}", "greedy": greedy, "tops": tops}
    print("ANSWER " + json.dumps(answer))


if __name__ == "__main__":
    main(sys.argv[1], json.loads(Path(sys.argv[2]).read_text()))
