"""Released `.pkl` files, of one LoRA a module or of several: as part of a base, and as a LoRA."""

import pytest
import torch

from rewardsr import UserError, load_adapter, lora
from rewardsr.lora import exchange

UNET = "state_dict_unet"


@pytest.fixture(scope="module")
def release(data):
    return torch.load(data / "gdpo_model.pkl", weights_only=True)


@pytest.fixture(scope="module")
def double(release):
    """The layout of PiSA-SR: two LoRAs on each module, each of its own rank, which the file states by name."""
    state = {}
    for key, tensor in release[UNET].items():
        if ".lora_" not in key:
            state[key] = tensor
            continue
        for index, name in enumerate(("pix", "sem")):
            own = tensor + 0.01 * index
            if index:  # rank 3 of 4
                own = own[:3] if ".lora_A." in key else own[:, :3]
            state[key.replace(".weight", f"_{name}.weight")] = own.contiguous()
    return {"rank_unet_pix": 4, "rank_unet_sem": 3, UNET: state}


def expected(release) -> dict[str, torch.Tensor]:
    """What peft makes of several active LoRAs: the sum, each by alpha 8 / rank."""
    found: dict[str, torch.Tensor] = {}
    for key, a in release[UNET].items():
        module, found_a, _ = key.partition(".lora_A.")
        if found_a:
            change = lora.delta(a, release[UNET][key.replace(".lora_A.", ".lora_B.")], 8 / len(a))
            found[f"{module}.weight"] = found.get(f"{module}.weight", 0) + change
    return found


def load(tiny, **options):
    return load_adapter("osediff", tiny, noise_t=250, **options)


def differences(adapter, plain) -> dict[str, torch.Tensor]:
    before = plain.unet.state_dict()
    return {key: value - before[key] for key, value in adapter.unet.state_dict().items()}


@pytest.mark.parametrize("way", ["weights", "lora", "import"])
def test_two_loras_on_one_module_both_count(way, double, tiny, tmp_path) -> None:
    path = tmp_path / "pisa.pkl"
    torch.save(double, path)
    plain = load(tiny)
    adapter = load(tiny, weights=str(path)) if way == "weights" else load(tiny)
    if way != "weights":
        lora.load(adapter, path) if way == "lora" else exchange.import_lora(adapter, path)
        assert lora.rank_and_alpha(adapter)[0] == 7
        lora.merge(adapter)
    found, wanted = differences(adapter, plain), expected(double)
    assert wanted
    for name, change in wanted.items():
        assert torch.allclose(found[name], change, atol=1e-5), name


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"rank_unet_sem": ...}, "has rank 3, and the file states"),
        ({"rank_unet_pix": 5}, "has rank 4, and the file states"),
        ({"rank_unet_pix": "4"}, "has rank 4, and the file states"),
        ({"state_dict_text_encoder": {}}, "'state_dict_text_encoder' is not supported"),
        ({UNET: None}, "expected tensors by name"),
        ({UNET: {}}, "no LoRA tensors"),
        ({UNET: {3: torch.ones(1)}}, "unexpected key 3"),
        ({UNET: {None: 1}}, "None is no tensor"),
        ({UNET: {"conv_in.lora_A.default_encoder.weight": torch.ones(2, dtype=torch.int64)}}, "int64"),
        ({UNET: {"conv_in.lora_A.default_encoder.weight": torch.ones(())}}, "only one of"),
        ({UNET: {f"conv_in.lora_{m}.default_e.weight": torch.ones(()) for m in "AB"}}, "different ranks"),
        ({UNET: {f"conv_in.lora_{m}.default_e.weight": torch.ones(0, 0) for m in "AB"}}, "different ranks"),
        ({UNET: {f"conv_in.lora_{m}.default_e.weight": torch.ones(4, 4) for m in "AB"}}, "does not fit"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_releases_that_are_damaged(change, says, double, tiny, tmp_path) -> None:
    content = {key: value for key, value in {**double, **change}.items() if value is not ...}
    torch.save(content, tmp_path / "x.pkl")
    adapter = load(tiny)
    for read in (
        lambda: lora.load(adapter, tmp_path / "x.pkl"),
        lambda: exchange.import_lora(adapter, tmp_path / "x.pkl"),
    ):
        with pytest.raises(UserError, match=says) as caught:
            read()
        assert "\n" not in str(caught.value)
    assert not lora.names(adapter)
