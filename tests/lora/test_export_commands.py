"""Export and import by command: what other programs would get, and back again."""

from rewardsr import run_folder


def test_export_and_import_by_command(commands, tiny_base, hq_folder, tmp_path) -> None:
    run = tmp_path / "run"
    assert commands.finetune(tiny_base, hq_folder, run).code == 0
    for form, files in {
        "diffusers": {run_folder.LORA},
        "kohya": {"lora.safetensors"},
        "peft": {"adapter_config.json", "adapter_model.safetensors"},
    }.items():
        answer = commands("export", tmp_path / form, "--run", run, "--format", form)
        assert answer.code == 0, answer.err
        assert {path.name for path in (tmp_path / form).rglob("*") if path.is_file()} == files
    source = tmp_path / "kohya" / "lora.safetensors"
    answer = commands("import", "lora", source, tmp_path / "back", "--base", tiny_base, "--option", "noise_t=250")
    assert answer.code == 0 and "rank 4, alpha 8" in answer.out, answer.err
    upscale = ("upscale", hq_folder / "000.png", "--base", tiny_base, "--option", "noise_t=250", "--device", "cpu")
    for name, where in {"one": run, "two": tmp_path / "back"}.items():
        assert commands(*upscale, "--lora", where, "-o", tmp_path / name).code == 0
    assert (tmp_path / "one" / "000.png").read_bytes() == (tmp_path / "two" / "000.png").read_bytes()
    assert commands("export", tmp_path / "x", "--run", run, "--format", "onnx").code == 2
    assert commands("export", tmp_path / "x", "--run", run, "--format", "osediff").code == 2
    assert not (tmp_path / "x").exists()
