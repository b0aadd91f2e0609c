"""How vlmcut compares with Hugging Face eager and with the stock ONNX export on a model of real size.

The model has the layout of LLaVA, the shape of SigLIP-so400m/14-384 (26 layers, 729 visual tokens) and of Qwen2-0.5B
(tied embeddings), and random weights: speed and memory do not ask what a weight says. `contenders.py` says what runs
for vision, prefill and decode of each contender; `exports.py` says what the stock export does and does not do.

    python benchmarks/real_size.py --work DIR                  # everything; --small for a minute's smoke run
    python benchmarks/real_size.py --work DIR --stages run --rounds 3
    python benchmarks/real_size.py --work DIR --stages profile --profile vlmcut-int8-100

Stages: build (the model), export (stock graphs, vlmcut graphs and bundles), run (the race), profile (one vlmcut
contender by operator). What exists in the work folder is not made again; delete `records/NAME.json` to repeat a step,
`samples.jsonl` to race again. Every step and every sample is a fresh process that loads one contender, so its peak
resident memory is its own; rounds go through all contenders in turn, so a drifting clock hits all alike. The race
ends with `results.json` and `results.md` in the work folder.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import contenders
import exports
import numpy as np

STAGES = ("build", "export", "run", "profile")
EXPORTS = (*contenders.STOCK, "graphs", "bundle-fp32", "bundle-int8")
PEERS = (*contenders.EAGER, *contenders.STOCK)
FLAGS = ("avx2", "avx512f", "avx_vnni", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_int8", "amx_bf16", "asimddp",
         "i8mm", "bf16")  # fmt: skip
PACKAGES = ("torch", "transformers", "onnxruntime", "onnxruntime-gpu", "onnxscript", "onnx-ir", "numpy", "vlmcut")


def main() -> int:
    """Run the stages that were asked for; 1 if a step or a contender failed."""
    options = _options()
    options.work.mkdir(parents=True, exist_ok=True)
    if options.worker:
        print(json.dumps(_work(options)))
        return 0
    ok = True
    if "build" in options.stages:
        ok &= _record(options, "model")
    if "export" in options.stages:
        ok &= all([_record(options, task) for task in EXPORTS])
    if "run" in options.stages:
        ok &= race(options)
        results = summarize(options)
        (options.work / "results.json").write_text(json.dumps(results, indent=1) + "\n")
        text = markdown(results)
        (options.work / "results.md").write_text(text)
        print(text)
    if "profile" in options.stages:
        ok &= show_profile(options)
    return 0 if ok else 1


def _options() -> argparse.Namespace:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="folder for models, graphs and results")
    parser.add_argument("--small", action="store_true", help="the same layout with a few narrow layers")
    parser.add_argument("--stages", default=",".join(STAGES), help="comma-separated")
    parser.add_argument("--rounds", type=int, default=3, help="times through all contenders")
    parser.add_argument("--runs", type=int, default=3, help="timed runs of one process, after two warm-ups")
    parser.add_argument("--threads", type=int, default=cores, help="of torch and of ONNX Runtime")
    parser.add_argument("--only", default=",".join(contenders.NAMES), help="contenders to race, comma-separated")
    parser.add_argument("--profile", default="vlmcut-int8-100", choices=contenders.CUT, help="for the profile stage")
    parser.add_argument("--worker", help=argparse.SUPPRESS)  # what a fresh process does: a task or a contender
    options = parser.parse_args()
    options.stages, options.only = options.stages.split(","), options.only.split(",")
    for given, known in ((options.stages, STAGES), (options.only, contenders.NAMES)):
        if unknown := set(given) - set(known):
            parser.error(f"no `{min(unknown)}`; choose from {', '.join(known)}")
    return options


def _work(options: argparse.Namespace) -> Any:
    """The inside of a fresh process."""
    kind, _, name = options.worker.partition(":")
    if kind == "make":
        return exports.run(name, options.work, options.small)
    step = {"measure": contenders.measure, "profile": contenders.profile}[kind]
    return step(name, options.work, runs=options.runs, warmup=2, threads=options.threads)


def _fresh(options: argparse.Namespace, worker: str) -> Any | None:
    """Run `worker` in a new process.

    Returns:
        What it printed last, as JSON; None if it failed, with the end of its messages on stderr.
    """
    command = [sys.executable, __file__, "--work", str(options.work), "--worker", worker]
    command += ["--runs", str(options.runs), "--threads", str(options.threads)] + ["--small"] * options.small
    threads = str(options.threads)
    environment = os.environ | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1"}
    print(f"{worker} ...", file=sys.stderr, flush=True)
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        print(f"{worker} failed ({done.returncode}):\n{done.stderr[-3000:]}", file=sys.stderr)
        return None
    return json.loads(done.stdout.splitlines()[-1])


def _record(options: argparse.Namespace, task: str) -> bool:
    """Make one thing, unless its record exists."""
    path = options.work / "records" / f"{task}.json"
    if path.exists():
        return True
    made = _fresh(options, f"make:{task}")
    if made is None:
        return False
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(made | {"threads": options.threads, "small": options.small}, indent=1) + "\n")
    return True


def race(options: argparse.Namespace) -> bool:
    """Sample all contenders round by round into `samples.jsonl`; what is there already is not repeated."""
    path = options.work / "samples.jsonl"
    done = {(s["round"], s["name"], s["threads"]) for s in _samples(path)}
    ok = True
    for number in range(options.rounds):
        for name in options.only:
            if (number, name, options.threads) in done:
                continue
            sample = _fresh(options, f"measure:{name}")
            if sample is None:
                ok = False
                continue
            with path.open("a") as file:
                file.write(json.dumps({"round": number, "name": name, "threads": options.threads} | sample) + "\n")
    return ok


def _samples(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def summarize(options: argparse.Namespace) -> dict[str, Any]:
    """Medians over all runs of all rounds with this thread count, beside all samples and what they ran on."""
    samples = [s for s in _samples(options.work / "samples.jsonl") if s["threads"] == options.threads]
    speed = {}
    for name in contenders.NAMES:
        mine = [s for s in samples if s["name"] == name]
        if mine:
            speed[name] = _medians(mine) | {"logits_error": _error(options.work, name)}
    records = sorted((options.work / "records").glob("*.json"))
    return {
        "date": datetime.date.today().isoformat(),
        "small": options.small,
        "machine": machine() | {"threads": options.threads},
        "text_tokens": contenders.TEXT_TOKENS,
        "decoded_tokens": contenders.DECODED,
        "speed": speed,
        "exports": {p.stem: json.loads(p.read_text()) for p in records},
        "samples": samples,
    }


def _medians(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """ms of each step, of vision + prefill (`ttft`), with the lowest and highest of `ttft` and `decode`; MB; s."""
    runs = [r | {"ttft": r["vision"] + r["prefill"]} for s in samples for r in s["samples"]]
    found: dict[str, Any] = {f"{k}_ms": statistics.median(r[k] for r in runs) for k in runs[0]}
    for key in ("ttft", "decode"):
        found[f"{key}_range_ms"] = [min(r[key] for r in runs), max(r[key] for r in runs)]
    found["peak_rss_mb"] = max(s["peak_rss_mb"] for s in samples)
    found["load_s"] = statistics.median(s["load_s"] for s in samples)
    return found | {"prompt_tokens": samples[0]["prompt_tokens"], "runs": len(runs)}


def _error(work: Path, name: str) -> list[float] | None:
    """Distance of the logits from eager-fp32's, relative L2, after prefill and after the last token.

    Returns:
        None for a contender that reads another prompt (25 % of the visual tokens), or without eager-fp32's logits.
    """
    paths = [work / "logits" / f"{n}.npy" for n in (name, "eager-fp32")]
    if name.endswith("-25") or not all(p.exists() for p in paths):
        return None
    have, want = (np.load(p).astype(np.float64) for p in paths)
    return (np.linalg.norm(have - want, axis=1) / np.linalg.norm(want, axis=1)).tolist()


def machine() -> dict[str, Any]:
    """CPU model and the instruction sets that matter here, cores, memory in GB (10^9 bytes), versions."""
    path = Path("/proc/cpuinfo")
    lines = [line.split(":", 1) for line in path.read_text().splitlines() if ":" in line] if path.exists() else []
    facts = {key.strip(): value.strip() for key, value in reversed(lines)}
    flags = facts.get("flags", facts.get("Features", "")).split()
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "cpu": facts.get("model name", platform.processor() or platform.machine()),
        "flags": [f for f in FLAGS if f in flags],
        "cores": os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "system": f"{platform.system()} {platform.release()}",
        "versions": versions,
    }


def markdown(results: dict[str, Any]) -> str:
    """The result as a page: what it ran on, speed, export."""
    on = results["machine"]
    versions = ", ".join(f"{k} {v}" for k, v in on["versions"].items())
    head = (
        f"# {'Smoke run (small model)' if results['small'] else 'A model of real size'}, {results['date']}\n\n"
        f"{on['cpu']} ({' '.join(on['flags'])}), {on['threads']} threads of {on['cores']} cores, "
        f"{on['memory_gb']} GB, {on['system']}; {versions}.\n"
    )
    return "\n".join([head, "## Speed\n", *_speed_lines(results), "\n## Export\n", *_export_lines(results)]) + "\n"


def _speed_lines(results: dict[str, Any]) -> list[str]:
    speed = results["speed"]
    lines = [
        f"Medians in ms over all runs (lowest to highest); one image, {results['text_tokens']} text tokens, "
        f"{results['decoded_tokens']} decoded tokens. TTFT is vision + prefill. RSS is the highest of a process that "
        "holds this contender alone. Logits: relative L2 distance from eager-fp32 after prefill / after the last "
        "token, for those that read the same prompt.\n",
        *_row("contender", "prompt tokens", "vision", "prefill", "TTFT", "decode / token", "peak RSS MB", "logits"),
        "|---|" + "---:|" * 7,
    ]
    for name, s in speed.items():
        error = " / ".join(f"{e:.1e}" for e in s["logits_error"]) if s["logits_error"] else "-"
        lines += _row(
            name, s["prompt_tokens"], f"{s['vision_ms']:.1f}", f"{s['prefill_ms']:.1f}", _spread(s, "ttft", 1),
            _spread(s, "decode", 2), f"{s['peak_rss_mb']:.0f}", error,
        )  # fmt: skip
    peers = [p for p in PEERS if p in speed]
    lines += ["\nHow many times as fast as each peer (above 1 is faster), TTFT / decode:\n"]
    lines += [*_row("contender", *peers), "|---|" + "---:|" * len(peers)]
    for name, s in speed.items():
        ratios = [[speed[p][k] / s[k] for k in ("ttft_ms", "decode_ms")] for p in peers]
        lines += _row(name, *(f"{first:.2f} / {decode:.2f}" for first, decode in ratios))
    return lines


def _spread(s: dict[str, Any], key: str, digits: int) -> str:
    low, high = s[f"{key}_range_ms"]
    return f"{s[f'{key}_ms']:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def _export_lines(results: dict[str, Any]) -> list[str]:
    what = {
        "stock-onnx": "stock fp32, export and save, 100 %",
        "stock-int8": "stock int8, export and save, 100 %",
        "graphs": "vlmcut fp32, graphs alone, 100 %",
        "bundle-fp32": "vlmcut fp32, verified bundle, 100 % and 25 %",
        "bundle-int8": "vlmcut int8, verified bundle, 100 % and 25 %",
    }
    lines = [
        "`seconds` of the first three leave out loading the model. Weights stored again: bytes that the export holds "
        "already, as they are or transposed.\n",
        *_row("export", "graphs", "seconds", "RSS before MB", "peak RSS MB", "on disk MB", "weights stored again MB"),
        "|---|" + "---:|" * 6,
    ]
    for task, text in what.items():
        if (e := results["exports"].get(task)) is not None:
            before = f"{e['loaded_rss_mb']:.0f}" if e["loaded_rss_mb"] else "-"
            lines += _row(
                text, e["graph_files"], f"{e['seconds']:.1f}", before, f"{e['peak_rss_mb']:.0f}",
                f"{e['bytes'] / 1e6:.1f}", f"{e['repeated_bytes'] / 1e6:.1f}",
            )  # fmt: skip
    if (model := results["exports"].get("model")) is not None:
        count, size = model["parameters"] / 1e6, model["bytes"] / 1e6
        lines.append(f"\nThe model: {count:.1f} million parameters, {size:.1f} MB on disk as fp32.")
    return lines


def _row(*cells: Any) -> list[str]:
    return ["| " + " | ".join(map(str, cells)) + " |"]


def show_profile(options: argparse.Namespace) -> bool:
    """Print where one contender's time goes, and keep it as `profile-NAME.json`."""
    found = _fresh(options, f"profile:{options.profile}")
    if found is None:
        return False
    (options.work / f"profile-{options.profile}.json").write_text(json.dumps(found, indent=1) + "\n")
    for role, operators in found.items():
        whole = operators["whole call"][0]
        print(f"\n{options.profile} {role}: {whole:.2f} ms a call\n")
        print("\n".join([*_row("operator", "nodes", "ms", "%"), "|---|---:|---:|---:|"]))
        for operator, (ms, nodes) in list(operators.items())[1:13]:
            print(*_row(operator, nodes, f"{ms:.3f}", f"{100 * ms / whole:.1f}"))
    return True


if __name__ == "__main__":
    sys.exit(main())
