"""How fast documents become samples: `alst pack` beside the disk's own speed and TRL's `bfd_split`, in one run.

    python benchmarks/packing.py --folder DIR [--trl PYTHON]     # writes benchmarks/results/packing.json

DIR is where the corpus and the packed data sets are written, about 12 GB, and is emptied again. PYTHON is an
interpreter that can import trl; it is no dependency of this project, so without it that row is left out.

Every packer reads the same Arrow files of token ids, as `datasets` saves them, and ends when its result is on disk.
Each runs in a process of its own, in turn, several rounds; seconds are the medians. CPU seconds tell what the packer
costs where the machine is busy with other work, which the write limit hardly notices.
"""

import argparse
import json
import mmap
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pyarrow as pa

RESULTS = Path(__file__).parent / "results" / "packing.json"
SEQ_LEN = 3_700_000
DOCUMENTS = 168_147
ROWS_PER_BATCH = 1000  # as `datasets` writes them
VOCABULARY = 128_256
PAGE = 4096


def lengths_of(documents: int) -> np.ndarray:
    """Lognormal with a heavy tail: median 815 tokens, and a few documents longer than a sample."""
    rng = np.random.default_rng(0)
    lengths = np.exp(rng.normal(np.log(815), 1.62, documents))
    lengths[: documents // 5600] = np.exp(rng.uniform(np.log(200_000), np.log(7_900_000), documents // 5600))
    return np.clip(rng.permutation(lengths), 1, 7_900_000).astype(np.int64)


def write_corpus(folder: Path, lengths: np.ndarray) -> None:
    """A folder that `datasets.load_from_disk` opens, with one column of 32-bit token ids."""
    rng = np.random.default_rng(1)
    schema = pa.schema([("input_ids", pa.list_(pa.int32()))])
    folder.mkdir(parents=True)
    with pa.OSFile(str(folder / "data-00000-of-00001.arrow"), "wb") as sink, pa.ipc.new_stream(sink, schema) as stream:
        for first in range(0, len(lengths), ROWS_PER_BATCH):
            ends = np.concatenate([[0], np.cumsum(lengths[first : first + ROWS_PER_BATCH])]).astype(np.int32)
            values = pa.array(rng.integers(0, VOCABULARY, ends[-1], np.int32))
            stream.write_batch(pa.record_batch([pa.ListArray.from_arrays(pa.array(ends), values)], schema=schema))
    features = {"input_ids": {"feature": {"dtype": "int32", "_type": "Value"}, "_type": "List"}}
    (folder / "dataset_info.json").write_text(json.dumps({"citation": "", "description": "", "features": features}))
    state = {"_data_files": [{"filename": "data-00000-of-00001.arrow"}], "_fingerprint": "0", "_format_columns": None}
    state |= {"_format_kwargs": {}, "_format_type": None, "_output_all_columns": False, "_split": None}
    (folder / "state.json").write_text(json.dumps(state))


# What is measured. Each is called in a process of its own with (corpus, output) and returns what it wants to tell.


def write_limit(corpus: Path, output: Path) -> dict[str, Any]:
    """As many bytes as the corpus has, written from memory past the page cache, a sample at a time."""
    return _write(corpus, output, np.frombuffer(mmap.mmap(-1, 4 * SEQ_LEN // PAGE * PAGE), np.uint32))


def write_limit_huge_pages(corpus: Path, output: Path) -> dict[str, Any]:
    """The same from memory in huge pages, which the kernel hands to the disk in larger pieces; `alst pack` does so."""
    from pipeline.data.direct_file import aligned_tokens

    return _write(corpus, output, aligned_tokens(SEQ_LEN // 1024 * 1024))


def _write(corpus: Path, output: Path, tokens: np.ndarray) -> dict[str, Any]:
    from pipeline.data.direct_file import DirectFile

    left = (corpus / "data-00000-of-00001.arrow").stat().st_size // 4
    with DirectFile(output) as file:
        while left > 0:
            file.write(tokens[:left].data)
            left -= len(tokens)
    return {}


def packed_direct(corpus: Path, output: Path) -> dict[str, Any]:
    """`alst pack`: ids checked, plan, parts, index, checksums, manifest."""
    from pipeline.data.pack import pack

    seconds: dict[str, float] = {}
    for stage in ("tokenize", "plan", "write"):
        began = time.monotonic()
        manifest = pack(_recipe(corpus), output, stage=stage)
        seconds[stage] = round(time.monotonic() - began, 2)
    assert manifest is not None
    facts = ("samples", "tokens", "tokens_dropped", "documents_cut", "unfilled_fraction")
    return {"stage_seconds": seconds, **{name: getattr(manifest, name) for name in facts}}


def packed_buffered(corpus: Path, output: Path) -> dict[str, Any]:
    """The same through the page cache, as on a file system without direct I/O."""
    from pipeline import direct_io

    direct_io.DIRECT = 0
    return packed_direct(corpus, output)


def trl_bfd_split(corpus: Path, output: Path) -> dict[str, Any]:
    """TRL's packer that loses no token, with its default batches; `datasets` writes the result."""
    import datasets
    from trl import pack_dataset

    datasets.disable_progress_bars()
    found = pack_dataset(
        datasets.load_from_disk(str(corpus)), SEQ_LEN, "bfd_split", {"cache_file_name": f"{output}.arrow"}
    )
    os.sync()
    tokens = sum(len(row) for batch in found.data.to_batches() for row in batch.column("input_ids"))
    return {"samples": len(found), "tokens": tokens, "unfilled_fraction": 1 - tokens / (len(found) * SEQ_LEN)}


MEASURED: dict[str, Callable[[Path, Path], dict[str, Any]]] = {
    function.__name__: function
    for function in (write_limit, write_limit_huge_pages, packed_direct, packed_buffered, trl_bfd_split)
}


def _recipe(corpus: Path) -> Any:
    from pipeline.recipe.load import load

    source = f"{{type: huggingface, path: '{corpus}', columns: {{input_ids: input_ids}}}}"
    settings = {"data.sources": f"[{source}]", "data.tokenizer": "null", "data.seq_len": SEQ_LEN}
    settings |= {"model.config.vocab_size": VOCABULARY, "parallel.sp": 1}
    return load("tiny", overrides=[f"{key}={value}" for key, value in settings.items()])


def measure(name: str, corpus: Path, output: Path) -> dict[str, Any]:
    """Runs one in this process: its seconds and how much memory it took beyond its imports."""
    if name == "trl_bfd_split":
        import datasets  # noqa: F401
        import trl  # noqa: F401
    else:
        import pandas  # noqa: F401  (pyarrow imports it with its first array; `datasets` does at once)

        import pipeline.data.pack  # noqa: F401
    before = _memory_mib("VmRSS")
    began, cpu_began = time.monotonic(), time.process_time()
    told = MEASURED[name](corpus, output)
    return {
        "seconds": time.monotonic() - began,
        "cpu_seconds": round(time.process_time() - cpu_began, 2),
        "extra_rss_mib": _memory_mib("VmHWM") - before,
        **told,
    }


def _memory_mib(name: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) / 1024


def in_a_process(python: str, name: str, folder: Path) -> dict[str, Any]:
    """Measures one, and removes what it wrote."""
    output = folder / "output"
    command = [python, __file__, "--measure", name, "--folder", str(folder)]
    told = subprocess.run(command, capture_output=True, text=True)
    shutil.rmtree(output, ignore_errors=True)
    for left in folder.glob("output*"):
        left.unlink()
    if told.returncode:
        sys.exit(f"{name} failed:\n{told.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(told.stdout.splitlines()[-1])
    return found


def compare(folder: Path, *, trl: str | None, documents: int, rounds: int) -> dict[str, Any]:
    """All rows, in turn, `rounds` times."""
    lengths = lengths_of(documents)
    write_corpus(folder / "corpus", lengths)
    pythons = dict.fromkeys(MEASURED, sys.executable) | {"trl_bfd_split": trl}
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name, python in pythons.items() if python}
    load_before = os.getloadavg()
    for _ in range(rounds):
        for name in runs:
            runs[name].append(in_a_process(str(pythons[name]), name, folder))
            print(name, json.dumps(runs[name][-1]), file=sys.stderr, flush=True)
    tokens = int(lengths.sum())
    rows = {name: _row(found, tokens=tokens) for name, found in runs.items()}
    for name, row in rows.items():
        row["of_write_limit"] = rows["write_limit"]["median_seconds"] / row["median_seconds"]
        if "trl_bfd_split" in rows and name.startswith("packed"):
            row["times_trl"] = rows["trl_bfd_split"]["median_seconds"] / row["median_seconds"]
    return {"conditions": _conditions(lengths, rounds=rounds, load=load_before, trl=trl), "rows": rows}


def _row(found: list[dict[str, Any]], *, tokens: int) -> dict[str, Any]:
    seconds = [run["seconds"] for run in found]
    return {
        "mtok_per_second": tokens / median(seconds) / 1e6,
        "median_seconds": median(seconds),
        "seconds": [round(value, 2) for value in seconds],
        "extra_rss_mib": round(max(run["extra_rss_mib"] for run in found)),
        **{name: value for name, value in found[-1].items() if name not in ("seconds", "extra_rss_mib")},
    }


def _conditions(
    lengths: np.ndarray, *, rounds: int, load: tuple[float, float, float], trl: str | None
) -> dict[str, Any]:
    from pipeline.launch.snapshot import commit

    return {
        "commit": commit(),
        "cpus": len(os.sched_getaffinity(0)),
        "load_average_before_and_after": [load[0], os.getloadavg()[0]],
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("numpy", "pyarrow", "datasets", "xxhash")},
        "trl": subprocess.run(
            [trl, "-c", "import importlib.metadata as m; print(m.version('trl'))"], capture_output=True, text=True
        ).stdout.strip() if trl else None,
        "seq_len": SEQ_LEN,
        "documents": len(lengths),
        "tokens": int(lengths.sum()),
        "document_tokens": {
            "median": int(np.median(lengths)), "p99.9": int(np.quantile(lengths, 0.999)), "max": int(lengths.max())
        },
        "rounds": rounds,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--trl", help="a Python that can import trl")
    parser.add_argument("--documents", type=int, default=DOCUMENTS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--measure", choices=MEASURED, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.measure:
        print(json.dumps(measure(asked.measure, asked.folder / "corpus", asked.folder / "output")))
        return
    try:
        found = compare(asked.folder, trl=asked.trl, documents=asked.documents, rounds=asked.rounds)
    finally:
        shutil.rmtree(asked.folder / "corpus", ignore_errors=True)
    RESULTS.write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
