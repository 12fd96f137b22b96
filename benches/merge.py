"""Time and memory of merges beside a plain copy, mergekit and PEFT, on models that are made here.

    python benches/merge.py --size 3.6 --folder /tmp/merge-bench [--rounds 3] [--peers]

Subject, peers and limit (``cp -r`` and ``sync``) run in turn in the same rounds, each in a process of its own; memory
is the peak of resident pages. ``--peers`` needs mergekit 0.1.5. The folder is removed at the end.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import yaml
from safetensors.torch import save_file

from harness import machine

HIDDEN, INNER, HEADS, VOCAB = 3072, 8192, 24, 128_256
LAYER_BYTES = 2 * (2 * HIDDEN * HIDDEN + 2 * HIDDEN * 1024 + 3 * HIDDEN * INNER + 2 * HIDDEN)
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 8,
    "vocab_size": VOCAB,
    "tie_word_embeddings": True,
    "dtype": "bfloat16",
}
LINEARS = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (1024, HIDDEN),
    "self_attn.v_proj": (1024, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}
POLL_SECONDS = 0.005
READ_BYTES = 1 << 20
RESUMED = "moeft lora, started again after a kill at half its time"
MODEL = {"model": "b"}
RECIPES = {
    "lora": {"merge_method": "lora", "models": [{"adapter": "adapter"}]},
    "linear": {"merge_method": "linear", "models": [{"model": "a"}, MODEL]},
    "task_arithmetic": {"merge_method": "task_arithmetic", "models": [MODEL], "parameters": {"weight": 0.7}},
    "slerp": {"merge_method": "slerp", "models": [{"model": "a"}, MODEL], "parameters": {"t": 0.4}},
    "fisher_damped": {"merge_method": "fisher_damped", "models": [MODEL], "fisher": "b"},
    "ties": {"merge_method": "ties", "models": [MODEL], "parameters": {"density": 0.5, "weight": 0.7}},
}
PEFT = (
    "import sys; from peft import PeftModel; from transformers import AutoModelForCausalLM as A\n"
    "base = A.from_pretrained('a', dtype='bfloat16')\n"
    "PeftModel.from_pretrained(base, 'adapter').merge_and_unload().save_pretrained(sys.argv[1], max_shard_size='1GB')"
)


def save_model(folder: Path, layers: int, noise: float) -> None:
    """Random bf16 weights, one file for each three layers; ``noise`` moves them from those of the same seed."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    moved = torch.Generator().manual_seed(1)

    def weight(*shape: int) -> torch.Tensor:
        values = torch.randn(shape, generator=generator) * 0.02
        return (values + noise * 0.02 * torch.randn(shape, generator=moved)).bfloat16()

    files: list[dict[str, torch.Tensor]] = [{"model.embed_tokens.weight": weight(VOCAB, HIDDEN)}]
    places = {}
    for start in range(0, layers, 3):
        files.append({})
        for layer in range(start, min(start + 3, layers)):
            for name, shape in LINEARS.items():
                files[-1][f"model.layers.{layer}.{name}.weight"] = weight(*shape)
            for name in ("input_layernorm", "post_attention_layernorm"):
                files[-1][f"model.layers.{layer}.{name}.weight"] = weight(HIDDEN)
        name = f"model-{len(files) - 1:05}.safetensors"
        save_file(files[-1], folder / name, {"format": "pt"})
        places |= dict.fromkeys(files[-1], name)
        files[-1] = {}
    files[0]["model.norm.weight"] = weight(HIDDEN)
    save_file(files[0], folder / "model-00000.safetensors", {"format": "pt"})
    places |= dict.fromkeys(files[0], "model-00000.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    (folder / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": layers}))


def save_adapter(folder: Path, layers: int) -> None:
    """LoRA of rank 16 on all linear layers."""
    folder.mkdir()
    tensors = {}
    for layer in range(layers):
        for name, (rows, cols) in LINEARS.items():
            prefix = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{prefix}.lora_A.weight"] = torch.randn(16, cols) * 0.01
            tensors[f"{prefix}.lora_B.weight"] = torch.randn(rows, 16) * 0.01
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    modules = [name.rpartition(".")[2] for name in LINEARS]
    config = {"peft_type": "LORA", "peft_version": "0.21.2", "r": 16, "lora_alpha": 32, "target_modules": modules}
    (folder / "adapter_config.json").write_text(json.dumps(config | {"task_type": "CAUSAL_LM"}))


def warm(folder: Path) -> None:
    """Read all inputs, so that none of them has left the page cache."""
    for file in folder.rglob("*.safetensors"):
        with file.open("rb", buffering=0) as source:
            while source.read(READ_BYTES):
                pass


def measure(words: list[str], folder: Path) -> tuple[float, float, float]:
    """Wall seconds with a sync at the end, CPU seconds and peak memory in MB of a command; its output is removed."""
    warm(folder)
    os.sync()
    started = time.perf_counter()
    log = folder / "log.txt"
    with log.open("wb") as output:
        child = subprocess.Popen([*words], cwd=folder, stdout=output, stderr=subprocess.STDOUT)
    peak = 0
    # The usage that the system reports for a child begins with the memory of its parent, so the peak is looked up.
    while (ended := os.wait4(child.pid, os.WNOHANG))[0] == 0:
        peak = max(peak, peak_kilobytes(child.pid))
        time.sleep(POLL_SECONDS)
    _, status, usage = ended
    os.sync()
    seconds = time.perf_counter() - started
    if status != 0:
        raise RuntimeError(f"{words} failed with {os.waitstatus_to_exitcode(status)}:\n{log.read_text()[-2000:]}")
    shutil.rmtree(folder / "out")
    return seconds, usage.ru_utime + usage.ru_stime, peak / 1000


def peak_kilobytes(pid: int) -> int:
    """Largest resident memory of a process since it was started; 0 if it is just ending."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next((int(line.split()[1]) for line in lines if line.startswith("VmHWM")), 0)


def interrupt(words: list[str], folder: Path, seconds: float) -> None:
    """Kill a merge after some time."""
    child = subprocess.Popen([*words], cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        child.wait(seconds)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
        return
    raise RuntimeError(f"{words} ended before it could be killed")


def subjects(folder: Path, binary: str, peers: bool) -> dict[str, list[str]]:
    """Commands by name; every one writes ``out``."""
    commands = {"cp -r + sync": ["cp", "-r", "a", "out"]}
    for name, recipe in RECIPES.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"base_model": "a", **recipe}))
        commands[f"moeft {name}"] = [binary, f"{name}.yaml", "--out", "out", "--quiet"]
    if peers:
        commands["PEFT merge_and_unload"] = [sys.executable, "-c", PEFT, "out"]
        for name in ("linear", "task_arithmetic", "slerp", "ties"):
            text = {"base_model": "a", "dtype": "float32", "out_dtype": "bfloat16", **RECIPES[name]}
            text["models"] = [model | {"parameters": {"weight": 1.0}} for model in text["models"]]
            (folder / f"mergekit-{name}.yaml").write_text(yaml.safe_dump(text))
            words = [f"mergekit-{name}.yaml", "out", "--no-copy-tokenizer", "--no-write-model-card"]
            run = f"from mergekit.scripts.run_yaml import main; main({words})"
            commands[f"mergekit {name}"] = [sys.executable, "-c", run]
    return commands


def main() -> None:
    """Measure and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=float, default=3.6, help="GB of one model")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/merge-bench"))
    parser.add_argument("--binary", default=str(Path("target/release/moeft-merge").absolute()))
    parser.add_argument("--peers", action="store_true", help="mergekit and PEFT too")
    parser.add_argument("--out", type=Path, help="append results as JSON lines")
    options = parser.parse_args()
    layers = max(1, round((options.size * 1e9 - 2 * VOCAB * HIDDEN) / LAYER_BYTES))
    options.folder.mkdir(parents=True)
    try:
        save_model(options.folder / "a", layers, 0.0)
        save_model(options.folder / "b", layers, 0.1)
        save_adapter(options.folder / "adapter", layers)
        commands = subjects(options.folder, options.binary, options.peers)
        found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in commands}
        size = sum(file.stat().st_size for file in (options.folder / "a").glob("*.safetensors"))
        found[RESUMED] = []
        for _ in range(options.rounds):
            for name, words in commands.items():
                found[name].append(measure(words, options.folder))
            interrupt(commands["moeft lora"], options.folder, found["moeft lora"][-1][0] / 2)
            found[RESUMED].append(measure(commands["moeft lora"], options.folder))
    finally:
        shutil.rmtree(options.folder)
    limit = statistics.median(row[0] for row in found["cp -r + sync"])
    print("| what | wall s | median | x cp | CPU s | peak RSS MB |\n|---|---|---|---|---|---|")
    for name, rows in found.items():
        wall = statistics.median(row[0] for row in rows)
        each = " ".join(f"{row[0]:.1f}" for row in rows)
        cpu, peak = statistics.median(row[1] for row in rows), max(row[2] for row in rows)
        print(f"| {name} | {each} | {wall:.1f} | {wall / limit:.2f} | {cpu:.1f} | {peak:.0f} |")
        if options.out is not None:
            result = {"subject": name, "gb": size / 1e9, "seconds": [row[0] for row in rows], "median_seconds": wall}
            result |= {"times_copy": wall / limit, "cpu_seconds": cpu, "peak_rss_mb": peak}
            with options.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(result | machine()) + "\n")


if __name__ == "__main__":
    main()
