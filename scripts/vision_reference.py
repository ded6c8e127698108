#!/usr/bin/env python3
"""Tiny vision transformers and their goldens, by timm, transformers and PyTorch autograd: models/tiny-vit-{hf,timm}, models/tiny-dinov2.

    pip install torch==2.15.0 transformers==5.24.0 timm==1.0.31 && python scripts/vision_reference.py

Weights are random, seeded and stored in float32 (timm's in float16); all that is computed is float64 (transformers' eager attention would take
its softmax in float32, so it is not used), but for the interpolation of positions, which transformers does in float32. The engine shares nothing with what computes here. Writes the same bytes each time on one machine.

| folder | what it catches |
| --- | --- |
| tiny-vit-hf | Hugging Face's ViT names, eps 1e-12 of its config, class token |
| tiny-vit-timm | timm's names, fused qkv, one channel, MLP twice as wide, mean of the patches before the norm (fc_norm), no biases on q, k, v |
| tiny-dinov2 | DINOv2's names, LayerScale, no head, images of 24x20 on positions for 16x16 |

golden.json:

| key | value |
| --- | --- |
| `image` | `[n, channels, height, width]`: value i of all images is ((7919 i + 104729) mod 1021) / 510.5 - 1, as float32 |
| `labels`, `allowed` | classes, and a subset of the classes that holds all labels |
| `logits` | `[n, classes]`; in tiny-dinov2 by a head whose weight i is ((53 i + 5) mod 97) / 97 - 0.5, bias i ((29 i + 3) mod 31) / 31 - 0.5 |
| `features` | what the head reads |
| `hidden` | of image 0, the embedding and the output of each block, pooled as for the head but not normed |
| `loss`, `loss_allowed` | mean cross-entropy over all classes, and with the logits of the others at -inf |
| `grads` | of `loss_allowed`, by role in the engine: L2 norm, sum, and values at eight places, the four largest among them |
| `lora` | rank 2, scale 1.5 on q, v, o, fc1 and fc2 of every block (q and v only in tiny-dinov2): value i of A of module m is (((37 i + 11 + 7 m) mod 101) / 101
  - 0.5) / 5, of B (((41 i + 17 + 5 m) mod 103) / 103 - 0.5) / 5; modules are counted from 0, block by block; `loss` and `grads` as above, of A and B |
"""

import json
import os

import numpy as np
import timm
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import save_file

from fixture_files import write_json
from train_reference import digits, record

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "models")
BLOCK = ["norm1.w", "norm1.b", "attn.wq", "attn.bq", "attn.wk", "attn.bk", "attn.wv", "attn.bv", "attn.wo", "attn.bo", "scale1",
         "norm2.w", "norm2.b", "mlp.fc1.w", "mlp.fc1.b", "mlp.fc2.w", "mlp.fc2.b", "scale2"]


def formula(shape, a, b, m, scale, shift):
    i = torch.arange(int(np.prod(shape)), dtype=torch.float64)
    return (((a * i + b) % m) / scale - shift).float().double().reshape(shape)


def randomise(model, seed):
    """Norms around 1, attention that is sharp, residuals that matter."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            r = torch.randn(p.shape, generator=g)
            if p.dim() == 1 and ("norm" in name) and name.endswith("weight"):
                r = 1 + 0.2 * r
            elif "lambda1" in name:
                r = 0.6 + 0.2 * r
            elif p.dim() == 1:
                r = 0.2 * r
            elif "token" in name or "pos" in name:
                r = 0.5 * r
            else:
                r = 1.4 * r / p[0].numel() ** 0.5
            p.copy_(r)


def close(name, a, b):
    assert torch.allclose(a, b, rtol=0, atol=1e-9), (name, (a - b).abs().max())


class Case:
    """A model with its parameters by role: (parameter, rows) each, where the engine splits what a file has as one."""

    def __init__(self, model, roles, run, blocks, modules):
        self.model, self.roles, self.run, self.blocks, self.modules = model, roles, run, blocks, modules

    def weight(self, params, role):
        name, rows = self.roles[role]
        return params[name] if rows is None else params[name][rows]

    def golden(self, shape, labels, allowed, head=None):
        x = formula(shape, 7919, 104729, 1021, 510.5, 1)
        params = {n: p.detach().clone().requires_grad_() for n, p in self.model.named_parameters()}
        extra = [h.clone().requires_grad_() for h in head] if head else []

        def forward(params):
            features, hidden, logits = self.run(self.model, params, x)
            return features, hidden, F.linear(features, *extra) if head else logits

        features, hidden, logits = forward(params)
        barred = torch.full((logits.shape[1],), float("-inf"), dtype=torch.float64)
        barred[allowed] = 0
        target = torch.tensor(labels)
        loss, some = F.cross_entropy(logits, target), F.cross_entropy(logits + barred, target)
        some.backward()
        grads = {}
        for role, (name, rows) in self.roles.items():
            if role == "positions" and head:
                continue
            g = params[name].grad
            grads[role] = g if rows is None else g[rows]
        if head:
            grads |= {"head.w": extra[0].grad, "head.b": extra[1].grad}
        grads = record(grads)  # now: the second backward adds to that of the head

        pairs, changed = [], {n: p.detach() for n, p in params.items()}
        for m, role in enumerate(self.modules):
            name, rows = self.roles[role]
            out, inp = self.weight(changed, role).shape
            a = formula((2, inp), 37, 11 + 7 * m, 101, 101, 0.5) / 5
            b = formula((out, 2), 41, 17 + 5 * m, 103, 103, 0.5) / 5
            a, b = (v.float().double().requires_grad_() for v in (a, b))
            pairs.append((role, a, b))
            w = changed[name]
            delta = 1.5 * b @ a
            if rows is not None:
                delta = F.pad(delta, (0, 0, rows.start, w.shape[0] - rows.stop))
            changed[name] = w + delta
        _, _, adapted = forward(changed)
        lora_loss = F.cross_entropy(adapted + barred, target)
        lora_loss.backward()
        lora = record({f"{role}.{side}": v.grad for role, a, b in pairs for side, v in (("a", a), ("b", b))})
        return digits(dict(
            image=list(shape), labels=labels, allowed=allowed, logits=logits.tolist(), features=features.tolist(),
            hidden=[h.tolist() for h in hidden], loss=loss.item(), loss_allowed=some.item(), grads=grads,
            lora=dict(modules=self.modules, loss=lora_loss.item(), grads=lora)))


def block_roles(i, names):
    return {f"blocks.{i}.{role}": name for role, name in zip(BLOCK, names) if name is not None}


def lora_roles(blocks, which):
    return [f"blocks.{i}.{role}" for i in range(blocks) for role in which]


def write(folder, tensors, config, golden):
    path = os.path.join(ROOT, folder)
    os.makedirs(path, exist_ok=True)
    save_file({n: t.contiguous() for n, t in tensors.items()}, os.path.join(path, "model.safetensors"), metadata={"format": "pt"})
    write_json(os.path.join(path, "config.json"), config)
    write_json(os.path.join(path, "golden.json"), golden)


def saved(model, folder):
    """What transformers writes to disk: names in files are not those of modules."""
    from safetensors.torch import load_file
    import tempfile
    with tempfile.TemporaryDirectory() as d:
        model.save_pretrained(d)
        config = json.load(open(os.path.join(d, "config.json")))
        return load_file(os.path.join(d, "model.safetensors")), config


def hf(model_class, config, seed, folder, prefix, shape, classes, allowed, labels, which, head=None):
    model = model_class(config)
    randomise(model, seed)
    tensors, settings = saved(model, folder)
    model = model.double().eval()
    blocks, dino = config.num_hidden_layers, head is not None
    # Parameters of the modules beside names in the file: equal values say which is which.
    names = {}
    for name, p in model.named_parameters():
        same = [n for n, t in tensors.items() if t.shape == p.shape and torch.equal(t.double(), p)]
        assert len(same) == 1, (name, same)
        names[same[0]] = name
    emb = prefix + "embeddings."
    roles = {"patch.w": emb + "patch_embeddings.projection.weight", "patch.b": emb + "patch_embeddings.projection.bias",
             "class": emb + "cls_token", "positions": emb + "position_embeddings"}
    for i in range(blocks):
        at = f"{prefix}encoder.layer.{i}."
        both = lambda n: (at + n + ".weight", at + n + ".bias")
        norms = ("norm1", "norm2") if dino else ("layernorm_before", "layernorm_after")
        mlp = ("mlp.fc1", "mlp.fc2") if dino else ("intermediate.dense", "output.dense")
        scale = (at + "layer_scale1.lambda1", at + "layer_scale2.lambda1") if dino else (None, None)
        attn = [w for n in ("attention.query", "attention.key", "attention.value", "output.dense") for w in both("attention." + n)]
        roles |= block_roles(i, [*both(norms[0]), *attn, scale[0], *both(norms[1]), *both(mlp[0]), *both(mlp[1]), scale[1]])
    roles |= {"norm.w": prefix + "layernorm.weight", "norm.b": prefix + "layernorm.bias"}
    if not dino:
        roles |= {"head.w": "classifier.weight", "head.b": "classifier.bias"}
    roles = {role: (names[name], None) for role, name in roles.items()}

    def run(model, params, x):
        out = torch.func.functional_call(model, params, (x,), dict(output_hidden_states=True, **({} if dino else dict(interpolate_pos_encoding=False))))
        hidden = [h[0, 0] for h in out.hidden_states]
        if dino:
            return out.last_hidden_state[:, 0], hidden, None
        norm = model.vit.layernorm
        last = F.layer_norm(out.hidden_states[-1][:, 0], (config.hidden_size,), params["vit.layernorm.weight"], params["vit.layernorm.bias"], norm.eps)
        close(folder, F.linear(last, params["classifier.weight"], params["classifier.bias"]), out.logits)
        return last, hidden, out.logits

    case = Case(model, roles, run, blocks, lora_roles(blocks, which))
    write(folder, tensors, settings, case.golden(shape, labels, allowed, head))


def timm_case(seed, folder):
    args = dict(img_size=16, patch_size=4, in_chans=1, num_classes=6, embed_dim=32, depth=2, num_heads=4, mlp_ratio=2.0, qkv_bias=False)
    model = timm.models.VisionTransformer(**args, global_pool="avg").eval()
    randomise(model, seed)
    model = model.half()
    tensors = {n: t.clone() for n, t in model.state_dict().items()}
    model = model.double()
    roles = {"patch.w": ("patch_embed.proj.weight", None), "patch.b": ("patch_embed.proj.bias", None), "class": ("cls_token", None),
             "positions": ("pos_embed", None)}
    for i in range(2):
        at, h = f"blocks.{i}.", 32
        both = lambda n: [(at + n + ".weight", None), (at + n + ".bias", None)]
        part = lambda k: [(at + "attn.qkv.weight", slice(k * h, (k + 1) * h)), None]
        roles |= block_roles(i, [*both("norm1"), *part(0), *part(1), *part(2), *both("attn.proj"), None, *both("norm2"), *both("mlp.fc1"),
                                 *both("mlp.fc2"), None])
    roles |= {"norm.w": ("fc_norm.weight", None), "norm.b": ("fc_norm.bias", None), "head.w": ("head.weight", None), "head.b": ("head.bias", None)}

    def run(model, params, x):
        streams = []
        hooks = [model.blocks[0].register_forward_pre_hook(lambda _, a: streams.append(a[0]))]
        hooks += [b.register_forward_hook(lambda _, __, out: streams.append(out)) for b in model.blocks]
        logits = torch.func.functional_call(model, params, (x,))
        [h.remove() for h in hooks]
        pooled = [s[:, 1:].mean(1) for s in streams]
        features = F.layer_norm(pooled[-1], (32,), params["fc_norm.weight"], params["fc_norm.bias"], 1e-6)
        close(folder, F.linear(features, params["head.weight"], params["head.bias"]), logits)
        return features, [p[0] for p in pooled], logits

    case = Case(model, roles, run, 2, lora_roles(2, ["attn.wq", "attn.wv", "attn.wo", "mlp.fc1.w", "mlp.fc2.w"]))
    golden = case.golden((3, 1, 16, 16), [1, 4, 5], [1, 2, 4, 5])
    config = dict(
        architecture="vit_tiny_patch16_224", num_classes=6, num_features=32, global_pool="avg",
        model_args={k: v for k, v in args.items() if k != "num_classes"},
        pretrained_cfg=dict(input_size=[1, 16, 16], interpolation="bicubic", mean=[0.5], std=[0.5], num_classes=6, first_conv="patch_embed.proj",
                            classifier="head"))
    write(folder, tensors, config, golden)


if __name__ == "__main__":
    torch.set_num_threads(1)
    common = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=4, num_channels=3, attn_implementation="sdpa")
    which = ["attn.wq", "attn.wv", "attn.wo", "mlp.fc1.w", "mlp.fc2.w"]
    vit = transformers.ViTConfig(**common, intermediate_size=64, num_labels=5)
    hf(transformers.ViTForImageClassification, vit, 1, "tiny-vit-hf", "vit.", (3, 3, 16, 16), 5, [0, 2, 3], [3, 0, 2], which)
    timm_case(2, "tiny-vit-timm")
    dino = transformers.Dinov2Config(**common, mlp_ratio=2, use_mask_token=False)
    head = (formula((4, 32), 53, 5, 97, 97, 0.5), formula((4,), 29, 3, 31, 31, 0.5))
    hf(transformers.Dinov2Model, dino, 3, "tiny-dinov2", "", (2, 3, 24, 20), 4, [0, 1, 3], [3, 1], ["attn.wq", "attn.wv"], head)
