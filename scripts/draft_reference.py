#!/usr/bin/env python3
"""Draft heads for models/tiny-llama: random weights under the published names, and goldens, in models/tiny-drafts/.

    python scripts/draft_reference.py

float64 numpy and no code of the engine's; writes the same bytes each time. Every pass starts from nothing: a drafted token is one more
row, which sees all committed rows and the drafted ones above it.

`golden.json` beside each head: `prompt` is a text whose last token the target has not read; `root` the logarithms of the head's
probabilities of what follows it, in the order of `tokens` (of all tokens where that is missing); `nodes` a tree of drafted tokens, first
a chain of the likeliest, then more children of the root, with `parents` (-1: the root), and `rows` is for each of them what `root` is;
empty where the head says nothing.
"""

import json
import os

import numpy as np

import reference
from fixture_files import encode_plain, write_json

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "models")
CHAIN, WIDE = 3, 5
PROMPT = [(i * i * 7 + 11 * i + 3) % 381 + 3 for i in range(71)]  # more than the engine reads at a time


def target():
    return reference.load(os.path.join(ROOT, "tiny-llama"))


def log_softmax(z):
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def silu(x):
    return x / (1 + np.exp(-x))


# ---------------------------------------------------------------- one decoder layer


def llama(config, weights, prefix):
    """The layer `prefix.*` as layer 0 of a model."""
    return reference.Model(config, {f"model.layers.0.{n[len(prefix) + 1:]}": w for n, w in weights.items() if n.startswith(prefix + ".")})


def run_layer(m, x, s, positions, visible):
    """x plus attention over s, plus the MLP."""
    x = x + m.attention(s, 0, positions, visible)
    y = m.norm(x, "model.layers.0.post_attention_layernorm")
    p = "model.layers.0.mlp."
    return x + m.linear(silu(m.linear(y, p + "gate_proj")) * m.linear(y, p + "up_proj"), p + "down_proj")


def rms(x, g, eps):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * g


# ---------------------------------------------------------------- heads: rows of a text and of drafted tokens to logits


class Recurrent:
    """EAGLE and EAGLE-3: a row is a feature g and the token behind it."""

    def __init__(self, t, config, weights, prefix):
        self.t, self.c, self.w = t, config, weights
        self.layer = llama(dict(rope_theta=10_000.0) | config, weights, prefix)
        self.embed = t.w["model.embed_tokens.weight"]

    def rows(self, prompt, nodes, parents):
        """Logits behind the prompt and behind each node."""
        hidden = self.t.forward(prompt[:-1])[1]
        g, tokens = self.features(hidden), list(prompt[1:])
        n = len(tokens)
        positions, visible = list(range(n)), np.tri(n, dtype=bool)
        for token, parent in zip(nodes, parents):
            out = self.outputs(g, tokens, positions, visible)
            above = n - 1 if parent < 0 else n + parent
            k = len(tokens)
            wider = np.zeros((k + 1, k + 1), bool)
            wider[:k, :k] = visible
            wider[k, :k], wider[k, k] = visible[above], True
            g, tokens, visible = np.concatenate([g, out[above : above + 1]]), tokens + [token], wider
            positions = positions + [positions[above] + 1]
        return self.logits(self.outputs(g, tokens, positions, visible)[n - 1 :])

    def outputs(self, g, tokens, positions, visible):
        x, s = self.enter(self.embed[np.array(tokens)], g)
        return run_layer(self.layer, x, s, np.array(positions), visible)


class Eagle3(Recurrent):
    def __init__(self, t, config, weights):
        super().__init__(t, config, weights, "midlayer")
        self.tokens = np.arange(len(weights["d2t"])) + weights["d2t"]

    def features(self, hidden):
        return np.concatenate([hidden[i] for i in self.c["taps"]], -1) @ self.w["fc.weight"].T

    def enter(self, e, g):
        eps = self.c["rms_norm_eps"]
        e, h = rms(e, self.w["midlayer.input_layernorm.weight"], eps), rms(g, self.w["midlayer.hidden_norm.weight"], eps)
        return g, np.concatenate([e, h], -1)

    def logits(self, o):
        return rms(o, self.w["norm.weight"], self.c["rms_norm_eps"]) @ self.w["lm_head.weight"].T


class Eagle(Recurrent):
    tokens = None

    def __init__(self, t, config, weights):
        super().__init__(t, config, weights, "layers.0")

    def features(self, hidden):
        return hidden[-1]

    def enter(self, e, h):
        x = np.concatenate([e, h], -1) @ self.w["fc.weight"].T + self.w["fc.bias"]
        return x, x

    def logits(self, o):
        return o @ self.embed.T


class Hydra:
    tokens = None

    def __init__(self, t, config, weights):
        self.t, self.c, self.w = t, config, weights
        self.prefix = llama(t.c, weights, "prefix_embeding_layer.layers.0")
        self.heads, self.embed = config["hydra_num_heads"], t.w["model.embed_tokens.weight"]

    def linear(self, x, name):
        return x @ self.w[name + ".weight"].T + self.w[name + ".bias"]

    def rows(self, prompt, nodes, parents):
        h = self.t.forward(prompt[:-1])[1][-1]
        n, eps = len(h), self.t.c["rms_norm_eps"]
        s = self.prefix.norm(h, "model.layers.0.input_layernorm")
        x = run_layer(self.prefix, h, s, np.arange(n), np.tri(n, dtype=bool))
        e = rms(x, self.w["prefix_embeding_layer.norm.weight"], eps)[-1]
        out = []
        for node in range(-1, len(nodes)):
            path = []
            while node >= 0:
                path.insert(0, nodes[node])
                node = parents[node]
            i = len(path)
            if i == self.heads:
                out.append([])
                continue
            u = np.concatenate([e] + [self.embed[token] for token in [prompt[-1]] + path])
            p = f"hydra_mlp.{i}"
            v = self.linear(u, p + ".1.res_connection") + silu(self.linear(u, p + ".1.linear"))
            for _ in range(1, self.c["hydra_num_layers"]):
                v = v + silu(self.linear(v, p + ".3.linear"))
            out.append(self.linear(v, f"hydra_lm_head.{i}.1"))
        return out


class Medusa:
    tokens = None

    def __init__(self, t, config, weights):
        self.t, self.c, self.w = t, config, weights
        self.heads = config["medusa_num_heads"]

    def rows(self, prompt, nodes, parents):
        h = self.t.forward(prompt[:-1])[1][-1][-1]
        out = []
        for node in range(-1, len(nodes)):
            i = 0
            while node >= 0:
                i, node = i + 1, parents[node]
            if i == self.heads:
                out.append([])
                continue
            v, p = h, f"medusa_head.{i}"
            for j in range(self.c["medusa_num_layers"]):
                v = v + silu(v @ self.w[f"{p}.{j}.linear.weight"].T + self.w[f"{p}.{j}.linear.bias"])
            out.append(v @ self.w[f"{p}.{self.c['medusa_num_layers']}.weight"].T)
        return out


# ---------------------------------------------------------------- random heads


class Random:
    def __init__(self, seed):
        self.rng = np.random.default_rng(seed)

    def matrix(self, rows, cols, gain=1.0):
        return self.rng.standard_normal((rows, cols)) * gain / cols**0.5

    def vector(self, n, mean=1.0, spread=0.2):
        return mean + spread * self.rng.standard_normal(n)


def layer_tensors(r, prefix, c, inputs, gain=5):
    d, f, hd = c["hidden_size"], c["intermediate_size"], c["head_dim"]
    q, kv = c["num_attention_heads"] * hd, c["num_key_value_heads"] * hd
    p = prefix + "."
    return {
        p + "self_attn.q_proj.weight": r.matrix(q, inputs, 2),
        p + "self_attn.k_proj.weight": r.matrix(kv, inputs, 2),
        p + "self_attn.v_proj.weight": r.matrix(kv, inputs),
        p + "self_attn.o_proj.weight": r.matrix(d, q, gain),
        p + "post_attention_layernorm.weight": r.vector(d),
        p + "mlp.gate_proj.weight": r.matrix(f, d),
        p + "mlp.up_proj.weight": r.matrix(f, d),
        p + "mlp.down_proj.weight": r.matrix(d, f, gain),
    }


def layer_config(t, **more):
    return dict(
        architectures=["LlamaForCausalLM"],
        model_type="llama",
        hidden_size=t.c["hidden_size"],
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        hidden_act="silu",
        rms_norm_eps=1e-5,
        vocab_size=t.c["vocab_size"],
    ) | more


def make_eagle3(t):
    r, size, vocab, d = Random(3), 48, t.c["vocab_size"], t.c["hidden_size"]
    c = layer_config(t, draft_vocab_size=size, rope_theta=500.0, taps=[1, 2, 3], rms_norm_eps=1e-6)
    ids = np.sort(r.rng.choice(vocab, size, replace=False))
    marked = np.zeros(vocab, bool)
    marked[ids] = True
    w = {"fc.weight": r.matrix(d, 3 * d)} | layer_tensors(r, "midlayer", c, 2 * d)
    w |= {f"midlayer.{n}.weight": r.vector(d) for n in ("input_layernorm", "hidden_norm")}
    w |= {"norm.weight": r.vector(d), "lm_head.weight": r.matrix(size, d, 3), "d2t": ids - np.arange(size), "t2d": marked}
    return Eagle3, c, w, "F32"


def make_eagle(t):
    r, d = Random(1), t.c["hidden_size"]
    c = layer_config(t, bias=True)  # no rope_theta: 10,000
    w = {"fc.weight": r.matrix(d, 2 * d, 0.7), "fc.bias": r.vector(d, 0.0)} | layer_tensors(r, "layers.0", c, d, 1)
    return Eagle, c, w, "BF16"


def make_hydra(t):
    r, d, vocab = Random(2), t.c["hidden_size"], t.c["vocab_size"]
    c = dict(hydra_num_heads=3, hydra_num_layers=4, hydra_head_arch="prefix-mlp", grounded_heads=True)
    shape = dict(head_dim=d // t.c["num_attention_heads"]) | t.c
    prefix = "prefix_embeding_layer.layers.0"
    w = layer_tensors(r, prefix, shape, d) | {f"{prefix}.input_layernorm.weight": r.vector(d), "prefix_embeding_layer.norm.weight": r.vector(d)}
    for i in range(c["hydra_num_heads"]):
        for name, inputs in (("1.res_connection", (i + 2) * d), ("1.linear", (i + 2) * d), ("3.linear", d)):
            w[f"hydra_mlp.{i}.{name}.weight"] = r.matrix(d, inputs)
            w[f"hydra_mlp.{i}.{name}.bias"] = r.vector(d, 0.0)
        w[f"hydra_lm_head.{i}.1.weight"] = r.matrix(vocab, d, 2)
        w[f"hydra_lm_head.{i}.1.bias"] = r.vector(vocab, 0.0)
    return Hydra, c, w, "F16"


def make_medusa(t):
    r, d, vocab = Random(4), t.c["hidden_size"], t.c["vocab_size"]
    c = dict(medusa_num_heads=3, medusa_num_layers=2)
    w = {}
    for i in range(c["medusa_num_heads"]):
        for j in range(c["medusa_num_layers"]):
            w[f"medusa_head.{i}.{j}.linear.weight"] = r.matrix(d, d)
            w[f"medusa_head.{i}.{j}.linear.bias"] = r.vector(d, 0.0)
        w[f"medusa_head.{i}.2.weight"] = r.matrix(vocab, d, 1)
    return Medusa, c, w, "BF16"


def write_head(folder, config, weights, dtype):
    """Stores them, and returns the weights as they were stored."""
    os.makedirs(folder, exist_ok=True)
    write_json(os.path.join(folder, "config.json"), config)
    head, data, stored = {"__metadata__": {"format": "pt"}}, b"", {}
    for name in sorted(weights, key=lambda n: {"i": 0, "f": 1, "b": 2}[weights[n].dtype.kind]):
        w = weights[name]
        kind = {"i": "I64", "b": "BOOL"}.get(w.dtype.kind, dtype)
        raw = w.astype("<i8" if kind == "I64" else "u1").tobytes() if kind != dtype else encode_plain(w, dtype)
        head[name] = dict(dtype=kind, shape=list(w.shape), data_offsets=[len(data), len(data) + len(raw)])
        data += raw
        if kind == "BF16":
            w = (np.frombuffer(raw, "<u2").astype("<u4") << 16).view("<f4").astype(np.float64).reshape(w.shape)
        elif kind in ("F32", "F16"):
            w = np.frombuffer(raw, {"F32": "<f4", "F16": "<f2"}[kind]).astype(np.float64).reshape(w.shape)
        stored[name] = w
    text = json.dumps(head, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(os.path.join(folder, "model.safetensors"), "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text + data)
    return stored


def golden(head):
    """A chain of the likeliest tokens, then siblings of its first."""
    ids = head.tokens if head.tokens is not None else np.arange(head.t.c["vocab_size"])
    nodes, parents = [], []
    for i in range(CHAIN):
        z = head.rows(PROMPT, nodes, parents)[-1]
        nodes.append(int(ids[z.argmax()]))
        parents.append(i - 1)
    first = head.rows(PROMPT, [], [])[0]
    nodes += [int(ids[i]) for i in np.argsort(-first, kind="stable")[1:WIDE]]
    parents += [-1] * (WIDE - 1)
    rows = [log_softmax(r) if len(r) else [] for r in head.rows(PROMPT, nodes, parents)]
    digits = lambda x: [round(float(v), 7) for v in x]
    g = dict(prompt=PROMPT, root=digits(rows[0]), nodes=nodes, parents=parents, rows=[digits(r) for r in rows[1:]])
    return g if head.tokens is None else dict(tokens=[int(i) for i in ids]) | g


def main():
    t = target()
    for name, make in dict(eagle3=make_eagle3, eagle=make_eagle, hydra=make_hydra, medusa=make_medusa).items():
        kind, config, weights, dtype = make(t)
        folder = os.path.join(ROOT, "tiny-drafts", name)
        stored = write_head(folder, config, weights, dtype)
        write_json(os.path.join(folder, "golden.json"), golden(kind(t, config, stored)))


if __name__ == "__main__":
    main()
