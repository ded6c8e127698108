"""Writers for make_fixtures.py: safetensors, quantised blocks, GGUF, and a small byte-level BPE tokenizer."""

import collections
import json
import os
import re
import struct

import numpy as np

from reference import TYPE_NUMBER

# ---------------------------------------------------------------- JSON and safetensors


def write_json(path, value):
    """Readable and stable: lists of plain numbers stay on one line."""
    text = json.dumps(value, ensure_ascii=False, indent=1)
    text = re.sub(r"\[\s+([-0-9.e,\s]+?)\s+\]", lambda m: "[" + re.sub(r"\s+", " ", m.group(1)) + "]", text)
    with open(path, "w", encoding="utf-8", newline="\n") as f:
        f.write(text + "\n")


def encode_plain(w, dtype):
    w = np.ascontiguousarray(w, "<f4")
    if dtype == "BF16":  # round to nearest, ties to even
        u = w.view("<u4")
        return ((u + 0x7FFF + ((u >> 16) & 1)) >> 16).astype("<u2").tobytes()
    return w.astype({"F32": "<f4", "F16": "<f2"}[dtype]).tobytes()


def write_safetensors(path, weights, dtype):
    head, data = {"__metadata__": {"format": "pt"}}, b""
    for name, w in weights.items():
        raw = encode_plain(w, dtype)
        head[name] = dict(dtype=dtype, shape=list(w.shape), data_offsets=[len(data), len(data) + len(raw)])
        data += raw
    text = json.dumps(head, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text + data)
    return len(data)


def write_shards(folder, weights, dtype, count):
    names = list(weights)
    total, where = 0, {}
    for i in range(count):
        part = {n: weights[n] for n in names[i * len(names) // count : (i + 1) * len(names) // count]}
        file = f"model-{i + 1:05d}-of-{count:05d}.safetensors"
        total += write_safetensors(os.path.join(folder, file), part, dtype)
        where.update(dict.fromkeys(part, file))
    write_json(os.path.join(folder, "model.safetensors.index.json"), dict(metadata=dict(total_size=total), weight_map=where))


# ---------------------------------------------------------------- quantisation: float32 rows -> bytes of blocks
# Plain nearest rounding with scales from the extremes; no search for better scales as production quantisers do.


def _half(x):
    h = x.astype("<f2")
    return h.astype(np.float32), h.view(np.uint8).reshape(len(x), -1)


def _ratio(x, d):
    return np.divide(x, d, out=np.zeros_like(x), where=d != 0)


def _signed_extreme(x):
    return np.take_along_axis(x, np.abs(x).argmax(-1, keepdims=True), -1)


def _pack(q):
    return q[:, :16] | (q[:, 16:] << 4)


def _symmetric(x, bits):
    """Q4_0 and Q5_0: the value of largest size becomes the lowest code."""
    low = 1 << (bits - 1)
    d, raw = _half(_signed_extreme(x) / -low)
    return raw, np.clip(np.rint(_ratio(x, d)) + low, 0, 2 * low - 1).astype(np.uint8)


def _affine(x, bits):
    """Q4_1 and Q5_1: smallest value code 0, largest the top code."""
    low = x.min(-1, keepdims=True)
    d, raw_d = _half((x.max(-1, keepdims=True) - low) / ((1 << bits) - 1))
    m, raw_m = _half(low)
    return np.concatenate([raw_d, raw_m], 1), np.clip(np.rint(_ratio(x - m, d)), 0, (1 << bits) - 1).astype(np.uint8)


def _with_fifth_bits(raw, q):
    word = ((q >> 4).astype(np.uint32) << np.arange(32, dtype=np.uint32)).sum(-1, dtype=np.uint32)
    return np.concatenate([raw, word.astype("<u4")[:, None].view(np.uint8), _pack(q & 15)], 1)


def _q4_0(x):
    raw, q = _symmetric(x, 4)
    return np.concatenate([raw, _pack(q)], 1)


def _q4_1(x):
    raw, q = _affine(x, 4)
    return np.concatenate([raw, _pack(q)], 1)


def _q8_0(x):
    d, raw = _half(np.abs(x).max(-1, keepdims=True) / 127)
    return np.concatenate([raw, np.clip(np.rint(_ratio(x, d)), -127, 127).astype(np.int8).view(np.uint8)], 1)


def _k_affine(x, bits):
    """Header bytes and codes [blocks, 8, 32] of Q4_K and Q5_K."""
    x = x.reshape(-1, 8, 32)
    top = (1 << bits) - 1
    minimum = np.maximum(-x.min(-1), 0)
    scale = (x.max(-1) + minimum) / top
    d, raw_d = _half(scale.max(-1, keepdims=True) / 63)
    dmin, raw_min = _half(minimum.max(-1, keepdims=True) / 63)
    s = np.clip(np.rint(_ratio(scale, d + 0 * scale)), 0, 63).astype(np.uint8)
    m = np.clip(np.rint(_ratio(minimum, dmin + 0 * minimum)), 0, 63).astype(np.uint8)
    q = np.rint(_ratio(x + (dmin * m)[:, :, None], (d * s)[:, :, None] + 0 * x))
    packed = np.concatenate(
        [s[:, :4] | ((s[:, 4:] >> 4) << 6), m[:, :4] | ((m[:, 4:] >> 4) << 6), (s[:, 4:] & 15) | ((m[:, 4:] & 15) << 4)], 1
    )
    return np.concatenate([raw_d, raw_min, packed], 1), np.clip(q, 0, top).astype(np.uint8)


def _k_nibbles(q):
    q = q.reshape(-1, 4, 2, 32)
    return (q[:, :, 0] | (q[:, :, 1] << 4)).reshape(-1, 128)


def _q4_k(x):
    head, q = _k_affine(x, 4)
    return np.concatenate([head, _k_nibbles(q)], 1)


def _q5_k(x):
    head, q = _k_affine(x, 5)
    bits = ((q >> 4) << np.arange(8, dtype=np.uint8)[:, None]).sum(1, dtype=np.uint8)
    return np.concatenate([head, bits, _k_nibbles(q & 15)], 1)


def _q6_k(x):
    x = x.reshape(-1, 16, 16)
    scale = _signed_extreme(x)[:, :, 0] / -32
    d, raw = _half(_signed_extreme(scale) / -128)
    s = np.clip(np.rint(_ratio(scale, d + 0 * scale)), -128, 127).astype(np.int8)
    q = np.rint(_ratio(x, (d * s.astype(np.float32))[:, :, None] + 0 * x)) + 32
    q = np.clip(q, 0, 63).astype(np.uint8).reshape(-1, 2, 4, 32)
    low = np.concatenate([q[:, :, 0] & 15 | ((q[:, :, 2] & 15) << 4), q[:, :, 1] & 15 | ((q[:, :, 3] & 15) << 4)], 2)
    high = ((q >> 4) << np.array([0, 2, 4, 6], np.uint8)[:, None]).sum(2, dtype=np.uint8)
    return np.concatenate([low.reshape(-1, 128), high.reshape(-1, 64), s.view(np.uint8), raw], 1)


QUANTISERS = {
    "Q4_0": (32, _q4_0),
    "Q4_1": (32, _q4_1),
    "Q5_0": (32, lambda x: _with_fifth_bits(*_symmetric(x, 5))),
    "Q5_1": (32, lambda x: _with_fifth_bits(*_affine(x, 5))),
    "Q8_0": (32, _q8_0),
    "Q4_K": (256, _q4_k),
    "Q5_K": (256, _q5_k),
    "Q6_K": (256, _q6_k),
}


def encode(w, type_name):
    if type_name in ("F32", "F16"):
        return encode_plain(w, type_name)
    size, quantise = QUANTISERS[type_name]
    return quantise(np.ascontiguousarray(w, np.float32).reshape(-1, size)).tobytes()


# ---------------------------------------------------------------- GGUF


def permute(w, heads):
    """Rows of q or k from half and half to GGUF's interleaved rotary pairs."""
    half = w.shape[0] // heads // 2
    return w.reshape(heads, 2, half, -1).swapaxes(1, 2).reshape(w.shape)


def _text(s):
    b = s.encode("utf-8")
    return struct.pack("<Q", len(b)) + b


def _value(v):
    """Type number and bytes of a metadata value."""
    if isinstance(v, bool):
        return 7, struct.pack("<?", v)
    if isinstance(v, int):
        return 4, struct.pack("<I", v)
    if isinstance(v, float):
        return 6, struct.pack("<f", v)
    if isinstance(v, str):
        return 8, _text(v)
    kind = 5 if isinstance(v[0], int) else _value(v[0])[0]
    items = [struct.pack("<i", x) if kind == 5 else _value(x)[1] for x in v]
    return 9, struct.pack("<IQ", kind, len(v)) + b"".join(items)


def write_gguf(path, metadata, tensors):
    """`tensors`: (name, type name, float32 array) in file order. GGUF version 3, alignment 32."""
    out = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata))
    for k, v in metadata.items():
        kind, raw = _value(v)
        out += _text(k) + struct.pack("<I", kind) + raw
    data = b""
    for name, type_name, w in tensors:
        out += _text(name) + struct.pack("<I", w.ndim)
        out += b"".join(struct.pack("<Q", n) for n in reversed(w.shape))
        out += struct.pack("<IQ", TYPE_NUMBER[type_name], len(data))
        raw = encode(w, type_name)
        data += raw + b"\0" * (-len(raw) % 32)
    out += b"\0" * (-len(out) % 32)
    with open(path, "wb") as f:
        f.write(out + data)


# ---------------------------------------------------------------- tokenizer

SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
TRAINING_TEXT = """The engine reads the weights once and answers with the next token. The weights are small and the text is short.
When the reader sees the end of the text, it stops. There is no other rule: the next token is the best one that the engine can see.
A small tree of tokens stands on the last one, and each branch is checked in one pass. The longest branch that agrees is kept.
In the morning the light came over the hill and into the garden, where the children were waiting for the train to the sea.
She said that she would not go there alone, and so they went together, with bread and tea and a letter from the old teacher.
The user asks a question; the assistant gives an answer. The system says how. What is the time? What was the weather like on the way?
for each row in the matrix: return the sum of the products, then start again with the next row until there are no more rows.
"""


def byte_letters():
    """The printable letter that stands for each byte in byte-level BPE."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {b: chr(b) for b in plain}
    for b in range(256):
        letters.setdefault(b, chr(256 + len(letters) - len(plain)))
    return letters


def train_merges(text, count):
    """Byte-pair merges by frequency; ties go to the pair that sorts first."""
    letters = byte_letters()
    words = collections.Counter(re.findall(r"'(?:[sdmt]|ll|ve|re)| ?[A-Za-z]+|[0-9]| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s", text))
    words = [([letters[b] for b in w.encode()], n) for w, n in words.items()]
    merges = []
    while len(merges) < count:
        pairs = collections.Counter()
        for w, n in words:
            for pair in zip(w, w[1:]):
                pairs[pair] += n
        best = min(pairs, key=lambda p: (-pairs[p], p))
        merges.append(best)
        for w, _ in words:
            i = 0
            while i + 1 < len(w):
                if (w[i], w[i + 1]) == best:
                    w[i : i + 2] = ["".join(best)]
                i += 1
    return merges


def tokenizer_files(size):
    """tokenizer.json and tokenizer_config.json of a byte-level BPE with `size` tokens."""
    letters = byte_letters()
    merges = train_merges(TRAINING_TEXT, size - 256 - len(SPECIALS))
    tokens = SPECIALS + [letters[b] for b in range(256)] + ["".join(m) for m in merges]
    assert len(set(tokens)) == size
    level = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=True)
    tokenizer = dict(
        version="1.0",
        truncation=None,
        padding=None,
        added_tokens=[
            dict(id=i, content=s, single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
            for i, s in enumerate(SPECIALS)
        ],
        normalizer=None,
        pre_tokenizer=dict(type="Sequence", pretokenizers=[dict(type="Digits", individual_digits=True), level]),
        post_processor=None,
        decoder=level,
        model=dict(
            type="BPE",
            dropout=None,
            unk_token=None,
            continuing_subword_prefix=None,
            end_of_word_suffix=None,
            fuse_unk=False,
            byte_fallback=False,
            ignore_merges=False,
            vocab={t: i for i, t in enumerate(tokens)},
            merges=[list(m) for m in merges],
        ),
    )
    config = dict(
        tokenizer_class="PreTrainedTokenizerFast",
        bos_token=SPECIALS[1],
        eos_token=SPECIALS[2],
        pad_token=SPECIALS[2],
        unk_token=SPECIALS[0],
        add_bos_token=False,
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
        chat_template=TEMPLATE,
    )
    return tokenizer, config


def gguf_tokenizer(tokenizer, config):
    """The same tokenizer as GGUF metadata."""
    vocab = tokenizer["model"]["vocab"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": list(vocab),
        "tokenizer.ggml.token_type": [3 if t in SPECIALS else 1 for t in vocab],
        "tokenizer.ggml.merges": [" ".join(m) for m in tokenizer["model"]["merges"]],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": config["chat_template"],
    }
