"""The part of a recipe that says what is trained and how weights follow their gradients."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from rewardsr.options import Options
from rewardsr.train.recipe_text import Place


class LoraRecipe(Options):
    """The LoRA that is trained."""

    rank: int = Field(4, ge=1, le=4096, description="more than a layer is wide would be for nothing")
    alpha: float = Field(
        8.0, gt=0, le=1e6, description="the LoRA is scaled by alpha / rank; the papers' files have 8 at rank 4"
    )
    init: Place | None = Field(
        None,
        description="start from this LoRA (rewardsr safetensors, or GDPO-SR's .pkl), whose rank and alpha these must "
        "be; the reference of a method is the pipeline without it",
    )


_Beta = Annotated[float, Field(ge=0, lt=1)]


LEARNING_RATES = {"adamw": 5e-5, "adamw8bit": 5e-5, "prodigy": 1.0, "adafactor": 1e-2}  # unless the recipe says one


class OptimiserRecipe(Options):
    """How weights follow their gradients, the learning rate over time, and gradient clipping."""

    name: Literal["adamw", "adamw8bit", "prodigy", "adafactor"] = Field(
        "adamw",
        description="adamw8bit (bitsandbytes) keeps moments of 4096 weights and more in 8 bits; prodigy (prodigyopt) "
        "finds the size of its steps; adafactor keeps row and column means instead of moments. These three wait for "
        "the device at each tensor",
    )
    learning_rate: float = Field(
        5e-5,
        gt=0,
        le=10,
        description="about what AdamW moves a weight by in an update; prodigy: factor on what it finds, 1 by default; "
        "adafactor: largest share of a tensor's root mean square, 0.01 by default",
    )
    betas: tuple[_Beta, _Beta] | None = Field(
        (0.9, 0.999), description="of the moving averages; 1 would never learn; adafactor has none"
    )
    weight_decay: float = Field(0.01, ge=0, le=10, description="times the learning rate: share taken from the weights")
    eps: float = Field(1e-8, ge=1e-18, le=1, description="keeps the root of a second moment, which divides, off 0")
    warmup: int = Field(0, ge=0, le=10**9, description="updates over which the learning rate rises linearly")
    schedule: Literal["constant", "cosine"] = Field(
        "constant", description="after warm-up; cosine falls to 0 at the end"
    )
    clip: float = Field(1.0, gt=0, le=1e9, description="largest norm of the gradient")

    @model_validator(mode="before")
    @classmethod
    def _by_name(cls, content: Any) -> Any:
        """Defaults that depend on the optimiser."""
        if not isinstance(content, dict):
            return content
        name = str(content.get("name", "adamw"))
        own = {"learning_rate": LEARNING_RATES[name]} if name in LEARNING_RATES else {}
        return own | ({"betas": None} if name == "adafactor" else {}) | content

    @model_validator(mode="after")
    def _betas_where_they_act(self) -> Self:
        if (self.betas is None) != (self.name == "adafactor"):
            raise ValueError("betas: adafactor has none, every other optimiser needs two")
        return self
