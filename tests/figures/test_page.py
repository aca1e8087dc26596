"""What the page shows is what the map holds, whoever looks at it and however."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from support.browser import Opened
from support.inside import roll_out_at_most
from support.reading import record
from torch import Tensor, nn

from hookattn import AttentionRecorder, TokenError
from hookattn.analysis import keep_mass, relevance, rollout
from hookattn.figures import page, plot
from hookattn.image import Photo

Open = Callable[..., Opened]
PIXELS = np.random.default_rng(0).integers(0, 255, (90, 160, 3), dtype=np.uint8)
SMALL: dict[str, Any] = {"embed_dim": 48, "num_heads": 3, "depth": 2, "num_classes": 3}
MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "square": ("vit_small_patch14_reg4_dinov2", {"img_size": 70, **SMALL}, {"crop": "center"}),
    "not square": ("vit_tiny_patch16_224", {"img_size": 96, "dynamic_img_size": True, **SMALL}, {"crop": "none", "size": 96}),
    "a rest": ("vit_tiny_patch16_224", {"img_size": 71, **SMALL}, {"crop": "center"}),
    "windows": (
        "swin_tiny_patch4_window7_224",
        {"img_size": 56, "window_size": 4, "embed_dim": 24, "depths": (2, 2), "num_heads": (2, 4), "num_classes": 3},
        {"crop": "center", "size": 56},
    ),
    "pooled keys": (
        "pvt_v2_b0",
        {"num_classes": 3, "depths": (1, 1, 1, 1), "embed_dims": (16, 16, 40, 64)},
        {"crop": "center", "size": 64},
    ),
    "spread keys": ("nextvit_small", {"num_classes": 3, "depths": (1, 1, 5, 1)}, {"crop": "center", "size": 128}),
    "pooled queries": (
        "hiera_tiny_224",
        {"num_classes": 3, "embed_dim": 16, "stages": (1, 1, 1, 1)},
        {"crop": "center", "size": 224},
    ),
}


class Seen(NamedTuple):
    rec: AttentionRecorder
    photo: Photo
    path: Path


def see(kind: str, **options: Any) -> tuple[AttentionRecorder, Photo]:
    torch.manual_seed(0)
    name, how, shown = MODELS[kind]
    model = timm.create_model(name, **how).eval()
    with torch.no_grad():
        for part, parameter in model.named_parameters():
            if "attn" in part or "mhsa" in part:  # fresh ones look at all alike
                parameter.add_(torch.randn_like(parameter) * 0.15)
    photo = Photo.open(PIXELS.swapaxes(0, 1) if kind == "windows" else PIXELS, model, **shown)  # upright, and lying
    with AttentionRecorder(model, **options) as rec:
        model(photo.tensor[None]).sum().backward()
    return rec, photo


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Seen]:
    folder, known = tmp_path_factory.mktemp("pages"), {}

    def find(kind: str) -> Seen:
        if kind not in known:
            rec, photo = see(kind, gradients=kind == "square")
            known[kind] = Seen(rec, photo, rec.explore(photo, folder / f"{kind}.html", name="photo.png"))
        return known[kind]

    return find


def error_of(shown: Opened, layer: str) -> float:
    """What the page says its numbers may be off."""
    return float(shown.ask(f"hookattn.photos()[0].layers.find((l) => l.name === {layer!r}).error"))


def compare(shown: Opened, layer: str, expected: Tensor) -> None:
    cells = torch.tensor(shown.cells(), dtype=torch.float64)
    assert cells.shape == expected.flatten().shape
    off = (cells - expected.flatten().double()).abs()
    doubt = torch.tensor(shown.ask("Array.from(hookattn.view().panel.cells, (v) => hookattn.view().panel.doubt(v))"))
    assert bool((off <= doubt * 1.01 + 2e-7).all())  # what is written beside a number
    assert float(off.max()) <= error_of(shown, layer) * 1.01 + 1e-9  # what is said of all of them
    assert error_of(shown, layer) < 0.004 * float(max(1e-9, expected.max())) + 0.004


@pytest.mark.parametrize(
    ("kind", "theme"),
    [*((kind, "light") for kind in MODELS), *((kind, "dark") for kind in ("square", "not square", "windows"))],
)
def test_what_a_hover_shows_is_what_the_map_holds(seen: Callable[[str], Seen], open_page: Open, kind: str, theme: str) -> None:
    rec, photo, path = seen(kind)
    shown = open_page(path, color_scheme=theme)
    top, left, bottom, right = photo.seen
    readable = [m for m in rec.maps.values() if m.tokens.grid_size != (0, 0)]
    for i, m in enumerate([readable[0], readable[-1]]):
        for head in (m.shape[1] - 1, *(["mean"] if m.shape[1] > 1 else [])):
            shown.choose(m.name, head)
            point = (top + (bottom - top) * (0.21 + 0.3 * i), left + (right - left) * 0.73)
            shown.hover(*point)
            expected = m.image(photo.to_input(point), heads=head)[0]
            compare(shown, m.name, expected)
            said, columns = shown.numbers(), m.tokens.grid_size[1]
            row, column = map(int, re.findall(r"\d+", said["under the pointer"]))
            value = float(expected[row, column])
            if said["weight"][:2] != "0,":
                doubt = float(shown.page.locator("#numbers dd small").nth(1).inner_text()[2:])
                assert float(said["weight"]) == pytest.approx(value, abs=doubt * 1.5, rel=0.006)
                assert float(said["times uniform"]) == pytest.approx(float(said["weight"]) * m.shape[3], rel=0.01)
            at = m.tokens.index(photo.to_input(point)) - m.tokens.num_prefix_tokens
            assert (row, column) == divmod(at, columns)


def test_a_rest_that_fills_no_patch_asks_nothing(seen: Callable[[str], Seen], open_page: Open) -> None:
    _, photo, path = seen("a rest")
    shown = open_page(path)
    bottom = photo.seen[2]
    shown.hover(bottom - 0.02, 0.5)
    assert "no patch looks at" in shown.page.locator("figcaption").inner_text()
    assert shown.ask("hookattn.view().panel") is None


def test_the_reversed_view_is_the_column(seen: Callable[[str], Seen], open_page: Open) -> None:
    rec, photo, path = seen("square")
    shown = open_page(path)
    shown.press("r")
    m = rec.maps[-1]
    shown.choose(m.name, 1)
    point = (0.5, 0.47)
    shown.hover(*point)
    column = m[0, 1, :, m.tokens.index(photo.to_input(point))]
    compare(shown, m.name, column[m.tokens.num_prefix_tokens :])
    named = shown.ask("Array.from(hookattn.view().panel.named)")
    assert named == pytest.approx(column[: m.tokens.num_prefix_tokens].tolist(), abs=error_of(shown, m.name) * 1.01)


@pytest.mark.parametrize(("kind", "layer"), [("windows", 1), ("spread keys", 1)])  # shifted; pooled of patches apart
def test_the_reversed_view_is_the_column_of_a_window_or_a_pooled_key(
    seen: Callable[[str], Seen], open_page: Open, kind: str, layer: int
) -> None:
    rec, photo, path = seen(kind)
    shown = open_page(path)
    m = rec.maps[layer]
    shown.press("r")
    shown.choose(m.name, 0)
    top, left, bottom, right = photo.seen
    point = (top + 0.3 * (bottom - top), left + 0.6 * (right - left))
    shown.hover(*point)
    marked = m.tokens.select(photo.to_input(point))[0]
    ((window, key),) = marked.nonzero().tolist()
    columns = torch.zeros(m.tokens.windows, m.shape[2])
    columns[window] = m[window, 0, :, key]
    compare(shown, m.name, m.query_tokens.lay_out(columns[None, :, None])[0, 0])


@pytest.mark.parametrize(("token", "label"), [("cls", "class token"), ("reg2", "register 2"), ("mean", "mean of all patches")])
def test_tokens_that_are_chosen_by_name(seen: Callable[[str], Seen], open_page: Open, token: str, label: str) -> None:
    rec, _, path = seen("square")
    shown = open_page(path)
    shown.page.get_by_role("button", name=label, exact=True).click()
    shown.settle()
    compare(shown, rec.maps[-1].name, rec.maps[-1].image(token)[0])
    shares = shown.page.locator(".shares").inner_text()
    assert f"patches {100 * float(rec.maps[-1].image(token).sum()):.0f} %" in shares


def test_the_mean_of_windows_is_that_of_all_patches(seen: Callable[[str], Seen], open_page: Open) -> None:
    rec, _, path = seen("windows")
    shown = open_page(path)
    shown.press("m")
    compare(shown, rec.maps[-1].name, rec.maps[-1].image("mean")[0])


def test_rollout_and_relevance_are_rows_of_theirs(seen: Callable[[str], Seen], open_page: Open) -> None:
    rec, photo, path = seen("square")
    shown = open_page(path)
    whole = {"rollout": rollout(rec)[0], "relevance": relevance(rec)[0] - torch.eye(rec.maps[0].shape[3])}
    for name, matrix in whole.items():
        shown.page.locator(f"button.thumb[aria-label^='{name}']").click()
        shown.hover(0.5, 0.5)
        at = rec.maps[0].tokens.index(photo.to_input((0.5, 0.5)))
        expected = matrix[at, 5:].detach()
        got = torch.tensor(shown.cells())
        assert float((got - expected).abs().max()) <= error_of(shown, name) * 1.01 + 1e-7
        assert float((got - expected).abs().max()) < 0.01 * float(expected.abs().max())


def test_all_can_be_done_with_keys_alone(seen: Callable[[str], Seen], open_page: Open) -> None:
    rec, _, path = seen("square")
    shown = open_page(path)
    for _ in range(30):
        shown.press("Tab")
        if shown.ask("document.activeElement.className") == "frame":
            break
    else:
        raise AssertionError("the photo is not reached")
    assert shown.ask("getComputedStyle(document.activeElement).outlineStyle") != "none"
    shown.press("ArrowRight", "ArrowUp", "ArrowUp", "ArrowLeft", "[", ".", ".", "p", "]", "s", "t", " ")
    state = shown.ask("hookattn.state")
    assert (state["layer"], state["head"], state["scale"], state["pointer"]) == (1, 1, "layer", "read")
    assert state["theme"] == "dark"
    assert state["pin"]["layer"] == 0
    rows, columns = rec.maps[1].tokens.grid_size
    expected = rec.maps[1].image((rows // 2 - 2, columns // 2 - 1), heads=1)[0]  # the first arrow goes to the middle
    assert shown.numbers()["highest patch"] == str(tuple(divmod(int(expected.argmax()), columns)))
    compare(shown, rec.maps[1].name, expected)
    shown.wait_until("document.getElementById('live').textContent.includes('blocks.1.attn, head 1, patch')")
    assert shown.page.locator("figure").count() == 2


def test_arrows_go_from_panel_to_panel(seen: Callable[[str], Seen], open_page: Open) -> None:
    shown = open_page(seen("square").path)
    shown.page.locator("button.thumb[aria-pressed=true]").focus()
    shown.press("ArrowRight", "ArrowRight", "ArrowUp")
    assert shown.ask("document.activeElement.ariaLabel") == "blocks.0.attn, head 1"
    state = shown.ask("hookattn.state")
    assert (state["layer"], state["head"], state["query"]) == (0, 1, {"token": "cls"})


def test_what_is_looked_at_stands_in_the_address(seen: Callable[[str], Seen], open_page: Open) -> None:
    path = seen("square").path
    first = open_page(path)
    first.choose("blocks.0.attn", 2)
    first.hover(0.3, 0.5)
    first.page.mouse.down()
    first.page.mouse.up()
    first.press("s", "p")
    fragment, state = first.ask("location.hash"), first.ask("hookattn.state")
    again = open_page(path, fragment)
    found = again.ask("hookattn.state")
    assert found["query"]["point"] == pytest.approx(state["query"]["point"], abs=1e-4)
    for name in ("layer", "head", "direction", "pointer", "scale", "photo"):
        assert found[name] == state[name]
    assert again.page.locator("figure").count() == 2


def test_a_strange_address_changes_nothing(seen: Callable[[str], Seen], open_page: Open) -> None:
    strange = "#photo=9&layer=%3Cimg%3E&head=77&query=7,9&direction=up&pin=%5B99%5D&opacity=-3&theme=x&scale=&threshold=NaN"
    shown = open_page(seen("square").path, strange)
    assert shown.ask("hookattn.state.query") == {"token": "cls"}
    assert shown.ask("hookattn.state.pin") is None


def test_a_narrow_screen_shows_all_of_it_and_takes_taps(seen: Callable[[str], Seen], open_page: Open) -> None:
    rec, photo, path = seen("not square")
    shown = open_page(path, width=360, has_touch=True, is_mobile=True)
    assert shown.ask("document.documentElement.scrollWidth") <= 360
    x, y = shown.place_of(0.4, 0.8)
    shown.page.touchscreen.tap(x, y)
    shown.settle()
    state = shown.ask("hookattn.state")
    assert state["pointer"] == "read"
    m = rec.maps[-1]
    compare(shown, m.name, m.image(photo.to_input((0.4, 0.8)))[0])


def test_a_pinned_head_follows_the_query_or_stays(seen: Callable[[str], Seen], open_page: Open) -> None:
    shown = open_page(seen("square").path)
    shown.choose("blocks.0.attn", 0)
    shown.press("p")
    shown.choose("blocks.1.attn", 2)
    shown.hover(0.5, 0.5)
    titles = shown.page.locator("figcaption").all_inner_texts()
    assert "blocks.0, head 0" in titles[0]
    assert "blocks.1, head 2" in titles[1]
    assert "patch (2, 2) looks at" in titles[0]
    shown.press("l")
    assert "class token looks at" in shown.page.locator("figcaption").first.inner_text()
    shown.press("Escape")
    assert shown.page.locator("figure").count() == 1


PIXELS_OF = """(label) => {
    const canvas = document.querySelector("#thumbs canvas"), from = canvas.getBoundingClientRect();
    const box = document.querySelector(`button[aria-label="${label}"]`).getBoundingClientRect(), out = [];
    const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
    const { rows, columns } = hookattn.view().panel.tokens;
    for (let r = 0; r < rows; r++) {
        for (let c = 0; c < columns; c++) {
            const x = box.x - from.x + ((c + 0.5) * box.width) / columns, y = box.y - from.y + ((r + 0.5) * box.height) / rows;
            const at = 4 * (Math.floor(y) * canvas.width + Math.floor(x));
            out.push(Array.from(data.slice(at, at + 3)));
        }
    }
    return out;
}"""


@pytest.mark.parametrize(
    ("scale", "colours"),
    [("panel", "inferno"), ("layer", "viridis"), ("all", "cividis"), ("log", "inferno")],
)
def test_colours_are_those_of_the_plots(seen: Callable[[str], Seen], open_page: Open, scale: Any, colours: str) -> None:
    rec, _, path = seen("square")
    m, query = rec.maps[1], "reg1"
    shown = open_page(path, f"#scale={scale}&colours={colours}&query={query}&layer={m.name}&head=1")
    beside = {"panel": [], "layer": [m]}.get(scale, list(rec.maps.values()))
    heads = ["mean", 0, 1, 2]
    tops = [plot.attention(each, query, h, scale="all").norm.vmax for each in beside for h in heads]
    own = plot.attention(m, query, 1, scale="log" if scale == "log" else "panel", vmax=max(tops, default=None), cmap=colours)
    expected = own.cmap(own.norm(np.asarray(own.get_array())))[..., :3].reshape(-1, 3) * 255
    painted = np.array(shown.page.evaluate(PIXELS_OF, f"{m.name}, head 1"))
    assert np.abs(painted - expected).max() <= 6  # of 255, between the places where a table is exact
    assert len({*map(tuple, painted)}) > 5


def test_a_peak_that_is_clipped_is_clipped_as_in_the_plots(open_page: Open, tmp_path: Path) -> None:
    m = record(timm.create_model("vit_tiny_patch16_224", depth=1).eval(), torch.randn(1, 3, 224, 224)).maps[0]
    whole = torch.rand(m.shape) ** 4
    whole[0, 1, 0, [40, 90]] = torch.tensor([60.0, 5.0])  # one of 196 that nearly all goes to, and one less high
    m = m.kept(whole / whole.sum(-1, keepdim=True))
    shown = open_page(page.write_page(m, None, tmp_path / "page.html"), "#head=1&query=cls")
    own = plot.attention(m, "cls", 1)
    expected = own.cmap(own.norm(np.asarray(own.get_array())))[..., :3].reshape(-1, 3) * 255
    painted = np.array(shown.page.evaluate(PIXELS_OF, f"{m.name}, head 1"))
    assert np.abs(painted - expected).max() <= 8


def test_the_outline_holds_the_share_that_was_asked_for(seen: Callable[[str], Seen], open_page: Open) -> None:
    rec, _, path = seen("square")
    shown = open_page(path, "#threshold=0.4&query=cls")
    kept = keep_mass(rec.maps[-1].image("cls")[0].double(), 0.4).flatten().tolist()
    assert shown.ask("Array.from(hookattn.kept()).map(Boolean)") == kept


def test_the_numbers_of_a_view_go_into_a_table_and_the_view_into_a_picture(
    seen: Callable[[str], Seen], open_page: Open, tmp_path: Path
) -> None:
    rec, _, path = seen("square")
    m, shown = rec.maps[-1], open_page(path, "#head=1&query=cls")
    with shown.page.expect_download() as loading:
        shown.page.get_by_role("button", name="CSV").click()
    rows = list(csv.DictReader(io.StringIO(Path(loading.value.path()).read_text())))
    assert [row["token"] for row in rows[:6]] == [*m.tokens.prefix, "patch"]
    got = torch.tensor([float(row["weight"]) for row in rows])
    assert float((got - m[0, 1, 0]).abs().max()) <= error_of(shown, m.name) * 1.01
    ranks = [int(row["rank"]) for row in rows[5:]]
    assert ranks[int(got[5:].argmax())] == 1
    with shown.page.expect_download() as loading:
        shown.page.get_by_role("button", name="PNG").click()
    with Image.open(loading.value.path()) as picture:
        assert picture.width == 900
        assert picture.height > 400
    assert loading.value.suggested_filename == "blocks.1-1.png"


def test_names_from_outside_are_text(open_page: Open, tmp_path: Path) -> None:
    evil = '<img src=x onerror="window.bad=1">\'</script ><script>window.bad=2</script><!--<script >{{facts}}&lt;'
    rec, photo = see("square")
    m = rec.maps[-1]
    m.name = evil
    path = page.write_page([m], photo, tmp_path / "<b>.html", name=evil, title=evil)
    shown = open_page(path)
    shown.hover(0.5, 0.5)
    assert shown.ask("window.bad") is None
    assert shown.page.locator("h1").inner_text() == evil
    assert shown.page.title().split() == evil.split()
    assert shown.page.locator(".layer b").first.inner_text() == evil
    assert evil in shown.page.locator("#notes").inner_text()
    assert evil in shown.ask("document.querySelector('.frame img').alt")
    assert shown.page.locator("img").count() == 1


def test_the_page_may_reach_nothing(seen: Callable[[str], Seen], open_page: Open) -> None:
    shown = open_page(seen("square").path)
    policy = shown.page.locator("meta[http-equiv='Content-Security-Policy']").get_attribute("content") or ""
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    text = seen("square").path.read_text()
    assert not re.search(r"(src|href)=[\"']?(https?:)?//", text)
    tried = shown.ask("fetch('data:text/plain,x').then(() => 'reached', () => 'refused')")
    assert tried == "refused"
    shown.wrong.clear()  # which the browser said aloud


def test_queries_that_are_no_patches_are_listed(open_page: Open, tmp_path: Path) -> None:
    vit = timm.create_model("cait_xxs24_224", img_size=64, depth=2, embed_dim=48, num_heads=3, num_classes=3).eval()
    photo = Photo.open(PIXELS, vit, crop="center", size=64)
    with AttentionRecorder(vit) as rec, torch.no_grad():
        vit(photo.tensor[None])
    crossing = [m for m in rec.maps.values() if m.shape[2] == 1][-1]
    shown = open_page(page.write_page(rec, photo, tmp_path / "page.html"))
    shown.page.get_by_role("button", name="class token", exact=True).click()
    shown.choose(crossing.name, 0)
    compare(shown, crossing.name, crossing.image("cls", heads=0)[0])
    shown.hover(0.5, 0.5)
    assert "this layer has no such token" in shown.page.locator(".shares").inner_text()


def test_photos_of_a_batch_stand_in_a_strip(open_page: Open, tmp_path: Path) -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, **SMALL).eval()
    photos = [Photo.open(PIXELS[:, :80], model, crop="center"), Photo.open(PIXELS[:, 80:], model, crop="center")]
    with AttentionRecorder(model) as rec, torch.no_grad():
        model(torch.stack([photo.tensor for photo in photos]))
    shown = open_page(rec.explore(photos, tmp_path / "page.html", name=["one", "two"]))
    compare(shown, rec.maps[-1].name, rec.maps[-1].image("cls")[0])
    shown.page.get_by_role("button", name="two").click()
    shown.wait_until("document.querySelector('.frame img')?.alt === 'two'")
    shown.settle()
    compare(shown, rec.maps[-1].name, rec.maps[-1].image("cls")[1])


def test_a_page_in_a_notebook_is_a_frame_that_reaches_nothing(open_page: Open, tmp_path: Path) -> None:
    rec, photo = see("square")
    outer = tmp_path / "notebook.html"
    outer.write_text(f"<!doctype html><script>window.hookattn = {{ ready: 1 }}</script>{rec.show(photo)._repr_html_()}")
    shown = open_page(outer)
    frame = next(each for each in shown.page.frames if each != shown.page.main_frame)
    frame.evaluate("window.hookattn.ready")
    assert frame.evaluate("hookattn.view().panel.cells.length") == prod(rec.maps[-1].tokens.grid_size)
    assert frame.evaluate("origin") == "null"
    assert shown.page.locator("iframe").get_attribute("sandbox") == "allow-scripts allow-downloads"


@pytest.mark.parametrize(("budget", "said"), [(360_000, "Left out"), (265_000, "a row is the mean of 2 x 2 patches")])
def test_above_its_budget_a_page_says_what_is_not_there(open_page: Open, tmp_path: Path, budget: int, said: str) -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=224, **{**SMALL, "depth": 4, "num_heads": 2}).eval()
    with AttentionRecorder(model) as rec, torch.no_grad():
        model(torch.randn(1, 3, 224, 224))
    path = rec.explore(None, tmp_path / "page.html", budget=budget)
    assert path.stat().st_size <= budget
    shown = open_page(path)
    assert said in shown.page.locator("#left-out").inner_text()
    assert shown.ask("hookattn.photos()[0].layers.filter((l) => l.kind === 'map').at(-1).name") == rec.maps[-1].name
    compare(shown, rec.maps[-1].name, rec.maps[-1].image("cls")[0])
    shown.hover(0.52, 0.1)
    size = shown.ask("[hookattn.view().layer.queries.rows, hookattn.view().layer.queries.columns]")
    step = 14 // size[0]
    rows = [rec.maps[-1].image((14 * 52 // 100 // step * step + i, j)) for i in range(step) for j in range(step)]
    if 14 * 0.1 // step == 0:
        compare(shown, rec.maps[-1].name, torch.stack(rows).mean(0)[0])


def test_a_page_says_that_there_are_too_many_tokens_for_a_rollout(
    open_page: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rec, photo = see("square")
    tokens = len(rec.maps[-1].tokens)
    kinds = {}
    for most in (tokens, tokens - 1):
        roll_out_at_most(monkeypatch, most)
        shown = open_page(rec.explore(photo, tmp_path / "page.html"))
        kinds[most] = shown.ask("hookattn.photos()[0].layers.map((layer) => layer.kind)")
    assert kinds == {tokens: kinds[tokens - 1] + ["rollout"], tokens - 1: ["map"] * len(rec.maps)}
    assert f"no rollout of more than {tokens - 1} tokens" in shown.page.locator("#left-out").inner_text()


def test_a_budget_that_holds_nothing_is_refused(tmp_path: Path) -> None:
    rec, photo = see("square")
    with pytest.raises(ValueError, match="budget="):
        rec.explore(photo, tmp_path / "page.html", budget=60_000)
    assert not (tmp_path / "page.html").exists()


def test_maps_without_a_place_are_named_and_nothing_but_those_is_an_error(open_page: Open, tmp_path: Path) -> None:
    encoder = nn.MultiheadAttention(8, 2, batch_first=True)
    with AttentionRecorder(encoder) as lone, torch.no_grad():
        encoder(x := torch.randn(1, 5, 8), x, x, need_weights=False)
    with pytest.raises(TokenError, match="is not on the page"):
        lone.explore(None, tmp_path / "page.html")
    rec, photo = see("square")
    shown = open_page(page.write_page([*lone.maps.values(), *rec.maps.values()], photo, tmp_path / "page.html"))
    assert f"{lone.maps[0].name} is not on the page" in shown.page.locator("#left-out").inner_text()


def test_an_image_that_is_not_there_is_refused(tmp_path: Path) -> None:
    rec, photo = see("square")
    for index in (1, -2):
        with pytest.raises(TokenError, match="index= runs from 0 to 0"):
            rec.explore(photo, tmp_path / "page.html", index=index)
    with pytest.raises(ValueError, match=r"an image is \(height, width, 3\)"):
        rec.explore(np.zeros((4, 4)), tmp_path / "page.html")
    with pytest.raises(TokenError, match="there is no 'dist' token"):
        rec.explore(photo, tmp_path / "page.html", query="dist")


@pytest.mark.parametrize("query", [(1, 3), (0.5, 0.44), "reg3", 8])
def test_a_page_begins_with_the_query_that_was_given(open_page: Open, tmp_path: Path, query: Any) -> None:
    rec, photo = see("square")
    shown = open_page(rec.explore(photo, tmp_path / "page.html", query=query))
    at = photo.to_input(query) if query == (0.5, 0.44) else query
    compare(shown, rec.maps[-1].name, rec.maps[-1].image(at)[0])


def test_the_theme_is_the_system_s_until_it_is_chosen(seen: Callable[[str], Seen], open_page: Open) -> None:
    ground = "getComputedStyle(document.body).backgroundColor"
    light, dark = (open_page(seen("square").path, color_scheme=theme) for theme in ("light", "dark"))
    assert light.ask(ground) != dark.ask(ground)
    before = light.ask(ground)
    dark.page.get_by_role("button", name="Theme").click()
    assert dark.ask(ground) == before


def test_every_script_and_style_is_a_file_that_ends_nothing() -> None:
    for path in page.FOLDER.iterdir():
        text = path.read_text()
        assert "</" not in text or path.suffix == ".html", path
        assert len(text.splitlines()) <= 600
