"""One thread per test process: on a machine that does other work, threads that spin for each other take minutes."""

import torch

torch.set_num_threads(1)
