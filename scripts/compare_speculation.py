#!/usr/bin/env python3
"""Speculative decoding of quadriga and of llama.cpp, on the same prompts, alternating, greedy.

  scripts/compare_speculation.py --llama DIR --model M.gguf [--draft D.gguf] [--raw] [--threads 2] [--limit 3] [--tokens 128] FILE.jsonl[.gz]...

DIR holds llama-speculative-simple and llama-completion (scripts/compare-llama.sh builds llama.cpp; these two are further
targets of it). quadriga drafts as `eval accept` does by default, or with lookup and D; llama.cpp with n-grams of the text, and
with D. One category at a time, of each at most --limit prompts. Decoding alone is timed, by each program itself.
"""
import argparse, collections, gzip, json, os, re, statistics, subprocess, sys, tempfile

p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
p.add_argument("files", nargs="+")
p.add_argument("--llama", required=True)
p.add_argument("--model", required=True)
p.add_argument("--draft")
p.add_argument("--raw", action="store_true")
p.add_argument("--threads", type=int, default=2)
p.add_argument("--limit", type=int, default=3)
p.add_argument("--tokens", type=int, default=128)
p.add_argument("--quadriga", default="target/release/quadriga")
a = p.parse_args()

rows = collections.defaultdict(list)
for f in a.files:
    stem = os.path.basename(f).split(".")[0]
    with (gzip.open if f.endswith(".gz") else open)(f, "rt") as lines:
        for line in lines:
            r = json.loads(line)
            text = r.get("prompt") or r.get("question") or r["turns"][0]
            rows[r.get("category", stem)].append(text)


def evenly(all, n):
    return [x for i, x in enumerate(all) if i * n // len(all) != (i + 1) * n // len(all)] if n < len(all) else all


def chat(text):
    # As the template of SmolLM2-Instruct has it.
    system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    return f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"


def llama(program, text, *more):
    """Tokens a second of decoding."""
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as f:
        f.write(text if a.raw else chat(text))
        f.flush()
        command = [os.path.join(a.llama, program), "-m", a.model, "-t", str(a.threads), "-n", str(a.tokens), "--temp", "0",
                   "-c", "2048", "-f", f.name, *more]
        out = subprocess.run(command, capture_output=True, text=True, errors="replace")
    said = out.stdout + out.stderr
    found = re.search(r"decoded +(\d+) tokens in +([\d.]+) seconds", said) or re.search(r"  eval time = +([\d.]+) ms / +(\d+) runs", said)
    if not found:
        sys.exit(f"{' '.join(command)}: no timing in\n{said[-2000:]}")
    if "decoded" in found.group(0):
        return int(found.group(1)), float(found.group(2))
    return int(found.group(2)), float(found.group(1)) / 1e3


def ours(texts):
    with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as f:
        f.writelines(json.dumps({"prompt": t, "category": "c"}) + "\n" for t in texts)
        f.flush()
        command = [a.quadriga, "eval", "accept", "-m", a.model, "-t", str(a.threads), "-n", str(a.tokens), "--decoder", "spec", "--json", f.name]
        command += ["--raw"] if a.raw else []
        command += ["--draft", f"lookup+{a.draft}"] if a.draft else []
        out = subprocess.run(command, capture_output=True, text=True)
    if out.returncode != 0:
        sys.exit(f"{' '.join(command)}: {out.stderr[-2000:]}")
    return json.loads(out.stdout)["categories"][0]


modes = {"llama.cpp": ("llama-completion", "-no-cnv"), "n-gram": ("llama-speculative-simple", "--spec-type", "ngram-simple"),
         "n-gram cache": ("llama-speculative-simple", "--spec-type", "ngram-cache")}
if a.draft:
    modes["draft"] = ("llama-speculative-simple", "--spec-type", "draft-simple", "-md", a.draft, "-td", str(a.threads))
names = list(modes)
print(f"{'category':<18}{'plain':>8}{'spec':>8}{'accept':>8}{'x own':>7}" + "".join(f"{n:>14}" for n in names) + f"{'x llama.cpp':>13}{'x its best':>12}   (tok/s)")
table = []
for category, texts in sorted(rows.items()):
    texts = evenly(texts, a.limit)
    sums = {n: [0, 0.0] for n in names}
    mine = [0, 0.0, 0.0, 0.0]
    for text in texts:
        r = ours([text])
        mine = [mine[0] + r["tokens"], mine[1] + r["tokens"] / max(r["plain_tokens_per_s"], 1e-9), mine[2] + r["tokens"] / max(r["tokens_per_s"], 1e-9),
                mine[3] + r["accept_length"]]
        for n in names:
            tokens, seconds = llama(modes[n][0], text, *modes[n][1:])
            sums[n][0] += tokens
            sums[n][1] += seconds
    plain, spec = mine[0] / max(mine[1], 1e-9), mine[0] / max(mine[2], 1e-9)
    theirs = [sums[n][0] / max(sums[n][1], 1e-9) for n in names]
    table.append((spec / plain, spec / theirs[0], spec / max(theirs), mine[3] / len(texts)))
    print(f"{category:<18}{plain:>8.1f}{spec:>8.1f}{mine[3] / len(texts):>8.2f}{spec / plain:>7.2f}" + "".join(f"{t:>14.1f}" for t in theirs)
          + f"{spec / theirs[0]:>13.2f}{spec / max(theirs):>12.2f}", flush=True)
mean = [statistics.mean(x) for x in zip(*table)]
print(f"mean over categories: {mean[0]:.2f}x our plain decoding, {mean[1]:.2f}x llama.cpp's, {mean[2]:.2f}x its best mode; accept length {mean[3]:.2f}")
