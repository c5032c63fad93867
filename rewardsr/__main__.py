"""`python -m rewardsr`, which `accelerate launch -m rewardsr finetune ...` and `torchrun -m` need."""

from rewardsr.cli import main

if __name__ == "__main__":
    main()
