"""For authors of adapters, rewards and trainers, and for our own tests: tiny real pipelines, and checks that say what
is wrong.

`Replay` gives back recorded noise where a test must follow a recorded run. `rewardsr.testing.flow` is a whole adapter
written from the contract alone.
"""

from rewardsr.draws import Replay
from rewardsr.testing.checks import check_adapter, check_reward
from rewardsr.testing.networks import tiny_pipeline, untrained_pipeline, write_images
from rewardsr.testing.trainer_checks import check_trainer

__all__ = [
    "Replay",
    "check_adapter",
    "check_reward",
    "check_trainer",
    "tiny_pipeline",
    "untrained_pipeline",
    "write_images",
]
