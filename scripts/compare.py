#!/usr/bin/env python3
"""Run quadriga and its peers in turn on the same files and print medians and ratios. Called by compare-llama.sh."""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import threading
import time

ROWS = [1, 2, 4, 8, 16, 32, 64]
HERE = os.path.dirname(os.path.abspath(__file__))


def run(command):
    """Output, wall seconds and peak MB of a child process."""
    start = time.perf_counter()
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out, err = communicate(child)
    _, status, usage = os.wait4(child.pid, 0)
    wall = time.perf_counter() - start
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise RuntimeError(f"{command[0]} ended with status {child.returncode}: {' '.join(err.decode(errors='replace').split())[-200:]}")
    return out.decode(), wall, usage.ru_maxrss / 1024


def communicate(child):
    """Both streams, without reaping the child: wait4 must see its resource usage."""
    err = []
    reader = threading.Thread(target=lambda: err.append(child.stderr.read()))
    reader.start()
    out = child.stdout.read()
    reader.join()
    return out, err[0]


def quadriga(args, path, _):
    command = [*shlex.split(args.quadriga), "bench", "decode", "--model", path, "--threads", str(args.threads), "--json"]
    out, _, peak = run(command)
    r = json.loads(out)
    return dict(
        decode=r["decode_tokens_per_s"],
        prefill=r["prefill_tokens_per_s"],
        load_s=r["load_s"],
        peak_mb=r.get("peak_rss_mb") or peak,
        weights=r.get("weights_bytes"),
        own_read=r.get("read_gb_s"),
        forward={int(n): ms for n, ms in r["forward_ms"].items()},
    )


def llama(args, path, _):
    common = [args.llama_bench, "-m", path, "-t", str(args.threads), "-o", "json"]
    out, _, peak = run([*common, "-p", "512", "-n", "128", "-r", "1"])
    speed = {(t["n_prompt"], t["n_gen"]): t["avg_ts"] for t in json.loads(out)}
    out, _, _ = run([*common, "-p", ",".join(map(str, ROWS)), "-n", "0", "-d", "256", "-r", "3"])
    forward = {t["n_prompt"]: statistics.median(t["samples_ns"]) / 1e6 for t in json.loads(out)}
    out, wall, _ = run([*common, "-p", "1", "-n", "0", "-r", "1", "--no-warmup"])
    load = wall - json.loads(out)[0]["avg_ns"] / 1e9
    return dict(decode=speed[0, 128], prefill=speed[512, 0], load_s=load, peak_mb=peak, forward=forward)


def openvino(args, path, seed):
    out, _, _ = run([args.openvino, os.path.join(HERE, "compare_openvino.py"), path, str(args.threads), str(seed)])
    return json.loads(out.strip().splitlines()[-1])


def median_of(samples):
    """Field by field; the table of passes row by row."""
    result = {}
    for k in samples[0]:
        values = [s[k] for s in samples if s.get(k) is not None]
        if k == "forward":
            result[k] = {n: statistics.median(v[n] for v in values) for n in values[0]}
        elif values:
            result[k] = statistics.median(values)
    return result


def derive(r, path, read):
    """Ratios of passes, and the bytes a token reads as a share of the measured roof."""
    if "forward" in r:
        for n in (8, 16):
            r[f"pass{n}"] = r["forward"][n] / r["forward"][1]
    r["weights"] = r.get("weights") or os.path.getsize(path)
    r["gb_s"] = r["weights"] * r["decode"] / 1e9
    r["roof"] = r["gb_s"] / read
    return r


COLUMNS = [
    ("decode tok/s", "decode", "{:.1f}"),
    ("prefill tok/s", "prefill", "{:.0f}"),
    ("1 row ms", "one", "{:.2f}"),
    ("8 rows /1", "pass8", "{:.2f}"),
    ("16 rows /1", "pass16", "{:.2f}"),
    ("load s", "load_s", "{:.3f}"),
    ("peak MB", "peak_mb", "{:.0f}"),
    ("weights GB/s", "gb_s", "{:.1f}"),
    ("of read", "roof", "{:.0%}"),
]


def table(results):
    lines = [["weights", "engine", *(c[0] for c in COLUMNS)]]
    for kind, engines in results.items():
        for name, r in engines.items():
            r = {**r, "one": r.get("forward", {}).get(1)}
            lines.append([kind, name, *(f.format(r[k]) if r.get(k) is not None else "-" for _, k, f in COLUMNS)])
        for peer in [e for e in engines if e != "quadriga" and "quadriga" in engines]:
            lines.append([kind, f"quadriga / {peer}", *ratios(engines["quadriga"], engines[peer])])
    widths = [max(len(row[i]) for row in lines) for i in range(len(lines[0]))]
    rule = ["-" * w for w in widths]
    for row in [lines[0], rule, *lines[1:]]:
        print("| " + " | ".join(c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths))) + " |")


def ratios(ours, peer):
    """Plain quotients: above 1 is better for speeds, below 1 for times and sizes."""
    # Lines that would mislead as a quotient stay empty: bytes and roofs follow from decode.
    ours, peer = ({**r, "one": r.get("forward", {}).get(1)} for r in (ours, peer))
    return [f"{ours[k] / peer[k]:.2f}x" if ours.get(k) and peer.get(k) and k not in ("gb_s", "roof") else "-" for _, k, _ in COLUMNS]


def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("files", nargs="+", metavar="TYPE=FILE")
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--runs", type=int, default=7)
    p.add_argument("--json")
    p.add_argument("--llama-bench", required=True)
    p.add_argument("--read-bandwidth", required=True)
    p.add_argument("--quadriga", required=True)
    p.add_argument("--openvino", help="python of its virtual environment")
    args = p.parse_args()
    engines = {"quadriga": quadriga, "llama.cpp": llama}
    if args.openvino:
        engines["openvino"] = openvino
    if not os.path.exists(shlex.split(args.quadriga)[0]) and "QUADRIGA_BIN" not in os.environ:
        print(f"compare: no {args.quadriga}; build it with cargo build --release. Measuring the peers alone.", file=sys.stderr)
        del engines["quadriga"]
    if os.getloadavg()[0] > 1:
        print(f"compare: load average {os.getloadavg()[0]:.1f}; threads that wait in a spin lose most, so these ratios will not be fair", file=sys.stderr)
    files = [f.split("=", 1) for f in args.files]
    samples, reads, failed = {}, [], set()
    for n in range(args.runs):
        reads.append(float(run([args.read_bandwidth, str(args.threads)])[0]))
        for kind, path in files:
            order = list(engines)
            order = order[n % len(order) :] + order[: n % len(order)]  # nobody always runs first
            for name in [e for e in order if (kind, e) not in failed]:
                try:
                    result = engines[name](args, path, n)
                    samples.setdefault((kind, name), []).append(result)
                except (RuntimeError, KeyError, ValueError) as e:
                    failed.add((kind, name))
                    print(f"compare: {name} left out for {kind}: {e}", file=sys.stderr)
        print(f"compare: round {n + 1} of {args.runs}, read {reads[-1]:.1f} GB/s, load average {os.getloadavg()[0]:.1f}", file=sys.stderr)
    read = statistics.median(reads)
    results = {}
    for kind, path in files:
        results[kind] = {e: derive(median_of(samples[kind, e]), path, read) for e in engines if (kind, e) in samples}
    print(f"{args.threads} threads, medians of {args.runs} alternating runs; memory read {read:.1f} GB/s ({min(reads):.1f} to {max(reads):.1f})\n")
    table(results)
    if args.json:
        flat = {f"{k}/{e}": s for (k, e), s in samples.items()}
        with open(args.json, "w", encoding="utf-8") as f:
            json.dump(dict(threads=args.threads, runs=args.runs, read_gb_s=reads, medians=results, samples=flat), f, indent=1)


if __name__ == "__main__":
    main()
