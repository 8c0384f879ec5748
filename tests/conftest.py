"""One thread: the models here are tiny, and threads that wait for each other are slower on a busy machine."""

import torch

torch.set_num_threads(1)
