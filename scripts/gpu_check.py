"""The work of gpu-check.sh: runs each section under its time limit and keeps the JSON of what has run.

Every section has a status: ok, failed, cut (its time was up; what it printed until then is kept), or skipped with the reason.
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ENV = {**os.environ, "QUADRIGA_ROOT": str(HERE), "RUST_BACKTRACE": "0"}
CUDA = ["--device", "cuda"]
# Seconds of everything together, for which the sections' own limits are meant.
TOTAL = 460


def run(command, limit, stdin=""):
    """Exit status (None: cut), output, errors, seconds."""
    start = time.monotonic()
    with tempfile.TemporaryFile("w+") as given, tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        given.write(stdin)
        given.seek(0)
        try:
            process = subprocess.Popen([str(c) for c in command], stdin=given, stdout=out, stderr=err, env=ENV, start_new_session=True)
        except OSError as e:
            return 127, "", str(e), 0.0
        try:
            status = process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            # With what it started; also if we are told to end.
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read())
        return status, *texts, round(time.monotonic() - start, 2)


def section(command, limit, stdin=""):
    status, out, err, seconds = run(command, limit, stdin)
    result = {"status": "cut" if status is None else "failed" if status else "ok", "seconds": seconds}
    if status != 0:
        result.update(exit=status, said=(out + err)[-3000:])
    return result, out, err


def rows(text):
    """The JSON objects of lines; a line that was cut is left out."""
    found = []
    for line in text.splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return [r for r in found if isinstance(r, dict)]


def join(parts):
    """One section of several programs: by name, their results."""
    order = ["failed", "cut", "ok", "skipped"]
    status = min((r["status"] for r in parts.values()), key=order.index, default="skipped")
    result = {"status": status, "seconds": round(sum(r.get("seconds", 0) for r in parts.values()), 2), "programs": parts}
    said = [f"{name}: {r['said']}" for name, r in parts.items() if "said" in r]
    return {**result, "said": "\n".join(said)} if said else result


def selftest(limit):
    parts, end = {}, time.monotonic() + limit
    for name in ["selftest", "hopper"]:
        result, out, _ = section([HERE / "selftest" / name], max(1, end - time.monotonic()))
        parts[name] = {**result, "ended": out.strip().splitlines()[-1:], "skips": out.count("skip: ")}
    return join(parts)


def tests(name, limit):
    result, out, err = section([HERE / "tests" / name, "cuda", "--nocapture", "--test-threads=1"], limit)
    passed = re.search(r"(\d+) passed; (\d+) failed", out)
    result["passed"], result["failed"] = map(int, passed.groups()) if passed else (0, 0)
    # The greatest errors by operation, where a test tells them.
    result["errors"] = [line for line in out.splitlines() if "NMSE" in line]
    if result["status"] == "ok" and ("SKIPPED" in err or not result["passed"]):
        result.update(status="failed", said=err.strip() or "no test ran")
    return result


# Tool, program, and what bounds its time: the small ones first, so that a cut costs the least.
SANITIZED = [
    *[(tool, "selftest/" + name, []) for name in ["selftest", "hopper"] for tool in ["memcheck", "racecheck", "synccheck"]],
    *[(tool, "tests/graphs", ["cuda_launches"]) for tool in ["memcheck", "racecheck", "synccheck"]],
    ("memcheck", "tests/kernels", ["cuda_is", "cuda_refuses"]),
    ("memcheck", "tests/kv", ["cuda"]),
    ("memcheck", "tests/kernels", ["cuda_meets"]),
    ("racecheck", "tests/kernels", ["cuda_meets"]),
]


def sanitizer(limit):
    tool = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if not tool:
        return {"status": "skipped", "why": "compute-sanitizer is not installed"}
    parts, end = {}, time.monotonic() + limit
    for kind, program, names in SANITIZED:
        left = end - time.monotonic()
        what = " ".join([kind, program, *names])
        if left < 2:
            parts[what] = {"status": "cut", "seconds": 0, "why": "no time was left"}
            continue
        test = [*names, "--test-threads=1"] if program.startswith("tests") else []
        one, out, err = section([tool, "--tool", kind, "--error-exitcode", "9", HERE / program, *test], left)
        if "Device not supported" in out + err:
            return {"status": "skipped", "why": (out + err).strip()[-300:]}
        one["summary"] = [line.lstrip("= ") for line in (out + err).splitlines() if "SUMMARY" in line]
        parts[what] = one
    return join(parts)


def decode(shape, weights, limit, *more):
    command = [HERE / "quadriga", "bench", "decode", *CUDA, "--json", "--shape", shape, "--weights", weights, *more]
    result, out, _ = section(command, limit)
    if r := next(iter(rows(out)), None):
        ms, tree = r["forward_ms"], r["tree_ms"]["32"]
        result["figures"] = r
        result["of_roof"] = {"decode": r["decode_roof_fraction"], "prefill": round(r["prefill_tflop_s"] / r["matrix_tflop_s"]["bf16"], 4)}
        result["of_one_row"] = {**{n: round(ms[n] / ms["1"], 3) for n in ms}, "tree of 32": round(tree / ms["1"], 3)}
    return result


def kernels(limit, filters, *more):
    command = [HERE / "quadriga", "bench", "kernels", *CUDA, "--json", "--samples", "9", "--filter", filters, *more]
    result, out, err = section(command, limit)
    return {**result, "roofs": err.strip().splitlines()[:1], "rows": rows(out)}


def torch(report, limit):
    """The products and attentions of all kernel sections so far."""
    ours = [r for s in report["sections"].values() for r in s.get("rows", []) if "roof_fraction" in r]
    lines = "".join(json.dumps({k: r[k] for k in ("kernel", "shape")}) + "\n" for r in ours)
    result, out, _ = section([sys.executable, HERE / "gpu_torch.py"], limit, lines)
    if result.get("exit") == 3:
        return {"status": "skipped", "why": f"{sys.executable} has no PyTorch that finds a GPU"}
    found = rows(out)
    about = [r for r in found if "kernel" not in r]
    theirs = {(r["kernel"], r["shape"]): r for r in found if "us" in r}
    report["beside_torch"] = []
    for r in ours:
        t = theirs.get((r["kernel"], r["shape"]))
        if t:
            speeds = {"torch_us": t["us"], "of_torch": round(t["us"] / r["us"], 3), "of_roof": r["roof_fraction"]}
            report["beside_torch"].append({**{k: r[k] for k in ("model", "kernel", "shape", "us")}, **speeds})
    return {**result, "about": {k: v for r in about for k, v in r.items()}, "torch_rows": [r for r in found if "kernel" in r]}


def card(devices):
    """What the driver says of the first GPU."""
    about = {"name": devices[0], "devices": devices}
    if query := shutil.which("nvidia-smi"):
        fields = ["name", "driver_version", "memory.total", "clocks.max.sm", "clocks.max.memory", "power.limit"]
        status, out, _, _ = run([query, "--query-gpu=" + ",".join(fields), "--format=csv,noheader"], 20)
        values = out.splitlines()[0].split(", ") if status == 0 and out.strip() else []
        about.update(zip(fields, values))
    version = Path("/proc/driver/nvidia/version")
    if "driver_version" not in about and version.exists():
        about["driver_version"] = version.read_text().splitlines()[0]
    return about


def ready(emulated):
    """The devices there are, or None and why nothing can be checked."""
    if not (HERE / "quadriga").exists():
        return None, f"there is no quadriga beside {Path(__file__).name}: run it in a folder that scripts/gpu-pack.sh made"
    if emulated != (HERE / "emulated").exists():
        return None, "--emulated is for folders that were packed with --emulated, and for no others"
    if emulated:
        # The stand-in answers to the driver's name, here as in every program that is run.
        ENV["LD_LIBRARY_PATH"] = str(HERE / "emulated")
        ENV["EMU_CAPABILITY"] = "90"
        ENV["SELFTEST_LIBCUDA"] = str(HERE / "emulated" / "libcuda.so")
        ENV["SELFTEST_IMAGES"] = str(HERE / "gpu-check.sh")  # it takes any
    else:
        ENV["SELFTEST_IMAGES"] = ":".join(map(str, sorted((HERE / "selftest").glob("*.fatbin"))))
    status, out, err, _ = run([HERE / "quadriga", "inspect", "-m", HERE / "models" / "tiny-llama", "--json"], 60)
    if status != 0:
        return None, f"the packed quadriga does not run here: {(err or out).strip()}"
    cuda = rows(out)[0]["devices"]["cuda"]
    if not cuda["devices"]:
        return None, "no NVIDIA driver or no GPU on this machine; gpu-pack.sh --emulated packs an emulated one"
    if not cuda["kernels"] and not emulated:
        return None, "the packed binary holds no kernels; pack it again with an nvcc at hand"
    return cuda["devices"], None


def plan(report, emulated):
    """Sections in order, each with its seconds."""
    names = sorted(p.name for p in (HERE / "tests").iterdir())
    small = [("selftest", 40, selftest)] + [(f"test {n}", 45, lambda t, n=n: tests(n, t)) for n in names]
    measured = ("torch", 90, lambda t: torch(report, t))
    if emulated:
        quick = ["--prompt-tokens", "3", "--new-tokens", "2", "--depth", "1", "--context", "65", "--reps", "1"]
        return small + [
            ("decode tiny bf16", 60, lambda t: decode("tiny", "bf16", t, *quick)),
            ("kernels gather_rows", 60, lambda t: kernels(t, "gather_rows")),
            measured,
            ("sanitizer", 60, sanitizer),
        ]
    def of(shape, limit, weights):
        how = ["--large", *(["--weights", weights] if weights else [])]
        return (f"kernels {shape} {weights}".rstrip(), limit, lambda t: kernels(t, shape, *how))
    return small + [
        ("decode llama-3-8b bf16", 90, lambda t: decode("llama-3-8b", "bf16", t)),
        of("llama-3-8b", 60, "bf16"),
        of("llama-3.2-1b", 40, "bf16"),
        of("qwen2.5-7b", 50, "bf16"),
        of("smollm2-135m", 30, "bf16"),
        measured,
        ("sanitizer", 90, sanitizer),
        of("llama-3-8b", 60, ""),
        ("decode llama-3-8b q4_k", 80, lambda t: decode("llama-3-8b", "q4_k", t)),
        ("decode llama-3.2-1b bf16", 30, lambda t: decode("llama-3.2-1b", "bf16", t)),
        ("decode smollm2-135m q8_0", 30, lambda t: decode("smollm2-135m", "q8_0", t)),
        of("qwen3-0.6b", 40, ""),
    ]


def save(report, target):
    """Whole or not at all: whoever ends us finds what has run."""
    part = target.with_name(target.name + ".part")
    with open(part, "w", encoding="utf-8") as f:
        json.dump(report, f, indent=1)
        f.flush()
        os.fsync(f.fileno())
    os.replace(part, target)


def main():
    p = argparse.ArgumentParser(prog="gpu-check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--json", type=Path, default="gpu-check.json", metavar="FILE", help="where the result goes")
    p.add_argument("--limit", type=float, default=TOTAL, metavar="SECONDS", help=f"for everything together ({TOTAL}); the sections' own limits change with it")
    p.add_argument("--only", default="", metavar="NAME,..", help="only sections whose name holds one of these")
    p.add_argument("--emulated", action="store_true", help="with the emulated GPU that the folder holds")
    args = p.parse_args()
    start = time.monotonic()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))

    devices, why = ready(args.emulated)
    if devices is None:
        print(f"gpu-check: {why}", file=sys.stderr)
        return 2
    report = {"card": card(devices), "emulated": args.emulated, "limit_s": args.limit, "seconds": 0, "sections": {}}
    sections = plan(report, args.emulated)
    wanted = [w for w in args.only.split(",") if w]
    unknown = [w for w in wanted if not any(w in name for name, _, _ in sections)]
    if unknown:
        print(f"gpu-check: --only {','.join(unknown)}: the sections are {', '.join(name for name, _, _ in sections)}", file=sys.stderr)
        return 2

    for name, limit, work in sections:
        if wanted and not any(w in name for w in wanted):
            continue
        left = args.limit - (time.monotonic() - start)
        if left > 5:
            result = work(min(limit * args.limit / TOTAL, left))
        else:
            result = {"status": "cut", "seconds": 0, "why": "no time was left"}
        report["sections"][name] = result
        report["seconds"] = round(time.monotonic() - start, 1)
        save(report, args.json)
        print(f"{name:28} {result['status']:8} {result.get('seconds', 0):7.1f} s  {result.get('why', '')}", flush=True)
        if "said" in result:
            print(result["said"], flush=True)
    for r in report.get("beside_torch", []):
        print(f"{r['model']:14} {r['kernel']:10} {r['shape']:30} {r['us']:10.1f} us  {r['of_torch']:6.2f} x PyTorch  {r['of_roof']:6.2f} of its roof")
    # A test that was cut has not passed; of a measurement the rows that were printed stand.
    bad = [n for n, s in report["sections"].items() if s["status"] == "failed" or s["status"] == "cut" and "test" in n]
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
