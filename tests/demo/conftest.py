"""The demo's files, imported as `python demo/app.py` and a Space import them."""

import sys

import pytest
from peft import LoraConfig

import mmalign

sys.path.insert(0, str(mmalign.bundled("demo")))


@pytest.fixture(scope="session")
def lora(tiny_sdxl, tmp_path_factory):
    """Folder of a LoRA that changes what the tiny SDXL makes."""
    folder = tmp_path_factory.mktemp("lora") / "aligned"
    modality = mmalign.load(tiny_sdxl)
    config = LoraConfig(r=2, target_modules=modality.lora_targets(), init_lora_weights=False)
    modality.network.add_adapter(config, "policy")
    modality.save(folder)
    return folder


@pytest.fixture
def studio(tiny_sdxl, lora, tmp_path):
    """The tiny SDXL as `base`, and `aligned`."""
    from studio import Studio

    return Studio(str(tiny_sdxl), [str(lora)], data_dir=tmp_path / "data", runs_dir=tmp_path / "runs")
