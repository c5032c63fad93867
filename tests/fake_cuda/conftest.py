"""The fake device tells torch's own code that there is CUDA; how it can do so changes with torch's versions."""

import torch

if torch.__version__ < "2.9":  # known to work with 2.15, known to ask for a real driver with 2.6
    collect_ignore_glob = ["test_*.py"]
