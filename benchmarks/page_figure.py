"""Draw benchmarks/figures/page.jpg: the page of DINOv2 on a photo, as a browser shows it.

    python benchmarks/page_figure.py dinov2_vits14_reg4.safetensors photo.jpg

It needs chromium and playwright; the weights are those of timm's vit_small_patch14_reg4_dinov2.
"""

from __future__ import annotations

import argparse
import io
import shutil
import tempfile
from pathlib import Path

import timm
import torch
from PIL import Image
from playwright.sync_api import sync_playwright

from hookattn import AttentionRecorder
from hookattn.image import Photo

OUT = Path(__file__).parent / "figures" / "page.jpg"
WIDTH, HEIGHT = 1400, 870


def write_page(weights: Path, photo: Path, out: Path) -> None:
    """The page of one photo, at 280 pixels squared."""
    name = "vit_small_patch14_reg4_dinov2"
    overlay = {"file": str(weights)}
    model = timm.create_model(
        name, img_size=280, num_classes=0, dynamic_img_size=True, pretrained=True, pretrained_cfg_overlay=overlay
    )
    shown = Photo.open(photo, model.eval(), size=280)
    with AttentionRecorder(model) as rec, torch.no_grad():
        model(shown.tensor[None])
    rec.explore(shown, out, name=photo.name, title=f"DINOv2 ViT-S/14 with registers, {photo.name}")


def take_picture(page: Path, fragment: str, point: tuple[float, float], out: Path) -> None:
    """What a window shows while the pointer lies on a point (y, x) of the photo, and how long hovers took."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT})
        tab.goto(f"{page.as_uri()}#{fragment}")
        tab.evaluate("hookattn.ready")
        box = tab.locator(".frame canvas").bounding_box() or {}
        took = []
        for i in range(100):
            tab.mouse.move(box["x"] + box["width"] * (0.1 + 0.008 * i), box["y"] + box["height"] * 0.4)
            tab.wait_for_timeout(25)
            took.append(float(tab.evaluate("hookattn.lastUpdateMs")))
        tab.mouse.move(box["x"] + box["width"] * point[1], box["y"] + box["height"] * point[0])
        tab.wait_for_timeout(200)
        Image.open(io.BytesIO(tab.screenshot())).save(out, quality=88)
        browser.close()
    took.sort()
    print(f"{page.stat().st_size / 1e6:.1f} MB; a hover took {took[50]:.1f} ms, 95 of 100 at most {took[95]:.1f} ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("weights", type=Path)
    parser.add_argument("photo", type=Path)
    parser.add_argument("--fragment", default="layer=blocks.9.attn&head=3")
    parser.add_argument("--point", type=float, nargs=2, default=(0.5, 0.4), help="where the pointer is, of height and width")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "page.html"
        write_page(given.weights, given.photo, page)
        take_picture(page, given.fragment, tuple(given.point), OUT)


if __name__ == "__main__":
    main()
