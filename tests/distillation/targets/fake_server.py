"""A server that speaks the dialects of vLLM, SGLang and llama.cpp with the real log-probabilities of a small model."""

import http.server
import json
import threading

import torch


class TeacherServer:
    """Serve `model` as `kind` does.

    `fault(number, path, body)` may return (status, bytes, headers, promised length) for the number-th request that asks for
    log-probabilities. `asked` holds every sequence that was answered, `requests` all paths.
    """

    def __init__(self, model, tokenizer, kind="vllm", fault=lambda *_: None, name="teacher", longest=64, most=1000):
        self.model, self.tokenizer, self.kind, self.fault = model, tokenizer, kind, fault
        self.name, self.longest, self.most = name, longest, most
        self.asked, self.requests, self.keys, self.tries = [], [], [], 0
        self.lock = threading.Lock()
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                outer.requests.append(self.path)
                found = outer.get(self.path)
                self.send(200 if found is not None else 404, json.dumps(found or {"error": "no"}).encode())

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.requests.append(self.path)
                outer.keys.append(self.headers.get("Authorization"))
                with outer.lock:  # one model, one thread
                    if self.path in ("/v1/completions", "/generate", "/completion"):
                        outer.tries += 1
                        if (fault := outer.fault(outer.tries - 1, self.path, body)) is not None:
                            return self.send(*fault)
                    status, answer = outer.post(self.path, body)
                self.send(status, json.dumps(answer).encode())
                return None

            def send(self, status, data, headers=None, length=None):
                self.send_response(status)
                for header, value in (headers or {}).items():
                    self.send_header(header, value)
                self.send_header("Content-Length", str(len(data) if length is None else length))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def get(self, path):
        """The answer to a GET; None for an address that this kind does not have."""
        if path == "/v1/models":
            return {"data": [{"id": self.name, "max_model_len": self.longest}]}
        return {
            "vllm": {"/version": {"version": "0.32.0"}},
            "sglang": {"/get_model_info": {"model_path": "x"}, "/get_server_info": {"version": "0.5.9"}},
            "llama.cpp": {"/props": {"default_generation_settings": {}, "build_info": "b9000"}},
        }[self.kind].get(path)

    def post(self, path, body):
        """(status, answer) to a POST."""
        if path in ("/tokenize", "/v1/tokenize"):
            text = body.get("prompt", body.get("content"))
            return 200, {"tokens": self.tokenizer(text, add_special_tokens=False)["input_ids"]}
        if path in ("/detokenize", "/v1/detokenize"):
            text = self.tokenizer.decode(body["tokens"])
            return 200, {"prompt": text, "text": text, "content": text}
        k = {"/v1/completions": "prompt_logprobs", "/generate": "top_logprobs_num", "/completion": "n_probs"}[path]
        if body[k] > self.most:
            return 400, {
                "error": {"message": f"Requested prompt logprobs of {body[k]}, greater than max allowed: {self.most}"}
            }
        if path == "/v1/completions":
            choices = [self.vllm(i, ids, body["prompt_logprobs"]) for i, ids in enumerate(body["prompt"])]
            return 200, {"choices": choices[::-1]}  # servers need not keep the order
        if path == "/generate":
            return 200, [self.sglang(ids, body["top_logprobs_num"]) for ids in body["input_ids"]]
        return 200, self.llama_cpp(body["prompt"], body["n_probs"])

    @torch.no_grad()
    def log_p(self, ids):
        """Log-probabilities [S, V] after each token."""
        self.asked.append(list(ids))
        return self.model(torch.tensor([ids])).logits[0].double().log_softmax(-1)

    def vllm(self, index, ids, k):
        log_p = self.log_p(ids)
        prompt = [None]
        for token, row in zip(ids[1:], log_p[:-1], strict=True):
            top = row.topk(k)
            entries = {str(i): {"logprob": p, "rank": r + 1} for r, (i, p) in enumerate(pairs(top))}
            entries[str(token)] = {"logprob": float(row[token]), "rank": int((row > row[token]).sum()) + 1}
            prompt.append(entries)
        drawn = int(log_p[-1].argsort()[len(log_p[-1]) // 2])  # an unlikely token may be what is written
        last = {f"token_id:{i}": p for i, p in pairs(log_p[-1].topk(k))} | {
            f"token_id:{drawn}": float(log_p[-1][drawn])
        }
        return {"index": index, "text": "x", "prompt_logprobs": prompt, "logprobs": {"top_logprobs": [last]}}

    def sglang(self, ids, k):
        log_p = self.log_p(ids)
        top = [[[p, i, None] for i, p in pairs(row.topk(k))] for row in log_p]
        given = [[None, ids[0], None], *([float(row[i]), i, None] for i, row in zip(ids[1:], log_p[:-1], strict=True))]
        meta = {"input_token_logprobs": given, "input_top_logprobs": [None, *top[:-1]], "output_top_logprobs": top[-1:]}
        return {"text": "x", "meta_info": meta}

    def llama_cpp(self, ids, k):
        top = [{"id": i, "logprob": p, "token": "x"} for i, p in pairs(self.log_p(ids)[-1].topk(k))]
        return {"content": "a", "completion_probabilities": [{"id": 5, "logprob": -1.0, "top_logprobs": top}]}


def pairs(top):
    return list(zip(top.indices.tolist(), top.values.tolist(), strict=True))
