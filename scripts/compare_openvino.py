"""compare_openvino.py FILE.gguf THREADS SEED: one measurement of OpenVINO GenAI as a JSON line. Run by compare.py.

Prompts are random words, another set each time: the pipeline caches prefixes, and a repeated prompt would measure that cache.
"""

import json
import random
import resource
import sys
import time

import openvino_genai

WORDS = "the of sea hill tree light morning letter train bread garden answer matrix column river stone north winter song door".split()


def main():
    path, threads, seed = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    rng = random.Random(seed)
    start = time.perf_counter()
    pipe = openvino_genai.LLMPipeline(path, "CPU", INFERENCE_NUM_THREADS=threads)
    load = time.perf_counter() - start
    tokenizer = pipe.get_tokenizer()

    def run(prompt_tokens, new_tokens):
        config = openvino_genai.GenerationConfig(max_new_tokens=new_tokens, ignore_eos=True, do_sample=False)
        config.apply_chat_template = False
        text = " ".join(rng.choice(WORDS) for _ in range(prompt_tokens))
        count = tokenizer.encode(text).input_ids.shape[1]
        m = pipe.generate([text], config).perf_metrics
        return count / m.get_ttft().mean * 1e3, 1e3 / m.get_tpot().mean if new_tokens > 1 else 0.0

    run(16, 8)  # warm up
    prefill = run(512, 1)[0]
    decode = run(8, 128)[1]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps(dict(load_s=load, prefill=prefill, decode=decode, peak_mb=peak)))


if __name__ == "__main__":
    main()
