"""Options that several commands share, named and explained once."""

from typing import Annotated

import typer

AdapterName = Annotated[str, typer.Option(help="registered adapter, or module:Name")]
AdapterOption = Annotated[list[str] | None, typer.Option("--option", help="adapter option, key=value (noise_t=250)")]
Base = Annotated[str | None, typer.Option(help="diffusers folder, Hub id, or 'embedded'")]
BaseOfRun = Annotated[
    str | None, typer.Option("--base", help="diffusers folder, Hub id, or 'embedded'; with --run: where its base lies")
]
Run = Annotated[str | None, typer.Option(help="folder of a run, or user/name: its adapter, base and LoRA are used")]
Loras = Annotated[
    list[str] | None, typer.Option("--lora", help="file, folder or user/name[@revision]; several with weights, a:0.7")
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or mps")]
Precision = Annotated[
    str | None,
    typer.Option(help="of the base: auto (bf16 where CUDA has it), fp32 or bf16; by default the run's, else auto"),
]
Prompts = Annotated[
    str | None,
    typer.Option(
        help="adapter, sidecar (.txt beside each image), metadata (metadata.jsonl), captioner (the run's), or one text "
        "for all; by default the run's, else adapter"
    ),
]
Seed = Annotated[int, typer.Option(help="of the noise")]
