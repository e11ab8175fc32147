"""Speed and memory of data preparation, and of the loader, against their peers.

    python -m benchmarks.data --stages         MB/s of each stage, one core
    python -m benchmarks.data --end-to-end     llm.prepare against datatrove's own pipeline: same text, rules, tokenizer
    python -m benchmarks.data --loader         tokens/s against slices of a flat memory-mapped file, as nanoGPT's loader
    python -m benchmarks.data --memory         peak memory of llm.prepare on 1, 4 and 16 times --megabytes

Documents are made of sentences of the embedded corpus drawn at random, about 2 KB each, every tenth an edited copy of
an earlier one. Peers run in turn with us, in one run; figures are medians. Writes benchmarks/results/data.json.
"""

import argparse
import json
import os
import pathlib
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np

from llm import tokenization
from llm.data import CleanSpec, Dataset, DataSpec, DedupSpec, ObjectiveSpec, batch_at, dedup, pack
from llm.data.clean import stages
from llm.data.documents import Tally, apply
from llm.data.objectives import Specials
from llm.data.shards import Shards, ShardWriter
from llm.data.sources import read, read_all, units
from llm.tokenization import TokenizerSpec

RESULTS = pathlib.Path(__file__).parent / "results" / "data.json"
ROOT = pathlib.Path(__file__).parent.parent
RULES = ("gopher_quality", "gopher_repetition", "fineweb")


def documents(megabytes: float, seed: int = 0) -> Iterator[str]:
    """Texts of about 2 KB, together `megabytes`; every tenth is an earlier one with a few words changed."""
    prose = "\n".join(document.text for document in read_all(DataSpec(), "austen"))
    sentences = [" ".join(s.split()) for s in re.findall(r"[A-Z\"][^.!?]{20,400}[.!?]", prose)]
    rng, left, earlier = np.random.default_rng(seed), megabytes * 1e6, []
    while left > 0:
        if earlier and rng.random() < 0.1:
            words = earlier[int(rng.integers(len(earlier)))].split(" ")
            words[int(rng.integers(len(words)))] = "somewhere"
            text = " ".join(words)
        else:
            chosen = rng.integers(0, len(sentences), 18)
            text = "\n".join(" ".join(sentences[i] for i in part) for part in np.split(chosen, 3))
            if len(earlier) < 5000:
                earlier.append(text)
        left -= len(text)
        yield text


def write(folder: pathlib.Path, megabytes: float) -> pathlib.Path:
    """A .jsonl of `documents`."""
    path = folder / f"{megabytes:g}mb.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for number, text in enumerate(documents(megabytes)):
            file.write(json.dumps({"id": str(number), "text": text}) + "\n")
    return path


# --- stages -----------------------------------------------------------------------------------------------------------


def measure_stages(megabytes: float) -> dict[str, float]:
    """MB/s of each stage by itself, one core, over English text in memory."""
    with tempfile.TemporaryDirectory() as name:
        path = write(pathlib.Path(name), megabytes)
        spec = DataSpec(train=str(path))
        began = time.perf_counter()
        texts = [d for unit in units(spec, str(path)) for d in read(unit, spec, lambda *_: None)]
        found = {"read jsonl": megabytes / (time.perf_counter() - began)}

    def timed(name: str, run: Callable[[], object]) -> None:
        began = time.perf_counter()
        run()
        found[name] = megabytes / (time.perf_counter() - began)

    def through(stage):
        return lambda: [None for _ in apply(stage, texts, Tally("x"))]

    everything = CleanSpec(languages=("en",), personal_data=("email", "ip", "phone", "card", "national_id"))
    for name, stage in stages(everything):
        timed(name, through(stage))
    for rule in ("gopher_quality", "gopher_repetition", "c4", "fineweb"):
        (stage,) = [stage for name, stage in stages(CleanSpec(quality=(rule,))) if name == "quality"]
        timed(rule, through(stage))
    for name, stage in dedup.document_stages(DedupSpec(document_lines=True, document_paragraphs=True)):
        timed(name, through(stage))
    contamination = dedup.Contamination.of(texts[:200], 13)
    timed("contamination", through(contamination.stage))
    timed("exact key", lambda: [dedup.exact_key(d.text) for d in texts])
    near = DedupSpec(near=True)
    timed("MinHash", lambda: dedup.band_keys([dedup.shingles(d.text, near.shingle) for d in texts], near))
    tokenizer = tokenization.train(TokenizerSpec(vocab_size=8192), (d.text for d in texts[:2000]))
    batches = [[d.text for d in texts[k : k + 256]] for k in range(0, len(texts), 256)]
    timed("encode (bpe, all cores)", lambda: [tokenizer.encode_batch(batch) for batch in batches])
    return {name: round(value, 2) for name, value in found.items()}


# --- end to end -------------------------------------------------------------------------------------------------------

PEER = """
import dataclasses, sys
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.dedup import MinhashDedupBuckets, MinhashDedupCluster, MinhashDedupFilter, MinhashDedupSignature
from datatrove.pipeline.dedup.minhash import MinhashConfig
from datatrove.pipeline.filters import FineWebQualityFilter, GopherQualityFilter, GopherRepetitionFilter
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.tokens import DocumentTokenizer
from datatrove.pipeline.writers import JsonlWriter
from datatrove.utils.word_tokenizers import WordTokenizer
import re

class Words(WordTokenizer):
    def word_tokenize(self, text): return re.findall(r"\\w+|[^\\w\\s]", text)
    def sent_tokenize(self, text): return re.split(r"(?<=[.!?])\\s+", text)
    def span_tokenize(self, text): return [m.span() for m in re.finditer(r"[^.!?]+[.!?]*", text)]

def main():
    source, out, tokenizer, workers = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
    config, words = MinhashConfig(n_grams=5, num_buckets=14, hashes_per_bucket=8), Words()
    runs = iter(range(10))
    def run(tasks, *steps):
        LocalPipelineExecutor(list(steps), tasks=tasks, workers=workers, logging_dir=f"{out}/logs/{next(runs)}").run()
    read = lambda: JsonlReader(f"{out}/kept", compression="infer")
    run(workers, JsonlReader(source), GopherRepetitionFilter(language=words), GopherQualityFilter(language=words),
        FineWebQualityFilter(language=words), JsonlWriter(f"{out}/kept", compression=None))
    run(workers, read(), MinhashDedupSignature(f"{out}/signatures", config=config, language=words))
    run(14, MinhashDedupBuckets(f"{out}/signatures", f"{out}/buckets", config=config))
    run(1, MinhashDedupCluster(f"{out}/buckets", f"{out}/remove", config=config))
    run(workers, read(), MinhashDedupFilter(f"{out}/remove"), JsonlWriter(f"{out}/unique", compression=None))
    run(workers, JsonlReader(f"{out}/unique"), DocumentTokenizer(f"{out}/tokens", tokenizer, eos_token="<|endoftext|>"))

if __name__ == "__main__":
    main()
"""


def prepare_flags(source: pathlib.Path, workdir: pathlib.Path, workers: int, *more: str) -> list[str]:
    """The command that is measured: near duplicates go, and what `more` says."""
    return [
        sys.executable, "-m", "llm.prepare", f"--input={source}", f"--workdir={workdir}", f"--workers={workers}",
        "--config.dedup.near=true", "--config.tokenizer.vocab_size=8192", *more,
    ]  # fmt: skip


def measure_end_to_end(megabytes: float, rounds: int, workers: int) -> dict:
    """Seconds of both, in turn, as whole processes with the tokenizer given; documents kept by each."""
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        (folder / "text").mkdir()
        source = folder / "text"
        # as many files as workers: datatrove deals files to its tasks
        texts = list(documents(megabytes))
        for part in range(workers):
            with (source / f"{part}.jsonl").open("w", encoding="utf-8") as file:
                file.writelines(
                    json.dumps({"id": str(n), "text": t}) + "\n" for n, t in enumerate(texts) if n % workers == part
                )
        tokenizer = folder / "tokenizer.json"
        tokenization.train(TokenizerSpec(vocab_size=8192), texts[:2000]).save(tokenizer)
        script = folder / "peer.py"
        script.write_text(PEER)
        seconds: dict[str, list[float]] = {"llm.prepare": [], "datatrove": []}
        kept: dict[str, int] = {}
        for number in range(rounds):
            for peer in seconds:
                out = folder / f"{peer}{number}"
                flags = [sys.executable, str(script), str(source), str(out), str(tokenizer), str(workers)]
                if peer == "llm.prepare":
                    rules = f"--config.clean.quality={','.join(RULES)}"
                    flags = prepare_flags(source, out, workers, rules, f"--config.tokenizer.path={tokenizer}")
                began = time.perf_counter()
                done = subprocess.run(flags, cwd=ROOT, capture_output=True, text=True)
                seconds[peer].append(time.perf_counter() - began)
                if done.returncode:
                    sys.exit(f"{peer} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
                if peer == "llm.prepare":
                    report = json.loads((out / "data" / "report.json").read_text())
                    kept[peer] = report["train"]["documents"] + report["validation"]["documents"]
                else:
                    kept[peer] = sum(len(p.read_bytes().splitlines()) for p in (out / "unique").glob("*.jsonl"))
                shutil.rmtree(out)
        median = {peer: statistics.median(values) for peer, values in seconds.items()}
        return {
            "megabytes": megabytes, "documents": len(texts), "workers": workers, "kept": kept,
            "seconds": {peer: round(value, 1) for peer, value in median.items()},
            "megabytes_per_second": {peer: round(megabytes / value, 2) for peer, value in median.items()},
            "speed_ratio": round(median["datatrove"] / median["llm.prepare"], 2),
        }  # fmt: skip


# --- loader -----------------------------------------------------------------------------------------------------------


def measure_loader(rounds: int = 7) -> list[dict]:
    """Tokens/s of batch_at and of slices of a flat file, alternating. Ours also makes segments, positions, weights."""
    rng = np.random.default_rng(0)
    specials = Specials(
        vocab_size=50_000, end_of_text=0, pad=None, cls=None, sep=None, mask=None, bos=None, sentinels=()
    )
    found = []
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        writer = ShardWriter(folder / "0.tokens", vocab_size=50_000, fields=("text",), tokenizer="benchmark")
        for _ in range(40_000):
            writer.add([rng.integers(1, 50_000, int(rng.lognormal(6, 1)))])
        writer.close()
        shards = Shards.open([folder / "0.tokens"])
        flat_file = folder / "flat.bin"
        shards.take(np.arange(shards.tokens)).tofile(flat_file)
        for length, batch_size in ((128, 8), (1024, 16), (1024, 64)):
            pack.concatenate(shards.lengths()[:, 0], length).save(folder / "rows.npz")
            dataset = Dataset.open(shards, folder / "rows.npz", ObjectiveSpec(), specials, row_length=length)
            flat = np.memmap(flat_file, np.uint16, "r")

            def slices(step: int, length=length, batch_size=batch_size, flat=flat):
                at = np.random.default_rng(step).integers(0, len(flat) - length - 1, batch_size)
                inputs = np.stack([flat[i : i + length].astype(np.int64) for i in at])
                return inputs, np.stack([flat[i + 1 : i + 1 + length].astype(np.int64) for i in at])

            def ours(step: int, dataset=dataset, batch_size=batch_size):
                return batch_at(dataset, 0, step, batch_size)

            steps = max(20, 2_000_000 // (batch_size * length))
            rates: dict[str, list[float]] = {"ours": [], "slices": []}
            for _ in range(rounds):
                for peer, make in (("ours", ours), ("slices", slices)):
                    began = time.perf_counter()
                    for step in range(steps):
                        make(step)
                    rates[peer].append(steps * batch_size * length / (time.perf_counter() - began))
            median = {peer: statistics.median(values) for peer, values in rates.items()}
            found.append({
                "row_length": length, "batch_size": batch_size,
                "million_tokens_per_second": {peer: round(value / 1e6, 1) for peer, value in median.items()},
                "ratio": round(median["ours"] / median["slices"], 2),
            })  # fmt: skip
    return found


# --- memory -----------------------------------------------------------------------------------------------------------


def resident_megabytes(root: int) -> float:
    """Resident memory of a process and all that it started; pages that they share count in each."""
    children: dict[int, list[int]] = {}
    for path in pathlib.Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        children.setdefault(int(fields[1]), []).append(int(path.parent.name))
    total, waiting = 0, [root]
    while waiting:
        process = waiting.pop()
        waiting += children.get(process, [])
        try:
            total += int(pathlib.Path(f"/proc/{process}/statm").read_text().split()[1])
        except OSError:
            continue
    return total * os.sysconf("SC_PAGE_SIZE") / 1e6


def measure_memory(megabytes: float, workers: int, times=(1, 4, 16)) -> list[dict]:
    """Peak resident memory and time of llm.prepare on growing corpora."""
    found = []
    for factor in times:
        with tempfile.TemporaryDirectory(dir=ROOT / "runs" if (ROOT / "runs").is_dir() else None) as name:
            folder = pathlib.Path(name)
            source = write(folder, megabytes * factor)
            # Lines of many documents are counted over the whole corpus. Quality rules look at one document: left out.
            command = prepare_flags(source, folder / "run", workers, "--config.dedup.corpus_lines=1000")
            began = time.perf_counter()
            with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL) as process:
                peak, over = [0.0], threading.Event()

                def watch(process=process, peak=peak, over=over):
                    while not over.wait(0.2):
                        peak[0] = max(peak[0], resident_megabytes(process.pid))

                watcher = threading.Thread(target=watch)
                watcher.start()
                process.wait()
                over.set()
                watcher.join()
            if process.returncode:
                sys.exit(f"llm.prepare failed with exit code {process.returncode}")
            seconds = time.perf_counter() - began
            found.append({
                "megabytes": megabytes * factor, "workers": workers, "peak_megabytes": round(peak[0]),
                "seconds": round(seconds), "megabytes_per_second": round(megabytes * factor / seconds, 2),
            })  # fmt: skip
            print(found[-1], flush=True)
    return found


def main() -> None:
    """Measures what is asked for and writes it beside what was measured before."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("stages", "end-to-end", "loader", "memory"):
        parser.add_argument(f"--{name}", action="store_true")
    parser.add_argument("--megabytes", type=float, default=None, help="of text")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    flags = parser.parse_args()
    found = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    found["machine"] = {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    if flags.stages:
        found["stages_megabytes_per_second"] = measure_stages(flags.megabytes or 10)
    if flags.end_to_end:
        found["end_to_end"] = measure_end_to_end(flags.megabytes or 30, flags.rounds, flags.workers)
    if flags.loader:
        found["loader"] = measure_loader()
    if flags.memory:
        found["memory"] = measure_memory(flags.megabytes or 128, flags.workers)
    print(json.dumps(found, indent=1))
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
