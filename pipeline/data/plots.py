"""What a packed data set looks like: four histograms in one picture."""

from pathlib import Path

import numpy as np

from pipeline.data.packed_dataset import DOCUMENTS_NAME, PackedDataset
from pipeline.data.token_parts import read_document_rows
from pipeline.errors import DataError


def plot_packed(folder: Path, path: Path) -> None:
    """Plots the data set in `folder` into `path`: document lengths by documents and by tokens, fill, cost, documents.

    Raises DataError if `folder` is no complete data set, or `path` cannot be written or names no picture.
    """
    from matplotlib.figure import Figure

    dataset = PackedDataset.open(folder)
    lengths = read_document_rows(folder / DOCUMENTS_NAME)["length"].to_numpy()
    figure = Figure(figsize=(11, 7), layout="constrained")
    by_length, fill, cost, documents = figure.subplots(2, 2).flat
    bins = np.geomspace(1, max(2, int(lengths.max()) + 1), 48)
    by_length.hist(lengths, bins, alpha=0.6, label="documents", weights=np.full(len(lengths), 100 / len(lengths)))
    by_length.hist(lengths, bins, alpha=0.6, label="tokens", weights=100 * lengths / lengths.sum())
    by_length.set(xscale="log", title="length of documents", xlabel="tokens", ylabel="% of all")
    by_length.legend()
    fill.hist(100 * dataset.index.n_tokens / dataset.seq_len, 48)
    fill.set(title="fill of samples", xlabel="% of seq_len", ylabel="samples")
    cost.hist(dataset.index.cost / dataset.seq_len**2, 48)
    cost.set(title="attention cost of samples", xlabel="sum of len² over seq_len²", ylabel="samples")
    documents.hist(np.diff(dataset.index.cu_offsets) - 1, 48)
    documents.set(title="documents per sample", xlabel="documents", ylabel="samples")
    figure.suptitle(f"{folder.name}: {dataset.samples:,} samples of {dataset.seq_len:,} tokens")
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise DataError(f"the plot {path} cannot be written: {error}; name a .png in a folder that is there") from error
