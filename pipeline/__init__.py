"""Train Hugging Face decoders on sequences of millions of tokens: recipe -> plan -> jobs -> packed data -> training.

Read in this order: `recipe.schema`, `plan.job`, `launch.local`, `data.packing`, `train.main`.
"""

__version__ = "0.1.0"
