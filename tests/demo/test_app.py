import app
import pytest

from mmalign.records import UserError


def test_the_page_has_its_tabs_in_order(studio):
    page = app.build(studio)
    labels = [block.label for block in page.blocks.values() if type(block).__name__ == "Tab"]
    assert labels == ["Compare", "Arena", "Score", "Personalise", "Runs"]


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.0.1", "::", "my-machine"])
def test_another_address_needs_a_password(host):
    with pytest.raises(UserError, match="--auth"):
        app.launch(host=host)


@pytest.mark.parametrize("auth", ["me", "me:", ":secret"])
def test_half_a_password_is_refused(auth):
    with pytest.raises(UserError, match="USER:PASSWORD"):
        app.launch(host="0.0.0.0", auth=auth)
