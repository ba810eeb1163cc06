"""A page on the client's own machine: an image, its protected version, what the cloud reads, and what attackers see.

The picture is protected here; the services get nothing else. Needs the extra ``raypp[demo]`` (Gradio).
"""

from __future__ import annotations

import base64
import html
import io
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

import gradio as gr
import httpx
import numpy as np
from PIL import Image

from raypp.client import protect_images
from raypp.errors import RayppError
from raypp.evaluation.metrics import psnr, ssim
from raypp.images import Pixels, encode_png, fit, grey
from raypp.remote import Client

SIDE = 256  # pixels at which a small image is shown
LEAST_SIDE = 11  # of SSIM's window
COLOURS = {"holds": "#1f8a4c", "weak": "#b8860b", "broken": "#c0392b"}
TITLE = "What the cloud sees, and what an attacker makes of it"


def page(urls: dict[str, str], *, token: str | None = None, key: str | Path | None = None) -> gr.Blocks:
    """The page.

    Args:
        urls: of services by the names to choose them by, such as ``{"alpha 0.005": "http://127.0.0.1:8000"}``.
        token: a bearer token with the scopes classify and attack.
        key: key file of a keyed protection.

    Raises:
        RayppError: a service does not answer.
    """
    clients = {name: Client(url, token=token, key=key) for name, url in urls.items()}
    for client in clients.values():
        client.model()
    headers = {"Authorization": f"Bearer {token}"} if token is not None else {}
    first = next(iter(clients))

    def show(picture: Pixels | None, chosen: str) -> tuple[Any, ...]:
        if picture is None:
            raise gr.Error("Choose a picture first.")
        try:
            return _everything(picture, clients[chosen], urls[chosen].rstrip("/"), headers)
        except RayppError as error:
            raise gr.Error(str(error)) from error

    with gr.Blocks(title="raypp demo", analytics_enabled=False) as blocks:
        gr.Markdown(
            f"# {TITLE}\nThe picture stays on this machine. What is uploaded is the protected one in the middle."
        )
        with gr.Row():
            with gr.Column():
                source = gr.Image(label="your picture", type="numpy", image_mode="RGB", sources=["upload", "webcam"])
                chosen = gr.Dropdown(list(clients), value=first, label="protection", visible=len(clients) > 1)
                start = gr.Button("Protect and classify", variant="primary", elem_id="start")
            plain = gr.Image(label="as the classifier is used to it", interactive=False, elem_id="plain")
            protected = gr.Image(
                label="protected: all that leaves this machine", interactive=False, elem_id="protected"
            )
            classes = gr.Label(label="the cloud's answer", num_top_classes=5, elem_id="classes")
        about = gr.HTML(elem_id="about")
        gr.Markdown("## What attackers make of the protected picture")
        gallery = gr.Gallery(label="reconstructions", columns=4, object_fit="contain", height="auto", elem_id="attacks")
        table = gr.HTML(elem_id="leakage")
        start.click(show, [source, chosen], [plain, protected, classes, about, gallery, table])
    made: gr.Blocks = blocks
    return made


def _everything(picture: Pixels, client: Client, url: str, headers: dict[str, str]) -> tuple[Any, ...]:
    """What the page shows of one picture."""
    identifier, bundle = client.protection()
    given = grey(picture) if bundle.channels == 1 else picture
    small = fit(given, bundle.image_size)
    protected = protect_images(bundle, small[None])[0]
    (found,) = client.classify([small])
    about = client.model()
    pictures: list[tuple[Pixels, str]] = []
    rows: list[tuple[dict[str, Any], str | None, tuple[float, float | None] | None]] = []
    for attack in _offered(url, headers):
        made = _reconstruct(url, attack["attack"], protected, headers)
        if isinstance(made, str):
            rows.append((attack, made, None))
            continue
        caption = f"{attack['attack']} ({attack['threat']})"
        scores = _scores(made, small)
        pictures.append((_large(made), f"{caption}: SSIM {scores[1]:.2f}" if scores[1] is not None else caption))
        rows.append((attack, None, scores))
    nulls = (about.get("scorecard") or {}).get("nulls", {})
    facts = f"model {about['version']}, protection {identifier[:16]}" + (
        f", right on {about['accuracy']:.1%} of protected test images" if about.get("accuracy") is not None else ""
    )
    return (
        _large(small), _large(protected), dict(found.top), f"<p>{html.escape(facts)}</p>", pictures, _table(rows, nulls)
    )  # fmt: skip


def _offered(url: str, headers: dict[str, str]) -> list[dict[str, Any]]:
    try:
        answer = httpx.get(f"{url}/attack/v1", headers=headers, timeout=30)
        return list(answer.json()["attacks"]) if answer.status_code == 200 else []
    except (httpx.HTTPError, ValueError, KeyError):  # the attacks may not be served
        return []


def _reconstruct(url: str, attack: str, protected: Pixels, headers: dict[str, str]) -> Pixels | str:
    """An attack's reconstruction, or why there is none. The protected picture alone is sent."""
    try:
        answer = httpx.post(
            f"{url}/attack/v1/{attack}", content=encode_png(protected), headers=headers | {"Content-Type": "image/png"},
            timeout=120,
        )  # fmt: skip
        document = answer.json()
        if answer.status_code != 200:
            return str(document.get("detail", answer.status_code))
        return np.array(Image.open(io.BytesIO(base64.b64decode(document["reconstructions"][0]["png"]))).convert("RGB"))
    except (httpx.HTTPError, ValueError, KeyError) as error:
        return f"no answer: {type(error).__name__}"


def _scores(made: Pixels, plain: Pixels) -> tuple[float, float | None]:
    import torch

    plain = np.repeat(plain, 3, axis=2) if plain.shape[2] == 1 else plain
    a, b = (torch.from_numpy(np.array(x)).permute(2, 0, 1)[None].float() / 255 for x in (made, plain))
    similar = float(ssim(a, b)[0]) if min(plain.shape[:2]) >= LEAST_SIDE else None
    return float(psnr(a, b).clamp_max(60.0)[0]), similar


def _large(image: Pixels) -> Pixels:
    """A small image enlarged pixel by pixel, RGB."""
    scale = max(1, SIDE // max(image.shape[:2]))
    rgb = np.repeat(image, 3, axis=2) if image.shape[2] == 1 else image
    return rgb.repeat(scale, axis=0).repeat(scale, axis=1)


def _table(rows: list[tuple[Any, ...]], nulls: dict[str, Any]) -> str:
    """Leakage of each attack on this picture and over the test images, beside what nobody needs an attack for."""
    if not rows:
        return "<p>No attacks are served: run raypp attack on the bundle, and serve it without --no-attack.</p>"
    head = (
        "<tr><th>attack</th><th>the attacker has</th><th>this picture</th><th>all test images: found</th><th>SSIM</th>"
        "<th>verdict</th></tr>"
    )
    body = []
    for attack, failure, scores in rows:
        measured = attack["measured"]
        here = (
            html.escape(failure)
            if failure
            else f"PSNR {scores[0]:.1f} dB" + (f", SSIM {scores[1]:.2f}" if scores[1] is not None else "")
        )
        verdict = measured.get("verdict") or "-"
        colour = COLOURS.get(verdict, "#8a94a0")
        found = f"{measured['found']:.1%}" if measured.get("found") is not None else "-"
        least = "at least " if measured.get("lower_bound") else ""
        similar = f"{measured['ssim']:.3f}" if "ssim" in measured else "-"
        body.append(
            f"<tr><td>{html.escape(attack['attack'])} ({attack['threat']})</td>"
            f"<td>{html.escape(attack['attacker_has'])}</td><td>{here}</td><td>{least}{found}</td><td>{similar}</td>"
            f'<td style="color:{colour};font-weight:600">{verdict}</td></tr>'
        )
    for name, null in nulls.items():
        body.append(
            f'<tr style="opacity:.65"><td>{html.escape(name)}</td><td>nothing of this picture</td><td>-</td>'
            f"<td>{null['reidentified']:.1%}</td><td>{null['ssim']:.3f}</td><td>no attack</td></tr>"
        )
    return f'<table style="width:100%">{head}{"".join(body)}</table>'
