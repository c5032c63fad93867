"""Every file name of a run, once."""

RECIPE = "recipe.yaml"
LORA = "pytorch_lora_weights.safetensors"
METRICS = "metrics.jsonl"
VALIDATION = "validation"
READY = "hub"  # what a push that found no connection has made ready

CHECKPOINTS = "checkpoints"  # a folder a step, with LORA and these
TRAINED = "trained.safetensors"
METHOD_STATE = "method.safetensors"
MOMENTS = "optimiser.safetensors"
STATE = "state.json"
