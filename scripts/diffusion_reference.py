#!/usr/bin/env python3
"""Tiny masked diffusion models, models/tiny-llada and models/tiny-dream: random weights under the published names, and goldens.

    python scripts/diffusion_reference.py

float64 numpy and no code of the engine's; writes the same bytes each time. diffusion_decoders.py has the decoders and says what each does.

`golden.json` beside each model, positions counted from the prompt's first token:

    mask, shift     as its config.json has or implies them; `shift`: row i of the head predicts position i + 1
    logits          passes over `ids`, `prompt` tokens and then known and masked ones: "full" (all see all) and "blocks" (the prompt is one
                    block, then blocks of 4; a row sees its own block and all before). `rows` are complete rows of the head, by number and
                    as the head gives them, `top5` is [[id, logit] x 5] of each row. `masked` is for each masked position, the shift undone
                    and without the mask's own logit: [position, likeliest token, its probability, entropy in nats]
    prompts         what traces start from
    traces          whole decodings of `new` tokens by `decoder` in blocks of `block`, behind `prompt`: `passes` has for each forward pass
                    what it commits, as [[position, token], ..] in ascending order; `output` is the text at the end, without the prompt.
                    With `eos`, what early stop fills in is in `output` only. `margin` is the least distance of any number that was
                    compared from the other outcome: the likeliest logit from the second of what is committed, a probability or an entropy
                    from its threshold or, where the best are chosen, from the first that is not
"""

import json
import os

import numpy as np

import reference
from diffusion_decoders import MARGIN, MASK, Net, Seen, multi_block, quota, sequential
from fixture_files import tokenizer_files, write_json, write_safetensors

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "models")
TOKENS, ROWS = 385, 392  # the tokenizer's and the mask; rows of the embedding
EOS = 2

LLADA = dict(
    embed="model.transformer.wte.weight", norm="model.transformer.ln_f", head="model.transformer.ff_out", layer="model.transformer.blocks.{}.",
    norm1="attn_norm", q="q_proj", k="k_proj", v="v_proj", o="attn_out", norm2="ff_norm", gate="ff_proj", up="up_proj", down="ff_out",
)  # fmt: skip
QWEN = dict(
    embed="model.embed_tokens.weight", norm="model.norm", head="lm_head", layer="model.layers.{}.", norm1="input_layernorm",
    q="self_attn.q_proj", k="self_attn.k_proj", v="self_attn.v_proj", o="self_attn.o_proj", norm2="post_attention_layernorm",
    gate="mlp.gate_proj", up="mlp.up_proj", down="mlp.down_proj",
)  # fmt: skip


# ---------------------------------------------------------------- random models


def random_weights(names, rng, hidden, ffn, heads, kv_heads, bias, gain):
    w, head = {}, hidden // heads

    def matrix(name, rows, cols, gain):
        w[name] = (rng.standard_normal((rows, cols)) * gain / cols**0.5).astype(np.float32)

    def norm(name, mean=1.0):
        w[name + ".weight"] = (mean + 0.2 * rng.standard_normal(hidden)).astype(np.float32)

    matrix(names["embed"], ROWS, hidden, 1.2)
    for i in range(names["layers"]):
        at = lambda part: names["layer"].format(i) + names[part]
        norm(at("norm1"))
        for part, rows in (("q", heads * head), ("k", kv_heads * head), ("v", kv_heads * head)):
            matrix(at(part) + ".weight", rows, hidden, 1.8)
            if bias:
                w[at(part) + ".bias"] = rng.standard_normal(rows).astype(np.float32)
        matrix(at("o") + ".weight", hidden, heads * head, 2.0)
        norm(at("norm2"))
        matrix(at("gate") + ".weight", ffn, hidden, 1.5)
        matrix(at("up") + ".weight", ffn, hidden, 1.5)
        matrix(at("down") + ".weight", hidden, ffn, 2.0)
    norm(names["norm"])
    matrix(names["head"] + ".weight", ROWS, hidden, gain)
    for name in (names["embed"], names["head"] + ".weight"):
        w[name][TOKENS:] = 0
    w[names["head"] + ".weight"][MASK] *= 2  # often the likeliest, and never to be committed
    return w


def llada_config(c):
    return dict(
        activation_type="silu", alibi=False, alibi_bias_max=8.0, architectures=["LLaDAModelLM"], attention_dropout=0.0, attention_layer_norm=False,
        attention_layer_norm_with_affine=True, bias_for_layer_norm=False, block_group_size=1, block_type="llama", d_model=c["hidden"],
        embedding_dropout=0.0, embedding_size=ROWS, eos_token_id=EOS, flash_attention=False, include_bias=False, include_qkv_bias=False,
        init_cutoff_factor=None, init_device="meta", init_fn="mitchell", init_std=0.02, input_emb_norm=False, layer_norm_type="rms",
        layer_norm_with_affine=True, mask_token_id=MASK, max_sequence_length=256, mlp_hidden_size=c["ffn"], mlp_ratio=4, model_type="llada",
        multi_query_attention=None, n_heads=c["heads"], n_kv_heads=c["kv_heads"], n_layers=c["layers"], pad_token_id=EOS, precision="amp_bf16",
        residual_dropout=0.0, rms_norm_eps=c["eps"], rope=True, rope_full_precision=True, rope_theta=c["theta"], scale_logits=False,
        torch_dtype="bfloat16", use_cache=False, vocab_size=TOKENS, weight_tying=False,
    )  # fmt: skip


def dream_config(c):
    return dict(
        architectures=["DreamModel"], attention_dropout=0.0, bos_token_id=EOS, eos_token_id=EOS, hidden_act="silu", hidden_size=c["hidden"],
        initializer_range=0.02, intermediate_size=c["ffn"], mask_token_id=MASK, max_position_embeddings=256, max_window_layers=c["layers"],
        model_type="Dream", num_attention_heads=c["heads"], num_hidden_layers=c["layers"], num_key_value_heads=c["kv_heads"], pad_token_id=EOS,
        rms_norm_eps=c["eps"], rope_scaling=None, rope_theta=c["theta"], sliding_window=None, tie_word_embeddings=False, torch_dtype="bfloat16",
        use_cache=False, use_mrope=False, use_sliding_window=False, vocab_size=ROWS,
    )  # fmt: skip


SHAPE = dict(hidden=32, ffn=48, heads=4, kv_heads=2, layers=3)
MODELS = {
    "tiny-llada": (14, LLADA, llada_config, 0, "<|mdm_mask|>", dict(SHAPE, eps=1e-5, theta=5000.0)),
    "tiny-dream": (25, QWEN, dream_config, 1, "<|mask|>", dict(SHAPE, eps=1e-6, theta=2000.0)),
}


def make(name, folder):
    """Writes a model and returns it as it was stored."""
    seed, names, config, shift, mask, c = MODELS[name]
    names = dict(names, layers=c["layers"])
    weights = random_weights(names, np.random.default_rng(seed), c["hidden"], c["ffn"], c["heads"], c["kv_heads"], bias=shift == 1, gain=6.0)
    os.makedirs(folder, exist_ok=True)
    write_safetensors(os.path.join(folder, "model.safetensors"), weights, "BF16")
    write_json(os.path.join(folder, "config.json"), config(c))
    tokenizer, more = tokenizer_files(MASK)
    tokenizer["added_tokens"].append(dict(tokenizer["added_tokens"][0], id=MASK, content=mask))
    write_json(os.path.join(folder, "tokenizer.json"), tokenizer)
    write_json(os.path.join(folder, "tokenizer_config.json"), dict(more, mask_token=mask))
    stored = reference.read_safetensors(os.path.join(folder, "model.safetensors"))
    return Net(stored, names, c["heads"], c["kv_heads"], c["theta"], c["eps"], shift)


def check_against_reference(net, ids, visible):
    """The same pass by reference.py, which knows no LLaDA: under Qwen2's names."""
    n, w = net.n, {}
    for part in QWEN:
        for i in range(n["layers"]) if part in ("norm1", "q", "k", "v", "o", "norm2", "gate", "up", "down") else [None]:
            old, new = (n[part], QWEN[part]) if i is None else (n["layer"].format(i) + n[part], QWEN["layer"].format(i) + QWEN[part])
            for tail in ("", ".weight", ".bias"):
                if old + tail in net.w:
                    w[new + tail] = net.w[old + tail]
    c = dict(model_type="qwen2", num_attention_heads=net.heads, num_key_value_heads=net.kv_heads, hidden_size=w[QWEN["embed"]].shape[1])
    c |= dict(num_hidden_layers=n["layers"], rope_theta=net.theta, rms_norm_eps=net.eps)
    theirs = reference.Model(c, w).forward(ids, visible=visible)[0]
    assert np.abs(theirs - net.forward(ids, visible=visible)[0]).max() < 1e-9


# ---------------------------------------------------------------- goldens


def digits(x, n=6):
    return [round(float(v), n) + 0.0 for v in x]


def logits(net, name, ids, prompt, visible, rows):
    check_against_reference(net, ids, visible)
    z = net.forward(ids, visible=visible)[0]
    order = np.argsort(-z, axis=-1, kind="stable")[:, :5]
    top5 = [[[int(i), round(float(row[i]), 6)] for i in best] for row, best in zip(z, order)]
    seen = Seen(z, 0, net.shift)
    masked = [i for i in range(len(ids)) if ids[i] == MASK]
    assert min(seen.gap[i] for i in masked) > MARGIN
    masked = [[i, seen.token[i]] + digits([seen.probability[i], seen.entropy[i]], 9) for i in masked]
    return dict(name=name, ids=ids, prompt=prompt, rows=[[r, digits(z[r])] for r in rows], top5=top5, masked=masked)


def passes(net, rng):
    prompt, new = 7, 16
    ids = [int(t) for t in rng.integers(3, MASK, prompt + new)]
    for i in rng.choice(new, 10, replace=False):
        ids[prompt + i] = MASK
    n = len(ids)
    block = np.array([0] * prompt + [1 + i // 4 for i in range(new)])
    return [
        logits(net, "full", ids, prompt, np.ones((n, n), bool), [0, 15]),
        logits(net, "blocks", ids, prompt, block[None] <= block[:, None], [9]),
    ]


def with_eos(run, prompts):
    """A decoding that ends early, behind a token in its midst: of those that could be the end token, the one whose first place moves
    most often, and that leaves most to do when it is found."""
    best = (0, 0), None, None
    for name, prompt in prompts.items():
        for eos in sorted(set(run(prompt, None)["output"])):
            try:
                t = run(prompt, eos)
            except AssertionError:  # too close to call
                continue
            found, first = [], []
            for step in t["passes"]:
                found += [i - len(prompt) for i, token in step if token == eos]
                first += [min(found)] if found else []
            filled = t["new"] - sum(map(len, t["passes"]))
            if filled > 2 and min(first, default=0) >= t["new"] // 4:
                best = max(best, ((len(set(first)), len(first)), name, t), key=lambda b: b[0])
    return best[1:]


def traces(net, prompts):
    """Every decoder, from both prompts in turn."""
    out = []

    def add(run, eos=False):
        name = list(prompts)[len(out) % 2]
        name, t = with_eos(run, prompts) if eos else (name, run(prompts[name], None))
        out.append(dict(prompt=name) | t)

    for new, block, steps in ((16, 8, 16), (16, 8, 8), (24, 8, 9), (16, 16, 6)):
        add(lambda p, e: quota(net, p, new, block, steps))
    for decoder, cases in (
        ("confidence", ((16, 8, 0.6, False), (24, 8, 0.8, False), (16, 4, 0.5, False), (24, 8, 0.6, True))),
        ("entropy", ((16, 8, 0.7, False), (24, 8, 1.0, False), (24, 24, 0.5, False), (24, 8, 0.8, True))),
    ):
        for new, block, threshold, eos in cases:
            add(lambda p, e: sequential(net, p, new, block, decoder, threshold, e), eos)
    for rule in ("dream", "llada"):
        many = lambda p, e, **more: multi_block(net, p, new, block, rule, threshold, grow, act, e, **more)
        for new, block, threshold, grow, act, eos in (
            (24, 8, 0.6, 0.1, 0.95, False),
            (24, 8, 0.9, 0.1, 0.95, False),
            (24, 8, 0.4, 0.5, 0.75, False),
            (16, 8, 0.7, 1.0, 1.0, False),
            (16, 4, 0.7, 0.1, 0.95, False),
            (24, 8, 0.7, 0.1, 0.95, True),
        ):
            add(many, eos)
        for new, block, threshold, grow, act, delay, refresh, eos in (
            (24, 8, 0.7, 0.1, 0.95, 1, 0, False),
            (24, 8, 0.7, 0.1, 0.95, 2, 0, False),
            (24, 8, 0.7, 0.1, 0.95, 1, 3, False),
            (24, 8, 0.7, 0.1, 0.95, 2, 3, False),
            (24, 4, 0.9, 0.1, 0.75, 2, 0, False),
            (24, 8, 0.8, 0.1, 0.95, 1, 0, True),
            (24, 4, 0.6, 0.5, 0.75, 2, 3, True),
        ):
            add(lambda p, e: many(p, e, cached=(delay, refresh)), eos)
    return out


def check(net, prompt):
    """What must be one decoding whichever way it is come by."""
    same = lambda a, b: a["passes"] == b["passes"] and a["output"] == b["output"]
    for rule in ("dream", "llada"):
        assert same(multi_block(net, prompt, 24, 8, rule, 0.8, 1, 1), sequential(net, prompt, 24, 8, "entropy", 0.8))
        assert same(multi_block(net, prompt, 24, 8, rule, 0.8), multi_block(net, prompt, 24, 8, rule, 0.8, cached=(10000, 3)))
        assert len(multi_block(net, prompt, 24, 8, rule, 99.0)["passes"]) == 3
    assert same(quota(net, prompt, 16, 8, 16), sequential(net, prompt, 16, 8, "confidence", 2.0))


def write_golden(path, golden):
    """One line for each trace."""
    text = lambda v: json.dumps(v, separators=(",", ":"))
    lines = lambda v: "[\n  " + ",\n  ".join(map(text, v)) + "\n ]"
    with open(path, "w", encoding="utf-8", newline="\n") as f:
        f.write("{\n" + ",\n".join(f' "{k}": {lines(v) if k in ("logits", "traces") else text(v)}' for k, v in golden.items()) + "\n}\n")


def main():
    for name in MODELS:
        folder = os.path.join(ROOT, name)
        net = make(name, folder)
        rng = np.random.default_rng(100 + MODELS[name][0])
        prompts = {n: [int(t) for t in rng.integers(3, MASK, k)] for n, k in (("short", 5), ("long", 12))}
        check(net, prompts["long"])
        golden = dict(mask=MASK, shift=bool(net.shift), logits=passes(net, rng), prompts=prompts, traces=traces(net, prompts))
        write_golden(os.path.join(folder, "golden.json"), golden)
        size = sum(os.path.getsize(os.path.join(folder, f)) for f in os.listdir(folder))
        print(f"{name}: {len(golden['traces'])} traces, least margin {min(t['margin'] for t in golden['traces'])}, {size} bytes")


if __name__ == "__main__":
    main()
