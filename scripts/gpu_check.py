"""The work of gpu-check.sh: runs each section under its time limit and keeps the JSON of what has run.

Every section has a status: ok, failed, cut (its time was up; what it printed until then is kept), or skipped with the reason.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
TESTS = ["kernels", "model", "invariance", "kv", "graphs"]


def run(command, limit, **env):
    """Exit status (None: cut), output, errors, seconds."""
    start = time.monotonic()
    environment = {**os.environ, "QUADRIGA_ROOT": str(HERE), "RUST_BACKTRACE": "0", **env}
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen([str(c) for c in command], stdout=out, stderr=err, env=environment, start_new_session=True)
        try:
            status = process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.wait()
            status = None
        out.seek(0)
        err.seek(0)
        return status, out.read(), err.read(), round(time.monotonic() - start, 2)


def section(command, limit, **env):
    status, out, err, seconds = run(command, limit, **env)
    result = {"status": "cut" if status is None else "ok" if status == 0 else "failed", "seconds": seconds}
    if status:
        result["exit"] = status
        result["said"] = (out + err)[-3000:]
    return result, out, err


def rows(text):
    """The JSON objects of lines; a line that was cut is left out."""
    found = []
    for line in text.splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def tests(name, limit):
    result, out, err = section([HERE / "tests" / name, "cuda", "random_programs", "--nocapture", "--test-threads=1"], limit)
    passed = re.search(r"(\d+) passed; (\d+) failed", out)
    result["passed"], result["failed"] = map(int, passed.groups()) if passed else (0, 0)
    if "SKIPPED" in err and result["status"] == "ok":
        result["status"] = "failed"
        result["said"] = "the test found no GPU"
    if result["status"] == "ok" and not result["passed"]:
        result.update(status="failed", said="no test ran")
    return result


def selftest(limit):
    images = ":".join(str(p) for p in sorted((HERE / "images").glob("*.fatbin")))
    results = []
    for name in ["selftest", "hopper"]:
        if (HERE / "tests" / name).exists():
            result, out, _ = section([HERE / "tests" / name], limit, SELFTEST_IMAGES=images)
            results.append({**result, "name": name, "last_line": out.strip().splitlines()[-1:]})
    if not results:
        return {"status": "skipped", "why": "the folder holds none"}
    worst = next((r["status"] for r in results if r["status"] != "ok"), "ok")
    return {"status": worst, "seconds": sum(r["seconds"] for r in results), "programs": results}


def sanitizer(limit):
    tool = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if not tool:
        return {"status": "skipped", "why": "compute-sanitizer is not installed"}
    result = {"status": "ok", "seconds": 0.0, "tools": {}}
    for kind in ["memcheck", "racecheck", "synccheck"]:
        test = [HERE / "tests" / "graphs", "cuda_launches", "--test-threads=1"]
        if kind == "memcheck":
            test = [HERE / "tests" / "kernels", "cuda_meets", "--test-threads=1"]
        one, out, err = section([tool, f"--tool={kind}", "--error-exitcode=9", *test], limit / 3)
        one["errors"] = [line for line in (out + err).splitlines() if "ERROR SUMMARY" in line]
        result["tools"][kind] = one
        result["seconds"] += one["seconds"]
        if one["status"] != "ok":
            result["status"] = one["status"]
    return result


def kernels(limit, device):
    command = [HERE / "quadriga", "bench", "kernels", *device, "--json", "--large", "--samples", "9"]
    result, out, err = section(command, limit)
    return {**result, "roofs": err.strip().splitlines()[:1], "rows": rows(out)}


def decode(limit, device, shape, weights):
    command = [HERE / "quadriga", "bench", "decode", *device, "--json", "--shape", shape, "--weights", weights, "--reps", "3"]
    result, out, _ = section(command, limit)
    found = rows(out)
    result["result"] = found[0] if found else None
    if found:
        ms = found[0]["forward_ms"]
        result["rows_32_of_1"] = round(ms["32"] / ms["1"], 3)
    return result


def torch(limit):
    result, out, _ = section([sys.executable, HERE / "gpu_torch.py"], limit)
    if result.get("exit") == 3:
        return {"status": "skipped", "why": "PyTorch with CUDA is not installed"}
    return {**result, "rows": rows(out)}


def compare(report):
    """Ours beside PyTorch's, by kernel and shape."""
    theirs = {(r["kernel"], r["shape"]): r["us"] for r in report["sections"].get("torch", {}).get("rows", []) if "us" in r}
    ours = report["sections"].get("kernels", {}).get("rows", [])
    return [
        {"kernel": r["kernel"], "shape": r["shape"], "us": r["us"], "torch_us": theirs[r["kernel"], r["shape"]],
         "of_torch": round(theirs[r["kernel"], r["shape"]] / r["us"], 3), "of_roof": r["roof_fraction"]}
        for r in ours if (r["kernel"], r["shape"]) in theirs
    ]


def main():
    p = argparse.ArgumentParser(prog="gpu-check", description=__doc__)
    p.add_argument("--json", default="gpu-check.json", metavar="FILE", help="where the result goes")
    p.add_argument("--limit", type=float, default=460, metavar="SECONDS", help="for everything together")
    p.add_argument("--only", default="", metavar="NAME,..", help="only these sections")
    p.add_argument("--emulated", action="store_true", help="the folder was packed with --emulated: tests only, no GPU is wanted")
    args = p.parse_args()
    start = time.monotonic()

    status, out, err, _ = run([HERE / "quadriga", "inspect", "-m", HERE / "models" / "tiny-llama", "--json"], 30)
    if status != 0:
        print(f"gpu-check: {HERE / 'quadriga'} does not run: {(err or out).strip()}", file=sys.stderr)
        return 2
    cuda = rows(out.replace("\n", " "))[0]["devices"]["cuda"]
    if not args.emulated and not cuda["devices"]:
        print("gpu-check: no CUDA driver or no GPU on this machine; gpu-pack.sh --emulated packs tests that need none", file=sys.stderr)
        return 2
    if not args.emulated and not cuda["kernels"]:
        print("gpu-check: the packed binary holds no kernels; pack it again with an nvcc at hand", file=sys.stderr)
        return 2
    report = {"devices": cuda["devices"] or ["emulated"], "sections": {}}
    query = shutil.which("nvidia-smi")
    if query:
        fields = "name,driver_version,clocks.max.sm,clocks.max.mem,power.limit"
        report["nvidia_smi"] = run([query, f"--query-gpu={fields}", "--format=csv"], 20)[1].strip().splitlines()

    device = ["--device", "cuda"]
    plan = [(f"test {name}", 60, lambda limit, name=name: tests(name, limit)) for name in TESTS]
    if not args.emulated:
        plan = [("selftest", 30, selftest), *plan]
        plan += [
            ("decode llama-3-8b bf16", 90, lambda t: decode(t, device, "llama-3-8b", "bf16")),
            ("kernels", 120, lambda t: kernels(t, device)),
            ("torch", 60, torch),
            ("decode llama-3.2-1b bf16", 40, lambda t: decode(t, device, "llama-3.2-1b", "bf16")),
            ("decode smollm2-135m q8_0", 40, lambda t: decode(t, device, "smollm2-135m", "q8_0")),
            ("sanitizer", 90, sanitizer),
        ]
    wanted = [w for w in args.only.split(",") if w]
    unknown = [w for w in wanted if not any(w in name for name, _, _ in plan)]
    if unknown:
        print(f"gpu-check: --only {','.join(unknown)}: the sections are {', '.join(name for name, _, _ in plan)}", file=sys.stderr)
        return 2

    target = Path(args.json)
    for name, limit, work in plan:
        if wanted and not any(w in name for w in wanted):
            continue
        left = args.limit - (time.monotonic() - start)
        result = work(min(limit, left)) if left > 5 else {"status": "cut", "seconds": 0, "why": "no time was left"}
        report["sections"][name] = result
        report["beside_torch"] = compare(report)
        report["seconds"] = round(time.monotonic() - start, 1)
        part = target.with_name(target.name + ".part")
        with open(part, "w") as f:
            json.dump(report, f, indent=1)
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, target)
        print(f"{name:28} {result['status']:8} {result.get('seconds', 0):7.1f} s", flush=True)
        if result["status"] == "failed":
            print(result.get("said", ""), flush=True)
    for r in report["beside_torch"]:
        print(f"{r['kernel']:12} {r['shape']:32} {r['us']:10.1f} us  {r['of_torch']:6.2f} of PyTorch  {r['of_roof']:6.2f} of its roof")
    return 1 if any(s["status"] == "failed" for s in report["sections"].values()) else 0


if __name__ == "__main__":
    sys.exit(main())
