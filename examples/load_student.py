"""Load a converted model with plain transformers and let it write: python examples/load_student.py out/demo/model"""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = sys.argv[1]
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
prompt = tokenizer("The captain looked at the sea and", return_tensors="pt")
torch.manual_seed(0)
written = model.generate(**prompt, max_new_tokens=40, do_sample=True, top_p=0.9, temperature=0.8)
print(f"{type(model).__name__}, {sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters")
print(tokenizer.decode(written[0], skip_special_tokens=True))
