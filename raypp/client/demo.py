"""A page on the client's own machine: an image, its protected version, what the cloud answers and what attackers see.

Plain images go from the browser to this process and no further: everything that is sent has passed through
:class:`raypp.Client`.
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

NOT_SERVED = 404
SEEN = "protected image"  # listed with the baselines of a scorecard, but its owner has seen it
KEPT_SECONDS = 60  # that a dropped image may lie in this machine's temporary folder
CSS = """
.raypp { font-family: system-ui, sans-serif; }
.raypp h3 { margin: .8rem 0 .1rem; font-size: 1.05rem; } .raypp h4 { margin: .5rem 0 .1rem; font-size: .95rem; }
.raypp p { margin: 0 0 .4rem; opacity: .7; font-size: .85rem; }
.raypp-row { display: flex; gap: 1rem; align-items: center; flex-wrap: wrap; }
.raypp-row > section { align-self: flex-start; }
.raypp-picture { width: 11rem; height: 11rem; object-fit: contain; image-rendering: pixelated; border-radius: .4rem; }
.raypp-arrow { font-size: 1.8rem; opacity: .5; }
.raypp-classes { flex: 1; min-width: 16rem; }
.raypp-class { display: grid; grid-template-columns: 6.5rem 1fr 3.6rem; gap: .6rem; align-items: center;
  margin: .25rem 0; font-size: .9rem; }
.raypp-class b { text-align: right; font-variant-numeric: tabular-nums; }
.raypp-bar { height: .8rem; border-radius: .4rem; overflow: hidden; background: rgba(128, 128, 128, .2); }
.raypp-bar i { display: block; height: 100%; background: #2f6fab; }
.raypp-attacks { display: grid; grid-template-columns: repeat(auto-fill, minmax(13rem, 1fr)); gap: 1rem; }
.raypp-attack { border: 1px solid rgba(128, 128, 128, .3); border-radius: .5rem; padding: .8rem; }
.raypp-null { border-style: dashed; }
.raypp-attack dl { display: grid; grid-template-columns: 1fr auto; margin: 0; font-size: .85rem; }
.raypp-attack dd { margin: 0; text-align: right; font-variant-numeric: tabular-nums; }
.raypp-null table { width: 100%; font-size: .85rem; border: 0; margin: 0; }
.raypp-null :is(thead, tbody, tr, td, th) { border: 0 !important; } /* over Gradio's own */
.raypp-null td, .raypp-null th { padding: .1rem 0 .1rem .6rem; font-weight: 400; text-align: right; }
.raypp-null td:first-child { text-align: left; padding-left: 0; } .raypp-null th { opacity: .7; }
.raypp-mark { color: #fff; border-radius: .6rem; padding: .05rem .5rem; font-size: .75rem; font-weight: 600; }
.raypp-mark.holds { background: #1f8a4c; } .raypp-mark.weak { background: #96690a; }
.raypp-mark.broken { background: #c0392b; } .raypp-mark.none, .raypp-mark.inconclusive { background: #69737d; }
.raypp-problem { color: #c0392b; opacity: 1; }
"""


@dataclass
class Service:
    """A service that the page offers, under the name by which it is chosen."""

    name: str
    client: Client
    about: dict[str, Any] = field(default_factory=dict)
    offered: dict[str, Any] = field(default_factory=dict)

    def ask(self) -> None:
        """Fetch what the service says of itself: a newer bundle may have become live.

        Raises:
            RayppError: it does not answer.
        """
        self.about = self.client.model()
        self.client.protection()
        try:
            self.offered = self.client.attacks()
        except RemoteError as error:
            if error.status != NOT_SERVED:
                raise
            self.offered = {}


def open_services(urls: Sequence[str], *, token: str | None = None, key: str | Path | None = None) -> list[Service]:
    """Services by their URLs; ``NAME=URL`` gives one a name, else its URL is its name.

    Raises:
        ConfigError: a URL is none, or two services have one name.
        RayppError: a service does not answer, or serves a protection that cannot be used.
    """
    found: list[Service] = []
    with ExitStack() as clients:
        for given in urls:
            name, equals, url = given.partition("=")
            if not equals or "/" in name:
                name = url = given
            if name in {service.name for service in found}:
                raise ConfigError(f"two services are called {name!r}; write NAME={url} to tell them apart")
            client = clients.enter_context(Client(url, token=token, key=key, patience=2.0))
            service = Service(name, client)
            service.ask()
            found.append(service)
        clients.pop_all()  # now they are the services' own
    return found


def page(service: Service, image: Pixels) -> str:
    """HTML of all that is known of one plain image uint8 (H, W, 3).

    Raises:
        RayppError: the service does not answer or refuses.
    """
    service.ask()
    plain, hidden = service.client.protect([image])
    (found,) = service.client.classify([image])
    attacks = [_attacked(service, about, image, plain[0]) for about in service.offered.get("attacks", [])]
    baselines = [
        {"name": name, "ssim": scores.get("ssim"), "reidentified": scores.get("reidentified")}
        for name, scores in (service.offered.get("baselines") or {}).items()
        if name != SEEN
    ]
    template = (resources.files("raypp.client") / "demo.html.j2").read_text()
    return jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(template).render(
        service=service.name,
        accuracy=service.about.get("accuracy"),
        plain=_png(plain[0]),
        protected=_png(hidden[0]),
        classes=found.top,
        attacks=attacks,
        baselines=baselines,
        no_attacks="This service offers no attacks."
        if not service.offered
        else "This bundle has not been attacked: raypp attack BUNDLE tells what it leaks.",
    )  # fmt: skip


def _attacked(service: Service, about: dict[str, Any], image: Pixels, plain: Pixels) -> dict[str, Any]:
    measured = about["measured"]
    shown = {
        "name": about["attack"], "threat": about["threat"], "attacker_has": about["attacker_has"],
        "verdict": measured.get("verdict"), "verdict_reason": measured.get("verdict_reason"),
        "reidentification_rate": measured.get("reidentification_rate"), "mean_ssim": measured.get("ssim"),
        "lower_bound": measured.get("lower_bound"), "png": None, "problem": None, "ssim": None,
    }  # fmt: skip
    try:
        (made,) = service.client.reconstruct(about["attack"], [image])
    except RayppError as error:  # one attack that fails leaves the others on the page
        return shown | {"problem": str(error)}
    shown["png"] = _png(made)
    if made.shape == plain.shape and min(made.shape[:2]) >= MIN_SIDE:
        shown["ssim"] = float(ssim(_tensor(made), _tensor(plain)))
    return shown


def _png(image: Pixels) -> str:
    return base64.b64encode(encode_png(image)).decode()


def _tensor(image: Pixels) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255


@contextmanager
def running_demo(offered: Sequence[Service], *, port: int) -> Iterator[str]:
    """Show the page on this machine until the context ends; gives its address.

    Raises:
        ConfigError: gradio is not installed, or the port is taken.
    """
    try:
        import gradio as gr
    except ImportError as error:
        raise ConfigError("raypp demo needs gradio: install raypp[demo]") from error
    by_name = {service.name: service for service in offered}
    names = list(by_name)

    def show(image: Pixels | None, name: str) -> str:
        if image is None:
            return ""
        try:
            return page(by_name[name], image)
        except RayppError as error:
            raise gr.Error(str(error), duration=None) from error

    with gr.Blocks(title="raypp", analytics_enabled=False, delete_cache=(KEPT_SECONDS, KEPT_SECONDS)) as blocks:
        gr.Markdown(
            "# What leaves this machine, and what it betrays\nDrop an image, paste one or use the camera. It is "
            "protected **here**; only the protected image is sent."
        )
        with gr.Row():
            with gr.Column(scale=1, min_width=260):
                image = gr.Image(
                    label="Image", type="numpy", image_mode="RGB", sources=["upload", "webcam", "clipboard"],
                    height=300, buttons=[], elem_id="image",
                )  # fmt: skip
                chosen = gr.Dropdown(names, value=names[0], label="Service", interactive=True, elem_id="service",
                                     visible=len(names) > 1)  # fmt: skip
            with gr.Column(scale=3, min_width=400):
                shown = gr.HTML(elem_id="shown")
        for change in (image.change, chosen.change):
            change(show, [image, chosen], shown, api_visibility="private", show_progress="minimal")
    try:
        _, address, _ = blocks.launch(
            server_name="127.0.0.1", server_port=port, share=False, quiet=True, prevent_thread_lock=True,
            footer_links=[], ssr_mode=False, css=CSS,
            theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
        )  # fmt: skip
    except OSError as error:
        raise ConfigError(f"--port {port} cannot be listened on; is it taken?") from error
    try:
        yield address.rstrip("/")
    finally:
        blocks.close()
        for service in offered:
            service.client.close()
