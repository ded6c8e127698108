#!/usr/bin/env python3
"""Training goldens by PyTorch autograd and torch.optim: tests/golden/train.json, for the six Hugging Face fixtures of models/.

    pip install torch==2.15.0 transformers==5.24.0 numpy && python scripts/train_reference.py

float32 on one CPU thread, eager attention, no dropout; half a minute. Writes the same bytes each time on one machine.

What is computed, for every fixture:

* grads: two separate sequences (no attention across them, positions restart), loss = mean over all 15 labels of the cross-entropy,
  gradient of every tensor. Tied embeddings have one gradient, the sum of both uses.
* lora: ten steps on q, k, v, o, gate, up and down of every layer: y = x W^T (+ bias) + alpha / r * (x A^T) B^T, A [r, in] from a formula
  (`init` in the file), B [out, r] = 0; AdamW on all A and B.
* full: ten steps of AdamW on every tensor of tiny-llama and tiny-qwen3; of SGD with momentum on tiny-llama.

One step, g being the gradient and t = 1, 2, ...:

    norm = sqrt(sum of g^2 over all trained tensors);  g *= min(1, clip / (norm + 1e-6))
    AdamW: w *= 1 - lr * wd;  m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g^2;  w -= lr * (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)
    SGD:   m = g at t = 1, then momentum * m + g;  w -= lr * m

`losses` and `grad_norms` of a run are those before each of the ten steps, norms before clipping. A tensor is recorded as its L2 norm, its sum,
and eight entries: `values` at the flat indices `at`, four spread over the tensor, then the four largest. `float64` beside each record is what the
same computation in float64 changes (transformers' rotations and most norms remain float32): the largest difference of a loss, relative
difference of a gradient norm, and relative L2 difference of a tensor. A tolerance below it asks for luck.

* losses: loss functions on fixed logits [3, 7] in float64, each defined by its `formula`.

Before writing, each loss and the norm of each gradient are compared with scripts/reference.py, which is float64 numpy and has no autograd: the
slope of its loss along a gradient's direction must be that gradient's norm.
"""

import math
import os

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from transformers import AutoModelForCausalLM

import reference
from fixture_files import write_json

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..")
FIXTURES = ["tiny-gemma3", "tiny-llama", "tiny-llama3", "tiny-mistral", "tiny-qwen2", "tiny-qwen3"]
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
STEPS, CLIP = 10, 1.0
LORA = dict(r=4, alpha=8, lr=1e-2, betas=[0.9, 0.95], eps=1e-8, weight_decay=0.01)
ADAMW = dict(lr=1e-3, betas=[0.9, 0.95], eps=1e-8, weight_decay=0.01)
SGD = dict(lr=0.05, momentum=0.9)


def digits(x):
    """Nine significant digits, in any nesting of dicts and lists."""
    if isinstance(x, dict):
        return {k: digits(v) for k, v in x.items()}
    if isinstance(x, (list, tuple)):
        return [digits(v) for v in x]
    return float(f"{x:.9g}") if isinstance(x, float) else x


def batch(vocab):
    return [[(i * 7 + 3) % vocab for i in range(11)], [(i * 5 + 1) % vocab for i in range(6)]]


def load(name, dtype):
    return AutoModelForCausalLM.from_pretrained(os.path.join(ROOT, "models", name), dtype=dtype, attn_implementation="eager").eval()


def loss_of(model):
    rows = batch(model.config.vocab_size)
    total = 0.0
    for ids in rows:
        logits = model(torch.tensor([ids]), use_cache=False).logits[0]
        total = total + F.cross_entropy(logits[:-1], torch.tensor(ids[1:]), reduction="sum")
    return total / sum(len(ids) - 1 for ids in rows)


def record(tensors):
    out = {}
    for name, x in tensors.items():
        x = x.detach().flatten()
        spread = [(2 * k + 1) * x.numel() // 8 for k in range(4)]
        rest = x.abs().index_fill(0, torch.tensor(spread), -1.0)
        at = spread + torch.argsort(rest, descending=True, stable=True)[:4].tolist()
        out[name] = dict(norm=x.double().norm().item(), sum=x.double().sum().item(), at=at, values=x[at].double().tolist())
    return out


def relative(a, b):
    """Largest relative L2 difference of tensors of the same names."""
    return max(((a[n].double() - b[n]).norm() / b[n].norm()).item() for n in b)


# ---------------------------------------------------------------- the three parts on models


def gradients(name, dtype):
    model = load(name, dtype)
    loss = loss_of(model)
    loss.backward()
    return loss.item(), {n: p.grad for n, p in model.named_parameters()}


def train(model, trained, optimiser):
    losses, norms = [], []
    for _ in range(STEPS):
        optimiser.zero_grad()
        loss = loss_of(model)
        loss.backward()
        losses.append(loss.item())
        norms.append(torch.nn.utils.clip_grad_norm_(list(trained.values()), CLIP).item())
        optimiser.step()
    return losses, norms, trained


class Lora(torch.nn.Module):
    def __init__(self, base, layer, module):
        super().__init__()
        self.base, dtype = base, base.weight.dtype
        i, j = torch.arange(LORA["r"], dtype=torch.float64)[:, None], torch.arange(base.in_features, dtype=torch.float64)
        self.a = torch.nn.Parameter((0.05 * torch.sin(1 + 0.37 * i + 0.11 * j + 0.5 * layer + module)).to(dtype))
        self.b = torch.nn.Parameter(torch.zeros(base.out_features, LORA["r"], dtype=dtype))

    def forward(self, x):
        return self.base(x) + LORA["alpha"] / LORA["r"] * (x @ self.a.T @ self.b.T)


def adamw(parameters, lr, betas, eps, weight_decay, **_):
    return torch.optim.AdamW(parameters, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, foreach=False)


def lora(name, dtype):
    model = load(name, dtype).requires_grad_(False)
    trained = {}
    for i, layer in enumerate(model.model.layers):
        for module, target in enumerate(TARGETS):
            block = "self_attn" if module < 4 else "mlp"
            parent = getattr(layer, block)
            adapter = Lora(getattr(parent, target), i, module)
            setattr(parent, target, adapter)
            trained[f"model.layers.{i}.{block}.{target}.lora_A.weight"] = adapter.a
            trained[f"model.layers.{i}.{block}.{target}.lora_B.weight"] = adapter.b
    return train(model, trained, adamw(trained.values(), **LORA))


def full_adamw(name, dtype):
    model = load(name, dtype)
    return train(model, dict(model.named_parameters()), adamw(model.parameters(), **ADAMW))


def full_sgd(name, dtype):
    model = load(name, dtype)
    return train(model, dict(model.named_parameters()), torch.optim.SGD(model.parameters(), foreach=False, **SGD))


def run_record(run, name):
    losses, norms, tensors = run(name, torch.float32)
    wide_losses, wide_norms, wide = run(name, torch.float64)
    wider = dict(
        loss=max(abs(a - b) for a, b in zip(losses, wide_losses)),
        grad_norm=max(abs(a / b - 1) for a, b in zip(norms, wide_norms)),
        tensor=relative(tensors, wide),
    )
    return dict(losses=losses, grad_norms=norms, tensors=record(tensors), float64=wider)


# ---------------------------------------------------------------- the check against numpy


def check(name, loss, grads):
    """Largest differences of a loss and of a gradient's norm (relative) from the float64 numpy forward."""
    model = reference.load(os.path.join(ROOT, "models", name))

    def numpy_loss():
        total = count = 0
        for ids in batch(model.c["vocab_size"]):
            logits = model.forward(ids)[0][:-1]
            top = logits.max(1)
            total += (np.log(np.exp(logits - top[:, None]).sum(1)) + top - logits[np.arange(len(ids) - 1), ids[1:]]).sum()
            count += len(ids) - 1
        return total / count

    assert set(grads) == set(model.w), (name, set(grads) ^ set(model.w))
    off, worst = abs(numpy_loss() - loss), 0.0
    for tensor, g in grads.items():
        g, w = g.double().numpy(), model.w[tensor]
        norm = np.linalg.norm(g)
        step = 1e-4 * g / norm
        ends = []
        for sign in (1, -1):
            model.w[tensor] = w + sign * step
            ends.append(numpy_loss())
        model.w[tensor] = w
        worst = max(worst, abs((ends[0] - ends[1]) / 2e-4 / norm - 1))
    assert off < 1e-5 and worst < 1e-4, (name, off, worst)
    return off, worst


# ---------------------------------------------------------------- loss functions


def losses():
    i, j = torch.arange(3, dtype=torch.float64)[:, None], torch.arange(7, dtype=torch.float64)
    z = digits((2.0 * torch.sin(1.3 * i + 0.9 * j + 0.4)).tolist())
    t = digits((1.5 * torch.cos(0.7 * i - 1.1 * j + 0.2)).tolist())
    y, other = [2, 0, 1], [5, 3, 6]  # y is the argmax of z in some rows only
    pairs = dict(chosen=[-4.0, -7.5, -3.25], rejected=[-5.0, -6.0, -9.5], reference_chosen=[-4.5, -7.0, -6.0], reference_rejected=[-4.75, -6.5, -5.0])
    wide = lambda x: torch.tensor(x, dtype=torch.float64)
    logits, teacher = wide(z), wide(t)
    p, labels = teacher.softmax(1), torch.tensor(y)
    beta, tau = 0.1, 0.5
    top3 = torch.where(p >= p.topk(3, 1).values[:, -1:], p, 0.0)
    right = logits.argmax(1) == labels
    assert 0 < right.sum() < 3
    log_q = lambda x: x.log_softmax(1)
    entropy = lambda x: -((x / tau).softmax(1) * (x / tau).log_softmax(1)).sum(1)
    chosen = lambda x, ids: log_q(x)[torch.arange(3), torch.tensor(ids)].sum()
    on_pairs = lambda policy, rejected: -F.logsigmoid(
        beta * (policy - rejected - wide(pairs["reference_chosen"]) + wide(pairs["reference_rejected"]))
    ).mean()
    table = {
        "hard_ce": ("mean over rows of -ln q[y]", lambda x: -log_q(x)[torch.arange(3), labels].mean(), [z]),
        "soft_ce": ("mean over rows of -sum p ln q", lambda x: -(p * log_q(x)).sum(1).mean(), [z]),
        "soft_ce_top3": ("soft_ce with all but the three largest of each row of p set to 0, not renormalised", lambda x: -(top3 * log_q(x)).sum(1).mean(), [z]),
        "forward_kl": ("mean over rows of sum p ln(p / q)", lambda x: (p * (p.log() - log_q(x))).sum(1).mean(), [z]),
        "reverse_kl": ("mean over rows of sum q ln(q / p)", lambda x: (x.softmax(1) * (log_q(x) - p.log())).sum(1).mean(), [z]),
        "total_variation": ("mean over rows of 1/2 sum |p - q|", lambda x: 0.5 * (p - x.softmax(1)).abs().sum(1).mean(), [z]),
        "smooth_l1": ("mean over all entries of d^2 / 2 if |d| < 1 else |d| - 1/2, d = z - t", lambda x: F.smooth_l1_loss(x, teacher), [z]),
        "entropy": ("mean over rows of -sum u ln u, u = softmax(z / tau)", lambda x: entropy(x).mean(), [z]),
        "entropy_where_right": ("entropy, mean over the rows whose argmax of z is y", lambda x: entropy(x)[right].mean(), [z]),
        "dpo": (
            "mean over pairs of -ln sigmoid(beta (chosen - rejected - (reference_chosen - reference_rejected))); gradients of chosen, rejected",
            on_pairs,
            [pairs["chosen"], pairs["rejected"]],
        ),
        "dpo_logits": (
            "one pair, policy log-probabilities summed over rows: chosen = sum ln softmax(z)[y], rejected = sum ln softmax(t)[y_rejected], "
            "reference_chosen = -8, reference_rejected = -6; gradients of z, t",
            lambda x, r: -F.logsigmoid(beta * (chosen(x, y) - chosen(r, other) + 8.0 - 6.0)),
            [z, t],
        ),
        "bradley_terry": (
            "mean over pairs of -ln sigmoid(chosen - rejected), both taken as rewards; gradients of chosen, rejected",
            lambda a, b: -F.logsigmoid(a - b).mean(),
            [pairs["chosen"], pairs["rejected"]],
        ),
    }
    out = dict(z=z, t=t, y=y, y_rejected=other, beta=beta, tau=tau, pairs=pairs, symbols="q = softmax(z), p = softmax(t), by rows; p is constant")
    for name, (formula, f, inputs) in table.items():
        inputs = [wide(x).requires_grad_() for x in inputs]
        value = f(*inputs)
        value.backward()
        grads = [x.grad.tolist() for x in inputs]
        out[name] = dict(formula=formula, value=value.item(), grad=grads if len(grads) > 1 else grads[0])
    return out


def main():
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    models = {}
    for name in FIXTURES:
        loss, grads = gradients(name, torch.float32)
        off, worst = check(name, loss, grads)
        wide_loss, wide = gradients(name, torch.float64)
        vocab = load(name, torch.float32).config.vocab_size
        m = dict(sequences=batch(vocab))
        m["grads"] = dict(loss=loss, tensors=record(grads), float64=dict(loss=abs(loss - wide_loss), tensor=relative(grads, wide)))
        m["lora"] = run_record(lora, name)
        if name in ("tiny-llama", "tiny-qwen3"):
            m["full_adamw"] = run_record(full_adamw, name)
        if name == "tiny-llama":
            m["full_sgd"] = run_record(full_sgd, name)
        assert math.isclose(m["lora"]["losses"][0], loss, rel_tol=1e-6)
        models[name] = m
        moved = {k: f"{v['losses'][0]:.4f} -> {v['losses'][-1]:.4f}" for k, v in m.items() if "losses" in v}
        noise = {k: {n: f"{x:.1e}" for n, x in v["float64"].items()} for k, v in m.items() if k != "sequences"}
        print(f"{name}: from numpy: loss {off:.1e}, gradient norms {worst:.1e}; {moved}; float64 {noise}", flush=True)
    golden = dict(
        source="scripts/train_reference.py",
        torch=torch.__version__.split("+")[0],
        transformers=transformers.__version__,
        steps=STEPS,
        clip=CLIP,
        lora=dict(LORA, targets=TARGETS, init="A[i][j] = 0.05 sin(1 + 0.37 i + 0.11 j + 0.5 layer + index in targets), B = 0"),
        full_adamw=ADAMW,
        full_sgd=SGD,
        models=models,
        losses=losses(),
    )
    path = os.path.join(ROOT, "tests", "golden", "train.json")
    write_json(path, digits(golden))
    print(os.path.getsize(path), "bytes")


if __name__ == "__main__":
    main()
