"""The demo: compare, vote, score, personalise, and look at runs, in a browser.

    python demo/app.py                                  the embedded model
    python demo/app.py --lora DIR                       with a LoRA, such as the one that `mmalign quickstart` made
    python demo/app.py --base MODEL --lora A --lora B   a pipeline folder, a single file or a hub id, and its LoRAs
    python demo/app.py --model NAME=MODEL               another model beside it, such as a checkpoint

It listens on 127.0.0.1 alone unless --host and --auth say otherwise, shares nothing and fetches no URL. Models are
loaded when they are first asked for; one medium is made at a time. A Space has no command line: there the variable
MMALIGN_DEMO holds the flags.
"""

import argparse
import ipaddress
import os
import shlex
import sys
from pathlib import Path
from typing import Any

import arena
import compare
import gradio as gr
import personalise
import runs
import score
from gate import MAX_UPLOAD, Gate
from starlette.middleware import Middleware
from studio import Studio

from mmalign.records import UserError

TABS = {
    "Compare": compare.tab,
    "Arena": arena.tab,
    "Score": score.tab,
    "Personalise": personalise.tab,
    "Runs": runs.tab,
}
STYLE = """
.picture img { width: 100% !important; height: 100% !important; object-fit: contain }
.scores table { width: 100% }
.scores :is(table, thead, tbody, tr, th, td) { border: 0 !important }
.scores td { font-variant-numeric: tabular-nums }
.scores :is(th, td) { border-bottom: 1px solid var(--border-color-primary) !important }
"""
LOOK = {
    "theme": gr.themes.Soft(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
    "css": STYLE,
}


def build(studio: Studio) -> gr.Blocks:
    """The page; nothing is loaded yet."""
    with gr.Blocks(title="mmalign", analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        for name, fill in TABS.items():
            with gr.Tab(name, elem_id=f"tab-{name.lower()}"):
                fill(studio)
    return page.queue(max_size=64, default_concurrency_limit=1)


def launch(
    *, port: int | None = None, host: str | None = None, auth: str | None = None, options: Any = None, **given: Any
) -> Any:
    """Serves the page until it is interrupted.

    Args:
        port: default the first free one from 7860 on.
        host: address to listen on; default 127.0.0.1.
        auth: USER:PASSWORD, which the page then asks for.
        options: more for gradio's `launch`.
        given: of `Studio`.

    Raises:
        UserError: another address than this machine's own without `auth`, or as `Studio`.
    """
    user, _, password = (auth or "").partition(":")
    if auth and not (user and password):
        raise UserError("--auth: write USER:PASSWORD.")
    if "SPACE_ID" not in os.environ:  # a Space's own front decides who may come in, and sets the address
        host = host or "127.0.0.1"
        if not auth and not is_local(host):
            raise UserError(f"--host {host}: others can reach that address; give --auth USER:PASSWORD too.")
    studio = Studio(**given)
    os.environ["GRADIO_TEMP_DIR"] = str(studio.cache)  # else a folder that all gradio programs of the machine share
    safe = {
        "share": False,
        "ssr_mode": False,
        "mcp_server": False,
        "run_history": False,  # it can be told to keep runs elsewhere
        "enable_monitoring": False,
        "max_file_size": MAX_UPLOAD,
        "allowed_paths": [str(studio.data_dir / "media")],
        "app_kwargs": {"middleware": [Middleware(Gate)]},
    }
    who = {"auth": (user, password)} if auth else {}
    return build(studio).launch(
        **(options or {}), **safe, **who, **LOOK, server_name=host, server_port=port, footer_links=[]
    )


def is_local(host: str) -> bool:
    """Whether an address is reached from this machine alone."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def main() -> None:
    """The command line of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", help="pipeline folder, single file or hub id; default: the embedded model")
    parser.add_argument("--lora", action="append", default=[], dest="loras", help="[NAME=]PATH of a LoRA; repeatable")
    parser.add_argument("--model", action="append", default=[], dest="models", help="NAME=SOURCE[+LORA]; repeatable")
    parser.add_argument("--data-dir", type=Path, default="mmalign-demo", help="of votes, users and kept media")
    parser.add_argument("--prompts", type=Path, help="file of prompts that the Arena asks about, one a line")
    parser.add_argument("--runs", type=Path, default=".", dest="runs_dir", help="where output folders of training lie")
    parser.add_argument("--port", type=int, help="default: the first free one from 7860 on")
    parser.add_argument("--host", help="address to listen on; another than 127.0.0.1 needs --auth")
    parser.add_argument("--auth", help="USER:PASSWORD, which the page then asks for")
    try:
        launch(**vars(parser.parse_args([*shlex.split(os.environ.get("MMALIGN_DEMO", "")), *sys.argv[1:]])))
    except UserError as error:
        parser.exit(2, f"{error}\n")


if __name__ == "__main__":
    main()
