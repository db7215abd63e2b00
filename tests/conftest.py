"""One hypothesis profile for all tests: no deadline (CI machines stutter), a fixed number of examples, the same every time."""
import torch
from hypothesis import settings

settings.register_profile("etw", deadline=None, max_examples=60, derandomize=True, print_blob=True)
settings.load_profile("etw")
torch.set_num_threads(2)
