"""A demo page on the client's machine: an image, its protected form, the prediction and what attacks reconstruct.

The browser sends plain images to this process only. All requests to services go through :class:`raypp.Client`.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import torch
from torch import Tensor

from raypp.client.http import Client
from raypp.client.session import RemoteError
from raypp.metrics.image import MIN_SIDE, ssim
from raypp.utils.errors import ConfigError, RayppError
from raypp.utils.images import Pixels, encode_png

NOT_FOUND = 404
UPLOAD_SECONDS = 60  # after which Gradio deletes an image from this machine's temporary folder
FILES = resources.files("raypp.client")


def open_services(urls: Sequence[str], *, token: str | None = None, key: str | Path | None = None) -> dict[str, Client]:
    """Connect to services by ``NAME=URL`` or ``URL``, which then is the name, too; returns clients by name.

    Raises:
        ConfigError: a URL is none, or two services have one name.
        RayppError: a service does not answer, or its protection cannot be used.
    """
    services: dict[str, Client] = {}
    with ExitStack() as clients:
        for argument in urls:
            name, equals, url = argument.partition("=")
            if not equals or "/" in name:
                name = url = argument
            if name in services:
                raise ConfigError(f"two services are called {name!r}; write NAME={url} to tell them apart")
            services[name] = clients.enter_context(Client(url, token=token, key=key, patience=2.0))
            _describe(services[name])
        clients.pop_all()  # the caller closes the clients
    return services


def _describe(client: Client) -> tuple[dict[str, Any], dict[str, Any]]:
    """Descriptions of a service and of its attacks, empty without attacks; raises RayppError."""
    about = client.model()
    client.protection()
    try:
        return about, client.attacks()
    except RemoteError as error:
        if error.status != NOT_FOUND:
            raise
        return about, {}


def page(name: str, client: Client, image: Pixels) -> str:
    """HTML of a service's results for one plain image uint8 (H, W, 3); raises RayppError if the service fails."""
    about, offered = _describe(client)  # again, since the service may have switched to another bundle
    plain, protected = client.protect([image])
    (prediction,) = client.classify([image])
    baselines = offered.get("baselines") or {}
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    return environment.from_string((FILES / "demo.html.j2").read_text()).render(
        service=name,
        accuracy=about.get("accuracy"),
        plain=_base64_png(plain[0]),
        protected=_base64_png(protected[0]),
        classes=prediction.top,
        attacks=[_run_attack(client, attack, image, plain[0]) for attack in offered.get("attacks", [])],
        baselines=baselines,
        no_attacks="This bundle has no attack results; raypp attack BUNDLE measures what it leaks."
        if offered
        else "This service offers no attacks.",
    )


def _run_attack(client: Client, attack: dict[str, Any], image: Pixels, plain: Pixels) -> dict[str, Any]:
    """Values of one attack for the template; an attack that fails does not remove the others from the page."""
    try:
        (reconstruction,) = client.reconstruct(attack["attack"], [image])
    except RayppError as error:
        return attack | {"problem": str(error), "png": None, "ssim": None}
    is_comparable = reconstruction.shape == plain.shape and min(plain.shape[:2]) >= MIN_SIDE
    similarity = float(ssim(_to_tensor(reconstruction), _to_tensor(plain))) if is_comparable else None
    return attack | {"problem": None, "png": _base64_png(reconstruction), "ssim": similarity}


def _base64_png(image: Pixels) -> str:
    return base64.b64encode(encode_png(image)).decode()


def _to_tensor(image: Pixels) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255


@contextmanager
def running_demo(services: dict[str, Client], *, port: int) -> Iterator[str]:
    """Serve the page on this machine until the context ends; yields its address and closes the clients.

    Raises ConfigError if gradio is not installed or the port is in use.
    """
    try:
        import gradio as gr
    except ImportError as error:
        raise ConfigError("raypp demo needs gradio: uv sync --extra demo") from error
    blocks = _build_blocks(gr, services)
    try:
        _, address, _ = blocks.launch(
            server_name="127.0.0.1", server_port=port, share=False, quiet=True, prevent_thread_lock=True,
            footer_links=[], ssr_mode=False, css=(FILES / "demo.css").read_text(),
            theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
        )  # fmt: skip
    except OSError as error:
        raise ConfigError(f"--port {port} cannot be opened; is it in use?") from error
    try:
        yield address.rstrip("/")
    finally:
        blocks.close()
        for client in services.values():
            client.close()


def _build_blocks(gr: Any, services: dict[str, Client]) -> Any:
    names = list(services)

    def show(image: Pixels | None, name: str) -> str:
        if image is None:
            return ""
        try:
            return page(name, services[name], image)
        except RayppError as error:
            raise gr.Error(str(error), duration=None) from error

    with gr.Blocks(title="raypp", analytics_enabled=False, delete_cache=(UPLOAD_SECONDS, UPLOAD_SECONDS)) as blocks:
        gr.Markdown(
            "# What leaves this machine, and what it reveals\nDrop an image, paste one or use the camera. It is "
            "protected **here**; only the protected image is sent."
        )
        with gr.Row():
            with gr.Column(scale=1, min_width=260):
                image = gr.Image(
                    label="Image", type="numpy", image_mode="RGB", sources=["upload", "webcam", "clipboard"],
                    height=300, buttons=[], elem_id="image",
                )  # fmt: skip
                name = gr.Dropdown(names, value=names[0], label="Service", interactive=True, elem_id="service",
                                   visible=len(names) > 1)  # fmt: skip
            with gr.Column(scale=3, min_width=400):
                html = gr.HTML(elem_id="shown")
        for change in (image.change, name.change):
            change(show, [image, name], html, api_visibility="private", show_progress="minimal")
    return blocks
