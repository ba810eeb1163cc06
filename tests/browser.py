"""A real browser for tests that click."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, Error, sync_playwright

QUIET = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]  # fmt: skip


@contextmanager
def chromium(camera: Path | None = None) -> Iterator[Browser]:
    """Headless Chromium: the system's, else the one that ``playwright install chromium`` has fetched.

    With a video (YUV4MPEG2) its camera shows that.
    """
    arguments = list(QUIET)
    if camera is not None:
        arguments += [
            "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream",
            f"--use-file-for-fake-video-capture={camera}",
        ]  # fmt: skip
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with sync_playwright() as playwright:
        try:
            browser = playwright.chromium.launch(executable_path=found, args=arguments)
        except Error as error:
            pytest.skip(f"there is no Chromium here: {str(error).splitlines()[0]}")
        yield browser
        browser.close()


def write_video(path: Path, image: np.ndarray, side: int = 480) -> None:
    """A still video (YUV4MPEG2) of an image uint8 (H, W, 3), enlarged."""
    picture = Image.fromarray(image).resize((side, side), Image.Resampling.NEAREST).convert("YCbCr")
    light, blue, red = (np.asarray(band) for band in picture.split())
    planes = [plane.tobytes() for plane in (light, blue[::2, ::2], red[::2, ::2])]
    frame = b"FRAME\n" + b"".join(planes)
    path.write_bytes(f"YUV4MPEG2 W{side} H{side} F10:1 Ip A1:1 C420jpeg\n".encode() + 10 * frame)
