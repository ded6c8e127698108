#!/usr/bin/env python3
"""Time training steps of a Llama-form model in PyTorch on the CPU: the peer of `quadriga train`.

    python scripts/train_peers.py MODEL_HF_DIR                      # four cases, a JSON line each
    python scripts/train_peers.py MODEL_HF_DIR --stock              # as transformers and PEFT come: sdpa, their loss, no compilation
    python scripts/train_peers.py MODEL_HF_DIR --cases lora-bf16 --set loss=hf --set compile=0

Needs torch, transformers and, for --stock, peft. A case runs in a process of its own, so that peak_mb is its own.

One step is: forward, mean cross-entropy of all tokens but the first, backward, AdamW. LoRA has rank 8 on the seven linear layers of every block.
ms and forward_ms (forward with loss, no gradients) are medians of --steps after two warm-ups; spread_ms is the fastest and the slowest step.
Weights, activations, adapters and optimiser state have the type in the case's name.

Settings (--set NAME=VALUE; the default first):
  lora       own (a module of this file), peft
  adapter    same (type as the weights), f32
  loss       direct (cross-entropy of the logits in their own type), hf (of float32 copies), chunked and compact (F.linear_cross_entropy)
  attention  grouped (plain products, one for all queries of a key/value head; the CPU's flash kernel is slow backwards), sdpa, eager
  optimiser  fused, foreach, plain
  compile    1 (torch.compile of the layers; needs a C++ compiler), 0
  malloc     1 (the C library keeps freed blocks), 0
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AutoModelForCausalLM

DEFAULTS = dict(lora="own", adapter="same", loss="direct", attention="grouped", optimiser="fused", compile=1, malloc=1)
STOCK = dict(lora="peft", adapter="same", loss="hf", attention="sdpa", optimiser="fused", compile=0, malloc=0)
CASES = ["lora-f32", "lora-bf16", "full-f32", "full-bf16"]
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANK, ALPHA = 8, 16
WARMUPS = 2


class Lora(torch.nn.Module):
    def __init__(self, base, dtype):
        super().__init__()
        self.base = base
        self.a = torch.nn.Parameter(torch.randn(RANK, base.in_features, dtype=dtype) / RANK)
        self.b = torch.nn.Parameter(torch.zeros(base.out_features, RANK, dtype=dtype))

    def forward(self, x):
        h = F.linear(x.to(self.a.dtype), self.a) * (ALPHA / RANK)
        return self.base(x) + F.linear(h, self.b).to(x.dtype)


def grouped_attention(module, q, k, v, mask, scaling, **_):
    """Causal attention by plain matrix products, the queries of a key/value head in one."""
    b, heads, n, d = q.shape
    kv = k.shape[1]
    q = (q * scaling).reshape(b * kv, heads // kv * n, d)
    scores = torch.bmm(q, k.reshape(b * kv, n, d).transpose(1, 2)).view(b, heads, n, n)
    if not hasattr(module, "hidden"):
        module.hidden = torch.full((n, n), float("-inf"), dtype=q.dtype).triu(1)
    p = (scores + module.hidden).softmax(-1)
    out = torch.bmm(p.view(b * kv, heads // kv * n, n), v.reshape(b * kv, n, d))
    return out.view(b, heads, n, d).transpose(1, 2).contiguous(), None


def build(args, case, s):
    AttentionInterface.register("grouped", grouped_attention)
    dtype = torch.float32 if case.endswith("f32") else torch.bfloat16
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype, attn_implementation=s["attention"])
    model.config.use_cache = False
    if case.startswith("lora"):
        adapter_dtype = dtype if s["adapter"] == "same" else torch.float32
        if s["lora"] == "peft":
            from peft import LoraConfig, get_peft_model

            model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS), autocast_adapter_dtype=s["adapter"] != "same")
            inner = model.base_model.model
        else:
            model.requires_grad_(False)
            for layer in model.model.layers:
                for t in TARGETS:
                    parent = layer.self_attn if hasattr(layer.self_attn, t) else layer.mlp
                    setattr(parent, t, Lora(getattr(parent, t), adapter_dtype))
            inner = model
    else:
        inner = model
    ids = torch.tensor([[(i * 7919 + 13) % model.config.vocab_size for i in range(args.seq)]])
    labels = torch.cat([ids[0, 1:], torch.tensor([-100])])

    def loss():
        if s["loss"] == "hf":
            return model(ids, labels=ids, use_cache=False).loss
        if s["loss"] == "direct":
            return F.cross_entropy(model(ids, use_cache=False).logits[0], labels)
        x = inner.model(ids, use_cache=False).last_hidden_state[0]
        options = torch.nn.LinearCrossEntropyOptions() if s["loss"] == "chunked" else torch.nn.LinearCrossEntropyOptions(acc_policy="compact")
        return F.linear_cross_entropy(x, inner.lm_head.weight, labels, options=options)

    if s["compile"]:
        for layer in inner.model.layers:
            layer.compile()
    trained = [p for p in model.parameters() if p.requires_grad]
    how = dict(fused=dict(fused=True), foreach=dict(foreach=True), plain=dict(foreach=False))[s["optimiser"]]
    return loss, trained, torch.optim.AdamW(trained, lr=1e-4, **how)


def rss_mb():
    with open("/proc/self/status", encoding="ascii") as f:
        return next(int(line.split()[1]) for line in f if line.startswith("VmRSS")) / 1024


def measure(args, case, s):
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    imported = rss_mb()
    loss, trained, optimiser = build(args, case, s)

    def forward():
        with torch.no_grad():
            return loss().item()

    def step():
        optimiser.zero_grad()
        value = loss()
        value.backward()
        optimiser.step()
        return value.item()

    def timed(f):
        times = []
        for _ in range(WARMUPS + args.steps):
            start = time.perf_counter()
            value = f()
            times.append(1000 * (time.perf_counter() - start))
        return times[WARMUPS:], value

    loaded, first = rss_mb(), forward()
    ms, last = timed(step)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    forward_ms = timed(forward)[0]
    middle = statistics.median(ms)
    return dict(
        case=case,
        ms=round(middle, 1),
        tokens_per_s=round(1000 * args.seq / middle, 1),
        forward_ms=round(statistics.median(forward_ms), 1),
        peak_mb=round(peak),
        spread_ms=[round(min(ms), 1), round(max(ms), 1)],
        loaded_mb=round(loaded),
        imported_mb=round(imported),
        trained=sum(p.numel() for p in trained),
        first_loss=round(first, 4),
        last_loss=round(last, 4),
        seq=args.seq,
        threads=args.threads,
        settings=s,
        torch=torch.__version__,
    )


def main():
    p = argparse.ArgumentParser()
    p.add_argument("model")
    p.add_argument("--seq", type=int, default=512)
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--steps", type=int, default=5)
    p.add_argument("--cases", default=",".join(CASES))
    p.add_argument("--stock", action="store_true")
    p.add_argument("--set", action="append", default=[])
    p.add_argument("--json")
    p.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = p.parse_args()
    rows = []
    for case in args.cases.split(","):
        s = dict(STOCK if args.stock else DEFAULTS)
        for key, value in (x.split("=") for x in args.set):
            s[key] = type(s[key])(value)
        if args.child:
            print(json.dumps(measure(args, case, s)))
            continue
        env = dict(os.environ, OMP_NUM_THREADS=str(args.threads), MKL_NUM_THREADS=str(args.threads), HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error")
        if s["malloc"]:
            # Keep large blocks instead of giving them back and faulting them in again each step.
            env |= dict(MALLOC_MMAP_THRESHOLD_=str(1 << 40), MALLOC_TRIM_THRESHOLD_=str(1 << 40), MALLOC_TOP_PAD_=str(1 << 26))
        command = [sys.executable, os.path.abspath(__file__), args.model, "--child", "--cases", case]
        command += [f"--{k}={getattr(args, k)}" for k in ("seq", "threads", "steps")] + [f"--set={k}={v}" for k, v in s.items()]
        out = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True, timeout=170).stdout
        rows.append(json.loads(out.strip().splitlines()[-1]))
        print(json.dumps(rows[-1]), flush=True)
    if args.json:
        with open(args.json, "w", encoding="utf-8") as f:
            json.dump(rows, f, indent=1)


if __name__ == "__main__":
    main()
