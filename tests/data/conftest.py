import pytest


@pytest.fixture
def own_cache(tmp_path_factory, monkeypatch):
    """What `datasets` keeps of one test is not found by another."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
