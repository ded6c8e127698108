"""PyTorch on the shapes of `quadriga bench kernels --device cuda --large`: a JSON line for each, named as there.

bf16 throughout. Times are medians of CUDA events around batches of calls, after a warm-up; inputs rotate over sets that exceed the L2
cache, as in the engine's benchmark. Matrix products are torch.nn.functional.linear (cuBLAS); attention is
scaled_dot_product_attention with grouped keys, by default and with the flash backend alone, of which the faster counts.
"""

import json
import math
import statistics
import sys

try:
    import torch
    import torch.nn.functional as F
    from torch.nn.attention import SDPBackend, sdpa_kernel
except ImportError:
    sys.exit(3)
if not torch.cuda.is_available():
    sys.exit(3)

DEVICE, BF16 = "cuda", torch.bfloat16
L2 = 128 << 20


def seconds(calls, batches=15):
    """Median seconds of one of `calls`, which are taken in turn."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    calls[0]()
    end.record()
    torch.cuda.synchronize()
    # Batches of about two milliseconds: launches overlap, so that what is timed is the device.
    each = max(1, min(1000, int(2.0 / max(begin.elapsed_time(end), 1e-3))))
    times = []
    for _ in range(batches):
        begin.record()
        for i in range(each):
            calls[i % len(calls)]()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / each / 1e3)
    return statistics.median(times)


def sets(bytes_of_one):
    return max(1, min(64, math.ceil(2 * L2 / bytes_of_one)))


def emit(kernel, shape, s, flops, moved, **more):
    row = {"kernel": kernel, "shape": shape, "us": round(s * 1e6, 3), "tflop_s": round(flops / s / 1e12, 2), "gb_s": round(moved / s / 1e9, 1)}
    print(json.dumps({**row, **more}), flush=True)


def linear(rows, inputs, outputs):
    moved = 2 * (inputs * outputs + rows * (inputs + outputs))
    weights = [torch.randn(outputs, inputs, device=DEVICE, dtype=BF16) / inputs**0.5 for _ in range(sets(moved))]
    x = torch.randn(rows, inputs, device=DEVICE, dtype=BF16)
    s = seconds([lambda w=w: F.linear(x, w) for w in weights])
    emit("linear", f"BF16 {rows}x{inputs}>{outputs}", s, 2 * rows * inputs * outputs, moved)


def attention(heads, kv_heads, dim, past, rows):
    keys = past + rows
    moved = 2 * dim * (2 * rows * heads + 2 * keys * kv_heads)
    n = sets(moved)
    make = lambda h, r: torch.randn(1, h, r, dim, device=DEVICE, dtype=BF16)
    q, kv = make(heads, rows), [(make(kv_heads, keys), make(kv_heads, keys)) for _ in range(n)]
    pairs = rows * past + rows * (rows + 1) / 2
    causal = past == 0 and rows > 1
    found = {}
    for name, backends in [("default", None), ("flash", [SDPBackend.FLASH_ATTENTION])]:
        def call(k, v):
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
        try:
            if backends is None:
                found[name] = seconds([lambda k=k, v=v: call(k, v) for k, v in kv])
            else:
                with sdpa_kernel(backends):
                    found[name] = seconds([lambda k=k, v=v: call(k, v) for k, v in kv])
        except (RuntimeError, TypeError):
            continue
    if found:
        best = min(found, key=found.get)
        emit("attention", f"{heads}/{kv_heads}x{dim} {past}+{rows}", found[best], 4 * pairs * dim * heads, moved, backend=best)


def main():
    torch.manual_seed(0)
    print(json.dumps({"torch": torch.__version__, "cuda": torch.version.cuda, "device": torch.cuda.get_device_name()}))
    big = torch.empty(1 << 30, device=DEVICE, dtype=torch.uint8)
    other = torch.empty_like(big)
    print(json.dumps({"copy_gb_s": round(2 * big.numel() / seconds([lambda: other.copy_(big)]) / 1e9, 1)}))
    del big, other
    a, b = (torch.randn(8192, 8192, device=DEVICE, dtype=BF16) for _ in range(2))
    print(json.dumps({"matmul_tflop_s": round(2 * 8192**3 / seconds([lambda: a @ b]) / 1e12, 1)}))
    del a, b
    for rows in [1, 32, 512, 4096]:
        linear(rows, 4096, 4096)
        linear(rows, 4096, 14336)
    for rows in [1, 8, 64, 512]:
        linear(rows, 2048, 2048)
        linear(rows, 8192, 2048)
    for shape in [(32, 8, 128), (32, 8, 64), (28, 4, 128)]:
        for past, rows in [(128, 1), (1024, 1), (0, 512)]:
            attention(*shape, past, rows)
    attention(32, 8, 128, 4096, 1)
    attention(32, 8, 128, 0, 4096)


main()
