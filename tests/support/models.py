"""Tiny timm models with every parameter randomised: fresh biases, tables and norms are zero or one and hide a dropped term."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import timm
import torch
from packaging.version import Version
from timm.layers import Attention
from torch import Tensor, nn

# name of a test: (timm model, arguments, input size); one for each variant of each recipe
TINY: dict[str, tuple[str, dict[str, Any], int]] = {
    "vit": ("vit_tiny_patch16_224", {"img_size": 64, "depth": 2, "embed_dim": 48, "num_heads": 3}, 64),
    "vit_qk_norm": ("vit_tiny_patch16_224", {"img_size": 64, "depth": 2, "embed_dim": 48, "num_heads": 3, "qk_norm": True}, 64),
    "vit_registers": ("vit_small_patch14_reg4_dinov2", {"img_size": 56, "depth": 2, "embed_dim": 48, "num_heads": 3}, 56),
    "vit_scale_norm": ("beit3_base_patch16_224", {"img_size": 64, "depth": 2, "embed_dim": 48, "num_heads": 3}, 64),
    "deit_distilled": ("deit_tiny_distilled_patch16_224", {"img_size": 64, "depth": 2, "embed_dim": 48, "num_heads": 3}, 64),
    "rope_axial": ("vit_small_patch16_rope_224", {"img_size": 64, "depth": 2, "embed_dim": 48, "num_heads": 3}, 64),
    "rope_mixed": ("vit_small_patch16_rope_mixed_224", {"img_size": 64, "depth": 2, "embed_dim": 48, "num_heads": 3}, 64),
    "rope_half": ("vit_small_patch16_dinov3", {"img_size": 64, "depth": 2, "embed_dim": 48, "num_heads": 3}, 64),
    "rope_gqa": (
        "vit_base_patch16_sapiens2",
        {"img_size": 64, "depth": 2, "embed_dim": 96, "num_heads": 6, "num_kv_heads": 2},
        64,
    ),
    "eva_split": ("eva02_base_patch16_clip_224", {"img_size": 64, "depth": 2, "embed_dim": 48, "num_heads": 3}, 64),
    "eva_fused": ("eva_giant_patch14_224", {"img_size": 56, "depth": 2, "embed_dim": 48, "num_heads": 3}, 56),
    "eva_no_rope": ("eva02_enormous_patch14_clip_224", {"img_size": 56, "depth": 2, "embed_dim": 48, "num_heads": 3}, 56),
    "beit": ("beit_base_patch16_224", {"img_size": 64, "depth": 2, "embed_dim": 48, "num_heads": 3}, 64),
    "beit_shared": (
        "beit_base_patch16_224",
        {
            "img_size": 64,
            "depth": 2,
            "embed_dim": 48,
            "num_heads": 3,
            "use_rel_pos_bias": False,
            "use_shared_rel_pos_bias": True,
        },
        64,
    ),
    "relpos": ("vit_relpos_small_patch16_224", {"img_size": 64, "depth": 2, "embed_dim": 48, "num_heads": 3}, 64),
    "relpos_qk_norm": (
        "vit_relpos_small_patch16_224",
        {"img_size": 64, "depth": 2, "embed_dim": 48, "num_heads": 3, "qk_norm": True},
        64,
    ),
    "relpos_shared": ("vit_srelpos_small_patch16_224", {"img_size": 64, "depth": 2, "embed_dim": 48, "num_heads": 3}, 64),
    "parallel": ("vit_pwee_patch16_reg1_gap_256", {"img_size": 64, "depth": 2}, 64),
    "parallel_qk_norm": ("vit_base_patch16_xp_224", {"img_size": 64, "depth": 2, "embed_dim": 48, "num_heads": 3}, 64),
    "parallel_things": ("vit_small_patch16_18x2_224", {"img_size": 64, "depth": 2, "embed_dim": 48, "num_heads": 3}, 64),
    "differential": ("vit_dwee_patch16_reg1_gap_256", {"img_size": 64, "depth": 2}, 64),
    "differential_parallel": ("vit_dpwee_patch16_reg1_gap_256", {"img_size": 64, "depth": 2}, 64),
}


TINY = {name: (model, *rest) for name, (model, *rest) in TINY.items() if timm.is_model(model)}  # older timm has fewer

# before 1.0.31, timm's own forward fails on mixed rope in other dtypes
ANY_DTYPE = [name for name in TINY if name != "rope_mixed" or Version(timm.__version__) >= Version("1.0.31")]


def randomise(module: nn.Module, spread: float = 0.5) -> nn.Module:
    """Add noise to every parameter, and to the constant buffers that a forward reads as biases."""
    with torch.no_grad():
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            if name.endswith("k_bias") or isinstance(tensor, nn.Parameter):
                scale = spread if tensor.dim() <= 1 or "table" in name else 0.15
                tensor.add_(torch.randn_like(tensor.float()).to(tensor.dtype) * scale)
    return module


def enliven(model: nn.Module, x: torch.Tensor) -> nn.Module:
    """Randomise so that signals neither die nor explode in deep and convolutional models, and set what batch norms remember."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            small = p.dim() <= 1 or any(
                word in name for word in ("table", "bias", "rel_pos", "_rel", "temperature", "logit_scale")
            )
            p.add_(torch.randn_like(p) * (0.5 if small else p[0].numel() ** -0.5))
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.momentum = 1.0
        model.train()(x)
    return model.eval()


def tiny(name: str, batch: int = 2, **overrides: Any) -> tuple[nn.Module, torch.Tensor]:
    """A randomised model in eval mode, and images for it."""
    architecture, arguments, size = TINY[name]
    model = timm.create_model(architecture, **{**arguments, **overrides})
    return randomise(model).eval(), torch.randn(batch, 3, size, size)


def by_hand(images: torch.Tensor, model: Any) -> torch.Tensor:
    """A forward of a timm ViT in the hands of the user, who calls its modules one by one."""
    x = model.norm_pre(model._pos_embed(model.patch_embed(images)))
    for block in model.blocks:
        x = block(x)
    return model.norm(x)


class Raises(nn.Module):
    """Breaks a forward off."""

    def __init__(self, error: type[BaseException] = ArithmeticError) -> None:
        super().__init__()
        self.error = error

    def forward(self, *_: Any) -> torch.Tensor:
        raise self.error("midway")


def levit(**options: Any) -> tuple[nn.Module, Tensor]:
    """Attention that is read by running it again, with BatchNorm and a cache of biases inside."""
    small = {"embed_dim": (32, 32, 32), "num_heads": (2, 2, 2), "depth": (1, 1, 1), "num_classes": 5}
    model = timm.create_model("levit_128s", img_size=128, **small, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # the norms of the residual branches are zero, and all biases
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
            elif parameter.dim() == 2:  # and the scores hardly differ
                parameter.mul_(10)
    return model.eval(), torch.randn(2, 3, 128, 128)


def some(name: str) -> tuple[nn.Module, Tensor]:
    return levit() if name == "levit" else tiny(name)


def tiny_double(name: str, **overrides: Any) -> tuple[nn.Module, Tensor]:
    model, x = tiny(name, **overrides)
    return model.double(), x.double()


DROPOUT = {"proj_drop_rate": 0.3, "attn_drop_rate": 0.3, "drop_path_rate": 0.3}


def small(name: str, size: int = 64, **options: Any) -> tuple[nn.Module, Tensor]:
    return timm.create_model(name, img_size=size, **options).eval(), torch.randn(2, 3, size, size)


B, N, H, D = 2, 37, 4, 8


C = H * D


def plain(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    module = randomise(nn.Sequential(Attention(C, H, qkv_bias=True, **options)).eval()).double()
    assert isinstance(module[0], Attention)
    return module


SCORES = 2 * N * N * D  # of one head of one image


def exported(strict: bool) -> Callable[[nn.Module, Tensor], Any]:
    return lambda model, x: torch.export.export(model, (x,), strict=strict)
