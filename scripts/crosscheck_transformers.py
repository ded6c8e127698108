#!/usr/bin/env python3
"""Compare the goldens of the six Hugging Face fixtures with transformers, in float64.

    python scripts/crosscheck_transformers.py          # needs torch and transformers; prints the largest deviation

Run once after the fixtures change; models/README.md records the versions and the result.
"""

import json
import os
import sys

import torch
import transformers
from transformers import AutoModelForCausalLM

MODELS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "models")


def deviation(logits, top5):
    return max(abs(logits[row, i].item() - v) for row, best in enumerate(top5) for i, v in best)


def check(folder):
    """The largest deviation; None for a model whose goldens are of another kind (diffusion, vision)."""
    with open(os.path.join(folder, "golden.json"), encoding="utf-8") as f:
        golden = json.load(f)
    if "cases" not in golden:
        return None
    # Eager attention: the other kinds have no float64 or ignore an explicit mask's window.
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager").eval()
    worst = 0.0
    for case in golden["cases"]:
        out = model(torch.tensor([case["ids"]]), output_hidden_states=True)
        logits = out.logits[0]
        worst = max(worst, (logits[-1] - torch.tensor(case["last_logits"], dtype=torch.float64)).abs().max().item())
        worst = max(worst, deviation(logits, case["top5"]))
        ids = list(case["ids"])
        for want in case["greedy"]:
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
            assert ids[-1] == want, (folder, case["name"], len(ids))
        if case["name"] == golden["hidden"]["case"]:
            states = golden["hidden"]["states"]
            # transformers returns the embeddings, every layer but the last, and the normed last one
            for ours, theirs in zip(states[:-2] + states[-1:], out.hidden_states, strict=True):
                worst = max(worst, (theirs[0, -1] - torch.tensor(ours, dtype=torch.float64)).abs().max().item())
    t = golden["tree"]
    for i in range(len(t["ids"])):
        path, j = [], i
        while j >= 0:
            path.insert(0, t["ids"][j])
            j = t["parents"][j]
        logits = model(torch.tensor([t["prefix"] + path])).logits[0, -1:]
        worst = max(worst, deviation(logits, t["top5"][i : i + 1]))
    if "gemma" not in folder and "mistral" not in folder:  # a 4-D mask replaces the causal one in families without windows
        for case in (golden["full"], golden["block"]):
            n, ids = len(case["prefix"]), case["prefix"] + case["ids"]
            visible = torch.ones(len(ids), len(ids), dtype=torch.bool).tril()
            visible[n:] = True
            mask = torch.zeros(1, 1, len(ids), len(ids), dtype=torch.float64).masked_fill(~visible, torch.finfo(torch.float64).min)
            logits = model(torch.tensor([ids]), attention_mask=mask).logits[0, n:]
            worst = max(worst, deviation(logits, case["top5"]))
    return worst


@torch.no_grad()
def main():
    print("torch", torch.__version__, "transformers", transformers.__version__)
    failed = False
    for name in sorted(os.listdir(MODELS)):
        if os.path.exists(os.path.join(MODELS, name, "golden.json")):
            worst = check(os.path.join(MODELS, name))
            if worst is None:
                continue
            failed |= worst > 5e-5
            print(f"{name:14} largest deviation {worst:.1e}", flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
