"""One thread: the models here are tiny, and threads that wait for each other are slower on a busy machine."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # of processes that tests start, too

import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("busy", deadline=None)  # how long an example takes says how busy the machine is
settings.load_profile("busy")
