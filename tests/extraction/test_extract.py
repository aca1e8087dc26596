"""What is in the store is what each image's own maps give, made without the package; and what there is none of is refused."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import timm
import torch
from support import reference
from support.drawn import Drawn, shown, small_vit
from support.inside import cells_of_whole_photos
from support.models import randomise
from support.oracle import unfused
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from hookattn import AttentionRecorder, HookattnError, ModelError, NoMapError, TokenError, UnreadableError
from hookattn.errors import StoreError

extraction = pytest.importorskip("hookattn.extraction", exc_type=ImportError)
zarr, xarray = pytest.importorskip("zarr"), pytest.importorskip("xarray")
WHAT = "cls,rollout,entropy,distance,received,keys,maps"
RANDOM = torch.Generator()


def stored(where: Path) -> Any:
    return xarray.open_zarr(where, chunks=None)


def own_maps(model: nn.Module, x: Tensor) -> list[Tensor]:
    """(heads, queries, keys) of each layer, by timm's own path that forms them."""
    with unfused(model) as maps, torch.no_grad():
        model(x)
    return [m[0] for m in maps]


def near(got: Any, expected: Any, tolerance: float = 2e-6) -> None:
    torch.testing.assert_close(torch.as_tensor(got.values), torch.as_tensor(expected).float(), rtol=1e-5, atol=tolerance)


@pytest.mark.parametrize("workers", [0, 2])
def test_what_is_stored_of_each_image_is_what_its_own_maps_give(tmp_path: Path, workers: int) -> None:
    model, images = small_vit(reg_tokens=1), Drawn(11)
    # blocks of 4 images in batches of 3: neither divides the other, or the number of images
    extraction.extract(model, images, tmp_path / "x.zarr", WHAT, dtype="float32", batch_size=3, block=4, workers=workers)
    found = stored(tmp_path / "x.zarr")
    assert list(found.image.values) == images.names
    assert list(found.layer.values) == ["blocks.0.attn", "blocks.1.attn"]
    assert list(found.label.values) == images.labels
    assert list(found.depth.values) == [0, 1]
    assert list(found.key_token.values) == ["cls", "reg0", *["patch"] * 16]
    assert list(found.key_row.values[2:7]) == [0, 0, 0, 0, 1]
    places = [None, None, *reference.centres(4, 4, 16, 16)]
    for index in range(len(images)):
        x = shown(images, index, model)
        maps, one = own_maps(model, x), found.isel(image=index)
        near(one.rollout, reference.rollout([m[None] for m in maps])[0, 0])
        for layer, m in enumerate(maps):
            of = one.isel(layer=layer)
            near(of.maps, m)
            near(of.cls, m[:, 0])
            near(of.received, reference.received(m[None])[0])
            near(of.entropy, reference.entropy(m[None])[0].mean(-1))
            near(of.distance, [mean(reference.attention_distance(head, places, places)) for head in m], 1e-4)
    assert (found.entropy.units, found.distance.units) == ("nats", "pixels")
    assert found["keys"].dims == ("image", "layer", "head", "key", "channel")
    with AttentionRecorder(model) as rec, torch.no_grad():
        model(shown(images, 7, model))
    near(found["keys"][7, 1], rec.maps[1].k[0], 1e-5)


def test_images_of_other_shapes_have_grids_of_their_own(tmp_path: Path) -> None:
    model, images = small_vit(dynamic_img_size=True), Drawn(7, sizes=((48, 64), (90, 30), (20, 20)))
    extraction.extract(model, images, tmp_path / "x.zarr", "cls,maps,entropy,rollout", crop="none", dtype="float32", block=4)
    found, run = stored(tmp_path / "x.zarr"), extraction.open(tmp_path / "x.zarr")
    for index in range(len(images)):
        x = shown(images, index, model, crop="none")
        rows, columns = (side // 16 for side in x.shape[-2:])
        tokens = 1 + rows * columns
        one, maps = found.isel(image=index), own_maps(model, x)
        assert (int(one.grid_rows), int(one.grid_cols)) == (rows, columns)
        assert bool(one.cls[..., tokens:].isnull().all())
        near(one.cls[1, :, :tokens], maps[1][:, 0])
        near(one.entropy[1], reference.entropy(maps[1][None])[0].mean(-1))
        near(one.rollout[:tokens], reference.rollout([m[None] for m in maps])[0, 0])
        read = run.maps(index)["blocks.1.attn"]
        assert read.tokens.grid_size == (rows, columns)
        torch.testing.assert_close(read[0], maps[1], rtol=1e-5, atol=1e-6)
    assert len({(int(r), int(c)) for r, c in zip(found.grid_rows, found.grid_cols)}) == 3


@pytest.mark.parametrize("cells", [1, 2, 7, 16, 196, 1369])
def test_there_is_room_for_a_photo_of_any_shape(cells: int) -> None:
    shapes = [(height, width) for height in range(1, 60) for width in range(1, 700, 3)]
    most, found = cells_of_whole_photos(cells, shapes)
    assert max(found) <= most <= 2 * cells


def test_layers_with_other_heads_and_windows_stand_beside_each_other(tmp_path: Path) -> None:
    model = randomise(timm.create_model("swin_tiny_patch4_window7_224", img_size=56, window_size=7, num_classes=0)).eval()
    images = Drawn(3)
    extraction.extract(model, images, tmp_path / "x.zarr", "entropy,distance", batch_size=2)
    found = stored(tmp_path / "x.zarr")
    with AttentionRecorder(model) as rec, torch.no_grad():
        model(shown(images, 2, model))
    for layer, (m, own) in enumerate(zip(rec.maps.values(), own_maps_of_windows(model, shown(images, 2, model)))):
        heads = m.shape[1]
        near(found.entropy[2, layer, :heads], reference.entropy(own).mean((0, 2)), 1e-5)
        assert bool(found.entropy[2, layer, heads:].isnull().all())
        assert not bool(found.distance[2, layer, :heads].isnull().any())
    for what in ("cls", "received", "maps", "keys"):
        with pytest.raises(HookattnError, match=r"'?\w+'? cannot be had of this model: "):
            extraction.extract(model, images, tmp_path / f"{what}.zarr", what, layers="layers.0.*")


def own_maps_of_windows(model: nn.Module, x: Tensor) -> list[Tensor]:
    with unfused(model) as maps, torch.no_grad():
        model(x)
    return list(maps)


def test_what_some_layers_do_not_have_is_nan_there_and_the_store_says_why(tmp_path: Path) -> None:
    model = randomise(timm.create_model("cait_xxs24_224", img_size=64, depth=2, num_classes=0)).eval()
    images = Drawn(2)
    extraction.extract(model, images, tmp_path / "x.zarr", "cls,distance", dtype="float32")
    found, run = stored(tmp_path / "x.zarr"), extraction.open(tmp_path / "x.zarr")
    has_cls = ["token_only" in layer for layer in run.layers]
    assert any(has_cls)
    assert not all(has_cls)
    assert [not bool(found.cls[1, i].isnull().all()) for i in range(len(has_cls))] == has_cls
    assert [bool(found.distance[1, i].isnull().all()) for i in range(len(has_cls))] == has_cls
    missing = run.facts["missing"]
    assert set(missing["cls"]) == {layer for layer, has in zip(run.layers, has_cls) if not has}
    assert "there is no 'cls' token" in next(iter(missing["cls"].values()))
    maps = run.maps(1)
    assert list(maps) == [layer for layer, has in zip(run.layers, has_cls) if has]
    assert set(maps.skipped) == set(missing["cls"])
    with AttentionRecorder(model) as rec, torch.no_grad():
        model(shown(images, 1, model))
    torch.testing.assert_close(maps[0].image("cls"), rec.maps[next(iter(maps))].image("cls"), rtol=1e-5, atol=1e-6)


def test_branches_on_two_grids_stand_beside_each_other(tmp_path: Path) -> None:
    model = randomise(timm.create_model("crossvit_tiny_240", img_size=120, depth=[[1, 1, 0]], num_classes=0)).eval()
    images = Drawn(2)
    extraction.extract(model, images, tmp_path / "x.zarr", "cls,distance", dtype="float32")
    found, maps = stored(tmp_path / "x.zarr"), extraction.open(tmp_path / "x.zarr").maps(1)
    with AttentionRecorder(model) as rec, torch.no_grad():
        model(shown(images, 1, model))
    for layer, (m, other) in enumerate(zip(rec.maps.values(), maps.values())):
        near(found.cls[1, layer, :, : m.shape[3]], m.rows("cls")[0])
        assert bool(found.cls[1, layer, :, m.shape[3] :].isnull().all())
        assert (other.query_tokens.grid_size, other.tokens.grid_size) == (m.query_tokens.grid_size, m.tokens.grid_size)
        torch.testing.assert_close(other.image("cls"), m.image("cls"), rtol=1e-5, atol=1e-6)
    # a class token that looks at the other branch is at no distance from it
    assert [bool(row.isnull().all()) for row in found.distance[1]] == ["fusion" in name for name in maps]


def test_eight_bits_are_shares_of_the_largest_of_each_row(tmp_path: Path) -> None:
    model, images = small_vit(), Drawn(3)
    for dtype in ("uint8", "float32"):
        extraction.extract(model, images, tmp_path / dtype, "cls,maps,keys,entropy", dtype=dtype)
    eight, exact = stored(tmp_path / "uint8"), stored(tmp_path / "float32")
    assert eight["maps"].dtype == eight.cls.dtype == "uint8"
    assert (eight["keys"].dtype, eight.entropy.dtype) == ("float16", "float32")  # which no 8 bits hold
    for name in ("cls", "maps"):
        read = eight[name].astype("float32") / 255 * eight[f"{name}_max"]
        assert bool((abs(read - exact[name]) <= eight[f"{name}_max"] / 510 * 1.001).all())
        assert bool((eight[name].max("key") == 255).all())
    whole = extraction.open(tmp_path / "uint8").maps(1)[0]
    torch.testing.assert_close(whole[...], torch.as_tensor(exact.maps[1, 0].values)[None], rtol=0, atol=1 / 510)


def test_a_model_runs_once_for_each_image_and_once_to_look(tmp_path: Path) -> None:
    model, seen = small_vit(), list[int]()
    model.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    before = torch.random.get_rng_state()
    extraction.extract(model, Drawn(9), tmp_path / "x.zarr", "entropy,maps,cls,rollout", batch_size=4, block=8)
    assert seen == [1, 4, 4, 1]
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in [*model.modules()][1:])


def test_a_quantity_of_ones_own(tmp_path: Path) -> None:
    model, images = small_vit(), Drawn(3)
    top = extraction.Quantity("top", ("head", "rank"), lambda m: m[:, :, 0].topk(3).values)
    extraction.extract(model, images, tmp_path / "x.zarr", ["cls", top])
    found = stored(tmp_path / "x.zarr")
    assert found.top.dims == ("image", "layer", "head", "rank")
    for name in found.coords:
        with pytest.raises(HookattnError, match=f"no array '{name}' for a quantity"):
            extraction.extract(model, images, tmp_path / "y.zarr", extraction.Quantity(str(name), ("rank",), top.of))
    near(found.top[2, 1], own_maps(model, shown(images, 2, model))[1][:, 0].topk(3).values)


def test_quantities_whose_axes_are_of_other_lengths_stand_beside_each_other(tmp_path: Path) -> None:
    model, images = small_vit(), Drawn(2)
    first = extraction.Quantity("first", ("head", "key"), lambda m: m[:, :1, 0, :5])
    extraction.extract(model, images, tmp_path / "x.zarr", ["entropy", "cls", first], dtype="float32")
    found = stored(tmp_path / "x.zarr")  # in which xarray has one length for all axes of a name
    assert found.first.shape == found.cls.shape
    near(found.first[1, 1, :1, :5], own_maps(model, shown(images, 1, model))[1][:1, 0, :5])
    assert int(found.first[1, 1].notnull().sum()) == 5


@pytest.mark.parametrize("per_layer", [True, False])
def test_a_quantity_of_other_axes_than_it_says_is_refused(tmp_path: Path, per_layer: bool) -> None:
    wrong: dict[str, Callable[[Any], Any]] = {
        r"a tensor \(2,\)": lambda m: torch.zeros(2),
        r"a tensor \(\)": lambda m: torch.tensor(3.0),
        "a ndarray": lambda m: torch.zeros(1, 2).numpy(),
    }
    for message, of in wrong.items():
        asked = extraction.Quantity("top", ("head",), of, per_layer=per_layer)
        with pytest.raises(
            UnreadableError, match=rf"'top' cannot .*gives {message} where a tensor \(images, head\) is expected"
        ):
            extraction.extract(small_vit(), Drawn(2), tmp_path / "x.zarr", asked)
    assert not (tmp_path / "x.zarr").exists()


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_cannot_be_read_is_left_out_and_counted(tmp_path: Path, workers: int) -> None:
    model, images = small_vit(), Drawn(9, broken=[0, 5])
    told: list[Any] = []
    summary = extraction.extract(
        model, images, tmp_path / "x.zarr", "cls,entropy", batch_size=2, block=4, workers=workers, report=told.append
    )
    assert (summary.images, summary.taken, summary.broken, summary.resumed) == (9, 7, 2, 0)
    broken = {name: why for step in told for name, why in step.broken.items()}
    assert set(broken) == {"photo 000.png", "photo 005.png"}
    assert [step.done for step in told] == [2, 4, 6, 8, 9]
    found = stored(tmp_path / "x.zarr")
    assert found.status.values.tolist() == [2, 1, 1, 1, 1, 2, 1, 1, 1]
    assert "no image that can be read" in str(found.error[5].values)
    assert list(found.label.values) == Drawn(9).labels
    assert bool(found.cls[5].isnull().all())
    assert bool(found.entropy[0].isnull().all())
    assert not bool(found.cls[6].isnull().any())
    with pytest.raises(HookattnError, match=r"photo 005\.png cannot be read"):
        extraction.extract(model, Drawn(9, broken=[5]), tmp_path / "strict.zarr", "cls", strict=True)


def test_if_none_can_be_read_nothing_is_made(tmp_path: Path) -> None:
    with pytest.raises(HookattnError, match="none of the images can be read"):
        extraction.extract(small_vit(), Drawn(3, broken=[0, 1, 2]), tmp_path / "x.zarr")
    assert not (tmp_path / "x.zarr").exists()


class Numbered(Dataset[Any]):
    """A data set whose images are as one asks for."""

    transform: Any = None

    def __init__(self, make: Callable[[int], Any], count: int = 5) -> None:
        self._make, self._count = make, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Any:
        return self._make(index)


def picture(index: int) -> Tensor:
    return torch.randn(3, 64, 64, generator=RANDOM.manual_seed(index))


FORMS: dict[str, Callable[[int], Any]] = {
    "alone": picture,
    "with a label": lambda i: (picture(i), i % 3),
    "a tensor as label": lambda i: [picture(i), torch.tensor(i % 3)],
    "a dict": lambda i: {"pixel_values": picture(i), "label": i % 3},
}


@pytest.mark.parametrize("form", FORMS)
def test_a_data_set_of_torch(tmp_path: Path, form: str) -> None:
    model, dataset = small_vit(), Numbered(FORMS[form])
    # shuffled: the order in the store is the data set's all the same
    loader = DataLoader(dataset, batch_size=2, shuffle=True)
    extraction.extract(model, loader, tmp_path / "x.zarr", "cls", dtype="float32")
    found = stored(tmp_path / "x.zarr")
    assert list(found.image.values) == [f"{i:08d}" for i in range(5)]
    assert list(found.label.values) == (["0", "1", "2", "0", "1"] if form != "alone" else [""] * 5)
    for index in range(5):
        near(found.cls[index, 1], own_maps(model, picture(index)[None])[1][:, 0])
    assert len({*found.sha256.values}) == 5


def test_where_a_transform_lies_in_memory_makes_no_other_run(tmp_path: Path) -> None:
    model = small_vit()
    for _ in range(2):
        dataset = Numbered(picture)
        dataset.transform = lambda x: x
        assert extraction.extract(model, dataset, tmp_path / "x.zarr", "entropy").taken == 5
    dataset.transform = torch.nn.Identity()
    with pytest.raises(StoreError, match=r"preprocessing\.transform: <function .* \| Identity\(\)"):
        extraction.extract(model, dataset, tmp_path / "x.zarr", "entropy")


def test_a_layer_that_does_not_run_for_all_images_says_so(tmp_path: Path) -> None:
    class Early(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.vit = small_vit()

        def forward(self, x: Tensor) -> Tensor:
            x = self.vit.patch_embed(x)
            return self.vit.blocks(x) if x[0, 0, 0] > 0 else self.vit.blocks[0](x)

    model = Early().eval()
    with torch.no_grad():
        signs = [bool(model.vit.patch_embed(picture(i)[None])[0, 0, 0] > 0) for i in range(40)]
    there, missing = signs.index(True), signs.index(False)
    with pytest.raises(UnreadableError, match=r"'vit\.blocks\.1\.attn' ran for the first image and not for a later one"):
        extraction.extract(
            model, Numbered(lambda i: picture((there, missing)[i]), 2), tmp_path / "x.zarr", "entropy", batch_size=1
        )


def test_a_data_set_that_is_none(tmp_path: Path) -> None:
    class Streamed(IterableDataset[Any]):
        def __iter__(self) -> Any:
            return iter([picture(0)])

    model, out = small_vit(), tmp_path / "x.zarr"
    with pytest.raises(HookattnError, match="Streamed cannot be asked for an image by number"):
        extraction.extract(model, DataLoader(Streamed()), out)
    with pytest.raises(HookattnError, match=r"read\. 00000000: an image of Numbered is a tensor \(64, 64\)((?!00000001).)*$"):
        extraction.extract(model, Numbered(lambda i: torch.zeros(64, 64)), out)
    with pytest.raises(HookattnError, match="is NoneType of a dict with img, label: a data set gives"):
        extraction.extract(model, Numbered(lambda i: {"img": picture(i), "label": 3}), out)
    with pytest.raises(HookattnError, match="is str: a data set gives"):
        extraction.extract(model, Numbered(lambda i: "dog.jpg"), out)
    with pytest.raises(HookattnError, match="there are no images in it"):
        extraction.extract(model, Numbered(picture, 0), out)
    assert not out.exists()


def test_what_a_model_does_not_take_or_have_is_told_at_the_first_image(tmp_path: Path) -> None:
    cait, out = timm.create_model("cait_xxs24_224", img_size=64, depth=2, num_classes=0).eval(), tmp_path / "x.zarr"
    with pytest.raises(HookattnError, match=r"takes no images 1 x 3 x 50 x 50 \(.*its own size: crop='center'"):
        extraction.extract(small_vit(), Numbered(lambda i: torch.zeros(3, 50, 50)), out)
    with pytest.raises(UnreadableError, match=r"'rollout' cannot be had of this model: .* Leave it out, or choose layers"):
        extraction.extract(cait, Numbered(picture), out, "rollout")
    assert not out.exists()


def test_a_process_that_is_killed_while_it_reads_is_told(tmp_path: Path) -> None:
    def die(index: int) -> Tensor:
        if get_worker_info() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return picture(index)

    model = small_vit()
    with pytest.raises(HookattnError, match=r"reads images is gone \(DataLoader worker .* goes on, with fewer workers"):
        extraction.extract(model, Numbered(die), tmp_path / "x.zarr", workers=1)
    assert extraction.extract(model, Numbered(die), tmp_path / "x.zarr", workers=0).taken == 5


def test_images_that_a_model_does_not_take_are_named(tmp_path: Path) -> None:
    sizes = Numbered(lambda i: torch.zeros(3, 64 + 16 * (i in (1, 3)), 64))
    with pytest.raises(HookattnError, match=r"takes no images 2 x 3 x 80 x 64 .* Shown were: 00000001, 00000003\."):
        extraction.extract(small_vit(), sizes, tmp_path / "x.zarr", "cls")


def test_a_larger_image_than_the_first_says_so(tmp_path: Path) -> None:
    model = small_vit(dynamic_img_size=True)
    sizes = Numbered(lambda i: torch.zeros(3, 64 + 16 * (i == 3), 64))
    with pytest.raises(UnreadableError, match=r"there is room for \(3, 17\), as for the first.* Shown were: 00000003\."):
        extraction.extract(model, sizes, tmp_path / "x.zarr", "cls")


def test_what_is_asked_for_wrongly_says_what_there_is(tmp_path: Path) -> None:
    model, images, out = small_vit(), Drawn(2), tmp_path / "x.zarr"
    wrong: list[tuple[str, dict[str, Any]]] = [
        ("there is nothing called 'entrophy'.*'entropy'", {"what": "cls,entrophy"}),
        ("'cls' is asked for twice", {"what": "cls, cls"}),
        ("nothing is asked for", {"what": []}),
        ("dtype='int8' is not stored: float16, float32, uint8", {"dtype": "int8"}),
        ("batch_size and block are numbers of images from 1 on", {"batch_size": 0}),
        ("batch_size and block are numbers of images from 1 on", {"block": 0}),
        (r"no attention module.*'blocks\.9'|blocks\.9", {"layers": "blocks.9.attn"}),
    ]
    for message, options in wrong:
        with pytest.raises(HookattnError, match=message):
            extraction.extract(model, images, out, **options)
    with pytest.raises(ModelError, match=r"training mode.*model\.eval\(\)"):
        extraction.extract(small_vit().train(), images, out)
    with pytest.raises(UnreadableError, match="there is no 'cls' token"):
        extraction.extract(small_vit(class_token=False, global_pool="avg"), images, out, "cls")
    with pytest.raises((NoMapError, ModelError)):
        extraction.extract(timm.create_model("resnet18", num_classes=0).eval(), images, out)
    with pytest.raises(TokenError, match="does not say how it wants its images"):
        extraction.extract(nn.Sequential(small_vit().blocks).eval(), images, out)
    assert not out.exists()
    assert not [*tmp_path.iterdir()]


CONFIG = {"input_size": (3, 64, 64), "mean": (0.4,) * 3, "std": (0.6,) * 3, "crop_pct": 1.0}


def test_a_model_of_another_library_that_does_not_say_how_it_wants_photos(tmp_path: Path) -> None:
    vision_transformer = pytest.importorskip("torchvision.models.vision_transformer")
    model, images = randomise(vision_transformer.VisionTransformer(64, 16, 2, 3, 48, 96)).eval(), Drawn(3)
    with pytest.raises(TokenError, match=r"does not say how it wants its images; say it: preprocessing=\{\"input_size\""):
        extraction.extract(model, images, tmp_path / "x.zarr")
    with pytest.raises(HookattnError, match=r"Compose does not say .* give a data set of torch with it as its transform"):
        extraction.extract(model, images, tmp_path / "x.zarr", preprocessing=Compose())
    extraction.extract(model, images, tmp_path / "x.zarr", "cls,rollout,maps", dtype="float32", preprocessing=CONFIG)
    maps, found = list[Tensor](), stored(tmp_path / "x.zarr").isel(image=2)
    for layer in model.encoder.layers:
        layer.self_attention.register_forward_pre_hook(lambda module, args: maps.append(written_out(module, args[0])))
    with torch.no_grad():
        model(shown(images, 2, CONFIG))
    near(found.maps, torch.stack(maps))
    near(found.cls, torch.stack(maps)[:, :, 0])
    near(found.rollout, reference.rollout([m[None] for m in maps])[0, 0])


class Compose:
    """Some function that makes images."""


def written_out(module: Any, x: Tensor) -> Tensor:
    """(heads, queries, keys) of a module of PyTorch, from the definition."""
    heads, width = module.num_heads, x.shape[-1] // module.num_heads
    q, k, _ = nn.functional.linear(x[0], module.in_proj_weight, module.in_proj_bias).unflatten(-1, (3, heads, width)).unbind(1)
    return torch.einsum("qhc,khc->hqk", q, k).mul(width**-0.5).softmax(-1)


def test_whole_photos_are_made_of_whole_patches_where_a_config_does_not_tell_how_large_they_are(tmp_path: Path) -> None:
    model, images = small_vit(dynamic_img_size=True), Drawn(3, sizes=((48, 64), (90, 30)))
    extraction.extract(model, images, tmp_path / "told.zarr", "cls,entropy", crop="none")
    config = {**model.pretrained_cfg, "input_size": (3, 64, 64)}
    del model.pretrained_cfg, model.default_cfg
    extraction.extract(model, images, tmp_path / "x.zarr", "cls,entropy", crop="none", preprocessing=config)
    assert stored(tmp_path / "x.zarr").equals(stored(tmp_path / "told.zarr"))


class Both(nn.Module):
    """Sees each image twice, as it is and mirrored, with one trunk."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = small_vit()

    def forward(self, x: Tensor) -> Tensor:
        return self.trunk(x) + self.trunk(x.flip(-1))  # type: ignore[no-any-return]


def test_a_trunk_that_is_called_twice_is_stored_by_calls(tmp_path: Path) -> None:
    model, images = Both().eval(), Drawn(5)
    extraction.extract(model, images, tmp_path / "x.zarr", "cls,maps", dtype="float32", batch_size=2, block=4)
    found = stored(tmp_path / "x.zarr")
    names = [f"trunk.blocks.{block}.attn" for block in (0, 1)]
    assert list(found.layer.values) == [*names, *[f"{name}#1" for name in names]]
    for index in range(len(images)):
        for place, expected in enumerate(own_maps(model, shown(images, index, model))):
            near(found.maps[index, place], expected)


class OutOfRange(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return [x][1]


def test_whatever_a_model_raises_of_images_is_told(tmp_path: Path) -> None:
    model = nn.Sequential(small_vit(), OutOfRange()).eval()
    with pytest.raises(HookattnError, match=r"takes no images 1 x 3 x 64 x 64 \(IndexError: "):
        extraction.extract(model, Drawn(3), tmp_path / "x.zarr", "cls")
