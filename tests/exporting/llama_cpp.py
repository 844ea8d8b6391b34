"""A real llama.cpp build behind its own HTTP interface, in full precision."""

import json
import urllib.request

import torch


class LlamaCpp:
    """Loads a GGUF file; `tokenize` and `next_log_probs` go through llama.cpp."""

    def __init__(self, path, context=256):
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx, params.n_parallel, params.n_batch, params.n_ubatch = context, 1, context, context
        params.warmup, params.verbosity = False, -1
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        self.server = xllamacpp.Server(params)

    def post(self, path, **body):
        request = urllib.request.Request(
            self.server.listening_address + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        return json.loads(urllib.request.urlopen(request, timeout=60).read())

    def tokenize(self, text):
        return self.post("/tokenize", content=text, add_special=True)["tokens"]

    def generate(self, ids, tokens, vocabulary=1):
        """Greedy ids, and the log-probabilities [steps, V] they were chosen from (a step inside a character has none)."""
        answer = self.post(
            "/completion", prompt=list(map(int, ids)), n_predict=tokens, temperature=0.0, n_probs=vocabulary,
            cache_prompt=False, ignore_eos=False, samplers=["top_k"], top_k=1, return_tokens=True,
        )  # fmt: skip
        rows = torch.full((len(answer["completion_probabilities"]), vocabulary), float("-inf"), dtype=torch.float64)
        for row, step in zip(rows, answer["completion_probabilities"], strict=True):
            for entry in step["top_logprobs"]:
                if vocabulary > 1:
                    row[entry["id"]] = entry["logprob"]
        return answer["tokens"], rows
