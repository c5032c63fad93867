"""Networks compiled by torch for the steps of a run, with policy and reference in one and the same graph."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from rewardsr.adapter import ISRAdapter
from rewardsr.draws import Draws
from rewardsr.errors import UserError, one_line
from rewardsr.lora import full
from rewardsr.lora.layers import add_gates
from rewardsr.train.prepare import Setup

logger = logging.getLogger(__name__)

SHAPES = 64  # graphs of a network: rows of sampling, policy and images, with and without gradients


def compile_networks(adapter: ISRAdapter, backend: str = "inductor") -> None:
    """Compile what the adapter's hooks call, each network as one graph for each shape that it meets."""
    # Rewards set the precision of products for themselves, and give back what they found: by the name that it is given
    # here, for another name of the same would count as a change, and compile everything anew.
    torch.set_float32_matmul_precision(torch.get_float32_matmul_precision())
    torch._dynamo.config.cache_size_limit = max(torch._dynamo.config.cache_size_limit, SHAPES)
    add_gates(adapter)
    for module in adapter.compiled():
        module.compile(backend=backend, fullgraph=True, dynamic=False)


@contextmanager
def eager() -> Iterator[None]:
    """Inside, compiled networks run as written: held-out images have many shapes, and compiling takes minutes."""
    with torch.compiler.set_stance("force_eager"):
        yield


def check_one_path(setup: Setup) -> None:
    """Refuse to train where policy and reference differ although their weights are equal.

    A difference in the last bits is a preference out of nothing at the paper's beta. This first call compiles, too.

    Raises:
        UserError: they differ, or a network does not compile.
    """
    adapter, method, recipe = setup.adapter, setup.method, setup.recipe
    logger.info("compiling the networks: this takes minutes")
    indices = list(range(recipe.batch_size))
    draws = Draws(recipe.seed, 0, indices, "compile")
    rows = method.micro_batch or method.rows_per_image * recipe.batch_size
    with _untrained(method.trained_weights()), full.off(adapter):
        try:
            with torch.no_grad():
                condition = adapter.encode(setup.data.batch(recipe.seed, indices).to(adapter.device), generator=draws)
                condition = condition.repeat(-(-rows // len(condition))).rows(slice(rows))
                z_t = adapter.start(condition, Draws(recipe.seed, 0, range(rows), "compile"))
            with method.reference():
                reference = adapter.predict(z_t, adapter.net_t, condition).detach()
            policy = adapter.predict(z_t, adapter.net_t, condition).detach()
        except torch._dynamo.exc.TorchDynamoException as error:
            raise UserError(f"compile: a network does not compile: {one_line(error)}; set compile=false") from error
    if not torch.equal(policy, reference):
        apart = float((policy - reference).abs().max())
        raise UserError(
            f"compile: the policy of equal weights differs from the reference by {apart:.2g}, and a preference would "
            "come out of that: set compile=false"
        )


@contextmanager
def _untrained(weights: dict[str, torch.nn.Parameter]) -> Iterator[None]:
    """Inside, the LoRAs change nothing."""
    kept: dict[str, Tensor] = {name: value.detach().clone() for name, value in weights.items() if ".lora_B." in name}
    try:
        for name in kept:
            weights[name].data.zero_()
        yield
    finally:
        for name, value in kept.items():
            weights[name].data.copy_(value)
