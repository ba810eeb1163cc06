"""A demo page on the client's machine: an image, its protected form, the prediction and what attacks reconstruct.

The browser sends plain images to this process only. All requests to services go through :class:`raypp.Client`.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
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
PROTECTED_BASELINE = "protected image"  # an entry of a scorecard's baselines that does have information
UPLOAD_SECONDS = 60  # after which Gradio deletes an image from this machine's temporary folder
FILES = resources.files("raypp.client")


@dataclass
class Service:
    """A service that the page offers, its description and its attacks."""

    name: str
    client: Client
    about: dict[str, Any] = field(default_factory=dict)
    offered: dict[str, Any] = field(default_factory=dict)

    def refresh(self) -> None:
        """Fetch the descriptions again, since the service may have switched to another bundle.

        Raises:
            RayppError: it does not answer.
        """
        self.about = self.client.model()
        self.client.protection()
        try:
            self.offered = self.client.attacks()
        except RemoteError as error:
            if error.status != NOT_FOUND:
                raise
            self.offered = {}


def open_services(urls: Sequence[str], *, token: str | None = None, key: str | Path | None = None) -> list[Service]:
    """Connect to services by ``NAME=URL`` or ``URL``, which then is the name, too.

    Raises:
        ConfigError: a URL is none, or two services have one name.
        RayppError: a service does not answer, or its protection cannot be used.
    """
    services: list[Service] = []
    with ExitStack() as clients:
        for argument in urls:
            name, equals, url = argument.partition("=")
            if not equals or "/" in name:
                name = url = argument
            if name in {service.name for service in services}:
                raise ConfigError(f"two services are called {name!r}; write NAME={url} to tell them apart")
            client = clients.enter_context(Client(url, token=token, key=key, patience=2.0))
            services.append(Service(name, client))
            services[-1].refresh()
        clients.pop_all()  # the caller closes the clients
    return services


def page(service: Service, image: Pixels) -> str:
    """HTML of the results for one plain image uint8 (H, W, 3).

    Raises:
        RayppError: the service does not answer or refuses.
    """
    service.refresh()
    plain, protected = service.client.protect([image])
    (prediction,) = service.client.classify([image])
    baselines = [
        {"name": name, "ssim": scores.get("ssim"), "reidentified": scores.get("reidentified")}
        for name, scores in (service.offered.get("baselines") or {}).items()
        if name != PROTECTED_BASELINE
    ]
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    return environment.from_string((FILES / "demo.html.j2").read_text()).render(
        service=service.name,
        accuracy=service.about.get("accuracy"),
        plain=_base64_png(plain[0]),
        protected=_base64_png(protected[0]),
        classes=prediction.top,
        attacks=[_run_attack(service, about, image, plain[0]) for about in service.offered.get("attacks", [])],
        baselines=baselines,
        no_attacks="This service offers no attacks."
        if not service.offered
        else "This bundle has no attack results; raypp attack BUNDLE measures what it leaks.",
    )


def _run_attack(service: Service, about: dict[str, Any], image: Pixels, plain: Pixels) -> dict[str, Any]:
    """Values of one attack for the template; an attack that fails does not remove the others from the page."""
    measured = about["measured"]
    values = {
        "name": about["attack"], "threat": about["threat"], "attacker_has": about["attacker_has"],
        "verdict": measured.get("verdict"), "verdict_reason": measured.get("verdict_reason"),
        "reidentification_rate": measured.get("reidentification_rate"), "mean_ssim": measured.get("ssim"),
        "lower_bound": measured.get("lower_bound"), "png": None, "problem": None, "ssim": None,
    }  # fmt: skip
    try:
        (reconstruction,) = service.client.reconstruct(about["attack"], [image])
    except RayppError as error:
        return values | {"problem": str(error)}
    values["png"] = _base64_png(reconstruction)
    if reconstruction.shape == plain.shape and min(plain.shape[:2]) >= MIN_SIDE:
        values["ssim"] = float(ssim(_to_tensor(reconstruction), _to_tensor(plain)))
    return values


def _base64_png(image: Pixels) -> str:
    return base64.b64encode(encode_png(image)).decode()


def _to_tensor(image: Pixels) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255


@contextmanager
def running_demo(offered: Sequence[Service], *, port: int) -> Iterator[str]:
    """Serve the page on this machine until the context ends; yields its address and closes the clients.

    Raises:
        ConfigError: gradio is not installed, or the port is in use.
    """
    try:
        import gradio as gr
    except ImportError as error:
        raise ConfigError("raypp demo needs gradio: install raypp[demo]") from error
    blocks = _build_blocks(gr, {service.name: service for service in offered})
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
        for service in offered:
            service.client.close()


def _build_blocks(gr: Any, services: dict[str, Service]) -> Any:
    names = list(services)

    def show(image: Pixels | None, name: str) -> str:
        if image is None:
            return ""
        try:
            return page(services[name], image)
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
