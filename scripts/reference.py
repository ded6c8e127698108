"""Reference forward pass in float64 numpy, for Hugging Face folders and GGUF files of the families the engine supports.

    m = load("models/tiny-llama")                  # or a .gguf file of architecture llama
    logits, hidden = m.forward(ids)                # [rows, vocab], list of [rows, hidden]
    ids, gaps = m.greedy(prompt, 24)

Slow and plain on purpose: no cache, no blocks, every pass from the start. Weights are taken as stored (or as the float32
values that quantised blocks stand for) and all arithmetic after that is float64. It shares no code with the engine.
"""

import json
import math
import os
import struct

import numpy as np

# ---------------------------------------------------------------- quantised blocks: uint8 [blocks, bytes] -> float32


def _f16(b):
    return np.ascontiguousarray(b).view("<f2").astype(np.float32)


def _nibbles(q):
    return np.concatenate([q & 15, q >> 4], 1)


def _fifth_bits(b):
    word = np.ascontiguousarray(b).view("<u4")
    return ((word >> np.arange(32, dtype=np.uint32)) & 1).astype(np.uint8)


def _k_scales(s):
    """12 bytes of 6-bit scales and minimums -> two float32 [blocks, 8]."""
    lo, mid, hi = s[:, 0:4], s[:, 4:8], s[:, 8:12]
    scale = np.concatenate([lo & 63, (hi & 15) | ((lo >> 6) << 4)], 1)
    minimum = np.concatenate([mid & 63, (hi >> 4) | ((mid >> 6) << 4)], 1)
    return scale.astype(np.float32), minimum.astype(np.float32)


def _k_affine(b, q):
    """q [blocks, 8, 32] with the scales of Q4_K and Q5_K."""
    scale, minimum = _k_scales(b[:, 4:16])
    d, dmin = _f16(b[:, :2]) * scale, _f16(b[:, 2:4]) * minimum
    return (q.astype(np.float32) * d[:, :, None] - dmin[:, :, None]).reshape(-1, 256)


def _q4_k(b):
    q = b[:, 16:].reshape(-1, 4, 1, 32)
    return _k_affine(b, np.concatenate([q & 15, q >> 4], 2).reshape(-1, 8, 32))


def _q5_k(b):
    q = b[:, 48:].reshape(-1, 4, 1, 32)
    low = np.concatenate([q & 15, q >> 4], 2).reshape(-1, 8, 32)
    high = (b[:, None, 16:48] >> np.arange(8, dtype=np.uint8)[None, :, None]) & 1
    return _k_affine(b, low | (high << 4))


def _q6_k(b):
    ql, qh = b[:, :128].reshape(-1, 2, 2, 32), b[:, 128:192].reshape(-1, 2, 1, 32)
    low = np.stack([ql & 15, ql >> 4], 2).reshape(-1, 2, 4, 32)
    high = (qh >> np.array([0, 2, 4, 6], np.uint8)[:, None]) & 3
    q = (low | (high << 4)).astype(np.float32) - 32
    scale = np.ascontiguousarray(b[:, 192:208]).view(np.int8).astype(np.float32)
    return (q.reshape(-1, 16, 16) * (_f16(b[:, 208:210]) * scale)[:, :, None]).reshape(-1, 256)


# GGUF type number -> name, weights in a block, bytes of a block, meaning
GGUF_TYPES = {
    0: ("F32", 1, 4, lambda b: np.ascontiguousarray(b).view("<f4")),
    1: ("F16", 1, 2, _f16),
    2: ("Q4_0", 32, 18, lambda b: (_nibbles(b[:, 2:]).astype(np.float32) - 8) * _f16(b[:, :2])),
    3: ("Q4_1", 32, 20, lambda b: _nibbles(b[:, 4:]).astype(np.float32) * _f16(b[:, :2]) + _f16(b[:, 2:4])),
    6: ("Q5_0", 32, 22, lambda b: ((_nibbles(b[:, 6:]) | (_fifth_bits(b[:, 2:6]) << 4)).astype(np.float32) - 16) * _f16(b[:, :2])),
    7: ("Q5_1", 32, 24, lambda b: (_nibbles(b[:, 8:]) | (_fifth_bits(b[:, 4:8]) << 4)).astype(np.float32) * _f16(b[:, :2]) + _f16(b[:, 2:4])),
    8: ("Q8_0", 32, 34, lambda b: np.ascontiguousarray(b[:, 2:]).view(np.int8).astype(np.float32) * _f16(b[:, :2])),
    12: ("Q4_K", 256, 144, _q4_k),
    13: ("Q5_K", 256, 176, _q5_k),
    14: ("Q6_K", 256, 210, _q6_k),
}
TYPE_NUMBER = {name: n for n, (name, *_) in GGUF_TYPES.items()}


def dequantise(type_name, raw, shape):
    """The float32 matrix that the bytes `raw` of a tensor stand for."""
    _, _, size, meaning = GGUF_TYPES[TYPE_NUMBER[type_name]]
    return meaning(np.frombuffer(raw, np.uint8).reshape(-1, size)).reshape(shape)


# ---------------------------------------------------------------- files


def read_safetensors(path):
    with open(path, "rb") as f:
        head = json.loads(f.read(struct.unpack("<Q", f.read(8))[0]))
        data = f.read()
    out = {}
    for name, t in head.items():
        if name == "__metadata__":
            continue
        raw = np.frombuffer(data[t["data_offsets"][0] : t["data_offsets"][1]], np.uint8)
        if t["dtype"] == "BF16":
            x = (raw.view("<u2").astype(np.uint32) << 16).view(np.float32)
        else:
            x = raw.view({"F32": "<f4", "F16": "<f2"}[t["dtype"]])
        out[name] = x.astype(np.float64).reshape(t["shape"])
    return out


def read_folder(folder):
    with open(os.path.join(folder, "config.json"), encoding="utf-8") as f:
        config = json.load(f)
    index = os.path.join(folder, "model.safetensors.index.json")
    if os.path.exists(index):
        with open(index, encoding="utf-8") as f:
            names = sorted(set(json.load(f)["weight_map"].values()))
    else:
        names = ["model.safetensors"]
    weights = {}
    for n in names:
        weights.update(read_safetensors(os.path.join(folder, n)))
    return config, weights


class _GgufReader:
    SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}

    def __init__(self, data):
        self.data, self.at = data, 0

    def take(self, fmt):
        (v,) = struct.unpack_from("<" + fmt, self.data, self.at)
        self.at += struct.calcsize("<" + fmt)
        return v

    def text(self):
        n = self.take("Q")
        self.at += n
        return self.data[self.at - n : self.at].decode("utf-8")

    def value(self, kind):
        if kind in self.SCALARS:
            return self.take(self.SCALARS[kind])
        if kind == 8:
            return self.text()
        inner, n = self.take("I"), self.take("Q")
        return [self.value(inner) for _ in range(n)]


def read_gguf(path):
    """Metadata, and each tensor as (type name, numpy shape, bytes)."""
    with open(path, "rb") as f:
        r = _GgufReader(f.read())
    assert r.data[:4] == b"GGUF", path
    r.at = 8
    tensors, keys = r.take("Q"), r.take("Q")
    kv = {}
    for _ in range(keys):
        k = r.text()
        kv[k] = r.value(r.take("I"))
    info = []
    for _ in range(tensors):
        name = r.text()
        dims = [r.take("Q") for _ in range(r.take("I"))]
        info.append((name, dims, r.take("I"), r.take("Q")))
    align = kv.get("general.alignment", 32)
    base = (r.at + align - 1) // align * align
    out = {}
    for name, dims, kind, offset in info:
        type_name, per_block, size, _ = GGUF_TYPES[kind]
        n = math.prod(dims) // per_block * size
        out[name] = (type_name, dims[::-1], r.data[base + offset : base + offset + n])
    return kv, out


GGUF_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def unpermute(w, heads):
    """Rows of q or k from GGUF's order (interleaved rotary pairs) to half and half."""
    half = w.shape[0] // heads // 2
    return w.reshape(heads, half, 2, -1).swapaxes(1, 2).reshape(w.shape)


def gguf_model(path):
    """Config and weights of a llama GGUF under Hugging Face names."""
    kv, tensors = read_gguf(path)
    key = lambda k: kv["llama." + k]
    config = dict(
        model_type="llama",
        hidden_size=key("embedding_length"),
        intermediate_size=key("feed_forward_length"),
        num_hidden_layers=key("block_count"),
        num_attention_heads=key("attention.head_count"),
        num_key_value_heads=key("attention.head_count_kv"),
        head_dim=key("rope.dimension_count"),
        rms_norm_eps=key("attention.layer_norm_rms_epsilon"),
        rope_theta=key("rope.freq_base"),
    )
    weights = {}
    for name, (type_name, shape, raw) in tensors.items():
        w = dequantise(type_name, raw, shape).astype(np.float64)
        if name == "rope_freqs.weight":
            config["rope_factors"] = w
            continue
        if name.startswith("blk."):
            _, i, part, _ = name.split(".")
            if part in ("attn_q", "attn_k"):
                w = unpermute(w, config["num_attention_heads" if part == "attn_q" else "num_key_value_heads"])
            name = f"model.layers.{i}.{GGUF_LAYER_NAMES[part]}.weight"
        else:
            name = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}[name[:-7]] + ".weight"
        weights[name] = w
    return config, weights


def load(path):
    return Model(*(gguf_model(path) if path.endswith(".gguf") else read_folder(path)))


# ---------------------------------------------------------------- the model


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


class Model:
    def __init__(self, config, weights):
        self.c, self.w = config, weights
        self.gemma = config["model_type"] == "gemma3_text"
        self.heads, self.kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        self.head_dim = config.get("head_dim") or config["hidden_size"] // self.heads
        self.layers = config["num_hidden_layers"]
        self.scale = (config["query_pre_attn_scalar"] if self.gemma else self.head_dim) ** -0.5

    def local(self, layer):
        """Whether the sliding window applies to a layer."""
        if "layer_types" in self.c:
            return self.c["layer_types"][layer] == "sliding_attention"
        return bool(self.c.get("sliding_window")) and self.c.get("use_sliding_window", True)

    def frequencies(self, layer):
        """Radians per position of the head_dim / 2 rotary pairs."""
        c = self.c
        rope = c.get("rope_parameters")
        if rope is None:  # the older dialect
            local = self.gemma and self.local(layer)
            theta = c["rope_local_base_freq"] if local else c["rope_theta"]
            rope = {} if local else c.get("rope_scaling") or {}
        else:
            rope = rope.get(c["layer_types"][layer], rope) if "layer_types" in c else rope
            theta = rope["rope_theta"]
        half = self.head_dim // 2
        f = float(theta) ** (-np.arange(half) / half)
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind == "linear":
            f = f / rope["factor"]
        elif kind == "llama3":
            f = llama3_frequencies(f, rope)
        elif kind != "default":
            raise ValueError(kind)
        return f / c["rope_factors"] if "rope_factors" in c else f

    def norm(self, x, name):
        g = self.w[name + ".weight"]
        y = x / np.sqrt((x * x).mean(-1, keepdims=True) + self.c["rms_norm_eps"])
        return y * (1 + g) if self.gemma else y * g

    def linear(self, x, name):
        y = x @ self.w[name + ".weight"].T
        bias = self.w.get(name + ".bias")
        return y if bias is None else y + bias

    def activation(self, x):
        if self.gemma:
            return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
        return x / (1 + np.exp(-x))

    def attention(self, x, layer, positions, visible):
        rows = len(x)
        p = f"model.layers.{layer}.self_attn."
        q = self.linear(x, p + "q_proj").reshape(rows, self.heads, self.head_dim)
        k = self.linear(x, p + "k_proj").reshape(rows, self.kv_heads, self.head_dim)
        v = self.linear(x, p + "v_proj").reshape(rows, self.kv_heads, self.head_dim)
        if p + "q_norm.weight" in self.w:
            q, k = self.norm(q, p + "q_norm"), self.norm(k, p + "k_norm")
        angle = positions[:, None] * self.frequencies(layer)[None]
        cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
        half = self.head_dim // 2

        def turn(t):
            a, b = t[..., :half], t[..., half:]
            return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

        q, k = turn(q), turn(k)
        if self.local(layer):
            visible = visible & (positions[None] > positions[:, None] - self.c["sliding_window"])
        out = np.empty_like(q)
        for h in range(self.heads):
            g = h * self.kv_heads // self.heads
            s = np.where(visible, q[:, h] @ k[:, g].T * self.scale, -np.inf)
            out[:, h] = softmax(s) @ v[:, g]
        return self.linear(out.reshape(rows, -1), p + "o_proj")

    def forward(self, ids, positions=None, visible=None):
        """Logits [rows, vocab] and hidden states: the (scaled) embeddings, each layer's output, the normed last.

        `visible[i, j]` says whether row i sees row j; without it row i sees rows 0..=i.
        """
        n = len(ids)
        positions = np.arange(n) if positions is None else np.asarray(positions)
        visible = np.tri(n, dtype=bool) if visible is None else visible
        x = self.w["model.embed_tokens.weight"][np.asarray(ids)]
        if self.gemma:
            x = x * self.c["hidden_size"] ** 0.5
        hidden = [x]
        for i in range(self.layers):
            p = f"model.layers.{i}."
            y = self.attention(self.norm(x, p + "input_layernorm"), i, positions, visible)
            if self.gemma:
                x = x + self.norm(y, p + "post_attention_layernorm")
                y = self.norm(x, p + "pre_feedforward_layernorm")
            else:
                x = x + y
                y = self.norm(x, p + "post_attention_layernorm")
            y = self.activation(self.linear(y, p + "mlp.gate_proj")) * self.linear(y, p + "mlp.up_proj")
            y = self.linear(y, p + "mlp.down_proj")
            x = x + (self.norm(y, p + "post_feedforward_layernorm") if self.gemma else y)
            hidden.append(x)
        x = self.norm(x, "model.norm")
        hidden.append(x)
        head = self.w.get("lm_head.weight", self.w["model.embed_tokens.weight"])
        return x @ head.T, hidden

    def greedy(self, ids, n):
        """n greedy tokens after ids, end-of-text ignored, and for each the gap between the two best logits."""
        ids, out, gaps = list(ids), [], []
        for _ in range(n):
            last = self.forward(ids)[0][-1]
            best = np.sort(last)[-2:]
            out.append(int(last.argmax()))
            gaps.append(float(best[1] - best[0]))
            ids.append(out[-1])
        return out, gaps


def llama3_frequencies(f, rope):
    original, low, high = rope["original_max_position_embeddings"], rope["low_freq_factor"], rope["high_freq_factor"]
    turns = original * f / (2 * math.pi)
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return f * kept + f / rope["factor"] * (1 - kept)
