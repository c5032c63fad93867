"""Every file name of a run, once."""

RECIPE = "recipe.yaml"
LORA = "pytorch_lora_weights.safetensors"
METRICS = "metrics.jsonl"
CHECKPOINTS = "checkpoints"
VALIDATION = "validation"
READY = "hub"  # what a push that found no connection has made ready
