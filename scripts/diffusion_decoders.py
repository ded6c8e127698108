"""A bidirectional decoder and the ways in which masked diffusion models fill in a text, in float64 numpy; for diffusion_reference.py.

Written down plainly from the papers: LLaDA (arXiv:2502.09992), Fast-dLLM (2505.22618), dParallel (2509.26488), d3LLM (2601.07568), the last
without what its published code gets wrong. Of what is masked the logit counts as minus infinity wherever probabilities are taken. Row i of
the head predicts position i, or i + 1 where `shift` is 1; position 0 is the prompt's first.

Blocks are as many as are needed, the last may be shorter; a block's progress is the share of its positions that are not masked, the prompt's 1.

quota           `steps` passes, as many for each block (s): of the n masked positions before a block the n div s (one more where k < n mod s)
                with the highest probability are committed in its pass number k
confidence      block after block: the most probable position, and all with probability >= `threshold`
entropy         block after block: the position of lowest entropy, and all with entropy <= `threshold`
multi_block     several blocks at once. Before a pass: a block becomes full for good when its predecessor's progress is >= `act`; then, unless
                an end token has been found, one more block is created if the last one's progress is >= `add` (the first exists from the start).
                Candidates are the masked positions up to the end of the last block. `rule` dream commits those with entropy < `threshold`,
                llada those with entropy <= `threshold` and the lowest of all; if none of them lies in the first full block that has masks,
                the lowest of that block is committed too. Once an end token is found, all blocks exist, and those behind it are full
cached          the same with keys and values of the first K positions kept, whole blocks, the prompt being the first. `queries` has for each
                pass [kind, first position that is computed, K after it]. Passes count from 1. Before a pass, blocks beyond K are looked at in
                order up to the first with masks: a block is finished in the pass (the prompt in pass 0) in which it is first seen here, and
                is to be admitted `delay` passes later. (Rule llada: the first that is not yet to be admitted ends this.) If there are blocks
                to be admitted: "admission", [K, end) is computed behind the cache, and K moves to the end of the last of them. Else, without
                a cache, "full". Else, if a finished block waits or the pass is a multiple of `refresh` (0: never): "refresh", all is
                computed and replaces the K cached positions. Else "cached", as admission without admitting. Where rows predict the next
                position, the first prediction belongs to position K - 1: the cache then holds K - 1 rows, and one row more is computed,
                always anew. Blocks behind an end token are never waited for

Early stop: where `eos` is given, all that lies behind the first such token is filled with it before every pass and at the end.
"""

import math

import numpy as np

MARGIN = 1e-4  # the least distance of anything that is compared from the other outcome
MASK = 384


# ---------------------------------------------------------------- the model


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def rms(x, g, eps):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * g


class Net:
    """A decoder whose keys and values are plain arrays, behind whatever went before."""

    def __init__(self, weights, names, heads, kv_heads, theta, eps, shift):
        self.w, self.n = weights, names
        self.heads, self.kv_heads, self.theta, self.eps, self.shift = heads, kv_heads, theta, eps, shift

    def linear(self, x, name):
        y = x @ self.w[name + ".weight"].T
        return y + self.w[name + ".bias"] if name + ".bias" in self.w else y

    def turn(self, x, positions):
        """Rotates pair (i, i + half) of each head of [rows, heads, 2 half]."""
        half = x.shape[-1] // 2
        angle = np.outer(positions, self.theta ** (-np.arange(half) / half))[:, None]
        a, b = x[..., :half], x[..., half:]
        return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], -1)

    def forward(self, ids, past=None, visible=None):
        """Logits of `ids` behind the positions of `past`, and keys and values of `ids`, layer by layer. `visible[i, j]`: row i sees key j,
        those of the past first."""
        known = len(past[0][0]) if past else 0
        positions = np.arange(known, known + len(ids))
        x, kv = self.w[self.n["embed"]][np.asarray(ids)], []
        for i in range(self.n["layers"]):
            at = lambda part: self.n["layer"].format(i) + self.n[part]
            y = rms(x, self.w[at("norm1") + ".weight"], self.eps)
            split = lambda part, heads: self.linear(y, at(part)).reshape(len(ids), heads, -1)
            q = self.turn(split("q", self.heads), positions)
            k, v = self.turn(split("k", self.kv_heads), positions), split("v", self.kv_heads)
            kv.append((k, v))
            if past:
                k, v = np.concatenate([past[i][0], k]), np.concatenate([past[i][1], v])
            out = np.empty_like(q)
            for h in range(self.heads):
                g = h * self.kv_heads // self.heads
                s = q[:, h] @ k[:, g].T / math.sqrt(q.shape[-1])
                out[:, h] = softmax(s if visible is None else np.where(visible, s, -np.inf)) @ v[:, g]
            x = x + self.linear(out.reshape(len(ids), -1), at("o"))
            y = rms(x, self.w[at("norm2") + ".weight"], self.eps)
            gate = self.linear(y, at("gate"))
            x = x + self.linear(gate / (1 + np.exp(-gate)) * self.linear(y, at("up")), at("down"))
        return self.linear(rms(x, self.w[self.n["norm"] + ".weight"], self.eps), self.n["head"]), kv


class Seen:
    """What a pass over positions from `first` on says of each of them: likeliest token, its probability, entropy, gap to the second logit."""

    def __init__(self, logits, first, shift):
        z = logits.copy()
        z[:, MASK] = -np.inf
        p = softmax(z)
        two = np.sort(z, -1)[:, -2:]
        # x ln x is 0 at 0.
        entropy = -(p * np.log(np.where(p > 0, p, 1))).sum(-1)
        at = first + shift
        position = lambda values: {at + i: v for i, v in enumerate(values.tolist())}
        self.token, self.probability = position(z.argmax(-1)), position(p.max(-1))
        self.entropy, self.gap = position(entropy), position(two[:, 1] - two[:, 0])


# ---------------------------------------------------------------- decoders


class Text:
    """A text that is filled in, and what was done to it."""

    def __init__(self, net, prompt, new, block, eos=None):
        self.net, self.x, self.p, self.block, self.eos = net, list(prompt) + [MASK] * new, len(prompt), block, eos
        self.passes, self.margin = [], math.inf

    def masked(self, first=0, end=None):
        end = len(self.x) if end is None else end
        return [i for i in range(first, end) if self.x[i] == MASK]

    def stop_early(self):
        """The first end token, behind which all is one too."""
        if self.eos not in self.x[self.p :]:
            return None
        e = self.x.index(self.eos, self.p)
        self.x[e + 1 :] = [self.eos] * (len(self.x) - e - 1)
        return e

    def see(self):
        return Seen(self.net.forward(self.x)[0], 0, self.net.shift)

    def compare(self, score, threshold, pool):
        self.margin = min([self.margin] + [abs(score[i] - threshold) for i in pool])

    def best(self, score, pool, n=1):
        """The n positions of lowest score."""
        order = sorted(pool, key=lambda i: score[i])
        if n < len(order):
            self.margin = min(self.margin, score[order[n]] - score[order[n - 1]])
        return order[:n]

    def commit(self, seen, chosen):
        for i in sorted(chosen):
            assert self.x[i] == MASK
            self.x[i] = seen.token[i]
            self.margin = min(self.margin, seen.gap[i])
        self.passes.append([[i, self.x[i]] for i in sorted(chosen)])

    def trace(self, **more):
        assert self.margin >= MARGIN, f"margin {self.margin}: {more}"
        eos = {} if self.eos is None else dict(eos=self.eos)
        return dict(**more, **eos, passes=self.passes, output=self.x[self.p :], margin=float(f"{self.margin:.3g}"))


def quota(net, prompt, new, block, steps):
    t = Text(net, prompt, new, block)
    each = steps // -(-new // block)
    for end in range(t.p + block, len(t.x) + block, block):
        n = len(t.masked(0, end))
        for k in range(each):
            seen = t.see()
            unlikely = {i: -p for i, p in seen.probability.items()}
            t.commit(seen, t.best(unlikely, t.masked(0, end), n // each + (k < n % each)))
    return t.trace(decoder="quota", new=new, block=block, steps=steps)


def sequential(net, prompt, new, block, decoder, threshold, eos=None):
    """Block after block, by probability or by entropy."""
    t = Text(net, prompt, new, block, eos)
    sign = -1 if decoder == "confidence" else 1
    while True:
        t.stop_early()
        if not t.masked():
            return t.trace(decoder=decoder, new=new, block=block, threshold=threshold)
        end = t.p + ((t.masked()[0] - t.p) // block + 1) * block
        pool, seen = t.masked(0, end), t.see()
        score = {i: sign * s for i, s in getattr(seen, "probability" if sign < 0 else "entropy").items()}
        t.compare(score, sign * threshold, pool)
        t.commit(seen, [i for i in pool if score[i] <= sign * threshold] or t.best(score, pool))


class Block:
    def __init__(self, text, first, end, full=True, finished=None):
        self.text, self.first, self.end, self.full, self.finished, self.admitted = text, first, end, full, finished, False

    def left(self):
        return self.text.masked(self.first, self.end)

    def progress(self):
        return 1 - len(self.left()) / (self.end - self.first) if self.end > self.first else 1


class Plain:
    """All positions are computed in every pass."""

    def __call__(self, t, blocks, rule):
        return t.see()


class Cached:
    def __init__(self, delay, refresh):
        self.delay, self.refresh, self.k, self.cache, self.number, self.queries = delay, refresh, 0, None, 0, []

    def __call__(self, t, blocks, rule):
        self.number += 1
        admit = self.scan(blocks, rule)
        waits = any(not b.left() and b.finished is not None and not b.admitted for b in blocks)
        due = self.refresh > 0 and self.number % self.refresh == 0
        if admit > self.k:
            kind, anew = "admission", self.k == 0
        elif self.k == 0:
            kind, anew = "full", True
        else:
            kind, anew = ("refresh", True) if waits or due else ("cached", False)
        s = t.net.shift
        first = 0 if anew else self.k - s
        logits, own = t.net.forward(t.x[first:], None if anew else self.cache)
        self.k = max(self.k, admit)
        if kind == "refresh" or anew and self.k:
            self.cache = [(k[: self.k - s], v[: self.k - s]) for k, v in own]
        elif kind == "admission":
            n = self.k - s - first
            self.cache = [tuple(np.concatenate([a, b[:n]]) for a, b in zip(old, new)) for old, new in zip(self.cache, own)]
        self.queries.append([kind, first, self.k])
        return Seen(logits, first, s)

    def scan(self, blocks, rule):
        """Where the cache ends after this pass."""
        end = self.k
        for b in blocks:
            if b.end <= self.k:
                continue
            if b.left():
                break
            if b.finished is None:
                b.finished = self.number
            if self.number - b.finished < self.delay:
                if rule == "llada":
                    break
            elif not b.admitted:
                b.admitted, end = True, b.end
        return end


def multi_block(net, prompt, new, block, rule, threshold, add=0.1, act=0.95, eos=None, cached=None):
    t = Text(net, prompt, new, block, eos)
    look = Cached(*cached) if cached else Plain()
    spans = [(a, min(a + block, len(t.x))) for a in range(t.p, len(t.x), block)]
    blocks = [Block(t, 0, t.p, finished=0), Block(t, *spans[0])]
    parameters = dict(new=new, block=block, rule=rule, threshold=threshold, add=add, act=act)
    while True:
        e = t.stop_early()
        if e is not None:
            blocks += [Block(t, *span) for span in spans[len(blocks) - 1 :]]
            for b in blocks:
                if b.first > e:
                    b.full = b.admitted = True
        if not t.masked():
            if cached:
                delay = dict(delay=look.delay, refresh=look.refresh, queries=look.queries)
                return t.trace(decoder="cached", **parameters, **delay)
            return t.trace(decoder="multi_block", **parameters)
        for before, b in zip(blocks, blocks[1:]):
            b.full = b.full or before.progress() >= act
        last = blocks[-1]
        if e is None and len(blocks) <= len(spans) and (last.progress() >= add or not last.left()):
            blocks.append(Block(t, *spans[len(blocks) - 1], full=last.progress() >= act))
        pool = t.masked(0, max(b.end for b in blocks if b.full or b.left()))
        seen = look(t, blocks, rule)
        t.compare(seen.entropy, threshold, pool)
        chosen = {i for i in pool if seen.entropy[i] < threshold}
        if rule == "llada" and not chosen:
            chosen = set(t.best(seen.entropy, pool))
        first = next(b for b in blocks if b.full and b.left())
        if not chosen & set(first.left()):
            chosen |= set(t.best(seen.entropy, first.left()))
        t.commit(seen, chosen)
