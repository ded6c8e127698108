#!/usr/bin/env python3
"""Write the tiny models under models/ with their golden outputs. Same bytes on every run with the pinned packages.

    python3 -m venv .venv && .venv/bin/pip install -r scripts/requirements.txt
    .venv/bin/python scripts/make_fixtures.py [OUTDIR]
    .venv/bin/python scripts/make_fixtures.py --golden FOLDER      # golden outputs of a model that was made otherwise

Weights are seeded random numbers; the goldens come from reference.py.
"""

import os
import shutil
import sys

import numpy as np
from tokenizers import Tokenizer

import reference
from fixture_files import QUANTISERS, gguf_tokenizer, permute, tokenizer_files
from fixture_files import write_gguf, write_json, write_safetensors, write_shards

COMMON = dict(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=384,
    max_position_embeddings=1024,
    rms_norm_eps=1e-5,
    hidden_act="silu",
    attention_bias=False,
    attention_dropout=0.0,
    initializer_range=0.02,
    use_cache=True,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=2,
    tie_word_embeddings=True,
)


def config(architecture, model_type, dtype, **changes):
    return dict(architectures=[architecture], model_type=model_type, torch_dtype=dtype, **{**COMMON, **changes})


def v5(c):
    """The key that Transformers 5 renamed."""
    c["dtype"] = c.pop("torch_dtype")
    return c


# name -> (seed, stored type, shards, config)
MODELS = {
    "tiny-llama": (2, "F32", 1, config(
        "LlamaForCausalLM", "llama", "float32",
        hidden_size=32, num_hidden_layers=3, rope_theta=10000.0, rope_scaling=None, mlp_bias=False,
    )),
    "tiny-llama3": (3, "BF16", 2, config(
        "LlamaForCausalLM", "llama", "bfloat16",
        num_attention_heads=4, num_key_value_heads=1, head_dim=16, tie_word_embeddings=False, mlp_bias=False,
        rope_theta=2000.0,
        rope_scaling=dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                          original_max_position_embeddings=128, rope_type="llama3"),
    )),
    "tiny-mistral": (66, "F16", 1, config(
        "MistralForCausalLM", "mistral", "float16",
        vocab_size=320, tie_word_embeddings=False, rope_theta=10000.0, sliding_window=16,
    )),
    # A window is given but switched off, as in Qwen2 files.
    "tiny-qwen2": (55, "BF16", 1, config(
        "Qwen2ForCausalLM", "qwen2", "bfloat16",
        tie_word_embeddings=False, rms_norm_eps=1e-6, rope_theta=1000000.0,
        sliding_window=8, use_sliding_window=False, max_window_layers=2,
    )),
    "tiny-qwen3": (205, "F16", 1, v5(config(
        "Qwen3ForCausalLM", "qwen3", "float16",
        head_dim=32, rms_norm_eps=1e-6, sliding_window=None, use_sliding_window=False, max_window_layers=2,
        layer_types=["full_attention"] * 2, rope_parameters=dict(rope_theta=1000000.0, rope_type="default"),
    ))),
    "tiny-gemma3": (71, "BF16", 1, v5(config(
        "Gemma3ForCausalLM", "gemma3_text", "bfloat16",
        hidden_size=32, intermediate_size=64, num_hidden_layers=7, head_dim=16, rms_norm_eps=1e-6,
        hidden_act=None, hidden_activation="gelu_pytorch_tanh", eos_token_id=[2, 0], query_pre_attn_scalar=24,
        attn_logit_softcapping=None, final_logit_softcapping=None, use_bidirectional_attention=False, sliding_window=8,
        layer_types=["full_attention" if i == 5 else "sliding_attention" for i in range(7)],
        rope_parameters=dict(
            full_attention=dict(factor=8.0, rope_theta=1000000.0, rope_type="linear"),
            sliding_attention=dict(rope_theta=10000.0, rope_type="default"),
        ),
    ))),
}  # fmt: skip
for _c in MODELS.values():
    if _c[3]["hidden_act"] is None:
        del _c[3]["hidden_act"]


def random_weights(c, rng):
    """Names and float32 weights, scaled so that logits spread over several units and attention is not flat."""
    hidden, ffn, gemma = c["hidden_size"], c["intermediate_size"], c["model_type"] == "gemma3_text"
    head_dim = c.get("head_dim") or hidden // c["num_attention_heads"]
    q, kv = c["num_attention_heads"] * head_dim, c["num_key_value_heads"] * head_dim
    w = {}

    def matrix(name, rows, cols, gain):
        w[name] = (rng.standard_normal((rows, cols)) * gain / cols**0.5).astype(np.float32)

    def norm(name, size, mean=1.0):
        w[name] = (mean - gemma + 0.2 * rng.standard_normal(size)).astype(np.float32)

    # Gemma multiplies embeddings by sqrt(hidden): small ones, lest every token predict itself.
    matrix("model.embed_tokens.weight", c["vocab_size"], hidden, 0.5 if gemma else 1.2)
    for i in range(c["num_hidden_layers"]):
        p = f"model.layers.{i}."
        norm(p + "input_layernorm.weight", hidden)
        for name, rows, gain in (("q", q, 1.6), ("k", kv, 1.6), ("v", kv, 1.5)):
            matrix(p + f"self_attn.{name}_proj.weight", rows, hidden, gain)
            if c["model_type"] == "qwen2":
                w[p + f"self_attn.{name}_proj.bias"] = rng.standard_normal(rows).astype(np.float32)
        if gemma or c["model_type"] == "qwen3":
            norm(p + "self_attn.q_norm.weight", head_dim, 1.5)
            norm(p + "self_attn.k_norm.weight", head_dim, 1.5)
        matrix(p + "self_attn.o_proj.weight", hidden, q, 1.5)
        norm(p + "post_attention_layernorm.weight", hidden)
        if gemma:
            norm(p + "pre_feedforward_layernorm.weight", hidden)
        matrix(p + "mlp.gate_proj.weight", ffn, hidden, 1.5)
        matrix(p + "mlp.up_proj.weight", ffn, hidden, 1.5)
        matrix(p + "mlp.down_proj.weight", hidden, ffn, 2.0)
        if gemma:
            norm(p + "post_feedforward_layernorm.weight", hidden)
    norm("model.norm.weight", hidden, 6.0 if gemma else 2.5)
    if not c["tie_word_embeddings"]:
        matrix("lm_head.weight", c["vocab_size"], hidden, 1.2)
    return w


# ---------------------------------------------------------------- goldens

TREE_PARENTS = [-1, 0, 0, 1, 1, 2, 3, -1, 7, 6]


def numbers(x, digits=6):
    return [round(float(v), digits) + 0.0 for v in x]


def top5(logits):
    """For each row [[id, logit] x 5], best first."""
    order = np.argsort(-logits, axis=-1, kind="stable")[:, :5]
    return [[[int(i), round(float(row[i]), 6)] for i in best] for row, best in zip(logits, order)]


def golden(m, rng):
    vocab = len(m.w["model.embed_tokens.weight"])
    ids = lambda n: [int(x) for x in rng.integers(3, vocab, n)]
    prompts = dict(one=ids(1), five=ids(5), forty=ids(40))
    cases = []
    for name, prompt in prompts.items():
        logits, hidden = m.forward(prompt)
        greedy, gaps = m.greedy(prompt, 24)
        cases.append(dict(name=name, ids=prompt, last_logits=numbers(logits[-1]), top5=top5(logits), greedy=greedy, gaps=numbers(gaps, 4)))
    _, hidden = m.forward(prompts["five"])
    return dict(
        cases=cases,
        hidden=dict(case="five", row=4, states=[numbers(h[-1]) for h in hidden]),
        tree=tree(m, prompts["forty"], ids(len(TREE_PARENTS))),
        full=full(m, [], ids(12)),
        block=full(m, prompts["five"], ids(8)),
    )


def tree(m, prefix, ids):
    """Rows of a token tree behind a prefix; parent -1 is the prefix's last token. Each row as the plain sequence to it."""
    rows, paths = [], []
    for i, parent in enumerate(TREE_PARENTS):
        paths.append((paths[parent] if parent >= 0 else []) + [i])
        rows.append(m.forward(prefix + [ids[j] for j in paths[i]])[0][-1])
    n = len(prefix)
    visible = np.tri(n + len(ids), dtype=bool)
    for i, path in enumerate(paths):
        visible[n + i, n:] = np.isin(np.arange(len(ids)), path)
    positions = list(range(n)) + [n - 1 + len(p) for p in paths]
    masked = m.forward(prefix + ids, positions, visible)[0][n:]
    assert np.abs(masked - np.array(rows)).max() < 1e-9
    return dict(prefix=prefix, ids=ids, parents=TREE_PARENTS, top5=top5(np.array(rows)))


def full(m, prefix, ids):
    """Rows that all see one another and a causal prefix; windows are measured backwards only."""
    n = len(prefix)
    visible = np.tri(n + len(ids), dtype=bool)
    visible[n:] = True
    logits = m.forward(prefix + ids, None, visible)[0][n:]
    return dict(prefix=prefix, ids=ids, last_logits=numbers(logits[-1]), top5=top5(logits))


# ---------------------------------------------------------------- GGUF

KINDS = ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"]
# file -> (seed, config changes, type of the embedding, per layer the types of KINDS, rope_freqs)
GGUFS = {
    "legacy": (197, dict(), "Q8_0", [["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_0", "Q4_1"],
                                   ["Q4_1", "Q5_1", "Q5_0", "Q4_0", "Q4_1", "Q8_0", "Q5_0"]], None),
    # Q5_0 for the matrix whose 128 columns no K block fits, as quantisers of real files choose.
    "k": (120, dict(hidden_size=256, intermediate_size=256, num_hidden_layers=1, head_dim=32), "Q6_K",
          [["Q4_K", "Q5_K", "Q6_K", "Q5_0", "Q5_K", "Q4_K", "Q6_K"]],
          [1, 1, 1, 1, 1, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8, 8, 8]),
}  # fmt: skip


def write_gguf_model(path, name, tokenizer):
    seed, changes, embedding, layer_types, factors = GGUFS[name]
    c = config("LlamaForCausalLM", "llama", "float32", rope_theta=10000.0, **changes)
    w = random_weights(c, np.random.default_rng(seed))
    head_dim = c.get("head_dim", c["hidden_size"] // c["num_attention_heads"])
    tensors = [("token_embd.weight", embedding, w["model.embed_tokens.weight"])]
    if factors:
        tensors.append(("rope_freqs.weight", "F32", np.array(factors, np.float32)))
    for i, types in enumerate(layer_types):
        p = f"model.layers.{i}."
        for part, hf in reference.GGUF_LAYER_NAMES.items():
            m = w[p + hf + ".weight"]
            if part in ("attn_q", "attn_k"):
                m = permute(m, c["num_attention_heads" if part == "attn_q" else "num_key_value_heads"])
            kind = types[KINDS.index(part)] if part in KINDS else "F32"
            tensors.append((f"blk.{i}.{part}.weight", kind, m))
    tensors.append(("output_norm.weight", "F32", w["model.norm.weight"]))
    metadata = {
        "general.architecture": "llama",
        "general.name": f"tiny {name}",
        "general.file_type": 2,
        "llama.block_count": c["num_hidden_layers"],
        "llama.context_length": c["max_position_embeddings"],
        "llama.embedding_length": c["hidden_size"],
        "llama.feed_forward_length": c["intermediate_size"],
        "llama.attention.head_count": c["num_attention_heads"],
        "llama.attention.head_count_kv": c["num_key_value_heads"],
        "llama.attention.key_length": head_dim,
        "llama.attention.value_length": head_dim,
        "llama.attention.layer_norm_rms_epsilon": c["rms_norm_eps"],
        "llama.rope.dimension_count": head_dim,
        "llama.rope.freq_base": c["rope_theta"],
        "llama.vocab_size": c["vocab_size"],
        **tokenizer,
    }
    write_gguf(path, metadata, tensors)


def check_dequantisation(path):
    """Our reading of every block format against PyPI's gguf package, bit for bit."""
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    for name, (kind, shape, raw) in reference.read_gguf(path)[1].items():
        if kind in QUANTISERS:
            theirs = dequantize(np.frombuffer(raw, np.uint8), GGMLQuantizationType[kind]).reshape(shape)
            assert np.array_equal(theirs, reference.dequantise(kind, raw, shape)), (path, name)


# ---------------------------------------------------------------- tokenizer

STRINGS = [
    "",
    "Hello, world!",
    "The engine reads the next token.",
    "  two spaces\tand a tab\n\nnew lines \n",
    "can't we'll IT'S they're",
    "1234567890 and 3.14",
    "naïve café Ünïcödé ß",
    "日本語 テキスト",
    "family 👩‍👩‍👧 flag 🇫🇷",
    'fn main() { println!("{}", x[0]); }',
    "<|im_start|>user\nhi<|im_end|>\n",
    "a<|endoftext|>b <|im_end|> c\r\n<|im_star|>",
]
CHAT = [dict(role="system", content="Be brief."), dict(role="user", content="What is the time?")]


def tokenizer_golden(folder, template):
    import jinja2

    t = Tokenizer.from_file(os.path.join(folder, "tokenizer.json"))
    encode_ids = lambda s: t.encode(s, add_special_tokens=False).ids
    chat = jinja2.Environment().from_string(template).render(messages=CHAT, add_generation_prompt=True)
    strings = [dict(text=s, ids=encode_ids(s)) for s in STRINGS]
    for s in strings:
        assert t.decode(s["ids"], skip_special_tokens=False) == s["text"], s
    return dict(strings=strings, chat=dict(messages=CHAT, text=chat, ids=encode_ids(chat)))


# ---------------------------------------------------------------- all of it


def report(name, g):
    gaps = [min(c["gaps"]) for c in g["cases"]]
    spread = [np.std(c["last_logits"]) for c in g["cases"]]
    print(f"{name:14} smallest greedy gap {min(gaps):.4f}  logit spread {min(spread):.2f}  distinct {[len(set(c['greedy'])) for c in g['cases']]}")


def golden_of(folder):
    name = os.path.basename(os.path.normpath(folder))
    g = golden(reference.load(folder), np.random.default_rng(100))
    write_json(os.path.join(folder, "golden.json"), dict(model=name, **g))
    report(name, g)


def main():
    if sys.argv[1:2] == ["--golden"]:
        return golden_of(*sys.argv[2:])
    here = os.path.dirname(os.path.abspath(__file__))
    out = sys.argv[1] if len(sys.argv) > 1 else os.path.join(here, "..", "models")
    tokenizer, tokenizer_config = tokenizer_files(384)
    for name, (seed, dtype, shards, c) in MODELS.items():
        folder = os.path.join(out, name)
        shutil.rmtree(folder, ignore_errors=True)
        os.makedirs(folder)
        weights = random_weights(c, np.random.default_rng(seed))
        write_json(os.path.join(folder, "config.json"), c)
        if shards > 1:
            write_shards(folder, weights, dtype, shards)
        else:
            write_safetensors(os.path.join(folder, "model.safetensors"), weights, dtype)
        if name == "tiny-llama3":
            write_json(os.path.join(folder, "generation_config.json"), dict(bos_token_id=1, eos_token_id=[2, 0], pad_token_id=2))
        if c["vocab_size"] == 384:
            write_json(os.path.join(folder, "tokenizer.json"), tokenizer)
            write_json(os.path.join(folder, "tokenizer_config.json"), tokenizer_config)
        g = golden(reference.load(folder), np.random.default_rng(seed + 100))
        write_json(os.path.join(folder, "golden.json"), dict(model=name, **g))
        report(name, g)
    folder = os.path.join(out, "tiny-llama")
    write_json(os.path.join(out, "tokenizer-golden.json"), tokenizer_golden(folder, tokenizer_config["chat_template"]))
    folder = os.path.join(out, "tiny-gguf")
    shutil.rmtree(folder, ignore_errors=True)
    os.makedirs(folder)
    for name, (seed, *_) in GGUFS.items():
        path = os.path.join(folder, name + ".gguf")
        write_gguf_model(path, name, gguf_tokenizer(tokenizer, tokenizer_config))
        check_dequantisation(path)
        g = golden(reference.load(path), np.random.default_rng(seed + 100))
        write_json(os.path.join(folder, name + ".golden.json"), dict(model=name, **g))
        report(name + ".gguf", g)


if __name__ == "__main__":
    main()
