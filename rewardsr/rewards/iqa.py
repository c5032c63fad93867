"""Any metric of pyiqa as a reward: `rewardsr.rewards.build("musiq")`.

pyiqa has about a hundred metrics under one roof, each with habits of its own; here every one of them gives one float32
score a sample, higher is better, and lets gradients through where it can. pyiqa is under a non-commercial licence
(PolyForm Noncommercial 1.0.0), which covers training with it as well; it is imported only when a metric is built.
"""

import contextlib
import importlib
import importlib.util
import inspect
import io
import pickle
import urllib.request
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any
from urllib.error import URLError

import huggingface_hub.constants
import torch
from pydantic import ConfigDict, Field
from torch import Tensor

from rewardsr import plugins
from rewardsr.batch import Batch
from rewardsr.errors import UserError, nearest, one_line
from rewardsr.options import Options
from rewardsr.rewards.fidelity import target
from rewardsr.rewards.precision import Wanted, chosen, computing
from rewardsr.rewards.pretrained import Checkpoint, NotCachedError, cached_or_fetched, local_file

LICENCE = "PolyForm-Noncommercial-1.0.0 (pyiqa)"

# What pyiqa's own table does not say, by type of network; found by reading and by running it (0.1.16).
_LOWER_BETTER = {"DMM"}  # a distance that its table takes for a score
_NO_GRADIENT = {"AFINE", "Compare2Score", "DMM", "Entropy", "NRQM", "PI", "PIQE", "QAlign", "QReAlign"}
_ONE_BY_ONE = {"AFINE", "Compare2Score", "QAlign"}  # fail on a batch, or score its first image only
_SMALLEST = {"SSIM": 11, "VIF": 33, "CW_SSIM": 64, "NIQE": 96, "PI": 96, "MS_SSIM": 161, "LIQE": 224}  # pixels
_UNFIT = {
    "FID": "it compares sets of images, not single ones",
    "InceptionScore": "it judges sets of images, not single ones",
    "CLIPScore": "it needs captions",
}
_BEHIND_KWARGS = {"PSNR": ("color_space", "data_range", "eps")}  # options that a signature does not show
_CROPS = ("test_sample", "crops", "num_crop")  # what networks call the number of crops that they average over


class IQAOptions(Options):
    """Options of every metric; all others go to the metric's network.

    Which those are ("color_space" of psnr and ssim, "backbone" of the CLIP metrics, ...) only pyiqa's own code says, so
    they are checked against the signature of the network when the metric is built.
    """

    model_config = ConfigDict(extra="allow")

    weights: Path | None = Field(
        None,
        description="file in place of a download: all of the metric's weights (.pth, .pt, .safetensors), NIQE's .mat, "
        "or for clipiqa the CLIP file",
    )
    crops: int | None = Field(
        None,
        ge=1,
        le=10_000,
        description="over how many crops a network averages that does (maniqa: 20). They lie on a square grid from the "
        "top left, and only square numbers fill it",
    )
    precision: Wanted = Field(
        "auto",
        description="of a metric that is a network: fp32; tf32 (of CUDA; elsewhere fp32), which moved scores that are "
        "not near 0 by 2e-5 to 2e-3 of their size (untrained weights); bf16, by 3e-3 to 3e-2, enough to reorder "
        "similar images; auto: tf32. Formulas are always computed in fp32",
    )


class IQA:
    """A pyiqa metric as a reward.

    Metrics where lower is better are negated, images are clamped to [0, 1] and scored in the metric's own precision
    whatever autocast says, and metrics that give one number for a whole batch are called image by image. Full-reference
    metrics compare with HQ and count as fidelity, no-reference ones as detail. Attributes are those of `Reward`, and:

    Attributes:
        lower_better: of the metric itself; its scores are negated then.
    """

    Options = IQAOptions

    def __init__(self, metric: str, options: IQAOptions) -> None:
        """Build the metric; weights come from the caches of pyiqa, torch and the Hub, else are downloaded.

        Args:
            metric: pyiqa's id: "musiq", "maniqa" (trained on KonIQ; "maniqa-pipal" is another scale), "lpips", ...
            options: of the metric and of its network.

        Raises:
            UserError: unknown metric or option, pyiqa missing, weights that cannot be had, read or fitted.
        """
        entry = _entry(metric)
        self._type = str(entry["metric_opts"]["type"])
        self.name = f"iqa:{metric}" if metric in plugins.names("rewards") else metric
        self.licence = LICENCE
        self.needs_hq = entry.get("metric_mode") == "FR"
        self.kind = "fidelity" if self.needs_hq else "detail"
        # pyiqa's metrics of faces cut a detected face out of one image, by way of numpy.
        self.differentiable = self._type not in _NO_GRADIENT and "-face" not in metric
        self._one_by_one = self._type in _ONE_BY_ONE or "-face" in metric
        self.lower_better = _lower_better(entry)
        self._network = _build(metric, self._type, options)
        self._precision = chosen(_owner(metric), self._network, options.precision)
        self._device = torch.device("cpu")

    def __call__(self, sr: Tensor, batch: Batch) -> Tensor:
        """Score images; gradients reach `sr` if the metric is differentiable.

        Args:
            sr: (B, 3, H, W) RGB; clamped to [0, 1].
            batch: its `hq` (B, 3, H, W) is used by full-reference metrics.

        Returns:
            (B,) float32 in the metric's own units, negated where lower is better; on the device of `sr`.

        Raises:
            UserError: images too small for the metric, or no HQ images for a full-reference one.
            ValueError: HQ images of another shape than `sr`.
        """
        hq = target(self.name, sr, batch) if self.needs_hq else None
        smallest = _SMALLEST.get(self._type, 1)
        if min(sr.shape[-2:]) < smallest:
            size = f"{sr.shape[-1]}x{sr.shape[-2]}"
            raise UserError(f"metric '{self.name}' needs images of at least {smallest} pixels a side, not {size}")
        if sr.device != self._device:
            self._network.to(sr.device)
            self._device = sr.device
        gradients = self.differentiable and torch.is_grad_enabled()
        try:
            with computing(sr.device, self._precision), torch.set_grad_enabled(gradients):
                return (-1.0 if self.lower_better else 1.0) * self._scores(sr, hq).float()
        except (RuntimeError, AssertionError) as error:
            error.add_note(f"in metric '{self.name}' on images {tuple(sr.shape)}")
            raise

    def _scores(self, sr: Tensor, hq: Tensor | None) -> Tensor:
        if not self._one_by_one:
            scores = self._run(sr, hq)
            if scores.numel() == len(sr):
                return scores.reshape(-1)
            if scores.numel() != 1:
                raise ValueError(f"metric '{self.name}' gave {tuple(scores.shape)} for {len(sr)} images")
            self._one_by_one = True
        rows = [self._run(sr[i : i + 1], None if hq is None else hq[i : i + 1]) for i in range(len(sr))]
        return torch.cat([row.reshape(1) for row in rows])

    def _run(self, sr: Tensor, hq: Tensor | None) -> Tensor:
        # clamp makes copies, and must: some networks normalise their input in place.
        images = [image.float().clamp(0, 1) for image in (sr, hq) if image is not None]
        scores = self._network(*images)
        return scores[0] if isinstance(scores, tuple) else scores


@cache
def metrics() -> dict[str, dict[str, Any]]:
    """pyiqa's table of metrics by id, read without importing pyiqa (that takes seconds).

    Raises:
        UserError: pyiqa is not installed.
    """
    spec = importlib.util.find_spec("pyiqa")
    if spec is None or spec.origin is None:
        raise UserError(
            "this reward needs pyiqa: pip install pyiqa (licence PolyForm Noncommercial 1.0.0: no commercial use)"
        )
    table = importlib.util.spec_from_file_location(
        "_rewardsr_pyiqa_table", Path(spec.origin).with_name("default_model_configs.py")
    )
    assert table is not None and table.loader is not None  # of a path ending in .py there always is one
    module = importlib.util.module_from_spec(table)
    table.loader.exec_module(module)
    return dict(module.DEFAULT_CONFIGS)


def _entry(metric: str) -> dict[str, Any]:
    table = metrics()
    if metric not in table:
        raise UserError(f"pyiqa has no metric '{metric}': {nearest(metric, table, 'see pyiqa.list_models()')}")
    entry = table[metric]
    reason = "it ranks pairs of images" if metric == "fgresq_pair" else _UNFIT.get(entry["metric_opts"]["type"])
    if reason is not None:
        raise UserError(f"metric '{metric}' cannot be a reward: {reason}")
    return entry


def _lower_better(entry: dict[str, Any]) -> bool:
    return bool(entry.get("lower_better", False)) or entry["metric_opts"]["type"] in _LOWER_BETTER


# ---- building a metric: options, then weights ----


def _build(metric: str, kind: str, options: IQAOptions) -> torch.nn.Module:
    """The network of a metric without pyiqa's wrapper, which has TF32 and gradients of its own mind."""
    weights = None if options.weights is None else local_file(_owner(metric), options.weights)
    parameters = _network_parameters(metric, kind)
    given = _checked(metric, options.model_extra or {}, parameters) | _crop_option(metric, options.crops, parameters)
    with _without_output(), torch.random.fork_rng(devices=[]):  # random start weights must not shift the caller's draws
        if weights is None:
            built = _cached_or_fetched(metric, given)
        else:
            built = _from_file(metric, kind, weights, given, parameters)
    network: torch.nn.Module = built.net
    return network.eval().requires_grad_(False)


def _owner(metric: str) -> str:
    return f"metric '{metric}'"


def _network_parameters(metric: str, kind: str) -> set[str]:
    """Options of the network behind a metric."""
    try:
        with _without_output():
            archs = importlib.import_module("pyiqa.archs")
            registry = importlib.import_module("pyiqa.utils.registry").ARCH_REGISTRY
            load = getattr(archs, "_lazy_import_arch", None)  # recent versions import a network's module when it is due
            if load is not None:
                load(kind)
            network = registry.get(kind)
    except Exception as error:  # its dependencies are many, and fail in many ways
        raise UserError(f"{_owner(metric)}: pyiqa does not import here: {one_line(error)}") from error
    signature = inspect.signature(network.__init__).parameters.values()
    named = {p.name for p in signature if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)} - {"self"}
    return named | set(_BEHIND_KWARGS.get(kind, ()))


def _checked(metric: str, options: dict[str, Any], parameters: set[str]) -> dict[str, Any]:
    # Files named that way would be read as pickles that may run code; `weights` is the way to give one.
    allowed = [*IQAOptions.model_fields, *sorted(parameters - {"pretrained_model_path"})]
    for name in options:
        if name not in allowed:
            raise UserError(f"{_owner(metric)} has no option '{name}': {nearest(name, allowed)}")
    return options


def _crop_option(metric: str, crops: int | None, parameters: set[str]) -> dict[str, Any]:
    if crops is None:
        return {}
    name = next((name for name in _CROPS if name in parameters), None)
    if name is None:
        raise UserError(f"{_owner(metric)} does not average over crops: drop the option 'crops'")
    return {name: crops}


def _create(metric: str, options: dict[str, Any]) -> Any:
    # On the CPU, for pyiqa loses track of its device otherwise when it is moved later.
    pyiqa = importlib.import_module("pyiqa")
    try:
        with _tensors_only():
            return pyiqa.create_metric(metric, as_loss=True, loss_reduction="none", device="cpu", **options)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{_owner(metric)}: a file of its weights holds more than tensors (it could run code), or is damaged: "
            "refused; remove it from the cache, or give options: {weights: PATH} with a .safetensors of its tensors"
        ) from error


def _cached_or_fetched(metric: str, options: dict[str, Any]) -> Any:
    """First without network, so that cached weights never wait for a connection; then, if there is one, with it."""

    def cached() -> Any:
        asked: list[str] = []
        try:
            with _no_downloads(asked):
                return _create(metric, options)
        except UserError:
            raise
        except Exception as error:  # what a missing file looks like depends on the metric
            if not asked and not isinstance(error, OSError):
                raise UserError(f"{_owner(metric)} cannot be built: {one_line(error)}") from error
            wanted = f" ({asked[-1].rsplit('/', 1)[-1]})" if asked else ""
            raise NotCachedError(f"its weights{wanted}") from error

    return cached_or_fetched(_owner(metric), cached, lambda: _create(metric, options), "give options: {weights: PATH}")


def _from_file(metric: str, kind: str, weights: Path, options: dict[str, Any], parameters: set[str]) -> Any:
    """Build from one local file; nothing is fetched."""
    checkpoint = None
    is_clip = kind == "CLIPIQA" and metric == "clipiqa"  # has no weights besides CLIP's
    if is_clip:
        options = {**options, "backbone": str(weights)}
    elif weights.suffix == ".mat" and "pretrained_model_path" in parameters:
        options = {**options, "pretrained_model_path": str(weights)}
    elif "pretrained" in parameters:
        checkpoint = Checkpoint(_owner(metric), weights)
        options = {**options, "pretrained": False}
        if metric == "musiq-ava":  # pyiqa infers the ten classes of AVA from the download only
            options = {"num_class": 10, **options}
    else:
        raise UserError(f"{_owner(metric)} takes no weights file: drop the option 'weights'")
    try:
        with _no_downloads([]), _untrained_backbones():
            built = _create(metric, options)
    except UserError:
        raise
    except Exception as error:
        form = " (expected OpenAI's file, a TorchScript archive)" if is_clip else ""
        raise UserError(f"{_owner(metric)} cannot be built from '{weights}' alone{form}: {one_line(error)}") from error
    if checkpoint is not None:
        checkpoint.fit(built.net)
    return built


# ---- what is changed around pyiqa, openly, and only while a metric is built ----


@contextlib.contextmanager
def _without_output() -> Iterator[None]:
    """Without pyiqa's prints and the warnings of its dependencies."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def _swapped(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextlib.contextmanager
def _no_downloads(asked: list[str]) -> Iterator[None]:
    """Caches only: what would be downloaded fails at once, and its address is added to `asked`.

    The Hub's client is told to be offline (it retries for up to 50 seconds otherwise); pyiqa, torch and CLIP download
    with urllib, which knows no such switch and waits long where packets are dropped.
    """

    def refuse(url: Any, *_: Any, **__: Any) -> Any:
        asked.append(str(getattr(url, "full_url", url)))
        raise URLError("downloads are switched off")

    with (
        _swapped(huggingface_hub.constants, "HF_HUB_OFFLINE", True),
        _swapped(urllib.request, "urlopen", refuse),
        _swapped(torch.hub, "urlopen", refuse),
    ):
        yield


@contextlib.contextmanager
def _tensors_only() -> Iterator[None]:
    """Files are read without running code, whatever the metric asks for.

    pyiqa reads most of its downloads as pickles that may run any, some by way of torch.hub, timm or CLIP; all of these
    end in `torch.load`. TorchScript archives (OpenAI's CLIP, ARNIQA) and .mat files (NIQE, NRQM, BRISQUE) hold no
    Python. Of transformers' models those that bring Python code along (`trust_remote_code`) are refused.
    """
    import transformers.dynamic_module_utils

    load = torch.load

    def load_tensors(*args: Any, **kwargs: Any) -> Any:
        return load(*args, **{**kwargs, "pickle_module": None, "weights_only": True})

    def refuse(*_: Any, **__: Any) -> Any:
        raise pickle.UnpicklingError("it brings Python code along")

    with (
        _swapped(torch, "load", load_tensors),
        _swapped(transformers.dynamic_module_utils, "get_class_in_module", refuse),
    ):
        yield


@contextlib.contextmanager
def _untrained_backbones() -> Iterator[None]:
    """timm networks without their own weights: the file that is loaded afterwards holds them.

    pyiqa asks timm for trained backbones in any case, even when it replaces every weight a moment later.
    """
    import timm

    create = timm.create_model

    def untrained(*args: Any, **kwargs: Any) -> Any:
        return create(*args, **{**kwargs, "pretrained": False})

    with _swapped(timm, "create_model", untrained):
        yield
