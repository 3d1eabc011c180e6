"""Puts what scripts/gpu-check has measured into one JSON file and a page of tables."""

import datetime
import json
import pathlib
import re
import sys


def load(path):
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def table(rows, columns):
    lines = ["| " + " | ".join(columns.values()) + " |", "|" + "---|" * len(columns)]
    for row in rows:
        cells = []
        for name in columns:
            value = row.get(name, "")
            cells.append(f"{value:.4g}" if isinstance(value, float) else str(value))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main():
    work, out, device, commit = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), sys.argv[3], sys.argv[4]
    files = [file for file in map(load, sorted(work.glob("result-*.json"))) if file]
    results = [row for file in files for row in file["results"]]
    part = lambda name: [row for row in results if row.get("part") == name]
    daemons = [file for file in map(load, sorted(work.glob("daemons-*.json"))) if file]
    daemons = [{**file["deployment"], "tokens_per_s": file["tokens_per_s"], "tpot_us": file["tpot_us"]["p50"]} for file in daemons]
    counts = {place: load(work / f"count-{place}.json") for place in ["in-place", "staged"]}
    active = load(work / "active.json")
    tests = dict(reversed(line.split()[:2]) for line in (work / "tests").read_text().splitlines() if line[:4] in ("pass", "FAIL"))
    runs = part("zero_sm")
    quick = any("--quick" in file["command"].split() for file in files)
    runs.sort(key=lambda run: run["mps"])
    first = runs[0] if runs else {}
    kernels = [count["kernels"] for count in counts.values() if count]
    replay = part("graph_replay")
    date = datetime.date.today().isoformat()
    report = {
        "date": date, "device": device, "commit": commit, "machine": files[0]["machine"] if files else None, "command": "scripts/gpu-check" + (" --quick" if quick else ""), "quick": quick,
        "driver": (part("device") or [{}])[0].get("driver"), "tests": tests,
        "zero_sm": {
            **{name: first.get(name) for name in ["gemm_alone_tflops", "gemm_while_streaming_tflops", "ratio", "alone_alone_ratio"]},
            "kernels_launched_by_runtime": sum(kernels) if kernels else None, "counts": counts, "sm_active": active, "runs": runs,
        },
        "pushpull": part("pushpull"), "graph_replay": replay[0] if replay else None, "floor": part("floor"),
        "fserver_lib": load(work / "fserver.json"),
        "vllm_connector": load(work / "connector.json"),
        "daemons": daemons,
        "attention": part("attention"), "ffn": part("ffn"), "numbers": part("numbers"),
    }
    out.mkdir(parents=True, exist_ok=True)
    name = "gpu-" + re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") + "-" + date
    (out / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n")

    page = [f"# {device}, {date}\n", f"Commit {commit[:12]}, driver for CUDA {report['driver']}, by `scripts/gpu-check`. All of it in `{name}.json`.\n"]
    if quick:
        page += ["**A quick look**: few repetitions of each; what moves by a few hundredths means nothing.\n"]
    page += ["## Correctness\n", table([{"test": test, "result": result} for test, result in tests.items()], {"test": "tests", "result": "result"})]
    page += ["## Zero SM\n", "A bf16 product of 8192 x 8192 x 8192 alone and while the transfers of 128 tokens run: the median of pairs in turn, of which each is compared with the product alone just before and after.\n"]
    page += [table(runs, {"beside": "beside the product", "pace": "pace", "mps": "MPS", "transfers_a_second": "transfers a second", "gemm_alone_tflops": "TFLOP/s alone", "ratio": "ratio", "worst_ratio": "worst", "alone_alone_ratio": "alone / alone", "pairs": "pairs"})]
    for place, count in counts.items():
        page += [f"CUPTI, transfers alone, {place}: `{json.dumps(count)}`.\n"]
    if active:
        page += [f"Multiprocessors active while transfers run alone, by NVML: {active['most_sm_active_percent']} % at most in {len(active['samples'])} samples.\n"]
    page += ["## Round trips from stream to stream\n", table(part("pushpull"), {"batch": "tokens", "place": "payloads", "processes": "processes", "mps": "MPS", "p50_us": "p50 µs", "p99_us": "p99 µs", "copy_us": "copies alone µs", "copy_share": "their share"})]
    if report["fserver_lib"]:
        page += ["From Python, PyTorch's tensors, two processes, `fserver_lib`: `" + json.dumps(report["fserver_lib"]) + "`.\n"]
    if report["vllm_connector"]:
        page += ["The vLLM connector, a step as one graph a side: `" + json.dumps(report["vllm_connector"]) + "`.\n"]
    page += ["## Whole steps as graphs\n", table([{"what": key, "value": value} for key, value in (report["graph_replay"] or {}).items() if key != "part"], {"what": "", "value": ""})]
    page += ["## Daemons, the small model\n", table(daemons, {"slots": "hidden states in", "dtype": "type", "attention": "attention", "ffn": "FFN", "tpot_us": "µs a token, p50", "tokens_per_s": "tokens/s"})]
    page += ["## Attention\n", table(part("floor"), {"memory_tb_s": "memory TB/s", "bf16_tflops": "bf16 TFLOP/s"}), "\n", table(part("attention"), {"what": "what", "batch": "batch", "context": "context", "kv_dtype": "cache", "us": "µs", "floor_us": "floor µs", "ratio": "floor / measured"})]
    page += ["## FFN, all 48 experts and the shared one\n", table(part("ffn"), {"tokens": "tokens", "dtype": "type", "us": "µs", "floor_us": "floor µs", "ratio": "floor / measured", "tensor_core_floor_us": "tensor cores' floor µs", "tflops": "TFLOP/s"})]
    page += ["## Numbers against the CPU\n", "\n".join(f"* `{json.dumps({k: v for k, v in row.items() if k != 'part'})}`" for row in part("numbers")) + "\n"]
    (out / f"{name}.md").write_text("\n".join(page))
    print(f"\nwritten: {out / name}.json and .md")
    sys.exit(any(result == "FAIL" for result in tests.values()))


if __name__ == "__main__":
    main()
