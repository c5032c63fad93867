"""Every file name of a run, once, and the names in the header of its LoRA."""

RECIPE = "recipe.yaml"
LORA = "pytorch_lora_weights.safetensors"
FULL = "full_weights.safetensors"  # weights of the base that were trained themselves, where there are any
METRICS = "metrics.jsonl"
ENDING = "ending.json"  # how the run ended, and which step's weights it left
LOCK = ".lock"  # while a process trains there
VALIDATION = "validation"
PICTURES = "pictures"  # in VALIDATION: single ones, as pictures.write_cells names them
REPORT = "report.html"
VERSIONS = "versions.json"  # of what the run was last begun or resumed with
READY = "hub"  # what a push that found no connection has made ready

CHECKPOINTS = "checkpoints"  # a folder a step, with LORA, FULL and these
TRAINED = "trained.safetensors"
METHOD_STATE = "method.safetensors"
MOMENTS = "optimiser.safetensors"
STATE = "state.json"

# Of a published run:
CARD = "README.md"
SAMPLES = "samples"

# Keys of a LoRA file's text header:
DIFFUSERS_HEADER = "lora_adapter_metadata"  # where diffusers looks for rank and alpha
OUR_HEADER = "rewardsr"  # base, rank and alpha, as JSON
