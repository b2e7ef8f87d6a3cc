import os
import zipfile
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

# Triton decides when it is imported whether it compiles kernels or interprets them.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    # Glyphs are drawn once a session, and nobody's own cache is read or changed.
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MIRROR_OPT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def data_root() -> Path:
    root = os.environ.get("MIRROR_OPT_DATA")
    if not root:
        pytest.skip("MIRROR_OPT_DATA is not set")
    return Path(root)


def encode(pixels: np.ndarray, format: str = "PNG") -> bytes:
    buffer = BytesIO()
    Image.fromarray(pixels).save(buffer, format=format)
    return buffer.getvalue()


def noise(rng: np.random.Generator, *shape: int) -> bytes:
    return encode(rng.integers(0, 256, size=shape, dtype=np.uint8))


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory) -> Path:
    r"""Split folders of colour noise, 16 x 16: 6 classes of 8 images in each split."""
    root = tmp_path_factory.mktemp("folder")
    rng = np.random.default_rng(0)
    for split in ("train", "val", "test"):
        for label in range(6):
            folder = root / split / f"{split}-{label}"
            folder.mkdir(parents=True)
            for image in range(8):
                (folder / f"{image}.png").write_bytes(noise(rng, 16, 16, 3))
    return root


@pytest.fixture(scope="session")
def omniglot_folder(tmp_path_factory) -> Path:
    r"""The two zip files of Omniglot in small: all 1623 characters, 2 drawings of 8 x 8 each."""
    root = tmp_path_factory.mktemp("omniglot")
    rng = np.random.default_rng(0)
    for part, characters in (("images_background", 964), ("images_evaluation", 659)):
        with zipfile.ZipFile(root / f"{part}.zip", "w") as archive:
            for c in range(characters):
                folder = f"{part}/{part[7:]}-{c // 40}/character{c % 40 + 1:02}"
                for drawing in (1, 2):
                    archive.writestr(f"{folder}/{c:04}_{drawing:02}.png", noise(rng, 8, 8))
    return root


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Path:
    """A small run on glyphs, to be copied before it is changed."""
    from cli_cases import IMAGES, run

    out = tmp_path_factory.mktemp("glyphs") / "run"
    assert run("train", "--task", "glyphs", "--method", "mirror", *IMAGES, "--out", out) == 0
    return out


@pytest.fixture(scope="session")
def compared(tmp_path_factory) -> Path:
    """A small comparison on the sinusoid, to be copied before it is changed."""
    from cli_cases import SMALL, run

    out = tmp_path_factory.mktemp("sinusoid") / "run"
    command = ["compare", "--task", "sinusoid", "--methods", "maml,anil", *SMALL]
    assert run(*command, "--out", out) == 0
    return out
