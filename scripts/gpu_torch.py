"""PyTorch on what `quadriga bench kernels --json` has timed: takes its lines, gives one for each that PyTorch has a counterpart of.

    quadriga bench kernels --device cuda --large --weights bf16 --json | python3 gpu_torch.py

The counterparts, bf16 throughout whatever the type of our weights: `linear`, `qkv` and `linear_glu` are torch.nn.functional.linear
(cuBLAS) over one matrix that holds all outputs, the last with silu and product behind it; `attention` (of one sequence, not of a
tree) is scaled_dot_product_attention with grouped heads, once by PyTorch's own choice and once by the flash backend alone, of which
the faster counts.

Before anything is timed every call has run three times. Then so many calls that they last two milliseconds are captured as one CUDA
graph, so that Python's launches are not what is timed (our kernels are timed as graphs too); inputs rotate over sets that together
exceed the L2 cache several times. Times are medians of CUDA events around eleven replays. Ends with 3 without PyTorch or GPU.
"""

import json
import math
import re
import statistics
import sys

try:
    import torch
    import torch.nn.functional as F
    from torch.nn.attention import SDPBackend, sdpa_kernel
except ImportError:
    sys.exit(3)

BF16 = torch.bfloat16
ROTATED = 256 << 20
BATCH_MS = 2.0
REPLAYS = 11


def elapsed(work):
    """Milliseconds on the device."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    work()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def seconds(calls):
    """Median seconds of one of `calls`, which are taken in turn, and whether they ran as a graph."""

    def one_round():
        for call in calls:
            call()

    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        for _ in range(3):
            one_round()
        torch.cuda.synchronize()
        rounds = max(1, min(math.ceil(BATCH_MS / elapsed(one_round)), math.ceil(2000 / len(calls))))

        def batch():
            for _ in range(rounds):
                one_round()

        replay, how = batch, "eager"
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
                batch()
            replay, how = graph.replay, "graph"
        except RuntimeError:  # something in it cannot be captured
            torch.cuda.synchronize()
        replay()
        times = [elapsed(replay) for _ in range(REPLAYS)]
    return statistics.median(times) / 1e3 / (rounds * len(calls)), how


def rotated(make, size):
    """As many sets of inputs as exceed the cache together, `size` bytes each."""
    return [make() for _ in range(max(1, min(256, math.ceil(ROTATED / size))))]


def random(*shape):
    return torch.randn(*shape, device="cuda", dtype=BF16)


def speeds(s, how, flops, moved):
    return {"us": round(s * 1e6, 3), "tflop_s": round(flops / s / 1e12, 3), "gb_s": round(moved / s / 1e9, 1), "timed": how}


def product(rows, inputs, outputs, bias=False, gated=False):
    """One matrix of all outputs; gated: silu of the first half times the second."""
    x, b = random(rows, inputs), random(outputs) if bias else None
    weights = rotated(lambda: random(outputs, inputs) / math.sqrt(inputs), 2 * inputs * outputs)

    def call(w):
        y = F.linear(x, w, b)
        if gated:
            gate, up = y.chunk(2, dim=-1)
            y = F.silu(gate) * up
        return y

    moved = 2 * (inputs * outputs + rows * (inputs + (outputs // 2 if gated else outputs)))
    return speeds(*seconds([lambda w=w: call(w) for w in weights]), 2 * rows * inputs * outputs, moved)


def attention(heads, kv_heads, dim, past, rows, full):
    keys = past + rows
    cached = rotated(lambda: (random(1, kv_heads, keys, dim), random(1, kv_heads, keys, dim)), 2 * 2 * kv_heads * keys * dim)
    q = random(1, heads, rows, dim)
    # A single row sees all keys, with or without a mask; is_causal would align the mask with the first key.
    causal = not full and rows > 1
    if causal and past:
        return {}
    pairs = rows * past + rows * (rows + 1) / 2 if causal else rows * keys
    calls = [lambda k=k, v=v: F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True) for k, v in cached]
    found = {"default": seconds(calls)}
    try:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            found["flash"] = seconds(calls)
    except RuntimeError as e:  # the backend does not take these sizes, or is not there
        found["flash"] = (math.inf, str(e).splitlines()[0])
    backend = min(found, key=lambda name: found[name][0])
    moved = 2 * dim * (2 * rows * heads + 2 * keys * kv_heads)
    each = {f"{name}_us": round(s * 1e6, 3) if s < math.inf else how for name, (s, how) in found.items()}
    return {**speeds(*found[backend], 4 * pairs * dim * heads, moved), "backend": backend, **each}


def work_of(kernel, shape):
    """The counterpart's function and sizes, or None."""
    if kernel == "linear" and (m := re.fullmatch(r"\w+ (\d+)x(\d+)>(\d+)( bias)?", shape)):
        rows, inputs, outputs = map(int, m.groups()[:3])
        return product, (rows, inputs, outputs, bool(m[4]))
    if kernel == "qkv" and (m := re.fullmatch(r"\w+ (\d+)x(\d+)>(\d+)\+2x(\d+)( bias)?", shape)):
        rows, inputs, q, kv = map(int, m.groups()[:4])
        return product, (rows, inputs, q + 2 * kv, bool(m[5]))
    if kernel == "linear_glu" and (m := re.fullmatch(r"\w+ Silu (\d+)x(\d+)>2x(\d+)", shape)):
        rows, inputs, outputs = map(int, m.groups())
        return product, (rows, inputs, 2 * outputs, False, True)
    if kernel == "attention" and (m := re.fullmatch(r"(\d+)/(\d+)x(\d+) (\d+)\+(\d+)( Full)?", shape)):
        return attention, (*map(int, m.groups()[:5]), bool(m[6]))
    return None


def say(row):
    print(json.dumps(row), flush=True)


def main():
    if not torch.cuda.is_available():
        return 3
    torch.manual_seed(0)
    say({"torch": torch.__version__, "cuda": torch.version.cuda, "device": torch.cuda.get_device_name()})
    big, other = (torch.empty(1 << 29, device="cuda", dtype=torch.uint8) for _ in range(2))
    say({"copy_gb_s": round(2 * big.numel() / seconds([lambda: other.copy_(big)])[0] / 1e9, 1)})
    del big, other
    a, b = random(8192, 8192), random(8192, 8192)
    say({"matmul_8192_tflop_s": round(2 * 8192**3 / seconds([lambda: a @ b])[0] / 1e12, 1)})
    del a, b
    done = {}
    for line in sys.stdin:
        ours = json.loads(line)
        work = work_of(ours["kernel"], ours["shape"])
        if work is None:
            continue
        if work not in done:
            try:
                done[work] = work[0](*work[1])
            except RuntimeError as e:  # no memory, for one
                done[work] = {"failed": str(e).splitlines()[0]}
            torch.cuda.empty_cache()
        if done[work]:
            say({"kernel": ours["kernel"], "shape": ours["shape"], **done[work]})
    return 0


if __name__ == "__main__":
    sys.exit(main())
