"""The tab Score: what every scorer on this machine says of dropped pictures."""

import gradio as gr
from studio import Studio


def tab(studio: Studio) -> None:
    """Fills the tab."""
    gr.Markdown("There is nothing here yet.")
