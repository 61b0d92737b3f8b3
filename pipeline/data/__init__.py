"""Documents in, samples of millions of tokens out: sources -> tokenize -> packing -> packed_dataset -> loader -> Batch.

`pack.pack` makes a packed data set, `loader.PackedLoader` reads it, `inspect.describe` says what is in one.
"""
