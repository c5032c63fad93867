"""Options that several commands share, named and explained once."""

from typing import Annotated

import typer

PIPELINE, COMPUTE = "Which pipeline", "Where it computes"

AdapterName = Annotated[str, typer.Option(help="registered adapter, or module:Name", rich_help_panel=PIPELINE)]
AdapterOption = Annotated[
    list[str] | None,
    typer.Option(
        "--option", help="adapter option, key=value (noise_t=250); `adapters NAME` lists them", rich_help_panel=PIPELINE
    ),
]
Base = Annotated[str | None, typer.Option(help="diffusers folder, Hub id, or 'embedded'", rich_help_panel=PIPELINE)]
BaseOfRun = Annotated[
    str | None,
    typer.Option(
        "--base",
        help="diffusers folder, Hub id, or 'embedded'; with --run: where its base lies",
        rich_help_panel=PIPELINE,
    ),
]
Run = Annotated[
    str | None,
    typer.Option(
        help="folder of a run (also of one that was interrupted), or user/name: its adapter, base and LoRA are used",
        rich_help_panel=PIPELINE,
    ),
]
Loras = Annotated[
    list[str] | None,
    typer.Option(
        "--lora", help="file, folder or user/name[@revision]; several with weights, a:0.7", rich_help_panel=PIPELINE
    ),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or mps", rich_help_panel=COMPUTE)]
Precision = Annotated[
    str | None,
    typer.Option(
        help="of the base: auto (bf16 where CUDA has it), fp32 or bf16; by default the run's, else auto",
        rich_help_panel=COMPUTE,
    ),
]
Prompts = Annotated[
    str | None,
    typer.Option(
        help="adapter, sidecar (.txt beside each image), metadata (metadata.jsonl), captioner (the run's), or one text "
        "for all; by default the run's, else adapter"
    ),
]
Seed = Annotated[int, typer.Option(help="of the noise")]
